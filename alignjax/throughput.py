"""How fast a step went and how much of the machine that is: tokens and episodes a second, model FLOPs, device memory.

A PPO iteration is one compiled program, so its phases have no times of their own outside a trace (alignjax/profile.py); what is
given here is each phase's tokens over the whole step's seconds.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from alignjax.models.config import TransformerConfig

# bfloat16 FLOP/s of one device, dense, from the vendors' data sheets; the key is the beginning of jax's device_kind
PEAK_FLOPS = {'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5e': 197e12, 'TPU v5p': 459e12, 'TPU v5': 459e12,
              'TPU v6 lite': 918e12, 'TPU v6e': 918e12, 'TPU7x': 2307e12, 'NVIDIA A100': 312e12, 'NVIDIA H100': 989e12,
              'NVIDIA H200': 989e12, 'NVIDIA B200': 2250e12}


def forward_flops(cfg: TransformerConfig, length: int, head: str = 'lm') -> float:
  """Of one forward pass over one row of `length` tokens: two for each multiplication of a weight matrix, and the causal attention's
  scores and sums (2 * 2 * T^2/2 * N * H a layer). Norms, softmax and the embedding's look-up are left out, as is usual for MFU.

  Args:
    head: 'lm' has the vocabulary's matrix, 'scalar' one number a token.
  """
  attention = cfg.d_model * cfg.head_width * (2 * cfg.num_heads + 2 * cfg.kv_heads)
  mlp = cfg.d_model * cfg.mlp_width * (3 if cfg.mlp == 'swiglu' else 2)
  matrices = cfg.num_layers * (attention + mlp) + cfg.d_model * (cfg.vocab_size if head == 'lm' else 1)
  return 2.0 * matrices * length + 2.0 * length**2 * cfg.num_layers * cfg.num_heads * cfg.head_width


def training(cfg: TransformerConfig, rows: int, length: int, head: str = 'lm') -> dict[str, float]:
  """The work of one step that trains on `rows` rows; a backward pass is two forward ones. Recomputation does not count."""
  return {'tokens_trained': rows * length, 'flops': 3 * rows * forward_flops(cfg, length, head)}


def ppo(policy: TransformerConfig, value: TransformerConfig, *, episodes: int, samples_per_prompt: int, prompt_length: int,
        response_length: int, row_length: int, ptx_rows: int, epochs: int, reward_model: bool) -> dict[str, float]:
  """The work of one iteration, every response taken at its full length: sampling, four scoring passes (three where the reward is no
  model), the updates of policy and value, the pretraining rows."""
  length = prompt_length + response_length
  lm, scalar = forward_flops(policy, length), forward_flops(value, length, 'scalar')
  prefill = forward_flops(policy, prompt_length)
  generated = (episodes / samples_per_prompt) * prefill + episodes * (lm - prefill)
  scored = episodes * (2 * lm + (2 if reward_model else 1) * scalar)
  trained = 3 * epochs * (episodes * (lm + scalar) + ptx_rows * forward_flops(policy, row_length))
  return {'episodes': episodes, 'tokens_generated': episodes * response_length,
          'tokens_scored': episodes * length * (4 if reward_model else 3),
          'tokens_trained': epochs * (2 * episodes * length + ptx_rows * row_length), 'flops': generated + scored + trained}


def metrics(work: Mapping[str, float], seconds: float) -> dict[str, float]:
  """`time/*_per_second` of each kind of work of a step that took `seconds`; teraflops and MFU a device; its peak memory in GiB.
  What the device does not tell is left out."""
  out = {f'time/{kind}_per_second': amount / seconds for kind, amount in work.items() if kind != 'flops'}
  if 'flops' in work:
    rate = work['flops'] / seconds / jax.device_count()
    out['time/tflops_per_device'] = rate / 1e12
    if (peak := peak_flops(jax.devices()[0].device_kind)) is not None:
      out['time/mfu'] = rate / peak
  memory = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in memory:
    out['device/memory_peak_gib'] = memory['peak_bytes_in_use'] / 2**30
  return out


def peak_flops(kind: str) -> float | None:
  """bfloat16 FLOP/s of a device by jax's name for it; None of one that is not known, such as a CPU."""
  return next((PEAK_FLOPS[name] for name in sorted(PEAK_FLOPS, key=len, reverse=True) if kind.startswith(name)), None)
