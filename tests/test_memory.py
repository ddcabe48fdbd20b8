"""runtime/memory.py: a process keeps the memory that it has freed, and has it in large pages."""

import functools
import os
import platform
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import optim, steps, train
from alignjax.configs import base
from alignjax.models import products, transformer
from alignjax.models.attention import Machine
from alignjax.runtime import memory
from alignjax.stages import stage
from alignjax.types import TokenBatch, TrainState
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


# Says how it was started, from within.
RESTARTS = """
import os, pathlib, sys
from alignjax.runtime import memory
memory.LARGE_PAGES = pathlib.Path(sys.argv[1])
memory.restart_with_large_pages()
print(os.environ.get('GLIBC_TUNABLES'), sys.argv[2], sys.stdin.read(), os.getpid())
"""
TUNED = 'glibc.malloc.hugetlb=1'


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has large pages')
@pytest.mark.parametrize(
  'pages, changed, tunables',
  [
    ('always [madvise] never', {'JAX_PLATFORMS': 'cpu'}, TUNED),
    ('[always] madvise never', {'JAX_PLATFORMS': 'cpu'}, 'None'),
    ('always madvise [never]', {'JAX_PLATFORMS': 'cpu'}, 'None'),
    (None, {'JAX_PLATFORMS': 'cpu'}, 'None'),
    ('always [madvise] never', {'JAX_PLATFORMS': 'cuda,cpu'}, 'None'),
    ('always [madvise] never', {'JAX_PLATFORMS': 'cpu', 'GLIBC_TUNABLES': 'a.b=1'}, 'a.b=1'),
  ],
)
def test_large_pages_are_asked_for_where_they_help(pages, changed, tunables, tmp_path):
  """The process that starts anew is the same, with its arguments and its input."""
  told = tmp_path / 'enabled'
  if pages is not None:
    told.write_text(f'{pages}\n')
  env = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'} | changed
  process = subprocess.Popen(
    [sys.executable, '-W', 'error', '-c', RESTARTS, str(told), 'two words'],
    env=env,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  out, _ = process.communicate('input')
  assert out.strip() == f'{tunables} two words input {process.pid}'


@pytest.mark.parametrize(
  'platforms, entries, modules, only',
  [
    ('cpu', ['cuda13'], ['libtpu'], True),
    ('tpu', [], [], False),
    ('cuda,cpu', [], [], False),
    ('', [], [], True),
    ('', ['cuda13'], [], False),
    ('', [], ['libtpu'], False),
    ('', [], ['jax_plugins'], False),
  ],
)
def test_only_cpus(platforms, entries, modules, only, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  found = dict.fromkeys(modules, 'a module')
  monkeypatch.setattr(memory.importlib.util, 'find_spec', found.get)
  monkeypatch.setattr(memory.importlib.metadata, 'entry_points', lambda group: entries)
  assert memory.only_cpus() is only


def test_another_c_library_is_left_alone(monkeypatch):
  monkeypatch.setattr(platform, 'libc_ver', lambda: ('', ''))
  monkeypatch.setattr(memory.os, 'execv', None)  # It is not called.
  assert memory.keep_freed_memory() is False
  memory.restart_with_large_pages()


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


def products_over_two_axes(jaxpr) -> int:
  """How many matrix products, without those of attention, sum over more than one axis."""
  found = 0
  for equation in jaxpr.eqns:
    if equation.primitive is jax.lax.dot_general_p:
      (summed, _), (batch, _) = equation.params['dimension_numbers']
      found += len(summed) > 1 and not batch
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
    ):
      inner = getattr(inner, 'jaxpr', inner)
      found += products_over_two_axes(inner) if hasattr(inner, 'eqns') else 0
  return found


@pytest.mark.parametrize('platform_name, flat', [('cpu', True), ('tpu', False)])
def test_gradients_of_kernels_sum_over_the_rows_of_one_matrix(platform_name, flat):
  """On CPUs, XLA transposes what a product sums over batch and tokens in memory first."""
  cfg = fakes.config(num_layers=5, attention='reference')
  params = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
  nets = transformer.make_networks(cfg, machine=Machine(platform_name))
  tokens, mask = jnp.zeros((2, 4), jnp.int32), jnp.ones((2, 4), bool)

  def loss(params):
    return sum(x.sum() for x in nets.logprobs(params, tokens, mask))

  count = products_over_two_axes(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
  assert (count == 0) == flat


def test_the_moments_of_the_optimizer_are_overwritten_in_place():
  """Without the compiler's option, XLA copies them before: a tenth of a second for 124M parameters
  on two cores."""
  cfg = fakes.config(num_layers=5, attention='reference')
  nets = transformer.make_networks(cfg)
  params = {'policy': transformer.init(cfg, jax.random.key(0))}
  tx = optim.make({'policy': optim.adam(steps=10, lr=1e-3, clip_norm=1.0)})
  state = TrainState(jnp.int32(0), params, tx.init(params))
  tokens, mask = jnp.ones((2, 4), jnp.int32), jnp.ones((2, 4), bool)
  batch = TokenBatch(tokens, mask, jnp.ones((2, 4), jnp.float32))

  def loss_fn(params, batch, key, *, nets):
    del key
    return nets.logprobs(params['policy'], batch.tokens, batch.mask)[0].mean(), {}

  def step(state, batch):
    return *steps.update(state, batch, None, loss_fn=loss_fn, nets=nets, tx=tx), None

  program = stage.compile_step(step, state).lower(state, batch).compile().as_text()
  assert 'opt_state' in program
  assert not re.findall(r'copy\(%?state\S*(?:mu|nu)', program)


@pytest.mark.parametrize('inputs, outputs', [((6,), (8,)), ((2, 3), (8,)), ((6,), (2, 4))])
def test_products_of_rows(inputs, outputs):
  """Value and gradients of products.of_rows are those of jax.lax.dot_general."""
  keys = jax.random.split(jax.random.key(0), 3)
  x, kernel = (
    jax.random.normal(key, shape, jnp.float32)
    for key, shape in zip(keys, ((3, 5, *inputs), (*inputs, *outputs)), strict=False)
  )
  summed = tuple(range(len(inputs)))
  dimensions = ((tuple(2 + i for i in summed), summed), ((), ()))
  weight = jax.random.normal(keys[2], (3, 5, *outputs), jnp.float32)

  def run(multiply):
    def loss(x, kernel):
      out = multiply(x, kernel, dimensions)
      return jnp.sum(out * weight), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, kernel)

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    run(products.of_rows),
    run(jax.lax.dot_general),
  )
