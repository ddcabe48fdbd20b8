"""The table of evaluations: cells of tasks and models with intervals, and differences to a baseline
that are paired by item. The layout is that of the paper's Table 14."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax import plugins
from alignjax.evals import stats
from alignjax.evals.markdown import table as markdown_table
from alignjax.runtime import files


class Cell(NamedTuple):
  """What a task measured: one value per item, before averaging.

  Attributes:
    metric: the name of the metric, such as 'accuracy', 'F1' or 'entropy (bits)'.
    prompt: the variant of the prompt, such as 'zero-shot' or 'respectful', or '' if there is only
      one.
    values: one JSON value per item; they are numbers if they are averaged. None means that the item
      was not measured, for example because a judge refused.
    items: one name per item. They are the same for every model, so that differences are paired.
    clusters: one label per item. Items of the same label, such as the questions of a passage, are
      not independent. None means that all items are independent.
    better: 'higher', 'lower', or '' if neither is better, as for an entropy.
    aggregate: None for the mean. For any other aggregate, such as BLEU, 'module:function' of a
      function that maps a list of values to a float.
    bounds: [low, high] if a value has both bounds. None means [0, 1] if all values are 0, 0.5 or 1
      (stats.interval).
  """

  metric: str
  prompt: str
  values: list
  items: list[str]
  clusters: list[str] | None = None
  better: str = 'higher'
  aggregate: str | None = None
  bounds: Sequence[float] | None = None


def figure(cell: Cell) -> dict[str, Any]:
  """Returns the figure {'mean', 'ci95', 'n'} of a cell."""
  if cell.aggregate is None:
    return stats.interval(_numbers(cell.values), cell.clusters, cell.bounds)
  labels = range(len(cell.values)) if cell.clusters is None else cell.clusters
  return stats.statistic(lambda rows: _aggregate(cell)([cell.values[i] for i in rows]), labels)


def difference(cell: Cell, base: Cell) -> dict[str, Any]:
  """Returns the figure of cell - base over the items that both have. It is the cost or the gain of
  alignment."""
  where = {name: i for i, name in enumerate(base.items)}
  pairs = [(i, where[name]) for i, name in enumerate(cell.items) if name in where]
  clusters = None if cell.clusters is None else [cell.clusters[i] for i, _ in pairs]
  if cell.aggregate is None:
    mine, other = _numbers(cell.values), _numbers(base.values)
    (low, high), (low_base, high_base) = _bounds(cell, mine), _bounds(base, other)
    return stats.interval(
      [mine[i] - other[j] for i, j in pairs], clusters, (low - high_base, high - low_base)
    )
  of = _aggregate(cell)
  return stats.statistic(
    lambda rows: (
      of([cell.values[pairs[r][0]] for r in rows]) - of([base.values[pairs[r][1]] for r in rows])
    ),
    range(len(pairs)) if clusters is None else clusters,
  )


def _aggregate(cell: Cell) -> Callable[[list], float]:
  # The harness imports functions of a user's task file under the name of their path.
  module, name = plugins.current_names(cell.aggregate).rsplit(':', 1)
  return getattr(importlib.import_module(module), name)


def _numbers(values: Sequence) -> np.ndarray:
  return np.array([np.nan if v is None else v for v in values], float)


def _bounds(cell: Cell, values: np.ndarray) -> Sequence[float]:
  """Returns the bounds of the cell or, if it has none, those that its values imply, as in
  stats.interval."""
  return cell.bounds or (
    (0, 1) if np.isin(values[~np.isnan(values)], (0, 0.5, 1)).all() else stats.ANY
  )


def assemble(
  measured: Mapping[str, Mapping[str, list[Cell]]], baseline: str
) -> list[dict[str, Any]]:
  """Returns the rows of the table: [{'task', 'metric', 'prompt', 'better', 'models': {name: figure
  + 'difference'}}].

  Args:
    measured: {task: {model: cells}}.
    baseline: the name of the model that differences are taken to.
  """
  rows = []
  for task, by_model in measured.items():
    kinds = list(dict.fromkeys((c.metric, c.prompt) for cells in by_model.values() for c in cells))
    for metric, prompt in kinds:
      cells = {
        m: next(c for c in cs if (c.metric, c.prompt) == (metric, prompt))
        for m, cs in by_model.items()
        if any((c.metric, c.prompt) == (metric, prompt) for c in cs)
      }
      models = {m: figure(c) for m, c in cells.items()}
      for m, c in cells.items():
        if m != baseline and baseline in cells:
          models[m]['difference'] = difference(c, cells[baseline])
      rows.append(
        dict(
          task=task,
          metric=metric,
          prompt=prompt,
          better=next(iter(cells.values())).better,
          models=models,
        )
      )
  return rows


def markdown(rows: Sequence[Mapping[str, Any]], models: Sequence[str], baseline: str) -> str:
  """Returns the table in the layout of the paper's Table 14, followed by the differences to the
  baseline."""
  head = ('task', 'metric', 'prompt')
  first = [
    [row['task'], f'{row["metric"]}{_arrow(row["better"])}', row['prompt'] or '-'] for row in rows
  ]
  measured = [[stats.show(row['models'].get(m), True) for m in models] for row in rows]
  lines = ['# Evaluation', '', 'Mean, 95% interval, and number of items.', '']
  lines += markdown_table([*head, *models], [a + b for a, b in zip(first, measured, strict=True)])
  others = [m for m in models if m != baseline]
  if others:
    differences = [
      [stats.show_difference(row['models'].get(m, {}).get('difference')) for m in others]
      for row in rows
    ]
    lines += [
      '',
      f'## Difference to {baseline}',
      '',
      'Paired by item; bold where the interval leaves out 0.',
      '',
      *markdown_table([*head, *others], [a + b for a, b in zip(first, differences, strict=True)]),
    ]
  return '\n'.join([*lines, ''])


def _arrow(better: str) -> str:
  return {'higher': ' ↑', 'lower': ' ↓'}.get(better, '')


def plot(
  rows: Sequence[Mapping[str, Any]], models: Sequence[str], baseline: str, path: files.Folder
) -> None:
  """Draws the differences to the baseline as points with intervals, with one line per row of the
  table and one scale per metric, so that the alignment tax is visible at a glance. It needs more
  than one model."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  metrics = list(dict.fromkeys(row['metric'] for row in rows))
  shown = [m for m in models if m != baseline]

  def pick(row, m):
    return row['models'].get(m, {}).get('difference')

  groups = [[row for row in rows if row['metric'] == metric] for metric in metrics]
  figure, axes = plt.subplots(
    len(metrics),
    1,
    figsize=(8, 0.8 * len(metrics) + 0.35 * len(rows) + 0.6),
    constrained_layout=True,
    squeeze=False,
    height_ratios=[len(g) + 1 for g in groups],
  )
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
    axis.set_yticks(
      range(len(group)), [f'{r["task"]} {r["prompt"]}'.strip() for r in group], fontsize=8
    )
    axis.set_title(f'{metric}, difference to {baseline}', loc='left', fontsize=9)
    axis.invert_yaxis()
    axis.grid(axis='x', alpha=0.3)
    axis.axvline(0, color='#888888', lw=1)
  axes[0, 0].legend(fontsize=8)
  files.save_figure(figure, path)
  plt.close(figure)
