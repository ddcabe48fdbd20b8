"""Measures what the length of a response does to verdicts, and win rates without it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from alignjax.evals.preference.verdicts import Table
from alignjax.evals.stats import SHARE, Figure, interval, statistic

Words = Mapping[tuple[str, str], int]  # {(prompt_id, policy): the words of the response}


def effect(table: Table, policies: Sequence[str], words: Words) -> dict[str, Figure]:
  """Measures whether longer responses win.

  'longer_wins' is the win rate of the response of a pair that has more words. 'correlation' is
  Pearson's correlation of the difference in words and the verdict. It uses each pair in both
  directions, so that the order of the policies does not matter.
  """
  there, difference = _differences(table, policies, words)
  p, prompts = table.p[there], table.clusters[there]
  uneven = difference != 0

  def correlation(rows):
    x, y = difference[rows], p[rows] - 0.5
    if not x.any() or not y.any():
      return float('nan')
    return np.corrcoef(np.concatenate([x, -x]), np.concatenate([y, -y]))[0, 1]

  return dict(
    longer_wins=interval(np.where(difference > 0, p, 1 - p)[uneven], prompts[uneven], SHARE),
    correlation=statistic(correlation, prompts, (-1, 1)),
  )


def controlled_win_rates(
  table: Table, policies: Sequence[str], baseline: str, words: Words
) -> dict[str, Figure]:
  """Returns {policy: its length-controlled win rate against the baseline}.

  It is the win rate that a regression predicts for responses of equal length (Dubois et al. 2024,
  "Length-Controlled AlpacaEval", section 3): with d the words of the policy's response less those
  of the baseline's, and s the standard deviation of d over the verdicts on this pair of policies,

    P(the policy wins) = sigmoid(theta + phi tanh(d / s)),    the rate is sigmoid(theta).

  theta and phi are those of maximum likelihood, where a tie counts as half a win. This differs from
  AlpacaEval in three ways: length is counted in words and not in characters; the coefficients are
  not penalised; and there is no term for the difficulty of an instruction, which AlpacaEval fits to
  the verdicts on all the models of its leaderboard. The rate is therefore comparable within one
  evaluation, and not with AlpacaEval's numbers.

  Returns:
    'mean' is None if the likelihood has no maximum: if the policy always wins, or always loses, or
    if length alone tells the verdicts apart. 'n' is the number of verdicts whose two responses are
    known.
  """
  there, difference = _differences(table, policies, words)
  i, j, p, prompts = (x[there] for x in (table.i, table.j, table.p, table.clusters))
  base = list(policies).index(baseline)
  out = {}
  for k, policy in enumerate(policies):
    if k == base:
      continue
    rows = (i == min(k, base)) & (j == max(k, base))
    # The sign of d would only change that of phi.
    d, wins = difference[rows], p[rows] if k < base else 1 - p[rows]
    out[policy] = statistic(
      lambda at, d=d, wins=wins: _at_equal_length(d[at], wins[at]), prompts[rows], SHARE
    )
  return out


def _at_equal_length(difference: np.ndarray, wins: np.ndarray) -> float:
  """Returns sigmoid(theta) of the regression above, or NaN if its likelihood has no maximum."""
  spread = difference.std()
  x = np.ones((len(wins), 1 + bool(spread)))
  if spread:
    x[:, 1] = np.tanh(difference / spread)
  coefficients = np.zeros(x.shape[1])

  def loss(coefficients: np.ndarray) -> float:
    logits = x @ coefficients
    return float((np.logaddexp(0, logits) - wins * logits).mean())

  # Newton's method with steps that are halved until they help: the loss is convex.
  for _ in range(100):
    predicted = special.expit(x @ coefficients)
    hessian = (x * (predicted * (1 - predicted))[:, None]).T @ x / len(x)
    # The loss has no minimum where the probabilities run to 0 and 1.
    if np.linalg.det(hessian) < 1e-12:
      return float('nan')
    step = np.linalg.solve(hessian, x.T @ (wins - predicted) / len(x))
    if np.abs(step).max() < 1e-9:
      return float(special.expit(coefficients[0]))
    while loss(coefficients + step) > loss(coefficients) + 1e-15:
      step /= 2
    coefficients = coefficients + step
  return float('nan')


def _differences(
  table: Table, policies: Sequence[str], words: Words
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (where the words of both responses are known, bool[N]; the words of the first less
  those of the second there, f64[known])."""
  known = [
    (words.get((q, policies[i])), words.get((q, policies[j])))
    for q, i, j in zip(table.prompts, table.i, table.j, strict=True)
  ]
  there = np.array([a is not None and b is not None for a, b in known], bool)
  return there, np.array([a - b for a, b in itertools.compress(known, there)], float)
