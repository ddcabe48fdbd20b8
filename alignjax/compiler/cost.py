"""What a compiled step costs, by phase: operations, memory traffic, bytes between devices, and the
time that a chip's peak numbers allow. The functions are pure and read the records of
compiler/hlo.py; `alignjax estimate` prints their results.

A phase is a named scope of the source: prepare, prefill and decode (sampling.py), score and reward
(rollout.py), update (steps.py). What is in none of them is `other`.
"""

from __future__ import annotations

import collections
import dataclasses
import re

import numpy as np

from alignjax.compiler import hlo, liveness, operations
from alignjax.compiler.chips import Chip

PHASES = ('prepare', 'prefill', 'decode', 'score', 'reward', 'update')


@dataclasses.dataclass
class Phase:
  """The cost of a phase for one device and one step.

  Attributes:
    flops: floating-point operations.
    traffic: bytes of HBM that are read and written.
    wire: bytes that are received from other devices.
    seconds: the sum over instructions of the time at the peak of what limits each, operations or
      memory; 0 without peak numbers.
  """

  flops: float = 0.0
  traffic: float = 0.0
  wire: float = 0.0
  seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Sent:
  """The collectives of one kind, place and shape.

  Attributes:
    phase: the phase that they belong to.
    kind: such as 'all-gather'.
    axes: the mesh axes that they go over.
    shape: that of the largest array.
    times: how many run in a step.
    bytes: bytes that each device receives in a step.
    in_loop: whether they are in the body of a loop.
    op_name: the scopes of the source.
  """

  phase: str
  kind: str
  axes: str
  shape: str
  times: int
  bytes: int
  in_loop: bool
  op_name: str


def phase_of(op_name: str) -> str:
  """'jit(iteration)/while/body/update/jvp()/while' -> 'update'."""
  return next((part for part in re.split(r'[/()]', op_name) if part in PHASES), 'other')


def analyse(
  module: hlo.Module, mesh_shape: dict[str, int], chip: Chip | None
) -> tuple[dict[str, Phase], list[Sent]]:
  """(phases by name, collectives with the largest first) of a compiled step.

  Args:
    module: the program.
    mesh_shape: axis name -> size.
    chip: its peak numbers, or None.
  """
  phases: dict[str, Phase] = collections.defaultdict(Phase)
  sent: dict[tuple, list[int]] = collections.defaultdict(lambda: [0, 0])
  flops, moved, times, name = 0.0, 0.0, 0, 'other'

  def close():  # adds an instruction together with what is fused into it
    phase = phases[name]
    phase.flops += flops * times
    phase.traffic += moved * times
    if chip is not None:
      phase.seconds += max(flops / chip.flops, moved / chip.bandwidth) * times

  waves: dict[str, hlo.Site] = {}
  for site in hlo.walk(module):
    if not site.fused:
      close()
      flops, moved, times, name = (
        0.0,
        operations.traffic(module, site),
        site.times,
        phase_of(site.op_name),
      )
    flops += operations.flops(site)
    found = operations.collective(site)
    if found and site.fused and 'chain_id=' in site.instruction.attributes:
      # A TPU program hides a collective behind several fusions, which all name it: its start, its
      # steps (also in an inner loop) and its end. It is counted once.
      wave = waves.setdefault(re.search(r'channel_id=\d+', site.instruction.attributes)[0], site)
      found = None if wave is not site and wave.loops == site.loops[: len(wave.loops)] else found
    if found and found.bytes:
      shape = max((s for s in site.instruction.shapes), key=lambda s: s.bytes)
      key = (
        phase_of(site.op_name),
        found.kind,
        axes_of(found.group, mesh_shape),
        str(shape),
        bool(site.loops),
        site.op_name,
      )
      sent[key][0] += site.times
      sent[key][1] += found.bytes * site.times
      phases[key[0]].wire += found.bytes * site.times
  close()
  order = [p for p in (*PHASES, 'other') if p in phases]
  made = [
    Sent(
      phase=phase,
      kind=kind,
      axes=axes,
      shape=shape,
      times=times,
      bytes=size,
      in_loop=in_loop,
      op_name=op_name,
    )
    for (phase, kind, axes, shape, in_loop, op_name), (times, size) in sent.items()
  ]
  return {p: phases[p] for p in order}, sorted(made, key=lambda s: -s.bytes)


def axes_of(group: tuple[int, ...], mesh_shape: dict[str, int]) -> str:
  """The mesh axes along which the devices of a group differ: 'fsdp' or 'fsdp+tensor'."""
  at = np.array(np.unravel_index(np.array(group, int), tuple(mesh_shape.values())))
  return '+'.join(
    axis for axis, row in zip(mesh_shape, at, strict=True) if len(set(row.tolist())) > 1
  )


def step_seconds(phases: dict[str, Phase], chip: Chip) -> tuple[float, float]:
  """(seconds with all communication hidden behind the computation of its phase, seconds with none
  of it hidden), at the chip's peak numbers."""
  return (
    sum(max(p.seconds, p.wire / chip.wire) for p in phases.values()),
    sum(p.seconds + p.wire / chip.wire for p in phases.values()),
  )


def largest_arrays(module: hlo.Module, count: int = 10) -> list[tuple[str, int, int, str, str]]:
  """What fills the memory at the fullest point of the step, apart from its arguments: (shape, how
  many, their bytes together, phase, op_name)."""
  together: dict[tuple, list[int]] = collections.defaultdict(lambda: [0, 0])
  for array in liveness.peak(module)[1]:
    entry = together[array.shape, phase_of(array.op_name), short(array.op_name)]
    entry[0], entry[1] = entry[0] + 1, entry[1] + array.bytes
  top = sorted(together.items(), key=lambda item: -item[1][1])[:count]
  return [(shape, number, size, phase, name) for (shape, phase, name), (number, size) in top]


def short(op_name: str) -> str:
  """An op_name without the words that loops and transformations add."""
  drop = {
    'while',
    'body',
    'closed_call',
    'checkpoint',
    'cond',
    'rematted_computation',
    'jvp()',
    'transpose(jvp())',
  }
  return '/'.join(p for p in op_name.split('/')[1:] if p not in drop) or op_name


def si(x: float, unit: str = '') -> str:
  """1234567 -> '1.23 M': three figures and a prefix."""
  for size, prefix in ((1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(x) >= size:
      return f'{x / size:.3g} {prefix}{unit}'
  return f'{x:.3g} {unit}'.rstrip()
