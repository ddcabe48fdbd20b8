"""What a stage is, and what every stage builds from its part of the config: functions, optimizer,
first state and compiled step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from alignjax import optim, packing, plugins
from alignjax.setup.objects import Setup
from alignjax.types import Metrics, Params, TrainState


def no_work(step: int) -> Mapping[str, float]:
  """The work of a stage that does not count it: no rates are shown."""
  del step
  return {}


class Stage(NamedTuple):
  """What train.run_stage needs of a stage. It knows no algorithm.

  Attributes:
    state: the first TrainState, on its shardings; a checkpoint replaces it.
    step: (state, batch) -> (state, metrics, seen), compiled; it donates the state.
    batch: step number -> global batch; a pure function.
    num_steps: the steps of the loop.
    finish: state -> (parameters to save, info as JSON values).
    observe: (step, state, seen) -> (metrics, rows of samples), called on the host at logged steps;
      or None.
    work: step number -> what that step does, for flops.metrics: tokens, tokens by phase, episodes
      and FLOPs. Batches may differ.
    failures: the reasons for which a function on the host failed that the step calls (rewards.py).
      One of them ends the run.
  """

  state: TrainState
  step: Callable[[TrainState, Any], tuple[TrainState, Metrics, Any]]
  batch: Callable[[int], Any]
  num_steps: int
  finish: Callable[[TrainState], tuple[Params, dict]]
  observe: Callable[[int, TrainState, Any], tuple[Metrics, list]] | None = None
  work: Callable[[int], Mapping[str, float]] = no_work
  failures: Sequence[str] = ()


def make_optimizer(
  config: Mapping[str, Any], steps: int, where: str
) -> optax.GradientTransformation:
  """One transformation of params from the optimizers of a stage.

  Args:
    config: {'policy' | 'value' | 'reward': dict(fn='module:name', ...)}.
    steps: optimizer updates of the stage.
    where: the config key of the stage, for error messages.
  """
  made = {}
  for name, spec in config.items():
    entry = f'{where}.optimizer.{name}'
    optimizer = plugins.bind(spec, entry, given=('steps',))
    try:
      made[name] = optimizer(steps=max(steps, 1))
    except ValueError as error:  # a coefficient that cannot be
      raise ValueError(f'{entry}: {error}') from error
    except TypeError as error:  # a coefficient of the wrong kind
      raise ValueError(
        f'{entry}: {spec["fn"]} does not take {_entries(spec)} ({error}).'
      ) from error
  return optim.make(made)


def _entries(spec: Mapping[str, Any]) -> str:
  return ', '.join(f'{k}={v!r}' for k, v in spec.items() if k != 'fn')


def make_state(
  setup: Setup,
  params: dict[str, Params],
  tx: optax.GradientTransformation,
  ema: bool = False,
  extra: Mapping[str, float] | None = None,
) -> TrainState:
  """The first state, created on its shardings. The given parameters are copied, so that frozen ones
  keep their buffers. Abstract parameters (stages/abstract.py) give an abstract state.

  Args:
    params: {name: parameter tree}.
    tx: the optimizer of params.
    ema: whether the state has a moving average of params['policy'].
    extra: the scalars that the stage carries along.
  """

  def build(params):
    average = jax.tree.map(lambda p: p.astype(jnp.float32), params['policy']) if ema else None
    scalars = {name: jnp.float32(value) for name, value in (extra or {}).items()}
    return TrainState(
      step=jnp.int32(0), params=params, opt_state=tx.init(params), ema=average, extra=scalars
    )

  shapes = jax.eval_shape(build, params)
  shardings = setup.sharder.state(shapes, shapes.params)
  if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
  return jax.jit(build, out_shardings=shardings)(params)


def make_live_rows(setup: Setup, name: str) -> Callable | None:
  """packing.on_live_rows with the sizes of the stage's `packed_rows`, or None where it has none."""
  fractions = setup.config.stages[name].get('packed_rows')
  if not fractions:
    return None
  return functools.partial(
    packing.on_live_rows, fractions=fractions, shards=setup.sharder.batch_shards
  )


def compile_step(step: Callable, state: TrainState) -> Callable:
  """The jit of step(state, ...) -> (state, metrics, seen). The state is donated and returns on the
  shardings that it came with, so that the second call finds the program of the first.

  XLA may not leave out a rounding to bfloat16 where it fuses operations. It could do so in the
  program with a gradient and not in the one without, and then the ratio before the first update
  would not be 1. On CPUs, it looks more closely at which arrays it may overwrite: otherwise it
  copies the moments of the optimizer before it overwrites them.
  """
  shardings = jax.tree.map(lambda x: x.sharding, state)
  options = {'xla_allow_excess_precision': False}
  if next(iter(jax.tree.leaves(shardings)[0].device_set)).platform == 'cpu':
    options['xla_cpu_copy_insertion_use_region_analysis'] = True
  return jax.jit(
    step, donate_argnums=0, out_shardings=(shardings, None, None), compiler_options=options
  )


def without_steps(setup: Setup, finish: Callable[[TrainState], tuple[Params, dict]]) -> Stage:
  """A stage that trains nothing and whose result is what `finish` makes."""
  return Stage(
    state=make_state(setup, {'policy': {}}, optax.identity()),
    step=lambda state, batch: (state, {}, None),
    batch=jnp.int32,
    num_steps=0,
    finish=finish,
  )


# The keyword arguments that a stage passes to its functions itself.
GIVEN = dict(loss=('nets',), reward=('nets', 'frozen'), advantage=())


def check_functions(
  config: Mapping[str, Any],
  where: str,
  facts: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> None:
  """Binds every function that a stage's config names, so that a wrong name or coefficient fails
  before any stage runs. facts: for 'loss', 'reward' and 'advantage', what the stage passes
  (plugins.bind)."""
  for entry, given in GIVEN.items():
    if entry in config:
      plugins.bind(config[entry], f'{where}.{entry}', given=given, facts=facts.get(entry, {}))
      if 'function' in config[entry]:  # rewards.host_reward has this entry.
        plugins.find(config[entry]['function'], f'{where}.{entry}.function')
  make_optimizer(config.optimizer, 10**9, where)


def steps_per_epoch(rows: int, batch_size: int, epochs: float) -> int:
  """The steps in which every row is seen `epochs` times. 100 rows seen 1.1 times are 110, although
  the product of the floats is a little more."""
  return math.ceil(round(rows * epochs / batch_size, 6))
