"""Rotary positions (Su et al. 2021): each pair of features rotates by an angle that grows with
position.

Models that were stretched to a longer context declare other frequencies, and with yarn and longrope
a factor on cos and sin (the magnitude). They are computed as transformers does
(modeling_rope_utils.py), with one exception: transformers takes the long or the short factors of
longrope by the longest row of each batch, so that a row's numbers depend on its neighbours, and
those of a sampled row change at the original context. Here all rows have the short factors where
model.max_length is at most the original context, and the long ones where it is more.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.models.config import TransformerConfig


def angles(cfg: TransformerConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array] | None:
  """cos and sin of the angles at `positions`, f32[B,T,1,width/2] each, in the two-halves layout of
  GPT-NeoX and Llama; None where the config has learned positions."""
  if cfg.positions != 'rotary':
    return None
  width = cfg.rotary_width
  frequencies = cfg.rope_theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
  if cfg.rope_llama3:
    # Slow frequencies are divided by `factor`, fast ones stay, with a linear passage in between.
    factor, low, high, original = cfg.rope_llama3
    turns = frequencies * original / (2 * jnp.pi)
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    frequencies = frequencies * (keep + (1 - keep) / factor)
  if cfg.rope_scaling is not None:
    divisors, magnitude = scaling(cfg)
    frequencies = frequencies / divisors
  turned = positions[..., None, None].astype(jnp.float32) * frequencies.reshape(1, 1, 1, -1)
  if cfg.rope_scaling is not None:
    return jnp.cos(turned) * magnitude, jnp.sin(turned) * magnitude
  return jnp.cos(turned), jnp.sin(turned)


def scaling(cfg: TransformerConfig) -> tuple[np.ndarray, float]:
  """(what each of the width/2 frequencies is divided by, the factor on cos and sin) of
  cfg.rope_scaling."""
  assert cfg.rope_scaling is not None
  kind, *values = cfg.rope_scaling
  width = cfg.rotary_width
  if kind == 'linear':
    return np.full(width // 2, values[0], np.float32), 1.0
  if kind == 'longrope':
    short, long, original, magnitude = values
    return np.asarray(long if cfg.max_length > original else short, np.float32), magnitude
  # YaRN (Peng et al. 2023, section 3.2): what turns more than beta_fast times in the original
  # context stays, what turns less than beta_slow times is divided by `factor`, with a linear
  # passage over the index in between.
  factor, original, fast, slow, truncate, magnitude = values

  def index_of(turns):  # the index, a real number, of the frequency that makes so many turns
    return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

  low, high = index_of(fast), index_of(slow)
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  stretched = np.clip((np.arange(width // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
  return (1 / (stretched / factor + (1 - stretched))).astype(np.float32), magnitude


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array] | None) -> jax.Array:
  """Rotates the first `rotary_width` features of x [B,T,heads,H] in float32; the other features
  pass through."""
  if angles is None:
    return x
  cos, sin = angles
  half = cos.shape[-1]
  first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1).astype(
    x.dtype
  )
