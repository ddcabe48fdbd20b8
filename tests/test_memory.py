"""runtime/memory.py: a process keeps the memory that it has freed."""

import platform
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from alignjax import train
from alignjax.configs import base
from alignjax.models import transformer
from alignjax.models.attention import Machine
from tests import fakes

# Fills and frees 256 MiB twice, and prints how many pages the system gave the second time. It calls
# malloc itself, as XLA does.
TWICE = """
import ctypes, resource
from alignjax.runtime import memory
told = memory.keep_freed_memory() if {keep} else None
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
for _ in range(2):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  block = c.malloc(2**28)
  ctypes.memset(block, 1, 2**28)
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
  assert count < 100  # 256 MiB are 65,536 pages of 4 KiB, or 128 of 2 MiB.


def test_another_c_library_is_left_alone(monkeypatch):
  from alignjax.runtime import memory

  monkeypatch.setattr(platform, 'libc_ver', lambda: ('', ''))
  assert memory.keep_freed_memory() is False


@pytest.mark.parametrize('platform_name, calls', [('cpu', 1), ('gpu', 0)])
def test_a_run_keeps_its_memory_on_cpus_only(platform_name, calls, monkeypatch, tmp_path):
  class Stop(Exception):
    pass

  def stop(config):
    raise Stop

  seen = []
  setup = train.make_setup

  def on_platform(config, workdir):
    made = setup(config, workdir)
    sharder = types.SimpleNamespace(machine=made.sharder.machine._replace(platform=platform_name))
    return made._replace(sharder=sharder)

  monkeypatch.setattr(train, 'make_setup', on_platform)
  monkeypatch.setattr(train.memory, 'keep_freed_memory', lambda: seen.append(1))
  monkeypatch.setattr(train, 'resolve', stop)
  with pytest.raises(Stop):
    train.main(base.get_config('tiny'), str(tmp_path))
  assert len(seen) == calls


@pytest.mark.parametrize(
  'layers, dtype, platform_name, loops',
  [
    (4, 'float32', 'cpu', False),
    (5, 'float32', 'cpu', True),
    (4, 'bfloat16', 'cpu', True),
    (4, 'float32', 'tpu', True),
  ],
)
def test_only_shallow_float32_networks_on_cpus_are_unrolled(layers, dtype, platform_name, loops):
  cfg = fakes.config(num_layers=layers, dtype=dtype, attention='reference')
  params = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
  nets = transformer.make_networks(cfg, machine=Machine(platform_name))
  tokens, mask = jnp.zeros((2, 4), jnp.int32), jnp.ones((2, 4), bool)
  lowered = jax.jit(nets.logits).lower(params, tokens, mask).as_text()
  assert ('stablehlo.while' in lowered) == loops
