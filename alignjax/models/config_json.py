"""What a checkpoint's config.json declares, read as transformers reads it: the same entries, with
the same defaults where one is missing. An entry that changes the numbers in a way that
models/transformer.py does not cover is refused by name."""

from __future__ import annotations

import pathlib
import reprlib
import sys
from typing import Any, NamedTuple

from alignjax.models import classifier
from alignjax.models.config import TransformerConfig
from alignjax.models.config_entries import Entries, read_object
from alignjax.models.config_rope import rope, rope_type
from alignjax.models.families import FAMILIES

# Why families that people ask for are not covered.
EXPERTS = 'a mixture of experts'
REASONS = {
  'mixtral': EXPERTS,
  'qwen2_moe': EXPERTS,
  'qwen3_moe': EXPERTS,
  'olmoe': EXPERTS,
  'gpt_oss': EXPERTS,
  'deepseek_v3': EXPERTS,
  'gemma3': 'it sees images too, and its language model alone is a gemma3_text',
  'gemma3n': 'it sees images too, and its layers have further inputs',
}


class Declared(NamedTuple):
  """What config.json says.

  Attributes:
    kind: model_type.
    fields: those of TransformerConfig.
    bound: the entry of config.json that no model.max_length may exceed, or None. It is a table of
      positions, or the context beyond which dynamic rotary positions depend on the longest row of a
      batch.
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
    adapter = (folder / 'adapter_config.json').exists()
    raise FileNotFoundError(
      f'{folder}: no config.json; a checkpoint folder has config.json and model.safetensors.'
      f'{f" It is {as_adapter(folder)}" if adapter else ""}'
    )
  entries = Entries(path, read_object(path))
  kind = entries.values.get('model_type')
  if not isinstance(kind, str) or kind not in FAMILIES:
    reason = f': {REASONS[kind]}' if isinstance(kind, str) and kind in REASONS else ''
    raise ValueError(
      f'{path}: model_type {reprlib.repr(kind)} is not covered{reason}; these are: '
      f'{", ".join(sorted(FAMILIES))}.'
    )
  fields, bound = (_gpt2 if kind == 'gpt2' else _rotary)(kind, _common(kind, entries))
  try:
    TransformerConfig(**fields)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None
  return Declared(kind, fields, bound)


def as_adapter(folder: pathlib.Path) -> str:
  """What to do with a folder of adapters where a checkpoint was expected, as the end of a
  sentence."""
  return (
    f"a PEFT adapter: the init of a stage reads it as 'peft:{folder}', together with its base; "
    'elsewhere, name the base, or merge the adapter into it first.'
  )


def score_bias(folder: pathlib.Path, file: str = 'config.json') -> float:
  """The number that models/export.py left to be added to a reward model's scores:
  alignjax_score_bias of config.json or of adapter_config.json, or 0."""
  path = folder / file
  bias = read_object(path).get(classifier.ENTRY, 0.0)
  if type(bias) not in (int, float) or not abs(bias) <= sys.float_info.max:
    raise ValueError(f'{path}: {classifier.ENTRY}={reprlib.repr(bias)} is not a number.')
  return float(bias)


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


# What is meant where there is no entry. A family that is not in WINDOWS has no window.
WINDOWS = dict(mistral=4096, qwen2=4096, qwen3=4096, gemma2=4096, gemma3_text=4096, phi3=None)
KV_HEADS = dict(mistral=8, qwen2=32, qwen3=32, gemma=16, gemma2=4, gemma3_text=4)
HEAD_DIMS = dict(qwen3=128, gemma=256, gemma2=256, gemma3_text=256)
QK_NORM = dict(qwen3=True, gemma3_text=True, olmo2='all')
NORMS = dict(gemma2='both', gemma3_text='both', olmo2='after')


def _rotary(kind: str, e: Entries) -> tuple[dict[str, Any], str | None]:
  gemma = kind.startswith('gemma')
  layers, positions, heads = (
    e.size('num_hidden_layers'),
    e.size('max_position_embeddings'),
    e.size('num_attention_heads'),
  )
  local_theta = None
  rotary = e
  if kind == 'gemma3_text':
    rotary, local_theta = _two_ropes(e)
  common = dict(
    vocab_size=e.size('vocab_size'),
    num_layers=layers,
    d_model=e.size('hidden_size'),
    num_heads=heads,
    max_length=positions,
    d_ff=e.size('intermediate_size'),
    positions='rotary',
    tie_embeddings=e.flag('tie_word_embeddings', gemma),
  ) | rope(kind, rotary, positions)
  bound = 'max_position_embeddings' if rope_type(rotary) == 'dynamic' else None
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
    ), bound
  biases = [e.flag('attention_bias', False), e.flag('mlp_bias', False)]
  if kind == 'llama' and biases[0] != biases[1]:
    raise ValueError(
      f'{e.path}: attention_bias={biases[0]} with mlp_bias={biases[1]} is not covered; both or '
      f'neither.'
    )
  if kind != 'llama':  # The classes of Llama ignore these entries or have a part of them.
    e.only('attention_bias', False)
    e.only('mlp_bias', False)
  window, windowed = _window(kind, e, layers)
  head_dim = e.size('head_dim', HEAD_DIMS.get(kind))
  fields = common | dict(
    num_kv_heads=e.size(
      'num_key_value_heads', KV_HEADS.get(kind), null=kind not in ('gemma', 'gemma2', 'gemma3_text')
    ),
    head_dim=head_dim,
    norm='rmsnorm1p' if gemma else 'rmsnorm',
    norm_eps=e.number('rms_norm_eps', 1e-5 if kind in ('olmo2', 'phi3') else 1e-6),
    norms=NORMS.get(kind, 'before'),
    mlp='geglu' if gemma else 'swiglu',
    qkv_bias=kind == 'qwen2' or biases[0],
    out_bias=biases[0],
    qk_norm=QK_NORM.get(kind, False),
    window=window,
    windowed_layers=windowed,
    window_rope_theta=local_theta if window else None,
  )
  if gemma:
    return fields | _gemma(kind, e, head_dim), bound
  e.only('hidden_act', 'silu')
  return fields, bound


def _gemma(kind: str, e: Entries, head_dim: int) -> dict[str, Any]:
  """What Gemma has beside the others."""
  e.only('use_bidirectional_attention', None, False)
  scaled = dict(embedding_scale=e.size('hidden_size') ** 0.5)
  if kind == 'gemma':  # Old files call the tanh form 'gelu'.
    e.only('hidden_act', 'gelu_pytorch_tanh', 'gelu')
    return scaled
  e.only('hidden_activation', 'gelu_pytorch_tanh')
  of_gemma2 = kind == 'gemma2'
  query = e.size('query_pre_attn_scalar', 256)
  return scaled | dict(
    query_scale=None if query == head_dim else query**-0.5,
    attention_cap=e.number('attn_logit_softcapping', 50.0 if of_gemma2 else None, null=True),
    logits_cap=e.number('final_logit_softcapping', 30.0 if of_gemma2 else None, null=True),
  )


def _two_ropes(e: Entries) -> tuple[Entries, float]:
  """(the entries with the rotary positions of full layers in the place of both, the base of the
  windowed ones). Files have one object for each kind of layer, or the older entries."""
  table = e.values.get('rope_parameters')
  table = {} if table is None else table
  kinds = ('full_attention', 'sliding_attention')
  if not isinstance(table, dict) or not all(
    name in kinds and (of_kind is None or isinstance(of_kind, dict))
    for name, of_kind in table.items()
  ):
    raise ValueError(
      f'{e.path}: rope_parameters={reprlib.repr(table)} is not covered for gemma3_text; an object '
      f'with {" and ".join(kinds)} is.'
    )
  full, local = (dict(table.get(name) or {}) for name in kinds)
  older = e.values.get('rope_scaling') or {}
  if not isinstance(older, dict):
    raise ValueError(f'{e.path}: rope_scaling={reprlib.repr(older)} is not an object.')
  inside = Entries(e.path, local, 'rope_parameters.sliding_attention.')
  inside.only('rope_type', 'default')
  theta = inside.number('rope_theta', e.number('rope_local_base_freq', 10_000))
  full = {'rope_theta': e.values.get('rope_theta', 1_000_000)} | full | older
  return e._replace(values={**e.values, 'rope_scaling': None, 'rope_parameters': full}), theta


def _window(kind: str, e: Entries, layers: int) -> tuple[int | None, tuple[bool, ...] | None]:
  """(the attention window in tokens, the layers that have it: None where all have it)."""
  types = e.values.get('layer_types')
  covered = ('full_attention', 'sliding_attention') if kind in WINDOWS else ('full_attention',)
  if types is not None and not (
    isinstance(types, list) and len(types) == layers and all(t in covered for t in types)
  ):
    raise ValueError(
      f'{e.path}: layer_types={reprlib.repr(types)} is not covered for {kind}; covered: '
      f'{" and ".join(covered)}, one for each of num_hidden_layers={layers}.'
    )
  if kind not in WINDOWS:
    return None, None
  window = e.size('sliding_window', WINDOWS[kind], null=True)
  if kind in ('mistral', 'phi3'):  # It is in all layers, whatever layer_types says.
    return window, None
  if kind.startswith('qwen') and not e.flag('use_sliding_window', False):
    window = None
  if types is not None:
    windowed = [t == 'sliding_attention' for t in types]
  elif kind.startswith('qwen'):
    first = e.size('max_window_layers', 28, least=0)
    windowed = [window is not None and i >= first for i in range(layers)]
  else:
    period = 2 if kind == 'gemma2' else e.size('sliding_window_pattern', 6)
    windowed = [bool((i + 1) % period) for i in range(layers)]
  if not any(windowed):
    return None, None
  if window is None:
    raise ValueError(
      f'{e.path}: layer_types has sliding_attention, but '
      + ('use_sliding_window and ' if kind.startswith('qwen') else '')
      + 'sliding_window set no window.'
    )
  return window, None if all(windowed) else tuple(windowed)
