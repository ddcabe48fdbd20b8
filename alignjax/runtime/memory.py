"""How the C library manages the memory of a run on CPUs."""

from __future__ import annotations

import ctypes
import platform

# The parameters of mallopt (malloc.h of glibc) and their values.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
LARGEST_INT, STRIDE = 2**31 - 1, 2**26


def keep_freed_memory() -> bool:
  """Lets the process keep the memory that it frees, and returns whether the C library agreed.

  On a CPU, XLA allocates the arrays of a step anew in every step. glibc returns large ones to the
  system at once, and the system clears their pages again in the next step: that was a third of the
  time of a pretraining step of the sandbox. Call it in a process that repeats the same steps; the
  process never becomes smaller again. Other C libraries than glibc are left as they are.
  """
  if platform.libc_ver()[0] != 'glibc':
    return False
  mallopt = ctypes.CDLL(None).mallopt
  values = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: LARGEST_INT, M_TOP_PAD: STRIDE}
  return all([mallopt(parameter, value) for parameter, value in values.items()])
