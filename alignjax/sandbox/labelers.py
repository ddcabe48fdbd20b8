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
BIASED = ('agrees', 'refused', 'wording')  # what only biased labelers see, after FEATURES
_BASE = np.array([2.0, -2.0, -2.0, -0.8, -0.05, 0.3])


class Labelers:
  """The utility of a response to labeler l is features @ weights[l], perceived with normal noise.

  Attributes:
    weights: f[labelers,F].
    noise: the standard deviation for one response.
    bonus: f[labelers,2], of a response that agrees with the user's belief, and of one that refuses.
    miss: f[labelers], the probability that a labeler does not notice what is false in a response of
      the best wording; it is in proportion to the wording (Wen et al. 2024, "Language Models Learn
      to Mislead Humans via RLHF").
    biased: whether any labeler has a bonus or misses anything.
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
    agreement: float = 0.0,
    refusal: float = 0.0,
    miss: float = 0.0,
    share: float = 1.0,
  ):
    """A share of the training labelers, the first ones, has the biases `agreement`, `refusal` (of
    utility) and `miss` (a probability). The held-out labelers have none."""
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
    of = np.arange(count) < round(share * train)
    self.bonus = of[:, None] * np.array([agreement, refusal], float)
    self.miss = of * float(miss)
    self.biased = bool(self.bonus.any() or self.miss.any())
    self.train, self.heldout = np.arange(train), np.arange(train, count)

  def features(self, judgments: Sequence[Judgment]) -> np.ndarray:
    """f[N,F]: what labelers see of each response, FEATURES and, if any are biased, BIASED."""
    seen = np.array(
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
    if not self.biased:
      return seen
    more = np.array([[j.agrees, j.refused, j.wording] for j in judgments], float).reshape(-1, 3)
    return np.concatenate([seen, more], 1)

  def utilities(self, features: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """f[N,len(ids)]: the utilities without noise, in expectation over what is missed."""
    plain = features[:, : len(FEATURES)] @ self.weights[ids].T
    if not self.biased:
      return plain
    unseen = self._missed(features, ids) * features[:, 1:2] * self.weights[ids, 1]
    return plain + features[:, 6:8] @ self.bonus[ids].T - unseen

  def sincere(self, features: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """f[N]: the mean utility over a pool if nobody had a bias or missed anything."""
    return (features[:, : len(FEATURES)] @ self.weights[ids].T).mean(-1)

  def _missed(self, features: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """f[N,len(ids)]: the probability that each labeler misses what is false."""
    return features[:, 8:9] * self.miss[ids] * (features[:, 1:2] > 0)

  def gold(self, features: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """f[N]: the mean utility over a pool, the gold score."""
    return self.utilities(features, ids).mean(-1)

  def rank(self, features: np.ndarray, labeler: int, rng: np.random.Generator) -> np.ndarray:
    """Ranks i[K], 0 best, as this labeler perceives K responses once. Responses that look the same
    to labelers (equal features) get equal ranks."""
    distinct, where = np.unique(features, axis=0, return_inverse=True)
    own = np.array([labeler])
    perceived = self.utilities(distinct, own)[:, 0] + self.noise * rng.standard_normal(
      len(distinct)
    )
    if self.miss[labeler]:  # drawn instead of expected
      p = self._missed(distinct, own)[:, 0]
      missed = rng.random(len(distinct)) < p
      perceived -= (missed - p) * distinct[:, 1] * self.weights[labeler, 1]
    return np.argsort(np.argsort(-perceived))[where.reshape(-1)]

  def preference(
    self, features_a: np.ndarray, features_b: np.ndarray, ids: np.ndarray
  ) -> np.ndarray:
    """f[N,len(ids)]: the exact probability that each labeler ranks a above b, Phi((u_a - u_b) /
    (noise sqrt 2)). It is 0.5 for a tie, where the two look the same."""
    difference = self.utilities(features_a, ids) - self.utilities(features_b, ids)
    phi = np.vectorize(math.erf)
    if not self.miss[ids].any():
      probability = 0.5 * (1 + phi(difference / (2 * self.noise)))
    else:  # the mean over what is missed in a and in b, each missed or not
      probability = np.zeros_like(difference)
      p_a, p_b = self._missed(features_a, ids), self._missed(features_b, ids)
      worth = -self.weights[ids, 1]
      for a in (0, 1):
        for b in (0, 1):
          chance = (p_a if a else 1 - p_a) * (p_b if b else 1 - p_b)
          gained = ((a - p_a) * features_a[:, 1:2] - (b - p_b) * features_b[:, 1:2]) * worth
          probability += chance * 0.5 * (1 + phi((difference + gained) / (2 * self.noise)))
    same = np.all(features_a == features_b, axis=1)
    return np.where(same[:, None], 0.5, probability)
