"""How the C library manages the memory of a run on CPUs."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import sys

# The parameters of mallopt (malloc.h of glibc) and their values.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
LARGEST_INT, STRIDE = 2**31 - 1, 2**26

LARGE_PAGES = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
TUNABLES = 'GLIBC_TUNABLES'


def only_cpus() -> bool:
  """Whether jax can find nothing but CPUs: JAX_PLATFORMS says so, or no plugin for a GPU or a TPU
  is installed. jax is not imported for the answer."""
  if told := os.environ.get('JAX_PLATFORMS'):
    return told == 'cpu'
  found = importlib.util.find_spec
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  return not (plugins or found('jax_plugins') or found('libtpu'))


def restart_with_large_pages() -> None:
  """Starts the program of this process anew, with memory in pages of 2 MiB instead of 4 KiB, where
  the system gives large pages to those who ask for them. glibc asks for them if GLIBC_TUNABLES says
  so when a process starts.

  The process stays the same, with its arguments and open files, so call it before anything has been
  read or begun, and only in a program's own entry point. It returns where there is nothing to gain:
  an accelerator may be there, the system gives large pages always or never, GLIBC_TUNABLES is set
  already, or the C library is not glibc.
  """
  if platform.libc_ver()[0] != 'glibc' or TUNABLES in os.environ or not only_cpus():
    return
  if not LARGE_PAGES.exists() or '[madvise]' not in LARGE_PAGES.read_text():
    return
  os.environ[TUNABLES] = 'glibc.malloc.hugetlb=1'
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


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
