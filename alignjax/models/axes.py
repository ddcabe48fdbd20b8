"""The logical axes of every parameter of models/layers.py, to which sharding rules are applied, and
the dtypes of weights that are only read.

A pattern matches the end of a parameter's path. Stacked layers have a leading 'layers' axis, which
the code adds. An axis that no rule names is replicated. A parameter that no pattern matches is an
error.
"""

from __future__ import annotations

import re
from typing import Any

import jax

AXES = (
  (r'embed/tokens', ('vocab', 'table')),
  (r'embed/positions', (None, 'embed')),
  (r'attention/query/kernel', ('embed', 'heads')),
  (r'attention/(key|value)/kernel', ('embed', 'kv_heads')),
  (r'attention/query/bias', ('heads',)),
  (r'attention/(key|value)/bias', ('kv_heads',)),
  (r'attention/out/kernel', ('heads', None, 'embed')),
  (r'attention/out/bias', (None,)),
  (r'attention/(query|key)_norm/scale', (None,)),
  (r'mlp/(up|gate)/kernel', ('embed', 'mlp')),
  (r'mlp/(up|gate)/bias', ('mlp',)),
  (r'mlp/down/kernel', ('mlp', 'embed')),
  (r'mlp/down/bias', (None,)),
  (r'(post_)?norm(_\d)?/(scale|bias)', (None,)),
  (r'head/kernel', ('embed', 'vocab')),
  (r'score/kernel', ('embed', None)),
  (r'score/bias', (None,)),
)
# What stands beside a kernel or in its place lies where its inputs and outputs do: adapters
# (models/lora.py), and codes with their scales (models/quantized.py).
OF_KERNELS = {
  'lora_a': lambda axes: (*axes[:-1], None),
  'lora_b': lambda axes: (None, axes[-1]),
  'codes': lambda axes: axes,
  'absmax': lambda axes: (*axes[:-2], None, axes[-1]),  # Blocks may not divide where inputs do.
}
# The logical axes that only activations have: the rows of a batch, and of one that is sampled; the
# tokens between layers, and in them.
ACTIVATIONS = ('batch', 'rows', 'sequence', 'tokens')


def logical_names() -> list[str]:
  """All logical axes that a rule of c.sharding may name."""
  of_params = {axis for _, axes in AXES for axis in axes if axis is not None}
  return sorted({*of_params, 'layers', *ACTIVATIONS})


def logical_axes(params: Any) -> Any:
  """A tree like params (arrays or shapes) of tuples of axis names, with one name or None for each
  dimension."""

  def one(path, leaf):
    name = path_name(path)
    module, _, last = name.rpartition('/')
    kernel = f'{module}/kernel' if last in OF_KERNELS else name
    for pattern, axes in AXES:
      if re.search(f'(^|/){pattern}$', kernel):
        axes = OF_KERNELS[last](axes) if last in OF_KERNELS else axes
        axes = ('layers', *axes) if '/layers/' in f'/{name}' else axes
        if len(axes) != len(leaf.shape):
          raise ValueError(
            f'parameter {name} has shape {leaf.shape}, but models/axes.py gives it the axes {axes}.'
          )
        return axes
    raise ValueError(
      f'parameter {name} {leaf.shape} has no axes: add its pattern to AXES in models/axes.py.'
    )

  return jax.tree_util.tree_map_with_path(one, params)


def as_used(params: Any, dtype: Any) -> Any:
  """Weights (arrays or shapes) that are only read, in the dtype that every use casts them to:
  `dtype`, except for norms and scalar heads, which compute in float32, and for kernels in codes."""

  def one(path, leaf):
    if any(word in path_name(path) for word in ('norm', 'score', 'codes', 'absmax')):
      return leaf
    return (
      leaf.update(dtype=dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.astype(dtype)
    )

  return jax.tree_util.tree_map_with_path(one, params)


def path_name(path: tuple) -> str:
  """'policy/layers/mlp/up/kernel' for a key path of jax.tree_util."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)
