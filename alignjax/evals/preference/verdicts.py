"""Judgments in memory: the pairs that are judged, verdicts, ratings, and the prompts and responses
that they are about."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax.evals.preference.judgment_rows import Response, prompt_id


class Pair(NamedTuple):
  """Two responses to one prompt, as a judge sees them.

  Attributes:
    record: {'prompt', 'prompt_id', ...}, with all other fields that its source has.
    a, b: the names of the two policies.
    response_a, response_b: their responses.
  """

  record: Mapping[str, Any]
  a: str
  b: str
  response_a: Response
  response_b: Response


class Verdict(NamedTuple):
  """The verdict of one labeler on one pair.

  Attributes:
    prompt_id: the name of the prompt.
    a, b: the names of the two policies.
    p: the probability that a is better, which is 0.5 for a tie, or None if there is no verdict.
    judge, labeler: their names. Verdicts of one judge are reported together.
    shown_first: 'a' or 'b' if the order of presentation is known, and '' otherwise.
  """

  prompt_id: str
  a: str
  b: str
  p: float | None
  judge: str
  labeler: str = ''
  shown_first: str = ''


class Rating(NamedTuple):
  """The rating of one response by one labeler.

  Attributes:
    prompt_id, policy, judge, labeler: the names of the prompt, the policy, the judge, the labeler.
    likert: the overall quality from 1 to 7, or None.
    flags: {flag: true or false} for the flags that were judged.
  """

  prompt_id: str
  policy: str
  judge: str
  labeler: str = ''
  likert: float | None = None
  flags: Mapping[str, bool] = {}


class Judged(NamedTuple):
  """The verdicts and ratings of one or more judges.

  Attributes:
    verdicts, ratings: the verdicts on pairs, and the ratings of single responses.
    texts, prompts: {(prompt_id, policy): response} and {prompt_id: prompt}, if a file has its own.
    notes: remarks that a reader of the figures must know.
    repeats: {prompt_id: the one that it repeats}. A prompt_id stands for one response of each
      policy. Further responses of a policy to the same prompt have a prompt_id of their own.
  """

  verdicts: Sequence[Verdict]
  ratings: Sequence[Rating] = ()
  texts: Mapping[tuple[str, str], str] = {}
  prompts: Mapping[str, Any] = {}
  notes: Sequence[str] = ()
  repeats: Mapping[str, str] = {}


class Table(NamedTuple):
  """The verdicts of one judge as columns, with one row per (prompt, pair of policies, labeler).

  Attributes:
    prompts: str[N], the prompt ids.
    i: i64[N], the index of the first policy.
    j: i64[N], the index of the second policy, with i < j.
    labelers: str[N], the names of the labelers.
    p: f64[N], the probability that policy i is better.
    clusters: str[N], labels that are the same for the same prompt.
  """

  prompts: np.ndarray
  i: np.ndarray
  j: np.ndarray
  labelers: np.ndarray
  p: np.ndarray
  clusters: np.ndarray


def make_pairs(
  records: Sequence[Mapping[str, Any]], responses: Mapping[str, Sequence[Response]]
) -> list[Pair]:
  """Returns every pair of policies on every prompt that both of them answered."""
  names = list(responses)
  answered = [
    i for i in range(len(records)) if all(responses[n][i].text is not None for n in names)
  ]
  return [
    Pair(records[i], a, b, responses[a][i], responses[b][i])
    for i in answered
    for n, a in enumerate(names)
    for b in names[n + 1 :]
  ]


def pairs_of(judged: Judged) -> list[Pair]:
  """Returns the pairs that the people of a file judged, with the prompts and responses of the file,
  so that other judges can judge them."""
  pairs = []
  for q, a, b in dict.fromkeys((v.prompt_id, *sorted((v.a, v.b))) for v in judged.verdicts):
    prompt = judged.prompts.get(judged.repeats.get(q, q))
    if prompt is None or (q, a) not in judged.texts or (q, b) not in judged.texts:
      raise ValueError(
        f'other judges cannot be asked: the judgments of {a!r} and {b!r} on the prompt {q!r} come '
        f'without prompt, '
        'response_a and response_b. Name --policies and --prompts.'
      )
    pairs.append(
      Pair(dict(prompt_id=q, prompt=prompt), a, b, *(Response(judged.texts[q, p]) for p in (a, b)))
    )
  return pairs


def empty() -> Judged:
  """Returns no judgments, to which `add` adds."""
  return Judged([], [], {}, {}, [], {})


def add(judged: Judged, more: Judged, where: str = '', repeated: bool = True) -> None:
  """Adds judgments to `judged`. Every verdict keeps the two texts that it is about: where one of
  them differs from the response that its prompt_id stands for, it gets the prompt_id of a repeat.

  Args:
    judged: the judgments of `empty`, with what was added before.
    more: the further judgments, under the prompt_ids that their source gives them.
    where: the file and the line of `more`, for errors.
    repeated: whether a policy may have several responses to a prompt.

  Raises:
    ValueError: A policy has several responses to a prompt, and may not; or a prompt_id stands for
      two prompts.
  """
  for name, prompt in more.prompts.items():
    if judged.prompts.get(name, prompt) != prompt:
      raise ValueError(
        f'{where}: the prompt_id {name!r} stands for another prompt than in an earlier judgment. '
        f'Give every prompt an id of its own, or leave prompt_id out: then it is made of the '
        f'prompt.'
      )
  asked = [(v.prompt_id, (v.a, v.b)) for v in more.verdicts]
  # A row that is not judged yet, or only rated, has responses too.
  alone = {name: tuple(p for n, p in more.texts if n == name) for name, _ in more.texts}
  names = [
    _place(judged, more.texts, name, policies, where, repeated)
    for name, policies in asked or alone.items()
  ]
  judged.verdicts.extend(
    v._replace(prompt_id=name) for v, name in zip(more.verdicts, names, strict=False)
  )
  judged.ratings.extend(more.ratings)
  judged.prompts.update(more.prompts)
  judged.notes.extend(more.notes)


def _place(
  judged: Judged,
  texts: Mapping[tuple[str, str], str],
  prompt: str,
  policies: Sequence[str],
  where: str,
  repeated: bool,
) -> str:
  """Returns the first prompt_id of a prompt that has no other responses of these policies, and
  keeps their texts under it."""
  own = {p: texts[prompt, p] for p in policies if (prompt, p) in texts}
  name, number = prompt, 1
  while differ := [
    p for p, t in own.items() if judged.texts.get((name, p), t).strip() != t.strip()
  ]:
    if not repeated:
      raise ValueError(
        f'{where}: the response of {differ[0]!r} to the prompt {prompt!r} is another one than in '
        f'an earlier judgment; a policy has one response to each prompt of --prompts.'
      )
    number += 1
    name = f'{prompt}, responses {number}'
  if name != prompt:
    judged.repeats[name] = prompt
  for policy, text in own.items():
    judged.texts.setdefault((name, policy), text)
  return name


def clusters(judged: Judged) -> dict[str, str]:
  """Returns {prompt_id: a label that is the same for the same prompt}.

  The label is made of the prompt where it is known. Otherwise it is the prompt_id, where the name
  ID-2 of a prompt that occurs twice (responses.prompts) is known by the form of an ID that was made
  of a prompt.
  """
  found = {}
  every = [v.prompt_id for v in judged.verdicts] + [r.prompt_id for r in judged.ratings]
  for name in dict.fromkeys([*every, *judged.prompts, *(q for q, _ in judged.texts)]):
    own = judged.repeats.get(name, name)
    prompt = judged.prompts.get(own)
    found[name] = prompt_id(prompt) if prompt is not None else _without_number(own)
  return found


def _without_number(name: str) -> str:
  return re.sub(r'^([0-9a-f]{12})-\d+$', r'\1', name)
