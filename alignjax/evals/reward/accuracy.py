"""Measures how often a reward model orders two responses as labelers do, by pool of labelers, on
the same prompts and responses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from alignjax.evals.stats import ANY, interval
from alignjax.sandbox import Labelers


def by_pool(labelers: Labelers, comparisons: Any, score: Callable, seed: int) -> dict[str, Any]:
  """Returns the accuracy on the training and on the held-out labelers, and how often two labelers
  of a pool agree, which is the ceiling.

  Every labeler of both pools ranks every prompt's responses afresh. Ties of labelers and identical
  responses are left out, and a tie of the model counts one half. The intervals are by prompt,
  because the pairs of a prompt are not independent.

  Args:
    labelers: the sandbox's labelers.
    comparisons: a stages.comparisons.Comparisons with features.
    score: a function of token rows that returns f[N].
    seed: the seed of the rankings.
  """
  rows = [
    [*p, *r] for p, rs in zip(comparisons.prompts, comparisons.responses, strict=True) for r in rs
  ]
  scores = np.split(score(rows), np.cumsum([len(r) for r in comparisons.responses])[:-1])
  number = {tuple(p): i for i, p in enumerate(comparisons.prompts)}
  out = {}
  for pool, ids in (('train', labelers.train), ('heldout', labelers.heldout)):
    rng = np.random.default_rng([seed, 17])
    hits, clusters, agree, agree_clusters, probabilities, margins = [], [], [], [], [], []
    for i, (s, features) in enumerate(zip(scores, comparisons.features, strict=True)):
      features, prompt = np.asarray(features), number[tuple(comparisons.prompts[i])]
      ranks = np.stack([labelers.rank(features, labeler, rng) for labeler in ids])  # [labelers, K]
      first, second = _pairs(comparisons.responses[i])
      order = np.sign(ranks[:, second] - ranks[:, first])  # 1 where the first is better.
      predicted = np.sign(s[first] - s[second])
      labeled = order != 0
      hits += (0.5 + 0.5 * order * predicted)[labeled].tolist()
      clusters += [prompt] * int(labeled.sum())
      signed = ((s[first] - s[second]) * order)[labeled]  # Positive where the model agrees.
      margins += signed.tolist()
      probabilities += (1 / (1 + np.exp(-np.abs(signed)))).tolist()
      one, other = order[0::2][: len(ids) // 2], order[1::2][: len(ids) // 2]
      both = (one != 0) & (other != 0)
      agree += (one == other)[both].tolist()
      agree_clusters += [prompt] * int(both.sum())
    out[f'accuracy_{pool}_labelers'] = interval(hits, clusters, (0, 1))
    out[f'margin_{pool}_labelers'] = interval(margins, clusters, ANY)
    out[f'calibration_error_{pool}_labelers'] = calibration_error(
      np.array(probabilities), np.array(hits, float)
    )
    out[f'agreement_{pool}_labelers'] = interval(agree, agree_clusters, (0, 1))
  lengths, scores = np.array([len(r) for r in rows]), np.concatenate(scores)
  varied = lengths.std() > 0 and scores.std() > 0
  out['length_correlation'] = float(np.corrcoef(scores, lengths)[0, 1]) if varied else None
  return out


def calibration_error(probabilities: np.ndarray, hits: np.ndarray, bins: int = 10) -> float:
  """Returns the expected calibration error: the difference between the share of pairs that are
  ordered correctly and the probability that the model gave to its own order (the score difference
  is a log-odds, paper 3.5), averaged over equal bins of 0.5..1 that are weighted by their number of
  pairs."""
  if len(hits) == 0:
    return float('nan')
  which = np.minimum(((probabilities - 0.5) * 2 * bins).astype(int), bins - 1)
  gaps = [
    abs(hits[which == b].mean() - probabilities[which == b].mean()) * (which == b).mean()
    for b in range(bins)
    if (which == b).any()
  ]
  return float(sum(gaps))


def on_ranks(comparisons: Any, score: Callable) -> dict[str, Any]:
  """Returns the accuracy on comparisons as they were ranked: the share of the pairs without a tie
  that the model orders in the same way, where a tie of the model counts one half. The interval is
  by prompt. A response that several labelers judged is scored once."""
  rows = [
    (*p, *r) for p, rs in zip(comparisons.prompts, comparisons.responses, strict=True) for r in rs
  ]
  place = {row: i for i, row in enumerate(dict.fromkeys(rows))}
  scores = np.asarray(score([list(row) for row in place]))[[place[row] for row in rows]]
  scores = np.split(scores, np.cumsum([len(r) for r in comparisons.responses])[:-1])
  hits, clusters = [], []
  number = {tuple(p): i for i, p in enumerate(comparisons.prompts)}
  for prompt, s, ranks in zip(comparisons.prompts, scores, comparisons.ranks, strict=True):
    for i, j in itertools.combinations(range(len(ranks)), 2):
      if ranks[i] != ranks[j]:
        hits.append(0.5 + 0.5 * np.sign((s[i] - s[j]) * (ranks[j] - ranks[i])))
        clusters.append(number[tuple(prompt)])
  return interval(hits, clusters, (0, 1))


def _pairs(responses: list) -> tuple[np.ndarray, np.ndarray]:
  """Returns the indices of all pairs of different responses."""
  pairs = [
    (i, j)
    for i in range(len(responses))
    for j in range(i + 1, len(responses))
    if responses[i] != responses[j]
  ]
  first, second = zip(*pairs, strict=True) if pairs else ((), ())
  return np.array(first, int), np.array(second, int)
