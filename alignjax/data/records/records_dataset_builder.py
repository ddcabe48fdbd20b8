"""Stores records of any kind (data/sources.py) as array_record shards; `tfds:FOLDER:SPLIT` reads
them.

store({'train': records, 'valid': more}, 'comparisons', 'data/mine', shards=16) returns the folder
to read from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

OPTIONAL = ('labeler_id', 'user_id', 'use_case', 'kind', 'messages')  # absent: ''


class Builder(tfds.core.GeneratorBasedBuilder):
  """records: split -> checked records. kind: of fields.FIELDS."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, records: Mapping[str, list[dict[str, Any]]], kind: str, **kwargs: Any):
    self._records, self._kind = records, kind
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    text, f = tfds.features.Text(), tfds.features
    own = dict(
      demonstrations=dict(prompt=text, response=text),
      prompts=dict(prompt=text),
      pretrain=dict(text=text),
      comparisons=dict(prompt=text, responses=f.Sequence(f.Text()), ranks=f.Sequence(np.int32)),
    )
    return self.dataset_info_from_configs(
      features=f.FeaturesDict({**own[self._kind], **{name: f.Text() for name in OPTIONAL}}),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager) -> dict[str, Any]:
    return {split: self._generate_examples(rows) for split, rows in self._records.items()}

  def _generate_examples(self, rows):
    for i, row in enumerate(map(dict, rows)):
      # an id may be a number
      row |= {name: '' if row.get(name) is None else str(row[name]) for name in OPTIONAL}
      if isinstance(row.get('prompt'), list):
        row |= dict(prompt='', messages=json.dumps(row['prompt']))
      yield i, {k: row[k] for k in self.info.features}


def store(
  records: Mapping[str, list[dict[str, Any]]], kind: str, folder: str | os.PathLike, shards: int = 1
) -> str:
  """Writes the records of each split into `shards` files; returns the folder for
  `tfds:FOLDER:SPLIT`."""
  builder = Builder(
    records=records, kind=kind, data_dir=os.fspath(folder), file_format='array_record'
  )
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
  return str(builder.data_path)


def restore(row: dict[str, Any]) -> dict[str, Any]:
  """A stored row as the record it was."""
  if row.get('messages'):
    row = {**row, 'prompt': json.loads(row['messages'])}
  return {k: v for k, v in row.items() if k not in OPTIONAL or (v != '' and k != 'messages')}
