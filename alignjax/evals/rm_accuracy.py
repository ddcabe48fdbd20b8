"""How often a reward model orders two responses as labelers do, by pool of labelers, on the same prompts and responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from alignjax.data.encode import Template
from alignjax.evals.stats import interval


def by_pool(labelers: Any, comparisons: Any, score: Callable, template: Template, seed: int) -> dict[str, Any]:
  """Accuracy on the training and on the held-out labelers, and how often two labelers of a pool agree (the ceiling).

  Every labeler of both pools ranks every prompt's responses afresh; ties and identical responses are left out. Intervals
  resample prompts, because the pairs of one prompt are not independent.

  Args:
    comparisons: stages.comparisons.Comparisons with features.
    score: token rows -> f[N].
  """
  rows = [template.prompt(p) + list(r) for p, rs in zip(comparisons.prompts, comparisons.responses, strict=True)
          for r in rs]
  scores = np.split(score(rows), np.cumsum([len(r) for r in comparisons.responses])[:-1])
  out = {}
  for pool, ids in (('train', labelers.train), ('heldout', labelers.heldout)):
    rng = np.random.default_rng([seed, 17])
    hits, clusters, agree, agree_clusters = [], [], [], []
    for i, (s, features) in enumerate(zip(scores, comparisons.features, strict=True)):
      features = np.asarray(features)
      ranks = np.stack([labelers.rank(features, labeler, rng) for labeler in ids])  # [labelers, K]
      first, second = _pairs(comparisons.responses[i])
      order = np.sign(ranks[:, second] - ranks[:, first])  # 1: first is better
      predicted = np.sign(s[first] - s[second])
      labeled = order != 0
      hits += (order == predicted)[labeled].tolist()
      clusters += [i] * int(labeled.sum())
      one, other = order[0::2][:len(ids) // 2], order[1::2][:len(ids) // 2]
      both = (one != 0) & (other != 0)
      agree += (one == other)[both].tolist()
      agree_clusters += [i] * int(both.sum())
    out[f'accuracy_{pool}_labelers'] = interval(np.array(hits, float), clusters)
    out[f'agreement_{pool}_labelers'] = interval(np.array(agree, float), agree_clusters)
  out['length_correlation'] = float(np.corrcoef(np.concatenate(scores), [len(r) for r in rows])[0, 1])
  return out


def _pairs(responses: list) -> tuple[np.ndarray, np.ndarray]:
  """Indices of all pairs of different responses."""
  pairs = [(i, j) for i in range(len(responses)) for j in range(i + 1, len(responses)) if responses[i] != responses[j]]
  first, second = zip(*pairs, strict=True) if pairs else ((), ())
  return np.array(first, int), np.array(second, int)
