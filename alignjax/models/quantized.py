"""Frozen kernels in 8 or 4 bits (QLoRA, Dettmers et al. 2023).

A kernel [..., inputs, outputs] of the layers is kept as codes and scales:

  {'codes': int8 [..., inputs, outputs] or uint8 [..., inputs / 2, outputs],
   'absmax': float32 [..., inputs / block, outputs]}

A block is up to 64 consecutive inputs of one output, and its scale is the largest absolute value in
it. With 'int8' a code is round(127 x / absmax). With 'nf4' it is the nearest of the 16 values of
NF4, and a byte holds two of them: that of the even input in its low four bits, and that of the odd
one above. Embeddings, norms, biases and heads stay as they are.

The networks read such kernels through lora.projections. A product makes its kernel in the dtype of
the computation just before it is multiplied, in the backward pass once more, and neither is kept.

The NF4 codes of bitsandbytes are the same where 64 divides the inputs (of the projection `out`: the
width of a head). Elsewhere its blocks reach over the ends of rows, and it can quantise the scales
once more.

Where devices share a kernel (fsdp), each of them makes its part in the dtype of the computation,
and these are gathered: quantised bases save memory there and no traffic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.types import Params

KINDS = ('int8', 'nf4')
LEAVES = ('codes', 'absmax')
BLOCK = 64


def _nf4() -> np.ndarray:
  """The 16 values of NF4 (appendix E of the paper): quantiles of a normal distribution, as in the
  authors' bitsandbytes/functional.py: create_normal_map; 7 below 0, 0 and 8 above, scaled to
  [-1, 1]."""
  offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
  inverse_cdf = NormalDist().inv_cdf
  below = [-inverse_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
  above = [inverse_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
  values = np.sort([*below, 0.0, *above])
  return (values / np.abs(values).max()).astype(np.float32)


NF4 = _nf4()
BETWEEN = (NF4[1:] + NF4[:-1]) / 2  # a value above n of these has the code n


def block_of(inputs: int) -> int:
  """The inputs of a block: the largest power of two up to 64 that divides them."""
  return math.gcd(inputs, BLOCK)


def quantize(params: Params, kind: str) -> Params:
  """All parameters of a network, of arrays or traced, with the kernels of its layers as codes.

  Args:
    params: float, whole.
    kind: of KINDS.

  Raises:
    ValueError: a kernel's inputs are not a multiple of 4.
  """
  return params | {'layers': _quantized(params['layers'], kind)}


def _quantized(tree: Any, kind: str) -> Any:
  if not isinstance(tree, Mapping):
    return tree
  if 'kernel' not in tree:
    return {name: _quantized(child, kind) for name, child in tree.items()}
  return {k: v for k, v in tree.items() if k != 'kernel'} | encode(tree['kernel'], kind)


def encode(kernel: jax.Array, kind: str) -> Params:
  """The codes and scales of a kernel [..., inputs, outputs]."""
  *lead, inputs, outputs = kernel.shape
  block = block_of(inputs)
  if block < 4:
    raise ValueError(
      f'lora.quantization={kind!r}: a kernel {kernel.shape} cannot be cut into blocks, because its '
      f'{inputs} inputs are no multiple of 4. Leave quantization out.'
    )
  x = kernel.astype(jnp.float32).reshape(*lead, inputs // block, block, outputs)
  absmax = jnp.max(jnp.abs(x), axis=-2)
  x = x / jnp.where(absmax > 0, absmax, 1.0)[..., None, :]
  if kind == 'int8':
    codes = jnp.round(127 * x).astype(jnp.int8)
  else:
    codes = sum((x > edge).astype(jnp.uint8) for edge in BETWEEN)
  codes = codes.reshape(*lead, inputs, outputs)
  if kind == 'nf4':
    codes = codes[..., 0::2, :] | codes[..., 1::2, :] << 4
  return {'codes': codes, 'absmax': absmax}


def decode(codes: jax.Array, absmax: jax.Array) -> jax.Array:
  """The kernel of codes and scales, in float32."""
  if codes.dtype == jnp.int8:
    x = codes.astype(jnp.float32) / 127
  else:
    pairs = jnp.stack([codes & 15, codes >> 4], axis=-2)  # [..., inputs / 2, 2, outputs]
    x = _value_of(pairs).reshape(*codes.shape[:-2], 2 * codes.shape[-2], codes.shape[-1])
  *lead, inputs, outputs = x.shape
  blocks = x.reshape(*lead, absmax.shape[-2], -1, outputs) * absmax[..., None, :]
  return blocks.reshape(*lead, inputs, outputs)


def _value_of(codes: jax.Array) -> jax.Array:
  """The values of NF4 by code: a tree of selections, because look-ups are slow on accelerators."""
  level = [jnp.float32(v) for v in NF4]
  for bit in range(4):
    is_odd = (codes >> bit & 1).astype(bool)
    level = [jnp.where(is_odd, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
  return level[0]


def is_quantized(params: Any) -> bool:
  """Whether a tree has codes in the place of a kernel."""
  return isinstance(params, Mapping) and (
    'codes' in params or any(map(is_quantized, params.values()))
  )


def _multiply(x, codes, absmax):
  kernel = decode(codes, absmax).astype(x.dtype)
  return x @ kernel.reshape(-1, kernel.shape[-1])


_product = jax.custom_vjp(_multiply)


def _forward(x, codes, absmax):
  # The product itself, so that a policy of rematerialisation sees it.
  return _multiply(x, codes, absmax), (codes, absmax)


def _backward(saved, gradient):
  kernel = decode(*saved).astype(gradient.dtype)
  return gradient @ kernel.reshape(-1, kernel.shape[-1]).T, None, None


_product.defvjp(_forward, _backward)


def dense(params: Params, x: jax.Array, dtype: Any) -> jax.Array:
  """A dense layer of flax with codes in the place of its kernel: [B,T,inputs] or [B,T,N,H] ->
  [B,T,outputs] in `dtype`. No gradient goes to codes and scales."""
  x = x.reshape(*x.shape[:2], -1).astype(dtype)
  y = _product(x, params['codes'], params['absmax'])
  if 'bias' in params:
    y = y + params['bias'].astype(dtype)[None, None]
  return y
