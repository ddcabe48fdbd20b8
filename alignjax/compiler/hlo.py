"""Reads a compiled program's text: its loops, its collectives, its matrix products, and how often
each of them runs.

    module = parse(compiled.as_text())
    for site in walk(module): ...

XLA's own cost analysis counts a loop's body once; a decode loop of 1,024 tokens over 96 layers is
then lost in the noise. Here every instruction comes with the number of times that it runs in a
step. Pure text to records: no jax. What an instruction reads and writes follows XLA's
HloCostAnalysis (xla/service/hlo_cost_analysis.cc): slices count what they take.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BITS = {
  'pred': 8,
  's4': 4,
  'u4': 4,
  's8': 8,
  'u8': 8,
  's16': 16,
  'u16': 16,
  'bf16': 16,
  'f16': 16,
  's32': 32,
  'u32': 32,
  # f8e4m3fn and its like: 8
  'f32': 32,
  's64': 64,
  'u64': 64,
  'f64': 64,
  'c64': 64,
  'c128': 128,
}
COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
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
)  # moves no bytes of its own; nor does a -done


class Shape(NamedTuple):
  """An array: dtype and dims; space 0 is the device's main memory (HBM), others are on the chip."""

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def bytes(self) -> int:
    return math.prod(self.dims) * BITS.get(self.dtype, 8 if self.dtype.startswith('f8') else 0) // 8

  def __str__(self) -> str:
    return f'{self.dtype}[{",".join(map(str, self.dims))}]'


@dataclasses.dataclass(frozen=True)
class Instruction:
  """name = shapes opcode(operands), attributes. A tuple's shapes are its leaves; op_name is the
  source's path of scopes."""

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str
  arguments: str
  root: bool = False

  @property
  def op_name(self) -> str:
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found.group(1) if found else ''

  def called(self, *keys: str) -> list[str]:
    """Names of the computations in the attributes calls=, body=, condition=, to_apply=,
    branch_computations=."""
    out = []
    for key in keys:
      for group in re.findall(rf'\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)', self.attributes):
        out += re.findall(r'[\w.\-]+', group)
    return out


class Module(NamedTuple):
  computations: dict[str, dict[str, Instruction]]
  entry: str


class Site(NamedTuple):
  """An instruction where it stands: how many times a step runs it, its path of scopes (of the loop
  around it where it has none), whether it is a part of a fusion, and the loops around it, outermost
  first."""

  instruction: Instruction
  computation: dict[str, Instruction]
  times: int
  op_name: str
  fused: bool
  loops: tuple[str, ...]


class Collective(NamedTuple):
  """kind; bytes that each device receives in one run; the devices of a group; how many times it
  runs; where."""

  kind: str
  bytes: int
  group: tuple[int, ...]
  groups: int
  site: Site


def parse(text: str) -> Module:
  """Module of compiled.as_text(). ValueError where it is no HLO."""
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = '', None
  for line in text.splitlines():
    if current is None or line.startswith(('%', 'ENTRY')):
      found = re.match(r'(ENTRY )?%?([\w.\-]+) .*\{\s*$', line)
      if found and not line.startswith('HloModule'):
        current = computations.setdefault(found.group(2), {})
        entry = found.group(2) if found.group(1) else entry
    elif line.startswith('}'):
      current = None
    elif ' = ' in line:
      instruction = _instruction(line)
      current[instruction.name] = instruction
  if not entry:
    raise ValueError('no ENTRY computation: this is not the text of a compiled program.')
  return Module(computations, entry)


