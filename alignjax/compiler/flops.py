"""How fast a step went, and how much of the machine that is: tokens and episodes per second, model
FLOPs, and device memory.

A PPO iteration is one compiled program, so its phases have no times of their own outside of a trace
(alignjax/runtime/trace.py). The rates here are the tokens of each phase over the seconds of the
whole step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax

from alignjax.compiler import chips
from alignjax.models.config import TransformerConfig
from alignjax.models.layers import GATES


def forward_flops(cfg: TransformerConfig, length: int, head: str = 'lm') -> float:
  """The floating-point operations of one forward pass over one row of `length` tokens.

  They are two for each multiplication of a weight matrix, and the scores and sums of causal
  attention (2 * 2 * T^2/2 * N * H per layer). Norms, softmax and the embedding's look-up are left
  out, as is usual for MFU.

  Args:
    cfg: the architecture.
    length: tokens of the row.
    head: 'lm' has the matrix of the vocabulary, 'scalar' one number per token.
  """
  attention = cfg.d_model * cfg.head_width * (2 * cfg.num_heads + 2 * cfg.kv_heads)
  mlp = cfg.d_model * cfg.mlp_width * (3 if cfg.mlp in GATES else 2)
  matrices = cfg.num_layers * (attention + mlp) + cfg.d_model * (
    cfg.vocab_size if head == 'lm' else 1
  )
  return 2.0 * matrices * length + _attention_flops(cfg, length)


def _attention_flops(cfg: TransformerConfig, length: int) -> float:
  # Of length^2 / 2 pairs of a query and a key, a window hides those that are further apart.
  hidden = max(length - (cfg.window or length), 0) ** 2
  pairs = cfg.num_layers * length**2 - sum(cfg.windowed) * hidden
  return 2.0 * pairs * cfg.num_heads * cfg.head_width


def update_flops(
  cfg: TransformerConfig, length: int, head: str = 'lm', adapters: bool = False
) -> float:
  """The floating-point operations of forward and backward pass over one row. A backward pass counts
  as two forward passes, and recomputation does not count. Where adapters alone are trained
  (models/lora.py), no matrix has a product for its gradient; the small products of the adapters
  themselves are left out."""
  forward = forward_flops(cfg, length, head)
  return 3 * forward - (forward - _attention_flops(cfg, length) if adapters else 0)


def training(
  cfg: TransformerConfig, rows: int, length: int, head: str = 'lm', adapters: bool = False
) -> dict[str, float]:
  """The work of a step that trains on `rows` rows. adapters: whether adapters alone are trained."""
  return {
    'tokens': rows * length,
    'tokens_trained': rows * length,
    'flops': rows * update_flops(cfg, length, head, adapters),
  }


def ppo(
  policy: TransformerConfig,
  value: TransformerConfig,
  *,
  episodes: int,
  samples_per_prompt: int,
  prompt_length: int,
  response_length: int,
  row_length: int,
  ptx_rows: int,
  epochs: int,
  reward_models: int,
  generates: bool = True,
  adapters: bool = False,
) -> dict[str, float]:
  """The work of one PPO iteration, with every response at its full length: sampling, scoring by
  policy, reference, value and each reward model, the updates of policy and value, and the
  pretraining rows. A prompt is read once for all of its samples, and has no logits. generates:
  whether sampling is a part of the iteration, and not the work of an engine elsewhere."""
  length = prompt_length + response_length
  lm, scalar = forward_flops(policy, length), forward_flops(value, length, 'scalar')
  unembedding = 2.0 * policy.d_model * policy.vocab_size
  prefill = forward_flops(policy, prompt_length) - prompt_length * unembedding
  generated = (episodes / samples_per_prompt) * prefill + episodes * (
    lm - prefill - prompt_length * unembedding
  )
  scored = episodes * (2 * lm + (1 + reward_models) * scalar)
  trained = epochs * (
    episodes * update_flops(policy, length, 'lm', adapters)
    + episodes * update_flops(value, length, 'scalar', adapters)
    + ptx_rows * update_flops(policy, row_length, 'lm', adapters)
  )
  return {
    'episodes': episodes,
    'tokens': episodes * length + ptx_rows * row_length,
    'tokens_generated': episodes * response_length,
    'tokens_scored': episodes * length * (3 + reward_models),
    'tokens_trained': epochs * (2 * episodes * length + ptx_rows * row_length),
    'flops': generates * generated + scored + trained,
  }


def mean(works: Iterable[Mapping[str, float]]) -> dict[str, float]:
  """The mean work of several steps."""
  works = list(works)
  return {kind: sum(work[kind] for work in works) / len(works) for kind in works[0]}


def metrics(work: Mapping[str, float], seconds: float) -> dict[str, float]:
  """The metrics of a step that took `seconds`: `time/*_per_second` for each kind of work, teraflops
  and MFU per device, and the device's peak memory in GiB. What the device does not report is left
  out."""
  out = {
    f'time/{kind}_per_second': amount / seconds for kind, amount in work.items() if kind != 'flops'
  }
  if 'flops' in work:
    rate = work['flops'] / seconds / jax.device_count()
    out['time/tflops_per_device'] = rate / 1e12
    if (chip := chips.of_device(jax.devices()[0].device_kind)) is not None:
      out['time/mfu'] = rate / chips.CHIPS[chip].flops
  memory = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in memory:
    out['device/memory_peak_gib'] = memory['peak_bytes_in_use'] / 2**30
  return out
