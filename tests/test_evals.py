"""Intervals, reward-model accuracy and calibration, and bulk inference, by cases with a known
answer."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.evals.reward import accuracy
from alignjax.inference import bulk
from tests.fakes import close, model


class Perfect:
  """Labelers without noise, whose utility is the feature."""

  train, heldout = np.arange(4), np.arange(4, 6)

  def rank(self, features, labeler, rng):
    return np.argsort(np.argsort(-features[:, 0] * (1 if labeler < 4 else -1)))


def test_item_21_accuracy_by_pool():
  made = SimpleNamespace(
    prompts=[[5], [6]],
    responses=[[[1], [2], [3]], [[4], [1], [1]]],
    features=[[[1.0], [2.0], [3.0]], [[4.0], [1.0], [1.0]]],
  )
  out = accuracy.by_pool(Perfect(), made, lambda rows: np.array([r[-1] for r in rows], float), 0)
  assert (
    out['accuracy_train_labelers']['mean'] == 1.0
    and out['accuracy_heldout_labelers']['mean'] == 0.0
  )
  assert out['accuracy_train_labelers']['n'] == 4 * (3 + 2)  # identical responses are no pair
  assert out['agreement_train_labelers']['mean'] == 1.0
  assert out['margin_train_labelers']['mean'] == pytest.approx((1 + 2 + 1 + 3 + 3) / 5)
  assert out['length_correlation'] is None  # all are as long
  tied = accuracy.by_pool(Perfect(), made, lambda rows: np.zeros(len(rows)), 0)
  assert tied['accuracy_train_labelers']['mean'] == tied['accuracy_heldout_labelers']['mean'] == 0.5
  # half right at a probability of a half
  assert tied['calibration_error_train_labelers'] == pytest.approx(0)


def test_agreement_is_between_different_labelers():
  """Of the training pool the even ones like the feature and the odd ones do not; the two of the
  other pool like it."""

  class Divided(Perfect):
    def rank(self, features, labeler, rng):
      return np.argsort(np.argsort(-features[:, 0] * (1 if labeler in (0, 2, 4, 5) else -1)))

  made = SimpleNamespace(
    prompts=[[5]], responses=[[[1], [2], [3]]], features=[[[1.0], [2.0], [3.0]]]
  )
  out = accuracy.by_pool(Divided(), made, lambda rows: np.array([r[-1] for r in rows], float), 0)
  assert (
    out['agreement_train_labelers']['mean'] == 0 and out['agreement_train_labelers']['n'] == 2 * 3
  )
  assert (
    out['agreement_heldout_labelers']['mean'] == 1 and out['agreement_heldout_labelers']['n'] == 3
  )
  assert out['accuracy_train_labelers']['mean'] == 0.5


def test_accuracy_on_ranks_by_hand():
  """Pairs without a tie, a tie of the model half right, each distinct row scored once however many
  judged it."""
  made = SimpleNamespace(
    prompts=[[5], [5], [6]],
    responses=[[[1], [2]], [[1], [2]], [[3], [4], [4]]],
    ranks=[[1, 0], [0, 1], [0, 1, 1]],
  )
  scored = []
  out = accuracy.on_ranks(
    made, lambda rows: scored.extend(rows) or np.array([r[-1] for r in rows], float)
  )
  assert scored == [[5, 1], [5, 2], [6, 3], [6, 4]]
  # 2 > 1 right, then wrong; 4 > 3 wrong, twice
  assert out['n'] == 4 and out['mean'] == pytest.approx((1 + 0 + 0 + 0) / 4)
  tied = accuracy.on_ranks(made, lambda rows: np.zeros(len(rows)))
  assert tied['mean'] == 0.5


def test_item_21_calibration():
  rng = np.random.default_rng(0)
  p = rng.uniform(0.5, 1, 40_000)
  assert accuracy.calibration_error(p, (rng.random(40_000) < p).astype(float)) < 0.02
  assert accuracy.calibration_error(np.full(100, 0.95), np.full(100, 0.0)) == pytest.approx(0.95)


def test_bulk_inference_equals_one_at_a_time():
  _, nets, params, scalar = model()
  rows = [[1, 2, 3], [4], [5, 6, 7, 8], [9, 9], [2, 2, 2]]
  score = bulk.make_scorer(nets, None, length=6, pad=0, rows=2)(scalar, rows)
  alone = [nets.scalar(scalar, jnp.array([r]), jnp.ones((1, len(r)), bool))[0, -1] for r in rows]
  close(score, alone, rtol=1e-4)
  logprobs = bulk.make_response_logprobs(nets, None, length=6, pad=0, rows=2)(
    params, rows, [[3, 1], [2], [5], [1], [7]]
  )
  expected = [
    nets.logprobs(params, jnp.array([r + s]), jnp.ones((1, len(r + s)), bool))[0][0, len(r) :].sum()
    for r, s in zip(rows, [[3, 1], [2], [5], [1], [7]], strict=True)
  ]
  close(logprobs, expected, rtol=1e-4)


def test_greedy_match_is_greedy_decoding():
  _, nets, params, _ = model()
  sample = bulk.make_sampler(nets, None, prompt_length=5, max_tokens=3, stop_ids=(), pad=0, rows=4)
  prompts = [[1, 2], [3], [4, 5, 6]]
  responses, _ = sample(params, prompts, seed=0, temperature=0)
  tokens = np.zeros((6, 8), np.int32)
  mask, weights = np.zeros((6, 8), bool), np.zeros((6, 8), np.float32)
  for i, (p, r) in enumerate(
    zip(prompts * 2, [*responses, *[[x + 1 for x in r] for r in responses]], strict=True)
  ):
    tokens[i, : len(p) + 3], mask[i, : len(p) + 3], weights[i, len(p) : len(p) + 3] = (
      p + [t % 50 for t in r],
      True,
      1,
    )
  greedy = bulk.make_likelihood(nets, None, rows=4)(params, tokens, mask, weights)[1]
  assert greedy.tolist() == [True] * 3 + [False] * 3
  one, two = sample(params, prompts, 1)[0], sample(params, prompts, 2)[0]
  assert one == sample(params, prompts, 1)[0] and one != two
  assert jax.device_count() == 8
