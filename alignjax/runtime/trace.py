"""Traces of chosen steps, and the shares of the phases in them.

    run.py --profile=ppo_ptx:3-5

writes WORKDIR/ppo_ptx/profile, for TensorBoard's profile plugin or XProf, and phases.json. The
phases are the named scopes of rollout.py, sampling.py, steps.py and losses.py. A step is one
compiled program, so that only a trace can tell how its time divides.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from alignjax.compiler import cost
from alignjax.runtime import files

PHASES = (*cost.PHASES, 'ptx')  # where they are nested, the innermost counts


class Profile(NamedTuple):
  """The steps first..last of one stage, counted from 1 as in metrics.jsonl."""

  stage: str
  first: int
  last: int


def parse(text: str) -> Profile:
  """The Profile of 'STAGE:FIRST-LAST' or 'STAGE:STEP'."""
  found = re.fullmatch(r'(\w+):(\d+)(?:-(\d+))?', text)
  if not found or not 1 <= int(found[2]) <= int(found[3] or found[2]):
    raise ValueError(
      f'--profile={text} has not the form STAGE:FIRST-LAST, steps counted from 1, such as '
      f'ppo_ptx:3-5.'
    )
  return Profile(found[1], int(found[2]), int(found[3] or found[2]))


def check(wanted: Profile | None, stages: list[str]) -> None:
  """Raises ValueError where the stage to profile does not run."""
  if wanted is not None and wanted.stage not in stages:
    raise ValueError(
      f'--profile names the stage {wanted.stage!r}; this run has {", ".join(stages)}.'
    )


class Tracer:
  """Starts and stops the trace of one stage's loop.

  Args:
    wanted: what to trace, or None.
    folder: the folder of the stage.
    first, num_steps: the loop will do the steps from first + 1 to num_steps.
  """

  def __init__(self, wanted: Profile | None, folder: files.Folder, first: int, num_steps: int):
    self.wanted = wanted if wanted and folder.name == wanted.stage else None
    self.folder = folder / 'profile'
    if self.wanted and not first < self.wanted.first <= self.wanted.last <= num_steps:
      raise ValueError(
        f'--profile={self.wanted.stage}:{self.wanted.first}-{self.wanted.last}: the steps to do '
        f'are {first + 1} to {num_steps}.'
      )

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """The context of step `number` (from 1), until its results are there."""
    if self.wanted and number == self.wanted.first:
      self._local = pathlib.Path(
        tempfile.mkdtemp() if files.is_bucket(self.folder) else self.folder
      )
      jax.profiler.start_trace(str(self._local))
    with jax.profiler.StepTraceAnnotation('step', step_num=number):
      yield
    if self.wanted and number == self.wanted.last:
      jax.profiler.stop_trace()
      shares = phases(self._local)
      if files.is_bucket(self.folder):  # The profiler can only write to disks.
        for path in (p for p in self._local.rglob('*') if p.is_file()):
          (self.folder / path.relative_to(self._local).as_posix()).write_bytes(path.read_bytes())
        files.remove(self._local)
      if jax.process_index() == 0:
        (self.folder / 'phases.json').write_text(json.dumps(shares, indent=2))
        print(
          f'profile of steps {self.wanted.first} to {self.wanted.last} in {self.folder}: '
          + (
            ', '.join(f'{name} {100 * share:.0f}%' for name, share in shares.items())
            or 'no device times'
          ),
          flush=True,
        )


def keep_names() -> None:
  """Tells XLA to launch the operations of a GPU one by one. In a CUDA graph they have no names, and
  a trace gives all of their time to 'other'. It has to be called before jax looks for devices."""
  flag, flags = '--xla_gpu_enable_command_buffer=', os.environ.get('XLA_FLAGS', '')
  if flag not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {flag}'.strip()


def phases(folder: str | pathlib.Path) -> dict[str, float]:
  """The share of each phase in the devices' busy time, in the newest trace under `folder`, with the
  largest first. 'other' is what no scope names; {} where the platform records no operations.

  The operations of a program are found by the names that the trace gives them, and their scopes in
  the program itself, which the trace also holds. An operation that contains others (a loop) counts
  only the time that they leave.
  """
  paths = sorted(pathlib.Path(folder).rglob('*.xplane.pb'), key=lambda p: p.stat().st_mtime)
  if not paths:
    raise FileNotFoundError(f'{folder} holds no trace.')
  scopes = _scopes(paths[-1].read_bytes())
  seconds: dict[str, float] = collections.defaultdict(float)
  for plane in jax.profiler.ProfileData.from_file(str(paths[-1])).planes:
    for line in plane.lines:
      operations = [
        (e.start_ns, -e.duration_ns, str(s['hlo_op']), _program(s))
        for e in line.events
        if 'hlo_op' in (s := dict(e.stats))
      ]
      for name, module, own in _own_times(sorted(operations)):
        seconds[phase_of(scopes.get((module, name), ''))] += own
  total = sum(seconds.values())
  largest = sorted(seconds.items(), key=lambda item: -item[1])
  return {name: t / total for name, t in largest} if total else {}


def phase_of(scope: str) -> str:
  """'jit(step)/update/transpose(jvp(ptx))/dot_general' -> 'ptx', the last phase in the path."""
  path = '/' + re.sub(r'[()/]+', '/', scope) + '/'
  at = {name: path.rfind(f'/{name}/') for name in PHASES}
  best = max(at, key=at.__getitem__)
  return best if at[best] >= 0 else 'other'


def _own_times(operations: list[tuple]) -> Iterator[tuple[str, str, float]]:
  """(name, module, nanoseconds without those of the operations inside) of sorted operations (start,
  -duration, name, module)."""
  open_: list[list] = []  # [end, name, module, own]
  for start, negative, name, module in operations:
    while open_ and open_[-1][0] <= start:
      yield tuple(open_.pop()[1:])
    if open_:
      open_[-1][3] += negative
    open_.append([start - negative, name, module, -negative])
  while open_:
    yield tuple(open_.pop()[1:])


def _program(stats: Mapping[str, Any]) -> str:
  """The name of the program that an operation belongs to, as 'jit_step(4)'. The number tells two
  programs of one name apart; some platforms have it in the name already."""
  name, number = str(stats.get('hlo_module', '')), stats.get('program_id')
  return name if '(' in name or number is None else f'{name}({number})'


def _scopes(trace: bytes) -> dict[tuple[str, str], str]:
  """(program, operation) -> its path of scopes, from the programs (hlo.proto) in a trace (XSpace of
  tsl's xplane.proto). A program stands there under its name with its number, and under its bare
  name for operations that have no number."""
  out = {}
  for plane in _fields(trace, 1):
    if _text(plane, 2) != '/host:metadata':
      continue
    programs = (
      (_text(event, 2), module)
      for entry in _fields(plane, 4)
      for event in _fields(entry, 2)
      for stat in _fields(event, 5)
      for program in _fields(stat, 6)
      for module in _fields(program, 1)
    )
    for numbered, module in programs:
      for instruction in (i for computation in _fields(module, 3) for i in _fields(computation, 2)):
        for metadata in _fields(instruction, 7):
          for name in (numbered, _text(module, 1)):
            out[name, _text(instruction, 1)] = _text(metadata, 2)
  return out


def _text(message: Any, number: int) -> str:
  return next((bytes(value).decode() for value in _fields(message, number)), '')


def _fields(message: Any, number: int) -> Iterator[memoryview]:
  """The length-delimited fields `number` of a protobuf message."""
  message, at = memoryview(message), 0

  def varint() -> int:
    nonlocal at
    value = shift = 0
    while True:
      byte = message[at]
      value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
      if byte < 128:
        return value

  while at < len(message):
    key = varint()
    kind = key & 7
    size = varint() if kind in (0, 2) else {1: 8, 5: 4}[kind]
    if kind != 0:
      if kind == 2 and key >> 3 == number:
        yield message[at : at + size]
      at += size
