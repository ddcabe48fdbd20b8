"""Sampling: the distribution, when it stops, and that it edits nothing."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import sampling
from alignjax.inference import bulk, loading, streaming
from alignjax.models import transformer
from alignjax.models.attention import Machine
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


@pytest.mark.parametrize('vocabulary', [7, 130, 1000])
def test_a_draw_inverts_the_cumulative_distribution(vocabulary):
  """Against sums in float64, at numbers that are not next to a step."""
  logits = np.random.default_rng(0).normal(0, 2, vocabulary).astype(np.float32)
  steps = np.cumsum(np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum())
  u = np.linspace(0, 1, 3001)[:-1].astype(np.float32)
  u = u[np.abs(u[:, None] - steps).min(1) > 2e-6]
  assert len(u) > 2500
  rows = jnp.broadcast_to(jnp.asarray(logits)[None], (len(u), vocabulary))
  token, _ = sampling.sample(None, rows, u=jnp.asarray(u)[:, None])
  assert (token == np.searchsorted(steps, u, side='right')).all()


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


def make_bookkeeper(steps):
  """A decoder whose next token depends on the prompt and on every token in the cache: one of two
  tokens, with equal probability. Each step notes its rows and the slots of a response."""

  def logits(cache):
    (ids,), (said,) = cache.prompt, cache.response
    ids = jnp.repeat(ids[0][:, 0, -1, 0], len(said[0]) // len(ids[0]))
    first = (ids + 3 * jnp.sum(said[0], axis=(1, 2, 3)) + cache.index.astype(jnp.float32)) % 7
    token = jnp.arange(8.0)[None]
    return jnp.where((token == first[:, None]) | (token == first[:, None] + 1), 0.0, -jnp.inf)

  def prefill(weights, tokens, mask, samples):
    ids = jnp.where(mask, tokens, 0).astype(jnp.float32)[:, None, :, None]
    said = jnp.zeros((len(tokens) * samples, 1, 0, 1))
    cache = KVCache(((ids, ids),), mask, ((said, said),), jnp.int32(0))
    return logits(cache), cache

  def step(weights, tokens, cache):
    ((k, v),) = cache.response
    jax.debug.callback(lambda: steps.append((len(tokens), k.shape[2])))
    new = tokens.astype(jnp.float32)[:, None, None, None]
    k, v = (jax.lax.dynamic_update_slice_in_dim(x, new, cache.index, axis=2) for x in (k, v))
    cache = cache.replace(response=((k, v),), index=cache.index + 1)
    return logits(cache), cache

  return Decoder(lambda params: params, prefill, step)


def expected_of_bookkeeper(ids, samples, key, length):
  """The responses of `make_bookkeeper`, one row after the other, to the stop token 0."""
  u = [jax.random.uniform(jax.random.fold_in(key, t), (len(ids) * samples,)) for t in range(length)]
  rows = []
  for row, name in enumerate(np.repeat(ids, samples)):
    said = []
    while len(said) < length and said[-1:] != [0]:
      first = (name + 3 * sum(said) + len(said)) % 7
      said.append(int(first + (u[len(said)][row] >= 0.5)))
    rows.append(said)
  return rows


@pytest.mark.parametrize(
  'how',
  [
    {},
    dict(segments=3),
    dict(halvings=2),
    dict(halvings=2, segments=2, shards=2),
    dict(halvings=1, segments=4, prompts_at_once=4),
    dict(halvings=9, chunk=1),
    dict(samples_per_prompt=4),
    dict(samples_per_prompt=4, halvings=2, segments=2, shards=2),
    dict(samples_per_prompt=3, halvings=1, segments=3, prompts_at_once=2),
  ],
  ids=str,
)
@pytest.mark.parametrize('seed', [0, 1])
def test_a_row_draws_the_same_whatever_is_sampled_with_it(how, seed):
  """Segments, halvings and groups, against a loop over rows; and the batch is halved as soon as a
  check finds at most half of the rows unfinished."""
  steps, key, length, samples = [], jax.random.key(seed), 24, how.get('samples_per_prompt', 1)
  how = dict(chunk=2) | how
  ids = np.random.default_rng(seed).integers(0, 50, (8, 3))
  out = sampling.generate(
    make_bookkeeper(steps), {}, ids, np.ones(ids.shape, bool), key,
    max_tokens=length, stop_ids=(0,), **how,
  )  # fmt: skip
  jax.effects_barrier()
  rows = expected_of_bookkeeper(ids[:, -1], samples, key, length)
  assert [list(row[live]) for row, live in zip(out.responses, out.mask, strict=True)] == rows
  assert (np.asarray(out.ended) == [row[-1] == 0 for row in rows]).all()
  close(out.logprobs, np.where(out.mask, np.log(0.5), 0.0))
  lengths = np.array([len(row) for row in rows])
  assert len(set(lengths.tolist())) > 4
  if 'prompts_at_once' in how:
    return
  parts = lengths.reshape(len(ids) if samples > 1 else how.get('shards', 1), -1)
  sizes = [-(-parts.shape[1] // 2**i) for i in range(how.get('halvings', 0) + 1)]
  stops = [length * (i + 1) / how.get('segments', 1) for i in range(how.get('segments', 1))]
  wanted, level = [], 0
  for t in range(0, length, how['chunk']):
    unfinished = (parts > t).sum(1).max()
    while level + 1 < len(sizes) and unfinished <= sizes[level + 1]:
      level += 1
    if unfinished:
      slots = length if level else min(s for s in stops if s >= t + how['chunk'])
      wanted += [(sizes[level] * len(parts), slots)] * how['chunk']
  assert steps == wanted


@pytest.mark.parametrize(
  'family,samples,kv_cache', [('gpt2', 1, None), ('llama', 3, None), ('llama', 3, 'int8')]
)
def test_a_model_draws_the_same_in_segments_and_halves(family, samples, kv_cache):
  """Prompts of different lengths; the products of a CPU and of other platforms."""
  cfg, _, params, _ = model(family)
  cfg = dataclasses.replace(cfg, kv_cache=kv_cache)

  def run(platform, **how):
    decoder = transformer.make_networks(cfg, machine=Machine(platform)).decoder
    return jax.jit(
      lambda p, *x: sampling.generate(
        decoder, p, *x, jax.random.key(1), max_tokens=12, stop_ids=tuple(range(0, VOCAB, 3)),
        chunk=2, samples_per_prompt=samples, **how,
      )
    )(params, *prompts(0))  # fmt: skip

  whole = run('tpu')
  parts = np.asarray(whole.mask.sum(1)).reshape(1 if samples == 1 else 8, -1)
  unfinished = [(parts > t).sum(1).max() for t in range(2, 12, 2)]
  assert any(0 < count <= (parts.shape[1] + 1) // 2 for count in unfinished), 'nothing is halved'
  for out in (run('cpu'), run('cpu', segments=3, halvings=2), run('tpu', segments=2, halvings=1)):
    assert (out.responses == whole.responses).all() and (out.mask == whole.mask).all()
    assert (out.ended == whole.ended).all()
    close(out.logprobs, whole.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('samples', [1, 2])
def test_no_cache_is_copied_in_the_loop(samples):
  """Nor any weight: a token of a long response would cost a copy of all that was said before."""
  _, nets, params, _ = model('llama')
  run = jax.jit(
    lambda p, *x: sampling.generate(
      nets.decoder, p, *x, jax.random.key(0), max_tokens=24, stop_ids=(3,),
      samples_per_prompt=samples, segments=2, halvings=1,
    )
  )  # fmt: skip
  text = run.lower(params, *prompts(0, rows=5, length=13)).compile().as_text()
  parts = {part.split()[0].lstrip('%'): part for part in text.split('\n\n') if part.strip()}
  loops = re.findall(r'body=%?([\w.-]+).*op_name="[^"]*decode/while"', text)
  inside, rest = set(), list(loops)
  while rest:
    name = rest.pop()
    if name not in inside:
      inside.add(name)
      rest += re.findall(r'(?:calls|body|to_apply)=%?([\w.-]+)', parts[name])
  lines = '\n'.join(parts[name] for name in inside).splitlines()
  slots = '|'.join(map(str, (13, 16, 24)))
  cache = re.compile(rf'= f32\[\d+,2,({slots}),8\]\S* (copy|transpose|concatenate|pad|select)\(')
  matrix = re.compile(r'= f32\[(32|64|128|16|50),(32|64|128|16|50)\]\S* (copy|transpose)\(')
  assert len(loops) == 3 and any('dynamic-update-slice(' in line for line in lines)
  assert any(re.search(rf'= f32\[\d+,2,({slots}),8\]', line) for line in lines)
  assert not [line for line in lines if cache.search(line) or matrix.search(line)]


def test_what_cannot_be_divided_is_refused():
  _, nets, params, _ = model()
  run = lambda **how: sampling.generate(
    nets.decoder, params, *prompts(0, rows=6), jax.random.key(0), max_tokens=4, stop_ids=(), **how
  )
  with pytest.raises(ValueError, match='6 prompts do not divide into groups of 4'):
    run(prompts_at_once=4)
  with pytest.raises(ValueError, match='segments=0 must be 1 or more'):
    run(segments=0)
  with pytest.raises(ValueError, match='3 prompts do not divide over 2 devices'):
    run(prompts_at_once=3, shards=2, halvings=1)


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


@pytest.mark.parametrize('vocabulary', [100, 1000])
def test_the_least_number_draws_no_token_that_is_next_to_impossible(vocabulary):
  """The first of a block has a probability of e^-60 there, which no share may find."""
  logits = np.zeros((1, vocabulary), np.float32)
  logits[:, :: -(-vocabulary // sampling.BLOCKS)] = -60 if vocabulary > sampling.BLOCKS else 0
  logits[:, 0] = -60
  token, logprob = sampling.sample(None, jnp.asarray(logits), u=jnp.zeros((1, 1)))
  assert int(token[0]) == 1 and float(logprob[0]) > -10
