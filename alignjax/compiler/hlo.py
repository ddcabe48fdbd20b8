"""Reads the text of a compiled program: its instructions, and how often each of them runs.

    module = parse(compiled.as_text())
    for site in walk(module): ...

XLA's own cost analysis counts the body of a loop once, so that a decoding loop of 1,024 tokens over
96 layers is lost in the noise. Here every instruction comes with the number of times that a step
runs it. The functions turn text into records and do not use jax. What an instruction costs is in
compiler/operations.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bits of an element. The 8-bit floats have many names (f8e4m3fn, ...), which Shape.bytes knows.
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
  'f32': 32,
  's64': 64,
  'u64': 64,
  'f64': 64,
  'c64': 64,
  'c128': 128,
}


class Shape(NamedTuple):
  """An array.

  Attributes:
    dtype: XLA's name of the element type, such as 'bf16'.
    dims: the sizes of the axes.
    space: 0 is the device's main memory (HBM), other numbers are memories on the chip.
  """

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
  """One line of a program: name = shapes opcode(arguments), attributes.

  Attributes:
    name: unique in its computation.
    opcode: what it does, such as 'dot'.
    shapes: the shape of its result; of a tuple those of its leaves.
    operands: the names of the instructions that it reads.
    attributes: the text behind the arguments.
    arguments: the text between the parentheses.
    root: whether its result is that of the computation.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str
  arguments: str
  root: bool = False

  @property
  def op_name(self) -> str:
    """The path of scopes in the source, or ''."""
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
  """A program.

  Attributes:
    computations: name -> {name: instruction}, in the order of the schedule.
    entry: the name of the computation that a step runs.
  """

  computations: dict[str, dict[str, Instruction]]
  entry: str


class Site(NamedTuple):
  """An instruction at its place in the program.

  Attributes:
    instruction: the instruction.
    computation: the instructions among which it stands, by name.
    times: how many times a step runs it.
    op_name: its path of scopes, or that of the loop around it where it has none.
    fused: whether it is a part of a fusion.
    loops: the names of the loops around it, outermost first.
  """

  instruction: Instruction
  computation: dict[str, Instruction]
  times: int
  op_name: str
  fused: bool
  loops: tuple[str, ...]


def parse(text: str) -> Module:
  """The Module of compiled.as_text(). Raises ValueError where the text is no HLO."""
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = '', None
  # The attributes of a kernel in Pallas go on in lines that begin with a quotation mark or }}.
  for line in re.sub(r'\n(?="|\}[^\s])', ' ', text).splitlines():
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
    name=name.removeprefix('ROOT ').lstrip('%'),
    opcode=rest[:start],
    shapes=_shapes(shape),
    operands=tuple(re.findall(r'%([\w.\-]+)', arguments)),
    attributes=rest[stop + 1 :],
    arguments=arguments,
    root=name.startswith('ROOT '),
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


def trips(module: Module, computation: dict[str, Instruction], loop: Instruction) -> int:
  """How often the body of a while loop runs; the most that it can, of a loop that may stop early,
  such as decoding.

  It is what the compiler has noted, or else what the condition says: `i < bound`, where i grows by
  a constant step. i starts at a constant, or where an earlier loop over i ends, as in the segments
  of decoding, or else at 0. Where that is the bound, as for a batch that is halved when some of its
  rows have ended, the loop counts as run once, so that what is in it is seen. `computation` holds
  the loop. Raises ValueError where the condition has another form.
  """
  found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if found:
    return int(found.group(1))
  return max(1, len(_counter(module, computation, loop)[1]))


def _counter(
  module: Module, computation: dict[str, Instruction], loop: Instruction
) -> tuple[int, range]:
  """(place in the loop's tuple, values) of the i in a condition `i < bound`."""
  (condition,), (body,) = (
    [module.computations[c] for c in loop.called(key)] for key in ('condition', 'body')
  )
  root = next(i for i in body.values() if i.root)
  for compare, find in _unfused(module, condition):
    if compare.opcode != 'compare' or 'direction=LT' not in compare.attributes:
      continue
    counter, bound = map(find, compare.operands)
    place = _place(counter)
    if bound.opcode != 'constant' or place is None:
      continue
    for step, find in _unfused(module, body, root.operands[place]):
      if step.opcode != 'add':
        continue
      steps = [int(o.arguments) for o in map(find, step.operands) if o.opcode == 'constant']
      if len(steps) == 1:
        start = _start(module, computation, loop, place)
        return place, range(start, int(bound.arguments), steps[0])
  raise ValueError(f'cannot tell how often the loop {loop.name} ({loop.op_name}) runs.')


def _start(
  module: Module, computation: dict[str, Instruction], loop: Instruction, place: int
) -> int:
  """Where the counter at `place` of a loop's tuple starts; 0 where that is not known."""
  given = computation[loop.operands[0]]
  if given.opcode != 'tuple':
    return 0
  start = computation[given.operands[place]]
  while start.opcode in ('copy', 'bitcast'):
    start = computation[start.operands[0]]
  if start.opcode == 'constant':
    return int(start.arguments)
  if _place(start) is None:
    return 0
  before = computation[start.operands[0]]
  if before.opcode != 'while':
    return 0
  place, values = _counter(module, computation, before)
  return values.start + len(values) * values.step if place == _place(start) else 0


def _place(instruction: Instruction) -> int | None:
  """The index of a get-tuple-element, None of other instructions."""
  if instruction.opcode != 'get-tuple-element':
    return None
  found = re.search(r'index=(\d+)', instruction.attributes)
  return int(found.group(1)) if found else None


def _unfused(module: Module, computation: dict[str, Instruction], name: str | None = None):
  """Yields (instruction, find) for the instructions of a computation, or only for the one that
  computes `name`, and for those that are fused into them. find: operand -> the instruction that it
  stands for, which is outside of the fusion where the operand is a parameter."""
  outside = computation.__getitem__
  for instruction in computation.values() if name is None else [computation[name]]:
    while instruction.opcode in ('copy', 'bitcast'):
      instruction = computation[instruction.operands[0]]
    yield instruction, outside
    if instruction.opcode == 'fusion':
      inner = module.computations[instruction.called('calls')[0]]

      def find(operand, inner=inner, fusion=instruction):
        found = inner[operand]
        if found.opcode == 'parameter':
          return outside(fusion.operands[int(found.arguments)])
        return found

      for part in inner.values():
        yield part, find


def walk(module: Module) -> Iterator[Site]:
  """Yields every instruction that a step runs."""
  yield from _walk(module, module.entry, times=1, op_name='', fused=False, loops=())


def _walk(module, name, times, op_name, fused, loops) -> Iterator[Site]:
  computation = module.computations[name]
  for instruction in computation.values():
    site = Site(
      instruction=instruction,
      computation=computation,
      times=times,
      op_name=instruction.op_name or op_name,
      fused=fused,
      loops=loops,
    )
    yield site
    inside = dict(times=times, op_name=site.op_name, fused=fused, loops=loops)
    if instruction.opcode == 'while':
      keys = ('body',)
      inside['times'] = times * trips(module, computation, instruction)
      inside['loops'] = (*loops, instruction.name)
    elif instruction.opcode == 'fusion':
      keys = ('calls',)
      inside['fused'] = True
    elif instruction.opcode == 'conditional':
      keys = ('branch_computations', 'true_computation', 'false_computation')
    elif instruction.opcode in ('call', 'async-start'):
      keys = ('to_apply', 'calls')
    else:
      keys = ()
    for key in keys:
      for called in instruction.called(key):
        yield from _walk(module, called, **inside)
