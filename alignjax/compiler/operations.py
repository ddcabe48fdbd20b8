"""What one instruction of a compiled program costs: floating-point operations, bytes of main memory
and bytes between devices.

What an instruction reads and writes follows XLA's HloCostAnalysis
(xla/service/hlo_cost_analysis.cc): a slice counts what it takes.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

from alignjax.compiler.hlo import Instruction, Module, Shape, Site

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# Instructions that move no bytes of their own; nor does a -done instruction.
FREE = frozenset(
  (
    'parameter',
    'constant',
    'tuple',
    'get-tuple-element',
    'bitcast',
    'while',
    'conditional',
    'call',
    'after-all',
    'iota',
    'partition-id',
    'replica-id',
    'async-start',
    'async-update',
    'add-dependency',
    'optimization-barrier',
  )
)


class Collective(NamedTuple):
  """Communication between devices.

  Attributes:
    kind: one of COLLECTIVES.
    bytes: bytes that each device receives in one run.
    group: the devices of the first group.
    groups: the number of groups.
    site: where it stands, and how often it runs.
  """

  kind: str
  bytes: int
  group: tuple[int, ...]
  groups: int
  site: Site


def collective(site: Site) -> Collective | None:
  """What an instruction sends between devices, or None. A -done instruction only waits for what its
  -start instruction sends."""
  instruction = site.instruction
  kind = instruction.opcode.removesuffix('-start')
  if kind not in COLLECTIVES:
    return None
  if (
    kind == 'all-reduce'
    and site.fused
    and any(i.opcode == 'dynamic-slice' for i in site.computation.values())
  ):
    # This is how TPU programs write it: the sum, and each device's piece of it, in one fusion.
    kind = 'reduce-scatter'
  group, groups = replica_group(instruction.attributes)
  size = sum(
    s.bytes
    for o in instruction.operands
    if o in site.computation
    for s in site.computation[o].shapes
  )
  n = len(group)
  share = {
    'all-gather': n - 1,
    'reduce-scatter': (n - 1) / n,
    'all-reduce': 2 * (n - 1) / n,
    'all-to-all': (n - 1) / n,
    'ragged-all-to-all': (n - 1) / n,
  }.get(kind, 1.0)
  return Collective(kind=kind, bytes=round(size * share), group=group, groups=groups, site=site)


def replica_group(attributes: str) -> tuple[tuple[int, ...], int]:
  """The devices of the first group, and the number of groups; ((), 0) where there is none.

  There are three notations: the list replica_groups={{0,1},{2,3}}; the array [2,2]<=[4], with an
  optional transposition T(1,0); and the mesh mesh['a'=2,'b'=2] {'b'}, with optional
  device_ids=([2,2]T(1,0)). A permutation has its first source and target.
  """
  for read in (_mesh_groups, _array_groups):
    groups = read(attributes)
    if groups is not None:
      return tuple(groups[0].tolist()), len(groups)
  found = re.search(r'(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)+)\}', attributes)
  listed = re.findall(r'\{([\d,]+)\}', found.group(1)) if found else []
  if not listed:
    return (), 0
  return tuple(_integers(listed[0])), len(listed)


def _mesh_groups(attributes: str) -> np.ndarray | None:
  """i[groups, devices of a group] in the notation of a mesh, or None."""
  found = re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? '
    r'\{([^}]*)\}',
    attributes,
  )
  if not found:
    return None
  sizes, shape, order, names = found.groups()
  axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
  count = math.prod(axes.values())
  ids = np.arange(count).reshape(_integers(shape or str(count)))
  if order:
    ids = ids.transpose(_integers(order))
  over = re.findall(r"'(\w+)'", names)
  ids = ids.reshape(list(axes.values())).transpose(
    [i for i, axis in enumerate(axes) if axis not in over] + [list(axes).index(a) for a in over]
  )
  return ids.reshape(-1, math.prod(axes[axis] for axis in over))


def _array_groups(attributes: str) -> np.ndarray | None:
  """i[groups, devices of a group] in the notation of an array, or None."""
  found = re.search(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes)
  if not found:
    return None
  groups, size, shape, order = found.groups()
  dims = _integers(shape)
  ids = np.arange(math.prod(dims)).reshape(dims)
  if order:
    ids = ids.transpose(_integers(order))
  return ids.reshape(int(groups), int(size))


def _integers(text: str) -> list[int]:
  return [int(digits) for digits in text.split(',')]


def flops(site: Site) -> int:
  """Floating-point operations of one run of a matrix product, a convolution or a kernel of
  attention, two for each multiply-add; 0 of every other instruction."""
  instruction = site.instruction
  if products := _attention_products(instruction):
    return _attention_flops(site, products)
  cublas = (
    instruction.opcode == 'custom-call'
    and 'custom_call_target="__cublas$' in instruction.attributes
  )
  if instruction.opcode not in ('dot', 'convolution') and not cublas:
    return 0
  left, right = (site.computation[o].shapes[0] for o in instruction.operands[:2])
  out = math.prod(instruction.shapes[0].dims)
  if instruction.opcode == 'dot' or cublas:
    dims = re.search(
      r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', instruction.attributes
    ).group(1)
    return 2 * out * math.prod(left.dims[int(d)] for d in re.findall(r'\d+', dims))
  return 2 * _multiply_adds(instruction, left, right)


def _attention_products(instruction: Instruction) -> int:
  """The matrix products of [T,H] with [H,S], or of that size, that a kernel of attention computes
  for each head: of the forward pass 2, of the backward pass 5. splash computes two of these twice,
  because the gradients of queries and of keys and values are kernels of their own. 0 of every other
  instruction."""
  if instruction.opcode != 'custom-call':
    return 0
  found = re.search(r'splash_mha_(fwd|dkv|dq)', f'{instruction.name} {instruction.op_name}')
  if found and 'custom_call_target="tpu_custom_call"' in instruction.attributes:
    return {'fwd': 2, 'dkv': 4, 'dq': 3}[found[1]]
  found = re.search(r'custom_call_target="__cudnn\$fmha\w*?(Backward)?"', instruction.attributes)
  return 0 if not found else 5 if found[1] else 2


def _attention_flops(site: Site, products: int) -> int:
  """What a kernel of attention with so many products computes: splash the blocks of
  [queries, keys] that a causal mask leaves something of, cuDNN half of all pairs. Where devices
  share the tokens of a row, the queries of each are the last ones (models/sequence.py)."""
  shapes = [
    site.computation[o].shapes[0] for o in site.instruction.operands if o in site.computation
  ]
  q, k = [s for s in shapes if s.dtype in ('bf16', 'f16', 'f32')][:2]
  if 'fmha' in site.instruction.attributes:  # [B,T,N,H]
    pairs, causal = k.dims[-3], '_CAUSAL' in site.instruction.attributes
    causal = causal or '"CAUSAL"' in site.instruction.attributes
    return products * 2 * math.prod(q.dims) * pairs // (2 if causal else 1)
  own, keys, blocks = q.dims[-2], k.dims[-2], shapes[0].dims[-2]  # one number for each block
  seen = 2 * blocks * (keys - own) + own * (blocks + 1)  # [B,N,T,H] x [B,G,S,H]
  return products * 2 * math.prod(q.dims) * seen // (2 * blocks)


def _multiply_adds(convolution: Instruction, left: Shape, right: Shape) -> int:
  """Multiply-adds of a convolution: of every tap only those that do not read padding."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', convolution.attributes)
  lhs, rhs, to = labels.groups()
  spatial = [c for c in to if c.isdigit()]
  found = re.search(r'window=\{([^}]*)\}', convolution.attributes)
  window = dict(re.findall(r'(\w+)=([\dx_\-]+)', found[1])) if found else {}

  def read(key, default):
    return window[key].split('x') if key in window else [default] * len(spatial)

  out = convolution.shapes[0].dims
  total = math.prod(out) * right.dims[rhs.index('i')]
  for axis, size, stride, pad, lhs_dilate, rhs_dilate in zip(
    spatial,
    read('size', '1'),
    read('stride', '1'),
    read('pad', '0_0'),
    read('lhs_dilate', '1'),
    read('rhs_dilate', '1'),
    strict=True,
  ):
    n_out, n_in = out[to.index(axis)], left.dims[lhs.index(axis)]
    low = int(pad.split('_')[0])
    # The index that each tap (second axis) reads for each output (first axis).
    taps = np.arange(int(size)) * int(rhs_dilate)
    at = np.arange(n_out)[:, None] * int(stride) - low + taps
    inside = (at >= 0) & (at < (n_in - 1) * int(lhs_dilate) + 1)
    valid = inside & (at % int(lhs_dilate) == 0)
    total = total // n_out * int(valid.sum())
  return total


