"""Which arrays are alive together at the fullest point of a compiled step, read off its schedule.

This is an estimate that shows what to make smaller: the compiler's own assignment
(compiled.memory_analysis()) says how much memory is used, and this says what uses it. An array
lives from the instruction that computes it to its last reader. Tuples, bitcasts, loops and updates
in place create no array; what the body of a loop hands to its next turn takes the place of what it
received.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from alignjax.compiler import hlo, operations

# Instructions whose result consists of arrays that they read.
SAME = frozenset(
  (
    'bitcast',
    'tuple',
    'get-tuple-element',
    'optimization-barrier',
    'add-dependency',
    'while',
    'call',
    'conditional',
  )
)
# Instructions whose result is no array of the step.
NONE = frozenset(('parameter', 'constant', 'partition-id', 'replica-id', 'after-all'))


class Live(NamedTuple):
  """An array that is alive at the peak.

  Attributes:
    bytes: its size.
    shape: its dtype and dims, such as 'f32[8,4]'.
    op_name: the scopes of the instruction that computed it.
  """

  bytes: int
  shape: str
  op_name: str


class _Lifetimes(NamedTuple):
  """The arrays of a computation and when each is alive.

  Attributes:
    arrays: the array, or None for what is handed in from outside or is not in main memory.
    born: the index of the instruction that computes it.
    last: the index of its last reader.
    handed: which of them the computation returns, to its caller or to its next turn.
  """

  arrays: list[Live | None]
  born: list[int]
  last: list[int]
  handed: set[int]


def peak(module: hlo.Module) -> tuple[int, list[Live]]:
  """(bytes, arrays with the largest first) alive at the fullest point of a step, apart from its
  arguments."""
  size, live = _peak(module, module.entry, op_name='', known={})
  return size, sorted(live, key=lambda x: -x.bytes)


def _peak(
  module: hlo.Module, name: str, op_name: str, known: dict[str, tuple[int, list[Live]]]
) -> tuple[int, list[Live]]:
  """The peak of one computation and of what it calls. known: the results so far, by name."""
  if name in known:
    return known[name]
  order = list(module.computations[name].values())
  lifetimes = _lifetimes(module, name, op_name)
  arrays = lifetimes.arrays
  starts: list[list[int]] = [[] for _ in range(len(order) + 2)]
  ends: list[list[int]] = [[] for _ in range(len(order) + 2)]
  for leaf, array in enumerate(arrays):
    if array is not None and leaf not in lifetimes.handed:
      starts[lifetimes.born[leaf]].append(leaf)
      ends[lifetimes.last[leaf] + 1].append(leaf)

  alive: set[int] = set()
  now, most, fullest = 0, -1, []
  for at, instruction in enumerate(order):
    alive.update(starts[at])
    alive.difference_update(ends[at])
    now += sum(arrays[leaf].bytes for leaf in starts[at])
    now -= sum(arrays[leaf].bytes for leaf in ends[at])
    size, live = 0, []
    if instruction.opcode in ('while', 'conditional'):
      label = instruction.op_name or op_name
      inner = [
        _peak(module, called, label, known)
        for called in instruction.called('body', 'branch_computations')
      ]
      size, live = max(inner, key=lambda x: x[0], default=(0, []))
    if now + size > most:
      most, fullest = now + size, [arrays[leaf] for leaf in alive] + live
  known[name] = most, fullest
  return known[name]


def _lifetimes(module: hlo.Module, name: str, op_name: str) -> _Lifetimes:
  computation = module.computations[name]
  arrays: list[Live | None] = []
  born: list[int] = []
  last: list[int] = []
  leaves: dict[str, list[int]] = {}  # of each instruction: the arrays that its result consists of

  def new(at, shapes, label):
    made = []
    for shape in shapes:
      in_memory = label is not None and shape.space == 0
      arrays.append(Live(shape.bytes, str(shape), label) if in_memory else None)
      born.append(at)
      last.append(at)
      made.append(len(arrays) - 1)
    return made

  for at, instruction in enumerate(computation.values()):
    given = [leaves[operand] for operand in instruction.operands]
    if instruction.opcode == 'get-tuple-element' and len(instruction.shapes) == 1:
      place = int(re.search(r'index=(\d+)', instruction.attributes)[1])
      if place < len(given[0]):
        given = [given[0][place : place + 1]]
    read = [leaf for operand in given for leaf in operand]
    for leaf in read:
      last[leaf] = at
    label = instruction.op_name or op_name
    shapes = instruction.shapes
    if instruction.opcode in SAME and len(read) == len(shapes):
      leaves[instruction.name] = read
    elif instruction.opcode.endswith('-done') and read:
      leaves[instruction.name] = read[: len(shapes)]
    elif instruction.opcode.endswith('-start') and len(read) < len(shapes):
      # The shapes of a collective are its operands and then its result; of a copy the result first.
      first = len(read) if _is_collective(instruction, computation) else 0
      leaves[instruction.name] = new(at, shapes[first : first + 1], label)
    elif (place := _in_place(module, instruction)) is not None:
      leaves[instruction.name] = given[place]
    else:
      label = None if instruction.opcode in NONE else label
      leaves[instruction.name] = new(at, shapes, label)
  root = next(i for i in computation.values() if i.root)
  handed = set(leaves[root.name])
  for leaf in handed:
    last[leaf] = len(computation)
  return _Lifetimes(arrays=arrays, born=born, last=last, handed=handed)


def _is_collective(instruction: hlo.Instruction, computation: dict[str, hlo.Instruction]) -> bool:
  site = hlo.Site(
    instruction=instruction, computation=computation, times=1, op_name='', fused=False, loops=()
  )
  return operations.collective(site) is not None


def _in_place(module: hlo.Module, instruction: hlo.Instruction) -> int | None:
  """Which operand an update in place updates; None of any other instruction."""
  if instruction.opcode == 'dynamic-update-slice':
    return 0
  if instruction.opcode != 'fusion' or len(instruction.shapes) != 1:
    return None
  inner = module.computations[instruction.called('calls')[0]]
  root = next(x for x in inner.values() if x.root)
  while root.opcode in ('bitcast', 'copy') and root.operands:
    root = inner[root.operands[0]]
  if root.opcode != 'dynamic-update-slice':
    return None
  target = inner[root.operands[0]]
  while target.opcode == 'bitcast':
    target = inner[target.operands[0]]
  return int(target.arguments) if target.opcode == 'parameter' else None
