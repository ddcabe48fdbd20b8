"""Reads checkpoints of Hugging Face: safetensors and config.json, without pickle, remote code or
torch. models/export.py writes them.

    cfg = TransformerConfig(**hf.fields(name))          config.json -> TransformerConfig
    params = hf.load(name, cfg, head, shardings)        tensor by tensor onto the devices

The files and tensors that count are those that transformers would take. What it would read in
another way is refused by name. models/families.py says where each tensor goes, and
models/config_json.py reads the entries of config.json.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from einops import rearrange

from alignjax.models import config_entries, config_json, hub, transformer
from alignjax.models.axes import path_name
from alignjax.models.config import TransformerConfig
from alignjax.models.families import FAMILIES, SCORE, Family, Tensor
from alignjax.types import Params

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
DTYPES = ('F64', 'F32', 'F16', 'BF16')  # of safetensors


def fields(name: str | os.PathLike) -> dict[str, Any]:
  """The fields of TransformerConfig that a checkpoint declares in config.json. Where its files have
  a head of their own although config.json promises tied embeddings, the head counts, as in
  transformers."""
  folder = hub.folder_of(name)
  hub.verify(folder, weights=False)
  kind, declared, _ = config_json.declared(folder)
  if declared['tie_embeddings'] and any((folder / file).is_file() for file in (SINGLE, INDEX)):
    family = FAMILIES[kind]
    declared['tie_embeddings'] = not Files(folder, family).differ(family.head, family.embedding)
  return declared


def bound(name: str | os.PathLike) -> str | None:
  """The entry of config.json that bounds max_length, or None where rotary positions go on
  (config_json.Declared)."""
  return config_json.declared(hub.folder_of(name)).bound


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files that transformers reads: model.safetensors, or without it those that the index names,
  and no others."""
  if (folder / 'adapter_config.json').exists():
    raise ValueError(f'{folder}: adapter_config.json makes it {config_json.as_adapter(folder)}')
  index = folder / INDEX
  if (folder / SINGLE).is_file():
    return [folder / SINGLE]
  if index.is_file():
    where = config_entries.read_object(index).get('weight_map')
    if (
      not isinstance(where, dict)
      or not where
      or not all(isinstance(file, str) for file in where.values())
    ):
      raise ValueError(f'{index}: weight_map has to be an object of tensor and file names.')
    for file in set(where.values()):
      if (
        os.path.isabs(file)
        or os.path.normpath(file).startswith('..')
        or not file.endswith('.safetensors')
      ):
        raise ValueError(
          f'{index}: weight_map names {file!r}, which is no safetensors file of this folder.'
        )
      if not (folder / file).is_file():
        raise FileNotFoundError(f'{folder / file}: named in {INDEX}, but not there.')
    return sorted(folder / file for file in set(where.values()))
  others = sorted(p.name for pattern in ('*.safetensors', '*.bin') for p in folder.glob(pattern))
  hint = ''
  if others:
    hint = (
      f' {others[0]} is a pickle, which is not read; convert it with transformers.'
      if others[0].endswith('.bin')
      else f' {others[0]} is not read, as in transformers: rename it, or write the index of its '
      f'shards.'
    )
  raise FileNotFoundError(f'{folder}: no {SINGLE} and no {INDEX}.{hint}')


