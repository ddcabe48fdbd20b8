"""Matrix products: of the rows of a batch with a kernel, and with a float32 result."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(a, b, dimensions, precision):
  return jax.lax.dot_general(
    a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
  )


def _forward(a, b, dimensions, precision):
  return _product(a, b, dimensions, precision), (a, b)


def _backward(dimensions, precision, operands, gradient):
  a, b = operands
  dtype = jnp.result_type(a, b)

  def product(a, b):
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=dtype)

  return jax.vjp(product, a, b)[1](gradient.astype(dtype))


_product.defvjp(_forward, _backward)


def to_float32(a: jax.Array, b: jax.Array, dimensions: Any, precision: Any = None) -> jax.Array:
  """The product of two arrays of one dtype in float32, with the arguments of jax.lax.dot_general.

  Rounded to bfloat16, a logit near 20 would move in steps of 0.125. The cotangent is rounded to the
  dtype of the operands; the backward products accumulate in float32 all the same, and nothing
  changes for float32 operands. Left to automatic differentiation, the cotangent of a float32 result
  would be float32, and both backward products would run in float32, at a fraction of the speed.
  """
  (left, right), (batch_left, batch_right) = dimensions
  hashable = ((tuple(left), tuple(right)), (tuple(batch_left), tuple(batch_right)))
  return _product(a, b, hashable, precision)


def of_rows(
  x: jax.Array,
  kernel: jax.Array,
  dimensions: Any,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> jax.Array:
  """The product of a dense layer of flax, with the arguments of jax.lax.dot_general, for CPUs.

  All tokens of the batch are rows of one matrix. Where x keeps the axes of batch and tokens, XLA
  sums over both in the gradient of the kernel, and on CPUs it transposes x and the gradient in
  memory first.

  Args:
    x: [..., *inputs]; its last axes are summed over.
    kernel: [*inputs, *outputs]; its first axes are summed over.
  """
  (_, summed), _ = dimensions
  inputs, outputs = kernel.shape[: len(summed)], kernel.shape[len(summed) :]
  rows = x.shape[: x.ndim - len(inputs)]
  out = jax.lax.dot_general(
    x.reshape(math.prod(rows), math.prod(inputs)),
    kernel.reshape(math.prod(inputs), math.prod(outputs)),
    (((1,), (0,)), ((), ())),
    precision=precision,
    preferred_element_type=preferred_element_type,
  )
  return out.reshape(*rows, *outputs)
