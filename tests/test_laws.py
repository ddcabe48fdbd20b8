"""The laws of over-optimization, by hand and by a search over alpha and beta."""

import numpy as np
import pytest
import scipy.optimize

from alignjax.evals.reward import laws


@pytest.mark.parametrize(
  ('form', 'expected', 'peak'),
  [
    # d = 0, 1, 2 of alpha = 3 and beta = 1/2: 0, 2.5, 4; the peak is alpha / (2 beta).
    ('best_of_n', [0, 2.5, 4], 3),
    # 0, 3, 2 (3 - log(2) / 2); the peak is exp(alpha / beta - 1).
    ('ppo', [0, 3, 6 - np.log(2)], np.exp(5)),
  ],
)
def test_a_law_by_hand(form, expected, peak):
  law = laws.Law(form, 3.0, 0.5)
  assert law.reward(np.array([0, 1, 2])) == pytest.approx(expected)
  assert law.peak() == pytest.approx(peak)
  assert laws.Law(form, 3.0, 0.0).peak() == laws.Law(form, 3.0, -1.0).peak() == np.inf
  around = law.reward(law.peak() + np.array([-1e-3, 0, 1e-3]))
  assert around[1] > around[0] and around[1] > around[2]
  found = laws.fit(form, np.array([0, 1, 2]), np.array(expected))
  assert (found.alpha, found.beta) == (pytest.approx(3), pytest.approx(0.5))


@pytest.mark.parametrize('form', laws.FORMS)
@pytest.mark.parametrize('seed', range(3))
def test_a_fit_is_that_of_least_squares(form, seed):
  rng = np.random.default_rng(seed)
  distance = rng.uniform(0, 4, 30)
  reward = laws.Law(form, 1.5, 0.4).reward(distance) + rng.normal(0, 0.2, 30)

  def loss(at):
    total = 0.0
    for d, r in zip(distance, reward, strict=True):
      curve = d * (at[0] - at[1] * (d if form == 'best_of_n' else np.log(d)))
      total += (r - curve) ** 2
    return total

  best = scipy.optimize.minimize(loss, [0, 0], method='Nelder-Mead', options={'xatol': 1e-9})
  found = laws.fit(form, distance, reward)
  assert [found.alpha, found.beta] == pytest.approx(best.x, abs=1e-5)


def test_a_prediction_is_made_of_the_near_points_alone():
  law = laws.Law('best_of_n', 2.0, 0.5)
  distance = np.array([0.5, 1.0, 1.5, 2.0, 3.0])
  reward = law.reward(distance)
  assert laws.prediction_error('best_of_n', distance, reward, 1.5) == pytest.approx(
    # The law predicts exactly. The reward at 1.5, the last near point, is 1.875; then 2 and 1.5.
    (0, np.sqrt((0.125**2 + 0.375**2) / 2))
  )
  reward[-1] += 1
  assert laws.prediction_error('best_of_n', distance, reward, 1.5)[0] == pytest.approx(
    np.sqrt(1 / 2)
  )


def test_what_cannot_be_fitted_is_said():
  with pytest.raises(ValueError, match='two different distances above 0'):
    laws.fit('ppo', np.array([0.0, 1.0, 1.0]), np.zeros(3))
  with pytest.raises(ValueError, match="best_of_n, ppo, not 'rl'"):
    laws.fit('rl', np.array([1.0, 2.0]), np.zeros(2))
