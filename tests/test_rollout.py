"""Rollouts: the ratio is exactly 1 before the first update, rewards are any function, chunks change
nothing."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses, ops, rewards, rollout, steps
from alignjax.models import transformer
from alignjax.types import PPOBatch
from tests.fakes import FAMILIES, close, config, model, prompts


def collect(family='gpt2', seed=0, reward_fn=rewards.model_reward, **kw):
  _, nets, params, scalar = model(family)
  settings = dict(max_tokens=6, stop_ids=(3, 4, 5), score_rows=4) | kw
  run = jax.jit(
    lambda params, frozen, *x: rollout.collect(
      nets, params, frozen, *x, reward_fn=reward_fn, **settings
    )
  )
  _, _, _, reward = model(family, seed=3)
  return run(
    {'policy': params, 'value': scalar},
    {'ref': model(family, seed=3)[2], 'reward': reward},
    *prompts(seed, rows=8),
    jax.random.key(seed),
  )


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('seed', [0, 1])
def test_item_8_the_ratio_before_the_first_update_is_exactly_1(family, seed):
  _, nets, params, scalar = model(family)
  out, metrics = collect(family, seed)
  zeros = jnp.zeros_like(out.values)
  batch = PPOBatch(out, zeros, zeros, out.mask.astype(jnp.float32))
  grads = jax.jit(
    lambda p, b: steps.gradients(losses.ppo, p, b, None, nets=nets)[1]['ppo/ratio_max_dev']
  )
  cut = steps.split(batch, 2)
  for i in range(2):
    part = jax.tree.map(operator.itemgetter(i), cut)
    assert float(grads({'policy': params, 'value': scalar}, part)) == 0.0
  assert float(metrics['rollout/sampler_gap_max']) < 1e-4


def test_item_8_ids_without_a_token_are_neither_drawn_nor_scored():
  """A vocabulary of 50 whose tokenizer has 12 ids: sampler and scorer share the distribution over
  these."""
  _, _, params, scalar = model()
  nets = transformer.make_networks(config(unused_ids=((12, 50),)))

  @jax.jit
  def run(params, scalar, *prompts):
    ro, metrics = rollout.collect(
      nets,
      {'policy': params, 'value': scalar},
      {'ref': params},
      *prompts,
      jax.random.key(0),
      max_tokens=6,
      stop_ids=(3,),
      reward_fn=lambda *rows, nets, frozen: jnp.zeros(8),
    )
    batch = PPOBatch(ro, ro.values, ro.values, ro.mask.astype(jnp.float32))
    _, ppo, _ = steps.gradients(
      losses.ppo, {'policy': params, 'value': scalar}, batch, None, nets=nets
    )
    return ro, metrics, ppo, nets.logits(params, *ro.sequences())

  ro, metrics, ppo, logits = jax.tree.map(np.asarray, run(params, scalar, *prompts(0, rows=8)))
  assert ro.responses.max() < 12 and len(set(ro.responses[ro.mask].tolist())) > 5
  assert ppo['ppo/ratio_max_dev'] == 0.0 and metrics['rollout/sampler_gap_max'] < 1e-4
  for b, t in zip(*np.nonzero(ro.mask), strict=True):
    row = logits[b, 6 + t - 1, :12].astype(np.float64)
    close(ro.logprobs[b, t], row[ro.responses[b, t]] - np.log(np.exp(row).sum()), rtol=1e-4)


def test_item_9_scoring_knows_the_temperature():
  out, metrics = collect(temperature=0.5)
  _, plain = collect(temperature=1.0)
  assert (
    float(metrics['rollout/sampler_gap_max']) < 1e-4
    and float(plain['rollout/sampler_gap_max']) < 1e-4
  )
  k1, k3 = ops.kl_estimates(out.logprobs, out.ref_logprobs, out.mask)
  assert (np.asarray(k3) >= -1e-5).all()


def test_values_and_log_probabilities_sit_at_their_tokens():
  _, nets, params, scalar = model()
  out, _ = collect()
  for b in range(8):
    n = int(out.mask[b].sum())
    prompt = np.asarray(out.prompts[b])[np.asarray(out.prompt_mask[b])]
    row = jnp.asarray(np.concatenate([prompt, np.asarray(out.responses[b, :n])]))[None]
    live, q = jnp.ones(row.shape, bool), len(prompt)
    close(out.logprobs[b, :n], nets.logprobs(params, row, live)[0][0, q:], rtol=1e-4, atol=1e-4)
    values = nets.scalar(scalar, row, live)[0]
    close(out.values[b, :n], values[q - 1 : -1], rtol=1e-4, atol=1e-4)
    close(
      out.scores[b],
      model(seed=3)[1].scalar(model(seed=3)[3], row, live)[0, -1],
      rtol=1e-4,
      atol=1e-4,
    )
    assert (out.logprobs[b, n:] == 0).all() and (out.values[b, n:] == 0).all()


def test_scoring_in_chunks_changes_nothing():
  whole, parts = collect(score_rows=None)[0], collect(score_rows=2)[0]
  jax.tree.map(functools.partial(close, rtol=1e-4, atol=1e-5), whole, parts)
  with pytest.raises(ValueError, match='3 rows at a time'):
    collect(score_rows=3)


def length_reward(prompts, prompt_mask, responses, mask, *, nets, frozen, scale):
  return scale * mask.sum(-1).astype(jnp.float32)


def test_item_22_a_reward_is_any_function():
  out, _ = collect(reward_fn=functools.partial(length_reward, scale=0.9))
  close(out.scores, 0.9 * out.mask.sum(-1))


def count_words(prompts, responses):
  """The Python function that the next test names in the manner of a config."""
  return [
    0.5 * len(r.split()) - 0.25 * len(p.split()) for p, r in zip(prompts, responses, strict=True)
  ]


def test_item_22_a_reward_is_a_python_function_of_texts():
  words = lambda ids: ' '.join(map(str, ids))
  asked = {
    tuple(row[live].tolist()): words(row[live])
    for row, live in zip(*map(np.asarray, prompts(0, rows=8)), strict=True)
  }
  reward = functools.partial(
    rewards.host_reward,
    function='tests.test_rollout:count_words',
    prompts_by_tokens=asked,
    decode_response=lambda ids: (words(ids), True),
    failures=[],
  )
  out, _ = collect(reward_fn=reward)
  close(out.scores, 0.5 * out.mask.sum(-1) - 0.25 * out.prompt_mask.sum(-1))


def test_item_13_an_integer_reward_is_refused():
  with pytest.raises(TypeError, match='int32'):
    collect(reward_fn=lambda p, pm, r, m, *, nets, frozen: m.sum(-1))


def test_item_2_the_missing_end_penalty_means_what_the_sampler_means_by_end():
  stops = tuple(range(20))
  punished = collect(stop_ids=stops, missing_end_penalty=1.5, max_tokens=2)
  plain = collect(stop_ids=stops, max_tokens=2)
  ended = jnp.array(
    [int(r[m.sum() - 1]) in stops for r, m in zip(plain[0].responses, plain[0].mask, strict=True)]
  )
  close(punished[0].scores, plain[0].scores - 1.5 * ~ended)
  assert 0 < int(ended.sum()) < 8
