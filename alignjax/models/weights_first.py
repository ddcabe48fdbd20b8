"""Products of a decoding step as weights times activations, for CPUs.

XLA's products on a CPU copy their right factor into another layout first. A decoding step has few
rows and reads every weight once, so with 16 rows this copy cost a quarter of the time of a layer's
products, and two fifths of that of the vocabulary's; with 1 or 256 rows it cost nothing. Here the
weights are the left factor, in a layout that is made once before the loop.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from alignjax.models.axes import path_name


def relayout(params: Any) -> Any:
  """The parameters with every kernel [..., outputs] as [outputs, inputs]."""

  def one(path, leaf):
    if not path_name(path).endswith('kernel'):
      return leaf
    return leaf.reshape(-1, leaf.shape[-1]).T

  return jax.tree_util.tree_map_with_path(one, params)


def multiply(x: jax.Array, weights: jax.Array) -> jax.Array:
  """x [...,inputs] times weights [outputs,inputs], summed over the inputs: [...,outputs]."""
  rows = x.reshape(-1, x.shape[-1])
  out = jax.lax.dot_general(weights, rows, (((1,), (1,)), ((), ())))
  # XLA would exchange the factors of a transposed product.
  return jax.lax.optimization_barrier(out).T.reshape(*x.shape[:-1], -1)


def projections():
  """A context in which the dense layers of flax read kernels that `relayout` has made."""

  def call(layer, args, kwargs, context):
    if not isinstance(context.module, (nn.Dense, nn.DenseGeneral)):
      return layer(*args, **kwargs)
    params = context.module.variables['params']
    kernel, (x,) = params['kernel'], args
    if x.ndim == 4:  # The heads [B,T,N,H] are one axis of inputs.
      x = x.reshape(*x.shape[:2], -1)
    x = multiply(x, kernel)
    if 'bias' in params:
      x = x + params['bias'].reshape((1,) * (x.ndim - 1) + (-1,))
    return x

  return nn.intercept_methods(call)
