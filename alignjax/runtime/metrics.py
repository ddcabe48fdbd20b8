"""What a run shows and keeps: metrics.jsonl, TensorBoard, a tracker, a live display; plain lines
where there is no terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from alignjax.runtime import files, fingerprints, textfiles, trackers

LOGS = ('metrics.jsonl', 'samples.jsonl')

SHOWN = (
  'sft/loss',
  'rm/loss',
  'rm/accuracy',
  'objective/scores',
  'gold/train_labelers',
  'objective/kl',
  'ppo/loss/ptx',
)


class Writer:
  """Appends to DIRECTORY/metrics.jsonl (one object a line, 'step' first) and to TensorBoard event
  files beside it, and hands the metrics to a tracker.

  Args:
    start_step: where a resumed run goes on; lines of later steps are dropped, so that the file of a
      run that was interrupted equals that of one that was not, apart from names under 'time/' and
      'device/'. So with samples.jsonl.
    active: False on all processes but the first.
    tracker: gets the metrics too (runtime/trackers.py); None for no tracker.
    config: for the tracker to show.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    start_step: int = 0,
    active: bool = True,
    tracker: trackers.Tracker | None = None,
    config: Mapping[str, Any] = MappingProxyType({}),
  ):
    self._file: files.Folder | None = None
    self._board: Any = None
    self._sender: trackers.Sender | None = None
    if not active:
      return
    directory = files.folder(directory)
    directory.mkdir(parents=True, exist_ok=True)
    earlier: dict[str, list] = {name: [] for name in LOGS}
    for name in LOGS:
      path = directory / name
      if path.exists():
        earlier[name] = [line for line in _parsed(path) if line['step'] <= start_step]
        files.write(path, ''.join(json.dumps(line) + '\n' for line in earlier[name]))
    self._file = directory / 'metrics.jsonl'
    self._samples = directory / 'samples.jsonl'
    from tensorboardX import SummaryWriter

    self._board = SummaryWriter(str(directory), purge_step=start_step or None)
    if tracker is not None:
      self._sender = trackers.Sender(tracker, directory, config, earlier['metrics.jsonl'])

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, kind, *_) -> None:
    stopped = kind is not None and issubclass(kind, SystemExit)  # of Interrupt
    try:
      self.close('finished' if kind is None else 'stopped' if stopped else 'failed')
    except OSError:
      if kind is None:  # else what went wrong first is the error to show
        raise

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    if self._file is None:
      return
    values = {k: float(v) if math.isfinite(v) else None for k, v in sorted(metrics.items())}
    files.append(self._file, json.dumps({'step': int(step), **values}) + '\n')
    for name, value in values.items():
      if value is not None:
        self._board.add_scalar(name, value, step)
    if self._sender is not None:
      self._sender.send({'step': int(step), **values})

  def samples(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
    """Appends rows (prompt, response, score, gold) to samples.jsonl: text or messages, text, and
    numbers; None where there is none, and for what is not finite."""
    if self._file is None:
      return
    names = ('prompt', 'response', 'score', 'gold')

    def finite(x):
      return None if isinstance(x, float) and not math.isfinite(x) else x

    lines = [
      json.dumps({'step': int(step)} | dict(zip(names, map(finite, row), strict=True)))
      for row in rows
    ]
    files.append(self._samples, ''.join(f'{line}\n' for line in lines))

  def close(self, status: str = 'finished') -> None:
    """status: how the stage ended, for the tracker: 'finished', 'stopped' or 'failed'."""
    try:
      if self._file is not None:
        self._board.close()
    finally:
      if self._sender is not None:
        self._sender.close(status)


def _parsed(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines of a file, without one that a killed process left torn."""
  lines = []
  for line in textfiles.lines(textfiles.read(path)):
    try:
      lines.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return [line for line in lines if isinstance(line, dict) and isinstance(line.get('step'), int)]


def sums(directory: str | os.PathLike, step: int) -> dict[str, str]:
  """Fingerprints of what a Writer has logged up to a step, by the names of its files; an absent
  file is an empty one."""
  kept = {name: files.folder(directory) / name for name in LOGS}
  return {
    name: fingerprints.of_value(
      [line for line in (_parsed(path) if path.exists() else []) if line['step'] <= step]
    )
    for name, path in kept.items()
  }


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """A metrics.jsonl as columns: f64[lines] each, NaN where a line lacks the name."""
  lines = _parsed(path)
  names = dict.fromkeys(name for line in lines for name in line)
  return {
    name: np.array([np.nan if line.get(name) is None else line[name] for line in lines])
    for name in names
  }


def check_finite(metrics: Mapping[str, float], step: int) -> None:
  """Raises FloatingPointError that names every metric that is NaN or infinite."""
  bad = [f'{name}={value}' for name, value in metrics.items() if not math.isfinite(value)]
  if bad:
    raise FloatingPointError(
      f'step {step}: {", ".join(bad)}. Lower the learning rate or clip gradients '
      '(optimizer.*.clip_norm); the last checkpoint is from before.'
    )


class Progress:
  """A live bar in a terminal, plain lines elsewhere: the first, the last, and one every `every`
  seconds."""

  def __init__(
    self, total: int, initial: int = 0, name: str = '', active: bool = True, every: float = 10.0
  ):
    self.total, self.initial, self.name, self.every = total, initial, name, every
    self._active, self._live = active, active and sys.stdout.isatty()
    self._began = time.perf_counter()
    self._last, self._bar, self._text = -math.inf, None, ''

  def __enter__(self) -> Progress:
    if self._live:
      from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
      )
      from rich.progress import Progress as Bar

      self._bar = Bar(
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn('{task.fields[shown]}'),
      )
      self._task = self._bar.add_task(self.name, total=self.total, completed=self.initial, shown='')
      self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    if self._bar is not None:
      self._bar.stop()

  def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
    if not self._active:
      return
    if metrics:
      self._text = '  '.join(
        f'{k.split("/", 1)[1]} {metrics[k]:.3f}' for k in SHOWN if k in metrics
      )
    if self._bar is not None:
      self._bar.update(self._task, completed=step, shown=self._text)
      return
    now = time.perf_counter()
    if metrics and (now - self._last >= self.every or step == self.total):
      self._last = now
      rate = (step - self.initial) / max(now - self._began, 1e-9)
      left = (self.total - step) / max(rate, 1e-9)
      print(
        f'{self.name} {step}/{self.total}  {now - self._began:.0f} s, {left:.0f} s left  '
        f'{self._text}',
        flush=True,
      )

  def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table above the bar; in a log only where lines are not throttled."""
    if not self._active:
      return
    if self._bar is None:
      print_table(title, columns, rows)
      return
    self._bar.console.print(_rich_table(title, columns, rows))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
  """A rich table in a terminal, aligned text elsewhere."""
  if sys.stdout.isatty():
    from rich.console import Console

    Console().print(_rich_table(title, columns, rows))
    return
  rows = [[_cell(cell) for cell in row] for row in rows]
  widths = [max(len(r[i]) for r in [list(columns), *rows]) for i in range(len(columns))]

  def line(row):
    return '  ' + '  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()

  print('\n'.join([title, line(columns), *map(line, rows)]), flush=True)


def _cell(value: Any, width: int = 80) -> str:
  """A number rounded, None as nothing, a text without line breaks, its middle left out where it is
  long (samples.jsonl has all)."""
  if value is None:
    return ''
  text = ' '.join((f'{value:.2f}' if isinstance(value, float) else str(value)).split())
  return text if len(text) <= width else f'{text[: width // 2 - 2]} … {text[-width // 2 + 1 :]}'


def _rich_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]):
  from rich.table import Table
  from rich.text import Text  # a sampled "[/b]" is no markup

  table = Table(title=title, title_justify='left')
  for column in columns:
    table.add_column(column)
  for row in rows:
    table.add_row(*(Text(_cell(cell)) for cell in row))
  return table
