"""Parameters by name: random ones, those of a finished stage, or those of a checkpoint in the
Hugging Face layout."""

from __future__ import annotations

import jax

from alignjax.models import config_json, hf, hub, lora, peft, quantized, transformer
from alignjax.models.axes import as_used
from alignjax.models.config import TransformerConfig
from alignjax.models.families import FAMILIES
from alignjax.runtime import checkpoint, files
from alignjax.setup import inputs
from alignjax.setup.objects import Setup
from alignjax.sharding import Sharder
from alignjax.types import Params


def initial_params(setup: Setup, spec: str, head: str, seed: int) -> Params:
  """Parameters by name, on their shardings, in buffers of their own.

  Args:
    spec: 'random'; 'stage:NAME', the final weights of a finished stage of this workdir; the folder
      of such weights; 'hf:FOLDER_OR_HUB_NAME', a checkpoint of models/families.py; or
      'peft:FOLDER_OR_HUB_NAME', adapters of one, which are merged.
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
  if spec.startswith('peft:'):
    declared, own, base = peft_adapters(spec, model, head)
    whole = initial_params(setup, base, head, seed)
    return merged(whole, own, declared, shardings)
  if spec == 'random':
    return jax.jit(lambda: transformer.init(model, key, head), out_shardings=shardings)()
  folder = inputs.weights_folder(setup.workdir, spec)
  if not checkpoint.is_finished(folder):
    raise FileNotFoundError(
      f'{spec!r}: {folder} holds no finished stage. Forms: random, stage:NAME, '
      'hf:FOLDER_OR_HUB_NAME, peft:FOLDER_OR_HUB_NAME, FOLDER.'
    )
  saved = checkpoint.load_info(folder)['head']
  _, base = saved_adapters(folder)
  if base.startswith('hf:'):  # A stage that is the base is known by what was made from it.
    setup.read.update(inputs.of_weights(base))
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
  """The parameters in a folder that checkpoint.save_params wrote, on their shardings, with adapters
  (setup/adapters.py) added to what they belong to. head: the one that was saved."""
  key = jax.random.key(0)
  shapes = jax.eval_shape(lambda: transformer.init(model, key, head))
  declared, base = saved_adapters(folder)
  if declared is None:
    return checkpoint.load_params(folder, placed(shapes, sharder))
  own = load_adapters(folder, declared, model, head, sharder)
  if base.startswith('hf:'):
    whole = hf.load(base.removeprefix('hf:'), model, head, sharder.params, key)
  else:
    below = files.folder(base)
    saved = checkpoint.load_info(below)['head']
    whole = stage_params(below, model, saved, sharder)
    if saved != head:
      whole = transformer.with_scalar_head(model, whole, key)  # The adapters have a head.
  return merged(whole, own, declared, sharder.params(shapes))


def merged(whole: Params, own: Params, declared: lora.LoRA, shardings: Params) -> Params:
  """Whole parameters with the products of adapters added. Adapters of a quantised base are added to
  what its codes stand for."""

  def together(whole, own):
    if declared.quantization:
      whole = quantized.quantize(whole, declared.quantization)
    return lora.merge(lora.join(whole, own, declared.scale))

  return jax.jit(together, out_shardings=shardings)(whole, own)


def peft_adapters(spec: str, model: TransformerConfig, head: str) -> tuple[lora.LoRA, Params, str]:
  """(the declaration, the adapters on the host, 'hf:NAME' of their base) of 'peft:FOLDER'. head:
  'lm' or 'scalar', of the network that they are for."""
  folder = hub.folder_of(spec.removeprefix('peft:'))
  base = peft.base_of(folder)
  family = FAMILIES[config_json.declared(hub.folder_of(base)).kind]
  declared, own = peft.read(folder, family, model)
  if 'final' in own and head == 'lm':
    raise ValueError(f'{spec!r} is a reward model; a policy cannot start from it.')
  return declared, own, f'hf:{base}'


def saved_adapters(folder: files.Folder) -> tuple[lora.LoRA | None, str]:
  """(the declaration of the adapters in a folder, what they belong to: 'hf:NAME' or a folder), or
  (None, '') where the folder has whole parameters."""
  entry = checkpoint.load_info(folder).get('lora')
  if entry is None:
    return None, ''
  base = entry['base']
  if base.startswith('stage:'):  # of the same workdir, which may have been moved
    stage = folder.parent.parent if folder.parent.name == 'candidates' else folder.parent
    base = str(inputs.weights_folder(stage.parent, base))
  return lora.declared({k: v for k, v in entry.items() if k != 'base'}, f'{folder}: lora'), base


def load_adapters(
  folder: files.Folder, declared: lora.LoRA, model: TransformerConfig, head: str, sharder: Sharder
) -> Params:
  """The tree of adapters in a folder that `saved_adapters` describes, on its shardings."""
  return checkpoint.load_params(folder, placed(adapter_shapes(declared, model, head), sharder))


def adapter_shapes(declared: lora.LoRA, model: TransformerConfig, head: str) -> Params:
  """The shapes of a tree of adapters (models/lora.py). A scalar head is trained whole."""
  key = jax.random.key(0)
  whole = jax.eval_shape(lambda: transformer.init(model, key, head))
  shapes = jax.eval_shape(lambda: lora.init(declared, whole, key))
  return shapes | {'final': {'score': whole['final']['score']}} if head == 'scalar' else shapes


def param_shapes(model: TransformerConfig, head: str, sharder: Sharder) -> Params:
  """The shapes of all parameters of a network, on their shardings."""
  return placed(jax.eval_shape(lambda: transformer.init(model, jax.random.key(0), head)), sharder)


def placed(shapes: Params, sharder: Sharder) -> Params:
  """Shapes of parameters with their shardings."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, sharder.params(shapes)
  )


def freeze(params: Params, model: TransformerConfig) -> Params:
  """The weights of a frozen network, in the dtype that every use casts them to."""
  return as_used(params, model.dtype)
