"""What a checkpoint's config.json declares, read as transformers reads it: the same entries, with
the same defaults where one is missing. An entry that changes the numbers in a way that
models/transformer.py does not cover is refused by name."""

from __future__ import annotations

import json
import math
import pathlib
import reprlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alignjax.models.config import TransformerConfig
from alignjax.models.families import FAMILIES

REQUIRED = object()
LARGEST = 2**31 - 1


class Declared(NamedTuple):
  """What config.json says.

  Attributes:
    kind: model_type.
    fields: those of TransformerConfig.
    bound: the entry of config.json that no model.max_length may exceed, or None. It is a window of
      attention, beyond which its layers would see less than ours, a table of positions, or the
      context beyond which dynamic rotary positions depend on the longest row of a batch.
  """

  kind: str
  fields: dict[str, Any]
  bound: str | None


def declared(folder: pathlib.Path) -> Declared:
  """What the config.json of a folder says.

  Raises:
    ValueError, FileNotFoundError: with the file and the entry.
  """
  path = folder / 'config.json'
  if not path.exists():
    adapter = (
      ' It is a PEFT adapter; merge it into its model first.'
      if (folder / 'adapter_config.json').exists()
      else ''
    )
    raise FileNotFoundError(
      f'{folder}: no config.json; a checkpoint folder has config.json and '
      f'model.safetensors.{adapter}'
    )
  entries = Entries(path, read_object(path))
  kind = entries.values.get('model_type')
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise ValueError(
      f'{path}: model_type {reprlib.repr(kind)} is not covered; these are: '
      f'{", ".join(sorted(FAMILIES))}.'
    )
  fields, bound = (_gpt2 if kind == 'gpt2' else _rotary)(kind, _common(kind, entries))
  try:
    TransformerConfig(**fields)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None
  return Declared(kind, fields, bound)


def score_bias(folder: pathlib.Path) -> float:
  """The number that models/export.py left to be added to a reward model's scores:
  alignjax_score_bias of config.json, or 0."""
  path = folder / 'config.json'
  bias = read_object(path).get('alignjax_score_bias', 0.0)
  if type(bias) not in (int, float) or not abs(bias) <= sys.float_info.max:
    raise ValueError(f'{path}: alignjax_score_bias={reprlib.repr(bias)} is not a number.')
  return float(bias)


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object from a file in UTF-8. Raises ValueError that names the file, and the line where
  it is no JSON."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except json.JSONDecodeError as error:
    raise ValueError(f'{path}, line {error.lineno}: not JSON ({error.msg}).') from error
  except (UnicodeDecodeError, ValueError, RecursionError) as error:
    raise ValueError(f'{path}: not JSON ({error}).') from error
  except OSError as error:
    raise FileNotFoundError(f'{path}: cannot be read ({error.strerror}).') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path}: a JSON object is expected, not {reprlib.repr(value)}.')
  return value


class Entries(NamedTuple):
  """The entries of a JSON object by name and kind. A missing or wrong one is a ValueError with the
  file and the entry."""

  path: pathlib.Path
  values: Mapping[str, Any]
  inside: str = ''

  def _take(
    self, name: str, default: Any, null: bool, right: Callable[[Any], bool], what: str
  ) -> Any:
    value = self.values.get(name, default)
    if value is REQUIRED:
      raise ValueError(f'{self.path}: the entry {self.inside + name!r} is missing.')
    if value is not default and not (value is None and null) and not right(value):
      raise ValueError(f'{self.path}: {self.inside}{name}={reprlib.repr(value)} is not {what}.')
    return value

  def size(self, name: str, default: Any = REQUIRED, null: bool = False, least: int = 1) -> Any:
    """A whole number from `least` on. null: whether the file may have null."""
    return self._take(
      name,
      default,
      null,
      lambda v: type(v) is int and least <= v <= LARGEST,
      f'a whole number from {least} to {LARGEST}',
    )

  def number(self, name: str, default: Any = REQUIRED, null: bool = False) -> Any:
    """A number above 0. null: whether the file may have null."""
    value = self._take(name, default, null, _is_positive, 'a number above 0')
    return None if value is None else float(value)

  def numbers(self, name: str) -> tuple[float, ...]:
    """A list of numbers above 0."""

    def right(value):
      return isinstance(value, list) and all(map(_is_positive, value))

    return tuple(map(float, self._take(name, REQUIRED, False, right, 'a list of numbers above 0')))

  def flag(self, name: str, default: bool) -> bool:
    return self._take(name, default, False, lambda v: type(v) is bool, 'true or false')

  def only(self, name: str, *allowed: Any) -> None:
    """Refuses every value except for the allowed ones, of which the first is the default of
    transformers."""
    value = self.values.get(name, allowed[0])
    if not any(type(value) is type(a) and value == a for a in allowed):
      raise ValueError(
        f'{self.path}: {self.inside}{name}={reprlib.repr(value)} is not covered for '
        f'{self.values.get("model_type")}; covered: {", ".join(map(reprlib.repr, allowed))}.'
      )


def _is_positive(value: Any) -> bool:
  return type(value) in (int, float) and 0 < value < 1e30