class Files:
  """The tensors of a checkpoint by name, each of which is read when it is asked for.

  Names are those of transformers, whether or not the file has the prefix of the trunk. A tensor
  that occurs twice is a ValueError.
  """

  def __init__(self, folder: pathlib.Path, family: Family):
    from safetensors import SafetensorError, safe_open

    self._where: dict[str, tuple[Any, str]] = {}
    homes: dict[str, str] = {}
    for path in weight_files(folder):
      try:
        file = safe_open(path, framework='np')
      except (SafetensorError, OSError) as error:
        raise ValueError(f'{path}: not a whole safetensors file ({error}).') from error
      for key in file.keys():  # noqa: SIM118 not a dict
        name = family.name(key)
        if name in homes:
          raise ValueError(
            f'{path}: tensor {key!r} is there twice, the other time in {homes[name]}.'
          )
        self._where[name], homes[name] = (file, key), path.name
    self.names = set(self._where)
    self.folder = folder

  def shape(self, name: str) -> tuple[int, ...]:
    file, key = self._where[name]
    return tuple(file.get_slice(key).get_shape())

  def dtype(self, name: str) -> str:
    file, key = self._where[name]
    return file.get_slice(key).get_dtype()

  def read(self, name: str) -> np.ndarray:
    file, key = self._where[name]
    return file.get_tensor(key)

  def differ(self, name: str, other: str) -> bool:
    """Whether both tensors exist with one shape and hold different numbers."""
    both = (name, other)
    if (
      not {*both} <= self.names
      or self.shape(name) != self.shape(other)
      or not self.shape(name)
      or not all(self.dtype(n) in DTYPES for n in both)
    ):
      return False
    rows = self.shape(name)[0]
    a, b = (self._where[n][0].get_slice(self._where[n][1]) for n in both)

    def some(x, i):
      return x[i : min(i + 4096, rows)].astype(np.float32)

    return any(not np.array_equal(some(a, i), some(b, i)) for i in range(0, rows, 4096))

  def share(self, name: str, other: str) -> None:
    """Lets a missing tensor be another one, which exists."""
    if name not in self.names and other in self.names:
      self._where[name] = self._where[other]
      self.names.add(name)


def load(
  name: str | os.PathLike,
  cfg: TransformerConfig,
  head: str,
  shardings: Callable[[Params], Params],
  key: jax.Array | None = None,
) -> Params:
  """The float32 parameters of a checkpoint, each on its sharding.

  One tensor is read at a time and cut into the pieces of this process's devices. The host holds the
  pieces of one parameter (all of its layers) and one tensor of the file.

  Args:
    name: a folder, or a name on the hub.
    cfg: the architecture; the shape of every tensor is compared with it before anything is read.
    head: 'lm' or 'scalar'. A file without `score.weight` gets a fresh scalar head, drawn with
      `key`.
    shardings: tree of shapes -> tree of shardings (Sharder.params).
    key: of a fresh scalar head.
  """
  folder = hub.folder_of(name)
  hub.verify(folder, weights=False)
  hub.verify(folder, weights=True)
  kind, declared, _ = config_json.declared(folder)
  family = FAMILIES[kind]
  files = Files(folder, family)
  scored = SCORE.name in files.names
  if head == 'lm' and scored:
    raise ValueError(
      f'{folder}: a reward model (it has {SCORE.name}); a policy cannot start from it.'
    )
  if declared['tie_embeddings'] and not scored:
    files.share(family.embedding, family.head)
  if head == 'lm' and cfg.tie_embeddings and files.differ(family.head, family.embedding):
    raise ValueError(
      f'{folder}: {family.head} differs from {family.embedding}, which model.tie_embeddings=True '
      'would use for both. Leave model.tie_embeddings out: the file decides.'
    )
  if cfg.num_layers > len(files.names):
    raise ValueError(
      f'{folder}: the files hold {len(files.names)} tensors, too few for the {cfg.num_layers} '
      'layers that config.json declares.'
    )
  table = [
    t for t in family.tensors(cfg) if head == 'lm' or not t.paths[0].startswith('final/head')
  ]
  if head == 'scalar' and scored:
    table.append(SCORE)
  shapes = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0), head))
  leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
  placed = {
    path_name(path): s for path, s in jax.tree_util.tree_leaves_with_path(shardings(shapes))
  }
  _check(files, table, family, cfg, leaves)
  if head == 'lm' and cfg.tie_embeddings:
    _check_tied(files, family)
  loaded = {}
  for tensor in table:
    for path, array in zip(
      tensor.paths, _load_one(files, tensor, cfg, leaves, placed), strict=True
    ):
      loaded[path] = array
  if head == 'scalar':
    fresh = transformer.init_head(cfg, jax.random.key(0) if key is None else key)
    if scored:
      fresh['bias'] = fresh['bias'] + config_json.score_bias(folder)
    for path in ('kernel', 'bias'):
      loaded.setdefault(
        f'final/score/{path}', jax.device_put(fresh[path], placed[f'final/score/{path}'])
      )
  return jax.tree_util.tree_map_with_path(lambda path, _: loaded[path_name(path)], shapes)


