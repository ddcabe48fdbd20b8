"""Tiny models and batches with known properties, and the additivity check that a fork can use on
its own loss."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from alignjax import ops, steps
from alignjax.models import transformer
from alignjax.types import ComparisonBatch, PPOBatch, Rollout, TokenBatch

VOCAB = 50
FAMILIES = {
  'gpt2': dict(positions='learned'),
  'llama': dict(
    norm='rmsnorm',
    mlp='swiglu',
    num_kv_heads=2,
    qkv_bias=False,
    out_bias=False,
    tie_embeddings=False,
  ),
  # The window is shorter than the prompts, and one layer has it.
  'gemma': dict(
    norm='rmsnorm1p',
    norms='both',
    mlp='geglu',
    num_kv_heads=2,
    qkv_bias=False,
    out_bias=False,
    window=4,
    windowed_layers=(True, False),
    window_rope_theta=20.0,
    query_scale=0.3,
    attention_cap=3.0,
    logits_cap=6.0,
    qk_norm='all',
    embedding_scale=2.0,
  ),
  'neox': dict(rotary_fraction=0.5, parallel_residual=True, mlp='gelu_exact', tie_embeddings=False),
}


def config(family: str = 'gpt2', **changes) -> transformer.TransformerConfig:
  sizes = dict(
    vocab_size=VOCAB, num_layers=2, d_model=32, num_heads=4, max_length=40, embedding_std=0.3
  )
  return transformer.TransformerConfig(**(sizes | FAMILIES[family] | changes))


@functools.cache
def model(family: str = 'gpt2', seed: int = 0):
  """(config, networks, policy params, scalar-head params), biases and scales not at their initial
  values."""
  cfg = config(family)
  params = jax.jit(lambda: transformer.init(cfg, jax.random.key(seed)))()
  keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
  params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)
  scalar = transformer.with_scalar_head(cfg, params, jax.random.key(seed + 2))
  return cfg, transformer.make_networks(cfg), params, scalar


def prompts(seed: int, rows: int = 8, length: int = 6) -> tuple[jax.Array, jax.Array]:
  """Left-padded prompts of 1..length tokens."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, length + 1, rows)
  mask = np.arange(length) >= length - lengths[:, None]
  return jnp.asarray(rng.integers(0, VOCAB, (rows, length)), jnp.int32), jnp.asarray(mask)


def token_batch(seed: int, rows: int = 4, length: int = 7) -> TokenBatch:
  rng = np.random.default_rng(seed)
  mask = np.arange(length) < rng.integers(2, length + 1, rows)[:, None]
  weights = rng.uniform(0.1, 1, mask.shape) * mask
  weights[:, 0] = 0
  return TokenBatch(
    jnp.asarray(rng.integers(0, VOCAB, mask.shape), jnp.int32),
    jnp.asarray(mask),
    jnp.asarray(weights, jnp.float32),
  )


def comparison_batch(seed: int, rows: int = 4, k: int = 9, length: int = 7) -> ComparisonBatch:
  """K from 2 to 9 in one batch, with ties."""
  rng = np.random.default_rng(seed)
  mask = np.arange(length) < rng.integers(2, length + 1, (rows, k))[..., None]
  ranks = np.full((rows, k), -1, np.int32)
  for row, size in enumerate(np.linspace(2, k, rows).astype(int)):
    ranks[row, :size] = rng.integers(0, size, size)
    ranks[row, :2] = [1, 0]  # at least one pair
  return ComparisonBatch(
    jnp.asarray(rng.integers(0, VOCAB, mask.shape), jnp.int32),
    jnp.asarray(mask),
    jnp.asarray(ranks),
    jnp.ones(rows, jnp.float32),
  )


def ppo_batch(seed: int, rows: int = 4, q: int = 5, r: int = 6, ptx_rows: int = 4) -> PPOBatch:
  """A made-up rollout of ragged responses, near the model's own log-probabilities."""
  _, nets, params, scalar = model()
  rng = np.random.default_rng(seed)
  prompt, prompt_mask = prompts(seed, rows, q)
  mask = jnp.asarray(np.arange(r) < rng.integers(1, r + 1, rows)[:, None])
  responses = jnp.asarray(rng.integers(0, VOCAB, (rows, r)), jnp.int32)
  tokens, live = jnp.concatenate([prompt, responses], 1), jnp.concatenate([prompt_mask, mask], 1)
  noise = lambda scale: jnp.asarray(rng.normal(0, scale, (rows, r)), jnp.float32)
  logprobs = jnp.where(mask, nets.logprobs(params, tokens, live)[0][:, q:] + noise(0.3), 0.0)
  values = jnp.where(mask, nets.scalar(scalar, tokens, live)[:, q - 1 : -1] + noise(0.3), 0.0)
  scores = jnp.asarray(rng.normal(0, 1, rows), jnp.float32)
  rollout = Rollout(
    prompt,
    prompt_mask,
    responses,
    mask,
    logprobs,
    logprobs + jnp.where(mask, noise(0.2), 0.0),
    values,
    scores,
  )
  rewards = ops.token_rewards(scores, logprobs, rollout.ref_logprobs, mask, 0.1)
  advantages, returns = ops.gae(rewards, values, mask)
  return PPOBatch(
    rollout,
    ops.whiten(advantages, mask),
    returns,
    mask.astype(jnp.float32),
    token_batch(seed + 1, ptx_rows) if ptx_rows else None,
  )


def assert_additive(loss_fn, params, batch, nets, parts: int = 2, rtol: float = 1e-4) -> None:
  """Gradients and metrics of `parts` microbatches equal those of the whole (docs/pitfalls.md, 10).
  For a fork's loss too."""
  whole = jax.jit(lambda p: steps.gradients(loss_fn, p, batch, None, nets=nets))(params)
  cut = jax.jit(lambda p: steps.gradients(loss_fn, p, batch, None, nets=nets, microbatches=parts))(
    params
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), whole, cut)


def assert_float32_logits(nets, params, tokens, mask) -> None:
  """The logits are float32 and were never rounded to bfloat16; for a fork's networks too."""
  logits = nets.logits(params, tokens, mask)
  assert logits.dtype == jnp.float32
  assert_not_rounded(logits)


def assert_not_rounded(x) -> None:
  """Few of many float32 numbers are bfloat16 numbers by chance: about one in 2^16."""
  assert np.mean(np.asarray(x == x.astype(jnp.bfloat16).astype(jnp.float32))) < 0.01


def close(a, b, **tolerance) -> None:
  np.testing.assert_allclose(
    np.asarray(a), np.asarray(b), **({'rtol': 1e-5, 'atol': 1e-6} | tolerance)
  )
