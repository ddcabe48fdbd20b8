"""Traces, throughput and the debugging switches of jax."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from alignjax.compiler import flops
from alignjax.models.config import TransformerConfig
from alignjax.runtime import trace

# ---- traces


@pytest.mark.parametrize(
  'text,expected', [('ppo_ptx:3-5', ('ppo_ptx', 3, 5)), ('sft:7', ('sft', 7, 7))]
)
def test_what_to_trace(text, expected):
  assert trace.parse(text) == expected


@pytest.mark.parametrize('text', ['sft', 'sft:', 'sft:0', 'sft:5-3', 'sft:a-b', ':3'])
def test_a_wrong_request(text):
  with pytest.raises(ValueError, match='has not the form STAGE:FIRST-LAST'):
    trace.parse(text)


def test_a_request_that_cannot_be_met(tmp_path):
  with pytest.raises(ValueError, match="stage 'dpo'; this run has sft, rm"):
    trace.check(trace.parse('dpo:1'), ['sft', 'rm'])
  with pytest.raises(ValueError, match='sft:3-9: the steps to do are 4 to 8'):
    trace.Tracer(trace.parse('sft:3-9'), tmp_path / 'sft', 3, 8)
  assert trace.Tracer(trace.parse('sft:3-9'), tmp_path / 'rm', 3, 8).wanted is None


@pytest.mark.parametrize(
  'scope,phase',
  [
    ('jit(iteration)/decode/while/body/dot_general', 'decode'),
    ('jit(iteration)/while/body/update/transpose(jvp(ptx))/dot_general', 'ptx'),
    ('jit(iteration)/while/body/update/add', 'update'),
    ('jit(iteration)/score/jit(rewarded)/dot', 'score'),
    ('jit(step)/updates/dot', 'other'),
    ('', 'other'),
  ],
)
def test_the_innermost_phase_counts(scope, phase):
  assert trace.phase_of(scope) == phase


def test_a_loop_counts_what_its_body_leaves():
  """A loop of 10 ns holds two operations of 3 and 4, the second of which holds one of 1; then one
  of 5."""
  operations = [
    (0, -10, 'loop', 'm'),
    (1, -3, 'a', 'm'),
    (5, -4, 'b', 'm'),
    (6, -1, 'c', 'm'),
    (10, -5, 'd', 'm'),
  ]
  found = list(trace._own_times(operations))
  assert sorted(found) == [
    ('a', 'm', 3),
    ('b', 'm', 3),
    ('c', 'm', 1),
    ('d', 'm', 5),
    ('loop', 'm', 3),
  ]


def test_a_trace_tells_phases_apart(tmp_path, capsys):
  """More of the same work in a scope, and inside a loop, is a larger share of the time."""
  x = jnp.ones((300, 300))

  @jax.jit
  def step(x):
    with jax.named_scope('score'):
      y = x @ x
    with jax.named_scope('update'):
      return jax.lax.scan(lambda c, _: (jnp.sin(c @ x), None), y, length=20)[0]

  step(x)
  tracer = trace.Tracer(trace.parse('sft:2-3'), tmp_path / 'sft', 0, 4)
  for i in (1, 2, 3, 4):
    with tracer.step(i):
      step(x).block_until_ready()
  assert list((tmp_path / 'sft/profile').rglob('*.xplane.pb')), 'what TensorBoard reads'
  shares = json.loads((tmp_path / 'sft/profile/phases.json').read_text())
  assert shares['update'] > 2 * shares['score'] > 0 and sum(shares.values()) == pytest.approx(1)
  assert 'profile of steps 2 to 3' in capsys.readouterr().out
  with pytest.raises(FileNotFoundError, match='holds no trace'):
    trace.phases(tmp_path / 'nowhere')


def test_two_programs_of_one_name_are_told_apart(tmp_path):
  """Their operations have the same names too, and each has scopes of its own."""
  x = jnp.ones((300, 300))

  def program(scope, number):
    def step(x):
      with jax.named_scope(scope):
        return jnp.sin(x @ x + number) @ x

    return jax.jit(step)

  first, second = program('score', 1.0), program('update', 2.0)
  for step in (first, second):
    step(x).block_until_ready()
  with jax.profiler.trace(str(tmp_path)):
    for step in (first, second):
      step(x).block_until_ready()
  assert {'score', 'update'} <= trace.phases(tmp_path).keys()


# ---- throughput


SMALL = TransformerConfig(
  vocab_size=50,
  num_layers=2,
  d_model=8,
  num_heads=4,
  num_kv_heads=2,
  d_ff=16,
  max_length=32,
  mlp='swiglu',
)


def test_flops_by_hand():
  """A layer: q and out 8x8 each, k and v 8x4 each, three 8x16 of the MLP: 576 weights. Attention: 2
  T^2 * 8 a layer."""
  assert flops.forward_flops(SMALL, 10) == 2 * 10 * (2 * 576 + 8 * 50) + 2 * (2 * 100 * 8)
  assert flops.forward_flops(SMALL, 10, 'scalar') == 2 * 10 * (2 * 576 + 8) + 2 * (2 * 100 * 8)
  expected = 12 * flops.forward_flops(SMALL, 10)
  assert flops.training(SMALL, 4, 10) == {'tokens': 40, 'tokens_trained': 40, 'flops': expected}
  # With adapters alone, a matrix has no product for its gradient, and attention has all of its own.
  own = flops.training(SMALL, 4, 10, adapters=True)['flops']
  assert own == 4 * (2 * (2 * 10 * (2 * 576 + 8 * 50)) + 3 * 2 * (2 * 100 * 8))
  # Of 50 pairs of a layer, a window of 4 hides 6^2 / 2.
  near = dataclasses.replace(SMALL, window=4, windowed_layers=(True, False))
  hidden = flops.forward_flops(SMALL, 10) - flops.forward_flops(near, 10)
  assert hidden == 2 * 6**2 * 8 and flops.forward_flops(near, 4) == flops.forward_flops(SMALL, 4)
  short = flops.training(SMALL, 4, 5)  # two steps of buckets of different length
  assert flops.mean([flops.training(SMALL, 4, 10), short]) == {
    'tokens': 30,
    'tokens_trained': 30,
    'flops': (expected + short['flops']) / 2,
  }


def test_flops_are_what_the_compiler_counts():
  """Of one forward pass without loops, as far as matrix products go; the compiler adds what is
  small, and attends to all T^2."""
  from alignjax.models import transformer

  cfg = TransformerConfig(vocab_size=512, num_layers=1, d_model=128, num_heads=4, max_length=64)
  nets = transformer.make_networks(cfg)
  params = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
  tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
  cost = (
    jax.jit(nets.logits)
    .lower(params, tokens, jax.ShapeDtypeStruct((2, 64), bool))
    .compile()
    .cost_analysis()
  )
  assert cost['flops'] == pytest.approx(2 * flops.forward_flops(cfg, 64), rel=0.15)


def test_the_work_of_an_iteration():
  sizes = dict(
    episodes=8,
    samples_per_prompt=2,
    prompt_length=6,
    response_length=4,
    row_length=12,
    ptx_rows=16,
    epochs=1,
    reward_models=1,
  )
  work = flops.ppo(SMALL, SMALL, **sizes)
  assert (
    work['episodes'] == 8 and work['tokens_generated'] == 32 and work['tokens_scored'] == 4 * 80
  )
  assert work['tokens_trained'] == 2 * 80 + 16 * 12 and work['tokens'] == 80 + 16 * 12
  lm, scalar, text = (flops.forward_flops(SMALL, *a) for a in ((10,), (10, 'scalar'), (12,)))
  # no logits of prompts
  prefill, decode = (
    2 * 6 * 2 * 576 + 2 * 2 * 36 * 8,
    2 * 4 * (2 * 576 + 8 * 50) + 2 * 2 * (100 - 36) * 8,
  )
  trained = 3 * (8 * (lm + scalar) + 16 * text)
  assert work['flops'] == pytest.approx(
    4 * prefill + 8 * decode + 8 * (2 * lm + 2 * scalar) + trained
  )
  of_adapters = flops.ppo(SMALL, SMALL, **sizes, adapters=True)
  updates = 8 * flops.training(SMALL, 1, 10, 'lm', True)['flops']
  updates += 8 * flops.training(SMALL, 1, 10, 'scalar', True)['flops']
  updates += 16 * flops.training(SMALL, 1, 12, 'lm', True)['flops']
  assert of_adapters['flops'] == pytest.approx(work['flops'] - trained + updates)


def test_rates(monkeypatch):
  device = type(
    'D',
    (),
    {'device_kind': 'TPU v5 lite', 'memory_stats': lambda self: {'peak_bytes_in_use': 3 * 2**30}},
  )()
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  monkeypatch.setattr(jax, 'device_count', lambda: 4)
  assert flops.metrics({'tokens_trained': 100, 'flops': 197e12}, 2.0) == {
    'time/tokens_trained_per_second': 50,
    'time/tflops_per_device': 197 / 8,
    'time/mfu': 1 / 8,
    'device/memory_peak_gib': 3.0,
  }


# ---- jax's own switches, in processes of their own: they are read when jax starts


SWITCH = """
import jax, sys
from alignjax import train
from alignjax.configs import ppo_ptx
c = ppo_ptx.get_config('tiny')
c.data.update(prompt_length=24, response_length=2, row_length=16)
c.stages.sft.update(init=dict(policy='random'), demonstrations=4, epochs=1)
c.stages.sft.update(batch_size=4, pretrain_mix=0.0)
c.stages.ppo_ptx.update(iterations=1, prompts=4, minibatches=1)
c.stages.ppo_ptx.init = dict(policy='random', value='random', ref='random', reward='random')
c.stages.ppo_ptx.rollout.episodes = 2
c.stages.ppo_ptx.ptx.update(documents=4, rows_per_episode=1)
c.stages.ppo_ptx.optimizer.policy.warmup = 0
c.data.too_long = 'truncate'
c.model.update(d_model=8, num_heads=2)
c.stages_to_run, c.report.policies = (sys.argv[2],), {}
if len(sys.argv) > 3:
  c.stages[sys.argv[2]].loss = dict(fn=sys.argv[3])
