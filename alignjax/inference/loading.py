"""Loads a finished stage, a Hugging Face checkpoint, or adapters of one, for generation, export and
evaluation.

model = load('runs/ppo_ptx-s0/ppo_ptx')
model = load('hf:FOLDER_OR_HUB_NAME', form='chat')

A stage is loaded with the tokenizer and the template that it was trained with.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from alignjax.data import templates
from alignjax.models import hf, hub, peft, transformer
from alignjax.models.config import TransformerConfig, ranges_without
from alignjax.models.lora import LoRA
from alignjax.runtime import checkpoint, files, fingerprints
from alignjax.setup import inputs, texts
from alignjax.setup.models import policy_config, reward_config
from alignjax.setup.weights import (
  checkpoint_params,
  load_adapters,
  made_from,
  read_for,
  saved_adapters,
  stage_params,
)
from alignjax.sharding import Sharder, make_mesh
from alignjax.types import Networks, Params

# The fields of TransformerConfig that came later and whose defaults change nothing: results that
# were kept before there were these fields hold with them.
LATER = {
  'kv_cache',
  'rope_scaling',
  'window',
  'windowed_layers',
  'window_rope_theta',
  'query_scale',
  'attention_cap',
  'logits_cap',
  'norms',
}


class Model(NamedTuple):
  """A model that is ready to use.

  Attributes:
    cfg: the architecture of the network.
    nets: the functions of the network.
    params: the parameters of the network.
    head: 'lm' or 'scalar'.
    template: converts text to tokens and tokens to text.
    vocabulary: one more than the largest id of a token.
    tokenizer: the tokenizer of the template, or None for the sandbox's.
    source: the Hugging Face checkpoint that the model comes from, or None.
    sharder: the Sharder of the mesh that the parameters lie on, or None for one device.
    response_length: the length limit of responses in training in tokens, or None for a Hugging Face
      checkpoint.
  """

  cfg: TransformerConfig
  nets: Networks
  params: Params
  head: str
  template: templates.Template
  vocabulary: int
  tokenizer: Any
  source: str | None
  sharder: Sharder | None = None
  response_length: int | None = None

  def encode(self, text: str) -> list[int]:
    """Returns the tokens of a text that begins a document."""
    return self.template.text(text)

  def decode(self, tokens: Sequence[int]) -> str:
    return self.template.decode(tokens)


def load(
  name: str,
  head: str | None = None,
  form: str | None = None,
  mesh: Mapping[str, Any] | None = None,
  dtype: str | None = None,
) -> Model:
  """Loads a model by name.

  Args:
    name: 'hf:FOLDER_OR_HUB_NAME', 'peft:FOLDER_OR_HUB_NAME' (adapters, which are merged into their
      base), the folder of a finished stage, WORKDIR/STAGE, or one of the candidates that it kept,
      WORKDIR/STAGE/candidates/STEP.
    head: the required head, 'lm' or 'scalar'. None accepts either; a Hugging Face checkpoint is
      then loaded as 'lm', and adapters of peft as 'scalar' if they have such a head.
    form: the prompt template. None means the one that the model was trained with, and 'plain' for a
      Hugging Face checkpoint.
    mesh: arguments of sharding.make_mesh, such as dict(data=8) or dict(fsdp=4), for the parameters
      and the rows of bulk evaluation. None means the first device alone, or all devices if there
      are several processes.
    dtype: the dtype that the model computes in, so that figures of several models are comparable.
      With 'float32', products have full float32 precision on accelerators too. None means the dtype
      of the training, and float32 for a Hugging Face checkpoint.
  """
  if mesh is None and jax.process_count() > 1:
    mesh = dict(data=len(jax.devices()))
  model = (
    _load_hf(name, head, form or 'plain', mesh)
    if name.startswith(hub.SCHEMES)
    else _load_stage(name, head, form, mesh)
  )
  if dtype is None:
    return model
  cfg = dataclasses.replace(model.cfg, dtype=dtype)
  nets = _networks(cfg, model.sharder)
  return model._replace(cfg=cfg, nets=_exact(nets) if dtype == 'float32' else nets)


def _exact(nets: Networks) -> Networks:
  """Returns the same functions with full float32 products. By default, TPUs and GPUs round the
  factors."""

  def whole(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args, **kwargs):
      with jax.default_matmul_precision('float32'):
        return function(*args, **kwargs)

    return call

  return nets._replace(
    logits=whole(nets.logits),
    logprobs=whole(nets.logprobs),
    scalar=whole(nets.scalar),
    decoder=type(nets.decoder)(*map(whole, nets.decoder)),
  )


def facts(model: Model) -> dict[str, Any]:
  """Returns everything that determines the numbers that a model computes, as JSON values: its
  weights, its architecture with the dtype and the context, the code of the network, its tokenizer,
  and the tokens of examples through its template. Measurements are stored under these facts."""
  dialogue = [
    {'role': 'user', 'content': 'a'},
    {'role': 'assistant', 'content': 'b'},
    {'role': 'user', 'content': 'c'},
  ]
  template, examples = model.template, ('a', ' A b\n', ' yes', dialogue)
  ways = (
    template.prompt,
    template.response,
    template.document,
    template.text,
    lambda text: template.row(text, 'b'),
  )
  shown = [_tried(encode, text) for text in examples for encode in ways]
  return dict(
    weights=fingerprints.of_params(model.params),
    head=model.head,
    # Kernels of attention differ in rounding alone.
    model={
      f.name: value
      for f in dataclasses.fields(model.cfg)
      if f.name != 'attention'
      and ((value := getattr(model.cfg, f.name)) != f.default or f.name not in LATER)
    },
    code=fingerprints.of_function(transformer.make_networks),
    tokenizer=_tokenizer(model.tokenizer),
    template=[shown, template.ends, template.pad, template.start],
  )


def _tried(encode: Callable[[Any], Any], text: Any) -> Any:
  """Returns encode(text), or None for an input that the template does not take, such as messages
  for a text template, or words that a world does not have."""
  try:
    return encode(text)
  except Exception:  # noqa: BLE001  templates and tokenizers raise many kinds
    return None


def _tokenizer(tokenizer: Any) -> str | None:
  """Returns the fingerprint of the tokenizer's vocabulary, rules and special tokens, or None for
  the sandbox's."""
  if tokenizer is None:
    return None
  fast = getattr(tokenizer, 'backend_tokenizer', None)
  rules = json.loads(fast.to_str()) if fast is not None else tokenizer.get_vocab()
  whole = tokenizer.encode('a b', verbose=False)  # With the tokens before and after a text.
  # Truncation and padding are those of the last call and do not count.
  rules = {k: v for k, v in rules.items() if fast is None or k not in ('truncation', 'padding')}
  return fingerprints.of_value(
    [rules, tokenizer.chat_template, whole, str(sorted(tokenizer.special_tokens_map.items()))]
  )


