"""The table of evaluations: tasks over models, kept by (model, task, protocol), with intervals and differences.

A task is a function

    task(model, *, data, limit, seed, keep, **options) -> list[Cell]

of a finished.Model, named in TASKS, a fork's as 'module:function', or one of the evaluation harness (harness_tasks.py). data: its
file or folder, or None for the hub; limit: items at most, or None; keep: a folder for what is dear and must survive an interruption
(continuations, judgments), which belongs to this model and protocol alone. Options are keyword arguments of its own. Layout: the
paper's Table 14.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import inspect
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from alignjax import plugins
from alignjax.runtime import files, fingerprints
from alignjax.evals import stats
from alignjax.runtime import journal


class Cell(NamedTuple):
  """What a task measured, one value an item, before it is averaged.

  Attributes:
    metric: 'accuracy', 'F1', 'entropy (bits)', ...
    prompt: the variant: 'zero-shot', 'respectful', ...; '' where there is one only.
    values: a JSON value an item; numbers where they are averaged. None = not measured (a judge refused).
    items: a name an item, the same for every model, so that differences are paired.
    clusters: items of the same label are not independent (questions of a passage); None: each on its own.
    better: 'higher', 'lower' or '' (neither: an entropy).
    aggregate: None: the mean; 'module:function' of a list of values -> float for what is no mean (BLEU).
    bounds: [low, high] of a value, where it has both; None: [0, 1] where all values are 0, 0.5 or 1 (stats.interval).
  """
  metric: str
  prompt: str
  values: list
  items: list[str]
  clusters: list[str] | None = None
  better: str = 'higher'
  aggregate: str | None = None
  bounds: Sequence[float] | None = None


TASKS: dict[str, str] = {
    'hellaswag': 'alignjax.evals.public.tasks:hellaswag',
    'rte': 'alignjax.evals.public.tasks:rte',
    'sst': 'alignjax.evals.public.tasks:sst',
    'wsc': 'alignjax.evals.public.tasks:wsc',
    'drop': 'alignjax.evals.public.tasks:drop',
    'quac': 'alignjax.evals.public.tasks:quac',
    'squadv2': 'alignjax.evals.public.tasks:squadv2',
    'wmt15_fr_en': 'alignjax.evals.public.tasks:wmt15_fr_en',
    'cnn_dm': 'alignjax.evals.public.tasks:cnn_dm',
    'tldr': 'alignjax.evals.public.tasks:tldr',
    'truthfulqa_mc': 'alignjax.evals.public.tasks:truthfulqa_mc',
    'winogender': 'alignjax.evals.safety.bias:winogender',
    'crows_pairs': 'alignjax.evals.safety.bias:crows_pairs',
    'realtoxicityprompts': 'alignjax.evals.safety.toxicity:realtoxicityprompts',
    'truthfulqa': 'alignjax.evals.safety.truthfulness:truthfulqa',
    'judge_agreement': 'alignjax.evals.safety.truthfulness:judge_agreement',
}


TASK_FILES = pathlib.Path(__file__).parent / 'tasks'
PACKAGES = ('lm_eval', 'sacrebleu', 'rouge_score', 'alt-profanity-check', 'detoxify')  # that compute scores


def find_tasks(names: Sequence[str]) -> dict[str, Callable]:
  """{task: its function} of names of TASKS, 'module:function', task files and folders of the evaluation harness, and its own names
  (harness_tasks.py). An unknown name is an error with the nearest ones."""
  found: dict[str, Callable] = {}
  for name in names:
    for task, function in _find(name).items():
      if task in found:
        raise ValueError(f'--tasks={",".join(names)}: the task {task!r} is there twice.')
      found[task] = function
  return found


def _find(name: str) -> dict[str, Callable]:
  if name in TASKS or ':' in name:
    return {name: plugins.find(TASKS.get(name, name), f'--tasks={name}')}
  from alignjax.evals.public import harness_tasks
  found = harness_tasks.find(name)
  if found is None:
    near = difflib.get_close_matches(name, {**TASKS, **harness_tasks.index()}, 3)
    raise ValueError(f'there is no task {name!r}' + (f'; did you mean {" or ".join(near)}?' if near else '.') +
                     f' Tasks: {", ".join(TASKS)}; a task of your own: module:function, or FILE.yaml or a folder of such files for '
                     'the evaluation harness; or a task of the harness by its name.')
  return found


def protocol(name: str, task: Callable, data: str | None, limit: int | None, seed: int,
             options: Mapping[str, Any]) -> dict[str, Any]:
  """What decides a task's result besides the model, as JSON values: of files, models and functions the contents, not the names."""
  if data and not pathlib.Path(data).expanduser().exists():
    raise FileNotFoundError(f'--data: {name}={data}: no such file or folder.')
  takes = inspect.signature(task).parameters
  options = {k: p.default for k, p in takes.items() if k not in GIVEN and p.default is not p.empty} | dict(options)
  file = TASK_FILES / f'{name}.yaml'
  return dict(
      task=f'{getattr(task, "func", task).__module__}:{getattr(getattr(task, "func", task), "__name__", task)}', name=name,
      code=fingerprints.of_function(task, TASKS.get(name, name)),
      file=fingerprints.of_files([file]) if TASKS.get(name) and file.exists() else None,
      of_task=getattr(task, 'protocol', None), packages=_versions(), data=data and fingerprints.of_files([data]), limit=limit,
      seed=seed, options=options, named={k: found for k, v in options.items() if (found := _contents(v)) is not None})


