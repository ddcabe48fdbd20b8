"""Sampling: the distribution, when it stops, and that it edits nothing."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import sampling
from alignjax.inference import bulk, loading, streaming
from alignjax.setup import models, texts
from alignjax.types import Decoder, KVCache
from tests.fakes import VOCAB, close, model, prompts


def draws(logits, count=20_000, seed=0, **kw):
  """Tokens of `count` independent draws from one row of logits."""
  rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
  return np.asarray(sampling.sample(jax.random.key(seed), rows, **kw)[0])


@pytest.mark.parametrize('temperature', [1.0, 0.7, 2.0])
@pytest.mark.parametrize('seed', [0, 1])
def test_draws_follow_the_softmax(seed, temperature):
  logits = np.random.default_rng(seed).normal(0, 1.5, 20)
  p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
  counts = np.bincount(draws(logits, temperature=temperature, seed=seed), minlength=20)
  chi2 = ((counts - 20_000 * p) ** 2 / (20_000 * p)).sum()
  assert chi2 < 45  # 19 degrees of freedom: p = 0.0007


def test_impossible_tokens_are_never_drawn():
  logits = np.full(100, -np.inf)
  logits[[0, 7, 99]] = [0.0, 1.0, -9.0]
  assert set(draws(logits)) <= {0, 7, 99}
  logits[99] = -np.inf
  assert draws(logits).max() == 7


@pytest.mark.parametrize('never', [-np.inf, -1e30])
def test_impossible_tokens_are_not_drawn_where_the_sums_round_either(never):
  """Of 2,000 tokens every second or so is cut. The cumulative sums are added up in a tree and rise
  and fall by a last bit at cut tokens too; the numbers drawn here lie just below each of these
  steps, and at both ends."""
  rng = np.random.default_rng(0)
  cut = rng.random(2000) < 0.5
  cut[-1] = True
  logits = np.where(cut, never, rng.normal(0, 1, 2000)).astype(np.float32)
  steps = np.asarray(jax.jit(lambda x: jnp.cumsum(jax.nn.softmax(x)))(jnp.asarray(logits)))
  assert (np.diff(steps)[cut[1:]] != 0).any(), 'there is nothing to round'
  u = np.concatenate(
    [np.nextafter(steps, np.float32(0)) / steps[-1], steps / steps[-1], [0, 1 - 2**-23]]
  ).astype(np.float32)
  u = u[u < 1]
  rows = jnp.broadcast_to(jnp.asarray(logits), (len(u), 2000))
  token, logprob = jax.jit(lambda rows, u: sampling.sample(None, rows, u=u))(
    rows, jnp.asarray(u)[:, None]
  )
  assert (
    not cut[np.asarray(token)].any()
    and np.isfinite(logprob).all()
    and (np.asarray(logprob) > -30).all()
  )
  assert token[-2] == np.flatnonzero(~cut)[0] and token[-1] == np.flatnonzero(~cut)[-1]


def test_rows_draw_independently():
  assert len(set(draws(np.zeros(50), count=200))) > 40


def test_greedy_top_k_and_top_p():
  logits = np.log([0.5, 0.3, 0.15, 0.05])
  assert set(draws(logits, count=50, temperature=0)) == {0}
  assert set(draws(logits, top_k=2)) == {0, 1}
  assert set(draws(logits, top_p=0.79)) == {0, 1}
  assert set(draws(logits, top_p=0.81)) == {0, 1, 2}
  kept = np.bincount(draws(logits, top_k=2), minlength=4)[:2] / 20_000
  close(kept, [5 / 8, 3 / 8], atol=0.02)


def test_log_probability_is_that_of_the_distribution_drawn_from():
  logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, (5, 11)), jnp.float32)
  token, logprob = sampling.sample(jax.random.key(0), logits, temperature=0.5)
  expected = jax.nn.log_softmax(logits / 0.5)[jnp.arange(5), token]
  close(logprob, expected)


@functools.cache
def generate(stop_ids=(3,), max_tokens=8, n=1, seed=0, chunk=None):
  _, nets, params, _ = model()
  run = jax.jit(
    lambda p, *x: sampling.generate(
      nets.decoder,
      p,
      *x,
      max_tokens=max_tokens,
      stop_ids=stop_ids,
      samples_per_prompt=n,
      chunk=chunk,
    )
  )
  return jax.tree.map(np.asarray, run(params, *prompts(0, rows=16), jax.random.key(seed)))


def test_the_stop_token_is_included_and_nothing_follows():
  out = generate(stop_ids=tuple(range(0, VOCAB, 3)))
  stops = out.responses % 3 == 0
  for row, live, stop, ended in zip(out.responses, out.mask, stops, out.ended, strict=True):
    n = live.sum()
    assert live[:n].all() and not live[n:].any() and n >= 1
    assert not stop[: n - 1].any() and stop[n - 1] == ended
    assert (row[n:] == 0).all()
  assert out.ended.any() and len(set(out.mask.sum(1))) > 1


def test_item_3_a_sampled_pad_is_a_token():
  """The pad id 0 is also the stop id: the mask keeps the sampled one."""
  out = generate(stop_ids=(0,), max_tokens=32, seed=2)
  assert out.ended.any()
  for row, live in zip(out.responses[out.ended], out.mask[out.ended], strict=True):
    assert row[live][-1] == 0 and (row[live][:-1] != 0).all()


def test_item_7_no_end_is_forced_at_the_limit():
  out = generate(stop_ids=())
  assert out.mask.all() and not out.ended.any()
  assert len(set(out.responses[:, -1].tolist())) > 3, 'the last tokens are draws like the others'
  stopping = generate(stop_ids=(3,))
  same = stopping.mask
  # the same draws, stop token or not
  assert (stopping.responses[same] == out.responses[same]).all()


def test_item_14_keys_decide():
  a, b, c = generate(seed=0), generate(seed=1), generate(seed=0, chunk=1)
  assert (a.responses != b.responses).any()
  assert (a.responses == c.responses).all() and (a.mask == c.mask).all()


def test_n_samples_of_a_prompt_share_its_prefill():
  _, nets, params, _ = model()
  tokens, mask = prompts(0, rows=4)
  many = sampling.generate(
    nets.decoder,
    params,
    tokens,
    mask,
    jax.random.key(0),
    max_tokens=4,
    stop_ids=(),
    samples_per_prompt=3,
  )
  apart = sampling.generate(
    nets.decoder,
    params,
    jnp.repeat(tokens, 3, 0),
    jnp.repeat(mask, 3, 0),
    jax.random.key(0),
    max_tokens=4,
    stop_ids=(),
  )
  assert (many.responses == apart.responses).all()
  close(many.logprobs, apart.logprobs, rtol=1e-4)


def test_item_4_decoding_stops_when_all_rows_have():
  """A decoder that counts its steps on the host, and always wants token 5."""
  steps = []

  def logits(rows):
    return jnp.full((rows, 8), -1e9).at[:, 5].set(0.0)

  def prefill(weights, tokens, mask, samples):
    return logits(len(tokens)), KVCache((), mask, (), jnp.int32(0))

  def step(weights, tokens, cache):
    jax.debug.callback(lambda: steps.append(1))
    return logits(len(tokens)), cache

  decoder = Decoder(lambda p: p, prefill, step)
  run = lambda stop_ids: jax.block_until_ready(
    sampling.generate(
      decoder,
      {},
      jnp.zeros((2, 3), jnp.int32),
      jnp.ones((2, 3), bool),
      jax.random.key(0),
      max_tokens=64,
      stop_ids=stop_ids,
      chunk=4,
    )
  )
  out = run((5,))
  jax.effects_barrier()
  assert len(steps) == 4 and out.mask.sum() == 2
  steps.clear()
  run((6,))
  jax.effects_barrier()
  assert len(steps) == 64


def test_a_chunk_that_does_not_divide_is_refused():
  with pytest.raises(ValueError, match='chunk=3'):
    generate(chunk=3)


def test_ids_beyond_the_tokenizer_are_never_sampled():
  """The golden chat model has 264 ids, its tokenizer 260 tokens. With the other four far likelier
  than all, none is drawn, one by one or in bulk, at a temperature or greedily, by a checkpoint or
  in a run's setup."""
  chat = pathlib.Path(__file__).parent / 'golden' / 'chat'
  model = loading.load(f'hf:{chat}', form='chat')
  assert model.vocabulary == 260 and model.cfg.unused_ids == ((260, 264),)
  table = model.params['embed']['tokens']
  loud = model.params | {
    'embed': {'tokens': table.at[260:].set(100 * jax.random.normal(jax.random.key(0), (4, 16)))}
  }
  model = model._replace(params=loud)
  logits = model.nets.logits(
    loud,
    jnp.array([model.template.prompt('a')]),
    jnp.ones((1, len(model.template.prompt('a'))), bool),
  )
  assert logits[0, -1].argmax() >= 260
  sample = bulk.make_sampler(
    model.nets, None, prompt_length=40, max_tokens=8, stop_ids=(model.template.end,), pad=0, rows=8
  )
  for temperature in (0.0, 1.0):
    responses, _ = sample(loud, [model.template.prompt('Say a')] * 8, 0, temperature)
    assert max(max(r) for r in responses) < 260
    ids = []
    hear = lambda said: ids.extend(said[-1:]) or ''  # noqa: B023
    listening = model._replace(template=model.template._replace(decode=hear))
    list(streaming.stream(listening, 'Say a', temperature=temperature, max_tokens=8))
    assert ids and max(ids) < 260
  cfg = models.model_config({'source': f'hf:{chat}'}, texts.token_ids(model.tokenizer), 'model')
  assert cfg.unused_ids == ((260, 264),)
  assert models.model_config(
    dict(vocab_size=9, num_layers=1, d_model=4, num_heads=1, max_length=8), [0, 1, 4], 'm'
  ).unused_ids == ((2, 4), (5, 9))
  with pytest.raises(ValueError, match='model has a vocabulary of 5, data.tokenizer one of 260'):
    models.model_config(
      dict(vocab_size=5, num_layers=1, d_model=4, num_heads=1, max_length=8), range(260), 'model'
    )
