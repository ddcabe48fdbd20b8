"""Which arrays are alive together where a compiled step holds most: read off its schedule.

An estimate, for a look at what to make smaller: the compiler's own assignment
(compiled.memory_analysis()) says how much is used, this says by what. An array lives from the
instruction that makes it to its last reader; tuples, bitcasts, loops and updates in place make
none; what a loop's body hands to its next turn takes the place of what it was handed.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from alignjax.compiler import hlo

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
NONE = frozenset(('parameter', 'constant', 'partition-id', 'replica-id', 'after-all'))


class Live(NamedTuple):
  """An array alive at the peak, and the instruction that made it."""

  bytes: int
  shape: str
  op_name: str


def peak(module: hlo.Module) -> tuple[int, list[Live]]:
  """(bytes, arrays, largest first) alive at the fullest point of a step, beside its arguments."""
  size, live = _peak(module, module.entry, '', {})
  return size, sorted(live, key=lambda x: -x.bytes)


def _peak(module, name, op_name, known) -> tuple[int, list[Live]]:
  if name in known:
    return known[name]
  computation = module.computations[name]
  order = list(computation.values())
  leaves: dict[str, list[int]] = {}  # of each instruction's value: which array each leaf is
  arrays: list[Live | None] = []  # None: handed in from outside
  born, last = [], []

  def new(at, shapes, label):
    made = []
    for shape in shapes:
      arrays.append(
        Live(shape.bytes, str(shape), label) if label is not None and shape.space == 0 else None
      )
      born.append(at)
      last.append(at)
      made.append(len(arrays) - 1)
    return made

  for at, i in enumerate(order):
    given = [leaves[o] for o in i.operands]
    if i.opcode == 'get-tuple-element' and len(i.shapes) == 1:
      place = int(re.search(r'index=(\d+)', i.attributes)[1])
      given = [given[0][place : place + 1]] if place < len(given[0]) else given
    flat = [leaf for some in given for leaf in some]
    for leaf in flat:
      last[leaf] = at
    label = i.op_name or op_name
    if i.opcode in SAME and len(flat) == len(i.shapes):
      leaves[i.name] = flat
    elif i.opcode.endswith('-done') and flat:
      leaves[i.name] = flat[: len(i.shapes)]
    elif i.opcode.endswith('-start') and len(flat) < len(i.shapes):
      leaves[i.name] = new(
        at,
        i.shapes[len(flat) : len(flat) + 1]
        if hlo.collective(hlo.Site(i, computation, 1, '', False, ()))
        else i.shapes[:1],
        label,
      )
    elif (place := _in_place(module, i)) is not None:
      leaves[i.name] = given[place]
    else:
      leaves[i.name] = new(at, i.shapes, None if i.opcode in NONE else label)
  root = next(i for i in order if i.root)
  handed = set(leaves[root.name])  # into the loop's own arrays
  for leaf in handed:
    last[leaf] = len(order)

  events: list[list[int]] = [[] for _ in range(len(order) + 2)]
  for leaf, array in enumerate(arrays):
    if array is not None and leaf not in handed:
      events[born[leaf]].append(leaf)
      events[last[leaf] + 1].append(~leaf)
  now, best, alive, kept = 0, -1, set(), []
  for at, i in enumerate(order):
    for leaf in events[at]:
      if leaf >= 0:
        alive.add(leaf)
        now += arrays[leaf].bytes
      else:
        alive.discard(~leaf)
        now -= arrays[~leaf].bytes
    inner = (
      [
        _peak(module, c, i.op_name or op_name, known)
        for c in i.called('body', 'branch_computations')
      ]
      if i.opcode in ('while', 'conditional')
      else []
    )
    size, live = max(inner, key=lambda x: x[0], default=(0, []))
    if now + size > best:
      best, kept = now + size, [arrays[leaf] for leaf in alive] + live
  known[name] = best, kept
  return known[name]


def _in_place(module: hlo.Module, i: hlo.Instruction) -> int | None:
  """Of an update in place: which operand it updates."""
  if i.opcode == 'dynamic-update-slice':
    return 0
  if i.opcode != 'fusion' or len(i.shapes) != 1:
    return None
  inner = module.computations[i.called('calls')[0]]
  root = next(x for x in inner.values() if x.root)
  while root.opcode in ('bitcast', 'copy') and root.operands:
    root = inner[root.operands[0]]
  if root.opcode != 'dynamic-update-slice':
    return None
  target = inner[root.operands[0]]
  while target.opcode == 'bitcast':
    target = inner[target.operands[0]]
  return int(target.arguments) if target.opcode == 'parameter' else None
