"""Exchange with Label Studio (labelstud.io): its tasks become items, and items with their answers
become its tasks with annotations.

A file is what Label Studio exports and imports as "JSON" (not "JSON-MIN"), an array of tasks:

  {'data': {'prompt': ..., 'items': [{'id', 'title', 'body'}, ...]}, 'meta': {...},
   'annotations': [{'completed_by', 'was_cancelled', 'lead_time',
                    'result': [{'from_name', 'to_name', 'type', 'value'}, ...]}, ...]}

`config` returns the labeling interface for the tasks that are written here. Tasks of the templates
"LLM Ranker", "Human Preference Collection for RLHF" (fields answer1 and answer2, the control
Pairwise) and "Supervised LLM Fine-tuning" are read too. What was labelled there is training data:

    --config.data.comparisons=jsonl:FILE
    --config.data.mapping.comparisons=alignjax.label.label_studio:comparisons

and in the same way `demonstrations`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import SubElement as add

from alignjax.evals.preference.judgment_rows import FLAGS
from alignjax.label import answers as forms
from alignjax.label import tools
from alignjax.label.tools import Content, Row
from alignjax.runtime import textfiles

# The type of a control -> where its results have their value.
VALUES = {kind: kind for kind in ('choices', 'ranker', 'rating', 'taxonomy')}
VALUES |= dict(pairwise='selected', textarea='text')
UNRANKED = '_'  # The bucket of what is in no other one.
AREAS = dict(  # the text areas of a demonstration
  new_prompt='Prompt or instruction, only where you are asked for it',
  response='Response',
  query='Queries of an instruction with examples, in order',
  answer='Their answers, in the same order',
  use_case='Use case',
)


def config(kind: str, k: int = 4) -> str:
  """Returns the labeling interface (XML), which a project needs before the import.

  Args:
    kind: 'ranking', 'toxicity' or 'demonstration'.
    k: the largest number of responses of an item.
  """
  view = ElementTree.Element('View')
  add(view, 'Header', value='Prompt')
  add(view, 'Text', name='prompt', value='$prompt')
  if kind == 'demonstration':
    for name, title in AREAS.items():
      add(view, 'Header', value=title)
      area = add(view, 'TextArea', name=name, toName='prompt', rows='4', editable='true')
      if name not in ('query', 'answer'):
        area.set('maxSubmissions', '1')
  else:
    each = add(view, 'Repeater', on='$items', indexFlag='{{idx}}')
    add(each, 'Header', value='Response {{idx}}')
    add(each, 'Text', name='response_{{idx}}', value='$items[{{idx}}].body')
    for name, scale in forms.SCALES[kind].items():
      add(each, 'Header', value=tools.title_of(scale))
      control, to = name + '_{{idx}}', 'response_{{idx}}'
      if scale.low == 1:
        add(each, 'Rating', name=control, toName=to, maxRating=str(scale.high))
      else:
        numbers = {str(n): str(n) for n in range(scale.low, scale.high + 1)}
        _choices(each, control, to, 'single', numbers)
    if kind == 'ranking':
      _choices(each, 'flags_{{idx}}', 'response_{{idx}}', 'multiple', FLAGS)
    add(view, 'List', name='responses', value='$items', title='Not ranked yet')
    ranker = add(view, 'Ranker', name='ranking', toName='responses')
    for n in range(1, k + 1):
      add(ranker, 'Bucket', name=f'rank_{n}', title=f'Rank {n}')
    _choices(view, 'all_bad', 'prompt', 'multiple', {'all_bad': 'All are too bad to be ranked'})
  ElementTree.indent(view)
  return ElementTree.tostring(view, encoding='unicode') + '\n'


def _choices(view: Any, name: str, to: str, choice: str, options: Mapping[str, str]) -> None:
  choices = add(view, 'Choices', name=name, toName=to, choice=choice, showInline='true')
  for alias, text in options.items():
    add(choices, 'Choice', alias=alias, value=text)


def read(path: str, kind: str) -> list[Row]:
  """Returns the items of a file of tasks, for catalog.add_items. Annotations are ignored, with a
  notice. A task that cannot be an item is a ValueError with the file and the number of the task."""

  def parse(raw: Row) -> list[tuple[Content, int]]:
    return [(_content(raw), len(raw.get('annotations') or []))]

  return tools.read(path, kind, __name__, parse)


def _content(raw: Row) -> Content:
  data = raw.get('data', raw)  # Label Studio imports tasks without 'data' too.
  if not isinstance(data, dict):
    raise ValueError(f"'data' must be an object, not {textfiles.kind(data)}.")
  return tools.content(data, _texts(data), raw.get('meta'))


def _texts(data: Row) -> dict[str, str]:
  """The responses: a list of objects with ids, which the tag List shows, or single fields."""
  for field, value in data.items():
    if isinstance(value, list) and value and isinstance(value[0], dict) and 'id' in value[0]:
      made = {}
      for i, entry in enumerate(value):
        texts = [entry[k] for k in ('body', 'html', 'text', 'title') if entry.get(k) is not None]
        if not texts or 'id' not in entry or str(entry['id']) in made:
          raise ValueError(f"'data.{field}[{i}]' must have a 'body' and an 'id' of its own.")
        made[str(entry['id'])] = texts[0]
      return made
  return {name: data[name] for name in tools.response_names(data)}


def _annotations(raw: Row) -> Iterator[tuple[Row, list[tuple[str, str, Any]]]]:
  """(the labeler, [(control, type, value), ...]) of each annotation that was not cancelled. The
  labeler is one of ours, as `write` named them, or the user of Label Studio."""
  if not isinstance(raw.get('annotations'), list):
    raise ValueError("'annotations' must be a list; export as JSON, and not as JSON-MIN.")
  for annotation in raw['annotations']:
    if annotation.get('was_cancelled'):
      continue
    by = annotation.get('completed_by')
    by = by.get('email') or by.get('id') if isinstance(by, dict) else by
    who, made = {} if by is None else {'labeler_id': by}, []
    for result in annotation['result']:
      meta = result.get('meta') or {}
      if 'labeler_id' in meta:
        who = {name: meta[name] for name in ('labeler_id', 'pool') if name in meta}
      if (kind := result.get('type')) in VALUES:
        value = result['value'][VALUES[kind]]
        if kind == 'taxonomy':
          value = [path[-1] for path in value]
        if kind == 'textarea' and isinstance(value, str):
          value = [value]
        made.append((result['from_name'], kind, value))
    yield who, made


def comparisons(raw: Row) -> list[Row]:
  """Maps a task with annotations to records for data.comparisons, one for each annotation that
  ranks all responses: by a Ranker whose buckets are rank_1, rank_2, ... (two responses in one
  bucket are a tie), by a Ranker without buckets, or by Pairwise, where 'left' is the first
  response. Without buckets Label Studio saves the order shown, too, where nobody ranked."""
  found, made = _content(raw), []
  for who, results in _annotations(raw):
    given = {name: value for name, _, value in results}
    ranks = [_ranks(kind, value, list(found.texts)) for _, kind, value in results]
    payload = dict(
      ranks=next(filter(None, ranks), None),
      ratings=tools.ratings(given, 0, len(found.texts)),
      all_bad=bool(given.get('all_bad')),
    )
    if payload['ranks'] or payload['all_bad']:
      made.append(tools.comparison(found, payload, who))
  return made


def _ranks(kind: str, value: Any, ids: list[str]) -> list[int] | None:
  """The ranks from 1 on, or None if this result does not rank all responses."""
  if kind == 'pairwise' and len(ids) == 2:
    return {'left': [1, 2], 'right': [2, 1]}[value]
  if kind != 'ranker':
    return None
  buckets = dict(value) if isinstance(value, dict) else {'rank': value}
  buckets.pop(UNRANKED, None)
  numbers = [re.fullmatch(r'rank[-_ ]?(\d+)', name) for name in buckets]
  if len(buckets) == 1 and not all(numbers):
    buckets = dict(enumerate([i] for i in next(iter(buckets.values()))))
  elif all(numbers):
    buckets = {int(m[1]): inner for m, inner in zip(numbers, buckets.values(), strict=True) if m}
  else:
    raise ValueError(
      f'the buckets {", ".join(buckets)} are not ranks; call them rank_1, rank_2, ..., where 1 is '
      f'the best.'
    )
  rank_of = {str(i): rank for rank, inner in buckets.items() for i in inner}
  return forms.without_gaps([rank_of[i] for i in ids]) if set(ids) <= set(rank_of) else None


def demonstrations(raw: Row) -> list[Row]:
  """Maps a task with annotations to records for data.demonstrations. The response is in the text
  area 'response', or in the only one that there is; each text that was entered there is one."""
  found, made = _content(raw), []
  for who, results in _annotations(raw):
    areas = {name: value for name, kind, value in results if kind == 'textarea'}
    if len(areas) == 1 and not areas.keys() & AREAS.keys():
      areas = {'response': next(iter(areas.values()))}
    queries, replies = areas.get('query', []), areas.get('answer', [])
    if len(queries) != len(replies):
      raise ValueError(f'an annotation has {len(queries)} queries, but {len(replies)} answers.')
    for response in areas.get('response') or [None]:
      payload = dict(
        prompt=next(iter(areas.get('new_prompt', [])), None),
        response=response,
        use_case=next(iter(areas.get('use_case', [])), None),
        examples=list(zip(queries, replies, strict=True)),
      )
      made += tools.demonstrations(found, payload, who)
  return made


def write(connection: Any, task: int | None, pool: str | None) -> tuple[str, int, list[str]]:
  """Returns (the text of a file of tasks, their number, sentences that say what it cannot hold).
  The arguments are those of tools.collect."""
  kind, items, lost = tools.collect(connection, task, pool, 'Label Studio')
  made = []
  for item, given in items:
    data: Row = dict(prompt=tools.shown_prompt(item))
    if kind != 'demonstration':
      data['items'] = [
        dict(id=f'response_{i}', title=f'Response {i}', body=response['text'])
        for i, response in enumerate(item.responses)
      ]
    annotations = [_annotation(answer, kind) for answer in given]
    made.append(dict(data=data, meta=tools.meta_of(item), annotations=annotations))
  if any(given for _, given in items):
    lost += [
      'Label Studio takes whoever imports the file for the author of all annotations; the labelers '
      'are in the meta data of the results.',
      'Left out: the times of answers. lead_time has the active seconds where the browser counted '
      'them, and otherwise those since the item was given.',
    ]
  if any('policies' in one['meta'] for one in made):
    lost.append(
      'The names of the sources are in the meta data of the tasks. The labeling page does not show '
      'them, but the HTTP API gives a whole task to whoever may label it.'
    )
  k = max(len(item.responses) for item, _ in items)
  lost.append(f'The labeling interface is alignjax.label.label_studio.config({kind!r}, {k}).')
  return json.dumps(made, ensure_ascii=False, indent=1) + '\n', len(made), lost


def _annotation(answer: Any, kind: str) -> Row:
  results = _written(answer.payload) if kind == 'demonstration' else _rated(answer.payload)
  made = [
    dict(id=f'answer_{answer.id}_{n}', origin='manual') | result for n, result in enumerate(results)
  ]
  made[0]['meta'] = dict(labeler_id=answer.name, pool=answer.pool)
  seconds = answer.seconds if answer.active is None else answer.active
  return dict(result=made, was_cancelled=False, ground_truth=False, lead_time=round(seconds, 3))


def _result(name: str, to: str, kind: str, value: Any) -> Row:
  return dict(from_name=name, to_name=to, type=kind, value={VALUES[kind]: value})


def _rated(payload: Row) -> list[Row]:
  made = []
  if payload['ranks']:
    buckets = {UNRANKED: []} | {f'rank_{n}': [] for n in range(1, len(payload['ranks']) + 1)}
    for i, rank in enumerate(payload['ranks']):
      buckets[f'rank_{rank}'].append(f'response_{i}')
    made.append(_result('ranking', 'responses', 'ranker', buckets))
  if payload['all_bad']:
    made.append(_result('all_bad', 'prompt', 'choices', ['all_bad']))
  for i, rating in enumerate(payload.get('ratings') or []):
    for name, value in rating.items():
      control = f'{name}_{i}', f'response_{i}'
      if name != 'flags' and tools.SCALES[name].low == 1:
        made.append(_result(*control, 'rating', value))
      elif value != []:
        made.append(_result(*control, 'choices', value if name == 'flags' else [str(value)]))
  return made


def _written(payload: Row) -> list[Row]:
  texts = dict(
    new_prompt=[payload['prompt']],
    response=[payload['response']],
    query=[query for query, _ in payload['examples']],
    answer=[answer for _, answer in payload['examples']],
    use_case=[payload['use_case']],
  )
  return [_result(name, 'prompt', 'textarea', some) for name, some in texts.items() if any(some)]
