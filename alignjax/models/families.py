"""The families of Hugging Face checkpoints: what config.json says, and where every tensor goes.

A family is a table of tensors: its name in the file, our parameters, and an einops pattern between the two, which is read
forwards to load and backwards to save (models/hf.py). The layout is that of transformers' modeling files of each family.

Not covered, and refused with the list of what is: Gemma (norms around both sides of a block, capped logits and a second
rotary base would each need a switch of their own in the transformer), mixtures of experts, quantised files.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alignjax.models.config import TransformerConfig


class Tensor(NamedTuple):
  """name: in the file, {i} the layer. paths: of our parameters, several where the file fuses them ('j' in the pattern is
  then which one). pattern: einops, file -> ours."""
  name: str
  paths: tuple[str, ...]
  pattern: str


def _row(name: str, paths: str, pattern: str) -> Tensor:
  return Tensor(name, tuple(paths.split()), pattern)


QKV = 'layers/attention/query/{0} layers/attention/key/{0} layers/attention/value/{0}'
DENSE, BIAS, SAME = 'o i -> i o', 'o -> o', 'v d -> v d'


def _gpt2(cfg: TransformerConfig) -> list[Tensor]:
  h = 'transformer.h.{i}.'
  return [
      _row('transformer.wte.weight', 'embed/tokens', SAME),
      _row('transformer.wpe.weight', 'embed/positions', SAME),
      *_norm('transformer.ln_f', 'final/norm'), *_norm(h + 'ln_1', 'layers/norm_1'), *_norm(h + 'ln_2', 'layers/norm_2'),
      _row(h + 'attn.c_attn.weight', QKV.format('kernel'), 'd (j n h) -> j d (n h)'),  # Conv1D: [in, out]
      _row(h + 'attn.c_attn.bias', QKV.format('bias'), '(j n h) -> j (n h)'),
      _row(h + 'attn.c_proj.weight', 'layers/attention/out/kernel', '(n h) d -> n h d'),
      _row(h + 'attn.c_proj.bias', 'layers/attention/out/bias', BIAS),
      _row(h + 'mlp.c_fc.weight', 'layers/mlp/up/kernel', 'i o -> i o'),
      _row(h + 'mlp.c_fc.bias', 'layers/mlp/up/bias', BIAS),
      _row(h + 'mlp.c_proj.weight', 'layers/mlp/down/kernel', 'i o -> i o'),
      _row(h + 'mlp.c_proj.bias', 'layers/mlp/down/bias', BIAS),
  ]


def _neox(cfg: TransformerConfig) -> list[Tensor]:
  h = 'gpt_neox.layers.{i}.'
  return [
      _row('gpt_neox.embed_in.weight', 'embed/tokens', SAME),
      *_norm('gpt_neox.final_layer_norm', 'final/norm'), *_norm(h + 'input_layernorm', 'layers/norm_1'),
      *_norm(h + 'post_attention_layernorm', 'layers/norm_2'),
      _row(h + 'attention.query_key_value.weight', QKV.format('kernel'), '(n j h) d -> j d (n h)'),
      _row(h + 'attention.query_key_value.bias', QKV.format('bias'), '(n j h) -> j (n h)'),
      _row(h + 'attention.dense.weight', 'layers/attention/out/kernel', 'd (n h) -> n h d'),
      _row(h + 'attention.dense.bias', 'layers/attention/out/bias', BIAS),
      *_linear(h + 'mlp.dense_h_to_4h', 'layers/mlp/up'), *_linear(h + 'mlp.dense_4h_to_h', 'layers/mlp/down'),
      *([] if cfg.tie_embeddings else [_row('embed_out.weight', 'final/head/kernel', DENSE)]),
  ]


def _llama(cfg: TransformerConfig) -> list[Tensor]:
  h = 'model.layers.{i}.'
  rows = [
      _row('model.embed_tokens.weight', 'embed/tokens', SAME),
      _row('model.norm.weight', 'final/norm/scale', BIAS),
      _row(h + 'input_layernorm.weight', 'layers/norm_1/scale', BIAS),
      _row(h + 'post_attention_layernorm.weight', 'layers/norm_2/scale', BIAS),
      _row(h + 'self_attn.o_proj.weight', 'layers/attention/out/kernel', 'd (n h) -> n h d'),
  ]
  for theirs, ours in (('q', 'query'), ('k', 'key'), ('v', 'value')):
    rows.append(_row(f'{h}self_attn.{theirs}_proj.weight', f'layers/attention/{ours}/kernel', DENSE))
    if cfg.qkv_bias:
      rows.append(_row(f'{h}self_attn.{theirs}_proj.bias', f'layers/attention/{ours}/bias', BIAS))
    if cfg.qk_norm and ours != 'value':
      rows.append(_row(f'{h}self_attn.{theirs}_norm.weight', f'layers/attention/{ours}_norm/scale', BIAS))
  for theirs, ours in (('up', 'up'), ('gate', 'gate'), ('down', 'down')):
    rows.append(_row(f'{h}mlp.{theirs}_proj.weight', f'layers/mlp/{ours}/kernel', DENSE))
    if cfg.out_bias:
      rows.append(_row(f'{h}mlp.{theirs}_proj.bias', f'layers/mlp/{ours}/bias', BIAS))
  if cfg.out_bias:
    rows.append(_row(h + 'self_attn.o_proj.bias', 'layers/attention/out/bias', BIAS))
  if not cfg.tie_embeddings:
    rows.append(_row('lm_head.weight', 'final/head/kernel', DENSE))
  return rows


def _norm(name: str, path: str) -> list[Tensor]:
  return [_row(f'{name}.weight', f'{path}/scale', BIAS), _row(f'{name}.bias', f'{path}/bias', BIAS)]


def _linear(name: str, path: str) -> list[Tensor]:
  return [_row(f'{name}.weight', f'{path}/kernel', DENSE), _row(f'{name}.bias', f'{path}/bias', BIAS)]


class Family(NamedTuple):
  """tensors: the table. prefix: of the trunk, which some files leave out. classes: in transformers, language model and
  sequence classifier. harmless: ends of names of buffers that old files carry."""
  tensors: Callable[[TransformerConfig], list[Tensor]]
  prefix: str
  classes: tuple[str, str]
  harmless: tuple[str, ...] = ('.rotary_emb.inv_freq',)


_LLAMA = lambda name: Family(_llama, 'model.', (f'{name}ForCausalLM', f'{name}ForSequenceClassification'))
FAMILIES = {
    'gpt2': Family(_gpt2, 'transformer.', ('GPT2LMHeadModel', 'GPT2ForSequenceClassification'),
                   ('.attn.bias', '.attn.masked_bias')),
    'gpt_neox': Family(_neox, 'gpt_neox.', ('GPTNeoXForCausalLM', 'GPTNeoXForSequenceClassification'),
                       ('.attention.bias', '.attention.masked_bias', '.rotary_emb.inv_freq')),
    'llama': _LLAMA('Llama'), 'mistral': _LLAMA('Mistral'), 'qwen2': _LLAMA('Qwen2'), 'qwen3': _LLAMA('Qwen3'),
}
SCORE = Tensor('score.weight', ('final/score/kernel',), DENSE)


def read_config(folder: pathlib.Path) -> tuple[str, dict[str, Any]]:
  """(model_type, fields of TransformerConfig) of a folder's config.json. What is not covered is refused by name."""
  path = folder / 'config.json'
  if not path.exists():
    raise FileNotFoundError(f'{folder}: no config.json; a checkpoint folder has config.json and *.safetensors.')
  try:
    c = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f'{path}, line {error.lineno}: not JSON ({error.msg}).') from error
  kind = c.get('model_type')
  if kind not in FAMILIES:
    raise ValueError(f'{path}: model_type {kind!r} is not covered; these are: {", ".join(sorted(FAMILIES))}.')
  try:
    return kind, _declare(kind, c, path)
  except KeyError as error:
    raise ValueError(f'{path}: the entry {error} is missing.') from None