def has_score(name: str | os.PathLike) -> bool:
  """Whether a checkpoint is a reward model: its files have `score.weight` of a sequence
  classifier."""
  folder = hub.folder_of(name)
  return SCORE.name in Files(folder, FAMILIES[config_json.declared(folder).kind]).names


def check_end_scored(name: str | os.PathLike, end: int) -> None:
  """Refuses a reward model that transformers scores elsewhere than at `end`, the token that
  responses end with: its classifier takes the last token of a row that is not the pad_token_id of
  config.json."""
  path = hub.folder_of(name) / 'config.json'
  if config_entries.read_object(path).get('pad_token_id') == end and has_score(name):
    raise ValueError(
      f'{path}: pad_token_id={end} is the token that responses end with, so that transformers '
      'scores this reward model one token before the end, and alignjax would at the end. If it was '
      'trained to be scored at the end, set pad_token_id to null or to another token; else it is '
      'not covered.'
    )


def sizes(cfg: TransformerConfig, paths: tuple[str, ...]) -> dict[str, int]:
  heads = cfg.kv_heads if 'key' in paths[0] or 'value' in paths[0] else cfg.num_heads
  return dict(n=heads, h=cfg.head_width, j=len(paths))


def needed(side: str, sizes: Mapping[str, int]) -> dict[str, int]:
  """The sizes that one side of a pattern does not have by itself: those of its products."""
  return {
    k: v
    for k, v in sizes.items()
    if '(' in side and k in side.replace('(', ' ').replace(')', ' ').split()
  }


def _file_shape(
  tensor: Tensor, cfg: TransformerConfig, leaves: Mapping[str, Any]
) -> tuple[int, ...]:
  """The shape that a tensor of the file must have, from the shapes of our parameters."""
  ours = tuple(leaves[tensor.paths[0]].shape)
  ours = ours[1:] if tensor.paths[0].startswith('layers/') else ours
  left, right = (side.strip() for side in tensor.pattern.split('->'))
  right = right.removeprefix('j ') if tensor.indexed else right
  if len(tensor.paths) > 1 and not tensor.indexed:
    ours = (*ours[:-1], sum(leaves[path].shape[-1] for path in tensor.paths))
  words = re.findall(r'\([^)]*\)|\S+', right)
  size = sizes(cfg, tensor.paths) | {
    word: n for word, n in zip(words, ours, strict=True) if not word.startswith('(')
  }
  out, group = [], None
  for word in left.replace('(', '( ').replace(')', ' )').split():
    if word == '(':
      group = 1
    elif word == ')':
      out, group = [*out, group], None
    elif group is not None:
      group *= size[word]
    else:
      out.append(size[word])
  return tuple(out)


