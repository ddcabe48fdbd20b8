"""What is labelled next: functions that order the items of a round (alignjax/rounds.py), the most
useful first.

The config names one, rounds.choose=dict(fn='module:function', ...), and a function of your own has
the same form:

    choose(items, scores, *, seed, labels, features, earlier, ...) -> order

It takes those keyword arguments that it needs, and others are its coefficients:

  items       the records of the round, {'prompt', 'responses', 'policies', ...}, N of them
  scores      f64[M,N,K], the score of every response by M reward models, NaN where an item has
              fewer than K responses. M is rounds.ensemble, and 0 in the first round, which has no
              reward model yet.
  seed        a whole number for random choices
  labels      how many items will be labelled
  features    f64[N,K,D], the last layer of the newest reward model at the end of each response
              (before there is one, of the network that it starts from), NaN as in `scores`
  earlier     f64[L,K,D], the same features of the L items that were labelled before and that the
              reward model is trained on

`order` holds the numbers of distinct items, `labels` of them or more. The first ones are labelled.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np


def random(items: Sequence[Any], scores: np.ndarray, *, seed: int) -> np.ndarray:
  """Returns a random order."""
  return np.random.default_rng([seed, 1]).permutation(len(items))


def disagreement(items: Sequence[Any], scores: np.ndarray, *, seed: int) -> np.ndarray:
  """Returns the items by how much reward models disagree about them, those with the largest spread
  first.

  Only differences of scores order responses, so the mean score of an item is taken from every
  model's scores. The spread is the variance over models, averaged over the responses: half of the
  average variance of the difference of two responses that are drawn at random. The order is random
  where there is no reward model.

  Raises:
    ValueError: there is a single reward model.
  """
  if not len(scores):
    return random(items, scores, seed=seed)
  if len(scores) == 1:
    raise ValueError(
      'rounds.choose: disagreement needs the scores of two reward models or more. Set '
      'rounds.ensemble, the number of reward models, to 2 or more.'
    )
  apart = scores - np.nanmean(scores, axis=2, keepdims=True)
  return _largest_first(np.nanmean(np.var(apart, axis=0), axis=1), seed)


def near_tie(items: Sequence[Any], scores: np.ndarray, *, seed: int) -> np.ndarray:
  """Returns the items by the margin between their two best scores, the smallest margin first. A
  score is the mean over the reward models. The order is random where there is none."""
  if not len(scores):
    return random(items, scores, seed=seed)
  best = -np.sort(-scores.mean(0), axis=1)  # NaN comes last.
  return _largest_first(best[:, 1] - best[:, 0], seed)


def d_optimal(
  items: Sequence[Any],
  scores: np.ndarray,
  *,
  labels: int,
  features: np.ndarray,
  earlier: np.ndarray,
  prior: float = 1.0,
) -> np.ndarray:
  """Returns a greedy D-optimal design for a linear reward of the features.

  A ranking informs about differences of two responses. With x_i the features of its i-th response,
  its information is the mean of (x_i - x_j)(x_i - x_j)' over its pairs, which is the weight that
  the ranking loss gives to them. Each item that is chosen is the one that raises the log
  determinant of the sum of all information the most: that of the prior, of the items that were
  labelled before, and of those chosen so far. The items that are not among the first `labels`
  follow in their own order.

  Args:
    items: the records.
    scores: are not used.
    labels: how many items are chosen.
    features: f[N,K,D] of the items.
    earlier: f[L,K,D] of the items that were labelled before.
    prior: the information of the prior in every direction, in units of the average item's.
  """
  parts = np.stack([_information_root(x) for x in features])  # [N,K,D]
  width = parts.shape[2]
  unit = max((parts**2).sum() / len(parts) / width, np.finfo(np.float64).tiny)
  known = prior * unit * np.eye(width)
  for x in earlier:
    root = _information_root(x)
    known += root.T @ root
  inverse = np.linalg.inv(known)

  def gain(i: int) -> float:
    return float(np.linalg.slogdet(np.eye(parts.shape[1]) + parts[i] @ inverse @ parts[i].T)[1])

  # What an item adds can only fall as others are chosen. So an item whose gain is known to be the
  # largest now need not be compared with those whose earlier gain was smaller.
  waiting = [(-gain(i), i) for i in range(len(parts))]
  heapq.heapify(waiting)
  chosen: list[int] = []
  while len(chosen) < min(labels, len(parts)):
    _, i = heapq.heappop(waiting)
    now = (-gain(i), i)
    if waiting and now > waiting[0]:
      heapq.heappush(waiting, now)
      continue
    chosen.append(i)
    across = parts[i] @ inverse  # [K,D]
    inner = np.eye(len(across)) + across @ parts[i].T
    inverse -= across.T @ np.linalg.solve(inner, across)
  return np.array(chosen + sorted(set(range(len(parts))) - set(chosen)), np.int64)


def _information_root(x: np.ndarray) -> np.ndarray:
  """Returns f[K,D] whose product with its transpose, [D,D], is the mean of the products of
  differences of two rows of x. Rows of NaN do not count, and are 0."""
  there = np.logical_not(np.isnan(x).any(axis=1))
  count = int(there.sum())
  apart = np.where(there[:, None], x - x[there].mean(0), 0.0)
  # The sum over pairs is `count` times the sum over rows, and there are count (count - 1) / 2.
  return apart * np.sqrt(2 / (count - 1))


def _largest_first(values: np.ndarray, seed: int) -> np.ndarray:
  """Returns the order of falling values. Equal ones are in a random order."""
  shuffled = np.random.default_rng([seed, 2]).permutation(len(values))
  return shuffled[np.argsort(-values[shuffled], kind='stable')]


def check(order: Any, count: int, labels: int, name: str) -> np.ndarray:
  """Returns the order that a function returned, as i64.

  Args:
    order: what it returned.
    count: the number of items.
    labels: how many have to be labelled.
    name: of the function, for the message.

  Raises:
    ValueError: it is no order of items, or too short.
  """
  made = np.asarray(order)
  good = made.ndim == 1 and np.issubdtype(made.dtype, np.integer)
  if not good or len(set(made.tolist())) < len(made) or not set(made.tolist()) <= set(range(count)):
    raise ValueError(
      f'rounds.choose.fn={name!r} returned {str(order)[:80]}, which is no order of the {count} '
      f'items. It must return the numbers of distinct items, from 0 to {count - 1}.'
    )
  if len(made) < labels:
    raise ValueError(
      f'rounds.choose.fn={name!r} returned {len(made)} of {count} items, but {labels} are to be '
      f'labelled. It must return {labels} or more.'
    )
  return made.astype(np.int64)


# Their order does not depend on the scores, so that no reward model has to be asked.
WITHOUT_SCORES = (random, d_optimal)
