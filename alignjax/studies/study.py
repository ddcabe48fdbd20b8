"""What a study is, and the loop over its seeds.

A study is a module. Its docstring begins with its question in a sentence, and it has

  parts(options) -> [name]          what is run for each seed, in order; names of files
  protocol(trial, part) -> {...}    all that decides the rows of a part but for the seed, as JSON
  run(trial, part) -> [row]         runs a part in trial.workdir; a row is flat, of JSON numbers,
                                    strings and None
  table(rows) -> str                Markdown of the rows of all seeds
  plot(rows, path)                  their picture
  arguments(parser)                 further flags of the command; may be missing
  CPU_DEVICES                       as config.cpu_devices; if missing, that of the sandbox

`run_study` keeps the rows of each part as soon as there are any, so that a study that was stopped
goes on, and one that has ended can be given further seeds or parts. A workdir holds

  seed-S/                  the runs of a seed, which all studies of the workdir share
  NAME/seed-S/PART.json    the rows of a part, its protocol, and the facts of its making
  NAME/rows.jsonl, facts.json, table.md, plot.png     made of these
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from alignjax import report, studies, train
from alignjax.evals.stats import ANY, Figure, interval
from alignjax.runtime import files, journal
from alignjax.setup.records import say

SEEDS = (41, 42, 43, 44, 45)  # Those of the tables; nothing is chosen on them.
DEVELOPMENT = (1, 11, 100, 101)  # Settings are chosen on these.

Row = dict[str, Any]


class Trial(NamedTuple):
  """One seed of a study.

  Attributes:
    seed: of the config and of the sandbox's world.
    workdir: the folder of the seed's runs, which other studies may have filled in part.
    tiny: whether everything is small, for tests and a first look.
    options: the parsed flags of the study.
  """

  seed: int
  workdir: files.Folder
  tiny: bool
  options: argparse.Namespace


def find(name: str) -> Any:
  """Returns the module of a study: an included one by its name, or one of a fork by its dotted
  name.

  Raises:
    ValueError: there is no such study, or the module lacks a function of a study.
  """
  if name not in studies.NAMES and '.' not in name:
    raise ValueError(
      f'there is no study {name!r}. Included are {", ".join(studies.NAMES)}; that of a fork is '
      f'named as mylab.studies.mine, with the folder that holds mylab on PYTHONPATH.'
    )
  try:
    module = importlib.import_module(name if '.' in name else f'alignjax.studies.{name}')
  except ModuleNotFoundError as error:
    raise ValueError(f'the study {name}: {error}.') from None
  wanted = ('parts', 'protocol', 'run', 'table', 'plot')
  if missing := [f for f in wanted if not callable(getattr(module, f, None))]:
    raise ValueError(
      f'{name} is no study, as it has no function {missing[0]}: alignjax/studies/study.py says '
      'what a study has.'
    )
  return module


def run_study(
  module: Any, workdir: files.Folder, seeds: Sequence[int], tiny: bool, options: argparse.Namespace
) -> list[Row]:
  """Runs what is missing of a study, writes its table and plot after each seed, and returns all
  rows that the workdir holds.

  Args:
    module: the study.
    workdir: the folder of the studies. The study's own is WORKDIR/NAME.
    seeds: the seeds to run; rows of others that are there stay in the table.
    tiny: see Trial.
    options: the parsed flags of the study.

  Raises:
    ValueError: the workdir has rows of another protocol.
  """
  name = module.__name__.rpartition('.')[2]
  folder, parts = workdir / name, list(module.parts(options))
  trials = {seed: Trial(seed, workdir / f'seed-{seed}', tiny, options) for seed in seeds}
  protocols = {part: _json(module.protocol(trials[seeds[0]], part)) for part in parts}
  for record in records(folder, parts):  # before anything runs
    if record['part'] in parts:
      check(folder, record, protocols[record['part']])
  for seed, trial in trials.items():
    for number, part in enumerate(parts, 1):
      path, words = folder / f'seed-{seed}' / f'{part}.json', f'{name}: seed {seed}, {part}'
      if path.exists():
        say(f'{words} ({number} of {len(parts)}): measured before, reused ({path})')
        continue
      say(f'{words} ({number} of {len(parts)}): start')
      began = time.perf_counter()
      rows = [dict(row, seed=seed) for row in module.run(trial, part)]
      seconds = time.perf_counter() - began
      facts = dict(seconds=round(seconds, 1), machine=machine(), **report.source())
      record = dict(seed=seed, part=part, rows=rows, facts=facts, protocol=protocols[part])
      journal.write_whole(path, record)
      jax.clear_caches()
      say(f'{words} ({number} of {len(parts)}): done in {seconds:.0f} s')
    write(module, folder, records(folder, parts))
  return [row for record in records(folder, parts) for row in record['rows']]


def records(folder: files.Folder, parts: Sequence[str]) -> list[dict[str, Any]]:
  """The kept records of a study by seed, those of `parts` first and in their order."""
  found = [journal.read_whole(path) for path in folder.glob('seed-*/*.json')]
  place = {part: i for i, part in enumerate(parts)}
  return sorted(
    (record for record in found if record is not None),
    key=lambda r: (r['seed'], place.get(r['part'], len(place)), r['part']),
  )


def check(folder: files.Folder, record: Mapping[str, Any], protocol: Mapping[str, Any]) -> None:
  """Raises ValueError where kept rows were made by another protocol than the present one."""
  if differ := sorted(_differences(record['protocol'], protocol)):
    path = folder / f'seed-{record["seed"]}' / f'{record["part"]}.json'
    raise ValueError(
      f'{path} has rows of another protocol: {differ[0]} differs. Use another --workdir, or remove '
      'the file to measure it again.'
    )


def _differences(one: Any, other: Any, name: str = '') -> list[str]:
  if isinstance(one, dict) and isinstance(other, dict):
    return [
      found
      for key in {*one, *other}
      for found in _differences(one.get(key), other.get(key), f'{name}.{key}'.lstrip('.'))
    ]
  return [] if one == other else [name]


def write(module: Any, folder: files.Folder, found: Sequence[Mapping[str, Any]]) -> None:
  """Writes rows.jsonl, facts.json, table.md and plot.png of a study."""
  rows = [row for record in found for row in record['rows']]
  lines = ''.join(json.dumps(row) + '\n' for row in rows)
  files.write(folder / 'rows.jsonl', lines)
  facts = [{key: record[key] for key in ('seed', 'part', 'facts')} for record in found]
  protocols = {record['part']: record['protocol'] for record in found}
  kept = dict(facts=facts, protocols=protocols)
  files.write(folder / 'facts.json', json.dumps(kept, indent=1) + '\n')
  files.write(folder / 'table.md', module.table(rows))
  module.plot(rows, folder / 'plot.png')


def read_rows(path: files.Folder) -> list[Row]:
  """The rows of rows.jsonl."""
  return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoints(stage: files.Folder, last: int) -> Iterator[tuple[int, files.Folder]]:
  """The step and the folder of each checkpoint of a policy, the finished stage last."""
  kept = sorted((int(p.name), p) for p in (stage / 'candidates').glob('*') if p.name.isdigit())
  yield from ((step, path) for step, path in kept if step < last)
  yield last, stage


def machine() -> str:
  """Returns what the study runs on: an accelerator by its name, or the kind and number of cores."""
  device = jax.devices()[0]
  if device.platform == 'cpu':
    return f'{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}'
  return f'{device.device_kind}, jax {jax.__version__}'


def deciding(trial: Trial, config: Any, stages: Sequence[str] | None = None) -> dict[str, Any]:
  """Returns what decides the results of stages and of those that they start from, but for the
  seeds, for `protocol`: entries that a later version adds for other things change nothing.

  Args:
    config: of the stages.
    stages: their names; None means those that the config runs.
  """
  names = train.resolve(config, stages)
  own = {name: train.identity(config, name)['stages'][name] for name in names}
  made = {k: v for k, v in train.identity(config, names[0]).items() if k != 'seed'}
  text = json.dumps(made | {'stages': own}, default=str).replace(str(trial.workdir), 'WORKDIR')
  made = json.loads(text)
  made['world'].pop('seed')
  return made


def _json(value: Any) -> Any:
  return json.loads(json.dumps(value, default=str))


# ---- tables


def over_seeds(
  rows: Sequence[Mapping[str, Any]], by: str, keys: Sequence[str], shares: Sequence[str] = ()
) -> dict[Any, dict[str, Figure]]:
  """Returns {value of the column `by`: {key: figure over seeds}} in the order of the rows. A seed
  that lacks a number is left out of its figure; a figure without any is None's (stats.interval).
  The intervals of the keys in `shares` end at 0 and 1."""
  groups: dict[Any, list[Mapping[str, Any]]] = {}
  for row in rows:
    groups.setdefault(row[by], []).append(row)

  def figure(own, key):
    found = interval(_numbers(own, key), None, ANY)
    if key in shares and found['ci95'][0] is not None:
      found['ci95'] = np.clip(found['ci95'], 0.0, 1.0).tolist()
    return found

  return {name: {key: figure(own, key) for key in keys} for name, own in groups.items()}


def paired(rows: Sequence[Mapping[str, Any]], by: str, one: Any, other: Any, key: str) -> Figure:
  """Returns the figure of rows[by == one][key] - rows[by == other][key], paired by seed."""
  found = {
    name: {row['seed']: row[key] for row in rows if row[by] == name and row.get(key) is not None}
    for name in (one, other)
  }
  seeds = [seed for seed in found[one] if seed in found[other]]
  return interval([found[one][seed] - found[other][seed] for seed in seeds], None, ANY)


def where_reached(x: Sequence[float], y: Sequence[float], target: float) -> float | None:
  """Returns the value of y where x, from its start on, first reaches the target: linear between two
  points. None if it never does."""
  for i, value in enumerate(x):
    if value >= target:
      if i == 0:
        return float(y[0])
      part = (target - x[i - 1]) / (value - x[i - 1])
      return float(y[i - 1] + part * (y[i] - y[i - 1]))
  return None


def _numbers(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
  return [row[key] for row in rows if row.get(key) is not None]


def seeds_of(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the seeds of rows in words: 'seeds 41, 42'."""
  found = sorted({row['seed'] for row in rows})
  return f'seed{"s" * (len(found) > 1)} {", ".join(map(str, found))}'
