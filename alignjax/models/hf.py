"""Hugging Face checkpoints in and out: safetensors and config.json, no pickle, no remote code, no torch.

    cfg = TransformerConfig(**hf.fields(name))                config.json -> TransformerConfig
    params = hf.load(name, cfg, head, shardings)              tensor by tensor onto the devices
    hf.save(folder, source, cfg, params)                      a folder that transformers loads

Which families, and which tensor goes where: models/families.py.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from einops import rearrange

from alignjax.models import transformer
from alignjax.models.axes import path_name
from alignjax.models.config import TransformerConfig
from alignjax.models.families import FAMILIES, SCORE, Family, Tensor, read_config
from alignjax.types import Params


def fields(name: str | os.PathLike) -> dict[str, Any]:
  """The fields of TransformerConfig that a checkpoint's config.json declares."""
  return read_config(folder_of(name))[1]


def folder_of(name: str | os.PathLike) -> pathlib.Path:
  """The local folder of a checkpoint: a path, or a name on the hub, downloaded without pickles and code."""
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    return path
  if path.is_absolute() or str(name).count('/') > 1 or str(name).startswith('.'):
    raise FileNotFoundError(f'hf:{name}: no such folder.')
  from huggingface_hub import snapshot_download
  try:
    return pathlib.Path(snapshot_download(str(name), allow_patterns=['*.safetensors', '*.json', '*.model', '*.txt',
                                                                     '*.jinja']))
  except Exception as error:  # noqa: BLE001 the hub's errors are many; the message says what failed
    raise FileNotFoundError(f'hf:{name}: neither a folder here nor to be had from the hub '
                            f'({type(error).__name__}: {str(error).splitlines()[0]}).') from error


class Files:
  """The tensors of a folder's safetensors files by name, each read when asked for. Names as in transformers, whether or
  not the file has the trunk's prefix."""

  def __init__(self, folder: pathlib.Path, family: Family):
    from safetensors import SafetensorError, safe_open
    index = folder / 'model.safetensors.index.json'
    paths = sorted({folder / f for f in json.loads(index.read_text())['weight_map'].values()} if index.exists()
                   else folder.glob('*.safetensors'))
    if not paths:
      other = sorted(p.name for p in folder.glob('*.bin'))
      raise FileNotFoundError(f'{folder}: no *.safetensors file' +
                              (f'; {other[0]} is a pickle, which is not read. Convert it with transformers.' if other else '.'))
    self._where: dict[str, tuple[Any, str]] = {}
    for path in paths:
      try:
        file = safe_open(path, framework='np')
      except FileNotFoundError:
        raise FileNotFoundError(f'{path}: named in {index.name}, but not there.') from None
      except SafetensorError as error:
        raise ValueError(f'{path}: not a whole safetensors file ({error}).') from error
      for name in file.keys():  # noqa: SIM118 not a dict
        full = name if name.startswith((family.prefix, 'lm_head.', 'embed_out.', 'score.')) else family.prefix + name
        self._where[full] = (file, name)
    self.names = set(self._where)
    self.folder = folder

  def shape(self, name: str) -> tuple[int, ...]:
    file, key = self._where[name]
    return tuple(file.get_slice(key).get_shape())

  def read(self, name: str) -> np.ndarray:
    file, key = self._where[name]
    return file.get_tensor(key)


