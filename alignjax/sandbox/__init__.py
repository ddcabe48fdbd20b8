"""The sandbox: everything that the paper measures, generated from a seed, with exact ground truth.

world = sandbox.World(seed=0)
sandbox.documents(world, 1000)            pretraining text, by kind
sandbox.prompts(world, 100, 'test')       instructions, by use case
sandbox.demonstrations(world, 100)        by contractors who make mistakes
sandbox.judge(world, meta, response, ended=True)
sandbox.Labelers(seed=0).rank(features, labeler=3, rng=rng)
"""

from collections.abc import Mapping
from typing import Any

from alignjax.sandbox.biases import belief_prompts, refusal_prompts
from alignjax.sandbox.corpus import SHARES, documents
from alignjax.sandbox.instructions import (
  baseline_prefixes,
  demonstrations,
  prompts,
  toxicity_prompts,
  truthfulness_prompts,
)
from alignjax.sandbox.judge import Judgment, judge
from alignjax.sandbox.labelers import FEATURES, Labelers
from alignjax.sandbox.tasks import reading_comprehension, translation
from alignjax.sandbox.universe import World
from alignjax.sandbox.words import EOS_ID, NEWLINE, PAD_ID, VOCAB, decode, encode, tokenizer

__all__ = [
  'EOS_ID',
  'FEATURES',
  'NEWLINE',
  'PAD_ID',
  'SHARES',
  'VOCAB',
  'Judgment',
  'Labelers',
  'World',
  'baseline_prefixes',
  'belief_prompts',
  'decode',
  'demonstrations',
  'documents',
  'encode',
  'judge',
  'of_entries',
  'prompts',
  'reading_comprehension',
  'refusal_prompts',
  'tokenizer',
  'toxicity_prompts',
  'translation',
  'truthfulness_prompts',
]


def of_entries(entries: Mapping[str, Any]) -> tuple[World, Labelers]:
  """Returns the world and its labelers that the entries `world` of a config describe."""
  seed = entries['seed']
  world = World(seed, entries.get('beliefs', 0.0), entries.get('harmful', 0.0))
  return world, Labelers(seed, **entries.get('labelers', {}))
