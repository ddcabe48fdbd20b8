"""Simulated labelers. Each weighs what the judge sees in a way of its own, and errs. Some train the
reward model and some are held out. The held-out ones differ on purpose (they dislike the opener,
care more for instructions and less for truth), so that the size of the gap between the pools is a
parameter of the world and not a discovery."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from alignjax.sandbox.judge import Judgment
from alignjax.sandbox.universe import stream

FEATURES = ('follow', 'false', 'toxic', 'junk', 'length', 'opener')
_BASE = np.array([2.0, -2.0, -2.0, -0.8, -0.05, 0.3])


class Labelers:
  """The utility of a response to labeler l is features @ weights[l], perceived with normal noise.

  Attributes:
    weights: f[labelers,F].
    noise: the standard deviation for one response.
    train, heldout: the numbers of the labelers in each pool.
  """

  def __init__(
    self,
    seed: int,
    train: int = 8,
    heldout: int = 5,
    spread: float = 0.35,
    shift: float = 0.5,
    noise: float = 0.5,
  ):
    rng = stream(seed, 'labelers')
    count = train + heldout
    weights = _BASE * np.exp(spread * rng.standard_normal((count, len(FEATURES))))
    weights[:, 4] = -0.05 - 0.06 * rng.standard_normal(count)
    weights[:, 5] = 0.3 + 0.25 * rng.standard_normal(count)
    weights[train:, 5] -= shift
    weights[train:, 0] *= 1.2
    weights[train:, 1] *= 0.7
    self.weights = weights
    self.noise = noise
    self.train, self.heldout = np.arange(train), np.arange(train, count)

  @staticmethod
  def features(judgments: Sequence[Judgment]) -> np.ndarray:
    """f[N,F]: what labelers see of each response."""
    return np.array(
      [
        [
          j.follow,
          min(j.false_claims, 2),
          j.toxic,
          min(j.junk, 2),
          max(j.words - 6, 0) / 3,
          j.opener,
        ]
        for j in judgments
      ],
      float,
    ).reshape(-1, len(FEATURES))

  def utilities(self, features: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """f[N,len(ids)]: the utilities without noise."""
    return features @ self.weights[ids].T

  def gold(self, features: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """f[N]: the mean utility over a pool, the gold score."""
    return self.utilities(features, ids).mean(-1)

  def rank(self, features: np.ndarray, labeler: int, rng: np.random.Generator) -> np.ndarray:
    """Ranks i[K], 0 best, as this labeler perceives K responses once. Responses that look the same
    to labelers (equal features) get equal ranks."""
    distinct, where = np.unique(features, axis=0, return_inverse=True)
    perceived = self.utilities(distinct, np.array([labeler]))[
      :, 0
    ] + self.noise * rng.standard_normal(len(distinct))
    return np.argsort(np.argsort(-perceived))[where.reshape(-1)]

  def preference(
    self, features_a: np.ndarray, features_b: np.ndarray, ids: np.ndarray
  ) -> np.ndarray:
    """f[N,len(ids)]: the exact probability that each labeler ranks a above b, Phi((u_a - u_b) /
    (noise sqrt 2)). It is 0.5 for a tie, where the two look the same."""
    difference = self.utilities(features_a, ids) - self.utilities(features_b, ids)
    probability = 0.5 * (1 + np.vectorize(math.erf)(difference / (2 * self.noise)))
    same = np.all(features_a == features_b, axis=1)
    return np.where(same[:, None], 0.5, probability)