def _common(kind: str, e: Entries) -> Entries:
  """Refuses what no family covers."""
  classes = e.values.get('architectures')
  known = FAMILIES[kind].classes
  if classes not in (None, []) and not (
    isinstance(classes, list) and set(map(str, classes)) & {*known}
  ):
    raise ValueError(
      f'{e.path}: architectures={reprlib.repr(classes)} is not covered for {kind}; covered: '
      f'{", ".join(known)}.'
    )
  e.only('quantization_config', None)
  e.only('transformers_weights', None)
  e.only('per_layer_config', None, {})
  e.only('is_causal', True)
  e.only('is_encoder_decoder', False)
  # The dtype of the tensors is read from them, but a quantised file would be another format.
  for name in ('dtype', 'torch_dtype'):
    e.only(name, None, 'float32', 'bfloat16', 'float16', 'float64')
  return e


def _gpt2(kind: str, e: Entries) -> tuple[dict[str, Any], str]:
  c = dict(e.values)
  for name, alias in (
    ('n_embd', 'hidden_size'),
    ('n_layer', 'num_hidden_layers'),
    ('n_head', 'num_attention_heads'),
    ('n_positions', 'max_position_embeddings'),
  ):
    if alias in c:
      if c.setdefault(name, c[alias]) != c[alias]:
        raise ValueError(
          f'{e.path}: {name}={reprlib.repr(c[name])}, but {alias}={reprlib.repr(c[alias])}; they '
          f'are one entry.'
        )
  e = Entries(e.path, c)
  e.only('activation_function', 'gelu_new', 'gelu_pytorch_tanh')
  e.only('scale_attn_by_inverse_layer_idx', False)
  e.only('scale_attn_weights', True)
  e.only('add_cross_attention', False)
  return dict(
    vocab_size=e.size('vocab_size'),
    num_layers=e.size('n_layer'),
    d_model=e.size('n_embd'),
    num_heads=e.size('n_head'),
    max_length=e.size('n_positions'),
    d_ff=e.size('n_inner', None),
    norm_eps=e.number('layer_norm_epsilon', 1e-5),
    positions='learned',
    tie_embeddings=e.flag('tie_word_embeddings', True),
  ), 'n_positions'


