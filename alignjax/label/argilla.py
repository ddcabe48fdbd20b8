"""Exchange with Argilla 2 (docs.argilla.io): its records become items, and items with their answers
become its records with responses.

`write` makes a file for `dataset.records.from_json`, an array of records

  {'id': ..., 'fields': {'prompt': ..., 'response_1': ..., ...}, 'metadata': {...},
   'responses': {QUESTION: [{'value', 'user_id', 'status'}, ...], ...}, ...}

and `settings` returns what the dataset needs, for `rg.Settings.from_json`. A ranking has the value
[{'value': 'response_1', 'rank': 1}, ...], where equal ranks are a tie. Argilla's Python client
leaves the ranks out of what it exports (records.to_json, to_list; Argilla's issue 5712). Fetch
rankings by the HTTP API instead: /api/v1/datasets/ID/records?include=responses. Its pages, and the
records in them, are read here as well as the client's. What was labelled there is training data:

    --config.data.comparisons=jsonl:FILE
    --config.data.mapping.comparisons=alignjax.label.argilla:comparisons

and in the same way `demonstrations`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from alignjax.evals.preference.judgment_rows import FLAGS
from alignjax.label import answers as forms
from alignjax.label import tools
from alignjax.label.tools import Content, Row
from alignjax.runtime import textfiles


def settings(kind: str, k: int = 4) -> Row:
  """Returns the settings of a dataset as JSON, for rg.Settings.from_json.

  Args:
    kind: 'ranking', 'toxicity' or 'demonstration'.
    k: the number of responses; of demonstrations the number of examples that belong to an
      instruction, or 0 where the labeler writes one response.
  """
  fields, questions = {'prompt': 'Prompt'}, []

  def ask(name, title, kind='text', required=False, options=()):
    inner: Row = dict(type=kind)
    if options:
      texts = options if isinstance(options, Mapping) else {value: str(value) for value in options}
      inner['options'] = [
        dict(value=value) if kind == 'rating' else dict(value=str(value), text=text)
        for value, text in texts.items()
      ]
    questions.append(dict(name=name, title=title, required=required, settings=inner))

  if kind == 'demonstration':
    ask('new_prompt', 'Prompt or instruction, if you are asked for it', required=k > 0)
    ask('response', 'Response', required=k == 0)
    for n in range(1, k + 1):
      ask(f'query_{n}', f'Query {n}', required=n < 3)
      ask(f'answer_{n}', f'Answer {n}', required=n < 3)
    ask('use_case', 'Use case')
  else:
    names = {f'response_{n}': f'Response {n}' for n in range(1, k + 1)}
    fields |= names
    for n in range(1, k + 1):
      for name, scale in forms.SCALES[kind].items():
        control = 'rating' if _is_rating(name) else 'label_selection'
        title = f'Response {n}: {tools.title_of(scale)}'
        ask(f'{name}_{n}', title, control, options=range(scale.low, scale.high + 1))
      if kind == 'ranking':
        ask(f'flags_{n}', f'Response {n}: flags', 'multi_label_selection', options=FLAGS)
    ask('ranking', 'Ranking, with ties', 'ranking', True, names)
    ask('all_bad', 'All are bad', 'label_selection', options=('yes', 'no'))
  text = dict(type='text', use_markdown=False)
  return dict(
    guidelines=None,
    fields=[
      dict(name=name, title=title, required=n < 3, settings=text)
      for n, (name, title) in enumerate(fields.items())
    ],
    questions=questions,
    metadata=[],  # The page shows annotators no metadata that are not listed here.
    vectors=[],
    allow_extra_metadata=True,
    distribution=dict(strategy='overlap', min_submitted=1),
    mapping=None,
  )


def _is_rating(scale: str) -> bool:
  """Whether a rating can hold a scale: it is a number from 0 to 10."""
  return tools.SCALES[scale].low >= 0


def read(path: str, kind: str) -> list[Row]:
  """Returns the items of a file of records, for catalog.add_items. Responses are ignored, with a
  notice. A record that cannot be an item is a ValueError with the file and its number."""

  def parse(raw: Row) -> list[tuple[Content, int]]:
    return [(_content(one), len(list(_answers(one)))) for one in _records(raw)]

  return tools.read(path, kind, __name__, parse)


def _records(raw: Row) -> list[Row]:
  """The records of a page of the HTTP API, {'items': [...], 'total': ...}, or the one record."""
  return raw['items'] if 'fields' not in raw and isinstance(raw.get('items'), list) else [raw]


def _content(raw: Row) -> Content:
  fields = raw.get('fields')
  if not isinstance(fields, dict):
    raise ValueError(
      f"'fields' must be an object, not {textfiles.kind(fields)}; export the records unflattened."
    )
  given = {name: value for name, value in fields.items() if value is not None}
  names = tools.response_names(given)
  return tools.content(given, {name: given[name] for name in names}, raw.get('metadata'))


def _answers(raw: Row) -> Iterator[tuple[Any, Row]]:
  """(the user, {question: value}) of everybody who submitted. The client's export does not say who
  did, and has the answers of all."""
  responses = raw.get('responses') or {}
  users: dict[Any, Row] = {}
  if isinstance(responses, list):  # of the HTTP API, or of Argilla 1
    for n, one in enumerate(responses):
      if one.get('status') == 'submitted':
        given = {question: found['value'] for question, found in one['values'].items()}
        users[one.get('user_id') or n] = given
  else:
    for question, found in responses.items():
      for one in found:
        if one.get('status') in (None, 'submitted'):
          users.setdefault(one.get('user_id'), {})[question] = one['value']
  yield from users.items()


def _who(found: Content, user: Any) -> Row:
  labelers = found.meta.get('labelers', {})
  return labelers.get(user, {'labeler_id': user} if isinstance(user, str) else {})


def comparisons(raw: Row) -> list[Row]:
  """Maps a record with responses to records for data.comparisons, one for each user who submitted
  a ranking of all responses, or chose the best one by a label that is the name of its field."""
  made = []
  for record in _records(raw):
    found = _content(record)
    for user, given in _answers(record):
      ranks = next(filter(None, (_ranks(v, list(found.texts)) for v in given.values())), None)
      if ranks is not None:
        ratings = tools.ratings(given, 1, len(ranks))
        payload = dict(ranks=ranks, ratings=ratings, all_bad=given.get('all_bad') == 'yes')
        made.append(tools.comparison(found, payload, _who(found, user)))
  return made


def _ranks(value: Any, names: list[str]) -> list[int] | None:
  """The ranks from 1 on, or None if this value does not rank all responses."""
  if value in names:
    return [1 if name == value else 2 for name in names]
  if not isinstance(value, list) or not value:
    return None
  if isinstance(value[0], str) and set(names) <= set(value):
    raise ValueError(
      "a ranking has no ranks: Argilla's Python client leaves them out, and its order means "
      'nothing; fetch the records by the HTTP API, /api/v1/datasets/ID/records?include=responses.'
    )
  rank_of: Row = {one['value']: one.get('rank') for one in value if isinstance(one, dict)}
  ranks = [rank_of[name] for name in names if rank_of.get(name) is not None]
  return forms.without_gaps(ranks) if names and len(ranks) == len(names) else None


def demonstrations(raw: Row) -> list[Row]:
  """Maps a record with responses to records for data.demonstrations. The response is the answer to
  the question 'response', or to the only question that has one."""
  made = []
  for record in _records(raw):
    found = _content(record)
    for user, given in _answers(record):
      response = next(iter(given.values())) if len(given) == 1 else given.get('response')
      payload = dict(
        prompt=given.get('new_prompt'),
        response=response,
        use_case=given.get('use_case'),
        examples=_examples(given),
      )
      made += tools.demonstrations(found, payload, _who(found, user))
  return made


def _examples(given: Row) -> list[list[str]]:
  """The examples of an instruction, [query, answer] in the order of their numbers. There are none
  where no query is answered: a dataset of others may have a question answer_1."""
  found = [match for name in given if given[name] and (match := forms.EXAMPLE.fullmatch(name))]
  made: list[list[str]] = []
  if not any(match[0].startswith('query') for match in found):
    return made
  for n in sorted({int(match[1]) for match in found}):
    one = [given.get(f'{part}_{n}') for part in ('query', 'answer')]
    if not all(one):
      there, lacks = ('query', 'answer') if one[0] else ('answer', 'query')
      raise ValueError(f'{there}_{n} is answered, but {lacks}_{n} is not; an example has both.')
    made.append(one)
  return made


def user_id(name: str) -> str:
  """Returns the id that stands for a labeler in the responses: Argilla's ids are UUIDs."""
  return str(uuid.uuid5(uuid.NAMESPACE_URL, f'alignjax:{name}'))


