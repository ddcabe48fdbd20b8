"""Adapters in the files of huggingface/peft: adapter_config.json and adapter_model.safetensors.

Those of a policy are for a causal language model, and those of a reward model for a sequence
classifier with one label, whose head is trained whole and stands beside them.

The names of modules come from the tables of models/families.py. peft's lora_A.weight is our A
transposed, and so is lora_B.weight. Where a file fuses projections, as GPT-2's c_attn, peft has one
A for all of them. Ours, which has one for each, is written as adapters of their summed rank, which
is the same function; read back, every projection gets a copy of A.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from alignjax.models import classifier, config_json
from alignjax.models.config import TransformerConfig
from alignjax.models.families import Family
from alignjax.models.lora import LoRA
from alignjax.types import Params

CONFIG, TENSORS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
HEAD = f'{PREFIX}score.weight'
HEADS = ('score', 'classifier')  # what peft calls the heads of classifiers, present or not
PLAIN = dict(peft_type='LORA', bias='none')  # what adapter_config.json may say only in this way
MAIN = (None, '', 'main')  # revision: of the base, which is read as the hub has it now
# The entries that are read, and those that leave the function as it is. Any other one that says
# something may change it: DoRA, a base that was changed before training, layers that are repeated.
READ = (
  'r',
  'lora_alpha',
  'use_rslora',
  'rank_pattern',
  'alpha_pattern',
  'modules_to_save',
  classifier.ENTRY,
)
HARMLESS = (
  'task_type',
  'auto_mapping',
  'peft_version',
  'base_model_name_or_path',
  'inference_mode',
  'target_modules',
  'exclude_modules',
  'lora_dropout',
  'fan_in_fan_out',
  'layers_pattern',
  'megatron_core',
  'qalora_group_size',
  'runtime_config',
)
# The ways to begin that do not change the base. PiSSA, OLoRA and others take a part out of it.
BEGINNINGS = (True, False, None, 'gaussian', 'eva', 'orthogonal')


class Module(NamedTuple):
  """A module of a checkpoint whose weight is one or more of our kernels.

  Attributes:
    name: its name, where {i} stands for the layer.
    targets: (group, name) of our projections; several where the file fuses them.
    pattern: of the kernels, from the file to ours (families.Tensor).
  """

  name: str
  targets: tuple[tuple[str, str], ...]
  pattern: str

  @property
  def short(self) -> str:
    """The last two parts of the name, which tell it from every other module of a layer."""
    return '.'.join(self.name.split('.')[-2:])


def save(
  folder: str | os.PathLike,
  family: Family,
  cfg: TransformerConfig,
  lora: LoRA,
  adapters: Params,
  base: str,
  more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Writes adapters. The folder exists.

  Args:
    folder: the folder to write to.
    family, cfg: of the checkpoint that the adapters belong to.
    lora: their declaration.
    adapters: {'layers': ...} of a policy, and {'final': {'score': ...}} beside it of a reward model
      (models/lora.py). The bias of the score is not written.
    base: the name of the checkpoint, for adapter_config.json.
    more: further entries of adapter_config.json.

  Returns:
    {'modules': how many modules of a layer have adapters, 'bytes'}.
  """
  from safetensors.numpy import save_file

  tensors, names, ranks, alphas = {}, [], {}, {}
  for module in modules(family, cfg):
    there = [t for t in module.targets if t[1] in adapters['layers'].get(t[0], {})]
    if not there:
      continue
    names.append(module.short)
    if len(module.targets) > 1:
      ranks[module.short] = lora.rank * len(there)
      alphas[module.short] = lora.alpha * len(there)  # The same scale.
    own = {t: adapters['layers'][t[0]][t[1]] for t in there}
    for i in range(cfg.num_layers):
      pair = [
        {t: np.asarray(x[k][i], np.float32) for t, x in own.items()} for k in ('lora_a', 'lora_b')
      ]
      a, b = _fused(module, cfg, *pair)
      name = PREFIX + module.name.format(i=i)
      tensors[f'{name}.lora_A.weight'] = np.ascontiguousarray(a)
      tensors[f'{name}.lora_B.weight'] = np.ascontiguousarray(b)
  scalar = 'final' in adapters
  if scalar:
    tensors[HEAD] = np.ascontiguousarray(np.asarray(adapters['final']['score']['kernel']).T)
  folder = pathlib.Path(folder)
  save_file(tensors, folder / TENSORS, metadata={'format': 'pt'})
  config = PLAIN | dict(
    task_type='SEQ_CLS' if scalar else 'CAUSAL_LM',
    modules_to_save=['score'] if scalar else None,
    base_model_name_or_path=base,
    r=lora.rank,
    lora_alpha=lora.alpha,
    lora_dropout=0.0,
    target_modules=names,
    rank_pattern=ranks,
    alpha_pattern=alphas,
    fan_in_fan_out=_transposed(family),
    inference_mode=True,
    **(more or {}),
  )
  (folder / CONFIG).write_text(json.dumps(config, indent=2))
  return {'modules': len(names), 'bytes': sum(x.nbytes for x in tensors.values())}


