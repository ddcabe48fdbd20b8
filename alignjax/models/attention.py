"""Attention over whole rows, without a cache, behind one function: `make` chooses the kernel.

  attend(q [B,T,N,H], k [B,S,G,H], v [B,S,G,H], mask [B,S]) -> [B,T,N,H]

The queries are those of the last T of the S columns; of all columns, unless devices share the
tokens of a row (models/sequence.py), where S is the length of the row and T that of a part.
A token attends to the tokens up to itself that have its document number in the mask. The mask is
that of types.TokenBatch: bool, or the number of each token's document and 0 on pads. The output at
a pad is 0, so no token reads a pad, and what a pad attends to never matters. The fused
kernels write no array of [B,T,T], but cuDNN reads one for packed rows and for prompts.

Every kernel computes softmax and sums in float32. What they round differs, so that their results
agree to the rounding of the model's dtype and not to the last bit.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from alignjax.models import sequence
from alignjax.models.config import TransformerConfig
from alignjax.models.products import to_float32

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

# Replaces a masked logit. It is finite, so that neither 0 * MASKED_LOGIT in an entropy nor a query
# that sees nothing gives a NaN.
MASKED_LOGIT = -1e30
AXES = (
  ('batch', 'tokens', 'heads', None),
  ('batch', 'tokens', 'kv_heads', None),
  ('batch', 'tokens', 'kv_heads', None),
  ('batch', None),
)  # the logical axes of the arguments of Attend; the result has those of the queries
# The sizes of the blocks that splash cuts rows into. It takes the first one whose padding lengthens
# a row by an eighth at most.
BLOCKS = (512, 256, 128)


def whole(function: Callable, inputs: tuple, output: tuple) -> Callable:
  """The default of Machine.split, for one device: the function itself."""
  del inputs, output
  return function


class Machine(NamedTuple):
  """The devices that a network is compiled for, as far as it needs to know them.

  Attributes:
    platform: 'cpu', 'gpu' or 'tpu'.
    capability: the compute capability of an NVIDIA GPU, such as 9.0, and 0 of another one; None
      where it is not known.
    split: (function, logical axes of each argument, those of the result) -> function; it applies
      the function to each device's part of the arrays (sharding.Sharder.per_device).
    grouped: whether each device has the key/value heads of its query heads and no others, so that
      a kernel may pair those that it has.
    token_parts: the devices that share the tokens of a row (models/sequence.py).
  """

  platform: str
  capability: float | None = None
  split: Callable[[Callable, tuple, tuple], Callable] = whole
  grouped: bool = True
  token_parts: int = 1


def machine_of(
  device: jax.Device, split: Callable = whole, grouped: bool = True, token_parts: int = 1
) -> Machine:
  """The machine that a device belongs to. The device need not be attached: `alignjax estimate`
  compiles for those of a topology."""
  if device.platform != 'gpu':
    return Machine(device.platform, None, split, grouped, token_parts)
  capability = re.fullmatch(r'\d+\.\d+', getattr(device, 'compute_capability', ''))
  known = float(capability[0]) if capability else 0.0
  return Machine('gpu', known, split, grouped, token_parts)


def make(cfg: TransformerConfig, machine: Machine) -> Attend:
  """The attention of an architecture on a machine, as cfg.attention asks. All layers have the
  window, if there is one (TransformerConfig.of_layers).

  'auto' takes the fused kernel of the platform where the dtype and the width of a head allow it,
  and the reference elsewhere.

  Raises:
    ValueError: cfg.attention names a kernel that this model or machine cannot use. The message has
      the reason.
  """
  choice = chosen(cfg, machine)
  options = dict(window=cfg.window, scale=cfg.query_scale)
  options |= {} if choice == 'cudnn' else dict(cap=cfg.attention_cap)
  options |= dict(chunk=cfg.attention_chunk) if choice == 'reference' else {}
  kernel = {'cudnn': cudnn, 'splash': splash, 'reference': reference}[choice]
  attend = functools.partial(kernel, **options)
  if machine.token_parts > 1:
    return machine.split(sequence.of_own_queries(attend), AXES, AXES[0])
  return attend if choice == 'reference' else machine.split(attend, AXES, AXES[0])


def chosen(cfg: TransformerConfig, machine: Machine) -> str:
  """The kernel that `make` takes: 'reference', 'cudnn' or 'splash'."""
  if cfg.attention == 'reference':
    return 'reference'
  if cfg.attention == 'auto':
    found = (name for name in ('cudnn', 'splash') if _why_not(name, cfg, machine) is None)
    return next(found, 'reference')
  if reason := _why_not(cfg.attention, cfg, machine):
    raise ValueError(
      f"model.attention='{cfg.attention}' cannot be used: {reason}. Set model.attention='auto', "
      "which takes what fits, or 'reference'."
    )
  return cfg.attention


def _why_not(kernel: str, cfg: TransformerConfig, machine: Machine) -> str | None:
  """Why a kernel cannot be used, or None."""
  platform, dtypes = {'cudnn': ('gpu', ('bfloat16', 'float16')), 'splash': ('tpu', ('bfloat16',))}[
    kernel
  ]
  if machine.platform != platform:
    return f'it runs on a {platform.upper()}, and this mesh is of {machine.platform.upper()}s'
  if cfg.dtype not in dtypes:
    return f'it computes in {" or ".join(dtypes)}, and model.dtype is {cfg.dtype}'
  if cfg.kv_heads != cfg.num_heads and not machine.grouped:
    return 'the mesh divides query heads and key/value heads over different numbers of devices'
  if kernel == 'splash':
    return None
  if cfg.attention_cap is not None:
    return f'it cannot cap attention logits, and model.attention_cap is {cfg.attention_cap}'
  if machine.capability is not None and machine.capability < 8:
    return (
      'it needs an NVIDIA GPU of compute capability 8.0 or more, and this one has '
      f'{machine.capability}'
    )
  widest = 256 if (machine.capability or 0) >= 9 else 128
  if cfg.head_width % 8 or cfg.head_width > widest:
    return (
      f'a head has to be {widest} features wide or less, and a multiple of 8, but has '
      f'{cfg.head_width}'
    )
  return None


def saveable(primitive: Any, *_: Any, **parameters: Any) -> bool:
  """A policy of jax.checkpoint that stores what a kernel's backward pass reads of its forward pass.
  cuDNN's rule gives its results no names, so its primitive is known by its own."""
  return (
    primitive.name == 'dot_product_attention_fwd_wrapper' or parameters.get('name') == 'attention'
  )


