"""One decoder-only transformer for all families, as pure functions over flax.linen modules.

A family is a declaration (TransformerConfig), not a copy: GPT-2 has learned positions, LayerNorm
and GELU; Llama has rotary positions, RMSNorm, a gated MLP and grouped key/value heads. Parameter
tree of either head:

  {'embed': {'tokens' [, 'positions']}, 'layers': {... every leaf [L, ...]}, 'final': {'norm' [,
  'head' | 'score']}}

Layers are stored stacked. Training, scoring and prefill scan over them, so that compile time does
not grow with depth. A decode step unrolls them over weights that were cast and unstacked once
(Decoder.prepare): measured faster, and every layer's cache is updated in place. This is the only
file that imports flax.linen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from alignjax import ops
from alignjax.models import rotary
from alignjax.models.axes import as_used
from alignjax.models.config import TransformerConfig
from alignjax.types import Decoder, KVCache, Networks, Params

# replaces a masked logit: finite, so that 0 * MASKED_LOGIT in an entropy, or a query that sees nothing,
# gives no NaN
MASKED_LOGIT = -1e30

# Products of cfg.dtype that come out as they were accumulated: rounded to bfloat16, a logit of 20
# would move by steps of 0.125.
_to_float32 = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def _norm(cfg: TransformerConfig, name: str, dtype: Any = None) -> nn.Module:
  dtype = dtype or cfg.dtype
  if cfg.norm == 'rmsnorm':
    return nn.RMSNorm(epsilon=cfg.norm_eps, dtype=dtype, name=name)
  return nn.LayerNorm(epsilon=cfg.norm_eps, dtype=dtype, use_fast_variance=False, name=name)


def unconstrained(x, *axes):
  """The `constrain` that leaves an activation's sharding to the compiler."""
  del axes
  return x


