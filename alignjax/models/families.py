"""The families of Hugging Face checkpoints: where every tensor goes. models/config_json.py reads
what their config.json says.

A family is a table of tensors: the name in the file, our parameters, and an einops pattern between
the two, which is read forwards to load and backwards to save (models/hf.py). The layout is that of
transformers' modeling files of each family.

Other families are refused, with the reason (config_json.REASONS) and the list of those that are
covered: mixtures of experts, models that see images, and quantised files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from alignjax.models.config import TransformerConfig


class Tensor(NamedTuple):
  """A row of the table.

  Attributes:
    name: its name in the file, where {i} stands for the layer.
    paths: the paths of our parameters, several where the file fuses them.
    pattern: einops pattern from the file to ours. Of fused parameters 'j' is the index; without 'j'
      they stand one behind the other in the last axis of ours.
  """

  name: str
  paths: tuple[str, ...]
  pattern: str

  @property
  def indexed(self) -> bool:
    """Whether several parameters are fused along an axis of their own."""
    return len(self.paths) > 1 and 'j' in self.pattern


def _row(name: str, paths: str, pattern: str) -> Tensor:
  return Tensor(name, tuple(paths.split()), pattern)


QKV = 'layers/attention/query/{0} layers/attention/key/{0} layers/attention/value/{0}'
DENSE, BIAS, SAME = 'o i -> i o', 'o -> o', 'v d -> v d'


def _gpt2(cfg: TransformerConfig) -> list[Tensor]:
  h = 'transformer.h.{i}.'
  return [
    _row('transformer.wte.weight', 'embed/tokens', SAME),
    _row('transformer.wpe.weight', 'embed/positions', SAME),
    *_norm('transformer.ln_f', 'final/norm'),
    *_norm(h + 'ln_1', 'layers/norm_1'),
    *_norm(h + 'ln_2', 'layers/norm_2'),
    # Conv1D: [in, out]
    _row(h + 'attn.c_attn.weight', QKV.format('kernel'), 'd (j n h) -> j d (n h)'),
    _row(h + 'attn.c_attn.bias', QKV.format('bias'), '(j n h) -> j (n h)'),
    _row(h + 'attn.c_proj.weight', 'layers/attention/out/kernel', '(n h) d -> n h d'),
    _row(h + 'attn.c_proj.bias', 'layers/attention/out/bias', BIAS),
    _row(h + 'mlp.c_fc.weight', 'layers/mlp/up/kernel', 'i o -> i o'),
    _row(h + 'mlp.c_fc.bias', 'layers/mlp/up/bias', BIAS),
    _row(h + 'mlp.c_proj.weight', 'layers/mlp/down/kernel', 'i o -> i o'),
    _row(h + 'mlp.c_proj.bias', 'layers/mlp/down/bias', BIAS),
    *_head(cfg, 'lm_head'),
  ]


def _neox(cfg: TransformerConfig) -> list[Tensor]:
  h = 'gpt_neox.layers.{i}.'
  return [
    _row('gpt_neox.embed_in.weight', 'embed/tokens', SAME),
    *_norm('gpt_neox.final_layer_norm', 'final/norm'),
    *_norm(h + 'input_layernorm', 'layers/norm_1'),
    *_norm(h + 'post_attention_layernorm', 'layers/norm_2'),
    _row(h + 'attention.query_key_value.weight', QKV.format('kernel'), '(n j h) d -> j d (n h)'),
    _row(h + 'attention.query_key_value.bias', QKV.format('bias'), '(n j h) -> j (n h)'),
    _row(h + 'attention.dense.weight', 'layers/attention/out/kernel', 'd (n h) -> n h d'),
    _row(h + 'attention.dense.bias', 'layers/attention/out/bias', BIAS),
    *_linear(h + 'mlp.dense_h_to_4h', 'layers/mlp/up'),
    *_linear(h + 'mlp.dense_4h_to_h', 'layers/mlp/down'),
    *_head(cfg, 'embed_out'),
  ]


# What transformers calls the norms of a layer, by TransformerConfig.norms.
NORMS = {
  'before': dict(norm_1='input', norm_2='post_attention'),
  'after': dict(post_norm_1='post_attention', post_norm_2='post_feedforward'),
  'both': dict(
    norm_1='input',
    post_norm_1='post_attention',
    norm_2='pre_feedforward',
    post_norm_2='post_feedforward',
  ),
}


def _llama(cfg: TransformerConfig, fused: bool = False) -> list[Tensor]:
  h = 'model.layers.{i}.'
  rows = [
    _row('model.embed_tokens.weight', 'embed/tokens', SAME),
    _row('model.norm.weight', 'final/norm/scale', BIAS),
    *(
      _row(f'{h}{theirs}_layernorm.weight', f'layers/{ours}/scale', BIAS)
      for ours, theirs in NORMS[cfg.norms].items()
    ),
    _row(h + 'self_attn.o_proj.weight', 'layers/attention/out/kernel', 'd (n h) -> n h d'),
  ]
  if fused:
    ours = ' '.join(f'layers/attention/{name}/kernel' for name in ('query', 'key', 'value'))
    rows.append(_row(h + 'self_attn.qkv_proj.weight', ours, DENSE))
    ours = 'layers/mlp/gate/kernel layers/mlp/up/kernel'
    rows.append(_row(h + 'mlp.gate_up_proj.weight', ours, DENSE))
    rows.append(_row(h + 'mlp.down_proj.weight', 'layers/mlp/down/kernel', DENSE))
    return [*rows, *_head(cfg, 'lm_head')]
  for theirs, ours in (('q', 'query'), ('k', 'key'), ('v', 'value')):
    rows.append(
      _row(f'{h}self_attn.{theirs}_proj.weight', f'layers/attention/{ours}/kernel', DENSE)
    )
    if cfg.qkv_bias:
      rows.append(_row(f'{h}self_attn.{theirs}_proj.bias', f'layers/attention/{ours}/bias', BIAS))
    if cfg.qk_norm and ours != 'value':
      rows.append(
        _row(f'{h}self_attn.{theirs}_norm.weight', f'layers/attention/{ours}_norm/scale', BIAS)
      )
  for theirs, ours in (('up', 'up'), ('gate', 'gate'), ('down', 'down')):
    rows.append(_row(f'{h}mlp.{theirs}_proj.weight', f'layers/mlp/{ours}/kernel', DENSE))
    if cfg.out_bias:
      rows.append(_row(f'{h}mlp.{theirs}_proj.bias', f'layers/mlp/{ours}/bias', BIAS))
  if cfg.out_bias:
    rows.append(_row(h + 'self_attn.o_proj.bias', 'layers/attention/out/bias', BIAS))
  return [*rows, *_head(cfg, 'lm_head')]


def _head(cfg: TransformerConfig, name: str) -> list[Tensor]:
  return [] if cfg.tie_embeddings else [_row(f'{name}.weight', 'final/head/kernel', DENSE)]


def _norm(name: str, path: str) -> list[Tensor]:
  return [_row(f'{name}.weight', f'{path}/scale', BIAS), _row(f'{name}.bias', f'{path}/bias', BIAS)]


def _linear(name: str, path: str) -> list[Tensor]:
  return [
    _row(f'{name}.weight', f'{path}/kernel', DENSE),
    _row(f'{name}.bias', f'{path}/bias', BIAS),
  ]


class Family(NamedTuple):
  """A family of checkpoints.

  Attributes:
    tensors: config -> the table of tensors.
    prefix: the prefix of the trunk, which some files leave out.
    embedding, head: the names of these two tensors.
    classes: the classes of transformers for language model, sequence classifier and trunk.
    harmless: ends of the names of buffers that old files carry and nobody reads.
  """

  tensors: Callable[[TransformerConfig], list[Tensor]]
  prefix: str
  embedding: str
  head: str
  classes: tuple[str, str, str]
  harmless: tuple[str, ...] = ('.rotary_emb.inv_freq',)

  def name(self, key: str) -> str:
    """The full name of a tensor that a file calls `key`: with the prefix of the trunk, and with the
    family's own name of the head (new files of GPT-NeoX may say lm_head)."""
    if key == 'lm_head.weight':
      return self.head
    return (
      key
      if key.startswith((self.prefix, 'lm_head.', 'embed_out.', 'score.'))
      else self.prefix + key
    )


