"""Optimizers and schedules from the config. Each entry of params has an optimizer of its own, so
that policy and value may differ:

    c.optimizer = dict(policy=dict(fn='alignjax.optim:adam', lr=1e-5, schedule='cosine'),
                       value=dict(fn='alignjax.optim:adam', lr=9e-6))

A fork names its own function: (*, steps, **coefficients) -> optax.GradientTransformation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def adam(
  *,
  steps: int,
  lr: float,
  schedule: str = 'constant',
  warmup: float = 0,
  warmup_from: float = 0.0,
  final: float = 0.1,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-5,
  eps_form: str = 'torch',
  weight_decay: float = 0.0,
  clip_norm: float | None = None,
) -> optax.GradientTransformation:
  """Adam with an optional schedule, decoupled weight decay and gradient clipping.

  b1 0.9 and b2 0.95 are the paper's (appendix C); it does not report eps, weight_decay and
  clip_norm.

  Args:
    steps: optimizer updates of the whole run.
    lr: peak learning rate.
    schedule: 'constant', or 'cosine' from lr to final * lr.
    warmup: updates of linear warmup from warmup_from * lr; below 1, a fraction of `steps`.
    warmup_from: the first learning rate, as a fraction of lr.
    final: the last learning rate of the cosine schedule, as a fraction of lr.
    b1, b2: decay rates of the two moments.
    eps: epsilon of the denominator.
    eps_form: 'torch' adds eps to sqrt(v / (1 - b2^t)). 'tensorflow', the form of the original code,
      adds it to sqrt(v) without that correction, which makes epsilon larger early on
      (docs/pitfalls.md, 17).
    weight_decay: decoupled (AdamW), for the parameters that `decays` names.
    clip_norm: the largest global gradient norm of this entry of params; None does not clip.

  Raises:
    ValueError: schedule or eps_form is unknown, the warmup is as long as the run, or clip_norm is
      not above 0.
  """
  rate = make_schedule(
    steps=steps, lr=lr, schedule=schedule, warmup=warmup, warmup_from=warmup_from, final=final
  )
  if eps_form == 'torch':
    moments = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
  elif eps_form == 'tensorflow':
    moments = scale_by_tf_adam(b1, b2, eps)
  else:
    raise ValueError(f"eps_form={eps_form!r} is neither 'torch' nor 'tensorflow'.")
  if clip_norm is not None and not clip_norm > 0:
    raise ValueError(f'clip_norm={clip_norm} must be above 0, or None, which does not clip.')
  chain = [] if clip_norm is None else [clip(clip_norm)]
  chain.append(moments)
  if weight_decay:
    chain.append(optax.add_decayed_weights(weight_decay, mask=decays))
  return optax.chain(*chain, optax.scale_by_learning_rate(rate))


def clip(largest: float) -> optax.GradientTransformation:
  """Scales gradients whose global norm is above `largest` down to it, by one factor.

  optax.clip_by_global_norm divides each gradient by the norm and then multiplies; XLA writes the
  quotients to memory, and they are as large as the parameters.
  """

  def scaled(grads, params):
    del params
    factor = largest / jnp.maximum(optax.tree.norm(grads), largest)
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)

  return optax.stateless(scaled)


def decays(params: Any) -> Any:
  """A tree of bools like params: which parameters weight decay shrinks.

  It shrinks matrices, including embeddings (the embedding is the unembedding where the two are
  tied, and the code of GPT-2 and Megatron decays it too). It does not shrink scales, biases and
  other vectors. Parameters under 'layers' are stacked [L, ...], so the scale of a norm, [L,D], is a
  vector of each layer.
  """

  def one(path, leaf):
    *parents, name = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
    return name not in ('scale', 'bias') and len(leaf.shape) - ('layers' in parents) > 1

  return jax.tree_util.tree_map_with_path(one, params)


def make_schedule(
  *, steps: int, lr: float, schedule: str, warmup: float, warmup_from: float, final: float
) -> Callable:
  """The learning rate as a function of the number of the update. For the arguments see adam."""
  warm = (
    int(warmup) if warmup >= 1 or warmup == 0 else min(max(1, round(warmup * steps)), steps - 1)
  )
  if warm >= steps and warm > 0:
    raise ValueError(f'warmup={warmup} is {warm} updates, but the run has only {steps}.')
  if schedule == 'constant':
    after = optax.constant_schedule(lr)
  elif schedule == 'cosine':
    after = optax.cosine_decay_schedule(lr, max(steps - warm, 1), alpha=final)
  else:
    raise ValueError(f"schedule={schedule!r} is neither 'constant' nor 'cosine'.")
  if not warm:
    return after
  return optax.join_schedules([optax.linear_schedule(warmup_from * lr, lr, warm), after], [warm])


def scale_by_tf_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """Adam as in TensorFlow 1: m sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v) + eps), the "epsilon hat" of
  Kingma and Ba 2015."""
  adam_state = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

  def update(grads, state, params=None):
    _, state = adam_state.update(grads, state, params)
    t = state.count.astype('float32')
    factor = (1 - b2**t) ** 0.5 / (1 - b1**t)
    return jax.tree.map(lambda m, v: factor * m / (v**0.5 + eps), state.mu, state.nu), state

  return optax.GradientTransformation(adam_state.init, update)


def make(transforms: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
  """One transformation of params = {name: tree}, which updates each entry by its own
  transformation, with its own clipping and schedule."""

  def label(params):
    return {name: jax.tree.map(lambda _: name, tree) for name, tree in params.items()}  # noqa: B023

  return optax.partition(dict(transforms), label)
