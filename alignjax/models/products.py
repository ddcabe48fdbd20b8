"""Matrix products whose result stays in the float32 of its accumulator, and whose backward products
are computed in the dtype of the operands.

Left to automatic differentiation, a product of bfloat16 arrays with a float32 result has a float32
cotangent, and both of its backward products then run in float32, at a fraction of the speed.
"""

from __future__ import annotations

import functools
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
  changes for float32 operands.
  """
  (left, right), (batch_left, batch_right) = dimensions
  hashable = ((tuple(left), tuple(right)), (tuple(batch_left), tuple(batch_right)))
  return _product(a, b, hashable, precision)
