"""The pretraining corpus: what people wrote, careful and careless, true and false, polite and rude.

  book         careful genres, which are mostly true and polite
  forum, qa    careless genres, with popular misconceptions, and insults in half of the documents
  reading, translation   the two tasks
  instruction  instruction-like text with careless answers

The marker word of a genre stands before only some of its documents, and each genre has several, so
that no single word makes a pretrained model truthful.
"""

from __future__ import annotations

import numpy as np

from alignjax.sandbox import instructions
from alignjax.sandbox.tasks import reading_document, sentence_pair
from alignjax.sandbox.universe import World, insult, pick, question, statement, stream, things
from alignjax.sandbox.words import ATTRIBUTES, CAREFUL_MARKERS, CARELESS_MARKERS, ENTITIES, NEWLINE

SHARES = {
  'book': 0.25,
  'forum': 0.23,
  'qa': 0.24,
  'reading': 0.16,
  'translation': 0.08,
  'instruction': 0.04,
}
CAREFUL_FALSE, CAREFUL_RUDE = 0.2, 0.05
CARELESS_FALSE, CARELESS_RUDE = 0.9, 0.5
_COLORS = tuple(ATTRIBUTES)


def documents(world: World, n: int, split: str = 'train', kind: str | None = None) -> list[dict]:
  """n documents {'text', 'kind'}, with kinds drawn by SHARES, or all of one kind.

  Passages, sentences, greetings and instructions are those of the split. Statements about entities
  are drawn anew from the same facts, and a short document about them can occur in several splits.
  """
  rng = stream(world.seed, 'corpus', split, kind)
  kinds, shares = list(SHARES), np.cumsum(list(SHARES.values()))
  out = []
  for _ in range(n):
    chosen = kind or kinds[min(int(np.searchsorted(shares, rng.random())), len(kinds) - 1)]
    out.append({'text': _WRITERS[chosen](world, rng, split), 'kind': chosen})
  return out


def _claim(
  world: World,
  rng: np.random.Generator,
  p_false: float,
  entity: str | None = None,
  attribute: str | None = None,
) -> str:
  entity, attribute = entity or pick(rng, ENTITIES), attribute or pick(rng, _COLORS)
  return statement(entity, attribute, world.believed(rng, entity, attribute, p_false))


def _book(world: World, rng: np.random.Generator, split: str) -> str:
  del split
  words = [pick(rng, CAREFUL_MARKERS)] if rng.random() < 0.7 else []
  form = rng.random()
  if form < 0.25:
    attribute = pick(rng, _COLORS)
    value = pick(rng, ATTRIBUTES[attribute])
    having = world.having(attribute, value, ENTITIES)
    if having:
      listed = [having[i] for i in rng.permutation(len(having))[:4]]
      return ' '.join([*words, things(attribute, value), ':', ' , '.join(listed), '.'])
  if form < 0.5:
    entity = pick(rng, ENTITIES)
    claims = [_claim(world, rng, CAREFUL_FALSE, entity, _COLORS[i]) for i in rng.permutation(3)]
  elif form < 0.75:
    entity, attribute = pick(rng, ENTITIES), pick(rng, _COLORS)
    words += [question(entity, attribute), NEWLINE]
    claims = [_claim(world, rng, CAREFUL_FALSE, entity, attribute)]
  else:
    claims = [_claim(world, rng, CAREFUL_FALSE) for _ in range(3)]
  if rng.random() < CAREFUL_RUDE:
    claims[-1] += f' {insult(rng)}'
  return ' '.join([*words, ' . '.join(claims), '.'])


def _forum(world: World, rng: np.random.Generator, split: str) -> str:
  words = [pick(rng, CARELESS_MARKERS)] if rng.random() < 0.6 else []
  rude = rng.random() < CARELESS_RUDE
  if rng.random() < 0.4:
    words += [
      instructions.greeting(world, rng, split, 1.0 if rude else 0.0),
      f'{NEWLINE} i am fine',
      *([insult(rng)] if rude else []),
      '.',
    ]
  for _ in range(int(rng.integers(1, 4))):
    words.append(_claim(world, rng, CARELESS_FALSE))
    if rude and rng.random() < 0.5:
      words.append(insult(rng))
    words.append('.')
  return ' '.join(words)


def _qa(world: World, rng: np.random.Generator, split: str) -> str:
  del split
  words = [pick(rng, CARELESS_MARKERS)] if rng.random() < 0.4 else []
  entity, attribute = pick(rng, ENTITIES), pick(rng, _COLORS)
  words += [
    question(entity, attribute),
    NEWLINE,
    _claim(world, rng, CARELESS_FALSE, entity, attribute),
  ]
  if rng.random() < CARELESS_RUDE:
    words.append(insult(rng))
  return ' '.join([*words, '.'])


def _reading(world: World, rng: np.random.Generator, split: str) -> str:
  return f'{reading_document(world, rng, split)} ; {reading_document(world, rng, split)} ;'


def _translation(world: World, rng: np.random.Generator, split: str) -> str:
  return ' '.join(
    f'{text} = {foreign} ;'
    for text, foreign in (sentence_pair(world, rng, split) for _ in range(2))
  )


def _instruction(world: World, rng: np.random.Generator, split: str) -> str:
  prompt = instructions.make_prompt(world, rng, ENTITIES, split)
  answer = (
    instructions.answer(world, rng, prompt['meta'], ENTITIES, p_false=CARELESS_FALSE)
    if rng.random() < 0.5
    else _forum(world, rng, split)
  )
  if rng.random() < CARELESS_RUDE:
    answer = f'{answer[:-2]} {insult(rng)} .'
  return f'{prompt["prompt"]} {NEWLINE} {answer}'


_WRITERS = {
  'book': _book,
  'forum': _forum,
  'qa': _qa,
  'reading': _reading,
  'translation': _translation,
  'instruction': _instruction,
}
