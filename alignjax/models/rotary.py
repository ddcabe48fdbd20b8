"""Rotary positions (Su et al. 2021): each pair of features rotates by an angle that grows with
position."""

from __future__ import annotations

import jax
import jax.numpy as jnp

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
  turned = positions[..., None, None].astype(jnp.float32) * frequencies.reshape(1, 1, 1, -1)
  return jnp.cos(turned), jnp.sin(turned)


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
