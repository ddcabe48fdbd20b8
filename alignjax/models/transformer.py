"""One decoder-only transformer for all families, as pure functions over the modules of layers.py.

A family is a declaration (TransformerConfig) and has no code of its own: GPT-2 has learned
positions, LayerNorm and GELU; Llama has rotary positions, RMSNorm, a gated MLP and grouped
key/value heads. The parameter tree of either head is

  {'embed': {'tokens' [, 'positions']},
   'layers': {... every leaf [L, ...]},
   'final': {'norm' [, 'head' | 'score']}}

Layers are stored stacked. Training, scoring and prefill scan over them, so that the compile time
does not grow with the depth; on CPUs the scan of a shallow float32 network is unrolled. A decoding
step unrolls them over weights that `prepare` has cast and unstacked once: that was measured to be
faster, and every layer's cache is updated in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax import ops
from alignjax.models import attention, cached, lora, rotary, sequence, weights_first
from alignjax.models.attention import MASKED_LOGIT, Machine
from alignjax.models.axes import as_used
from alignjax.models.config import TransformerConfig
from alignjax.models.layers import Block, Embed, Final, unconstrained
from alignjax.models.products import of_rows, to_float32
from alignjax.types import Decoder, KVCache, Networks, Params

Constrain = Callable[..., jax.Array]  # (x, *logical axis names) -> x
POLICIES = jax.checkpoint_policies
# The arrays of a layer that have a name (layers.py). The result of 'down' is read by no backward
# pass, and the next layer stores the sum that it is part of.
NAMES = ('query', 'key', 'value', 'attention', 'out', 'up', 'gate')
REMAT_POLICIES = {
  'full': POLICIES.nothing_saveable,
  'dots': POLICIES.save_from_both_policies(
    POLICIES.dots_with_no_batch_dims_saveable, attention.saveable
  ),
  'attention': POLICIES.save_from_both_policies(
    POLICIES.save_only_these_names('query', 'key', 'value'), attention.saveable
  ),
  'projections': POLICIES.save_from_both_policies(
    POLICIES.save_only_these_names(*NAMES), attention.saveable
  ),
}
VOCABULARY_MULTIPLE = 128
# On CPUs XLA copies what each layer stores for the backward pass once more after the loop. Without
# the loop, the steps of the sandbox (2 layers) took 0.55 to 0.9 of their time. GPT-2 small (12
# layers) took 1.2 to 1.4 times as long. Networks in bfloat16 keep the loop: without it, scoring and
# update would round at different places, and the ratio before the first update would not be 1. So
# do networks that scale their embeddings: without the loop their ratio was off by 2e-6 on CPUs with
# fused multiply-adds, and exactly 1 on those without.
UNROLLED_LAYERS = 4


def init(cfg: TransformerConfig, key: jax.Array, head: str = 'lm') -> Params:
  """Fresh float32 parameters. head: 'lm' or 'scalar'."""
  keys = jax.random.split(key, 3)
  x, tokens = jnp.zeros((1, 1, cfg.d_model), cfg.dtype), jnp.zeros((1, 1), jnp.int32)
  angles, mask = rotary.angles(cfg, tokens), jnp.ones((1, 1), bool)

  def init_layer(key):
    return Block(cfg).init(key, x, angles, mask)['params']

  return {
    'embed': Embed(cfg).init(keys[0], tokens, tokens)['params'],
    'layers': jax.vmap(init_layer)(jax.random.split(keys[1], cfg.num_layers)),
    'final': Final(cfg, head).init(keys[2], x)['params'],
  }


def with_scalar_head(cfg: TransformerConfig, params: Params, key: jax.Array) -> Params:
  """The trunk of a language model under a fresh scalar head: the paper removes the unembedding
  (section 3.5)."""
  fresh = init_head(cfg, key)
  return {**params, 'final': {'norm': params['final']['norm'], 'score': fresh}}


def init_head(cfg: TransformerConfig, key: jax.Array) -> Params:
  """Fresh parameters of a scalar head."""
  x = jnp.zeros((1, 1, cfg.d_model), cfg.dtype)
  return Final(cfg, 'scalar').init(key, x)['params']['score']


def make_networks(
  cfg: TransformerConfig,
  constrain: Constrain = unconstrained,
  constrain_weights: Callable[[Any], Any] = lambda weights: weights,
  machine: Machine | None = None,
) -> Networks:
  """The pure functions of an architecture (types.Networks).

  Args:
    cfg: the declaration of the architecture.
    constrain: (x, *logical axis names) -> x, pins the sharding of an activation
      (sharding.Sharder.constrain).
    constrain_weights: params -> params, pins the sharding of the weights in the sampling loop
      (sharding.Sharder.for_decoding).
    machine: the devices that the functions are compiled for (sharding.Sharder.machine); by default
      the first device of this process. It decides the kernel of attention, and sampling multiplies
      in another order on CPUs (weights_first.py).

  Raises:
    ValueError: cfg.attention names a kernel that cannot be used there.
  """
  machine = machine or attention.machine_of(jax.local_devices()[0])
  attention.chosen(cfg, machine)  # It is refused before anything is traced.
  if _float32_on_cpu(cfg, machine):
    products = Products(weights_first.relayout, weights_first.projections, weights_first.multiply)
  else:
    products = Products(lambda params: params, contextlib.nullcontext, _times_transposed)
  decoder = Decoder(
    prepare=functools.partial(_prepare, cfg, constrain, constrain_weights, products),
    prefill=functools.partial(_prefill, cfg, constrain, machine, products),
    step=functools.partial(_step, cfg, constrain, products),
  )
  return Networks(
    logits=functools.partial(_logits, cfg, constrain, machine),
    logprobs=functools.partial(_logprobs, cfg, constrain, machine),
    scalar=functools.partial(_scalar, cfg, constrain, machine),
    decoder=decoder,
  )


# The functions of types.Networks. Each takes the TransformerConfig, the Constrain and the Machine
# first, which make_networks binds.


def _logits(cfg, constrain, machine, params, tokens, mask, key=None, positions=None):
  x, _ = _run_layers(cfg, constrain, machine, params, tokens, mask, key)
  if positions is not None:
    return _unembed(cfg, params, jnp.take_along_axis(x, positions[..., None], axis=1))
  return _unembed(cfg, params, x)[:, : tokens.shape[1]]


def _logprobs(cfg, constrain, machine, params, tokens, mask, temperature=1.0, key=None):
  x, _ = _run_layers(cfg, constrain, machine, params, tokens, mask, key)
  cfg, params = _lengthened_vocabulary(cfg, machine, _gather_unembedding(cfg, constrain, params))

  def score(x, targets):
    return ops.token_logprobs(_next_token_logits(cfg, params, x) / temperature, targets)

  # the shift of logits against tokens
  parts, targets = machine.token_parts, tokens[:, 1:]
  if parts == 1:
    x = x[:, :-1]
  else:  # The last column stays, with any target, so that the columns divide.
    targets = jnp.pad(targets, ((0, 0), (0, x.shape[1] - targets.shape[1])))
  out = _of_columns(score, x, targets, cfg.logits_chunk, constrain, parts)
  return tuple(jnp.pad(y[:, : tokens.shape[1] - 1], ((0, 0), (1, 0))) for y in out)


def _of_columns(score, x, targets, most, constrain, parts):
  """score(x [...,D], targets [...]) -> two f32[...], of all columns of x [B,T,D] and targets [B,T],
  `most` of them at a time or all where it is None: two f32[B,T]. parts: Machine.token_parts."""
  b, t = targets.shape
  # A row and its columns stay where they are: as [B*T] they would not where devices share both.
  lead, axes = ((b,), ('sequence',)) if parts == 1 else ((b, parts), ('tokens', None))
  if most is None or b * t <= most:
    flat = (b * t,) if parts == 1 else (b, t)
    out = score(x.reshape(*flat, -1), targets.reshape(flat))
    return jax.tree.map(lambda y: y.reshape(b, t), out)
  # Some columns of every row are scored at a time, and of every part of a row.
  columns, own, at = max(1, most // (b * parts)), t // parts, len(lead)

  def cut(y):  # [B,T,...] -> [chunks,*lead,columns,...], padded at the end
    y = y.reshape(*lead, own, *y.shape[2:])
    y = jnp.pad(y, [(0, -own % columns if axis == at else 0) for axis in range(y.ndim)])
    return jnp.moveaxis(y.reshape(*lead, -1, columns, *y.shape[at + 1 :]), at, 0)

  def score_chunk(chunk):
    x, targets = chunk
    return jax.checkpoint(score)(constrain(x, 'batch', *axes, None), targets)

  def whole(y):
    return jnp.moveaxis(y, 0, at).reshape(*lead, -1)[..., :own].reshape(b, t)

  return jax.tree.map(whole, jax.lax.map(score_chunk, (cut(x), cut(targets))))


def _scalar(cfg, constrain, machine, params, tokens, mask):
  x, _ = _run_layers(cfg, constrain, machine, params, tokens, mask)
  return Final(cfg, 'scalar').apply({'params': params['final']}, x)[:, : tokens.shape[1]]


# The functions of types.Decoder


def _prepare(cfg, constrain, constrain_weights, products, params):
  # The prefill reads the layers one by one as they are stored: to gather the stack for it too would
  # hold a second copy.
  dtype = jnp.dtype(cfg.dtype)
  trained, params = params['layers'], as_used(params, dtype)
  if lora.is_joined(trained):  # They are added to the kernels before anything is rounded.
    layers = [as_used(lora.merge(_layer_of(trained, i)), dtype) for i in range(cfg.num_layers)]
  else:
    layers = [_layer_of(params['layers'], i) for i in range(cfg.num_layers)]
  whole = constrain_weights(
    {'embed': params['embed'], 'final': params['final'], 'unstacked': layers}
  )
  if cfg.tie_embeddings:
    # It is gathered in one step, because the TPU compiler failed at a detour over pieces of it.
    gathered = _gather_unembedding(cfg, constrain, params)
    whole['embed'] = whole['embed'] | {'tokens': gathered['embed']['tokens']}
  for part in ('unstacked', 'final'):
    whole[part] = products.relayout(whole[part])
  return {'layers': params['layers'], **whole}


def _layer_of(stacked, index):
  return jax.tree.map(lambda leaf: leaf[index], stacked)


def _prefill(cfg, constrain, machine, products, weights, tokens, mask, samples=1):
  mask = sequence.lengthened(mask, machine.token_parts, left=True)
  x, stacked = _run_layers(cfg, constrain, machine, weights, tokens, mask, keep_cache=True)

  def place(layer, windowed):
    layer = cached.kept_of_prompt(layer, cfg.window if windowed else None)
    if cfg.kv_cache == 'int8':
      layer = cached.quantize(layer)
    return jax.tree.map(lambda x: constrain(x, *cached.CACHE_AXES[: x.ndim]), layer)

  def without_slots(layer):
    rows, groups, _, *width = layer.shape
    return jnp.zeros((rows * samples, groups, 0, *width), layer.dtype)

  prompt = tuple(
    (place(k, windowed), place(v, windowed))
    for k, v, windowed in zip(*stacked, cfg.windowed, strict=True)
  )
  cache = KVCache(
    prompt=prompt,
    prompt_mask=mask,
    response=jax.tree.map(without_slots, prompt),
    index=jnp.int32(0),
  )
  logits = _decoded_logits(cfg, products, weights, x[:, -1])
  return jnp.repeat(logits, samples, axis=0) if samples > 1 else logits, cache


def _step(cfg, constrain, products, weights, tokens, cache):
  lengths = jnp.sum(cache.prompt_mask, axis=-1, dtype=jnp.int32)
  where = jnp.repeat(lengths, len(tokens) // len(lengths))[:, None] + cache.index
  kinds, angles = _kinds_of_layers(cfg, where)
  x = Embed(cfg).apply({'params': weights['embed']}, tokens[:, None], where)

  def constrain_token(x, *axes):
    axes = ('rows' if axis == 'batch' else axis for axis in axes)
    return sequence.without_tokens(constrain)(x, *axes)

  response = []
  with products.projections():
    for windowed, layer, *kv in zip(
      cfg.windowed, weights['unstacked'], cache.prompt, cache.response, strict=True
    ):
      x, new = Block(kinds[windowed], constrain_token).apply(
        {'params': layer}, x, angles[windowed], cache.prompt_mask, kv, cache.index
      )
      response.append(new)
  cache = cache.replace(response=tuple(response), index=cache.index + 1)
  return _decoded_logits(cfg, products, weights, x[:, 0]), cache


class Products(NamedTuple):
  """How the matrix products of a decoding step are computed.

  Attributes:
    relayout: (params) -> the params in the layout that `projections` reads.
    projections: () -> a context for the dense layers.
    multiply: (x [...,D], table [V,D]) -> float32 [...,V].
  """

  relayout: Callable[[Any], Any]
  projections: Callable[[], contextlib.AbstractContextManager]
  multiply: Callable[[jax.Array, jax.Array], jax.Array]


def _decoded_logits(cfg, products, weights, x):
  with products.projections():
    return _next_token_logits(cfg, weights, x, products.multiply)


# What these functions share


def _run_layers(cfg, constrain, machine, params, tokens, mask, key=None, keep_cache=False):
  """Embedding and layers: (hidden states [B,T,D] before the last norm, stacked (k, v)
  [L,B,G,T,H] or None). T is longer than the tokens where devices would not share them equally."""
  if tokens.shape[1] > cfg.max_length:
    raise ValueError(f'{tokens.shape[1]} tokens exceed model.max_length={cfg.max_length}.')
  tokens, mask = (sequence.lengthened(y, machine.token_parts, keep_cache) for y in (tokens, mask))
  where = ops.positions(mask)
  order = None
  if mask.dtype == bool and attention.chosen(cfg, machine) == 'cudnn':
    # The cache stays in the order of its slots, and tokens on the device that has them.
    if keep_cache or machine.token_parts > 1:
      mask = mask.astype(jnp.int32)
    else:
      order = attention.pads_last(mask)
      tokens, where, mask = (attention.moved(y, order.there) for y in (tokens, where, mask))
  angles_and_attend, windowed = _by_window(cfg, machine, where)
  rows = _float32_on_cpu(cfg, machine) and machine.token_parts == 1
  multiply = of_rows if rows else jax.lax.dot_general
  x = Embed(cfg).apply({'params': params['embed']}, tokens, where)
  x = constrain(x, 'batch', 'tokens', None)
  # Where several devices share D, the embedding comes in pieces. Fused with the first norm, scoring
  # and update would sum the pieces in different orders on some CPUs.
  x = jax.lax.optimization_barrier(x)

  def layer(x, inputs):
    weights, layer_key, has_window = inputs
    angles, attend = angles_and_attend(has_window)
    rngs = {} if key is None else {'dropout': layer_key}
    with lora.projections():
      x, kv = Block(cfg, constrain, attend, multiply).apply(
        {'params': weights}, x, angles, mask, dropout=key is not None, rngs=rngs
      )
    return constrain(x, 'batch', 'sequence', None), (kv if keep_cache else None)

  if cfg.remat != 'none':
    layer = jax.checkpoint(layer, policy=REMAT_POLICIES[cfg.remat], prevent_cse=False)
  keys = None if key is None else jax.random.split(key, cfg.num_layers)
  # This is what is stored between layers and for the backward pass.
  x = constrain(x, 'batch', 'sequence', None)
  exact = _float32_on_cpu(cfg, machine) and cfg.embedding_scale == 1.0
  unrolled = exact and cfg.num_layers <= UNROLLED_LAYERS
  x, kv = jax.lax.scan(layer, x, (params['layers'], keys, windowed), unroll=unrolled)
  x = constrain(x, 'batch', 'tokens', None)
  return x if order is None else attention.moved(x, order.back), kv


def _kinds_of_layers(cfg, where):
  """(whether a layer has the window -> its declaration, and -> its rotary angles at the positions
  `where`), for the kinds of layers that there are."""
  kinds = {windowed: cfg.of_layers(windowed) for windowed in set(cfg.windowed)}
  return kinds, {windowed: rotary.angles(kind, where) for windowed, kind in kinds.items()}


def _by_window(cfg, machine, where):
  """(whether a layer has the window -> its rotary angles and its attention, what the layers are
  scanned over to know it: bool[L], or None where all layers are alike)."""
  kinds, angles = _kinds_of_layers(cfg, where)
  attend = {w: attention.make(kind, machine) for w, kind in kinds.items()}
  if len(kinds) == 1:
    (only,) = kinds
    return lambda _: (angles[only], attend[only]), None

  def choose(has_window):
    chosen = angles[True]
    if cfg.window_rope_theta is not None:
      chosen = jax.tree.map(functools.partial(jnp.where, has_window), angles[True], angles[False])
    return chosen, functools.partial(jax.lax.cond, has_window, attend[True], attend[False])

  return choose, jnp.asarray(cfg.windowed)


def _float32_on_cpu(cfg, machine):
  return machine.platform == 'cpu' and cfg.dtype == 'float32'


def _lengthened_vocabulary(cfg, machine, params):
  """The declaration and the parameters of a head whose vocabulary is a multiple of
  VOCABULARY_MULTIPLE on a GPU, whose matrix units want it so. The ids that are added have no
  token, so the log-probabilities are those of the others."""
  rest = -cfg.vocab_size % VOCABULARY_MULTIPLE
  if machine.platform != 'gpu' or not rest:
    return cfg, params
  size = cfg.vocab_size + rest
  longer = dataclasses.replace(
    cfg, vocab_size=size, unused_ids=(*cfg.unused_ids, (cfg.vocab_size, size))
  )
  if cfg.tie_embeddings:
    tokens = jnp.pad(params['embed']['tokens'], ((0, rest), (0, 0)))
    return longer, params | {'embed': params['embed'] | {'tokens': tokens}}
  head = {'kernel': jnp.pad(params['final']['head']['kernel'], ((0, 0), (0, rest)))}
  return longer, params | {'final': params['final'] | {'head': head}}


def _gather_unembedding(cfg, constrain, params):
  """The parameters with the unembedding gathered, once, over the devices that share D. In pieces,
  each device would multiply its piece with every row of the batch, and the float32 logits would be
  summed over devices, chunk by chunk."""
  if cfg.tie_embeddings:
    tokens = constrain(params['embed']['tokens'], 'vocab', None)
    return params | {'embed': params['embed'] | {'tokens': tokens}}
  head = {'kernel': constrain(params['final']['head']['kernel'], None, 'vocab')}
  return params | {'final': params['final'] | {'head': head}}


def _times_transposed(x, table):
  """x [..., D] times table [V, D], summed over D: float32 [..., V]."""
  return to_float32(x, table, (((x.ndim - 1,), (1,)), ((), ())))


def _unembed(cfg, params, x, multiply=_times_transposed):
  """Hidden states [..., D] -> float32 logits [..., V]."""
  x = Final(cfg, 'lm').apply({'params': params['final']}, x)
  if cfg.tie_embeddings:
    x = multiply(x, params['embed']['tokens'].astype(jnp.dtype(cfg.dtype)))
  return attention.capped(x, cfg.logits_cap)


def _next_token_logits(cfg, params, x, multiply=_times_transposed):
  """The logits of the distribution that is sampled, scored and trained: those of `_unembed`, and
  MASKED_LOGIT at ids that no token has."""
  x = _unembed(cfg, params, x, multiply)
  if cfg.unused_ids:
    unused = np.isin(np.arange(cfg.vocab_size), np.r_[tuple(slice(*ids) for ids in cfg.unused_ids)])
    x = jnp.where(unused.reshape((1,) * (x.ndim - 1) + (-1,)), MASKED_LOGIT, x)
  return x
