"""The architecture that an entry of the config declares."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from alignjax.models import hf
from alignjax.models.config import TransformerConfig, ranges_without


def policy_config(
  config: Mapping[str, Any] | ConfigDict, ids: Sequence[int], stage: str | None = None
) -> TransformerConfig:
  """The architecture of the policy: config.model, changed by the `model` entry of a stage that has
  one."""
  changes = (config['stages'][stage].get('model') if stage else None) or {}
  return model_config(
    {**config['model'], **changes}, ids, f'stages.{stage}.model' if changes else 'model'
  )


def reward_config(config: Mapping[str, Any] | ConfigDict, ids: Sequence[int]) -> TransformerConfig:
  """The architecture of the reward model and of the value network: config.reward_model, or that of
  the policy where it is None."""
  return model_config(config['reward_model'] or config['model'], ids, 'reward_model')


def model_config(spec: Mapping[str, Any], ids: Sequence[int], where: str) -> TransformerConfig:
  """The TransformerConfig of a config entry. An unknown field is an error with the nearest known
  one.

  An entry source='hf:FOLDER_OR_HUB_NAME' takes the architecture of that checkpoint, which the other
  entries change.

  Args:
    spec: the entry.
    ids: the ids that have a token; the other ids of the model's vocabulary become its unused_ids.
    where: the config key, for error messages.
  """
  fields = [f.name for f in dataclasses.fields(TransformerConfig)]
  for key in spec:
    if key not in (*fields, 'source'):
      near = difflib.get_close_matches(key, fields, 1)
      raise ValueError(
        f'{where}.{key} is no field of TransformerConfig.'
        + (f' Did you mean {near[0]!r}?' if near else '')
      )
  vocabulary = ids[-1] + 1
  spec = {'vocab_size': vocabulary, **spec}
  if source := spec.pop('source', None):
    name = source.removeprefix('hf:')
    declared, asked = hf.fields(name), spec.get('max_length')
    if asked is not None and (entry := hf.bound(name)):
      longest = declared['max_length']
      if asked > longest or entry == 'n_positions' and asked != longest:
        raise ValueError(
          f'{where}.max_length={asked}, but the checkpoint {source} has {entry}={longest} in its '
          f'config.json'
          + (
            {
              'n_positions': '; its table of positions has that length. ',
              'max_position_embeddings': (
                ', and beyond that its rotary positions depend on the longest row of a batch '
                "(rope_type 'dynamic'). "
              ),
            }[entry]
          )
          + f'Leave {where}.max_length out, or set it to {longest}.'
        )
    spec = declared | {k: v for k, v in spec.items() if k != 'vocab_size'}
  if spec['vocab_size'] < vocabulary:
    raise ValueError(
      f'{where}{f".source={source!r}" if source else ""} has a vocabulary of {spec["vocab_size"]}, '
      f'data.tokenizer one of {vocabulary}; they do not belong together.'
    )
  spec.setdefault('unused_ids', ranges_without(ids, spec['vocab_size']))
  missing = [
    f.name
    for f in dataclasses.fields(TransformerConfig)
    if f.default is f.default_factory is dataclasses.MISSING and f.name not in spec
  ]
  if missing:
    raise ValueError(
      f'{where} lacks {", ".join(missing)}; or {where}.source names a checkpoint that has them.'
    )
  return TransformerConfig(**spec)
