"""A number for each array of a tree that changes when any bit of the array does. Checkpoints are
compared with these numbers.

They are computed where the arrays live, in one pass over their memory, and are the same on every
mesh, because a sum of integers does not depend on its order. They thus cover the whole way to the
disk and back, whatever wrote the files and wherever they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksum(x: jax.Array) -> jax.Array:
  """u32[]: the sum of a mix of each element's bits with its place. One changed element always
  changes it; several change it in all but one case of 2^32. The mix is the finalizer of MurmurHash3
  (Appleby, public domain)."""
  bits = (
    x.astype(jnp.uint8)
    if x.dtype == bool
    else jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}'))
  )
  place, stride = jnp.zeros(x.shape, jnp.uint32), 1
  for axis in reversed(range(x.ndim)):
    place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % 2**32)
    stride *= x.shape[axis]
  mixed = bits.astype(jnp.uint32) ^ place * np.uint32(0x9E3779B1)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    mixed = (mixed ^ mixed >> np.uint32(shift)) * np.uint32(factor)
  return jnp.sum(mixed ^ mixed >> np.uint32(16), dtype=jnp.uint32)


@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {name: checksum(x) for name, x in leaves.items()}


def describe(leaves: Mapping[str, Any]) -> dict[str, list]:
  """{name: [shape, dtype, checksum]} of arrays of at most 32 bits per element, as JSON values.

  One program computes all checksums: jax's CPU devices hang over several processes when more than
  32 programs with collectives wait in a row.
  """
  sums = jax.device_get(_checksums(dict(leaves)))
  return {name: [list(x.shape), str(x.dtype), int(sums[name])] for name, x in leaves.items()}


def different(leaves: Mapping[str, Any], described: Mapping[str, list]) -> list[str]:
  """The names of the arrays whose shape, dtype or bits differ from those of `describe`."""
  return [name for name, found in describe(leaves).items() if found != described.get(name)]