def fingerprint(model: Model) -> str:
  """Returns the fingerprint of `facts`. With several processes, all of them must call it."""
  return fingerprints.of_value(facts(model))


def _sharder(mesh: Mapping[str, Any] | None) -> Sharder:
  return Sharder(make_mesh(devices=jax.devices()[:1]) if mesh is None else make_mesh(**mesh))


def _networks(cfg: TransformerConfig, sharder: Sharder | None) -> Networks:
  if sharder is None:
    return transformer.make_networks(cfg)
  sharder.check_heads(cfg)
  return transformer.make_networks(cfg, sharder.constrain, sharder.for_decoding, sharder.machine)


def _load_hf(name: str, head: str | None, form: str, mesh: Mapping[str, Any] | None) -> Model:
  *_, base = read_for(name)
  source, sharder = base.removeprefix('hf:'), _sharder(mesh)
  tokenizer = texts.load_tokenizer(source)
  ids, fields = texts.token_ids(tokenizer), hf.fields(source)
  if fields['vocab_size'] <= ids[-1]:
    raise ValueError(
      f'{name}: config.json has vocab_size={fields["vocab_size"]}, but the tokenizer has ids up '
      f'to {ids[-1]}.'
    )
  cfg = TransformerConfig(**fields, unused_ids=ranges_without(ids, fields['vocab_size']))
  if name == base:
    head, scored = head or 'lm', hf.has_score(source)
  else:
    scored = peft.has_score(hub.folder_of(hub.without_scheme(name)))
    head = head or ('scalar' if scored else 'lm')
  if head == 'scalar' and not scored:
    raise ValueError(f'{name} is not a reward model: it has no tensor score.weight.')
  params = checkpoint_params(name, cfg, head, sharder, jax.random.key(0))
  sharder = sharder if mesh is not None else None
  template = templates.make(tokenizer, form, opened=head == 'lm')
  if head == 'scalar':
    hf.check_end_scored(source, template.end)
  return Model(
    cfg=cfg,
    nets=_networks(cfg, sharder),
    params=params,
    head=head,
    template=template,
    vocabulary=ids[-1] + 1,
    tokenizer=tokenizer,
    source=source,
    sharder=sharder,
  )


def folders(name: str) -> tuple[files.Folder, files.Folder]:
  """Returns (the stage's folder, the folder of the weights) for WORKDIR/STAGE or
  WORKDIR/STAGE/candidates/STEP."""
  folder = files.folder(name)
  if folder.parent.name == 'candidates' and checkpoint.is_finished(folder):
    return folder.parent.parent, folder
  return folder, folder / 'final'