def _attend(q, k, v, visible):
  """q [B,T,G,N/G,H]; k, v [B,G,S,H]; visible bool[B,T,S] -> [B,T,G,N/G,H]. Scale and softmax in
  float32.

  A query that sees nothing attends to nothing, its output is 0: the softmax of a row of MASKED_LOGIT alone
  would be uniform over all columns, those of the future too.
  """
  logits = (
    jnp.einsum('btgmh,bgsh->bgmts', q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
  )
  visible = visible[:, None, None]
  weights = jnp.where(
    visible, jax.nn.softmax(jnp.where(visible, logits, MASKED_LOGIT), axis=-1), 0.0
  )
  return jnp.einsum('bgmts,bgsh->btgmh', weights.astype(v.dtype), v)


class Attention(nn.Module):
  """Causal attention with grouped heads. With a cache it appends the new keys and values and
  attends to all slots."""

  cfg: TransformerConfig
  constrain: Callable = unconstrained

  @nn.compact
  def __call__(self, x, angles, visible, cache=None, index=None):
    """x [B,T,D]; visible bool[B,T,S]; cache (k, v) each [B,G,S,H] written from slot index on, or
    None (S = T).

    Returns (output [B,T,D], (k, v) each [B,G,S,H]).
    """
    cfg = self.cfg
    b, t = x.shape[:2]

    # [D, heads * H], not [D, heads, H], for which a TPU keeps copies in another layout in its loops
    def project(heads, name):
      return nn.Dense(heads * cfg.head_width, use_bias=cfg.qkv_bias, dtype=cfg.dtype, name=name)(
        x
      ).reshape(b, t, heads, -1)

    per_head = lambda y, name: _norm(cfg, name)(y) if cfg.qk_norm else y
    q = rotary.rotate(per_head(project(cfg.num_heads, 'query'), 'query_norm'), angles)
    k = rotary.rotate(per_head(project(cfg.kv_heads, 'key'), 'key_norm'), angles).swapaxes(1, 2)
    v = project(cfg.kv_heads, 'value').swapaxes(1, 2)
    if cache is not None:
      k = jax.lax.dynamic_update_slice_in_dim(cache[0], k.astype(cache[0].dtype), index, axis=2)
      v = jax.lax.dynamic_update_slice_in_dim(cache[1], v.astype(cache[1].dtype), index, axis=2)
    q = self.constrain(q, 'batch', None, 'heads', None)
    k, v = (self.constrain(y, 'batch', 'kv_heads', None, None) for y in (k, v))
    q = q.reshape(b, t, cfg.kv_heads, -1, cfg.head_width)  # [B,T,G,N/G,H]
    if cache is None and cfg.attention_chunk is not None and t > cfg.attention_chunk:
      parts = []  # causal: queries up to a column read no key beyond it
      for stop in range(cfg.attention_chunk, t + cfg.attention_chunk, cfg.attention_chunk):
        some = slice(stop - cfg.attention_chunk, stop)
        parts.append(
          jax.checkpoint(_attend)(
            q[:, some], k[:, :, :stop], v[:, :, :stop], visible[:, some, :stop]
          )
        )
      heads = jnp.concatenate(parts, axis=1)
    else:
      heads = _attend(q, k, v, visible)
    heads = self.constrain(
      heads.reshape(b, t, cfg.num_heads, cfg.head_width), 'batch', None, 'heads', None
    )
    out = nn.DenseGeneral(
      cfg.d_model,
      axis=(-2, -1),
      use_bias=cfg.out_bias,
      dtype=cfg.dtype,
      kernel_init=_residual_init(cfg),
      name='out',
    )(heads)
    return out, (k, v)


class MLP(nn.Module):
  cfg: TransformerConfig
  constrain: Callable = unconstrained

  @nn.compact
  def __call__(self, x):
    cfg = self.cfg
    dense = lambda width, name, **kw: nn.Dense(
      width, use_bias=cfg.out_bias, dtype=cfg.dtype, name=name, **kw
    )
    hidden = self.constrain(dense(cfg.mlp_width, 'up')(x), 'batch', None, 'mlp')
    if cfg.mlp == 'swiglu':
      hidden = jax.nn.silu(dense(cfg.mlp_width, 'gate')(x)) * hidden
    else:
      hidden = jax.nn.gelu(hidden, approximate=cfg.mlp == 'gelu')
    return dense(cfg.d_model, 'down', kernel_init=_residual_init(cfg))(hidden)


class Block(nn.Module):
  """One layer: attention and MLP on the residual stream, in sequence or in parallel."""

  cfg: TransformerConfig
  constrain: Callable = unconstrained

  @nn.compact
  def __call__(self, x, angles, visible, cache=None, index=None, dropout=False):
    cfg = self.cfg
    attention, mlp = (
      Attention(cfg, self.constrain, name='attention'),
      MLP(cfg, self.constrain, name='mlp'),
    )
    # all tokens, for the heads and the MLP
    norm = lambda name, x: self.constrain(_norm(cfg, name)(x), 'batch', None, None)
    drop = lambda y: nn.Dropout(cfg.dropout, deterministic=not dropout)(
      self.constrain(y, 'batch', 'sequence', None)
    )
    attended, cache = attention(norm('norm_1', x), angles, visible, cache, index)
    if cfg.parallel_residual:
      return x + drop(attended) + drop(mlp(norm('norm_2', x))), cache
    x = x + drop(attended)
    return x + drop(mlp(norm('norm_2', x))), cache


class Embed(nn.Module):
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
      x = (
        x
        + self.param('positions', init, (cfg.max_length, cfg.d_model)).astype(cfg.dtype)[positions]
      )
    return x


class Final(nn.Module):
  """The last norm and, for a scalar head or untied embeddings, the projection, whose result is
  float32. The scalar head starts at N(0, 1/(D+1)) in variance with bias 0
  (openai/summarize-from-feedback, query_response_model.py); it and its norm are computed in float32
  throughout, on accelerators too, whose default for float32 products is less."""

  cfg: TransformerConfig
  head: str  # 'lm' or 'scalar'

  @nn.compact
  def __call__(self, x):
    cfg = self.cfg
    x = _norm(cfg, 'norm', jnp.float32 if self.head == 'scalar' else None)(x)
    if self.head == 'scalar':
      init = nn.initializers.normal((cfg.d_model + 1) ** -0.5)
      return nn.Dense(1, dtype=jnp.float32, precision='highest', kernel_init=init, name='score')(x)[
        ..., 0
      ]
    if cfg.tie_embeddings:
      return x
    return nn.Dense(
      cfg.vocab_size, use_bias=False, dtype=cfg.dtype, dot_general=_to_float32, name='head'
    )(x)


def _residual_init(cfg: TransformerConfig) -> Callable:
  """Projections back into the residual stream start smaller by sqrt(2L), as in GPT-2."""
  return nn.initializers.variance_scaling(1 / (2 * cfg.num_layers), 'fan_in', 'normal')


def init(cfg: TransformerConfig, key: jax.Array, head: str = 'lm') -> Params:
  """Fresh float32 parameters. head: 'lm' or 'scalar'."""
  keys = jax.random.split(key, 3)
  x, tokens = jnp.zeros((1, 1, cfg.d_model), cfg.dtype), jnp.zeros((1, 1), jnp.int32)
  angles, visible = rotary.angles(cfg, tokens), jnp.ones((1, 1, 1), bool)
  layer = lambda k: Block(cfg).init(k, x, angles, visible)['params']
  return {
    'embed': Embed(cfg).init(keys[0], tokens, tokens)['params'],
    'layers': jax.vmap(layer)(jax.random.split(keys[1], cfg.num_layers)),
    'final': Final(cfg, head).init(keys[2], x)['params'],
  }


def with_scalar_head(cfg: TransformerConfig, params: Params, key: jax.Array) -> Params:
  """A language model's trunk under a fresh scalar head: the paper removes the unembedding (section
  3.5)."""
  fresh = init_head(cfg, key)
  return {**params, 'final': {'norm': params['final']['norm'], 'score': fresh}}


def init_head(cfg: TransformerConfig, key: jax.Array) -> Params:
  return Final(cfg, 'scalar').init(key, jnp.zeros((1, 1, cfg.d_model), cfg.dtype))['params'][
    'score'
  ]


def make_networks(
  cfg: TransformerConfig,
  constrain: Callable[..., Any] = unconstrained,
  constrain_weights: Callable[[Any], Any] = lambda weights: weights,
) -> Networks:
  """The pure functions of an architecture (types.Networks).

  Args:
    cfg: the declaration.
    constrain: (x, *logical axis names) -> x, pins the sharding of an activation
      (sharding.Sharder.constrain).
    constrain_weights: params -> params, the sharding of weights in the sampling loop
      (sharding.Sharder.for_decoding).
  """
  dtype = jnp.dtype(cfg.dtype)

  def run_layers(params, tokens, mask, key=None, keep_cache=False):
    """-> (hidden [B,T,D] before the last norm, stacked (k, v) [L,B,G,T,H] or None)."""
    if tokens.shape[1] > cfg.max_length:
      raise ValueError(f'{tokens.shape[1]} tokens exceed model.max_length={cfg.max_length}.')
    where = ops.positions(mask)
    angles = rotary.angles(cfg, where)
    visible = ops.visible(mask)
    x = constrain(Embed(cfg).apply({'params': params['embed']}, tokens, where), 'batch', None, None)

    def layer(x, inputs):
      weights, layer_key = inputs
      rngs = {} if key is None else {'dropout': layer_key}
      x, kv = Block(cfg, constrain).apply(
        {'params': weights}, x, angles, visible, dropout=key is not None, rngs=rngs
      )
      return constrain(x, 'batch', 'sequence', None), (kv if keep_cache else None)

    policies = {
      'none': None,
      'full': jax.checkpoint_policies.nothing_saveable,
      'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
    if cfg.remat != 'none':
      layer = jax.checkpoint(layer, policy=policies[cfg.remat], prevent_cse=False)
    keys = None if key is None else jax.random.split(key, cfg.num_layers)
    # where it waits between layers, and for the way back
    x = constrain(x, 'batch', 'sequence', None)
    x, kv = jax.lax.scan(layer, x, (params['layers'], keys))
    return constrain(x, 'batch', None, None), kv

  def whole_head(params):
    """The unembedding gathered over the devices that share D, once: left in pieces, each would
    multiply its piece with every row of the batch and the float32 logits would be summed over
    devices, chunk by chunk."""
    if cfg.tie_embeddings:
      return params | {
        'embed': params['embed'] | {'tokens': constrain(params['embed']['tokens'], 'vocab', None)}
      }
    head = {'kernel': constrain(params['final']['head']['kernel'], None, 'vocab')}
    return params | {'final': params['final'] | {'head': head}}

  def unembed(params, x):
    """[..., D] -> float32 logits [..., V]."""
    x = Final(cfg, 'lm').apply({'params': params['final']}, x)
    if cfg.tie_embeddings:
      x = _to_float32(x, params['embed']['tokens'].astype(dtype), (((x.ndim - 1,), (1,)), ((), ())))
    return x

  def next_token(params, x):
    """The logits of the distribution that is sampled, scored and trained: unembed, MASKED_LOGIT at ids
    that no token has."""
    x = unembed(params, x)
    if cfg.unused_ids:
      unused = np.isin(
        np.arange(cfg.vocab_size), np.r_[tuple(slice(*ids) for ids in cfg.unused_ids)]
      )
      x = jnp.where(unused.reshape((1,) * (x.ndim - 1) + (-1,)), MASKED_LOGIT, x)
    return x

  def logits(params, tokens, mask, key=None):
    x, _ = run_layers(params, tokens, mask, key)
    return unembed(params, x)

  def logprobs(params, tokens, mask, temperature=1.0, key=None):
    b, t = tokens.shape
    x, _ = run_layers(params, tokens, mask, key)
    x, targets = x[:, :-1], tokens[:, 1:]  # the shift of logits against tokens
    params = whole_head(params)

    def score(x, targets):
      return ops.token_logprobs(next_token(params, x) / temperature, targets)

    if cfg.logits_chunk is None or b * (t - 1) <= cfg.logits_chunk:
      out = score(x.reshape(b * (t - 1), -1), targets.reshape(-1))
    else:  # a few columns of every row at a time: the rows stay where they are, on all devices of the batch axes
      columns = max(1, cfg.logits_chunk // b)
      widen = lambda y: jnp.pad(y, ((0, 0), (0, -(t - 1) % columns), *((0, 0),) * (y.ndim - 2)))
      cut = lambda y: jnp.moveaxis(widen(y).reshape(b, -1, columns, *y.shape[2:]), 1, 0)
      some = lambda args: jax.checkpoint(score)(
        constrain(args[0], 'batch', 'sequence', None), args[1]
      )
      out = jax.lax.map(some, (cut(x), cut(targets)))
      out = jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(b, -1)[:, : t - 1], out)
    return tuple(jnp.pad(y.reshape(b, t - 1), ((0, 0), (1, 0))) for y in out)

  def scalar(params, tokens, mask):
    x, _ = run_layers(params, tokens, mask)
    return Final(cfg, 'scalar').apply({'params': params['final']}, x)

  def prepare(params):
    # The prefill reads the layers one by one as they are stored: to gather the stack for it too
    # would hold a second copy.
    params = as_used(params, dtype)
    layers = [jax.tree.map(lambda w: w[i], params['layers']) for i in range(cfg.num_layers)]  # noqa: B023
    whole = constrain_weights(
      {'embed': params['embed'], 'final': params['final'], 'unstacked': layers}
    )
    if cfg.tie_embeddings:  # in one step: the TPU compiler failed on the way over pieces
      whole['embed'] = whole['embed'] | {'tokens': whole_head(params)['embed']['tokens']}
    return {'layers': params['layers'], **whole}

  def prefill(weights, tokens, mask, slots):
    x, (k, v) = run_layers(weights, tokens, mask, keep_cache=True)
    b, q = tokens.shape
    grow = lambda y: tuple(
      constrain(
        jnp.pad(layer, ((0, 0), (0, 0), (0, slots - q), (0, 0))), 'batch', 'kv_heads', None, None
      )
      for layer in y
    )
    cache = KVCache(
      k=grow(k), v=grow(v), mask=jnp.pad(mask, ((0, 0), (0, slots - q))), index=jnp.int32(q)
    )
    return next_token(weights, x[:, -1]), cache

  def step(weights, tokens, mask, cache):
    seen = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask[:, None], cache.index, axis=1)
    where = jax.lax.dynamic_slice_in_dim(ops.positions(seen), cache.index, 1, axis=1)
    angles = rotary.angles(cfg, where)
    x = Embed(cfg).apply({'params': weights['embed']}, tokens[:, None], where)
    one_token = lambda x, *axes: constrain(
      x, *(None if axis == 'sequence' else axis for axis in axes)
    )
    ks, vs = [], []
    for layer, k, v in zip(weights['unstacked'], cache.k, cache.v, strict=True):
      x, (k, v) = Block(cfg, one_token).apply(
        {'params': layer}, x, angles, seen[:, None, :], (k, v), cache.index
      )
      ks.append(k)
      vs.append(v)
    cache = KVCache(k=tuple(ks), v=tuple(vs), mask=seen, index=cache.index + 1)
    return next_token(weights, x[:, 0]), cache

  return Networks(
    logits=logits, logprobs=logprobs, scalar=scalar, decoder=Decoder(prepare, prefill, step)
  )
