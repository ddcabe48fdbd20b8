"""Writes a trained policy or reward model as a folder that transformers loads, where it behaves as
it does here: generation stops at the same tokens, and the rows of a padded batch get the same
scores. models/families.py has the layout."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from einops import rearrange

from alignjax.models import classifier, config_entries, config_json, config_rope, hf, hub, peft
from alignjax.models.axes import path_name
from alignjax.models.config import TransformerConfig
from alignjax.models.families import FAMILIES, SCORE, Family
from alignjax.models.lora import LoRA
from alignjax.types import Params

# The fields of TransformerConfig that config.json does not have.
FREE = (
  'max_length',
  'dropout',
  'dtype',
  'remat',
  'logits_chunk',
  'attention_chunk',
  'attention',
  'kv_cache',
  'embedding_std',
  'unused_ids',
)

SHARD_BYTES = 5 * 10**9  # the most bytes of one file


def save(
  folder: str | os.PathLike,
  source: str | os.PathLike,
  cfg: TransformerConfig,
  params: Params,
  *,
  dtype: str = 'float32',
  shard_bytes: int = SHARD_BYTES,
  tokenizer: Any = None,
  ends: Sequence[int] = (),
  bias: str | None = None,
  card: Callable[[Mapping[str, Any]], str] | None = None,
) -> dict[str, Any]:
  """Writes a policy as a causal language model, or a reward model as a sequence classifier with one
  label.

  The folder is written under another name and then renamed, so that it is whole or does not exist.
  SHA256SUMS holds the checksum of every file but README.md, which hub.verify compares.

  Args:
    folder: the folder to write.
    source: the checkpoint that the run started from. Its config.json, its generation_config.json
      and, without `tokenizer`, its tokenizer files are taken over.
    cfg: the architecture.
    params: the parameters of the model.
    dtype: of the file: 'float32', 'bfloat16' or 'float16'.
    shard_bytes: the most bytes of one file.
    tokenizer: of the run; it is written with its chat template.
    ends: the tokens that stop generation, beginning with the one that responses were trained to end
      with. The tokenizer's end of text is added.
    bias: what becomes of a reward model's bias where the classifier of transformers has no place
      for it. 'drop' shifts every score by it, so that differences and rankings stay the same;
      'keep' writes it to config.json as alignjax_score_bias, to be added to the logit. A LayerNorm
      before the head takes it exactly, because nothing else reads that norm.
    card: makes the text of README.md from what this function returns; None: no README.md. People
      edit it on the hub, so it has no checksum.

  Returns:
    What a reader should know: 'class', 'tensors', 'bytes' and, of a reward model, 'bias' and 'pad'
    in words.
  """
  source, folder = hub.folder_of(source), pathlib.Path(folder)
  kind, declared, _ = config_json.declared(source)
  family, scalar = FAMILIES[kind], 'score' in params['final']
  config = _config(
    config_entries.read_object(source / 'config.json'),
    declared,
    cfg,
    family.classes[scalar],
    dtype,
    source,
  )
  report: dict[str, Any] = {'class': family.classes[scalar]}
  config |= _special_ids(config, tokenizer, ends)
  if scalar:
    folded = classifier.fold_bias(params)
    if folded is None:
      score, name = params['final']['score'], family.classes[True]
      report['bias'] = classifier.leave_bias(score, config, bias, name, 'config.json')
    else:
      params, report['bias'] = folded, 'folded into the last norm'
    config |= dict(
      num_labels=1, id2label={'0': 'score'}, label2id={'score': 0}, problem_type='regression'
    )
    tokenizer, report['pad'] = classifier.pad_apart(config, tokenizer)
    params = classifier.with_vocabulary(params, config['vocab_size'])
    cfg = dataclasses.replace(cfg, vocab_size=config['vocab_size'])
  partial = folder.with_name(folder.name + '.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  report |= _write_tensors(partial, _rows(family, cfg, scalar), cfg, params, dtype, shard_bytes)
  if not scalar:
    _write_json(
      partial / 'generation_config.json', _generation(source, config, tokenizer, cfg.unused_ids)
    )
  _write_json(partial / 'config.json', config)
  if tokenizer is not None:
    tokenizer.save_pretrained(partial)
  else:
    ours = ('config.json', 'generation_config.json', hf.INDEX)
    for path in source.iterdir():
      if path.suffix in ('.json', '.model', '.txt', '.jinja') and path.name not in ours:
        shutil.copy(path, partial / path.name)
  files = [path for path in sorted(partial.iterdir()) if path.is_file()]
  (partial / hub.SUMS).write_text(''.join(f'{_sha256(path)}  {path.name}\n' for path in files))
  if card is not None:
    (partial / 'README.md').write_text(card(report), encoding='utf-8')
  shutil.rmtree(folder, ignore_errors=True)
  partial.rename(folder)
  return report


def save_weights(
  folder: str | os.PathLike,
  source: str | os.PathLike,
  cfg: TransformerConfig,
  params: Params,
  dtype: str,
) -> None:
  """Writes the tensors of a policy alone, in the place of those that the folder had, for an engine
  that has read config.json and the tokenizer elsewhere.

  Args:
    folder, source, cfg, params, dtype: see `save`.

  Raises:
    ValueError: the folder is a checkpoint.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if (folder / 'config.json').exists():
    raise ValueError(
      f'{folder} is a checkpoint, whose tensors would be replaced: name a folder of its own.'
    )
  for path in [*folder.glob('*.safetensors'), folder / hf.INDEX]:
    path.unlink(missing_ok=True)
  family = FAMILIES[config_json.declared(hub.folder_of(source)).kind]
  _write_tensors(folder, family.tensors(cfg), cfg, params, dtype, SHARD_BYTES)