def read(folder: str | os.PathLike, family: Family, cfg: TransformerConfig) -> tuple[LoRA, Params]:
  """(the declaration, the adapters as numpy arrays) of a folder that peft has written for a causal
  language model or for a sequence classifier with one label, whose adapters have a head
  ('final').

  Modules of different ranks get the largest one, with zeros, and the scale of each becomes part of
  B.

  Raises:
    ValueError: it holds something else than adapters of the projections.
  """
  from safetensors.numpy import load_file

  folder = pathlib.Path(folder)
  config = _read_config(folder / CONFIG)
  try:
    tensors = load_file(folder / TENSORS)
  except Exception as error:  # noqa: BLE001 damaged files raise what safetensors raises
    raise ValueError(
      f'{folder / TENSORS}: not a whole safetensors file ({type(error).__name__}: {error}).'
    ) from None
  head = _head(tensors, cfg, folder) if config.get('modules_to_save') else {}
  found: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
  for module in modules(family, cfg):
    names = [PREFIX + module.name.format(i=i) for i in range(cfg.num_layers)]
    if not any(f'{name}.lora_A.weight' in tensors for name in names):
      continue
    for name in names:
      a, b = (_taken(tensors, f'{name}.lora_{k}.weight', folder) for k in 'AB')
      scale = _scale(config, name, len(a))
      for target, pair in _parts(module, cfg, a, b * scale, f'{folder / TENSORS}: {name}').items():
        found.setdefault(target, []).append(pair)
  if tensors:
    raise ValueError(
      f'{folder / TENSORS}: {len(tensors)} tensors have no place among adapters of projections, '
      f'first {min(tensors)!r}.'
    )
  if not found:
    raise ValueError(f'{folder / TENSORS} has no adapters of this architecture.')
  rank = max(a.shape[-1] for pairs in found.values() for a, _ in pairs)
  layers: dict[str, Any] = {}
  for (group, name), pairs in found.items():
    layers.setdefault(group, {})[name] = {
      'lora_a': np.stack([_padded(a, rank, -1) for a, _ in pairs]),
      'lora_b': np.stack([_padded(b, rank, 0) for _, b in pairs]),
    }
  targets = tuple(sorted({name for _, name in found}))
  return LoRA(rank=rank, alpha=float(rank), targets=targets), {'layers': layers} | head


def base_of(folder: str | os.PathLike) -> str:
  """The name of the checkpoint that adapters belong to, as adapter_config.json has it."""
  path = pathlib.Path(folder) / CONFIG
  base = _read_config(path).get('base_model_name_or_path')
  if not isinstance(base, str) or not base:
    raise ValueError(f'{path}: base_model_name_or_path={base!r} names no checkpoint.')
  return base


def has_score(folder: str | os.PathLike) -> bool:
  """Whether adapters are those of a reward model: the score of a classifier stands beside them."""
  return bool(_read_config(pathlib.Path(folder) / CONFIG).get('modules_to_save'))


