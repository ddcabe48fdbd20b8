"""The layers of the transformer as flax.linen modules: embedding, attention, MLP, block and heads.

Every module reads its sizes from a TransformerConfig. `constrain` pins the sharding of an
activation inside a module (sharding.Sharder.constrain); by default the compiler chooses it.
`multiply` computes the products of the dense layers, with the arguments of jax.lax.dot_general. The
functions over these modules are in models/transformer.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from alignjax.models import cached, rotary
from alignjax.models.attention import Attend, reference
from alignjax.models.config import TransformerConfig
from alignjax.models.products import to_float32


class RMSNorm1p(nn.Module):
  """An RMSNorm that multiplies by 1 + scale, in float32 (google-deepmind/gemma,
  gm/nn/_layers.py: RMSNorm). flax has none."""

  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.zeros, x.shape[-1:])
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.epsilon)
    return (x * (1 + scale).reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


def _norm(cfg: TransformerConfig, name: str, dtype: Any = None) -> nn.Module:
  dtype = dtype or cfg.dtype
  if cfg.norm == 'rmsnorm':
    return nn.RMSNorm(epsilon=cfg.norm_eps, dtype=dtype, name=name)
  if cfg.norm == 'rmsnorm1p':
    return RMSNorm1p(epsilon=cfg.norm_eps, dtype=dtype, name=name)
  return nn.LayerNorm(epsilon=cfg.norm_eps, dtype=dtype, use_fast_variance=False, name=name)


def unconstrained(x, *axes):
  """Leaves the sharding of an activation to the compiler: the default of `constrain`."""
  del axes
  return x


class Attention(nn.Module):
  """Causal attention with grouped heads, over whole rows or, with a cache, of one new token."""

  cfg: TransformerConfig
  constrain: Callable = unconstrained
  attend: Attend = reference
  multiply: Callable = jax.lax.dot_general

  @nn.compact
  def __call__(self, x, angles, mask, cache=None, index=None):
    """Attends.

    Args:
      x: [B,T,D], the normalised residual stream.
      angles: rotary angles of the T positions (rotary.angles).
      mask: bool or i32 [B,T], the mask of the rows; with a cache that of the prompts, bool[B/n,Q].
      cache: None, or the (k, v) of prompts and of responses in this layer (types.KVCache).
      index: i32[], the slot of the response that the new keys and values are written to.

    Returns:
      (output [B,T,D], (k, v) of the row, or with a cache of the response, each [B,G,S,H]).
    """
    cfg = self.cfg
    b, t = x.shape[:2]

    def project(heads, name):
      # The kernel is [D, heads * H]: a TPU keeps copies of [D, heads, H] in its loops.
      width = heads * cfg.head_width
      dense = nn.Dense(
        width, use_bias=cfg.qkv_bias, dtype=cfg.dtype, dot_general=self.multiply, name=name
      )
      return dense(x).reshape(b, t, heads, -1)

    def normalize_heads(heads, name):
      if cfg.qk_norm == 'all':
        return _norm(cfg, name)(heads.reshape(b, t, -1)).reshape(heads.shape)
      return _norm(cfg, name)(heads) if cfg.qk_norm else heads

    q = rotary.rotate(normalize_heads(project(cfg.num_heads, 'query'), 'query_norm'), angles)
    k = rotary.rotate(normalize_heads(project(cfg.kv_heads, 'key'), 'key_norm'), angles)
    v = project(cfg.kv_heads, 'value')
    q = self.constrain(q, 'batch', 'tokens', 'heads', None)
    k, v = (self.constrain(y, 'batch', 'tokens', 'kv_heads', None) for y in (k, v))
    if cache is None:
      q, k, v = (checkpoint_name(y, n) for y, n in ((q, 'query'), (k, 'key'), (v, 'value')))
      heads = self.attend(q, k, v, mask)
      k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    else:
      grouped = q.reshape(b, t, cfg.kv_heads, -1, cfg.head_width)  # [B,T,G,N/G,H]
      k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
      heads, (k, v) = cached.attend(
        grouped,
        k,
        v,
        *cache,
        mask,
        index,
        constrain=self.constrain,
        window=cfg.window,
        scale=cfg.query_scale,
        cap=cfg.attention_cap,
      )
    heads = self.constrain(
      heads.reshape(b, t, cfg.num_heads, cfg.head_width), 'batch', 'tokens', 'heads', None
    )
    out = nn.DenseGeneral(
      cfg.d_model,
      axis=(-2, -1),
      use_bias=cfg.out_bias,
      dtype=cfg.dtype,
      kernel_init=_residual_init(cfg),
      dot_general=self.multiply,
      name='out',
    )(heads)
    return checkpoint_name(out, 'out'), (k, v)


GATES = {'swiglu': jax.nn.silu, 'geglu': functools.partial(jax.nn.gelu, approximate=True)}


class MLP(nn.Module):
  """The feed-forward part of a layer: two projections with a GELU, or three with a gate."""

  cfg: TransformerConfig
  constrain: Callable = unconstrained
  multiply: Callable = jax.lax.dot_general

  @nn.compact
  def __call__(self, x):
    cfg = self.cfg
    dense = functools.partial(
      nn.Dense, use_bias=cfg.out_bias, dtype=cfg.dtype, dot_general=self.multiply
    )
    hidden = self.constrain(dense(cfg.mlp_width, name='up')(x), 'batch', 'tokens', 'mlp')
    hidden = checkpoint_name(hidden, 'up')
    if cfg.mlp in GATES:
      gate = checkpoint_name(dense(cfg.mlp_width, name='gate')(x), 'gate')
      hidden = GATES[cfg.mlp](gate) * hidden
    else:
      hidden = jax.nn.gelu(hidden, approximate=cfg.mlp == 'gelu')
    return dense(cfg.d_model, name='down', kernel_init=_residual_init(cfg))(hidden)


class Block(nn.Module):
  """One layer: attention and MLP on the residual stream, in sequence or in parallel."""

  cfg: TransformerConfig
  constrain: Callable = unconstrained
  attend: Attend = reference
  multiply: Callable = jax.lax.dot_general

  @nn.compact
  def __call__(self, x, angles, mask, cache=None, index=None, dropout=False):
    cfg = self.cfg
    attention = Attention(cfg, self.constrain, self.attend, self.multiply, name='attention')
    mlp = MLP(cfg, self.constrain, self.multiply, name='mlp')

    def before(part, x):
      x = x if cfg.norms == 'after' else _norm(cfg, f'norm_{part}')(x)
      # What divides the residual stream alone ('sequence') is gathered here.
      return self.constrain(x, 'batch', 'tokens', None)

    def after(part, y):
      y = self.constrain(y, 'batch', 'sequence', None)
      y = y if cfg.norms == 'before' else _norm(cfg, f'post_norm_{part}')(y)
      return nn.Dropout(cfg.dropout, deterministic=not dropout)(y)

    attended, cache = attention(before(1, x), angles, mask, cache, index)
    if cfg.parallel_residual:
      return x + after(1, attended) + after(2, mlp(before(2, x))), cache
    x = x + after(1, attended)
    return x + after(2, mlp(before(2, x))), cache


class Embed(nn.Module):
  """Token embeddings, and position embeddings where the config has learned positions."""

  cfg: TransformerConfig

  @nn.compact
  def __call__(self, tokens, positions):
    cfg = self.cfg
    init = nn.initializers.normal(cfg.embedding_std)
    table = self.param('tokens', init, (cfg.vocab_size, cfg.d_model))
    x = table.astype(cfg.dtype)[tokens]
    if cfg.embedding_scale != 1.0:
      x = x * jnp.asarray(cfg.embedding_scale, x.dtype)
    if cfg.positions == 'learned':
      table = self.param('positions', init, (cfg.max_length, cfg.d_model))
      x = x + table.astype(cfg.dtype)[positions]
    return x


class Final(nn.Module):
  """The last norm and, for a scalar head or untied embeddings, the projection to float32.

  The kernel of the scalar head starts at N(0, 1/(D+1)) and its bias at 0, as in
  openai/summarize-from-feedback, query_response_model.py. The scalar head and its norm are computed
  in float32 throughout, also on accelerators, whose default precision of float32 products is lower.

  Attributes:
    head: 'lm' or 'scalar'.
  """

  cfg: TransformerConfig
  head: str

  @nn.compact
  def __call__(self, x):
    cfg = self.cfg
    x = _norm(cfg, 'norm', jnp.float32 if self.head == 'scalar' else None)(x)
    if self.head == 'scalar':
      init = nn.initializers.normal((cfg.d_model + 1) ** -0.5)
      score = nn.Dense(1, dtype=jnp.float32, precision='highest', kernel_init=init, name='score')
      return score(x)[..., 0]
    if cfg.tie_embeddings:
      return x
    head = nn.Dense(
      cfg.vocab_size, use_bias=False, dtype=cfg.dtype, dot_general=to_float32, name='head'
    )
    return head(x)


def _residual_init(cfg: TransformerConfig) -> Callable:
  """Initial projections back into the residual stream, smaller by sqrt(2L) as in GPT-2."""
  return nn.initializers.variance_scaling(1 / (2 * cfg.num_layers), 'fan_in', 'normal')
