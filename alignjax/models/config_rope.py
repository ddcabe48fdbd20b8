"""The rotary positions that a config.json declares, read as transformers reads them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from alignjax.models.config_entries import Entries


def rope_table(values: Mapping[str, Any]) -> str:
  """The entry with the table of rotary positions. Of two, transformers takes rope_scaling, the
  older one, if it holds anything."""
  return 'rope_scaling' if values.get('rope_scaling') else 'rope_parameters'


def rope_type(e: Entries) -> Any:
  table = e.values.get(rope_table(e.values)) or {}
  return table.get('rope_type', table.get('type', 'default'))


def rope(kind: str, e: Entries, positions: int) -> dict[str, Any]:
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
  inside = Entries(e.path, table or {}, f'{name}.')
  neox = kind == 'gpt_neox'
  out: dict[str, Any] = dict(
    rope_theta=inside.number(
      'rope_theta', e.number('rotary_emb_base' if neox else 'rope_theta', 10_000)
    )
  )
  fraction = inside.number(
    'partial_rotary_factor',
    e.number('rotary_pct', 0.25) if neox else e.number('partial_rotary_factor', 1.0),
  )
  partial = kind in ('gpt_neox', 'phi3')
  if fraction > 1 or not partial and fraction != 1:
    raise ValueError(f'{e.path}: partial_rotary_factor={fraction} is not covered for {kind}.')
  if partial:
    out['rotary_fraction'] = fraction
  scaling = rope_type(e)
  original = positions
  if kind == 'phi3' and scaling not in ('default', 'longrope'):
    raise ValueError(
      f'{e.path}: {name}: rope_type {reprlib.repr(scaling)} is not covered for phi3; covered: '
      f'default and longrope.'
    )
  if scaling in ('llama3', 'yarn', 'longrope'):
    name_of_original = 'original_max_position_embeddings'
    of_table = 4096 if kind == 'phi3' else inside.size(name_of_original, positions)
    original = e.size(name_of_original, of_table)
  if scaling == 'llama3':
    low, high = inside.number('low_freq_factor'), inside.number('high_freq_factor')
    if low >= high:
      raise ValueError(
        f'{e.path}: {name}: low_freq_factor={low} has to be below high_freq_factor={high}.'
      )
    out['rope_llama3'] = (inside.number('factor'), low, high, original)
  elif scaling == 'linear':
    out['rope_scaling'] = ('linear', inside.number('factor'))
  elif scaling == 'dynamic':
    inside.number('factor')  # It counts beyond max_position_embeddings only.
  elif scaling == 'yarn':
    if out['rope_theta'] <= 1:
      raise ValueError(
        f'{e.path}: {name}: rope_theta={out["rope_theta"]} has to be above 1 for yarn.'
      )
    out['rope_scaling'] = _yarn(inside, original, positions)
  elif scaling == 'longrope':
    if original < 2:
      raise ValueError(f'{e.path}: {name}: longrope has an original context of {original}.')
    out['rope_scaling'] = _longrope(inside, original, positions)
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