GIVEN = ('model', 'data', 'limit', 'seed', 'keep')


def _versions() -> dict[str, str]:
  """Of the packages that compute scores, as far as they are installed."""
  out = {}
  for package in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      out[package] = importlib.metadata.version(package)
  return out


def _contents(value: Any) -> str | None:
  """The fingerprint of what an option names: a function's source, a model's or any other file; None where it names neither."""
  if not isinstance(value, str) or not value:
    return None
  with contextlib.suppress(OSError, ValueError, TypeError):  # text that is no path or function; a function without source
    path = pathlib.Path(value.removeprefix('hf:')).expanduser()
    if (path / 'final').is_dir():  # a finished stage
      return fingerprints.of_files([path / 'final', path / 'checkpoints' / 'config.json'])
    if path.exists():
      return fingerprints.of_files([path])
    if re.fullmatch(r'[\w.]+:\w+', value) and not value.startswith('hf:'):
      return fingerprints.of_function(plugins.find(value, '--options'), value)
  return None


def run_task(name: str, task: Callable, model: Any, facts: Mapping[str, Any], out: files.Folder, *, data: str | None = None,
             limit: int | None = None, seed: int = 0, options: Mapping[str, Any] | None = None) -> tuple[list[Cell], bool]:
  """(cells, whether they were there already). Writes OUT/cells/NAME-KEY.json, whole or not at all, on the first process.

  facts: of the model, finished.facts. With the protocol they are KEY, so that nothing is served for a model or a task that
  differs in anything that changes a number.
  """
  options = dict(options or {})
  takes = inspect.signature(task).parameters
  for key in options:
    if key not in takes or key in GIVEN:
      own = [k for k in takes if k not in GIVEN]
      raise ValueError(f'--options: {name}.{key}: the task {name!r} takes {", ".join(own) or "no options"}.')
  described = protocol(name, task, data, limit, seed, options)
  file = f'{re.sub("[^A-Za-z0-9_.-]", ".", name)}-{fingerprints.of_value([described, facts])}'
  path, keep = out / 'cells' / f'{file}.json', out / 'kept' / file
  found = journal.read_whole(path)
  if found is not None:
    return [Cell(**c) for c in found['cells']], True
  keep.mkdir(parents=True, exist_ok=True)
  if any(keep.iterdir()) and jax.process_index() == 0:
    print(f'{name}: goes on from {keep}', flush=True)
  began = time.perf_counter()
  cells = task(model, data=data, limit=limit, seed=seed, keep=keep, **options)
  journal.write_whole(path, dict(protocol=described, model=facts, seconds=round(time.perf_counter() - began, 1),
                              cells=[c._asdict() for c in cells]))
  return cells, False


def figure(cell: Cell) -> dict[str, Any]:
  """{'mean', 'ci95', 'n'} of a cell."""
  if cell.aggregate is None:
    return stats.interval(_numbers(cell.values), cell.clusters, cell.bounds)
  labels = range(len(cell.values)) if cell.clusters is None else cell.clusters
  return stats.statistic(lambda rows: _aggregate(cell)([cell.values[i] for i in rows]), labels)


def difference(cell: Cell, base: Cell) -> dict[str, Any]:
  """The same of cell - base, over the items that both have: what alignment cost or brought."""
  where = {name: i for i, name in enumerate(base.items)}
  pairs = [(i, where[name]) for i, name in enumerate(cell.items) if name in where]
  clusters = None if cell.clusters is None else [cell.clusters[i] for i, _ in pairs]
  if cell.aggregate is None:
    mine, other = _numbers(cell.values), _numbers(base.values)
    (low, high), (low_base, high_base) = _bounds(cell, mine), _bounds(base, other)
    return stats.interval([mine[i] - other[j] for i, j in pairs], clusters, (low - high_base, high - low_base))
  of = _aggregate(cell)
  return stats.statistic(lambda rows: of([cell.values[pairs[r][0]] for r in rows]) - of([base.values[pairs[r][1]] for r in rows]),
                         range(len(pairs)) if clusters is None else clusters)