def load(name: str | os.PathLike, cfg: TransformerConfig, head: str, shardings: Callable[[Params], Params],
         key: jax.Array | None = None) -> Params:
  """The float32 parameters of a checkpoint, each on its sharding.

  One tensor is read at a time and cut into the pieces of this process's devices: the host holds these pieces of one of our
  parameters (all layers of it) and one tensor of the file.

  Args:
    name: folder or hub name.
    cfg: the architecture; every tensor's shape is compared with it before anything is read.
    head: 'lm' or 'scalar'. A file without `score.weight` gets a fresh scalar head, drawn with `key`.
    shardings: tree of shapes -> tree of shardings (Sharder.params).
  """
  folder = folder_of(name)
  kind, _ = read_config(folder)
  family = FAMILIES[kind]
  files = Files(folder, family)
  scored = SCORE.name in files.names
  if head == 'lm' and scored:
    raise ValueError(f'{folder}: a reward model (it has {SCORE.name}); a policy cannot start from it.')
  table = [t for t in family.tensors(cfg) if head == 'lm' or not t.paths[0].startswith('final/head')]
  if head == 'scalar' and scored:
    table.append(SCORE)
  shapes = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0), head))
  leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
  placed = {path_name(path): s for path, s in jax.tree_util.tree_leaves_with_path(shardings(shapes))}
  _check(files, table, family, cfg, leaves)
  loaded = {}
  for tensor in table:
    for path, array in zip(tensor.paths, _load_one(files, tensor, cfg, leaves, placed), strict=True):
      loaded[path] = array
  if head == 'scalar':
    fresh = transformer.init_head(cfg, jax.random.key(0) if key is None else key)
    bias = json.loads((folder / 'config.json').read_text()).get('alignjax_score_bias', 0.0)
    fresh['bias'] = fresh['bias'] + bias
    for path in ('kernel', 'bias'):
      loaded.setdefault(f'final/score/{path}', jax.device_put(fresh[path], placed[f'final/score/{path}']))
  return jax.tree_util.tree_map_with_path(lambda path, _: loaded[path_name(path)], shapes)


def has_score(name: str | os.PathLike) -> bool:
  """Whether a checkpoint is a reward model: a sequence classifier's `score.weight` is in its files."""
  folder = folder_of(name)
  return SCORE.name in Files(folder, FAMILIES[read_config(folder)[0]]).names


def _sizes(cfg: TransformerConfig, paths: tuple[str, ...]) -> dict[str, int]:
  heads = cfg.kv_heads if 'key' in paths[0] or 'value' in paths[0] else cfg.num_heads
  return dict(n=heads, h=cfg.head_width, j=len(paths))


def _needed(side: str, sizes: Mapping[str, int]) -> dict[str, int]:
  """Sizes that a pattern's side does not tell: those of its products."""
  return {k: v for k, v in sizes.items() if '(' in side and k in side.replace('(', ' ').replace(')', ' ').split()}


def _file_shape(tensor: Tensor, cfg: TransformerConfig, leaves: Mapping[str, Any]) -> tuple[int, ...]:
  """The shape a tensor of the file must have, from our parameters' shapes."""
  ours = tuple(leaves[tensor.paths[0]].shape)
  ours = ours[1:] if tensor.paths[0].startswith('layers/') else ours
  left, right = (side.strip() for side in tensor.pattern.split('->'))
  right = right.removeprefix('j ') if len(tensor.paths) > 1 else right
  words = re.findall(r'\([^)]*\)|\S+', right)
  size = _sizes(cfg, tensor.paths) | {word: n for word, n in zip(words, ours, strict=True) if not word.startswith('(')}
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


def _check(files: Files, table: list[Tensor], family: Family, cfg: TransformerConfig, leaves: Mapping[str, Any]) -> None:
  """Every tensor there, of the right shape, and none that the table does not know."""
  wanted: dict[str, tuple[int, ...]] = {}
  for tensor in table:
    shape = _file_shape(tensor, cfg, leaves)
    for i in range(cfg.num_layers if '{i}' in tensor.name else 1):
      wanted[tensor.name.format(i=i)] = shape
  missing = sorted(wanted.keys() - files.names)
  if missing:
    raise ValueError(f'{files.folder}: {len(missing)} tensors are missing, first {missing[0]!r}.')
  for name, shape in wanted.items():
    if files.shape(name) != shape:
      raise ValueError(f'{files.folder}: tensor {name} has the shape {list(files.shape(name))}, but config.json (or model.* of '
                       f'the config) asks for {list(shape)}.')
  heads = {'lm_head.weight', 'embed_out.weight'}  # tied copies of the embedding, or replaced by the scalar head
  extra = sorted(n for n in files.names - wanted.keys() - heads if not n.endswith(family.harmless))
  if extra:
    raise ValueError(f'{files.folder}: {len(extra)} tensors have no place in the model, first {extra[0]!r}.')


