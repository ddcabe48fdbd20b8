"""The compiled step that pretraining and supervised fine-tuning share: one loss, one update."""

from __future__ import annotations

from collections.abc import Callable

import jax

from alignjax import steps
from alignjax.stages.setup import compile_step
from alignjax.types import LossFn, Metrics, Networks, TrainState


def make_step(state: TrainState, *, loss_fn: LossFn, nets: Networks, tx, key: jax.Array, microbatches: int = 1,
              ema_decay: float | None = None, dropout: bool = False) -> Callable:
  """-> step(state, batch) -> (state, metrics, None), jit-compiled for states like `state`, which is donated."""

  def step(state: TrainState, batch) -> tuple[TrainState, Metrics, None]:
    step_key = jax.random.fold_in(key, state.step) if dropout else None
    state, metrics = steps.update(state, batch, step_key, loss_fn=loss_fn, nets=nets, tx=tx,
                                  microbatches=microbatches, ema_decay=ema_decay)
    return state.replace(step=state.step + 1), metrics, None

  return compile_step(step, state)
