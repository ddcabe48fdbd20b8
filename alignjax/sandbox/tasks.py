"""The two tasks that stand for the public NLP data sets: reading comprehension and translation.

Both occur in the pretraining corpus in exactly this form, and otherwise only in a few instructions.
A policy that drifts away from its pretraining therefore forgets them, so that the alignment tax can
be measured. The content of a passage, and every sentence, belong to one split, by hash: no part of
a test item is in the corpus or in a training prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alignjax.sandbox.universe import World, pick, split_of, stream
from alignjax.sandbox.words import ADJECTIVES, ATTRIBUTES, ENTITIES, FOREIGN, NAMES, OBJECTS, VERBS

QUESTIONS = ('who gives ?', 'who gets ?', 'what thing ?', 'where ?')


def passage(world: World, rng: np.random.Generator, split: str) -> tuple[str, tuple[str, ...]]:
  """A passage of the split, and the answers to its four questions: giver, receiver, thing and
  place. There are 5,400 such answers, of which a fifth belong to the test, and a passage tells them
  in one of four ways."""
  answers = None
  while answers is None or split_of(world, ' '.join(answers)) != split:
    first, second = rng.permutation(len(NAMES))[:2]
    answers = NAMES[first], NAMES[second], pick(rng, OBJECTS), pick(rng, ATTRIBUTES['place'])
  giver, receiver, thing, place = answers
  text = (
    f'{giver} gives the {thing} to {receiver}'
    if rng.random() < 0.5
    else f'{receiver} gets the {thing} of {giver}'
  )
  text = f'in the {place} {text}' if rng.random() < 0.5 else f'{text} in the {place}'
  return text, answers


def reading_document(world: World, rng: np.random.Generator, split: str, questions: int = 4) -> str:
  """A passage with its questions and answers: 'passage . question answer ; question answer'."""
  text, answers = passage(world, rng, split)
  asked = rng.permutation(4)[:questions]
  return f'{text} . ' + ' ; '.join(f'{QUESTIONS[i]} {answers[i]}' for i in asked)


def _noun_phrase(rng: np.random.Generator, entities: Sequence[str]) -> tuple[str, str]:
  noun, count = pick(rng, entities), int(rng.integers(3))
  adjectives = [ADJECTIVES[i] for i in rng.permutation(len(ADJECTIVES))[:count]]
  foreign = [FOREIGN['the'], FOREIGN[noun], *(FOREIGN[a] for a in reversed(adjectives))]
  return ' '.join(['the', *adjectives, noun]), ' '.join(foreign)


def sentence_pair(
  world: World, rng: np.random.Generator, split: str, entities: Sequence[str] = ENTITIES
) -> tuple[str, str]:
  """A sentence of the split about two of `entities`, and its translation. Adjectives follow their
  noun in reverse order, and the verb comes last: 'the big old fox sees the cat in the cave' = 'lo
  xfoxu zaoldo zabigo lo xcatu de lo kocava veseei'."""
  while True:
    text, foreign = _sentence_pair(rng, entities)
    if split_of(world, text) == split:
      return text, foreign


def _sentence_pair(rng: np.random.Generator, entities: Sequence[str]) -> tuple[str, str]:
  (subject, subject_f), (obj, obj_f), verb = (
    _noun_phrase(rng, entities),
    _noun_phrase(rng, entities),
    pick(rng, VERBS),
  )
  text, foreign = f'{subject} {verb} {obj}', f'{subject_f} {obj_f}'
  if rng.random() < 0.5:
    place = pick(rng, ATTRIBUTES['place'])
    text, foreign = (
      f'{text} in the {place}',
      f'{foreign} {FOREIGN["in"]} {FOREIGN["the"]} {FOREIGN[place]}',
    )
  return text, f'{foreign} {FOREIGN[verb]}'


def reading_comprehension(world: World, n: int, split: str = 'test') -> list[dict]:
  """n items {'context', 'answer'}: a passage with its answers, and then a passage with one
  question, whose answer is one word."""
  rng = stream(world.seed, 'reading', split)
  out = []
  for _ in range(n):
    context, answer = reading_document(world, rng, split, 1).rsplit(' ', 1)
    out.append({'context': f'{reading_document(world, rng, split)} ; {context}', 'answer': answer})
  return out


def translation(world: World, n: int, split: str = 'test') -> list[dict]:
  """n items {'context', 'answer'}: a translated sentence, and then one to translate, whose answer
  ends with ';'."""
  rng = stream(world.seed, 'translation', split)
  out = []
  for _ in range(n):
    text, foreign = sentence_pair(world, rng, split)
    out.append(
      {
        'context': f'{" = ".join(sentence_pair(world, rng, split))} ; {text} =',
        'answer': f'{foreign} ;',
      }
    )
  return out
