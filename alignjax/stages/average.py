"""A stage without steps whose result is an average of finished models: of reward models (WARM, Ramé
et al. 2024a), or of policies between SFT and PPO (Lin et al. 2023; WARP, Ramé et al. 2024b).

    c.stages.NAME = average('stage:rm', 'stage:rm_2', head='scalar')
    c.stages.NAME = average('stage:sft', 'stage:ppo', weights=(0.3, 0.7))

`average` is in configs/reward_ensemble.py. Members are what an init may name. They should have
started from the same weights: otherwise their average is no model at all. How they are merged is a
function (members, **coefficients) -> params that the config names, `linear`, `slerp` or one of a
fork, of trees of float32 arrays with stacked layers. A later stage starts from the result as from
that of any other, init.reward='stage:NAME'.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from alignjax import plugins
from alignjax.models import hf, hub, peft
from alignjax.runtime import checkpoint
from alignjax.setup import entries, inputs
from alignjax.setup.objects import Setup, seed_of
from alignjax.setup.weights import initial_params, param_shapes
from alignjax.stages import abstract
from alignjax.stages.stage import Stage, without_steps
from alignjax.types import Params


def build(setup: Setup, name: str) -> Stage:
  """The stage `name` of the config. It has no steps; `finish` merges."""
  cfg = setup.config.stages[name]
  merge = plugins.bind(cfg.merge, f'stages.{name}.merge')

  def finish(_):
    for spec in cfg.members:
      check_head(setup, name, spec)
    members = [initial_params(setup, spec, cfg.head, seed_of(name)) for spec in cfg.members]
    shardings = setup.sharder.params(members[0])
    params = jax.jit(lambda *members: merge(list(members)), out_shardings=shardings)(*members)
    return params, {'head': cfg.head, 'members': list(cfg.members)}

  return without_steps(setup, finish)


def _head_of_stage(cfg) -> str:
  module = cfg.build.partition(':')[0]
  return cfg.head if module == __name__ else 'scalar' if module == 'alignjax.stages.rm' else 'lm'


def check_head(setup: Setup, name: str, spec: str) -> None:
  """Raises ValueError where a finished member has another head than the stage, because a fresh one
  would be averaged in."""
  wanted = setup.config.stages[name].head
  if spec.startswith('hf:'):
    found = 'scalar' if hf.has_score(spec.removeprefix('hf:')) else 'lm'
  elif spec.startswith('peft:'):
    found = 'scalar' if peft.has_score(hub.folder_of(spec.removeprefix('peft:'))) else 'lm'
  else:
    found = checkpoint.load_info(inputs.weights_folder(setup.workdir, spec))['head']
  if found != wanted:
    raise ValueError(
      f'stages.{name}.head={wanted!r}, but its member {spec!r} has the head {found!r}.'
    )


def linear(members: Sequence[Params], *, weights: Sequence[float] | None = None) -> Params:
  """sum_i weights[i] members[i].

  Args:
    members: trees of the same structure.
    weights: one for each member, of any sign, with the sum 1; None is the mean.

  Raises:
    ValueError: the weights do not fit.
  """
  weights = [1 / len(members)] * len(members) if weights is None else list(weights)
  if len(weights) != len(members) or not abs(sum(weights) - 1) <= 1e-6:
    raise ValueError(
      f'weights={tuple(weights)} must be {len(members)} numbers, one for each member, with the sum '
      f'1.'
    )
  return jax.tree.map(
    lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *members
  )


def slerp(members: Sequence[Params], *, share: float = 0.5, towards_first: float = 0.0) -> Params:
  """Spherical interpolation of two models in what they have learned (WARP, Ramé et al. 2024b,
  sections 3.2 and 3.3).

  With the changes d1 and d2 of an array since the first model, and the angle w between them, the
  merged change is (sin((1 - share) w) d1 + sin(share w) d2) / sin w, which keeps their length where
  a linear average of changes in different directions would be shorter. Each layer of a stacked
  array has its own angle. The change is then multiplied by 1 - towards_first (the paper's eta, of
  its interpolation towards the initialization).

  Args:
    members: [the model that both started from, one model, the other].
    share: of the second of the two.
    towards_first: between 0 and 1.

  Raises:
    ValueError: there are not three members, or a number is not in [0, 1].
  """
  if len(members) != 3:
    raise ValueError(
      f'slerp takes three members, the one that the other two started from first, not '
      f'{len(members)}.'
    )
  if not (0 <= share <= 1 and 0 <= towards_first <= 1):
    raise ValueError(f'share={share} and towards_first={towards_first} must be between 0 and 1.')

  def of_array(first, one, other):
    d1, d2 = one - first, other - first
    dot = jnp.sum(d1 * d2)
    length = jnp.sqrt(jnp.sum(d1 * d1) * jnp.sum(d2 * d2))
    cosine = jnp.clip(dot / jnp.where(length > 0, length, 1.0), -1.0, 1.0)
    angle = jnp.arccos(cosine)
    # In one direction, in opposite ones, or without a change, the formula has no value.
    straight = (jnp.abs(cosine) > 1 - 1e-6) | (length == 0)
    sine = jnp.where(straight, 1.0, jnp.sin(angle))
    a = jnp.where(straight, 1 - share, jnp.sin((1 - share) * angle) / sine)
    b = jnp.where(straight, share, jnp.sin(share * angle) / sine)
    return first + (1 - towards_first) * (a * d1 + b * d2)

  def of_leaf(path, *leaves):
    stacked = any(getattr(key, 'key', None) == 'layers' for key in path)
    return (jax.vmap(of_array) if stacked else of_array)(*leaves)

  return jax.tree_util.tree_map_with_path(of_leaf, *members)


def check(setup: Setup, name: str) -> None:
  """Raises ValueError for entries that cannot be, before any stage runs."""
  cfg, where = setup.config.stages[name], f'stages.{name}'
  if cfg.head not in ('lm', 'scalar'):
    raise ValueError(f"{where}.head={cfg.head!r} must be 'lm' or 'scalar'.")
  if not isinstance(cfg.members, (tuple, list)) or len(cfg.members) < 2:
    raise ValueError(f'{where}.members={cfg.members!r} must name two models or more.')
  for spec in cfg.members:
    if not entries.is_weights(spec) or spec == 'random':
      raise ValueError(
        f"{where}.members: {spec!r} must be 'stage:NAME', 'hf:FOLDER_OR_HUB_NAME', "
        f"'peft:FOLDER_OR_HUB_NAME' or the folder of a finished stage's weights."
      )
    if not spec.startswith('stage:'):
      check_head(setup, name, spec)
    elif str(setup.config.stages[spec.removeprefix('stage:')].build).startswith('alignjax.'):
      found = _head_of_stage(setup.config.stages[spec.removeprefix('stage:')])
      if found != cfg.head:
        raise ValueError(
          f'{where}.head={cfg.head!r}, but its member {spec!r} has the head {found!r}.'
        )
  merge = plugins.bind(cfg.merge, f'{where}.merge')
  model = setup.policy_model if cfg.head == 'lm' else setup.reward_model
  shapes = param_shapes(model, cfg.head, setup.sharder)
  made = abstract.evaluate(merge, f'{where}.merge', [shapes] * len(cfg.members))
  describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
  if describe(made) != describe(shapes):
    raise ValueError(f'{where}.merge must return a tree like each of its members.')
