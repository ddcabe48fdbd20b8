"""The laws of over-optimization (Gao, Schulman and Hilton 2022, section 3): the gold reward as a
function of d = sqrt(KL), where the policy that is optimized has d = 0 and reward 0.

  best of n   R(d) = d (alpha - beta d)
  PPO         R(d) = d (alpha - beta log d)

alpha says how fast the gold reward rises at first, beta how fast the error of the proxy eats it.
Both laws are linear in alpha and beta, so that least squares fits them in one step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FORMS = ('best_of_n', 'ppo')


class Law(NamedTuple):
  """A fitted law: one of FORMS, with alpha in reward per sqrt(nat). beta is in reward per nat for
  best of n, and in reward per sqrt(nat) for PPO."""

  form: str
  alpha: float
  beta: float

  def reward(self, distance: np.ndarray) -> np.ndarray:
    """Returns the gold reward at distances d = sqrt(KL) >= 0, f64[N]."""
    return _columns(self.form, distance) @ np.array([self.alpha, self.beta])

  def peak(self) -> float:
    """Returns the distance at which the gold reward is highest, or infinity if it never falls."""
    if self.beta <= 0:
      return float('inf')
    if self.form == 'best_of_n':
      return max(self.alpha / (2 * self.beta), 0.0)
    return float(np.exp(self.alpha / self.beta - 1))


def fit(form: str, distance: np.ndarray, reward: np.ndarray) -> Law:
  """Returns the law of least squares.

  Args:
    form: one of FORMS.
    distance: f[N], sqrt(KL) in sqrt(nats), of two different values above 0 or more.
    reward: f[N], the gold reward less that at distance 0.

  Raises:
    ValueError: there are fewer than two different distances above 0.
  """
  distance = np.asarray(distance, np.float64)
  if len(np.unique(distance[distance > 0])) < 2:
    raise ValueError('a law of over-optimization needs two different distances above 0.')
  found, *_ = np.linalg.lstsq(_columns(form, distance), np.asarray(reward, np.float64), rcond=None)
  return Law(form, float(found[0]), float(found[1]))


def prediction_error(
  form: str, distance: np.ndarray, reward: np.ndarray, most: float
) -> tuple[float, float]:
  """Returns how well a law that is fitted up to a distance predicts what comes after it.

  Args:
    form: one of FORMS.
    distance: f[N], sqrt(KL).
    reward: f[N], the gold reward less that at distance 0.
    most: the law is fitted to the points at this distance or less, and predicts the others.

  Returns:
    (the root of the mean squared error of the prediction, that of the prediction that the reward
    stays what it is on average in the last fifth of the fitted points).
  """
  distance, reward = np.asarray(distance, np.float64), np.asarray(reward, np.float64)
  near = distance <= most
  law = fit(form, distance[near], reward[near])
  last = np.argsort(distance[near])[-max(1, near.sum() // 5) :]
  constant = reward[near][last].mean()

  def error(predicted):
    return float(np.sqrt(((predicted - reward[~near]) ** 2).mean()))

  return error(law.reward(distance[~near])), error(constant)


def _columns(form: str, distance: np.ndarray) -> np.ndarray:
  """Returns what alpha and beta are multiplied by, f64[N,2]. d log d is 0 at d = 0."""
  d = np.asarray(distance, np.float64)
  if form not in FORMS:
    raise ValueError(f'the form of a law is one of {", ".join(FORMS)}, not {form!r}.')
  if form == 'best_of_n':
    return np.stack([d, -(d**2)], -1)
  return np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))], -1)
