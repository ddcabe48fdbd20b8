"""Parameters by name: random ones, those of a finished stage, or those of a checkpoint in the
Hugging Face layout."""

from __future__ import annotations

from typing import Any

import jax

from alignjax.models import config_json, hf, hub, lora, peft, quantized, transformer
from alignjax.models.axes import as_used
from alignjax.models.config import TransformerConfig
from alignjax.models.families import FAMILIES
from alignjax.runtime import checkpoint, files, fingerprints
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
  if spec.startswith(('hf:', 'peft:')):
    *_, source = read_for(spec)
    setup.read.update(inputs.of_weights(source))
    if head == 'scalar':
      hf.check_end_scored(source.removeprefix('hf:'), setup.text.template.end)
    return checkpoint_params(spec, model, head, setup.sharder, key)
  shardings = setup.sharder.params(jax.eval_shape(lambda: transformer.init(model, key, head)))
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
  # A stage that is the base is known by what was made from it.
  for source in read_for(base) if base.startswith(('hf:', 'peft:')) else ():
    setup.read.update(inputs.of_weights(source))
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
  if base.startswith(('hf:', 'peft:')):
    whole = checkpoint_params(base, model, head, sharder, key)
  else:
    below = files.folder(base)
    if not checkpoint.is_finished(below):
      raise FileNotFoundError(
        f'{folder}: its adapters belong to {below}, which holds no finished stage: put it back.'
      )
    saved = checkpoint.load_info(below)['head']
    whole = stage_params(below, model, saved, sharder)
    if saved != head:
      whole = transformer.with_scalar_head(model, whole, key)  # The adapters have a head.
  return merged(whole, own, declared, sharder.params(shapes))


def checkpoint_params(
  spec: str, model: TransformerConfig, head: str, sharder: Sharder, key: jax.Array
) -> Params:
  """The parameters of 'hf:NAME', or of 'peft:NAME' with the adapters merged, on their shardings.
  key: of a fresh scalar head, where head='scalar' and there is none."""
  if spec.startswith('hf:'):
    return hf.load(spec.removeprefix('hf:'), model, head, sharder.params, key)
  declared, own, base = peft_adapters(spec, model, head)
  whole = checkpoint_params(base, model, head, sharder, key)
  return merged(whole, own, declared, sharder.params(whole))


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
  *_, base = read_for(spec)
  family = FAMILIES[config_json.declared(hub.folder_of(base.removeprefix('hf:'))).kind]
  declared, own = peft.read(folder, family, model)
  if 'final' in own and head == 'lm':
    raise ValueError(f'{spec!r} is a reward model; a policy cannot start from it.')
  return declared, own, base


def read_for(spec: str) -> tuple[str, ...]:
  """The names of all that is read for a spec: for 'peft:NAME' also 'hf:NAME' of its base, which is
  last."""
  if not spec.startswith('peft:'):
    return (spec,)
  return spec, f'hf:{peft.base_of(hub.folder_of(spec.removeprefix("peft:")))}'


def saved_adapters(folder: files.Folder) -> tuple[lora.LoRA | None, str]:
  """(the declaration of the adapters in a folder, what they belong to: 'hf:NAME', 'peft:NAME' or a
  folder), or (None, '') where the folder has whole parameters."""
  entry = checkpoint.load_info(folder).get('lora')
  if entry is None:
    return None, ''
  base = entry['base']
  if base.startswith('stage:'):  # of the same workdir, which may have been moved
    base = str(inputs.weights_folder(_stage_folder(folder).parent, base))
  return lora.declared({k: v for k, v in entry.items() if k != 'base'}, f'{folder}: lora'), base


def load_adapters(
  folder: files.Folder, declared: lora.LoRA, model: TransformerConfig, head: str, sharder: Sharder
) -> Params:
  """The tree of adapters in a folder that `saved_adapters` describes, on its shardings. Raises
  inputs.ChangedInput where what they belong to has changed since they were trained on it."""
  check_base(folder)
  try:
    shapes = adapter_shapes(declared, model, head)
  except ValueError as error:
    raise ValueError(f'{folder}: adapters of another model: {error}') from None
  return checkpoint.load_params(folder, placed(shapes, sharder))


def check_base(folder: files.Folder) -> None:
  """Raises inputs.ChangedInput where what the adapters in a folder belong to is no longer what they
  were trained on, because they would be another model on it. What cannot be read is left to the
  code that reads it, and what another version of alignjax has not noted is not compared."""
  noted, workdir = made_from(folder).get('inputs', {}), _stage_folder(folder).parent
  for name in read_for(checkpoint.load_info(folder)['lora']['base']):
    if name not in noted:
      continue
    kind, was = noted[name]['kind'], noted[name]['fingerprint']
    if kind == 'weights' and not checkpoint.is_finished(inputs.weights_folder(workdir, name)):
      continue
    try:
      now = inputs.fingerprint(kind, name, workdir, fingerprints.known(workdir))
      if now != was:  # A remembered hash is no proof of a change.
        now = inputs.fingerprint(kind, name, workdir, {})
    except checkpoint.Damaged:
      raise
    except (ValueError, OSError):
      continue
    if now != was:
      keep = ', or, if it means the same, with --on_changed_input=keep to say so'
      raise inputs.ChangedInput(
        f'{folder}: its adapters were trained on {name}, which has changed since: {was} then, '
        f'{now} now. Put back what was there; or call the command that trained the stage, with '
        f'--on_changed_input=restart to train it again{"" if kind == "weights" else keep}.'
      )


def made_from(folder: files.Folder) -> dict[str, Any]:
  """What the weights in a folder were made from (inputs.record). Of a candidate it is what the
  result of the same training says, which --on_changed_input=keep changes."""
  own, final = checkpoint.load_info(folder).get('made', {}), _stage_folder(folder) / 'final'
  if not checkpoint.is_finished(final):
    return own
  result = checkpoint.load_info(final).get('made', {})
  return result if result.get('origin') == own.get('origin') else own


def _stage_folder(folder: files.Folder) -> files.Folder:
  """WORKDIR/STAGE of the folder of a result or of a candidate."""
  return folder.parent.parent if folder.parent.name == 'candidates' else folder.parent


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