def write(connection: Any, task: int | None, pool: str | None) -> tuple[str, int, list[str]]:
  """Returns (the text of a file of records, their number, sentences that say what it cannot hold).
  The arguments are those of tools.collect."""
  kind, items, lost = tools.collect(connection, task, pool, 'Argilla')
  done = [answer for _, given in items for answer in given]
  counts = {len(item.responses) for item, _ in items}
  k = max(counts)
  if kind == 'demonstration':
    styles = {item.extra.get('style') == 'few_shot' for item, _ in items}
    k = max([3, *(len(a.payload['examples']) for a in done)]) if True in styles else 0
    if len(styles) > 1:
      lost.append(
        'Some items ask for examples and some do not, but Argilla asks the same questions about '
        'every record; make two tasks of them.'
      )
  made = []
  for item, given in items:
    texts = {f'response_{n}': r['text'] for n, r in enumerate(item.responses, 1)}
    metadata, responses = tools.meta_of(item), {}
    for answer in given:
      user = user_id(answer.name)
      who = dict(labeler_id=answer.name, pool=answer.pool)
      metadata.setdefault('labelers', {})[user] = who
      values = _written(answer.payload) if kind == 'demonstration' else _rated(answer, k)
      for question, value in values.items():
        one = dict(value=value, user_id=user, status='submitted')
        responses.setdefault(question, []).append(one)
    record = dict(id=str(item.id), fields=dict(prompt=tools.shown_prompt(item)) | texts)
    more = dict(metadata=metadata, suggestions={}, responses=responses, vectors={})
    made.append(record | more)
  if done:
    users = ', '.join(f'{name} {user_id(name)}' for name in sorted({a.name for a in done}))
    lost += [
      'Left out: the times of answers, and the seconds that they took.',
      f'Argilla accepts responses only of users that it has; make them first, by '
      f'rg.User(username=..., id=...): {users}.',
    ]
  if done and kind != 'demonstration':
    lost.append(
      'Argilla keeps the ranks and their ties, but its Python client leaves them out of what it '
      'exports; fetch the records by its HTTP API.'
    )
  if len(counts) > 1:
    lost.append(
      f'The items have {min(counts)} to {k} responses, but a dataset in Argilla ranks {k} every '
      f'time; those that have no text are ranked last.'
    )
  if any('policies' in record['metadata'] for record in made):
    lost.append(
      'The names of the sources are in the metadata. The labeling page does not show them to '
      'annotators, but the HTTP API gives a whole record to whoever may label it.'
    )
  lost.append(f'The settings of the dataset are alignjax.label.argilla.settings({kind!r}, {k}).')
  return json.dumps(made, ensure_ascii=False, indent=1) + '\n', len(made), lost


def _rated(answer: Any, k: int) -> Row:
  made: Row = {'all_bad': 'yes'} if answer.payload['all_bad'] else {}
  for n, rating in enumerate(answer.payload.get('ratings') or [], 1):
    for name, value in rating.items():
      if value != []:
        made[f'{name}_{n}'] = value if name == 'flags' or _is_rating(name) else str(value)
  ranks = answer.payload['ranks'] or [1] * len(answer.item.responses)
  ranks = ranks + [max(ranks) + 1] * (k - len(ranks))
  made['ranking'] = [dict(value=f'response_{n}', rank=rank) for n, rank in enumerate(ranks, 1)]
  return made


def _written(payload: Row) -> Row:
  made = dict(new_prompt=payload['prompt'], response=payload['response'])
  for n, (query, answer) in enumerate(payload['examples'], 1):
    made |= {f'query_{n}': query, f'answer_{n}': answer}
  made['use_case'] = payload['use_case']
  return {question: text for question, text in made.items() if text}
