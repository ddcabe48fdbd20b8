"""One optimizer update: gradients in microbatches, the optimizer, the moving average. It is the
same for every stage and loss, and is skipped where the loss or a gradient is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from alignjax.types import LossFn, Metrics, Networks, TrainState


def gradients(
  loss_fn: LossFn,
  params: Any,
  batch: Any,
  key: jax.Array | None,
  *,
  nets: Networks,
  microbatches: int = 1,
  live_rows: Callable | None = None,
) -> tuple[Any, Metrics, jax.Array]:
  """Gradient, metrics and value of a loss over a whole minibatch, computed in equal microbatches,
  one after the other.

  The weights of the batch are normalised first and globally, so that the sum over microbatches (and
  devices) is the gradient of the whole minibatch. The number of microbatches changes memory only
  (docs/pitfalls.md, 10).

  Args:
    loss_fn: see types.LossFn.
    params: {name: parameter tree}.
    batch: a batch of types.py, before `normalized()`.
    key: of the dropout, or None.
    nets: the networks as pure functions.
    microbatches: a divisor of the rows.
    live_rows: packing.on_live_rows with its sizes bound, which leaves out the pads of
      batch.row_mask(); None reads all rows as they are.

  Returns:
    (gradients like params, metrics, loss f32[]).
  """
  batch = batch.normalized()

  def grad_fn(params, batch, key):
    def on(nets):
      return jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key, nets=nets)

    return on(nets) if live_rows is None else live_rows(on, nets, batch.row_mask())

  if microbatches == 1:
    (loss, metrics), grads = grad_fn(params, batch, key)
    return grads, metrics, loss
  cut = split(batch, microbatches)
  keys = None if key is None else jax.random.split(key, microbatches)

  def add(total, inputs):
    microbatch, key = inputs
    # Behind the barrier each layer casts its weights when it uses them; without it XLA keeps a cast
    # copy of all through the loop.
    (loss, metrics), grads = grad_fn(jax.lax.optimization_barrier(params), microbatch, key)
    return jax.tree.map(jnp.add, total, grads), (metrics, loss)

  zeros = jax.tree.map(jnp.zeros_like, params)
  grads, (metrics, losses) = jax.lax.scan(add, zeros, (cut, keys))
  return (
    grads,
    {name: jnp.max(x, 0) if is_maximum(name) else jnp.sum(x, 0) for name, x in metrics.items()},
    jnp.sum(losses),
  )


def update(
  state: TrainState,
  batch: Any,
  key: jax.Array | None,
  *,
  loss_fn: LossFn,
  nets: Networks,
  tx: optax.GradientTransformation,
  microbatches: int = 1,
  live_rows: Callable | None = None,
  ema_decay: float | None = None,
) -> tuple[TrainState, Metrics]:
  """One gradient and one optimizer update. state.step is not counted, because a PPO iteration has
  several updates.

  Where the loss or a gradient norm is NaN or infinite, the parameters, the optimizer and the
  average stay as they were, and the update is counted in state.skipped. optax.apply_if_finite
  differs: it applies the bad update in the end.

  Args:
    tx: the optimizer of state.params.
    microbatches, live_rows: see gradients.
    ema_decay: of the moving average of params['policy'], once per update (the paper: 0.992, C.4;
      its granularity is not reported). The average is float32, because in bfloat16 a decay this
      near to 1 would round to no change (docs/pitfalls.md, 18). None keeps no average.

  Returns:
    (state, metrics), including the gradient norm of each entry of params.
  """
  with jax.named_scope('update'):
    grads, metrics, loss = gradients(
      loss_fn, state.params, batch, key, nets=nets, microbatches=microbatches, live_rows=live_rows
    )
    norms = {f'optim/grad_norm_{name}': optax.tree.norm(tree) for name, tree in grads.items()}
    finite = jnp.all(jnp.isfinite(jnp.stack([loss, *norms.values()])))
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay is not None:
      ema = jax.tree.map(
        lambda e, p: e + (1 - ema_decay) * (p.astype(jnp.float32) - e), ema, params['policy']
      )
    params, opt_state, ema = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old),
      (params, opt_state, ema),
      (state.params, state.opt_state, state.ema),
    )
  skipped = jnp.where(finite, state.skipped * jnp.array([1, 0]), state.skipped + 1)
  return state.replace(
    params=params, opt_state=opt_state, ema=ema, skipped=skipped
  ), metrics | norms


def split(batch: Any, parts: int, permutation: jax.Array | None = None) -> Any:
  """Cuts the leading axis of every leaf into `parts` equal slices: [B, ...] -> [parts, B/parts,
  ...].

  Leaves may have different leading sizes (pretraining rows beside episodes), each of which must
  divide. permutation: i32[B], the order of the rows before the cut; None keeps it.
  """

  def one(x):
    if x.shape[0] % parts:
      raise ValueError(f'{x.shape[0]} rows do not divide into {parts} parts.')
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])

  if permutation is not None:
    batch = jax.tree.map(lambda x: x[permutation], batch)
  return jax.tree.map(one, batch)


def is_maximum(name: str) -> bool:
  """Whether a metric is combined over microbatches and minibatches by maximum: one that has 'max'
  in the last part of its name."""
  return 'max' in name.rsplit('/', 1)[-1].split('_')
