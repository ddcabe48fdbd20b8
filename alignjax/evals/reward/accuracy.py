"""Measures how often a reward model orders two responses as labelers do, by pool of labelers, on
the same prompts and responses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from alignjax.evals import calibration
from alignjax.evals.stats import ANY, interval
from alignjax.sandbox import Labelers


class Judged(NamedTuple):
  """The pairs of responses that the labelers of a pool did not tie, one after the other.

  Attributes:
    margins: f64[N], the score of the response that the labeler preferred less that of the other.
    clusters: i[N], the number of the prompt.
    agree: whether two labelers of the pool chose the same of two responses.
    agree_clusters: the number of the prompt of these.
  """

  margins: np.ndarray
  clusters: list[int]
  agree: list[bool]
  agree_clusters: list[int]


def judged_pairs(
  labelers: Labelers, comparisons: Any, score: Callable, seed: int
) -> dict[str, Judged]:
  """Returns the pairs of both pools, {'train': Judged, 'heldout': Judged}.

  Every labeler ranks every prompt's responses afresh. Ties of labelers and identical responses are
  left out. The arguments are those of by_pool.
  """
  rows = _rows(comparisons)
  scores = np.split(score(rows), np.cumsum([len(r) for r in comparisons.responses])[:-1])
  number = {tuple(p): i for i, p in enumerate(comparisons.prompts)}
  out = {}
  for pool, ids in (('train', labelers.train), ('heldout', labelers.heldout)):
    rng = np.random.default_rng([seed, 17])
    margins, clusters, agree, agree_clusters = [], [], [], []
    for i, (s, features) in enumerate(zip(scores, comparisons.features, strict=True)):
      features, prompt = np.asarray(features), number[tuple(comparisons.prompts[i])]
      ranks = np.stack([labelers.rank(features, labeler, rng) for labeler in ids])  # [labelers, K]
      first, second = _pairs(comparisons.responses[i])
      order = np.sign(ranks[:, second] - ranks[:, first])  # 1 where the first is better.
      labeled = order != 0
      clusters += [prompt] * int(labeled.sum())
      margins += ((s[first] - s[second]) * order)[labeled].tolist()
      one, other = order[0::2][: len(ids) // 2], order[1::2][: len(ids) // 2]
      both = (one != 0) & (other != 0)
      agree += (one == other)[both].tolist()
      agree_clusters += [prompt] * int(both.sum())
    out[pool] = Judged(np.array(margins, np.float64), clusters, agree, agree_clusters)
  return out


def _rows(comparisons: Any) -> list[list[int]]:
  return [
    [*p, *r] for p, rs in zip(comparisons.prompts, comparisons.responses, strict=True) for r in rs
  ]


def by_pool(labelers: Labelers, comparisons: Any, score: Callable, seed: int) -> dict[str, Any]:
  """Returns the accuracy on the training and on the held-out labelers, and how often two labelers
  of a pool agree, which is the ceiling.

  A tie of the model counts one half. The intervals are by prompt, because the pairs of a prompt are
  not independent.

  Args:
    labelers: the sandbox's labelers.
    comparisons: a stages.comparisons.Comparisons with features.
    score: a function of token rows that returns f[N].
    seed: the seed of the rankings.
  """
  rows = _rows(comparisons)
  scores = np.asarray(score(rows))
  out = {}
  for pool, found in judged_pairs(labelers, comparisons, lambda _: scores, seed).items():
    hits = 0.5 + 0.5 * np.sign(found.margins)
    out[f'accuracy_{pool}_labelers'] = interval(hits, found.clusters, (0, 1))
    out[f'margin_{pool}_labelers'] = interval(found.margins, found.clusters, ANY)
    out[f'calibration_error_{pool}_labelers'] = calibration_error(
      1 / (1 + np.exp(-np.abs(found.margins))), hits
    )
    out[f'agreement_{pool}_labelers'] = interval(found.agree, found.agree_clusters, (0, 1))
  lengths = np.array([len(r) for r in rows])
  varied = lengths.std() > 0 and scores.std() > 0
  out['length_correlation'] = float(np.corrcoef(scores, lengths)[0, 1]) if varied else None
  return out


def calibration_error(probabilities: np.ndarray, hits: np.ndarray, bins: int = 10) -> float:
  """Returns the expected calibration error (evals/calibration.py) of the probabilities that the
  model gave to its own order of a pair, f[N] in 0.5..1: the score difference is a log-odds (paper
  3.5)."""
  return calibration.error(probabilities, hits, bins, 0.5)


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
