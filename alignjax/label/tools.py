"""What the exchange with other labeling tools (label_studio.py, argilla.py) has in common.

Only `read` and `collect` need the packages of the `label` extra, so that a machine that only trains
can use what was labelled elsewhere.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from alignjax.data import sources
from alignjax.evals.preference.judgment_rows import FLAGS
from alignjax.label import answers as forms
from alignjax.runtime import textfiles

Row = dict[str, Any]
PROMPTS = ('prompt', 'instruction', 'question', 'query')  # what tools call the prompt
RESPONSE = re.compile(
  '(?:response|reply|answer|completion|generation|candidate|output|summary|text)s?[-_ ]?'
  r'(\d+|[a-i])',
  re.IGNORECASE,
)
SCALES = {name: scale for scales in forms.SCALES.values() for name, scale in scales.items()}
ASKED = {
  'few_shot': 'Write an instruction, and two or more queries with the answers that follow it.',
  'user_based': 'Write a prompt for this use case, and its response: ',
  'plain': 'Write a prompt and its response. Think of any task; make the tasks diverse.',
}


def title_of(scale: forms.Scale) -> str:
  """Returns the question of a scale, with what its ends mean."""
  return f'{scale.label} ({scale.low}: {scale.ends[0]}, {scale.high}: {scale.ends[1]})'


class Content(NamedTuple):
  """What a record of a tool is about.

  Attributes:
    prompt: a text, a conversation, or None where the labeler writes the prompt.
    texts: {what the tool calls a response: its text}, in the order of the item.
    meta: what labelers are not shown; see meta_of.
  """

  prompt: Any
  texts: Mapping[str, str]
  meta: Row


def meta_of(item: Any) -> Row:
  """Returns what `content` needs of an item and labelers are not shown."""
  policies = [response['source'] for response in item.responses]
  made = dict(
    item=item.id,
    policies=policies if any(policies) else None,
    use_case=item.use_case,
    extra=item.extra or None,
    overlap=item.overlap,
    messages=item.prompt if isinstance(item.prompt, list) else None,
  )
  return {name: value for name, value in made.items() if value is not None}


def content(fields: Row, texts: Mapping[str, str], meta: Any) -> Content:
  """Returns what a record is about.

  Args:
    fields: what the tool shows. One of PROMPTS is the prompt.
    texts: of the responses.
    meta: the record's meta data, of meta_of or of somebody else.
  """
  meta = meta if isinstance(meta, dict) else {}
  for name, form in dict(extra={}, messages=[], policies=[]).items():
    if not isinstance(meta.get(name, form), type(form)):
      raise ValueError(
        f'the meta data {name!r} must be {textfiles.kind(form)}, not {textfiles.kind(meta[name])}.'
      )
  if 'style' in meta.get('extra', {}):
    return Content(None, texts, meta)
  given = [fields[name] for name in PROMPTS if fields.get(name) is not None]
  prompt = meta.get('messages') or next(iter(given), None)
  if prompt is None:
    raise ValueError(
      f'there is no prompt among the fields {", ".join(sorted(fields)) or "(none)"}; call it one '
      f'of {", ".join(PROMPTS)}.'
    )
  return Content(prompt, texts, meta)


def shown_prompt(item: Any) -> str:
  """Returns the prompt as one text: a conversation with its roles, and what is asked for where the
  labeler writes the prompt."""
  if isinstance(item.prompt, list):
    return '\n\n'.join(f'{turn["role"].capitalize()}: {turn["content"]}' for turn in item.prompt)
  if item.prompt is None:
    return ASKED[item.extra.get('style', 'plain')] + item.extra.get('case', '')
  return item.prompt


def response_names(fields: Iterable[str]) -> list[str]:
  """Returns the fields that are responses by their names, such as answer1 and answer2, in order."""
  found = [(RESPONSE.fullmatch(name), name) for name in fields]
  return [name for _, name in sorted((m[1].lower().rjust(9, '0'), n) for m, n in found if m)]


def read(
  path: str, kind: str, module: str, parse: Callable[[Row], list[tuple[Content, int]]]
) -> list[Row]:
  """Returns the items of a file of a tool, for catalog.add_items.

  Args:
    path: a file with an array of JSON, or an object per line.
    kind: 'ranking', 'toxicity' or 'demonstration'.
    module: the name of the tool's module, for the notice.
    parse: returns what a record is about, with the number of its answers, which are ignored.
  """
  made, ignored = [], 0
  for number, (_, raw) in enumerate(textfiles.Records(textfiles.read(path), path), 1):
    where = f'{path}, record {number}'
    if not isinstance(raw, dict):
      raise ValueError(f'{where}: a record must be an object, not {textfiles.kind(raw)}.')
    try:
      parsed = parse(raw)
    except ValueError as error:
      raise ValueError(f'{where}: {error}') from None
    except (AttributeError, KeyError, TypeError) as error:
      raise ValueError(
        f'{where} has not the form of the tool ({type(error).__name__}: {error}); export it again.'
      ) from error
    made += [_item(found, kind, where) for found, _ in parsed]
    ignored += sum(count for _, count in parsed)
  if not made:
    raise ValueError(f'{path} has no records; export them as JSON.')
  if ignored:
    print(
      f'NOTE: {path} has {ignored} answers, which do not become answers of people here. The '
      f'mappings {module}:comparisons and {module}:demonstrations make training data of them.',
      file=sys.stderr,
    )
  return made


def _item(found: Content, kind: str, where: str) -> Row:
  from alignjax.label import exchange

  known = {k: found.meta[k] for k in ('policies', 'use_case') if found.meta.get(k) is not None}
  record = dict(prompt=found.prompt, responses=list(found.texts.values())) | known
  if kind == 'demonstration' and found.prompt is None:
    row: Row = dict(prompt=None, use_case=known.get('use_case'), responses=[])
  elif kind == 'demonstration':
    (row,) = exchange.demonstration_items(sources.convert(record, 'prompts', where))
  elif found.texts:
    (row,) = exchange.ranking_items(sources.convert(record, 'candidates', where))
  else:
    raise ValueError(
      f'{where}: there are no responses; they are a list of objects with an id, or fields '
      f'response_1, response_2, ...'
    )
  return row | dict(extra=found.meta.get('extra', {}), overlap=found.meta.get('overlap'))


def ratings(given: Mapping[str, Any], first: int, count: int) -> list[Row] | None:
  """Returns the ratings of the responses, or None unless each has one.

  Args:
    given: {'likert_1': 5, 'flags_1': [...], 'relative_toxicity_1': ['-1'], ...}.
    first: the number of the first response.
    count: the number of responses.
  """
  made = []
  for i in range(first, first + count):
    row: Row = {}
    for name in SCALES:
      value = given.get(f'{name}_{i}')
      value = next(iter(value), None) if isinstance(value, list) else value
      if value is not None:
        row[name] = int(value)
    if 'likert' in row:
      row['flags'] = [flag for flag in FLAGS if flag in given.get(f'flags_{i}', ())]
    made.append(row)
  return made if all(made) else None


def comparison(found: Content, payload: Mapping[str, Any], who: Row) -> Row:
  """Returns the record that exchange.comparisons makes, without the order shown.

  Args:
    found: what was ranked.
    payload: the answer (answers.py).
    who: 'labeler_id' and 'pool', as far as they are known.
  """
  texts = list(found.texts.values())
  made = dict(
    prompt=found.prompt,
    responses=texts,
    ranks=[rank - 1 for rank in payload['ranks'] or [1] * len(texts)],
    policies=found.meta.get('policies'),
    ratings=payload['ratings'],
    all_bad=payload['all_bad'] or None,
  )
  return {k: v for k, v in made.items() if v is not None} | _known(found, payload, who)


def _known(found: Content, payload: Mapping[str, Any], who: Row) -> Row:
  extra = found.meta.get('extra', {})
  use_case = payload.get('use_case') or found.meta.get('use_case')
  made = dict(
    user_id=extra.get('user_id'),
    round=extra.get('round'),
    use_case=use_case,
    item=found.meta.get('item'),
  )
  return who | {name: value for name, value in made.items() if value is not None}


def demonstrations(found: Content, payload: Mapping[str, Any], who: Row) -> list[Row]:
  """Returns the records that exchange.demonstrations makes, or none if the prompt or the response
  is missing. The arguments are those of `comparison`."""
  known = _known(found, payload, who)
  prompt, examples = payload['prompt'] or found.prompt, payload['examples']
  if not examples:
    complete = prompt is not None and payload['response'] is not None
    return [dict(prompt=prompt, response=payload['response']) | known] if complete else []
  made = []
  for i, (query, response) in enumerate(examples):
    others = [f'{q}\n{a}' for j, (q, a) in enumerate(examples) if j != i]
    text = '\n\n'.join([str(prompt), *others, query])
    made.append(dict(prompt=text, response=response, style='few_shot') | known)
  return made


def collect(
  connection: Any, task: int | None, pool: str | None, tool: str
) -> tuple[str, list[tuple[Any, list[Any]]], list[str]]:
  """Returns (the kind of the tasks, the items in the order in which they are given, each with its
  current answers, sentences that say what is left out).

  Args:
    connection: of a reading transaction.
    task: the number of a task; None means all, which must be of one kind.
    pool: only answers of labelers of this pool.
    tool: the name of the tool, for the sentences.
  """
  import sqlalchemy as sa

  from alignjax.label import figures
  from alignjax.label.schema import answers, items, reviews, tasks

  chosen = items.c.task_id == task if task is not None else sa.true()
  rows = connection.execute(
    sa.select(items, tasks.c.kind, tasks.c.instructions)
    .join(tasks)
    .where(chosen)
    .order_by(items.c.task_id, items.c.priority, items.c.id)
  ).all()
  kinds = sorted({row.kind for row in rows})
  if len(kinds) > 1:
    raise ValueError(
      f'the tasks are of the kinds {", ".join(kinds)}, and {tool} asks the same of every record; '
      f'name one of them by --task.'
    )
  kept = {row.id: (row, []) for row in rows if not (row.is_gold or row.hidden)}
  if not kept:
    raise ValueError('there are no items to write; `alignjax label import` adds some.')
  given = [a for a in figures.read(connection, task) if a.item.id in kept]
  given = [a for a in given if pool in (None, 'all', a.pool)]
  done = [answer for answer in given if answer.status == 'done']
  for answer in done:
    kept[answer.item.id][1].append(answer)

  def count(joined: Any, condition: Any) -> int:
    query = sa.select(sa.func.count()).select_from(
      joined.join(items, answers.c.item_id == items.c.id)
    )
    return connection.execute(query.where(chosen, condition)).scalar_one()

  counts = {
    'items whose answer is known (gold)': sum(row.is_gold for row in rows),
    'hidden items': sum(row.hidden is not None for row in rows),
    'skips, with their reasons': sum(answer.status == 'skipped' for answer in given),
    'withdrawn answers': sum(answer.status == 'withdrawn' for answer in given),
    'earlier versions of answers': count(answers, ~answers.c.current),
    "researchers' scores of demonstrations": count(reviews.join(answers), sa.true()),
    f'orders in which responses were shown ({tool} has one for all)': sum(
      len(answer.shown) > 0 for answer in done
    ),
  }
  lost = [f'Left out: {number} {text}.' for text, number in counts.items() if number]
  if any(row.instructions for row in rows):
    lost.append(f'Left out: the instructions and their versions; copy them into {tool}.')
  return kinds[0], list(kept.values()), lost