def _instruction(line: str) -> Instruction:
  name, rest = line.strip().split(' = ', 1)
  cut = _close(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  shape, rest = rest[:cut], rest[cut:].lstrip()
  start = rest.index('(')
  stop = _close(rest, start)
  arguments = rest[start + 1 : stop]
  return Instruction(
    name.removeprefix('ROOT ').lstrip('%'),
    rest[:start],
    _shapes(shape),
    tuple(re.findall(r'%([\w.\-]+)', arguments)),
    rest[stop + 1 :],
    arguments,
    name.startswith('ROOT '),
  )


def _close(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.compile(r'[()]').finditer(text, start):
    depth += 1 if found.group() == '(' else -1
    if not depth:
      return found.start()
  raise ValueError(f'unbalanced parentheses: {text[:80]!r}')


def _shapes(text: str) -> tuple[Shape, ...]:
  found = re.findall(r'([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?', text)
  return tuple(
    Shape(
      dtype,
      tuple(int(d.lstrip('<=')) for d in dims.split(',') if d),
      int((re.search(r'S\((\d+)\)', layout) or [0, 0])[1]),
    )
    for dtype, dims, layout in found
  )


def trips(module: Module, loop: Instruction) -> int:
  """How often the body of a while loop runs: what the compiler noted, or else what its condition
  says, `i < bound` with i from 0 (or a constant) by a constant step. Of a loop that may stop early,
  such as decoding: at most. ValueError where the condition says no such thing."""
  found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if found:
    return int(found.group(1))
  (condition,), (body,) = (
    [module.computations[c] for c in loop.called(key)] for key in ('condition', 'body')
  )
  root = next(i for i in body.values() if i.root)
  for compare, find in _unfused(module, condition):
    if compare.opcode != 'compare' or 'direction=LT' not in compare.attributes:
      continue
    counter, bound = map(find, compare.operands)
    place = re.search(r'index=(\d+)', counter.attributes)
    if counter.opcode != 'get-tuple-element' or bound.opcode != 'constant' or not place:
      continue
    kept = root.operands[int(place[1])]
    for step, find in _unfused(module, body, kept):
      steps = (
        [int(o.arguments) for o in map(find, step.operands) if o.opcode == 'constant']
        if step.opcode == 'add'
        else []
      )
      if len(steps) == 1:
        return -(-int(bound.arguments) // steps[0])
  raise ValueError(f'cannot tell how often the loop {loop.name} ({loop.op_name}) runs.')


def _unfused(module: Module, computation: dict[str, Instruction], name: str | None = None):
  """(instruction, find) of a computation's instructions, or of those that make `name`, and of those
  fused into them; find: operand -> the instruction that it stands for, outside of the fusion where
  it is a parameter."""
  outside = lambda operand: computation[operand]
  for instruction in computation.values() if name is None else [computation[name]]:
    while instruction.opcode in ('copy', 'bitcast'):
      instruction = computation[instruction.operands[0]]
    yield instruction, outside
    if instruction.opcode == 'fusion':
      inner = module.computations[instruction.called('calls')[0]]

      def find(operand, inner=inner, fusion=instruction):
        found = inner[operand]
        return (
          outside(fusion.operands[int(found.arguments)]) if found.opcode == 'parameter' else found
        )

      for part in inner.values():
        yield part, find


def walk(module: Module) -> Iterator[Site]:
  """Every instruction that a step runs, with how often."""

  def visit(name, times, op_name, fused, loops):
    computation = module.computations[name]
    for instruction in computation.values():
      site = Site(instruction, computation, times, instruction.op_name or op_name, fused, loops)
      yield site
      down = lambda key, times=times, fused=fused, loops=loops, site=site: [
        visit(c, times, site.op_name, fused, loops) for c in site.instruction.called(key)
      ]
      if instruction.opcode == 'while':
        inner = down('body', times * trips(module, instruction), fused, (*loops, instruction.name))
      elif instruction.opcode == 'fusion':
        inner = down('calls', times, True)
      elif instruction.opcode == 'conditional':
        inner = [
          v
          for key in ('branch_computations', 'true_computation', 'false_computation')
          for v in down(key)
        ]
      elif instruction.opcode in ('call', 'async-start'):
        inner = down('to_apply') + down('calls')
      else:
        inner = []
      for iterator in inner:
        yield from iterator

  yield from visit(module.entry, 1, '', False, ())


def collective(site: Site) -> Collective | None:
  """What an instruction sends between devices, or None. A -done only waits for what its -start
  sends."""
  instruction = site.instruction
  kind = instruction.opcode.removesuffix('-start')
  if kind not in COLLECTIVES:
    return None
  if (
    kind == 'all-reduce'
    and site.fused
    and any(i.opcode == 'dynamic-slice' for i in site.computation.values())
  ):
    # as TPU programs write it: the sum, and each device's piece of it, in one fusion
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
  return Collective(kind, round(size * share), group, groups, site)


def replica_group(attributes: str) -> tuple[tuple[int, ...], int]:
  """The devices of the first group, and the number of groups, of any notation:
  replica_groups={{0,1},{2,3}}; [2,2]<=[4] with an optional transposition T(1,0); mesh['a'=2,'b'=2]
  {'b'} with optional device_ids=([2,2]T(1,0)). Of a permutation its first source and target."""
  found = re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? '
    r'\{([^}]*)\}',
    attributes,
  )
  if found:
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found.group(1))}
    count = math.prod(axes.values())
    ids = np.arange(count).reshape([int(d) for d in (found.group(2) or str(count)).split(',')])
    ids = ids.transpose([int(d) for d in found.group(3).split(',')]) if found.group(3) else ids
    over = re.findall(r"'(\w+)'", found.group(4))
    ids = ids.reshape(list(axes.values())).transpose(
      [i for i, a in enumerate(axes) if a not in over] + [list(axes).index(a) for a in over]
    )
    ids = ids.reshape(-1, math.prod(axes[a] for a in over))
    return tuple(ids[0].tolist()), len(ids)
  found = re.search(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes)
  if found:
    dims = [int(d) for d in found.group(3).split(',')]
    ids = np.arange(math.prod(dims)).reshape(dims)
    if found.group(4):
      ids = ids.transpose([int(d) for d in found.group(4).split(',')])
    ids = ids.reshape(int(found.group(1)), int(found.group(2)))
    return tuple(ids[0].tolist()), len(ids)
  found = re.search(r'(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)+)\}', attributes)
  groups = (
    [[int(d) for d in g.split(',')] for g in re.findall(r'\{([\d,]+)\}', found.group(1))]
    if found
    else []
  )
  return (tuple(groups[0]), len(groups)) if groups else ((), 0)


