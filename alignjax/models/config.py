"""The declaration of an architecture: what tells GPT-2, Llama and Pythia apart."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """The declaration of an architecture.

  Attributes:
    vocab_size, num_layers, d_model, num_heads: sizes.
    max_length: the context in tokens.
    unused_ids: half-open ranges of ids of the vocabulary that no token of the tokenizer has (a
      vocabulary padded for the hardware, or holes between added tokens). They have probability 0 in
      sampling, in log-probabilities and so in training; only Networks.logits are the checkpoint's
      own. They are set from the tokenizer, see `ranges_without`.
    num_kv_heads: key/value heads, each shared by num_heads / num_kv_heads query heads; None means
      num_heads.
    head_dim: width of a head; None means d_model / num_heads.
    d_ff: width of the MLP; None means 4 d_model.
    positions: 'learned' (GPT-2) or 'rotary'.
    rope_theta: base of the rotary frequencies.
    rotary_fraction: the share of a head's features that rotate (Pythia: 0.25).
    rope_llama3: (factor, low_freq_factor, high_freq_factor, original context) of Llama 3.1's
      stretched frequencies, or None.
    rope_scaling: frequencies stretched in another way (models/rotary.py): ('linear', factor),
      ('yarn', factor, original context, beta_fast, beta_slow, truncate, magnitude) or ('longrope',
      short factors, long factors, original context, magnitude), or None.
    window: the tokens that a token of a windowed layer attends to, itself included (Mistral,
      Gemma); None means all tokens before it.
    windowed_layers: for each layer whether it has the window; None means that all have it.
    window_rope_theta: base of the rotary frequencies of windowed layers, which are then not
      stretched (Gemma 3); None means those of the other layers.
    query_scale: factor on the products of queries and keys; None means head_dim ** -0.5.
    attention_cap: c of c tanh(x / c) on attention logits (Gemma 2), or None.
    logits_cap: the same on the logits of the vocabulary, or None.
    qk_norm: an RMSNorm over queries and keys: False, True (over each head, Qwen3) or 'all' (over
      all heads at once, OLMo 2).
    norm: 'layernorm', 'rmsnorm' or 'rmsnorm1p', which multiplies by 1 + scale (Gemma).
    norm_eps: epsilon of the norms.
    norms: where attention and MLP have norms: 'before' them, 'after' them, on what is added to the
      residual stream (OLMo 2), or 'both' (Gemma 2).
    mlp: 'gelu' (tanh form, GPT-2), 'gelu_exact' (Pythia), 'swiglu' (gated SiLU, Llama) or 'geglu'
      (gated GELU in its tanh form, Gemma).
    parallel_residual: whether attention and MLP both read the input of the block (GPT-NeoX).
    qkv_bias: whether the query, key and value projections have biases.
    out_bias: whether the attention output and the MLP have biases.
    tie_embeddings: whether the unembedding is the transpose of the embedding.
    embedding_scale: factor on embedded tokens.
    embedding_std: standard deviation of the embeddings at initialisation.
    dropout: residual dropout (paper C.1: 0.2 in SFT); it is active only where a key is passed.
    dtype: of activations and matrix products. Parameters, softmax, the statistics of norms and
      log-probabilities stay float32. 'float16' is for inference: in training, gradients below 6e-8
      would become 0, because nothing scales the loss.
    remat: what is recomputed in the backward pass. 'none' stores everything. 'full' stores the
      input of each layer, D numbers per token; 'attention' stores queries, keys, values and the
      output of attention too (5 D with as many key/value heads as query heads); 'projections' also
      the attention projection and the MLP's inner arrays, so that no matrix product is computed
      twice (10 D with an MLP of 4 D); 'dots' stores the results of all matrix products.
    logits_chunk: tokens whose float32 logits exist at once in log-probabilities; None means all.
    attention_chunk: queries whose float32 attention logits exist at once, outside of decoding; None
      means all. Both chunks change memory, not results. A fused kernel needs no chunks.
    attention: the kernel of attention over whole rows: 'cudnn' (NVIDIA GPUs), 'splash' (TPUs),
      'reference' (matrix products, anywhere), or 'auto', which takes the kernel of the platform
      where dtype and head width allow it, and the reference elsewhere and in float32. See
      models/attention.py.
    kv_cache: how sampling stores keys and values: None in `dtype`, 'int8' as whole numbers with a
      scale for each vector (models/cached.py), in about half the memory of bfloat16. It moves the
      sampler away from the scorer, and 'rollout/sampler_gap_max' shows how far.
  """

  vocab_size: int
  num_layers: int
  d_model: int
  num_heads: int
  max_length: int
  unused_ids: tuple[tuple[int, int], ...] = ()
  num_kv_heads: int | None = None
  head_dim: int | None = None
  d_ff: int | None = None
  positions: str = 'rotary'
  rope_theta: float = 10_000.0
  rotary_fraction: float = 1.0
  rope_llama3: tuple[float, float, float, int] | None = None
  rope_scaling: tuple[Any, ...] | None = None
  window: int | None = None
  windowed_layers: tuple[bool, ...] | None = None
  window_rope_theta: float | None = None
  query_scale: float | None = None
  attention_cap: float | None = None
  logits_cap: float | None = None
  qk_norm: bool | str = False
  norm: str = 'layernorm'
  norm_eps: float = 1e-5
  norms: str = 'before'
  mlp: str = 'gelu'
  parallel_residual: bool = False
  qkv_bias: bool = True
  out_bias: bool = True
  tie_embeddings: bool = True
  embedding_scale: float = 1.0
  embedding_std: float = 0.02
  dropout: float = 0.0
  dtype: str = 'float32'
  remat: str = 'none'
  logits_chunk: int | None = None
  attention_chunk: int | None = None
  attention: str = 'auto'
  kv_cache: str | None = None

  def __post_init__(self):
    choices = dict(
      positions=('learned', 'rotary'),
      norm=('layernorm', 'rmsnorm', 'rmsnorm1p'),
      norms=('before', 'after', 'both'),
      qk_norm=(False, True, 'all'),
      mlp=('gelu', 'gelu_exact', 'swiglu', 'geglu'),
      remat=('none', 'full', 'attention', 'projections', 'dots'),
      attention=('auto', 'reference', 'cudnn', 'splash'),
      dtype=('float32', 'bfloat16', 'float16'),
      kv_cache=(None, 'int8'),
    )
    for field, allowed in choices.items():
      if getattr(self, field) not in allowed:
        raise ValueError(f'model.{field}={getattr(self, field)!r} is not one of {allowed}.')
    if self.head_dim is None and self.d_model % self.num_heads:
      raise ValueError(
        f'model.d_model={self.d_model} does not divide into model.num_heads={self.num_heads} '
        'heads; change one or set model.head_dim.'
      )
    if self.num_heads % self.kv_heads:
      raise ValueError(
        f'model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.kv_heads}.'
      )
    self._check_window()
    kind, *values = self.rope_scaling or ('none',)
    counts = dict(none=0, linear=1, yarn=6, longrope=4)
    if kind not in counts or kind == 'none' and self.rope_scaling:
      raise ValueError(f'model.rope_scaling[0]={kind!r} is none of linear, yarn, longrope.')
    numbers = values[:2] if kind == 'yarn' else values[:1] if kind == 'linear' else []
    if len(values) != counts[kind] or not all(
      isinstance(x, (int, float)) and 0 < x < math.inf for x in numbers
    ):
      raise ValueError(
        f'model.rope_scaling={self.rope_scaling!r} has other values than {kind} has.'
      )
    if self.rope_scaling and (self.positions != 'rotary' or self.rope_llama3):
      raise ValueError('model.rope_scaling needs rotary positions, and no rope_llama3 beside it.')
    if kind == 'longrope' and {len(values[0]), len(values[1])} != {self.rotary_width // 2}:
      raise ValueError(
        f'longrope has {len(values[0])} short and {len(values[1])} long factors, but there are '
        f'{self.rotary_width // 2} rotary frequencies.'
      )
    if self.positions == 'rotary' and self.rotary_width % 2:
      raise ValueError(
        f'rotary positions need an even width, but head_dim {self.head_width} x rotary_fraction '
        f'{self.rotary_fraction} is {self.rotary_width}.'
      )

  def _check_window(self):
    if self.window is not None and self.window < 1:
      raise ValueError(f'model.window={self.window} is not a number of tokens from 1 on.')
    for field in ('windowed_layers', 'window_rope_theta'):
      if getattr(self, field) is not None and self.window is None:
        raise ValueError(f'model.{field}={getattr(self, field)!r} needs a model.window.')
    if self.windowed_layers is not None and len(self.windowed_layers) != self.num_layers:
      raise ValueError(
        f'model.windowed_layers has {len(self.windowed_layers)} entries for '
        f'model.num_layers={self.num_layers}.'
      )
    for field in ('query_scale', 'attention_cap', 'logits_cap', 'window_rope_theta'):
      value = getattr(self, field)
      if value is not None and not 0 < value < math.inf:
        raise ValueError(f'model.{field}={value!r} is not a number above 0.')

  @property
  def windowed(self) -> tuple[bool, ...]:
    """For each layer whether it has the window."""
    return self.windowed_layers or (self.window is not None,) * self.num_layers

  def of_layers(self, windowed: bool) -> TransformerConfig:
    """The declaration as a layer with or without the window sees it: it says nothing of others."""
    if not windowed:
      return dataclasses.replace(self, window=None, windowed_layers=None, window_rope_theta=None)
    if self.window_rope_theta is None:
      return dataclasses.replace(self, windowed_layers=None)
    return dataclasses.replace(
      self,
      windowed_layers=None,
      window_rope_theta=None,
      rope_theta=self.window_rope_theta,
      rope_scaling=None,
      rope_llama3=None,
    )

  @property
  def kv_heads(self) -> int:
    return self.num_kv_heads or self.num_heads

  @property
  def head_width(self) -> int:
    return self.head_dim or self.d_model // self.num_heads

  @property
  def mlp_width(self) -> int:
    return self.d_ff or 4 * self.d_model

  @property
  def rotary_width(self) -> int:
    return int(self.head_width * self.rotary_fraction)


def ranges_without(ids: Iterable[int], size: int) -> tuple[tuple[int, int], ...]:
  """The half-open ranges of 0..size-1 without any of the ids: ([0, 1, 4], 8) -> ((2, 4), (5,
  8))."""
  bounds = [-1, *sorted({i for i in ids if i < size}), size]
  return tuple(
    (before + 1, after) for before, after in itertools.pairwise(bounds) if after - before > 1
  )