def _load_one(files: Files, tensor: Tensor, cfg: TransformerConfig, leaves, placed) -> list[jax.Array]:
  """The parameters of one row of the table: piece by piece, no piece twice."""
  stacked = tensor.paths[0].startswith('layers/')
  shape = tuple(leaves[tensor.paths[0]].shape)
  sharding = placed[tensor.paths[0]]
  devices = sharding.addressable_devices_indices_map(shape)
  spans = {d: tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)) for d, index in devices.items()}
  pieces = {span: [np.empty([b - a for a, b in span], np.float32) for _ in tensor.paths] for span in set(spans.values())}
  for i in range(cfg.num_layers if stacked else 1):
    users = [s for s in pieces if not stacked or s[0][0] <= i < s[0][1]]
    if not users:
      continue
    raw = files.read(tensor.name.format(i=i))
    if raw.dtype.kind != 'f' and raw.dtype.name != 'bfloat16':
      raise ValueError(f'{files.folder}: tensor {tensor.name.format(i=i)} is {raw.dtype}; quantised checkpoints are not read.')
    value = rearrange(raw.astype(np.float32), tensor.pattern,
                      **_needed(tensor.pattern.split('->')[0], _sizes(cfg, tensor.paths)))
    values = value if len(tensor.paths) > 1 else [value]
    for span in users:
      cut = tuple(slice(a, b) for a, b in (span[1:] if stacked else span))
      for piece, v in zip(pieces[span], values, strict=True):
        piece[i - span[0][0] if stacked else ...] = v[cut]
  return [jax.make_array_from_single_device_arrays(
      shape, placed[path], [jax.device_put(pieces[spans[d]][j], d) for d in devices]) for j, path in enumerate(tensor.paths)]