def trained_with(name: str) -> dict[str, Any] | None:
  """Returns the config that a finished stage, or a candidate of one, was trained with. It is None
  for a Hugging Face checkpoint and for a stage that does not exist. A config that differs from the
  one that was written is an error (Damaged)."""
  if name.startswith(hub.SCHEMES):
    return None
  folder, weights = folders(name)
  path = folder / 'checkpoints' / 'config.json'
  if not checkpoint.is_finished(weights):
    return None
  made = checkpoint.load_info(weights).get('made')
  try:
    config = json.loads(path.read_bytes())
    if made and 'config' in made and not fingerprints.is_of_config(made['config'], config):
      raise ValueError('it is not the config that the weights were trained with')
  except (ValueError, OSError) as error:
    raise checkpoint.Damaged(
      f'{path} is damaged or missing ({error}). Delete it, and the command that trained the stage '
      f'writes it '
      'again.'
    ) from None
  return config


def _check_tokens(name: str, workdir: files.Folder, made: Mapping[str, Any]) -> None:
  """Raises ValueError if the tokenizer, or the architecture of the checkpoint, has changed since
  the training."""
  for entry, was in made.get('inputs', {}).items():
    if was['kind'] in ('tokenizer', 'architecture'):
      try:
        now = inputs.fingerprint(was['kind'], was['name'], workdir, {})
      except (ValueError, OSError):
        continue  # The code that reads it raises the error.
      if now != was['fingerprint']:
        raise ValueError(
          f'{name}: {entry}={was["name"]} has changed since the stage was trained: the '
          f'files of its '
          f'{was["kind"]}, or its config.json, have changed. Put back what was there; or, if it '
          f'means the same, say '
          'so by the command that trained the stage with --on_changed_input=keep.'
        )


def _load_stage(
  name: str, head: str | None, form: str | None, mesh: Mapping[str, Any] | None
) -> Model:
  folder, weights = folders(name)
  if not checkpoint.is_finished(weights):
    near = sorted(p.parent.parent.name for p in folder.glob('*/final/info.json'))
    raise FileNotFoundError(
      f'{name} holds no finished stage.'
      + (
        f' Its folder has the stages {", ".join(near)}; name one, as in {name}/{near[0]}.'
        if near
        else ' The forms of a name are WORKDIR/STAGE, hf:FOLDER_OR_HUB_NAME and '
        'peft:FOLDER_OR_HUB_NAME.'
      )
    )
  saved, info = trained_with(name), checkpoint.load_info(weights)
  _check_tokens(name, folder.parent, made_from(weights))
  found = info['head']
  if head not in (None, found):
    raise ValueError(
      f'{name} is a {"reward model" if found == "scalar" else "policy"}, not a '
      f'{"reward model" if head == "scalar" else "policy"}.'
    )
  config = ml_collections.ConfigDict(saved)
  if form is not None:
    config.data.template = form
  try:
    text = texts.of_config(config)
    cfg = (
      policy_config(config, text.ids, folder.name)
      if found == 'lm'
      else reward_config(config, text.ids)
    )
    # A kernel that was named for the machine of the training need not be on this one.
    cfg = dataclasses.replace(cfg, attention='auto')
    response_length = config.data.response_length
  except (AttributeError, KeyError) as error:
    raise ValueError(
      f'{folder}: its config lacks the entry {error}; another version of alignjax wrote it.'
    ) from None
  sharder = _sharder(mesh)
  params = stage_params(weights, cfg, found, sharder)
  sharder = sharder if mesh is not None else None
  source = config.model.get('source')
  return Model(
    cfg=cfg,
    nets=_networks(cfg, sharder),
    params=params,
    head=found,
    template=text.template,
    vocabulary=text.vocabulary,
    tokenizer=text.tokenizer,
    source=source and source.removeprefix('hf:'),
    sharder=sharder,
    response_length=response_length,
  )


def adapters(name: str, model: Model) -> tuple[LoRA, Params, str]:
  """Returns (the declaration, the adapters, the name of the checkpoint that they belong to) of a
  finished stage that trained some, and that `load` has read as `model`."""
  _, weights = folders(name)
  declared, base = saved_adapters(weights)
  if declared is None:
    raise ValueError(f'{name} was trained without adapters: leave --adapters out.')
  if base.startswith('peft:'):
    raise ValueError(
      f'{name}: its adapters belong to a model that {base} was merged into, which peft could not '
      f'load as their base: leave --adapters out, which writes the merged model.'
    )
  if not base.startswith('hf:'):
    raise ValueError(
      f'{name}: its adapters belong to {base}, which is no checkpoint that peft could load: leave '
      f'--adapters out, which writes the merged model, or export that stage first.'
    )
  own = load_adapters(weights, declared, model.cfg, model.head, model.sharder or _sharder(None))
  return declared, own, base.removeprefix('hf:')