def save_adapters(
  folder: str | os.PathLike,
  model: Any,
  declared: LoRA,
  adapters: Params,
  base: str,
  ends: Sequence[int] = (),
  bias: str | None = None,
) -> dict[str, Any]:
  """Writes the adapters of a policy or of a reward model, and the tokenizer, in the files of peft
  (models/peft.py). The folder is whole or does not exist.

  Args:
    folder: the folder to write.
    model: the policy or reward model, with cfg, params and tokenizer.
    declared, adapters: the declaration and the tree of adapters.
    base: the name of the checkpoint that they belong to.
    ends, bias: see `save`. The norm before the head belongs to the base, so that no bias is folded
      into it.

  Returns:
    'modules', 'bytes' and, of a reward model, 'bias' and 'pad' in words.
  """
  folder, source = pathlib.Path(folder), hub.folder_of(base)
  family = FAMILIES[config_json.declared(source).kind]
  tokenizer, more, report = model.tokenizer, {}, {}
  if 'final' in adapters:
    score, name = adapters['final']['score'], family.classes[True]
    report['bias'] = classifier.leave_bias(score, more, bias, name, peft.CONFIG)
    config = config_entries.read_object(source / 'config.json')
    config |= _special_ids(config, tokenizer, ends)
    before = config['vocab_size']
    padded, report['pad'] = classifier.pad_apart(config, tokenizer)
    if config['vocab_size'] == before:
      tokenizer = padded
      report['pad'] += '; give it to the classifier as pad_token_id'
    else:  # Adapters have no place for another row of embeddings.
      report['pad'] = 'none: score one row at a time'
  partial = folder.with_name(folder.name + '.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  report |= peft.save(partial, family, model.cfg, declared, jax.device_get(adapters), base, more)
  if tokenizer is not None:
    tokenizer.save_pretrained(partial)
  partial.rename(folder)
  return report


def _config(
  config: dict[str, Any],
  declared: Mapping[str, Any],
  cfg: TransformerConfig,
  name: str,
  dtype: str,
  source: pathlib.Path,
) -> dict[str, Any]:
  """The config.json of the export: that of the source, made true of what was trained. A changed
  architecture that it cannot express is refused."""
  old = TransformerConfig(**declared)
  for field in dataclasses.fields(TransformerConfig):
    was, now = (getattr(c, field.name) for c in (old, cfg))
    if field.name not in (*FREE, 'tie_embeddings') and was != now:
      raise ValueError(
        f'model.{field.name}={now!r} was trained, but {source}/config.json means {was!r}, and an '
        'export takes that file over; such a model cannot be exported.'
      )
  config = {
    k: v for k, v in config.items() if k not in ('torch_dtype', classifier.ENTRY, 'auto_map')
  }
  config |= dict(architectures=[name], dtype=dtype, tie_word_embeddings=cfg.tie_embeddings)
  longest = config.get('max_position_embeddings', old.max_length)
  if cfg.rope_llama3 or cfg.rope_scaling:
    config |= _rope(config, cfg, longest)
  if cfg.max_length > longest:
    config['max_position_embeddings'] = cfg.max_length
  return config


def _rope(config: Mapping[str, Any], cfg: TransformerConfig, longest: int) -> dict[str, Any]:
  """The entries of config.json for stretched rotary positions, which say what was trained also
  where the context is longer now than max_position_embeddings, `longest`."""
  name, of_original = config_rope.rope_table(config), 'original_max_position_embeddings'
  table, changed = dict(config[name]), {}
  nested = 'full_attention' in table  # Gemma 3
  own = dict(table['full_attention']) if nested else table
  if cfg.max_length > longest:
    # Where they are not given, the original context is max_position_embeddings, and a factor of
    # yarn and longrope is the ratio of the two.
    original = config.get(of_original) or own.get(of_original, longest)
    if own.get('factor') is None:
      own['factor'] = longest / original
    inside = nested or config['model_type'] == 'gemma3_text'
    (own if inside else changed)[of_original] = original
  if (
    cfg.rope_scaling and cfg.rope_scaling[0] == 'longrope' and cfg.max_length > cfg.rope_scaling[3]
  ):
    own['short_factor'] = own['long_factor']  # The long factors were used for short rows too.
  return {**changed, name: {**table, 'full_attention': own} if nested else own}


def _special_ids(config: Mapping[str, Any], tokenizer: Any, ends: Sequence[int]) -> dict[str, Any]:
  """The entries of config.json for special tokens; without a tokenizer those of the source."""
  if tokenizer is None:
    return {}
  every = list(dict.fromkeys(i for i in (*ends, tokenizer.eos_token_id) if i is not None))
  bos = tokenizer.bos_token_id
  return dict(
    eos_token_id=every[0] if len(every) == 1 else every or None,
    pad_token_id=tokenizer.pad_token_id,
    bos_token_id=config.get('bos_token_id') if bos is None else bos,
  )


def _generation(
  source: pathlib.Path, config: Mapping[str, Any], tokenizer: Any, unused: Sequence[tuple[int, int]]
) -> dict[str, Any]:
  """generation_config.json: that of the source, or what older folders have of it in config.json,
  with the special tokens of `config`. The ids without a token, which are never sampled here, are
  suppressed there too."""
  from transformers.generation import GenerationConfig

  path = source / 'generation_config.json'
  if path.exists():
    entries = config_entries.read_object(path)
  else:
    entries = {
      k: v
      for k, v in config.items()
      if k in GenerationConfig._get_default_generation_params() and v is not None
    }
  entries = {k: v for k, v in entries.items() if k != '_from_model_config'}
  pad = config.get('pad_token_id')
  if pad is None and tokenizer is not None:  # templates.make pads with it.
    pad = tokenizer.eos_token_id
  suppressed = {
    *(entries.get('suppress_tokens') or ()),
    *(i for first, end in unused for i in range(first, end)),
  }
  entries |= {'suppress_tokens': sorted(suppressed)} if suppressed else {}
  return entries | dict(
    eos_token_id=config.get('eos_token_id'),
    pad_token_id=pad,
    bos_token_id=config.get('bos_token_id'),
  )


def _rows(family: Family, cfg: TransformerConfig, scalar: bool) -> Sequence[Any]:
  table = family.tensors(cfg)
  return (
    [*(t for t in table if not t.paths[0].startswith('final/head')), SCORE] if scalar else table
  )


def _write_tensors(
  folder: pathlib.Path,
  table: Sequence[Any],
  cfg: TransformerConfig,
  params: Params,
  dtype: str,
  shard_bytes: int,
) -> dict[str, int]:
  import ml_dtypes
  from safetensors.numpy import save_file

  leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  cast = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}[dtype]
  shard: dict[str, np.ndarray] = {}
  names: list[tuple[int, str]] = []
  count = total = size = 0

  def write():
    path = folder / f'shard-{count}.safetensors'
    save_file(shard, path, metadata={'format': 'pt'})
    path.chmod(0o644)  # safetensors writes files that only the owner can read
    shard.clear()

  for tensor in table:
    for i in range(cfg.num_layers if '{i}' in tensor.name else 1):
      values = [
        np.asarray(leaves[p][i] if p.startswith('layers/') else leaves[p]) for p in tensor.paths
      ]
      left, right = tensor.pattern.split('->')
      whole = values[0]
      if len(values) > 1:
        whole = np.stack(values) if tensor.indexed else np.concatenate(values, axis=-1)
      whole = rearrange(
        whole, f'{right} -> {left}', **hf.needed(right, hf.sizes(cfg, tensor.paths))
      )
      name = tensor.name.format(i=i)
      with np.errstate(over='ignore'):
        whole = np.ascontiguousarray(whole.astype(cast))
      if not np.isfinite(whole.astype(np.float32)).all():
        raise ValueError(
          f'{name} holds numbers that {dtype} cannot; choose another --dtype, or look at the run '
          f'if it is float32.'
        )
      if shard and size + whole.nbytes > shard_bytes:
        write()
        count, size = count + 1, 0
      shard[name] = whole
      names.append((count, name))
      size, total = size + whole.nbytes, total + whole.nbytes
  write()

  def final(k):
    return f'model-{k + 1:05d}-of-{count + 1:05d}.safetensors' if count else hf.SINGLE

  for k in range(count + 1):
    (folder / f'shard-{k}.safetensors').rename(folder / final(k))
  if count:
    _write_json(
      folder / hf.INDEX,
      {'metadata': {'total_size': total}, 'weight_map': {name: final(k) for k, name in names}},
    )
  return dict(tensors=len(names), bytes=total)


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2))


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
