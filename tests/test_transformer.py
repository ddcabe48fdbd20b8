"""The transformer's invariants, for every family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.models import transformer
from tests.fakes import FAMILIES, VOCAB, close, config, model


def rows(seed, count=3, length=9):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, VOCAB, n) for n in rng.integers(2, length + 1, count)]


def padded(sequences, length, side):
  tokens, mask = np.zeros((len(sequences), length), np.int32), np.zeros((len(sequences), length), bool)
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
  logits, cache = nets.decoder.prefill(weights, prompts, mask, 12)
  steps = [logits]
  for t in range(5):
    logits, cache = nets.decoder.step(weights, jnp.asarray(new[:, t]), jnp.ones(4, bool), cache)
    steps.append(logits)
  full = nets.logits(params, jnp.concatenate([prompts, jnp.asarray(new, jnp.int32)], 1), jnp.pad(mask, ((0, 0), (0, 5)),
                                                                                               constant_values=True))
  close(jnp.stack(steps, 1), full[:, 6:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('chunk', [5, 8, 100])
def test_item_26_chunked_log_probabilities_are_the_same(chunk):
  cfg, nets, params, _ = model('llama')
  chunked = transformer.make_networks(config('llama', logits_chunk=chunk))
  tokens, mask = padded(rows(1), 9, 'left')
  mean = lambda nets: jax.value_and_grad(lambda p: nets.logprobs(p, tokens, mask)[0].mean())(params)
  jax.tree.map(functools.partial(close, rtol=1e-4, atol=1e-6), mean(chunked), mean(nets))


def test_item_26_no_more_logits_than_a_chunk():
  """The largest float32 array with a vocabulary axis has `chunk` tokens, two columns of four rows, forward and backward."""
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
  kernels = [np.asarray(transformer.init_head(cfg, jax.random.key(i))['kernel']).ravel() for i in range(8)]
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


def test_compiled_size_does_not_grow_with_depth():
  def lines(layers):
    cfg = config(num_layers=layers)
    nets = transformer.make_networks(cfg)
    params = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
    tokens = jnp.zeros((1, 4), jnp.int32)
    return len(str(jax.make_jaxpr(lambda p: nets.logits(p, tokens, tokens == 0))(params)).splitlines())

  assert lines(2) == lines(16)


@pytest.mark.parametrize('changes,words', [
    (dict(d_model=30), 'num_heads'), (dict(num_kv_heads=3), 'num_kv_heads'), (dict(norm='batch'), 'norm'),
    (dict(head_dim=7, positions='rotary'), 'even'), (dict(positions='alibi'), 'positions')])
def test_a_wrong_declaration_is_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    config(**changes)


def test_too_long_a_text_is_refused():
  _, nets, params, _ = model()
  with pytest.raises(ValueError, match='max_length=40'):
    nets.logits(params, jnp.zeros((1, 41), jnp.int32), jnp.ones((1, 41), bool))