def _check(
  files: Files,
  table: list[Tensor],
  family: Family,
  cfg: TransformerConfig,
  leaves: Mapping[str, Any],
) -> None:
  """Checks that every tensor exists with the right shape, and that the table knows all tensors."""
  wanted: dict[str, tuple[int, ...]] = {}
  for tensor in table:
    shape = _file_shape(tensor, cfg, leaves)
    for i in range(cfg.num_layers if '{i}' in tensor.name else 1):
      wanted[tensor.name.format(i=i)] = shape
  missing = sorted(wanted.keys() - files.names)
  if missing:
    tied = (
      ' If the model uses its embeddings for it, config.json has to say '
      '"tie_word_embeddings": true.'
    )
    hint = tied if missing == [family.head] else ''
    raise ValueError(
      f'{files.folder}: {len(missing)} tensors are missing, first {missing[0]!r}.{hint}'
    )
  for name, shape in wanted.items():
    if files.shape(name) != shape:
      raise ValueError(
        f'{files.folder}: tensor {name} has the shape {list(files.shape(name))}, but config.json '
        f'(or model.* of the config) asks for {list(shape)}.'
      )
    if files.dtype(name) not in DTYPES:
      raise ValueError(
        f'{files.folder}: tensor {name} is {files.dtype(name)}; quantised checkpoints are not '
        f'read, only {", ".join(DTYPES)}.'
      )
  head = {family.head}  # a tied copy of the embedding, or replaced by the scalar head
  extra = sorted(n for n in files.names - wanted.keys() - head if not n.endswith(family.harmless))
  if extra:
    raise ValueError(
      f'{files.folder}: {len(extra)} tensors have no place in the model, first {extra[0]!r}.'
    )


def _check_tied(files: Files, family: Family) -> None:
  """A head beside tied embeddings is not read. One that cannot be compared with them is refused,
  because it is no copy of them."""
  head, embedding = family.head, family.embedding
  if head in files.names and (
    files.shape(head) != files.shape(embedding) or files.dtype(head) not in DTYPES
  ):
    raise ValueError(
      f'{files.folder}: tensor {head} is {files.dtype(head)} {list(files.shape(head))}, but '
      f'config.json (tie_word_embeddings) says that it is {embedding}, {files.dtype(embedding)} '
      f'{list(files.shape(embedding))}. Correct the entry, or leave the tensor out of the file.'
    )


def parts(tensor: Tensor, value: np.ndarray, widths: Sequence[int]) -> Sequence[np.ndarray]:
  """The parameters that a row of the table fuses. widths: of the last axis of each."""
  if len(tensor.paths) == 1:
    return [value]
  return value if tensor.indexed else np.split(value, np.cumsum(widths)[:-1], axis=-1)


def _load_one(
  files: Files, tensor: Tensor, cfg: TransformerConfig, leaves, placed
) -> list[jax.Array]:
  """The parameters of one row of the table, piece by piece; no piece is read twice."""
  stacked = tensor.paths[0].startswith('layers/')
  shapes = [tuple(leaves[path].shape) for path in tensor.paths]
  spans, pieces = [], []
  for path, shape in zip(tensor.paths, shapes, strict=True):
    devices = placed[path].addressable_devices_indices_map(shape)
    spans.append(
      {
        d: tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        for d, index in devices.items()
      }
    )
    pieces.append(
      {span: np.empty([b - a for a, b in span], np.float32) for span in set(spans[-1].values())}
    )
  for i in range(cfg.num_layers if stacked else 1):
    users = [[s for s in own if not stacked or s[0][0] <= i < s[0][1]] for own in pieces]
    if not any(users):
      continue
    raw = files.read(tensor.name.format(i=i))
    value = rearrange(
      raw.astype(np.float32),
      tensor.pattern,
      **needed(tensor.pattern.split('->')[0], sizes(cfg, tensor.paths)),
    )
    each = parts(tensor, value, [shape[-1] for shape in shapes])
    for own, wanted, v in zip(pieces, users, each, strict=True):
      for span in wanted:
        cut = tuple(slice(a, b) for a, b in (span[1:] if stacked else span))
        own[span][i - span[0][0] if stacked else ...] = v[cut]
  return [
    jax.make_array_from_single_device_arrays(
      shape, placed[path], [jax.device_put(own[span], d) for d, span in where.items()]
    )
    for path, shape, where, own in zip(tensor.paths, shapes, spans, pieces, strict=True)
  ]