def flops(site: Site) -> int:
  """Floating-point operations of one run of a matrix product or convolution (two for each
  multiply-add), 0 of all else."""
  instruction = site.instruction
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
  lhs, rhs, to = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes).groups()
  spatial = [c for c in to if c.isdigit()]
  window = dict(
    re.findall(
      r'(\w+)=([\dx_\-]+)',
      (re.search(r'window=\{([^}]*)\}', instruction.attributes) or ['', ''])[1],
    )
  )
  read = lambda key, default: window[key].split('x') if key in window else [default] * len(spatial)
  total = out * right.dims[rhs.index('i')]
  for c, size, stride, pad, ldil, rdil in zip(
    spatial,
    read('size', '1'),
    read('stride', '1'),
    read('pad', '0_0'),
    read('lhs_dilate', '1'),
    read('rhs_dilate', '1'),
    strict=True,
  ):
    n_out, n_in = instruction.shapes[0].dims[to.index(c)], left.dims[lhs.index(c)]
    low = int(pad.split('_')[0])
    # what each tap reads
    at = np.arange(n_out)[:, None] * int(stride) - low + np.arange(int(size)) * int(rdil)
    valid = (at >= 0) & (at < (n_in - 1) * int(ldil) + 1) & (at % int(ldil) == 0)
    total = total // n_out * int(valid.sum())
  return 2 * total


def traffic(module: Module, site: Site) -> int:
  """Bytes of main memory that one run of an instruction reads and writes; 0 inside a fusion, whose
  values stay on the chip."""
  instruction = site.instruction
  if (
    site.fused
    or instruction.opcode in FREE
    or instruction.opcode.endswith('-done')
    or collective(site)
  ):
    return 0
  of = lambda name: (
    sum(s.bytes for s in site.computation[name].shapes if s.space == 0)
    if name in site.computation
    else 0
  )
  # the rest is what is copied
  shapes = instruction.shapes[:1] if instruction.opcode.endswith('-start') else instruction.shapes
  written = sum(s.bytes for s in shapes if s.space == 0)
  if instruction.opcode in ('dynamic-slice', 'slice', 'gather'):
    return 2 * written
  if instruction.opcode == 'dynamic-update-slice':
    return 2 * of(instruction.operands[1])
  if instruction.opcode != 'fusion':
    return written + sum(map(of, instruction.operands))
  inner = module.computations[instruction.called('calls')[0]]
  parameters = {int(i.arguments): i.name for i in inner.values() if i.opcode == 'parameter'}
  total = written
  for number, operand in enumerate(instruction.operands):
    size = of(operand)
    if size and number in parameters:
      sliced = _sliced(inner, parameters[number])
      if sliced is not None:
        taken, in_place = sliced
        # the output is the same buffer: only the update is written
        total -= size if in_place else 0
        size = min(size, taken)
    total += size
  return max(total, 0)


def _sliced(computation: dict[str, Instruction], name: str) -> tuple[int, bool] | None:
  """Where a fusion only takes slices of a parameter, or updates one in place: (bytes touched, in
  place)."""
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
