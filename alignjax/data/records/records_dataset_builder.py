"""Stores records of any kind (data/sources.py) as array_record shards, which `tfds:FOLDER:SPLIT`
reads.

folder = store({'train': records, 'valid': more}, 'comparisons', 'data/mine', shards=16)

returns the folder to read from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

OPTIONAL = ('labeler_id', 'user_id', 'use_case', 'kind', 'messages')  # '' if absent


class Builder(tfds.core.GeneratorBasedBuilder):
  """A tensorflow-datasets builder of checked records: {split: records} of one kind of
  fields.FIELDS."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, records: Mapping[str, list[dict[str, Any]]], kind: str, **kwargs: Any):
    self._records, self._kind = records, kind
    super().__init__(**kwargs)

  def _features(self) -> dict[str, Any]:
    text, f = tfds.features.Text(), tfds.features
    own = dict(
      demonstrations=dict(prompt=text, response=text),
      prompts=dict(prompt=text),
      pretrain=dict(text=text),
      comparisons=dict(prompt=text, responses=f.Sequence(f.Text()), ranks=f.Sequence(np.int32)),
    )
    return {**own[self._kind], **{name: f.Text() for name in OPTIONAL}}

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(self._features()), disable_shuffling=True
    )

  def _split_generators(self, dl_manager) -> dict[str, Any]:
    return {split: self._generate_examples(rows) for split, rows in self._records.items()}

  def _generate_examples(self, rows):
    for i, row in enumerate(map(dict, rows)):
      # An id may be a number.
      row |= {name: '' if row.get(name) is None else str(row[name]) for name in OPTIONAL}
      if isinstance(row.get('prompt'), list):
        row |= dict(prompt='', messages=json.dumps(row['prompt']))
      yield i, {k: row[k] for k in self._features()}


def store(
  records: Mapping[str, list[dict[str, Any]]], kind: str, folder: str | os.PathLike, shards: int = 1
) -> str:
  """Writes the records of each split into `shards` files and returns the folder for
  `tfds:FOLDER:SPLIT`."""
  builder = Builder(
    records=records, kind=kind, data_dir=os.fspath(folder), file_format='array_record'
  )
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
  return str(builder.data_path)


def restore(row: dict[str, Any]) -> dict[str, Any]:
  """Returns the record that was stored as this row."""
  if row.get('messages'):
    row = {**row, 'prompt': json.loads(row['messages'])}
  return {k: v for k, v in row.items() if k not in OPTIONAL or (v != '' and k != 'messages')}
