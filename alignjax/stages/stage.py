"""What a stage is, and what every stage makes of its part of the config: functions, optimizer,
first state, compiled step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from alignjax import optim, plugins
from alignjax.setup.objects import Setup
from alignjax.types import Metrics, Params, TrainState


def no_work(step: int) -> Mapping[str, float]:
  """Of a stage that does not say what its steps do: no rates are shown."""
  del step
  return {}


class Stage(NamedTuple):
  """What train.run_stage needs of a stage. It knows no algorithm.

  Attributes:
    state: the first TrainState, on its shardings; a checkpoint replaces it.
    step: (state, batch) -> (state, metrics, seen), compiled; donates the state.
    batch: step number -> global batch; a pure function.
    num_steps: of the loop.
    finish: state -> (parameters to keep, info as JSON values).
    observe: (step, state, seen) -> (metrics, rows of samples), on the host, at logged steps; or
      None.
    work: step number -> what that step does, for flops.metrics: tokens, tokens by phase, episodes,
      FLOPs. Batches may differ.
    failures: where a function on the host that the step calls says why it gave up
      (alignjax/rewards.py); one ends the run.
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
  """config.{policy, value, reward} -> one transformation; each is dict(fn='module:name', ...)."""
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
  """The first state, born on its shardings; the given parameters are copied, so that frozen ones
  keep their buffers. Of abstract parameters (stages/abstract.py) the abstract state."""

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


def compile_step(step: Callable, state: TrainState) -> Callable:
  """jit of step(state, ...) -> (state, ...): the state is donated and comes back on the shardings
  it went in with, so that the second call finds the first one's program."""
  shardings = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None, None))


# keywords that the stage passes itself
GIVEN = dict(loss=('nets',), reward=('nets', 'frozen'), advantage=())


def check_functions(
  config: Mapping[str, Any],
  where: str,
  facts: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> None:
  """Binds every function that a stage's config names, so that a wrong name or coefficient fails
  before any stage runs.

  facts: by entry ('loss', 'reward', 'advantage') what the stage knows and passes (plugins.bind).
  """
  for entry, given in GIVEN.items():
    if entry in config:
      plugins.bind(config[entry], f'{where}.{entry}', given=given, facts=facts.get(entry, {}))
      if 'function' in config[entry]:  # of alignjax.rewards:host_reward
        plugins.find(config[entry]['function'], f'{where}.{entry}.function')
  make_optimizer(config.optimizer, 10**9, where)


def steps_per_epoch(rows: int, batch_size: int, epochs: float) -> int:
  """Steps that see every row `epochs` times. 100 rows 1.1 times are 110, though the product of the
  floats is a bit more."""
  return math.ceil(round(rows * epochs / batch_size, 6))