def modules(family: Family, cfg: TransformerConfig) -> Iterator[Module]:
  """The modules of a layer that can have adapters."""
  for tensor in family.tensors(cfg):
    paths = [path.split('/') for path in tensor.paths]
    if paths[0][0] == 'layers' and paths[0][-1] == 'kernel':
      targets = tuple((group, name) for _, group, name, _ in paths)
      yield Module(tensor.name.removesuffix('.weight'), targets, tensor.pattern)


def _transposed(family: Family) -> bool:
  """Whether weights are [inputs, outputs], as in transformers' Conv1D."""
  return family.prefix == 'transformer.'


def _sides(module: Module) -> tuple[str, str]:
  """The outputs of the kernels in the file and in ours, as einops names: of 'd (j n h) -> j d (n
  h)' '(j n h)' and 'j (n h)', and of a kernel that is not fused 'o' and 'o'."""
  if len(module.targets) == 1:
    return 'o', 'o'
  left, right = (side.strip() for side in module.pattern.split('->'))
  return left.removeprefix('d ').removesuffix(' d'), right.replace('j d', 'j')


def _fused(module: Module, cfg: TransformerConfig, a: Mapping, b: Mapping) -> tuple[Any, Any]:
  """(lora_A.weight, lora_B.weight) of one layer. a, b: of each target that has adapters."""
  flat = [a[t].reshape(-1, a[t].shape[-1]).T for t in module.targets if t in a]
  if len(module.targets) == 1:
    (target,) = module.targets
    return flat[0], b[target].T
  rank = len(flat[0])
  if 'j' not in module.pattern:
    fused = np.zeros((sum(_outputs(cfg, name) for _, name in module.targets), rank * len(flat)))
    row = column = 0
    for target in module.targets:
      width = _outputs(cfg, target[1])
      if target in b:
        fused[row : row + width, column : column + rank] = b[target].T
        column += rank
      row += width
    return np.concatenate(flat), fused.astype(np.float32)
  # The columns of each projection's own part of the rank.
  width = next(iter(b.values())).shape[-1]
  parts = np.zeros((len(module.targets), rank * len(flat), width), np.float32)
  at = 0
  for j, target in enumerate(module.targets):
    if target in b:
      parts[j, at : at + rank] = b[target]
      at += rank
  theirs, ours = _sides(module)
  ours = ours.replace('j', 'j r', 1)
  fused = rearrange(
    parts, f'{ours} -> {theirs} r', n=cfg.num_heads, h=cfg.head_width, j=len(module.targets)
  )
  return np.concatenate(flat), fused


def _outputs(cfg: TransformerConfig, name: str) -> int:
  """The number of outputs of a projection."""
  return {
    'query': cfg.num_heads * cfg.head_width,
    'key': cfg.kv_heads * cfg.head_width,
    'value': cfg.kv_heads * cfg.head_width,
    'up': cfg.mlp_width,
    'gate': cfg.mlp_width,
  }.get(name, cfg.d_model)


