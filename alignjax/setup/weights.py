"""Parameters by name: random ones, those of a finished stage, or those of a checkpoint in the
Hugging Face layout."""

from __future__ import annotations

import jax

from alignjax.models import hf, transformer
from alignjax.models.axes import as_used
from alignjax.models.config import TransformerConfig
from alignjax.runtime import checkpoint, files
from alignjax.setup import inputs
from alignjax.setup.objects import Setup
from alignjax.sharding import Sharder
from alignjax.types import Params


def initial_params(setup: Setup, spec: str, head: str, seed: int) -> Params:
  """Parameters by name, on their shardings, in buffers of their own.

  Args:
    spec: 'random'; 'stage:NAME', the final weights of a finished stage of this workdir; the folder
      of such weights; or 'hf:FOLDER_OR_HUB_NAME', a checkpoint of models/families.py.
    head: 'lm' (policy) or 'scalar' (reward, value). The trunk of a language model gets a fresh
      scalar head.
    seed: of random parameters, in addition to the seed of the config.
  """
  setup.read.update(inputs.of_weights(spec))
  model = setup.policy_model if head == 'lm' else setup.reward_model
  key = jax.random.fold_in(jax.random.key(setup.config.seed), seed)
  if spec.startswith('hf:'):
    if head == 'scalar':
      hf.check_end_scored(spec.removeprefix('hf:'), setup.text.template.end)
    return hf.load(spec.removeprefix('hf:'), model, head, setup.sharder.params, key)
  shardings = setup.sharder.params(jax.eval_shape(lambda: transformer.init(model, key, head)))
  if spec == 'random':
    return jax.jit(lambda: transformer.init(model, key, head), out_shardings=shardings)()
  folder = inputs.weights_folder(setup.workdir, spec)
  if not checkpoint.is_finished(folder):
    raise FileNotFoundError(
      f'{spec!r}: {folder} holds no finished stage. Forms: random, stage:NAME, '
      'hf:FOLDER_OR_HUB_NAME, FOLDER.'
    )
  saved = checkpoint.load_info(folder)['head']
  params = stage_params(folder, model, saved, setup.sharder)
  if saved == head:
    return params
  if head == 'lm':
    raise ValueError(f'{spec!r} is a reward model; a policy cannot start from it.')
  return jax.jit(lambda p: transformer.with_scalar_head(model, p, key), out_shardings=shardings)(
    params
  )


def stage_params(
  folder: files.Folder, model: TransformerConfig, head: str, sharder: Sharder
) -> Params:
  """The parameters in a folder that checkpoint.save_params wrote, on their shardings. head: the one
  that was saved."""
  shapes = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0), head))
  return checkpoint.load_params(
    folder,
    jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      sharder.params(shapes),
    ),
  )


def freeze(params: Params, model: TransformerConfig) -> Params:
  """The weights of a frozen network, in the dtype that every use casts them to."""
  return as_used(params, model.dtype)
