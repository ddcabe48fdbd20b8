"""runtime/memory.py: a process keeps the memory that it has freed."""

import platform
import subprocess
import sys

import pytest

# Fills and frees 64 MiB twice, and prints how many pages the system gave the second time. A library
# function frees and allocates, as Python keeps small blocks itself.
TWICE = """
import ctypes, resource
from alignjax.runtime import memory
told = memory.keep_freed_memory() if {keep} else None
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
for _ in range(2):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  block = c.malloc(2**26)
  ctypes.memset(block, 1, 2**26)
  c.free(block)
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(keep: bool) -> tuple[str, int]:
  """What keep_freed_memory returned, and the pages of the second time."""
  out = subprocess.run(
    [sys.executable, '-c', TWICE.format(keep=keep)], capture_output=True, text=True, check=True
  ).stdout.split()
  return out[0], int(out[1])


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has these parameters')
def test_memory_that_was_freed_is_used_again():
  told, count = pages(keep=True)
  assert told == 'True'
  assert count < 100  # 64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB.


def test_another_c_library_is_left_alone(monkeypatch):
  from alignjax.runtime import memory

  monkeypatch.setattr(platform, 'libc_ver', lambda: ('', ''))
  assert memory.keep_freed_memory() is False