train.main(c, sys.argv[1])
"""


def switched(tmp_path, *arguments, **environment):
  import os

  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return subprocess.run(
    [sys.executable, '-c', SWITCH, str(tmp_path), *arguments],
    env=env | environment,
    text=True,
    capture_output=True,
    timeout=400,
  )


def nan_loss(params, batch, key, *, nets):
  from alignjax import losses

  loss, found = losses.sft(params, batch, key, nets=nets)
  loss = loss + jnp.log(-1.0 - loss * loss)
  return loss, found | {'sft/loss': loss}


@pytest.mark.slow
def test_debug_nans_names_the_operation_and_is_silent_without_one(tmp_path):
  done = switched(tmp_path / 'a', 'sft', 'tests.test_trace:nan_loss', JAX_DEBUG_NANS='1')
  assert (
    done.returncode and 'FloatingPointError: invalid value (nan) encountered in log' in done.stderr
  ), done.stderr[-3000:]
  done = switched(tmp_path / 'b', 'ppo_ptx', JAX_DEBUG_NANS='1')
  assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
  'stage',
  [pytest.param('sft', marks=pytest.mark.slow), pytest.param('ppo_ptx', marks=pytest.mark.long)],
)
def test_without_jit(tmp_path, stage):
  """Every operation runs at once, for a debugger: slow, so one stage of each kind."""
  done = switched(tmp_path, stage, JAX_DISABLE_JIT='1')
  assert done.returncode == 0, done.stderr[-3000:]
  logged = json.loads((tmp_path / stage / 'metrics.jsonl').read_text())
  assert logged['sft/loss'] > 0 if stage == 'sft' else logged['ppo/ratio_max_dev'] < 1e-5


def test_a_profiled_run_launches_operations_by_name(monkeypatch):
  """What stood in XLA_FLAGS stays there, and jax takes the flag."""
  monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=3')
  trace.keep_names()
  code = 'import jax; print(jax.device_count())'
  found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert found.stdout.split() == ['3'] and 'command_buffer=' in os.environ['XLA_FLAGS']
