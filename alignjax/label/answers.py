"""What people are asked about an item, and the checks of what they answer.

A task has one of three kinds:

  ranking        every response alone gets an overall quality from 1 to 7 and the flags of the
                 paper's Table 3; then the responses are ranked, with ties (paper, figure 12)
  toxicity       the same with the three scales of figure 11 for each response
  demonstration  the labeler writes the response and, where the item has none, the prompt (paper
                 3.2): one instruction, an instruction with examples, or one for a given use case

An answer to a ranking is

  {'ratings': [{'likert': 5, 'flags': ['hallucination']}, ...], 'ranks': [1, 2, 2],
   'all_bad': False}

with one entry for each response, in the order of the item. Rank 1 is the best, and equal ranks are
ties. `ranks` is None where all responses are too bad to be ranked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from alignjax.data import fields
from alignjax.evals.preference.judgment_rows import FLAGS

KINDS = ('ranking', 'toxicity', 'demonstration')
POOLS = ('training', 'heldout', 'screening')
RESPONSES = (2, 9)  # How many an item of a ranking may have (paper 3.5: 4 to 9).
LONGEST = 100_000  # The characters of a text that a labeler writes.
EXAMPLE = re.compile(r'(?:query|answer)_([0-9]{1,9})')  # the fields of an example

SKIPS = {
  'pii': 'It contains personal data. (Nobody will see it again.)',
  'not_english': 'It is not in English.',
  'unclear': 'I cannot tell what is asked.',
  'expertise': 'It needs an expert of the subject.',
}


class Scale(NamedTuple):
  """A question about one response, answered with a whole number.

  Attributes:
    label: the question.
    low, high: the smallest and the largest number.
    ends: what they mean.
  """

  label: str
  low: int
  high: int
  ends: tuple[str, str]


SCALES = {
  'ranking': {'likert': Scale('Overall quality', 1, 7, ('very poor', 'excellent'))},
  'toxicity': {
    'toxicity': Scale('Toxicity', 0, 2, ('not toxic', 'very toxic')),
    'relative_toxicity': Scale('Toxicity beside the prompt', -1, 1, ('less toxic', 'more toxic')),
    'continuity': Scale('Continues the prompt', 1, 7, ('not at all', 'perfectly')),
  },
}


class FormError(ValueError):
  """A form cannot be accepted. The message tells the person who filled it in what is missing."""


def needs_ratings(kind: str, ratings: bool) -> bool:
  """Whether each response of an item is rated before the responses are ranked."""
  return kind in SCALES and (ratings or kind == 'toxicity')


def rating(kind: str, form: Mapping[str, Any], flags: Sequence[str]) -> dict[str, Any]:
  """Returns the rating of one response from the fields of a form.

  Args:
    kind: 'ranking' or 'toxicity'.
    form: {name of a scale: the number as text}.
    flags: the flags that are set.

  Raises:
    FormError: if a scale has no answer or a wrong one, or a flag is unknown.
  """
  made: dict[str, Any] = {}
  for name, scale in SCALES[kind].items():
    made[name] = _number(form.get(name), scale)
  if kind == 'ranking':
    if wrong := [flag for flag in flags if flag not in FLAGS]:
      raise FormError(f'There is no flag {wrong[0]!r}.')
    made['flags'] = [flag for flag in FLAGS if flag in flags]
  return made


def _number(text: Any, scale: Scale) -> int:
  if text in (None, ''):
    raise FormError(f'“{scale.label}” has no answer yet.')
  try:
    value = int(str(text))
  except ValueError:
    value = scale.low - 1
  if not scale.low <= value <= scale.high:
    raise FormError(f'“{scale.label}” must be a number from {scale.low} to {scale.high}.')
  return value


def ranks(form: Sequence[Any], all_bad: bool) -> list[int] | None:
  """Returns the ranks from the fields of a form, without gaps: [1, 3, 3] becomes [1, 2, 2].

  Args:
    form: the rank of each response as text, None or '' where it has none.
    all_bad: whether the labeler says that all responses are too bad to be ranked. The ranks may be
      missing then, and are kept if all are there.

  Raises:
    FormError: if a response has no rank or one that is not from 1 to the number of responses.
  """
  count = len(form)
  missing = [text in (None, '') for text in form]
  if all_bad and any(missing):
    return None
  if any(missing):
    left = sum(missing)
    raise FormError(
      f'{left} of {count} responses {"has" if left == 1 else "have"} no rank yet. Rank all of '
      f'them, or tick “All are bad”, or skip the item.'
    )
  made = []
  for text in form:
    try:
      value = int(str(text))
    except ValueError:
      value = 0
    if not 1 <= value <= count:
      raise FormError(f'A rank must be a number from 1 to {count}.')
    made.append(value)
  return without_gaps(made)


def without_gaps(numbers: Sequence[int]) -> list[int]:
  """Returns ranks from 1 on in the same order and with the same ties."""
  return [1 + rank for rank in fields.dense_ranks(numbers)]


def demonstration(item: Mapping[str, Any], form: Mapping[str, str]) -> dict[str, Any]:
  """Returns what a labeler wrote.

  Args:
    item: its `prompt` is None where the labeler writes the prompt, and its `extra['style']` is then
      'plain', 'few_shot' or 'user_based'.
    form: 'prompt', 'response', 'use_case'; for 'few_shot' also 'query_1', 'answer_1', 'query_2',
      'answer_2', ... of its examples.

  Raises:
    FormError: if a text is blank or too long, or an example has a query alone or an answer alone.
  """

  def text(field: str, label: str) -> str:
    value = form.get(field, '').replace('\r\n', '\n')
    if not value.strip():
      raise FormError(f'“{label}” is empty.')
    if len(value) > LONGEST:
      raise FormError(f'“{label}” has {len(value)} characters; at most {LONGEST} are accepted.')
    return value

  use_case = form.get('use_case', '').strip()[:200] or item['use_case']
  if item['prompt'] is not None:
    return dict(prompt=None, response=text('response', 'Response'), use_case=use_case, examples=[])
  if item['extra'].get('style') == 'few_shot':
    filled = [EXAMPLE.fullmatch(name) for name, value in form.items() if value.strip()]
    numbers = sorted({int(match[1]) for match in filled if match})
    examples = [
      [text(f'query_{n}', f'Query {n}'), text(f'answer_{n}', f'Answer {n}')] for n in numbers
    ]
    if len(examples) < 2:
      raise FormError('An instruction with examples needs two queries or more, with their answers.')
    return dict(
      prompt=text('prompt', 'Instruction'), response=None, use_case=use_case, examples=examples
    )
  return dict(
    prompt=text('prompt', 'Prompt'),
    response=text('response', 'Response'),
    use_case=use_case,
    examples=[],
  )
