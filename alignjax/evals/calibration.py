"""Calibration: whether what a model gives a probability p is right in a share p of the cases."""

from __future__ import annotations

from typing import Any

import numpy as np


def bins(
  confidences: np.ndarray, hits: np.ndarray, count: int = 10, low: float = 0.0
) -> list[dict[str, Any]]:
  """Returns the reliability curve: {'bin', 'count', 'confidence', 'accuracy'} of each of `count`
  equal bins of low..1 that holds a prediction. A confidence on a border belongs to the upper bin,
  and 1 to the last.

  Args:
    confidences: f[N] in low..1, the probability of what was predicted.
    hits: f[N], 1 where the prediction was right, 0 where it was wrong, 0.5 for a tie.
    count: the number of bins.
    low: the smallest confidence that is possible: 0.5 where one of two is predicted.

  Raises:
    ValueError: a confidence lies outside low..1.
  """
  confidences, hits = np.asarray(confidences, np.float64), np.asarray(hits, np.float64)
  if len(confidences) and not (low - 1e-9 <= confidences.min() <= confidences.max() <= 1 + 1e-9):
    raise ValueError(
      f'confidences from {confidences.min()} to {confidences.max()} do not lie within {low} and 1.'
    )
  which = np.clip(((confidences - low) / (1 - low) * count).astype(int), 0, count - 1)
  return [
    dict(
      bin=b,
      count=int((which == b).sum()),
      confidence=float(confidences[which == b].mean()),
      accuracy=float(hits[which == b].mean()),
    )
    for b in range(count)
    if (which == b).any()
  ]


def error(confidences: np.ndarray, hits: np.ndarray, count: int = 10, low: float = 0.0) -> float:
  """Returns the expected calibration error (Naeini et al. 2015; Guo et al. 2017, Eq. 5): the
  distance between accuracy and confidence of each bin, weighted by its share of the predictions.
  The arguments are those of `bins`; NaN without predictions."""
  found = bins(confidences, hits, count, low)
  total = sum(b['count'] for b in found)
  if not total:
    return float('nan')
  return sum(b['count'] / total * abs(b['accuracy'] - b['confidence']) for b in found)


def brier(probabilities: np.ndarray, answers: np.ndarray) -> float:
  """Returns the Brier score (Brier 1950) of predictions over K choices: the mean over items of
  sum_k (p_k - [k is right])^2, from 0 to 2. Always 1/K has 1 - 1/K.

  Args:
    probabilities: f[N,K], rows that sum to 1.
    answers: i[N], the right choice of each item.
  """
  probabilities = np.asarray(probabilities, np.float64)
  right = np.eye(probabilities.shape[1])[np.asarray(answers)]
  return float(np.square(probabilities - right).sum(1).mean())