def _parts(
  module: Module, cfg: TransformerConfig, a: np.ndarray, b: np.ndarray, where: str
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
  """(A [inputs..., r], B [r, outputs]) of each target of one layer, from peft's two tensors."""
  width, heads = cfg.head_width, cfg.num_heads
  name = module.targets[0][1]
  inputs = {'out': heads * width, 'down': cfg.mlp_width}.get(name, cfg.d_model)
  widths = [_outputs(cfg, name) for _, name in module.targets]
  outputs = sum(widths)
  if a.shape != (len(a), inputs) or b.shape != (outputs, len(a)):
    raise ValueError(
      f'{where}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not belong to a projection '
      f'of {inputs} inputs and {outputs} outputs: these are adapters of another base.'
    )
  if len(module.targets) == 1:
    shape = (heads, width) if name == 'out' else (inputs,)
    return {module.targets[0]: (a.T.reshape(*shape, len(a)), b.T)}
  if 'j' not in module.pattern:
    each = [part.T for part in np.split(b, np.cumsum(widths)[:-1])]
    return {target: (a.T, each[j]) for j, target in enumerate(module.targets)}
  theirs, ours = _sides(module)
  ours = ours.replace('j', 'j r', 1)
  each = rearrange(b, f'{theirs} r -> {ours}', n=heads, h=width, j=len(module.targets))
  return {target: (a.T, each[j]) for j, target in enumerate(module.targets)}


def _head(tensors: dict[str, np.ndarray], cfg: TransformerConfig, folder: pathlib.Path) -> Params:
  """The head of a classifier, {'final': ...}. Its tensor is taken out of `tensors`."""
  kernel = _taken(tensors, HEAD, folder)
  if kernel.shape != (1, cfg.d_model):
    raise ValueError(
      f'{folder / TENSORS}: {HEAD} {list(kernel.shape)} is not the head of a classifier with one '
      f'label, [1, {cfg.d_model}].'
    )
  bias = np.float32([config_json.score_bias(folder, CONFIG)])
  return {'final': {'score': {'kernel': kernel.T, 'bias': bias}}}


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    config = json.loads(path.read_bytes())
    if not isinstance(config, dict):
      raise TypeError('it is no object')
  except (ValueError, TypeError, OSError) as error:
    raise ValueError(f'{path}: no adapter_config.json of peft ({error}).') from None
  for key, plain in PLAIN.items():
    if config.get(key, plain) != plain:
      raise ValueError(f'{path}: {key}={config[key]!r} is not covered, only {plain!r}.')
  begun = config.get('init_lora_weights')
  if begun not in BEGINNINGS:
    raise ValueError(
      f'{path}: init_lora_weights={begun!r} is not covered, because it changes the base; peft can '
      f'convert such adapters (save_pretrained with path_initial_model_for_weight_conversion).'
    )
  if (revision := config.get('revision')) not in MAIN:
    raise ValueError(
      f'{path}: revision={revision!r} of the base is not covered, only the main one: download that '
      f'revision, name its folder as base_model_name_or_path, and delete the entry revision.'
    )
  known = (*PLAIN, *READ, *HARMLESS, 'init_lora_weights', 'eva_config', 'revision')
  for key in sorted(config.keys() - set(known)):
    if config[key]:
      raise ValueError(f'{path}: {key}={config[key]!r} is not covered.')
  whole = config.get('modules_to_save') or []
  if whole and not (config.get('task_type') == 'SEQ_CLS' and {*whole} <= {*HEADS}):
    raise ValueError(
      f'{path}: modules_to_save={whole} are whole modules beside the adapters, which are not '
      f'covered but for the score of a classifier (task_type SEQ_CLS).'
    )
  if config.get(classifier.ENTRY) and not whole:
    raise ValueError(
      f'{path}: {classifier.ENTRY}={config[classifier.ENTRY]!r} is for the scores of a reward '
      f'model, but these adapters have no head (modules_to_save). Delete the entry.'
    )
  for key in ('r', 'lora_alpha'):
    if isinstance(config.get(key), bool) or not isinstance(config.get(key), (int, float)):
      raise ValueError(f'{path}: {key}={config.get(key)!r} is no number.')
  return config


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
  """alpha / rank of a module, as peft looks for them (utils/other.py: get_pattern_key): of the
  first pattern, a regular expression, that the name ends with, or else of all modules."""

  def of(pattern, default):
    for ending, value in (config.get(pattern) or {}).items():
      if re.match(rf'(.*\.)?({ending})$', name.removeprefix(PREFIX)):
        return value
    return default

  declared = of('rank_pattern', config['r'])
  if declared != rank:
    raise ValueError(f'{CONFIG}: rank {declared} for {name}, whose tensors have {rank}.')
  alpha = of('alpha_pattern', config['lora_alpha'])
  return alpha / (math.sqrt(rank) if config.get('use_rslora') else rank)


def _taken(tensors: dict[str, np.ndarray], name: str, folder: pathlib.Path) -> np.ndarray:
  if name not in tensors:
    raise ValueError(f'{folder / TENSORS}: tensor {name!r} is missing.')
  return tensors.pop(name).astype(np.float32)


def _padded(x: np.ndarray, rank: int, axis: int) -> np.ndarray:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, rank - x.shape[axis])
  return np.pad(x, widths)