def _llama_family(name: str, fused: bool = False, text: str = '') -> Family:
  """The family of transformers' classes that begin with `name` and are laid out as Llama is.

  fused: whether queries, keys and values are one matrix, and so the
  gate and the MLP's first projection. text: what the names of classifier and trunk have too.
  """
  return Family(
    tensors=functools.partial(_llama, fused=fused),
    prefix='model.',
    embedding='model.embed_tokens.weight',
    head='lm_head.weight',
    classes=(f'{name}ForCausalLM', f'{name}{text}ForSequenceClassification', f'{name}{text}Model'),
  )


FAMILIES = {
  'gpt2': Family(
    tensors=_gpt2,
    prefix='transformer.',
    embedding='transformer.wte.weight',
    head='lm_head.weight',
    classes=('GPT2LMHeadModel', 'GPT2ForSequenceClassification', 'GPT2Model'),
    harmless=('.attn.bias', '.attn.masked_bias'),
  ),
  'gpt_neox': Family(
    tensors=_neox,
    prefix='gpt_neox.',
    embedding='gpt_neox.embed_in.weight',
    head='embed_out.weight',
    classes=('GPTNeoXForCausalLM', 'GPTNeoXForSequenceClassification', 'GPTNeoXModel'),
    harmless=('.attention.bias', '.attention.masked_bias', '.rotary_emb.inv_freq'),
  ),
  'llama': _llama_family('Llama'),
  'mistral': _llama_family('Mistral'),
  'qwen2': _llama_family('Qwen2'),
  'qwen3': _llama_family('Qwen3'),
  'olmo2': _llama_family('Olmo2'),
  'phi3': _llama_family('Phi3', fused=True),
  'gemma': _llama_family('Gemma'),
  'gemma2': _llama_family('Gemma2'),
  'gemma3_text': _llama_family('Gemma3', text='Text'),
}
SCORE = Tensor('score.weight', ('final/score/kernel',), DENSE)
