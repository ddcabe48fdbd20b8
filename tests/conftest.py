"""Eight CPU devices, and jax's strict modes, before anything imports jax. With
JAX_PLATFORMS=cuda,cpu or tpu,cpu, what needs one device is tested there. A program that was
compiled once is kept for the rest of this process."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + ' --xla_force_host_platform_device_count=8'
  # By default XLA aborts the process where a device waits a minute for another, as happens to eight
  # on two busy cores.
  + ' --xla_cpu_collective_call_terminate_timeout_seconds=3600'
)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')

# tests/mutations.py and tests/repeat.py keep one. Each worker of pytest-xdist has its own in it,
# because jax writes an entry in place, and another worker would read it half written.
if compiled := os.environ.get('JAX_COMPILATION_CACHE_DIR'):
  compiled = os.path.join(compiled, os.environ.get('PYTEST_XDIST_WORKER', ''))
  os.environ['JAX_COMPILATION_CACHE_DIR'] = compiled
else:
  compiled = tempfile.mkdtemp(prefix='alignjax-compiled-')
  atexit.register(shutil.rmtree, compiled, ignore_errors=True)
jax.config.update('jax_compilation_cache_dir', compiled)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)

# The files that take minutes, longest first: with `-n 2` no worker is left alone with one of them.
LONG_FILES = (
  'test_train.py',
  'test_processes.py',
  'test_weights.py',
  'test_preference.py',
  'test_compile.py',
  'test_data.py',
  'test_files.py',
  'test_versions.py',
  'test_sharding.py',
  'test_recipes.py',
  'test_rounds.py',
)


def pytest_collection_modifyitems(items):
  rank = {name: i for i, name in enumerate(LONG_FILES)}
  items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
