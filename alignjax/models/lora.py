"""Low-rank adapters as a transform of parameters (LoRA, Hu et al. 2021).

The kernel W of a projection stays as it is, and (alpha / rank) A B is added to it, with A [inputs,
rank] and B [rank, outputs]. A tree of adapters mirrors the parameters and holds what is trained
alone:

  {'layers': {'attention': {'query': {'lora_a' [L,D,r], 'lora_b' [L,r,N*H]}, ...}, 'mlp': {...}},
   'final': {'score': {...}}}     the scalar head of a reward or value model is trained whole

`join` puts the two together without a copy. The networks read the joined tree: inside a layer, x W
+ (x A) B is computed (`projections`), so that the backward pass has no product for the gradient of
W. Sampling reads W + A B, which is made once before the loop (`merge`). W may be kept in 8 or 4
bits (models/quantized.py).

Where peft (huggingface/peft, tuners/lora/layer.py) has one A for a fused projection, as GPT-2's
c_attn, there is one A for each of query, key and value here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from alignjax.models import quantized
from alignjax.types import Networks, Params

TARGETS = ('query', 'key', 'value', 'out', 'up', 'gate', 'down')
LEAVES = ('lora_a', 'lora_b')


class LoRA(NamedTuple):
  """The declaration of adapters.

  Attributes:
    rank: the columns of A, and the rows of B.
    alpha: A B is multiplied by alpha / rank.
    targets: the projections that have adapters, of TARGETS; () means all that the architecture has.
    quantization: how the frozen kernels of the layers are kept, of quantized.KINDS; None keeps them
      in the dtype of the computation.
  """

  rank: int
  alpha: float = 32.0
  targets: tuple[str, ...] = ()
  quantization: str | None = None

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


def declared(entry: Mapping[str, Any] | None, where: str) -> LoRA | None:
  """The declaration of a config's entry, or None where it is missing or its rank is 0. Raises
  ValueError with the key `where`."""
  if not entry:
    return None
  if unknown := [name for name in entry if name not in LoRA._fields]:
    raise ValueError(f'{where}.{unknown[0]} is no entry of lora: {", ".join(LoRA._fields)}.')
  rank, alpha = entry.get('rank'), entry.get('alpha', 32.0)
  targets = tuple(entry.get('targets') or ())
  if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
    raise ValueError(f'{where}.rank={rank!r} must be a whole number, or 0 for no adapters.')
  if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
    raise ValueError(f'{where}.alpha={alpha!r} must be a number above 0.')
  if wrong := [name for name in targets if name not in TARGETS]:
    raise ValueError(f'{where}.targets: {wrong[0]!r} is none of {", ".join(TARGETS)}.')
  if (kind := entry.get('quantization')) not in (None, *quantized.KINDS):
    raise ValueError(
      f'{where}.quantization={kind!r} must be None or one of {", ".join(quantized.KINDS)}.'
    )
  if kind and not rank:
    raise ValueError(
      f'{where}.quantization={kind!r} needs adapters, since what is quantised is not trained: set '
      f'{where}.rank.'
    )
  return LoRA(rank, float(alpha), targets, kind) if rank else None


def is_adapters(params: Params) -> bool:
  """Whether a tree is one of adapters rather than all parameters of a network."""
  return 'embed' not in params


def init(lora: LoRA, params: Params, key: jax.Array) -> Params:
  """Fresh adapters for the layers of `params` (arrays or shapes), whose product is 0: A is uniform
  in +-1 / sqrt(inputs) and B is 0, as in peft.

  Raises:
    ValueError: the architecture lacks a target, or a kernel has a smaller side than the rank.
  """
  found: dict[str, Any] = {}
  chosen = [
    (group, name, module['kernel'].shape)
    for group, modules in params['layers'].items()
    for name, module in modules.items()
    if name in (lora.targets or TARGETS)
  ]
  for group, name, (layers, *inputs, outputs) in chosen:
    size = math.prod(inputs)
    if lora.rank > min(size, outputs):
      raise ValueError(
        f'lora.rank={lora.rank} is more than {name} can use, which has {size} inputs and {outputs} '
        f'outputs: lower it to {min(size, outputs)}, with which A B can be any matrix, or less.'
      )
    own, bound = jax.random.fold_in(key, TARGETS.index(name)), size**-0.5
    found.setdefault(group, {})[name] = {
      'lora_a': jax.random.uniform(own, (layers, *inputs, lora.rank), minval=-bound, maxval=bound),
      'lora_b': jnp.zeros((layers, lora.rank, outputs)),
    }
  there = {name for _, name, _ in chosen}
  if missing := [name for name in lora.targets if name not in there]:
    raise ValueError(f'lora.targets: this architecture has no projection {missing[0]!r}.')
  return {'layers': found}


def join(params: Params, adapters: Params, scale: float) -> Params:
  """All parameters of a network, with those of `adapters` added or in the place of its own. scale:
  of the products A B; B is multiplied by it."""
  joined = dict(params)
  for name, own in adapters.items():
    if isinstance(own, Mapping):
      joined[name] = join(params.get(name, {}), own, scale)
    else:
      joined[name] = own * scale if name == 'lora_b' else own
  return joined


def rescaled(adapters: Params, factor: float) -> Params:
  """The adapters with B multiplied by a factor."""
  return join({}, adapters, factor)


def is_joined(params: Params) -> bool:
  """Whether a tree has adapters, or codes in the place of a kernel, so that `merge` changes it."""
  return isinstance(params, Mapping) and (
    'lora_a' in params or 'codes' in params or any(map(is_joined, params.values()))
  )


def merge(params: Params) -> Params:
  """A joined tree, of stacked layers or of one, with A B added to the kernels in float32. Every
  kernel keeps its dtype, and one that was in codes comes in float32."""
  if not isinstance(params, Mapping):
    return params
  if 'codes' in params:
    kernel = {'kernel': quantized.decode(params['codes'], params['absmax'])}
    return merge({k: v for k, v in params.items() if k not in quantized.LEAVES} | kernel)
  if 'lora_a' not in params:
    return {name: merge(child) for name, child in params.items()}
  kernel, a, b = params['kernel'], params['lora_a'], params['lora_b']
  product = lambda a, b: jnp.tensordot(a, b, 1, precision='highest')  # noqa: E731
  delta = (jax.vmap(product) if b.ndim == 3 else product)(
    a.astype(jnp.float32), b.astype(jnp.float32)
  )
  merged = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
  return {k: v for k, v in params.items() if k not in LEAVES} | {'kernel': merged}


def projections():
  """A context in which the dense layers of flax read kernels in codes, and add (x A) B where their
  parameters have it."""

  def call(layer, args, kwargs, context):
    if not isinstance(context.module, (nn.Dense, nn.DenseGeneral)):
      return layer(*args, **kwargs)
    params = context.module.variables.get('params', {})
    (x,) = args
    if 'codes' in params:
      y = quantized.dense(params, x, context.module.dtype)
    else:
      y = layer(*args, **kwargs)
    if 'lora_a' not in params:
      return y
    a, b = (params[name].astype(y.dtype) for name in LEAVES)
    return y + jnp.tensordot(x.astype(y.dtype), a, a.ndim - 1) @ b

  return nn.intercept_methods(call)


def base_of(bases: Mapping[str, Params], head: str) -> Params:
  """What adapters of a head belong to. bases: see networks."""
  return bases.get(head, bases.get('shared'))


def networks(nets: Networks, bases: Mapping[str, Params] | None, scale: float) -> Networks:
  """Networks that read trees of adapters too.

  Args:
    nets: the networks of whole parameters.
    bases: what the adapters belong to: 'lm' of a policy, 'scalar' of a reward or value model, or
      'shared' of both. None or {}: nothing, and nets are returned.
    scale: of the products A B.
  """
  if not bases:
    return nets

  def reading(function, kind):
    base = base_of(bases, kind)

    def call(params, *args, **kwargs):
      if is_adapters(params):
        params = join(base, params, scale)
      return function(params, *args, **kwargs)

    return call

  return nets._replace(
    logits=reading(nets.logits, 'lm'),
    logprobs=reading(nets.logprobs, 'lm'),
    scalar=reading(nets.scalar, 'scalar'),
    decoder=nets.decoder._replace(prepare=reading(nets.decoder.prepare, 'lm')),
  )