def _aggregate(cell: Cell) -> Callable[[list], float]:
  module, name = cell.aggregate.split(':')
  return getattr(importlib.import_module(module), name)


def _numbers(values: Sequence) -> np.ndarray:
  return np.array([np.nan if v is None else v for v in values], float)


def _bounds(cell: Cell, values: np.ndarray) -> Sequence[float]:
  """Those of the cell, or what its values say, as in stats.interval."""
  return cell.bounds or ((0, 1) if np.isin(values[~np.isnan(values)], (0, 0.5, 1)).all() else stats.ANY)


def assemble(measured: Mapping[str, Mapping[str, list[Cell]]], baseline: str) -> list[dict[str, Any]]:
  """Rows of the table: [{'task', 'metric', 'prompt', 'better', 'models': {name: figure + 'difference'}}].

  measured: task -> model -> cells. baseline: the model that differences are taken to.
  """
  rows = []
  for task, by_model in measured.items():
    kinds = list(dict.fromkeys((c.metric, c.prompt) for cells in by_model.values() for c in cells))
    for metric, prompt in kinds:
      cells = {m: next(c for c in cs if (c.metric, c.prompt) == (metric, prompt)) for m, cs in by_model.items()
               if any((c.metric, c.prompt) == (metric, prompt) for c in cs)}
      models = {m: figure(c) for m, c in cells.items()}
      for m, c in cells.items():
        if m != baseline and baseline in cells:
          models[m]['difference'] = difference(c, cells[baseline])
      rows.append(dict(task=task, metric=metric, prompt=prompt, better=next(iter(cells.values())).better, models=models))
  return rows


def markdown(rows: Sequence[Mapping[str, Any]], models: Sequence[str], baseline: str) -> str:
  """The table in the layout of the paper's Table 14, then the differences to the baseline."""
  head = lambda names: ['| task | metric | prompt | ' + ' | '.join(names) + ' |', '|---' * (3 + len(names)) + '|']
  lines = ['# Evaluation', '', 'Mean, 95% interval, and number of items.', '', *head(models)]
  for row in rows:
    lines.append(f'| {row["task"]} | {row["metric"]}{_arrow(row["better"])} | {row["prompt"] or "-"} | ' +
                 ' | '.join(stats.show(row['models'].get(m), True) for m in models) + ' |')
  others = [m for m in models if m != baseline]
  if others:
    lines += ['', f'## Difference to {baseline}', '', 'Paired by item; bold where the interval leaves out 0.', '', *head(others)]
    for row in rows:
      found = [row['models'].get(m, {}).get('difference') for m in others]
      lines.append(f'| {row["task"]} | {row["metric"]}{_arrow(row["better"])} | {row["prompt"] or "-"} | ' +
                   ' | '.join(stats.show_difference(f) for f in found) + ' |')
  return '\n'.join([*lines, ''])


def _arrow(better: str) -> str:
  return {'higher': ' ↑', 'lower': ' ↓'}.get(better, '')


def plot(rows: Sequence[Mapping[str, Any]], models: Sequence[str], baseline: str, path: files.Folder) -> None:
  """The differences to the baseline as points with intervals, a line a row of the table and one scale a metric: the tax at a
  glance. For more than one model."""
  import matplotlib
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  metrics = list(dict.fromkeys(row['metric'] for row in rows))
  shown = [m for m in models if m != baseline]
  pick = lambda row, m: row['models'].get(m, {}).get('difference')
  groups = [[row for row in rows if row['metric'] == metric] for metric in metrics]
  figure, axes = plt.subplots(len(metrics), 1, figsize=(8, 0.8 * len(metrics) + 0.35 * len(rows) + 0.6), constrained_layout=True,
                              squeeze=False, height_ratios=[len(g) + 1 for g in groups])
  colors = plt.get_cmap('tab10')
  for axis, metric, group in zip(axes[:, 0], metrics, groups, strict=True):
    for j, model in enumerate(shown):
      for i, row in enumerate(group):
        found = pick(row, model)
        if found and found['mean'] is not None:
          at = i + 0.6 * (j - (len(shown) - 1) / 2) / len(shown)
          if found['ci95'][0] is not None:
            axis.plot(found['ci95'], [at, at], color=colors(j), lw=2)
          axis.plot(found['mean'], at, 'o', color=colors(j), ms=5, label=model if i == 0 else None)
    axis.set_yticks(range(len(group)), [f'{r["task"]} {r["prompt"]}'.strip() for r in group], fontsize=8)
    axis.set_title(f'{metric}, difference to {baseline}', loc='left', fontsize=9)
    axis.invert_yaxis()
    axis.grid(axis='x', alpha=0.3)
    axis.axvline(0, color='#888888', lw=1)
  axes[0, 0].legend(fontsize=8)
  files.save_figure(figure, path)
  plt.close(figure)
