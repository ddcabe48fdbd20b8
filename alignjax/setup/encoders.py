"""Processes of this host that encode blocks of a source beside this one.

They are plain Python processes that talk through pipes. A fork of a process in which JAX runs could
hang, and multiprocessing would import a user's main script once more.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_collections

from alignjax.data import cache, rows, sources
from alignjax.setup import texts

MOST = 32  # processes of a host
COMMAND = 'from alignjax.setup import encoders; encoders.serve()'


class Task(NamedTuple):
  """What a process needs to know to encode blocks.

  Attributes:
    config: the entries data and world of the config.
    kind: the kind of record.
    seed: that of the held-out prompts.
  """

  config: dict[str, Any]
  kind: str
  seed: int


def encode(task: Task, block: sources.Block, reader: Any, template: Any) -> cache.Part:
  """Returns a block as a part of a cache."""
  return rows.part(reader(block), task.kind, template, task.seed)


def reader(task: Task) -> Any:
  """Returns the function that reads the blocks of a task."""
  data = task.config['data']
  return sources.reader(data[task.kind], task.kind, data['mapping'][task.kind])


def parts(
  task: Task, blocks: Iterator[sources.Block], count: int
) -> Iterator[tuple[sources.Block, cache.Part]]:
  """Yields the blocks in order, each as a part of a cache, encoded by `count` processes."""
  free: queue.Queue = queue.Queue()
  with contextlib.ExitStack() as stack:
    for _ in range(count):
      worker = _Worker(task)
      stack.callback(worker.close)
      free.put(worker)
    pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(count))

    def ask(block):
      worker = free.get()
      try:
        return worker.ask(block)
      finally:
        free.put(worker)

    waiting: collections.deque = collections.deque()
    for block in blocks:
      waiting.append((block, pool.submit(ask, block)))
      if len(waiting) >= 2 * count:
        done, result = waiting.popleft()
        yield done, result.result()
    while waiting:
      done, result = waiting.popleft()
      yield done, result.result()


class _Worker:
  """A process that encodes blocks."""

  def __init__(self, task: Task):
    path = os.pathsep.join([os.path.abspath(p) for p in sys.path])
    # One thread each; JAX is only imported there, and may not take an accelerator.
    alone = dict(TOKENIZERS_PARALLELISM='false', JAX_PLATFORMS='cpu', PYTHONPATH=path)
    self._process = subprocess.Popen(
      [sys.executable, '-c', COMMAND],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      env={**os.environ, **alone},
    )
    self._send(task)

  def ask(self, block: sources.Block) -> cache.Part:
    """Returns the part that a block becomes, or raises what the process raised."""
    self._send(block)
    try:
      answer = pickle.load(self._process.stdout)  # pyright: ignore[reportArgumentType] it is a pipe
    except (EOFError, pickle.UnpicklingError):
      raise self._ended() from None
    if isinstance(answer, BaseException):
      raise answer
    return answer

  def close(self) -> None:
    with contextlib.suppress(OSError):
      self._process.kill()
    for pipe in (self._process.stdin, self._process.stdout):
      with contextlib.suppress(OSError):
        pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
    self._process.wait()

  def _send(self, value: Any) -> None:
    try:
      pickle.dump(value, self._process.stdin)  # pyright: ignore[reportArgumentType] it is a pipe
      self._process.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]
    except OSError:
      raise self._ended() from None

  def _ended(self) -> RuntimeError:
    return RuntimeError(
      f'a process that encodes records ended with status {self._process.wait()}; a negative one '
      'is a signal, and -9 is what a machine without memory sends.'
    )


def serve() -> None:
  """Encodes the blocks that come through standard input until it ends."""
  answers = os.fdopen(os.dup(1), 'wb')
  os.dup2(2, 1)  # What a user's function prints is no answer.
  task = pickle.load(sys.stdin.buffer)
  template = read = None
  while True:
    try:
      block = pickle.load(sys.stdin.buffer)
    except EOFError:
      return
    try:
      if read is None:
        template = texts.of_config(ml_collections.ConfigDict(task.config)).template
        read = reader(task)
      answer: Any = encode(task, block, read, template)
    except Exception as error:  # noqa: BLE001 raised again by the process that asked
      answer = error
      try:
        pickle.loads(pickle.dumps(answer))
      except Exception:  # noqa: BLE001 an exception with a constructor of its own
        answer = ValueError(f'{type(error).__name__}: {error}')
    pickle.dump(answer, answers)
    answers.flush()