def _rotary(kind: str, e: Entries) -> tuple[dict[str, Any], str | None]:
  layers, positions, heads = (
    e.size('num_hidden_layers'),
    e.size('max_position_embeddings'),
    e.size('num_attention_heads'),
  )
  common = dict(
    vocab_size=e.size('vocab_size'),
    num_layers=layers,
    d_model=e.size('hidden_size'),
    num_heads=heads,
    max_length=positions,
    d_ff=e.size('intermediate_size'),
    positions='rotary',
    tie_embeddings=e.flag('tie_word_embeddings', False),
  ) | _rope(kind, e, positions)
  dynamic = 'max_position_embeddings' if _rope_type(e) == 'dynamic' else None
  if kind == 'gpt_neox':
    e.only('hidden_act', 'gelu')
    e.only('attention_bias', True)
    if e.size('head_dim', None) not in (None, common['d_model'] // heads):
      raise ValueError(
        f'{e.path}: head_dim={e.values["head_dim"]} is not covered for gpt_neox; it is '
        f'hidden_size / heads.'
      )
    return common | dict(
      norm_eps=e.number('layer_norm_eps', 1e-5),
      mlp='gelu_exact',
      parallel_residual=e.flag('use_parallel_residual', True),
    ), dynamic
  e.only('hidden_act', 'silu')
  biases = [e.flag('attention_bias', False), e.flag('mlp_bias', False)]
  if kind == 'llama' and biases[0] != biases[1]:
    raise ValueError(
      f'{e.path}: attention_bias={biases[0]} with mlp_bias={biases[1]} is not covered; both or '
      f'neither.'
    )
  if kind != 'llama':  # The classes of Llama ignore these entries or have a part of them.
    e.only('attention_bias', False)
    e.only('mlp_bias', False)
  window = _window(kind, e, layers)
  if window and _rope_type(e) == 'longrope':
    raise ValueError(f"{e.path}: sliding_window={window} with rope_type 'longrope' is not covered.")
  kv_heads = e.size('num_key_value_heads', {'llama': None, 'mistral': 8}.get(kind, 32), null=True)
  head_dim = e.size('head_dim', 128) if kind == 'qwen3' else e.size('head_dim', None)
  return common | dict(
    # Up to the window, attention is the full one.
    max_length=min(common['max_length'], window or positions),
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    norm='rmsnorm',
    norm_eps=e.number('rms_norm_eps', 1e-6),
    mlp='swiglu',
    qkv_bias=kind == 'qwen2' or biases[0],
    out_bias=biases[0],
    qk_norm=kind == 'qwen3',
  ), 'sliding_window' if window else dynamic


def _window(kind: str, e: Entries, layers: int) -> int | None:
  """The attention window of any layer in tokens, or None."""
  types = e.values.get('layer_types')
  covered = ('full_attention',) if kind == 'llama' else ('full_attention', 'sliding_attention')
  if types is not None and not (
    isinstance(types, list) and len(types) == layers and all(t in covered for t in types)
  ):
    raise ValueError(
      f'{e.path}: layer_types={reprlib.repr(types)} is not covered for {kind}; covered: '
      f'{" and ".join(covered)}, one for each of num_hidden_layers={layers}.'
    )
  if kind == 'llama':
    return None
  if kind == 'mistral':  # It is in all layers, whatever layer_types says.
    return e.size('sliding_window', 4096, null=True)
  window = (
    e.size('sliding_window', 4096, null=True) if e.flag('use_sliding_window', False) else None
  )
  if types is None:
    return window if layers > e.size('max_window_layers', 28, least=0) else None
  if 'sliding_attention' not in types:
    return None
  if window is None:
    raise ValueError(
      f'{e.path}: layer_types has sliding_attention, but use_sliding_window and sliding_window '
      f'set no window.'
    )
  return window


def rope_table(values: Mapping[str, Any]) -> str:
  """The entry with the table of rotary positions. Of two, transformers takes rope_scaling, the
  older one, if it holds anything."""
  return 'rope_scaling' if values.get('rope_scaling') else 'rope_parameters'


def _rope_type(e: Entries) -> Any:
  table = e.values.get(rope_table(e.values)) or {}
  return table.get('rope_type', table.get('type', 'default'))


def _rope(kind: str, e: Entries, positions: int) -> dict[str, Any]:
  """The frequencies of the rotary positions, and max_length where they belong to a shorter context
  than max_position_embeddings."""
  name = rope_table(e.values)
  table = e.values.get(name)
  is_flat = table is None or (
    isinstance(table, dict) and not any(isinstance(v, dict) for v in table.values())
  )
  if not is_flat:
    raise ValueError(
      f'{e.path}: {name}={reprlib.repr(table)} is not covered; one flat object for all layers is.'
    )
  rope = Entries(e.path, table or {}, f'{name}.')
  neox = kind == 'gpt_neox'
  out: dict[str, Any] = dict(
    rope_theta=rope.number(
      'rope_theta', e.number('rotary_emb_base' if neox else 'rope_theta', 10_000)
    )
  )
  fraction = rope.number(
    'partial_rotary_factor',
    e.number('rotary_pct', 0.25) if neox else e.number('partial_rotary_factor', 1.0),
  )
  if fraction > 1 or not neox and fraction != 1:
    raise ValueError(f'{e.path}: partial_rotary_factor={fraction} is not covered for {kind}.')
  if neox:
    out['rotary_fraction'] = fraction
  scaling = _rope_type(e)
  original = positions
  if scaling in ('llama3', 'yarn', 'longrope'):
    name_of_original = 'original_max_position_embeddings'
    original = e.size(name_of_original, rope.size(name_of_original, positions))
  if scaling == 'llama3':
    low, high = rope.number('low_freq_factor'), rope.number('high_freq_factor')
    if low >= high:
      raise ValueError(
        f'{e.path}: {name}: low_freq_factor={low} has to be below high_freq_factor={high}.'
      )
    out['rope_llama3'] = (rope.number('factor'), low, high, original)
  elif scaling == 'linear':
    out['rope_scaling'] = ('linear', rope.number('factor'))
  elif scaling == 'dynamic':
    rope.number('factor')  # It counts beyond max_position_embeddings only.
  elif scaling == 'yarn':
    if out['rope_theta'] <= 1:
      raise ValueError(
        f'{e.path}: {name}: rope_theta={out["rope_theta"]} has to be above 1 for yarn.'
      )
    out['rope_scaling'] = _yarn(rope, original, positions)
  elif scaling == 'longrope':
    if original < 2:
      raise ValueError(f'{e.path}: {name}: longrope has an original context of {original}.')
    out['rope_scaling'] = _longrope(rope, original, positions)
    out['max_length'] = min(original, positions)
  elif scaling != 'default':
    raise ValueError(
      f'{e.path}: {name}: rope_type {reprlib.repr(scaling)} is not covered; covered: default, '
      f'linear, dynamic, yarn, longrope and llama3.'
    )
  return out


def _yarn(rope: Entries, original: int, positions: int) -> tuple[Any, ...]:
  factor = rope.number('factor', null=True) or positions / original
  magnitude = rope.number('attention_factor', None, null=True)
  if magnitude is None:

    def of(scale, weight=1.0):
      return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0

    one, all_dimensions = (rope.number(n, None, null=True) for n in ('mscale', 'mscale_all_dim'))
    both = one and all_dimensions
    magnitude = of(factor, one) / of(factor, all_dimensions) if both else of(factor)
  fast, slow = rope.number('beta_fast', 32, null=True), rope.number('beta_slow', 1, null=True)
  return 'yarn', factor, original, fast or 32.0, slow or 1.0, rope.flag('truncate', True), magnitude


def _longrope(rope: Entries, original: int, positions: int) -> tuple[Any, ...]:
  factor = rope.number('factor', None, null=True) or positions / original
  magnitude = rope.number('attention_factor', None, null=True)
  if magnitude is None:
    magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
  return 'longrope', rope.numbers('short_factor'), rope.numbers('long_factor'), original, magnitude
