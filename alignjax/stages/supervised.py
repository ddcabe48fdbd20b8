"""The compiled step that pretraining and supervised fine-tuning share: one loss, one update."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from alignjax import plugins, steps
from alignjax.stages import abstract
from alignjax.stages.abstract import Plan, Work
from alignjax.stages.setup import Setup, compile_step, make_optimizer, make_state, stage_key
from alignjax.types import LossFn, Metrics, Networks, TrainState


def stage_step(setup: Setup, name: str, tx: optax.GradientTransformation, state: TrainState) -> Callable:
  """make_step as the config of a stage has it."""
  cfg = setup.config.stages[name]
  return make_step(state, loss_fn=plugins.bind(cfg.loss, f'stages.{name}.loss', given=('nets',)), nets=setup.nets, tx=tx,
                   key=stage_key(setup, name), microbatches=cfg.microbatches, dropout=setup.policy_model.dropout > 0)


def abstract_step(setup: Setup, name: str, length: int) -> Plan:
  """The compiled step, its arguments as shapes, and its work, without data or weights; rows of `length` tokens."""
  cfg = setup.config.stages[name]
  tx = make_optimizer(cfg.optimizer, 10**6, f'stages.{name}')  # how many updates changes a constant of the schedule only
  state = make_state(setup, {'policy': abstract.params(setup, 'lm')}, tx)
  work = Work('update', setup.policy_model, 'lm', cfg.batch_size // cfg.microbatches, length, cfg.microbatches)
  return Plan(stage_step(setup, name, tx, state), (state, abstract.token_rows(setup, cfg.batch_size, length)), {'update': [work]})


def make_step(state: TrainState, *, loss_fn: LossFn, nets: Networks, tx, key: jax.Array, microbatches: int = 1,
              ema_decay: float | None = None, dropout: bool = False) -> Callable:
  """-> step(state, batch) -> (state, metrics, None), jit-compiled for states like `state`, which is donated."""

  def step(state: TrainState, batch) -> tuple[TrainState, Metrics, None]:
    step_key = jax.random.fold_in(key, state.step) if dropout else None
    state, metrics = steps.update(state, batch, step_key, loss_fn=loss_fn, nets=nets, tx=tx,
                                  microbatches=microbatches, ema_decay=ema_decay)
    return state.replace(step=state.step + 1), metrics, None

  return compile_step(step, state)
