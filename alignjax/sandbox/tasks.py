"""The two tasks that stand for the public NLP datasets: reading comprehension and translation.

Both occur in the pretraining corpus in exactly this form, and nowhere else but in a few instructions: so a policy that
drifts away from its pretraining forgets them, and the alignment tax can be measured.
"""

from __future__ import annotations

import numpy as np

from alignjax.sandbox.universe import World, pick, stream
from alignjax.sandbox.words import ADJECTIVES, ATTRIBUTES, ENTITIES, FOREIGN, NAMES, OBJECTS, VERBS

QUESTIONS = ('who gives ?', 'who gets ?', 'what thing ?', 'where ?')


def passage(rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
  """A passage and the answers to the four questions: giver, receiver, thing, place."""
  first, second = rng.permutation(len(NAMES))[:2]
  giver, receiver, thing, place = NAMES[first], NAMES[second], pick(rng, OBJECTS), pick(rng, ATTRIBUTES['place'])
  text = f'{giver} gives the {thing} to {receiver}' if rng.random() < 0.5 else f'{receiver} gets the {thing} of {giver}'
  text = f'in the {place} {text}' if rng.random() < 0.5 else f'{text} in the {place}'
  return text, (giver, receiver, thing, place)


def reading_document(rng: np.random.Generator, questions: int = 4) -> str:
  """A passage with its questions and answers: 'passage . question answer ; question answer'."""
  text, answers = passage(rng)
  asked = rng.permutation(4)[:questions]
  return f'{text} . ' + ' ; '.join(f'{QUESTIONS[i]} {answers[i]}' for i in asked)


def _noun_phrase(rng: np.random.Generator) -> tuple[str, str]:
  noun, count = pick(rng, ENTITIES), int(rng.integers(3))
  adjectives = [ADJECTIVES[i] for i in rng.permutation(len(ADJECTIVES))[:count]]
  foreign = [FOREIGN['the'], FOREIGN[noun], *(FOREIGN[a] for a in reversed(adjectives))]
  return ' '.join(['the', *adjectives, noun]), ' '.join(foreign)


def sentence_pair(rng: np.random.Generator) -> tuple[str, str]:
  """A sentence and its translation. Adjectives follow their noun in reverse order, and the verb comes last:
  'the big old fox sees the cat in the cave' = 'lo xfoxu zaoldo zabigo lo xcatu de lo kocava veseei'."""
  (subject, subject_f), (obj, obj_f), verb = _noun_phrase(rng), _noun_phrase(rng), pick(rng, VERBS)
  text, foreign = f'{subject} {verb} {obj}', f'{subject_f} {obj_f}'
  if rng.random() < 0.5:
    place = pick(rng, ATTRIBUTES['place'])
    text, foreign = f'{text} in the {place}', f'{foreign} {FOREIGN["in"]} {FOREIGN["the"]} {FOREIGN[place]}'
  return text, f'{foreign} {FOREIGN[verb]}'


def reading_comprehension(world: World, n: int, split: str = 'test') -> list[dict]:
  """n items {'context', 'answer'}: a solved passage, then a passage with one question; the answer is one word."""
  rng = stream(world.seed, 'reading', split)
  out = []
  for _ in range(n):
    context, answer = reading_document(rng, 1).rsplit(' ', 1)
    out.append({'context': f'{reading_document(rng)} ; {context}', 'answer': answer})
  return out


def translation(world: World, n: int, split: str = 'test') -> list[dict]:
  """n items {'context', 'answer'}: a translated sentence, then one to translate; the answer ends with ';'."""
  rng = stream(world.seed, 'translation', split)
  out = []
  for _ in range(n):
    text, foreign = sentence_pair(rng)
    out.append({'context': f'{" = ".join(sentence_pair(rng))} ; {text} =', 'answer': f'{foreign} ;'})
  return out
