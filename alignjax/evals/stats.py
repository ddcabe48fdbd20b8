"""Means with 95% intervals. Every figure of a report is {'mean', 'ci95': [low, high], 'n'}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def interval(values: Sequence[float], clusters: Sequence[Any] | None = None, seed: int = 0,
             resamples: int = 2000) -> dict[str, Any]:
  """Mean of values and its 95% bootstrap interval (percentiles).

  Args:
    values: one number a unit; NaN means "not measured" and is left out.
    clusters: a label a unit; units of a cluster (the pairs of one prompt) are resampled together, because they are not
      independent. None: every unit is its own.

  Returns:
    {'mean': float or None where there is nothing, 'ci95': [low, high], 'n': units}.
  """
  values = np.asarray(values, np.float64)
  keep = ~np.isnan(values)
  values = values[keep]
  if len(values) == 0:
    return {'mean': None, 'ci95': [None, None], 'n': 0}
  if clusters is None:
    sums, counts = values, np.ones(len(values))
  else:
    _, group = np.unique(np.asarray(clusters)[keep], return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
  rng = np.random.default_rng(seed)
  draws = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples)
  means = (draws @ sums) / np.maximum(draws @ counts, 1e-12)
  low, high = np.percentile(means, [2.5, 97.5])
  return {'mean': float(values.mean()), 'ci95': [float(low), float(high)], 'n': int(len(values))}


def show(figure: Mapping[str, Any] | None, count: bool = False) -> str:
  """A figure as '0.123 [0.100, 0.145]', with ' (n)' if count; '' where nothing was measured."""
  if not figure or figure['mean'] is None:
    return ''
  low, high = figure['ci95']
  return f'{figure["mean"]:.3f} [{low:.3f}, {high:.3f}]' + (f' ({figure["n"]})' if count else '')


def show_difference(figure: Mapping[str, Any] | None) -> str:
  """The same of a difference, in bold where the interval leaves out 0."""
  text = show(figure)
  return f'**{text}**' if text and (figure['ci95'][0] > 0 or figure['ci95'][1] < 0) else text