def capped(x: jax.Array, cap: float | None) -> jax.Array:
  """cap tanh(x / cap), or x where there is no cap (Gemma 2, section 2)."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def product(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array,
  scale: float | None = None,
  cap: float | None = None,
) -> jax.Array:
  """Scaled dot-product attention; the scale and the softmax are computed in float32.

  A query that sees nothing gets the output 0. The softmax of a row of MASKED_LOGIT alone would be
  uniform over all columns, those of the future among them.

  Args:
    q: [B,T,G,N/G,H].
    k, v: [B,G,S,H].
    visible: bool[B,T,S], whether a query may attend to a key.
    scale, cap: cfg.query_scale and cfg.attention_cap.

  Returns:
    [B,T,G,N/G,H], in the dtype of v.
  """
  b, t, g, m, h = q.shape
  rows = q.transpose(0, 2, 3, 1, 4).reshape(b, g, m * t, h)
  logits = to_float32(rows, k, (((3,), (3,)), ((0, 1), (0, 1)))).reshape(b, g, m, t, -1)
  visible = visible[:, None, None]
  logits = capped(logits * (h**-0.5 if scale is None else scale), cap)
  weights = jax.nn.softmax(jnp.where(visible, logits, MASKED_LOGIT), axis=-1)
  weights = jnp.where(visible, weights, 0.0)
  return jnp.einsum('bgmts,bgsh->btgmh', weights.astype(v.dtype), v)


def reference(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array,
  chunk: int | None = None,
  window: int | None = None,
  scale: float | None = None,
  cap: float | None = None,
) -> jax.Array:
  """Attend by two matrix products, whose float32 logits are written to memory.

  Args:
    q, k, v, mask: see above.
    chunk: queries of a device whose logits exist at once, None for all. No query of a chunk reads a
      key beyond it, nor one before the window of its first query.
    window, scale, cap: cfg.window, cfg.query_scale and cfg.attention_cap.
  """
  b, t, n, h = q.shape
  g, before = k.shape[2], k.shape[1] - t
  chunk = min(chunk or t, t)
  attend = functools.partial(product, scale=scale, cap=cap)
  attend = attend if chunk == t else jax.checkpoint(attend)
  q = q.reshape(b, t, g, n // g, h)
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B,G,S,H]
  parts = []
  for start in range(0, t, chunk):
    stop = min(start + chunk, t)
    last = before + stop
    first = 0 if window is None else max(before + start - window + 1, 0)
    visible = _visible(mask, before + start, last, first, window)
    parts.append(attend(q[:, start:stop], k[:, :, first:last], v[:, :, first:last], visible))
  out = jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
  return checkpoint_name(out.reshape(b, t, n, h), 'attention')


def _visible(
  mask: jax.Array, start: int, stop: int, first: int = 0, window: int | None = None
) -> jax.Array:
  """bool[B,stop-start,stop-first]: whether a query from `start` to `stop` may attend to a key from
  `first` to `stop`."""
  query = jax.lax.broadcasted_iota(jnp.int32, (1, stop - start, stop - first), 1) + start
  key = jax.lax.broadcasted_iota(jnp.int32, query.shape, 2) + first
  near = key <= query
  if window is not None:
    near &= query - key < window
  keys = mask[:, None, first:stop]
  return near & (mask[:, start:stop, None] == keys) & (keys > 0)


def cudnn(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array,
  implementation: str = 'cudnn',
  window: int | None = None,
  scale: float | None = None,
) -> jax.Array:
  """Attend by cuDNN's fused kernel.

  It has no documents and no pads on the left. Rows with a bool mask must therefore have their
  tokens before their pads (`pads_last`), and being causal is then enough. For packed rows the mask
  is a bias of [B,1,T,T] in the model's dtype, which is slower and needs an even T in training.
  Where T is below S, so it is for all rows, because the kernel counts causality from the first key.

  Args:
    q, k, v, mask: see above.
    implementation: 'xla' takes the same arguments where there is no cuDNN, for tests.
    window, scale: cfg.window and cfg.query_scale. The kernel leaves out what the window hides; for
      packed rows the bias hides it.
  """
  t, before = q.shape[1], k.shape[1] - q.shape[1]
  visible, local = None, None if window is None or window >= k.shape[1] else (window - 1, 0)
  own = mask[:, before:]
  if mask.dtype != bool or before:
    q, k, v, mask, own = (_lengthened(x, 2) for x in (q, k, v, mask, own))
    visible = (own[:, :, None] == mask[:, None, :])[:, None]
    distance = jax.lax.broadcasted_iota(jnp.int32, (1, *visible.shape[1:]), 2) + before
    distance -= jax.lax.broadcasted_iota(jnp.int32, distance.shape, 3)
    if before:
      visible &= distance >= 0
    if local is not None:
      visible, local = visible & (distance < window), None
  # The residual makes it one kernel with and without a gradient, so that scoring and update agree.
  out, _ = jax.nn.dot_product_attention(
    q,
    k,
    v,
    mask=visible,
    scale=scale,
    is_causal=not before,
    local_window_size=local,
    implementation=implementation,
    return_residual=True,
  )
  return _zero_at_pads(out, own)[:, :t]


def splash(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array,
  interpret: bool = False,
  window: int | None = None,
  scale: float | None = None,
  cap: float | None = None,
) -> jax.Array:
  """Attend by the splash kernel of a TPU, whose segments are the documents and the pads.

  The queries are scaled before they are rounded. A row is lengthened by pads to a multiple of the
  kernel's block.

  Args:
    q, k, v, mask: see above.
    interpret: runs the kernel's program on any platform, for tests.
    window, scale, cap: cfg.window, cfg.query_scale and cfg.attention_cap. The kernel leaves out the
      blocks that the window hides.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  t, n = q.shape[1:3]
  before = k.shape[1] - t
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)
  block = next(b for b in BLOCKS if -t % b <= t // 8 or b == BLOCKS[-1])
  local = None if window is None or window >= k.shape[1] else (window - 1, 0)
  q, k, v, mask, own = (_lengthened(x, block) for x in (q, k, v, mask, mask[:, before:]))
  shape = (q.shape[1], k.shape[1])
  causal = (
    masks.CausalMask(shape, before) if local is None else masks.LocalMask(shape, local, before)
  )
  kernel = kernels.make_splash_mha_single_device(
    masks.MultiHeadMask([causal] * n),
    block_sizes=kernels.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    residual_checkpoint_name='attention',
    attn_logits_soft_cap=cap,
    interpret=interpret,
  )
  documents = kernels.SegmentIds(own.astype(jnp.int32), mask.astype(jnp.int32))
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  out = jax.vmap(kernel)(q, k, v, documents).swapaxes(1, 2)
  return _zero_at_pads(out, own)[:, :t]


def _lengthened(x: jax.Array, multiple: int) -> jax.Array:
  """x [B,T,...] with zeros behind it, so that T is a multiple."""
  rest = -x.shape[1] % multiple
  return jnp.pad(x, ((0, 0), (0, rest), *((0, 0),) * (x.ndim - 2)))


def _zero_at_pads(out: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.where((mask > 0)[..., None, None], out, 0)


class Order(NamedTuple):
  """An order of the columns of each row in which the live tokens precede the pads, and the way
  back.

  Attributes:
    there: i32[B,T], the column that stands at each place.
    back: i32[B,T], the place at which each column stands.
  """

  there: jax.Array
  back: jax.Array


def pads_last(mask: jax.Array) -> Order:
  """The order in which cuDNN reads rows of a bool mask: [0, 1, 1, 0] -> [1, 2, 0, 3]. Positions
  and masks that were computed before move along, so no live token sees a difference."""
  there = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)
  return Order(there, jnp.argsort(there, axis=1).astype(jnp.int32))


def moved(x: jax.Array, columns: jax.Array) -> jax.Array:
  """x [B,T,...] with the columns [B,T] of each row, which are a permutation. The gradient adds
  nothing up, and so its bits do not depend on the order of any sums."""

  def one(row, columns):
    return row.at[columns].get(unique_indices=True, mode='promise_in_bounds')

  return jax.vmap(one)(x, columns)
