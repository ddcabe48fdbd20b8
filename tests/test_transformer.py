"""The transformer's invariants, for every family."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.models import attention, cached, layers, transformer
from alignjax.models.config import ranges_without
from tests.fakes import (
  FAMILIES,
  VOCAB,
  assert_float32_logits,
  assert_not_rounded,
  close,
  config,
  model,
)


def rows(seed, count=3, length=9):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, VOCAB, n) for n in rng.integers(2, length + 1, count)]


def padded(sequences, length, side):
  tokens, mask = (
    np.zeros((len(sequences), length), np.int32),
    np.zeros((len(sequences), length), bool),
  )
  for i, s in enumerate(sequences):
    where = slice(length - len(s), None) if side == 'left' else slice(0, len(s))
    tokens[i, where], mask[i, where] = s, True
  return jnp.asarray(tokens), jnp.asarray(mask)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('seed', [0, 1])
def test_item_5_padding_changes_nothing(family, seed):
  _, nets, params, _ = model(family)
  sequences = rows(seed)
  for side in ('left', 'right'):
    tokens, mask = padded(sequences, 12, side)
    out = np.asarray(nets.logits(params, tokens, mask))
    for i, s in enumerate(sequences):
      alone = nets.logits(params, jnp.asarray(s)[None], jnp.ones((1, len(s)), bool))[0]
      close(out[i][np.asarray(mask[i])], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
def test_item_25_decode_equals_the_full_forward(family):
  _, nets, params, _ = model(family)
  sequences, new = rows(3, count=4, length=6), np.random.default_rng(4).integers(0, VOCAB, (4, 5))
  prompts, mask = padded(sequences, 7, 'left')
  weights = nets.decoder.prepare(params)
  logits, cache = nets.decoder.prefill(weights, prompts, mask)
  cache = cache.with_slots(5)
  steps = [logits]
  for t in range(5):
    logits, cache = nets.decoder.step(weights, jnp.asarray(new[:, t]), cache)
    steps.append(logits)
  full = nets.logits(
    params,
    jnp.concatenate([prompts, jnp.asarray(new, jnp.int32)], 1),
    jnp.pad(mask, ((0, 0), (0, 5)), constant_values=True),
  )
  close(jnp.stack(steps, 1), full[:, 6:], rtol=1e-4, atol=1e-4)


def test_logits_at_some_positions_are_those_of_all():
  _, nets, params, _ = model('llama')
  tokens, mask = padded(rows(5), 9, 'right')
  positions = jnp.array([[0, 3], [1, 1], [2, 0]])
  full = nets.logits(params, tokens, mask)
  some = nets.logits(params, tokens, mask, positions=positions)
  close(some, full[jnp.arange(3)[:, None], positions], rtol=1e-6, atol=1e-6)


def test_a_vector_is_quantized_to_half_a_step():
  """The scale is the largest feature over 127; a vector of zeros stays one."""
  x = np.random.default_rng(0).normal(size=(5, 4, 16)).astype(np.float32)
  x[1, 2] = 0
  values, scales = cached.quantize(jnp.asarray(x))
  assert values.dtype == jnp.int8 and scales.dtype == jnp.float32
  close(scales, np.abs(x).max(-1) / 127, rtol=1e-6)
  assert (np.abs(values * scales[..., None] - x).max(-1) <= scales / 2 * (1 + 1e-5)).all()
  assert (np.abs(values).max(-1) == np.where(np.abs(x).max(-1) > 0, 127, 0)).all()


def test_attention_to_an_int8_cache_by_a_loop():
  """Two prompts with two samples each, two query heads on each of two key heads, the third of four
  slots: a softmax in float64 over the vectors that the cache holds, the new ones among them."""
  rng = np.random.default_rng(1)
  vectors = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  prompt = tuple(cached.quantize(vectors(2, 2, 3, 8)) for _ in 'kv')
  response = tuple(cached.quantize(vectors(4, 2, 4, 8)) for _ in 'kv')
  q, k, v = vectors(4, 1, 2, 2, 8), vectors(4, 2, 1, 8), vectors(4, 2, 1, 8)
  mask = jnp.array([[False, True, True], [True, True, True]])
  heads, kept = cached.attend(
    q, k, v, prompt, response, mask, jnp.int32(2), constrain=layers.unconstrained
  )
  whole = lambda x: np.asarray(x.values, np.float64) * np.asarray(x.scales, np.float64)[..., None]
  for x, old, new in zip(kept, response, (k, v), strict=True):
    expected = whole(old)
    expected[:, :, 2] = whole(cached.quantize(new))[:, :, 0]
    close(whole(x), expected, rtol=1e-6)
  for row, group, head in np.ndindex(4, 2, 2):
    seen = [
      np.concatenate(
        [whole(p)[row // 2, group][np.asarray(mask[row // 2])], whole(r)[row, group, :3]]
      )
      for p, r in zip(prompt, kept, strict=True)
    ]
    weights = np.exp(seen[0] @ np.asarray(q[row, 0, group, head], np.float64) / 8**0.5)
    close(heads[row, 0, group, head], weights @ seen[1] / weights.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('family', FAMILIES)
def test_an_int8_cache_moves_the_logits_a_little(family):
  _, plain, params, _ = model(family)
  nets = transformer.make_networks(config(family, kv_cache='int8'))
  prompts, mask = padded(rows(3, count=4, length=6), 7, 'left')

  def decode(nets):
    weights = nets.decoder.prepare(params)
    logits, cache = nets.decoder.prefill(weights, prompts, mask)
    cache, out = cache.with_slots(5), [logits]
    for t in range(5):
      logits, cache = nets.decoder.step(weights, jnp.arange(4) + t, cache)
      out.append(logits)
    return np.stack(out), {
      leaf.dtype.name for leaf in jax.tree.leaves((cache.prompt, cache.response))
    }

  (found, dtypes), (expected, _) = decode(nets), decode(plain)
  assert dtypes == {'int8', 'float32'}
  assert (found[0] == expected[0]).all()  # The prefill reads no cache.
  assert 0 < np.abs(found - expected).max() < 0.1


@pytest.mark.parametrize('chunk', [5, 8, 100])
def test_item_26_chunked_log_probabilities_are_the_same(chunk):
  cfg, nets, params, _ = model('llama')
  chunked = transformer.make_networks(config('llama', logits_chunk=chunk))
  tokens, mask = padded(rows(1), 9, 'left')
  mean = lambda nets: jax.value_and_grad(lambda p: nets.logprobs(p, tokens, mask)[0].mean())(params)
  jax.tree.map(functools.partial(close, rtol=1e-4, atol=1e-6), mean(chunked), mean(nets))


def test_item_26_no_more_logits_than_a_chunk():
  """The largest float32 array with a vocabulary axis has `chunk` tokens, two columns of four rows,
  forward and backward."""
  vocab, chunk = 1000, 8
  cfg = config('gpt2', vocab_size=vocab, logits_chunk=chunk)
  nets = transformer.make_networks(cfg)
  params = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
  tokens, mask = jnp.zeros((4, 33), jnp.int32), jnp.ones((4, 33), bool)
  text = str(jax.make_jaxpr(jax.grad(lambda p: nets.logprobs(p, tokens, mask)[0].sum()))(params))
  assert f'f32[4,2,{vocab}]' in text
  assert all(f'f32[{shape},{vocab}]' not in text for shape in ('128', '4,32', '16,4,2'))


@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_remat_changes_memory_only(remat):
  _, nets, params, _ = model()
  other = transformer.make_networks(config(remat=remat))
  tokens, mask = padded(rows(2), 9, 'right')
  grad = lambda nets: jax.jit(jax.grad(lambda p: nets.logprobs(p, tokens, mask)[0].sum()))(params)
  jax.tree.map(functools.partial(close, rtol=1e-4, atol=1e-5), grad(other), grad(nets))


def test_logprobs_are_those_of_the_next_token():
  _, nets, params, _ = model()
  tokens = jnp.array([[3, 4, 5]])
  logits = np.asarray(nets.logits(params, tokens, jnp.ones((1, 3), bool)), np.float64)[0]
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  logprobs, entropy = nets.logprobs(params, tokens, jnp.ones((1, 3), bool))
  close(logprobs[0], [0, np.log(p[0, 4]), np.log(p[1, 5])], rtol=1e-4)
  close(entropy[0], [0, *-(p[:2] * np.log(p[:2])).sum(-1)], rtol=1e-4)
  tempered, _ = nets.logprobs(params, tokens, jnp.ones((1, 3), bool), temperature=2.0)
  half = np.exp(logits / 2) / np.exp(logits / 2).sum(-1, keepdims=True)
  close(tempered[0, 1:], np.log([half[0, 4], half[1, 5]]), rtol=1e-4)


def test_the_scalar_head_starts_at_one_over_d_plus_one():
  cfg = config(d_model=512)
  kernels = [
    np.asarray(transformer.init_head(cfg, jax.random.key(i))['kernel']).ravel() for i in range(8)
  ]
  variance = np.concatenate(kernels).var()
  assert abs(variance * 513 - 1) < 4 * np.sqrt(2 / (8 * 512))
  assert (transformer.init_head(cfg, jax.random.key(0))['bias'] == 0).all()


def test_dropout_needs_a_key():
  _, _, params, _ = model()
  nets = transformer.make_networks(config(dropout=0.5))
  tokens, mask = padded(rows(0), 9, 'right')
  run = lambda key: np.asarray(nets.logits(params, tokens, mask, key=key))
  assert (run(None) == run(None)).all()
  assert (run(jax.random.key(0)) != run(None)).any()
  assert (run(jax.random.key(0)) != run(jax.random.key(1))).any()
  assert (run(jax.random.key(1)) == run(jax.random.key(1))).all()


def test_bfloat16_activations_give_float32_log_probabilities_near_the_exact_ones():
  _, nets, params, scalar = model()
  half = transformer.make_networks(config(dtype='bfloat16'))
  tokens, mask = padded(rows(0), 9, 'right')
  a, b = half.logprobs(params, tokens, mask)[0], nets.logprobs(params, tokens, mask)[0]
  assert a.dtype == jnp.float32 and half.scalar(scalar, tokens, mask).dtype == jnp.float32
  assert 1e-5 < float(jnp.abs(jnp.where(mask, a - b, 0)).max()) < 0.3


def bfloat16_model(seed=0, **changes):
  """Untied, logits of a spread of 8 as those of real models: (config, networks, parameters, and a
  little changed ones)."""
  cfg = config('llama', d_model=64, vocab_size=64, embedding_std=1.0, dtype='bfloat16', **changes)
  params = jax.jit(lambda: transformer.init(cfg, jax.random.key(seed)))()
  rng = np.random.default_rng(seed)
  params['final']['head']['kernel'] *= 8
  moved = jax.tree.map(lambda p: p * (1 + 0.003 * rng.standard_normal(p.shape, np.float32)), params)
  return cfg, transformer.make_networks(cfg), params, moved


def test_bfloat16_logits_of_untied_embeddings_come_out_in_float32():
  """The same numbers as with tied ones, bit for bit, from the same table; next to none of them is a
  bfloat16."""
  cfg, nets, params, _ = bfloat16_model()
  tied = transformer.make_networks(dataclasses.replace(cfg, tie_embeddings=True))
  params['final']['head']['kernel'] = params['embed']['tokens'].T
  tokens, mask = padded(rows(0, length=20), 20, 'left')
  logits = nets.logits(params, tokens, mask)
  same = {**params, 'final': {'norm': params['final']['norm']}}
  np.testing.assert_array_equal(logits, tied.logits(same, tokens, mask))
  assert_float32_logits(nets, params, tokens, mask)

  @jax.jit
  def decode(params):
    weights = nets.decoder.prepare(params)
    logits, cache = nets.decoder.prefill(weights, tokens, mask)
    return logits, nets.decoder.step(weights, tokens[:, 0], cache.with_slots(4))[0]

  for logits in decode(params):
    assert_not_rounded(logits)


@pytest.mark.parametrize('chunk', [None, 16])
def test_log_ratios_in_bfloat16_are_those_of_the_float64_product(chunk):
  """What a small update does to a token's log-probability, given what the layers say (the logits of
  an identity for a head)."""
  cfg, nets, before, after = bfloat16_model(logits_chunk=chunk)
  tokens, mask = padded(rows(1, count=4, length=20), 20, 'left')

  def exact(params):
    with_identity = {**params, 'final': {**params['final'], 'head': {'kernel': jnp.eye(64)}}}
    kernel = np.asarray(params['final']['head']['kernel'].astype(jnp.bfloat16), np.float64)
    logits = np.asarray(nets.logits(with_identity, tokens, mask), np.float64) @ kernel
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logprobs[:, :-1], np.asarray(tokens)[:, 1:, None], -1)[..., 0]

  live = np.asarray(mask)[:, :-1] & np.asarray(mask)[:, 1:]
  true = (exact(after) - exact(before))[live]
  ours = (nets.logprobs(after, tokens, mask)[0] - nets.logprobs(before, tokens, mask)[0])[:, 1:]
  assert true.std() > 0.05
  assert np.abs(np.asarray(ours)[live] - true).max() < 1e-4


def test_a_scalar_head_reads_a_norm_in_float32():
  """Two rows of hidden numbers that differ by less than a bfloat16 does: their scores differ as in
  float64."""
  cfg = config('llama', d_model=8, num_heads=1, num_kv_heads=1, dtype='bfloat16')
  params = jax.jit(lambda: transformer.init(cfg, jax.random.key(0), 'scalar'))()['final']
  x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (1, 5, 8)), jnp.bfloat16)
  exact = np.asarray(x, np.float64)
  exact = (
    exact
    / np.sqrt((exact**2).mean(-1, keepdims=True) + cfg.norm_eps)
    @ np.asarray(params['score']['kernel'], np.float64)
  )
  close(layers.Final(cfg, 'scalar').apply({'params': params}, x), exact[..., 0], rtol=1e-5)


def test_decoding_keeps_what_scoring_computes_in_float32():
  """Norm scales and scores stay float32 in the weights that sampling uses; every other weight is
  cast once."""
  _, nets, params, _ = bfloat16_model()
  weights = jax.eval_shape(nets.decoder.prepare, params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
    assert leaf.dtype == (jnp.float32 if 'norm' in str(path) else jnp.bfloat16), path


def test_attention_by_a_float64_loop(heads=2):
  """Weights of the visible columns only; a query with nothing to see gets 0, and no gradient is
  NaN."""
  rng = np.random.default_rng(heads)
  q = jnp.asarray(rng.normal(0, 1, (1, 4, 1, heads, 6)), jnp.float32)
  k, v = (jnp.asarray(rng.normal(0, 1, (1, 1, 5, 6)), jnp.float32) for _ in range(2))
  visible = np.array([[[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1]]], bool)
  expected = np.zeros((1, 4, 1, heads, 6))
  for t in range(4):
    for n in range(heads):
      seen = np.flatnonzero(visible[0, t])
      logits = [
        np.asarray(q[0, t, 0, n], np.float64) @ np.asarray(k[0, 0, s], np.float64) / np.sqrt(6)
        for s in seen
      ]
      for weight, s in zip(np.exp(logits) / np.exp(logits).sum(), seen, strict=True):
        expected[0, t, 0, n] += weight * np.asarray(v[0, 0, s], np.float64)
  out, back = jax.vjp(jax.jit(lambda *x: attention.product(*x, jnp.asarray(visible))), q, k, v)
  close(out, expected, rtol=1e-5)
  assert (np.asarray(out[0, 0]) == 0).all()
  assert all(np.isfinite(g).all() for g in back(jnp.ones_like(out)))
  assert (np.asarray(back(jnp.ones_like(out))[0][0, 0]) == 0).all()


@pytest.mark.parametrize('family,chunk', [('gpt2', None), ('llama', 5)])
def test_an_empty_prompt_does_not_see_what_follows(family, chunk):
  """A row of pads alone, then three tokens: the first one's log-probability knows none of them, and
  decoding agrees."""
  _, _, params, _ = model(family)
  nets = transformer.make_networks(config(family, attention_chunk=chunk))
  prompts = jnp.array([[0, 0, 0], [0, 7, 8]])
  mask = jnp.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]], bool)
  row = lambda *ids: jnp.concatenate([prompts, jnp.array([ids] * 2)], 1)

  @jax.jit
  def run(params):
    score = lambda tokens, mask: nets.logprobs(params, tokens, mask)[0]
    weights = nets.decoder.prepare(params)
    first, cache = nets.decoder.prefill(weights, prompts, mask[:, :3])
    second, _ = nets.decoder.step(weights, jnp.array([3, 3]), cache.with_slots(3))
    grads = jax.grad(lambda p: nets.logprobs(p, row(3, 4, 5), mask)[0].sum())(params)
    return (
      score(row(3, 4, 5), mask),
      score(row(3, 9, 1), mask),
      score(row(3, 4, 5), mask.astype(jnp.int32)),
      jax.nn.log_softmax(first),
      jax.nn.log_softmax(second),
      grads,
    )

  one, other, packed, first, second, grads = run(params)
  assert (one[:, 3] == other[:, 3]).all() and (one[:, 4] != other[:, 4]).all()
  close(first[:, 3], one[:, 3], rtol=1e-4, atol=1e-5)
  close(second[:, 4], one[:, 4], rtol=1e-4, atol=1e-5)
  close(packed[:, 3:], one[:, 3:], rtol=1e-4, atol=1e-5)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('family', ['gpt2', 'llama'])
def test_ids_without_a_token_have_no_probability(family):
  """Holes and a padded end of the vocabulary: log-probabilities are as if it held the other ids
  alone; the logits stay."""
  _, plain, params, _ = model(family)
  nets = transformer.make_networks(config(family, unused_ids=((10, 12), (45, 50))))
  known = np.delete(np.arange(VOCAB), [10, 11, 45, 46, 47, 48, 49])
  tokens, mask = padded([known[[3, 20, 1, 40, 8]], known[[5, 6]]], 6, 'left')

  @jax.jit
  def run(params):
    grads = jax.grad(lambda p: sum(x.sum() for x in nets.logprobs(p, tokens, mask)))(params)
    weights = nets.decoder.prepare(params)
    decoded, cache = nets.decoder.prefill(weights, tokens, mask)
    after, _ = nets.decoder.step(weights, tokens[:, 0], cache.with_slots(1))
    return (
      nets.logits(params, tokens, mask),
      plain.logits(params, tokens, mask),
      nets.logprobs(params, tokens, mask),
      grads,
      decoded,
      after,
    )

  logits, without, (logprobs, entropy), grads, decoded, after = jax.tree.map(
    np.asarray, run(params)
  )
  np.testing.assert_array_equal(logits, without)
  close(decoded[:, known], without[:, -1, known], rtol=1e-4, atol=1e-4)
  for out in (decoded, after):
    assert (np.delete(out, known, -1) == attention.MASKED_LOGIT).all() and (
      out[:, known] > -1e3
    ).all()
  exact = np.exp(without[..., known].astype(np.float64))
  exact /= exact.sum(-1, keepdims=True)
  place = np.searchsorted(known, np.asarray(tokens))
  close(
    logprobs[:, 1:],
    np.log(np.take_along_axis(exact[:, :-1], place[:, 1:, None], -1)[..., 0]),
    rtol=1e-4,
    atol=1e-5,
  )
  close(entropy[:, 1:], -(exact * np.log(exact)).sum(-1)[:, :-1], rtol=1e-4)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  head = grads['embed']['tokens'] if family == 'gpt2' else grads['final']['head']['kernel'].T
  assert (np.asarray(head)[[10, 11, 45, 49]] == 0).all() and (np.asarray(head)[known] != 0).any(
    1
  ).all()


def test_ranges_of_ids_without_a_token():
  assert ranges_without([0, 1, 4], 8) == ((2, 4), (5, 8))
  assert ranges_without(range(8), 8) == () and ranges_without([1, 2, 9], 3) == ((0, 1),)


def test_compiled_size_does_not_grow_with_depth():
  def lines(layers):
    cfg = config(num_layers=layers)
    nets = transformer.make_networks(cfg)
    params = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
    tokens = jnp.zeros((1, 4), jnp.int32)
    return len(
      str(jax.make_jaxpr(lambda p: nets.logits(p, tokens, tokens == 0))(params)).splitlines()
    )

  assert lines(2) == lines(16)


@pytest.mark.parametrize(
  'changes,words',
  [
    (dict(d_model=30), 'num_heads'),
    (dict(num_kv_heads=3), 'num_kv_heads'),
    (dict(norm='batch'), 'norm'),
    (dict(head_dim=7, positions='rotary'), 'even'),
    (dict(positions='alibi'), 'positions'),
    (dict(window=0), 'model.window=0'),
    (dict(window_rope_theta=5.0), 'window_rope_theta=5.0 needs a model.window'),
    (dict(windowed_layers=(True, False)), 'windowed_layers=.* needs a model.window'),
    (dict(window=3, windowed_layers=(True,)), 'has 1 entries for model.num_layers=2'),
    (dict(attention_cap=-1.0), 'model.attention_cap=-1.0 is not a number above 0'),
    (dict(norms='around'), 'norms'),
    (dict(qk_norm='some'), 'qk_norm'),
  ],
)
def test_a_wrong_declaration_is_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    config(**changes)


def test_the_declaration_of_one_kind_of_layer():
  """A layer without the window sees nothing of it. One with it has its own rotary base, which is
  not stretched, where there is one."""
  cfg = config('gemma', rope_scaling=('linear', 4.0), rope_theta=100.0)
  inside, outside = cfg.of_layers(True), cfg.of_layers(False)
  assert (inside.window, inside.rope_theta, inside.rope_scaling) == (4, 20.0, None)
  assert (outside.window, outside.rope_theta, outside.rope_scaling) == (
    None,
    100.0,
    ('linear', 4.0),
  )
  assert inside.windowed == (True, True) and outside.windowed == (False, False)
  stretched = config(
    positions='rotary', window=4, windowed_layers=(False, True), rope_scaling=('linear', 4.0)
  )
  assert stretched.of_layers(True).rope_scaling == ('linear', 4.0)
  assert stretched.windowed == (False, True)


def test_too_long_a_text_is_refused():
  _, nets, params, _ = model()
  with pytest.raises(ValueError, match='max_length=40'):
    nets.logits(params, jnp.zeros((1, 41), jnp.int32), jnp.ones((1, 41), bool))
