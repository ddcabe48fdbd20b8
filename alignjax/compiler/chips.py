"""Peak numbers of accelerators, for estimates of what a step could reach."""

from __future__ import annotations

import difflib
from typing import NamedTuple


class Chip(NamedTuple):
  """The peak numbers of one chip.

  Attributes:
    hbm: bytes of memory that a program can have.
    flops: bf16 operations per second.
    bandwidth: bytes of HBM per second.
    wire: bytes per second that a chip receives over one axis of the interconnect (two links of a
      TPU's torus, all of a GPU's NVLink); over several axes at once it is more.
  """

  hbm: float
  flops: float
  bandwidth: float
  wire: float


# Bytes of HBM that the runtime keeps: the TPU compiler gives programs 15.75 of a v5e's 16 GiB.
RUNTIME = 2**28

# TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (system architecture) for HBM capacity and
# bandwidth, peak bf16 compute, and interconnect bandwidth per chip: 2,400, 1,600, 4,800 and 3,584
# Gbit/s over the links of a 3D torus (v4, v5p: 6) or a 2D torus (v5e, v6e: 4). GPUs: NVIDIA's
# data sheets of each board, whose clocks and memories differ; dense bf16, and NVLink one way.
CHIPS = {
  'v4': Chip(32 * 2**30 - RUNTIME, 275e12, 1228e9, 2 * 2400e9 / 8 / 6),
  'v5e': Chip(16 * 2**30 - RUNTIME, 197e12, 819e9, 2 * 1600e9 / 8 / 4),
  'v5p': Chip(95 * 2**30 - RUNTIME, 459e12, 2765e9, 2 * 4800e9 / 8 / 6),
  'v6e': Chip(32 * 2**30 - RUNTIME, 918e12, 1640e9, 2 * 3584e9 / 8 / 4),
  'A100 SXM 40GB': Chip(40e9, 312e12, 1555e9, 300e9),
  'A100 SXM 80GB': Chip(80e9, 312e12, 2039e9, 300e9),
  'A100 PCIe 40GB': Chip(40e9, 312e12, 1555e9, 300e9),
  'A100 PCIe 80GB': Chip(80e9, 312e12, 1935e9, 300e9),
  'H100 SXM': Chip(80e9, 989e12, 3350e9, 450e9),
  'H100 PCIe': Chip(80e9, 756e12, 2000e9, 300e9),
  'H100 NVL': Chip(94e9, 835e12, 3900e9, 300e9),
  'H200 SXM': Chip(141e9, 989e12, 4800e9, 450e9),
  'H200 NVL': Chip(141e9, 835e12, 4800e9, 450e9),
}
TPUS = tuple(name for name in CHIPS if name.startswith('v'))
# By device_kind of jax; for a GPU that is CUDA's name of the board (nvidia-smi -L).
KINDS = {
  'TPU v4': 'v4',
  'TPU v5 lite': 'v5e',
  'TPU v5e': 'v5e',
  'TPU v5p': 'v5p',
  'TPU v5': 'v5p',
  'TPU v6 lite': 'v6e',
  'TPU v6e': 'v6e',
  'NVIDIA A100-SXM4-40GB': 'A100 SXM 40GB',
  'A100-SXM4-40GB': 'A100 SXM 40GB',
  'NVIDIA A100-SXM4-80GB': 'A100 SXM 80GB',
  'A100-SXM4-80GB': 'A100 SXM 80GB',
  'NVIDIA A100-PCIE-40GB': 'A100 PCIe 40GB',
  'A100-PCIE-40GB': 'A100 PCIe 40GB',
  'NVIDIA A100 80GB PCIe': 'A100 PCIe 80GB',
  'NVIDIA H100 80GB HBM3': 'H100 SXM',
  'NVIDIA H100 PCIe': 'H100 PCIe',
  'NVIDIA H100 NVL': 'H100 NVL',
  'NVIDIA H200': 'H200 SXM',
  'NVIDIA H200 NVL': 'H200 NVL',
}


def of_topology(topology: str) -> str:
  """The name of the chip in a topology: 'v5p:8x8x8' -> 'v5p'. An unknown chip or form is an error
  with the nearest known chip."""
  name, colon, shape = topology.partition(':')
  if name not in TPUS:
    near = difflib.get_close_matches(name, TPUS, 1)
    raise ValueError(
      f'--topology={topology}: no chip {name!r}; there are {", ".join(TPUS)}, or `local` for the '
      f'devices at hand.' + (f' Did you mean {near[0]!r}?' if near else '')
    )
  if not colon or not all(part.isdigit() for part in shape.split('x')):
    raise ValueError(
      f'--topology={topology} has not the form CHIP:SHAPE, such as v5e:4x4 or v5p:8x8x8.'
    )
  return name


def of_device(kind: str) -> str | None:
  """The chip of a jax device_kind, or None where no peak numbers are known: of a CPU, and of a
  board that is not in the table, a part of one (MIG) or a variant with other clocks. No number is
  then better than a wrong one."""
  return KINDS.get(kind)
