"""The fields that a record of each kind has, their types, and the forms in which a response may be
given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from alignjax.runtime import textfiles

FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = dict(
  demonstrations=dict(prompt=(str, list), response=(str, list, dict)),
  comparisons=dict(prompt=(str, list), responses=list, ranks=list),
  candidates=dict(prompt=(str, list), responses=list),
  prompts=dict(prompt=(str, list)),
  pretrain=dict(text=str),
)


def dense_ranks(values: Iterable[float]) -> list[int]:
  """Returns the ranks of values of which the lowest is the best: 0 for it, then 1, and so on. Equal
  values have equal ranks, and no rank is left out."""
  values = list(values)
  place = {value: rank for rank, value in enumerate(sorted(set(values)))}
  return [place[value] for value in values]


def check(record: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
  """Returns the record, after checking that every field is present and has its type. {"chosen",
  "rejected"} becomes a ranking of two, and a response in messages becomes its text."""
  if (
    kind == 'comparisons'
    and 'chosen' in record
    and 'rejected' in record
    and 'responses' not in record
  ):
    if 'ranks' in record:
      raise ValueError(
        f"{where}: 'chosen' and 'rejected' are already a ranking of two; leave out 'ranks', or "
        f"give 'responses' "
        'with it.'
      )
    rest = {k: v for k, v in record.items() if k not in ('chosen', 'rejected')}
    record = {**rest, 'responses': [record['chosen'], record['rejected']], 'ranks': [0, 1]}
    if 'prompt' not in record:
      fits = 'hh_rlhf' if isinstance(record['responses'][0], str) else 'ultrafeedback_binarized'
      raise ValueError(
        f"{where}: field 'prompt' is missing; where 'chosen' and 'rejected' begin with it, "
        f'data.mapping.comparisons={fits} takes it from them. This record has {sorted(rest)} '
        f'besides.'
      )
  for field, expected in FIELDS[kind].items():
    if field not in record:
      raise ValueError(
        f'{where}: field {field!r} is missing; a record of {kind} has {sorted(FIELDS[kind])}, '
        f'this one has {sorted(record)}. Other names: data.mapping.{kind}.'
      )
    if not isinstance(record[field], expected):
      names = ' or '.join(
        t.__name__
        for t in (expected if isinstance(expected, tuple) else (expected,))
        if t is not dict
      )
      raise ValueError(
        f'{where}: field {field!r} must be {names}, not {type(record[field]).__name__}'
        f'{" (null)" if record[field] is None else ""}.'
      )
  for field in ('user_id', 'labeler_id'):
    if isinstance(record.get(field), bool) or not isinstance(
      record.get(field), (str, int, type(None))
    ):
      raise ValueError(
        f'{where}: field {field!r} must be text or a whole number, not {record[field]!r}.'
      )
  for field in ('use_case', 'kind'):
    if not isinstance(record.get(field), (str, type(None))):
      raise ValueError(
        f'{where}: field {field!r} must be text, not {textfiles.kind(record[field])}.'
      )
  if isinstance(record.get('prompt'), list):
    messages = record['prompt']
    if not messages or not all(map(_is_message, messages)):
      raise ValueError(
        f"{where}: 'prompt' as a list must hold messages {{'role': 'system' | 'user' | "
        f"'assistant', "
        "'content': str}."
      )
  if kind == 'demonstrations':
    record = {
      **record,
      'response': answer(record['response'], record['prompt'], "'response'", where),
    }
  if kind in ('comparisons', 'candidates'):
    texts = [
      answer(r, record['prompt'], "every entry of 'responses'", where) for r in record['responses']
    ]
    record = {**record, 'responses': texts}
  if kind == 'comparisons':
    check_comparison(record, where)
  return record


def _is_message(m: Any) -> bool:
  return (
    isinstance(m, dict)
    and m.get('role') in ('system', 'user', 'assistant')
    and isinstance(m.get('content'), str)
  )


def answer(response: Any, prompt: str | list[dict[str, Any]], what: str, where: str) -> str:
  """Returns the text of a response, which is a string, or the assistant's message, alone or in a
  list that may begin with the prompt's messages."""
  if isinstance(response, str):
    return response
  messages = [response] if isinstance(response, dict) else response
  if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
    raise ValueError(
      f"{where}: {what} must be a string, or a message {{'role': 'assistant', 'content': str}}, "
      f'alone or in a list; '
      f'not {textfiles.kind(response)}.'
    )

  def turns(some):
    return [(m['role'], m['content']) for m in some]

  before = turns([{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt)
  if messages[-1]['role'] != 'assistant' or turns(messages[:-1]) not in ([], before):
    raise ValueError(
      f"{where}: {what} must be one message of the assistant, after the prompt's messages or "
      f'without them; it has '
      f'the roles {", ".join(m["role"] for m in messages)}.'
    )
  return messages[-1]['content']


def check_comparison(record: dict[str, Any], where: str) -> None:
  responses, ranks = record['responses'], record['ranks']
  if len(responses) != len(ranks):
    raise ValueError(f'{where} has {len(responses)} responses, but {len(ranks)} ranks.')
  if len(responses) < 2:
    raise ValueError(f'{where}: a comparison needs at least two responses, not {len(responses)}.')
  if not all(isinstance(r, int) and not isinstance(r, bool) and 0 <= r < 2**31 for r in ranks):
    raise ValueError(
      f"{where}: 'ranks' must be integers from 0 (best) on, equal ones for ties; got {ranks}."
    )
