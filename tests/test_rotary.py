"""Stretched rotary frequencies against a loop over the papers' formulas in float64."""

import json
import math
import pathlib
import shutil

import jax.numpy as jnp
import pytest

from alignjax.models import config_json, rotary
from alignjax.models.config import TransformerConfig
from alignjax.setup import models
from tests.fakes import close

GOLDEN = pathlib.Path(__file__).parent / 'golden'
SIZES = dict(vocab_size=11, num_layers=1, d_model=64, num_heads=4, max_length=64)  # 8 frequencies
SHORT, LONG = tuple(1 + i / 10 for i in range(8)), tuple(2.0 + i for i in range(8))


def angles_by_hand(theta, divisors, magnitude, position, width=16):
  turned = [position * theta ** (-2 * i / width) / d for i, d in enumerate(divisors)]
  return [magnitude * math.cos(a) for a in turned], [magnitude * math.sin(a) for a in turned]


def yarn_by_hand(theta, factor, original, fast, slow, truncate, width=16):
  """Turns of frequency i in the original context: original theta^(-2i/width) / 2 pi. The passage
  from whole frequencies to divided ones is linear in i between the two indices."""
  low, high = (
    width / 2 * math.log(original / (2 * math.pi * turns)) / math.log(theta)
    for turns in (fast, slow)
  )
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  divided = [min(max((i - low) / (high - low), 0), 1) for i in range(width // 2)]
  return [1 / (d / factor + (1 - d)) for d in divided]


@pytest.mark.parametrize(
  'scaling,longest,divisors,magnitude',
  [
    (('linear', 4.0), 64, [4.0] * 8, 1.0),
    (('longrope', SHORT, LONG, 64, 1.25), 64, SHORT, 1.25),
    (('longrope', SHORT, LONG, 64, 1.25), 65, LONG, 1.25),
    (('yarn', 4.0, 64, 4.0, 1.0, True, 1.1), 64, yarn_by_hand(500.0, 4.0, 64, 4.0, 1.0, True), 1.1),
    (
      ('yarn', 8.0, 512, 32.0, 1.0, False, 0.7),
      64,
      yarn_by_hand(500.0, 8.0, 512, 32.0, 1.0, False),
      0.7,
    ),
  ],
)
def test_stretched_frequencies(scaling, longest, divisors, magnitude):
  cfg = TransformerConfig(
    **SIZES | dict(max_length=longest), rope_theta=500.0, rope_scaling=scaling
  )
  cos, sin = rotary.angles(cfg, jnp.array([[0, 1, 7, 60]]))
  assert cos.shape == (1, 4, 1, 8)
  if scaling[0] == 'yarn':  # Some frequencies stay, some are divided, and some are in between.
    assert min(divisors) == 1 and max(divisors) == scaling[1] and len({*divisors}) > 2
  for i, position in enumerate((0, 1, 7, 60)):
    wanted = angles_by_hand(500.0, divisors, magnitude, position)
    close(cos[0, i, 0], wanted[0], atol=1e-5)
    close(sin[0, i, 0], wanted[1], atol=1e-5)


@pytest.mark.parametrize(
  'scaling,message',
  [
    (('linear', 0.0), 'has other values than linear has'),
    (('linear',), 'has other values than linear has'),
    (('yarn', 4.0), 'has other values than yarn has'),
    (('ntk', 2.0), r"model.rope_scaling\[0\]='ntk' is none of linear, yarn, longrope"),
    (
      ('longrope', SHORT[:3], LONG, 64, 1.0),
      'longrope has 3 short and 8 long factors, but there a',
    ),
  ],
)
def test_declarations_that_cannot_be(scaling, message):
  with pytest.raises(ValueError, match=message):
    TransformerConfig(**SIZES, rope_scaling=scaling)


def test_scaling_needs_rotary_positions():
  with pytest.raises(ValueError, match='needs rotary positions'):
    TransformerConfig(**SIZES, positions='learned', rope_scaling=('linear', 2.0))


def declared(folder, table, **entries):
  shutil.copytree(GOLDEN / 'llama', folder, dirs_exist_ok=True)
  config = json.loads((folder / 'config.json').read_text()) | dict(rope_parameters=table) | entries
  (folder / 'config.json').write_text(json.dumps(config))
  return config_json.declared(folder)


def test_dynamic_positions_are_plain_up_to_their_context(tmp_path):
  """Beyond it the frequencies follow the longest row of a batch, so that it is refused."""
  table = dict(rope_type='dynamic', factor=4.0, rope_theta=10_000.0)
  found = declared(tmp_path, table)
  assert found.fields.get('rope_scaling') is None and found.bound == 'max_position_embeddings'
  longer = dict(source=f'hf:{tmp_path}', max_length=64)
  with pytest.raises(ValueError, match='max_position_embeddings=32 .* longest row of a batch'):
    models.model_config(longer, range(61), 'model')


def test_longrope_has_the_original_context_unless_more_is_asked_for(tmp_path):
  table = dict(
    rope_type='longrope', rope_theta=1e4, short_factor=[1.0, 1.5], long_factor=[2.0, 3.0]
  )
  found = declared(tmp_path, table, original_max_position_embeddings=8)
  kind, short, long, original, magnitude = found.fields['rope_scaling']
  assert (kind, short, long, original) == ('longrope', (1.0, 1.5), (2.0, 3.0), 8)
  assert magnitude == pytest.approx(math.sqrt(1 + math.log(32 / 8) / math.log(8)))
  assert found.fields['max_length'] == 8 and found.bound is None
  with pytest.raises(ValueError, match='longrope has 1 short'):
    declared(tmp_path, table | dict(short_factor=[1.0]), original_max_position_embeddings=8)
  with pytest.raises(
    ValueError, match=r'rope_parameters.long_factor=\[1, 0\] is not a list of num'
  ):
    declared(tmp_path, table | dict(long_factor=[1, 0]), original_max_position_embeddings=8)


def test_the_magnitude_of_yarn(tmp_path):
  table = dict(rope_type='yarn', rope_theta=500.0, factor=4.0, original_max_position_embeddings=8)
  of = lambda **more: declared(tmp_path, table | more).fields['rope_scaling']
  assert of() == ('yarn', 4.0, 8, 32.0, 1.0, True, pytest.approx(0.1 * math.log(4) + 1))
  assert of(attention_factor=0.5)[-1] == 0.5
  assert of(mscale=1.0)[-1] == pytest.approx(0.1 * math.log(4) + 1)
  wanted = (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
  assert of(mscale=2.0, mscale_all_dim=0.5)[-1] == pytest.approx(wanted)
  assert of(factor=None)[1] == 4.0, 'max_position_embeddings=32 over 8'
  assert of(beta_fast=16, beta_slow=2, truncate=False)[3:6] == (16.0, 2.0, False)
