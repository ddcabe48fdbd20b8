"""Processes of this host that encode blocks of a source beside this one."""

from __future__ import annotations

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, process
from typing import Any, NamedTuple

import jax
import ml_collections

from alignjax.data import cache, rows, sources
from alignjax.data.templates import Template
from alignjax.setup import texts

MOST = 32  # processes of a host


class Task(NamedTuple):
  """What a process needs to know to encode blocks.

  Attributes:
    config: the entries data and world of the config.
    kind: the kind of record.
  """

  config: dict[str, Any]
  kind: str


def encoder(task: Task, template: Template) -> Callable[[sources.Block], cache.Part]:
  """Returns the function that makes a block a part of a cache."""
  data = task.config['data']
  read = sources.reader(data[task.kind], task.kind, data['mapping'][task.kind])
  return lambda block: rows.part(read(block), task.kind, template, data['heldout']['seed'])


def parts(
  task: Task, blocks: Iterator[sources.Block]
) -> Iterator[tuple[sources.Block, cache.Part]]:
  """Yields the blocks in order, each as a part of a cache, encoded by a process for each core."""
  count = min(len(os.sched_getaffinity(0)), MOST)
  pool = ProcessPoolExecutor(
    count,
    multiprocessing.get_context('spawn'),  # A fork of a process in which JAX runs could hang.
    _begin,
    (task,),
  )
  waiting: collections.deque = collections.deque()
  try:
    for block in blocks:
      waiting.append((block, pool.submit(_encode, block)))
      if len(waiting) >= 2 * count:
        yield waiting[0][0], waiting.popleft()[1].result()
    while waiting:
      yield waiting[0][0], waiting.popleft()[1].result()
  except process.BrokenProcessPool as error:
    raise RuntimeError(
      'a process that encodes records ended. A machine without memory ends processes; and a script '
      "of yours needs `if __name__ == '__main__':` around what it runs."
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


_own: dict[str, Any] = {}  # of a process that encodes


def _begin(task: Task) -> None:
  """Prepares a process, which ends with the one that started it, and by nothing else."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  threading.Thread(target=lambda: (parent and parent.join(), os._exit(1)), daemon=True).start()
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # One thread for each process.
  jax.config.update('jax_platforms', 'cpu')  # The accelerator belongs to the other process.
  _own['task'] = task


def _encode(block: sources.Block) -> cache.Part:
  if 'encode' not in _own:
    config = ml_collections.ConfigDict(_own['task'].config)
    _own['encode'] = encoder(_own['task'], texts.of_config(config).template)
  return _own['encode'](block)
