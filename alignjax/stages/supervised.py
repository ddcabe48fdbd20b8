"""The compiled step that pretraining and supervised fine-tuning share: one loss and one update."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from alignjax import plugins, steps
from alignjax.setup import adapters
from alignjax.setup.entries import check_divides, check_epochs
from alignjax.setup.objects import Setup, for_stage, stage_key
from alignjax.stages import abstract
from alignjax.stages.abstract import Plan, Work
from alignjax.stages.stage import check_functions, compile_step, make_optimizer, make_state
from alignjax.types import LossFn, Metrics, Networks, Params, TokenBatch, TrainState


def stage_step(
  setup: Setup, name: str, tx: optax.GradientTransformation, state: TrainState
) -> Callable:
  """make_step with the entries of the stage `name`."""
  cfg = setup.config.stages[name]
  return make_step(
    state,
    loss_fn=plugins.bind(cfg.loss, f'stages.{name}.loss', given=('nets',)),
    nets=lambda frozen: adapters.networks(setup, name, frozen),
    tx=tx,
    key=stage_key(setup, name),
    microbatches=cfg.microbatches,
    dropout=setup.policy_model.dropout > 0,
  )


def abstract_step(setup: Setup, name: str, batch: TokenBatch) -> Plan:
  """The compiled step, its arguments as shapes, and its work, without data or weights."""
  cfg = setup.config.stages[name]
  # The number of updates changes only a constant of the schedule.
  tx = make_optimizer(cfg.optimizer, 10**6, f'stages.{name}')
  parts = adapters.shapes(setup, name, {'policy': 'lm'}, {})
  state = make_state(setup, parts.params, tx)
  work = Work(
    kind='update',
    model=setup.policy_model,
    head='lm',
    rows=cfg.batch_size // cfg.microbatches,
    length=batch.tokens.shape[1],
    times=cfg.microbatches,
    adapters=adapters.used(setup, name),
  )
  step = stage_step(setup, name, tx, state)
  return Plan(step, (state, batch, parts.frozen), {'update': [work]})


def check(setup: Setup, name: str, abstract_step: Callable[[Setup, str], Plan]) -> None:
  """Raises ValueError for entries that cannot be, of pretraining and fine-tuning alike.
  abstract_step: that of the stage's module."""
  cfg, where = setup.config.stages[name], f'stages.{name}'
  check_functions(cfg, where)
  check_epochs(cfg.epochs, where)
  check_divides(cfg.batch_size, cfg.microbatches, f'{where}.batch_size by microbatches')
  check_divides(
    cfg.batch_size,
    setup.sharder.batch_shards,
    f'{where}.batch_size by the devices that share a batch',
  )
  own = for_stage(setup, name)
  adapters.check(own, name, {'policy': 'lm'})
  state, batch, frozen = abstract_step(own, name).arguments
  key = jax.random.key(0) if own.policy_model.dropout > 0 else None
  abstract.check_stage_loss(own, name, state.params, batch, frozen, key)


def make_step(
  state: TrainState,
  *,
  loss_fn: LossFn,
  nets: Networks | Callable[[Params], Networks],
  tx,
  key: jax.Array,
  microbatches: int = 1,
  ema_decay: float | None = None,
  dropout: bool = False,
) -> Callable:
  """A compiled step(state, batch, frozen=None) -> (state, metrics, None) for states like `state`,
  which is donated.

  Args:
    nets: the networks, or frozen -> the networks (adapters.networks).
    dropout: whether the loss receives a key.
    state, loss_fn, tx, key, microbatches, ema_decay: see steps.update.
  """

  def step(state: TrainState, batch, frozen=None) -> tuple[TrainState, Metrics, None]:
    step_key = jax.random.fold_in(key, state.step) if dropout else None
    state, metrics = steps.update(
      state,
      batch,
      step_key,
      loss_fn=loss_fn,
      nets=nets(frozen) if callable(nets) else nets,
      tx=tx,
      microbatches=microbatches,
      ema_decay=ema_decay,
    )
    return state.replace(step=state.step + 1), metrics, None

  return compile_step(step, state)
