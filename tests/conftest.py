"""Eight CPU devices, and jax's strict modes, before anything imports jax. With
JAX_PLATFORMS=cuda,cpu or tpu,cpu, what needs one device is tested there. A program that was
compiled once is kept for the rest of this process.

Of the parameters of a test that is marked `sampled(n)`, n run, or one. ALIGNJAX_SAMPLE chooses
which: the day by default, and `ALIGNJAX_SAMPLE=all pytest` runs all of them. A parameter that is
named by its id or by -k competes only with those that are."""

import atexit
import collections
import datetime
import hashlib
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
import pytest

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
  'test_studies.py',
)


# Whole runs of small models, which take longer to compile than to run. What is exact, such as the
# ratio before an update, is tested in other files, by programs as XLA makes them for a user.
COMPILED_QUICKLY = {
  'test_adapter_bases',
  'test_average',
  'test_benchmarks',
  'test_best_of_n',
  'test_export',
  'test_forks',
  'test_generate',
  'test_harness',
  'test_lora',
  'test_preference',
  'test_recipes',
  'test_rounds',
  'test_studies',
  'test_train',
  'test_weights',
}


def packed(rows, length, pad):
  """All rows of documents, (tokens, weights) of each, as TokenBatch (data/encode.py: packing)."""
  from alignjax.data import encode

  plan = encode.packing([len(tokens) for tokens, _ in rows], length)
  part = lambda i, start, end: tuple(values[start:end] for values in rows[i])
  return encode.packed(plan, range(len(plan.starts) - 1), part, length, pad)


@pytest.fixture(scope='module', autouse=True)
def compile_quickly(request):
  """The programs of COMPILED_QUICKLY, also those of child processes, are not optimized."""
  quickly = request.module.__name__.rpartition('.')[2] in COMPILED_QUICKLY
  jax.config.update('jax_disable_most_optimizations', quickly)
  os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = str(int(quickly))


# The workers of pytest-xdist inherit it, so that they choose the same tests also at midnight.
SAMPLE = os.environ.setdefault('ALIGNJAX_SAMPLE', str(datetime.date.today()))


def pytest_report_header():
  return f'sampled tests: those of ALIGNJAX_SAMPLE={SAMPLE}'


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config, items):
  groups = collections.defaultdict(list)
  for item in items:
    if SAMPLE != 'all' and (mark := item.get_closest_marker('sampled')):
      groups[item.path, item.originalname, *(mark.args or (1,))].append(item)
  chance = lambda item: hashlib.sha256(f'{SAMPLE} {item.nodeid}'.encode()).digest()
  left_out = {
    item for (_, _, count), group in groups.items() for item in sorted(group, key=chance)[count:]
  }
  config.hook.pytest_deselected(items=[item for item in items if item in left_out])
  rank = {name: i for i, name in enumerate(LONG_FILES)}
  items[:] = sorted(
    (item for item in items if item not in left_out),
    key=lambda item: rank.get(item.path.name, len(rank)),
  )