def save(folder: str | os.PathLike, source: str | os.PathLike, cfg: TransformerConfig, params: Params, *,
         dtype: str = 'float32', shard_bytes: int = 5 * 10**9, tokenizer: Any = None) -> dict[str, Any]:
  """Writes a folder that transformers loads: policy as a causal language model, reward model as a sequence classifier with
  one label. Written under another name and renamed, so it is whole or not there.

  Args:
    source: the checkpoint the run started from; its config.json and tokenizer files are taken over.
    tokenizer: written instead of the source's.
    dtype: of the file: 'float32', 'bfloat16' or 'float16'.

  Returns:
    What a reader should know: {'class', 'tensors', 'bytes' and, of a reward model, 'bias': where it went}. transformers'
    classifier has no bias: with a LayerNorm before the head it is folded into that norm's bias (exact: nothing else reads
    it); with RMSNorm it stays in config.json as alignjax_score_bias, to be added to the logit. Differences of scores, and
    so rankings, do not depend on it.
  """
  import ml_dtypes
  from safetensors.numpy import save_file
  source, folder = folder_of(source), pathlib.Path(folder)
  kind, _ = read_config(source)
  family = FAMILIES[kind]
  scalar = 'score' in params['final']
  config = json.loads((source / 'config.json').read_text())
  config = {k: v for k, v in config.items() if k not in ('torch_dtype', 'alignjax_score_bias', 'auto_map')}
  config |= dict(architectures=[family.classes[scalar]], dtype=dtype)
  report: dict[str, Any] = {'class': family.classes[scalar]}
  table = family.tensors(cfg)
  if scalar:
    table = [t for t in table if not t.paths[0].startswith('final/head')] + [SCORE]
    params, report['bias'] = _fold_bias(params, config)
    config |= dict(num_labels=1, id2label={'0': 'score'}, label2id={'score': 0}, problem_type='regression')
    config['pad_token_id'] = _pad_apart(config, tokenizer)
  partial = folder.with_name(folder.name + '.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  cast = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}[dtype]
  shards: list[dict[str, np.ndarray]] = [{}]
  total = 0
  names: list[tuple[int, str]] = []
  for tensor in table:
    for i in range(cfg.num_layers if '{i}' in tensor.name else 1):
      values = [np.asarray(leaves[p][i] if p.startswith('layers/') else leaves[p]) for p in tensor.paths]
      left, right = tensor.pattern.split('->')
      whole = np.stack(values) if len(values) > 1 else values[0]
      whole = np.ascontiguousarray(rearrange(whole, f'{right} -> {left}', **_needed(right, _sizes(cfg, tensor.paths))).astype(cast))
      if shards[-1] and sum(x.nbytes for x in shards[-1].values()) + whole.nbytes > shard_bytes:
        save_file(shards[-1], partial / f'shard-{len(shards)}.safetensors', metadata={'format': 'pt'})
        shards[-1] = {}
        shards.append({})
      name = tensor.name.format(i=i)
      shards[-1][name] = whole
      names.append((len(shards), name))
      total += whole.nbytes
  save_file(shards[-1], partial / f'shard-{len(shards)}.safetensors', metadata={'format': 'pt'})
  count = len(shards)
  final = lambda k: 'model.safetensors' if count == 1 else f'model-{k:05d}-of-{count:05d}.safetensors'
  for k in range(1, count + 1):
    (partial / f'shard-{k}.safetensors').chmod(0o644)  # safetensors writes files for the owner alone
    (partial / f'shard-{k}.safetensors').rename(partial / final(k))
  if count > 1:
    (partial / 'model.safetensors.index.json').write_text(json.dumps(
        {'metadata': {'total_size': total}, 'weight_map': {name: final(k) for k, name in names}}, indent=2))
  (partial / 'config.json').write_text(json.dumps(config, indent=2))
  if tokenizer is not None:
    tokenizer.save_pretrained(partial)
  else:
    for path in source.iterdir():
      if path.suffix in ('.json', '.model', '.txt', '.jinja') and not (partial / path.name).exists() and 'index' not in path.name:
        shutil.copy(path, partial / path.name)
  shutil.rmtree(folder, ignore_errors=True)
  partial.rename(folder)
  return report | dict(tensors=len(names), bytes=total)


def _fold_bias(params: Params, config: dict[str, Any]) -> tuple[Params, str]:
  """w.(norm + b) + c = w.(norm + b + c w / |w|^2): a LayerNorm's bias takes the score's."""
  norm, score = params['final']['norm'], params['final']['score']
  bias, w = float(np.asarray(score['bias'])[0]), np.asarray(score['kernel'])[:, 0]
  if 'bias' in norm:
    norm = {**norm, 'bias': np.asarray(norm['bias']) + bias * w / np.dot(w, w)}
    return {**params, 'final': {'norm': norm, 'score': score}}, 'folded into the last norm'
  config['alignjax_score_bias'] = bias
  return params, f'{bias:.6g}, in config.json as alignjax_score_bias: add it to the logit'


def _pad_apart(config: Mapping[str, Any], tokenizer: Any) -> int | None:
  """transformers' classifier reads the last token that is not pad_token_id: right only if pad is no token of a response.
  Without one it takes one row at a time and reads its last token, which is always right."""
  pad = config.get('pad_token_id') if tokenizer is None else tokenizer.pad_token_id
  ends = config.get('eos_token_id')
  ends = [*(ends if isinstance(ends, list) else [ends]), getattr(tokenizer, 'eos_token_id', None)]
  return None if pad in ends else pad