def _declare(kind: str, c: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
  def only(entry: str, *allowed):
    if c.get(entry, allowed[0]) not in allowed:
      raise ValueError(f'{path}: {entry}={c[entry]!r} is not covered for {kind}; covered: {allowed}.')

  if kind == 'gpt2':
    only('activation_function', 'gelu_new', 'gelu_pytorch_tanh')
    only('scale_attn_by_inverse_layer_idx', False)
    only('scale_attn_weights', True)
    only('add_cross_attention', False)
    return dict(vocab_size=c['vocab_size'], num_layers=c['n_layer'], d_model=c['n_embd'], num_heads=c['n_head'],
                max_length=c['n_positions'], d_ff=c.get('n_inner'), norm_eps=c.get('layer_norm_epsilon', 1e-5),
                positions='learned', tie_embeddings=c.get('tie_word_embeddings', True))
  rope = {**(c.get('rope_scaling') or {}), **(c.get('rope_parameters') or {})}
  scaling = rope.get('rope_type', rope.get('type', 'default'))
  if scaling not in ('default', 'llama3'):
    raise ValueError(f'{path}: rope_type {scaling!r} is not covered; covered: default, llama3.')
  common = dict(
      vocab_size=c['vocab_size'], num_layers=c['num_hidden_layers'], d_model=c['hidden_size'],
      num_heads=c['num_attention_heads'], max_length=c['max_position_embeddings'], d_ff=c['intermediate_size'],
      positions='rotary', tie_embeddings=c.get('tie_word_embeddings', False),
      rope_theta=float(rope.get('rope_theta', c.get('rope_theta', c.get('rotary_emb_base', 10_000)))))
  if scaling == 'llama3':
    common['rope_llama3'] = (float(rope['factor']), float(rope['low_freq_factor']), float(rope['high_freq_factor']),
                             int(rope['original_max_position_embeddings']))
  if kind == 'gpt_neox':
    only('hidden_act', 'gelu')
    only('attention_bias', True)
    return common | dict(norm_eps=c.get('layer_norm_eps', 1e-5), mlp='gelu_exact',
                         rotary_fraction=rope.get('partial_rotary_factor', c.get('rotary_pct', 0.25)),
                         parallel_residual=c.get('use_parallel_residual', True))
  only('hidden_act', 'silu')
  biases = bool(c.get('attention_bias')), bool(c.get('mlp_bias'))
  if biases[0] != biases[1]:
    raise ValueError(f'{path}: attention_bias={biases[0]} with mlp_bias={biases[1]} is not covered; both or neither.')
  window = c.get('sliding_window') if c.get('use_sliding_window', kind == 'mistral') else None
  return common | dict(
      max_length=min(common['max_length'], window or common['max_length']),  # up to the window, attention is the full one
      num_kv_heads=c.get('num_key_value_heads'), head_dim=c.get('head_dim'), norm='rmsnorm',
      norm_eps=c.get('rms_norm_eps', 1e-6), mlp='swiglu', qkv_bias=kind == 'qwen2' or biases[0], out_bias=biases[0],
      qk_norm=kind == 'qwen3')