def traffic(module: Module, site: Site) -> int:
  """Bytes of main memory that one run of an instruction reads and writes. They are 0 inside of a
  fusion, whose values stay on the chip."""
  instruction = site.instruction
  if (
    site.fused
    or instruction.opcode in FREE
    or instruction.opcode.endswith('-done')
    or collective(site)
  ):
    return 0

  def bytes_of(name):
    if name not in site.computation:
      return 0
    return sum(s.bytes for s in site.computation[name].shapes if s.space == 0)

  # The first shape of a -start instruction is its result, the others are what it copies.
  shapes = instruction.shapes[:1] if instruction.opcode.endswith('-start') else instruction.shapes
  written = sum(s.bytes for s in shapes if s.space == 0)
  if instruction.opcode in ('dynamic-slice', 'slice', 'gather'):
    return 2 * written
  if instruction.opcode == 'dynamic-update-slice':
    return 2 * bytes_of(instruction.operands[1])
  if instruction.opcode != 'fusion':
    return written + sum(map(bytes_of, instruction.operands))
  inner = module.computations[instruction.called('calls')[0]]
  parameters = {int(i.arguments): i.name for i in inner.values() if i.opcode == 'parameter'}
  total = written
  for number, operand in enumerate(instruction.operands):
    size = bytes_of(operand)
    if size and number in parameters:
      sliced = _sliced(inner, parameters[number])
      if sliced is not None:
        taken, in_place = sliced
        # The output is the same buffer, of which only the update is written.
        total -= size if in_place else 0
        size = min(size, taken)
    total += size
  return max(total, 0)


def _sliced(computation: dict[str, Instruction], name: str) -> tuple[int, bool] | None:
  """(bytes touched, whether in place) of a parameter of which a fusion only takes slices, or which
  it updates in place; None of any other parameter."""
  taken, in_place, names = 0, False, {name}
  for user in computation.values():
    if not names & set(user.operands):
      continue
    if user.opcode in ('bitcast', 'get-tuple-element'):
      names.add(user.name)
    elif user.opcode in ('dynamic-slice', 'slice', 'gather') and user.operands[0] in names:
      taken += sum(s.bytes for s in user.shapes)
    elif user.opcode == 'dynamic-update-slice' and user.operands[0] in names:
      taken, in_place = taken + 2 * sum(s.bytes for s in computation[user.operands[1]].shapes), True
    else:
      return None
  return taken, in_place
