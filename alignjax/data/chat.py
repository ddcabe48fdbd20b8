"""A tokenizer's chat template: what a finished conversation is, which part of it is the prompt, and
on which day it is rendered."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alignjax.data import control

MARK = 'zq7xj'  # a word for an answer, to see what a template puts around it
QUESTION = {'role': 'user', 'content': 'Hello.'}
CLOCK = 'strftime_now'  # the only clock that transformers gives to a template


class Chat(NamedTuple):
  """prompt: text or messages -> tokens, up to where the answer begins. pair: (prompt, answer) ->
  tokens of both; those of the answer end with `end`. control: tells people's text from control
  tokens."""

  prompt: Callable[[Any], list[int]]
  pair: Callable[[Any, str], tuple[list[int], list[int]]]
  end: int
  control: control.Control


def make(
  tokenizer: Any,
  special: Mapping[int, str],
  date: str | None,
  opened: bool,
  without_end: Callable[[str, list[str]], str],
) -> Chat:
  """The functions of a tokenizer's chat template.

  A prompt is what the template renders before an answer of a finished conversation. As a rule that
  is the template's generation prompt. Where that says more than finished conversations do (it opens
  a thought, say, that they do not hold), a model trained on finished answers has not seen it, and
  it is left out.

  Args:
    special: {id: name} of its control tokens.
    date: 'YYYY-MM-DD', the day that a template which prints the day renders; None: today.
    opened: the generation prompt as it is, for a model that others trained.
    without_end: (answer, names of end tokens) -> the answer without those at its end.
  """
  name = tokenizer.name_or_path
  if not tokenizer.chat_template:
    raise ValueError(
      f"data.template='chat', but the tokenizer {name!r} has no chat template; use one of "
      "'plain', 'dialogue' or a text with {prompt}."
    )
  source = _on_day(tokenizer, date)

  def render(messages: list[dict[str, Any]], asked: bool = False) -> str:
    try:
      return tokenizer.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=asked
      )
    except Exception as error:  # noqa: BLE001 a template may raise anything
      said = (str(error).splitlines() or [type(error).__name__])[0]
      roles = ', '.join(str(m.get('role')) for m in messages)
      raise ValueError(
        f'the chat template of {name!r} refuses a conversation of the roles {roles}: {said}'
      ) from None

  def before(messages: list[dict[str, Any]]) -> str:
    """What stands before the answer in a finished conversation."""
    left, found, _ = render([*messages, _answer(MARK)]).rpartition(MARK)
    if not found:
      raise ValueError(
        f'the chat template of {name!r} does not render the answer of a conversation.'
      )
    return left

  def prompt_text(messages: list[dict[str, Any]]) -> str:
    asked, left = render(messages, True), before(messages)
    return asked if opened or left.startswith(asked) else left

  usual = lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False)
  whole, left = render([QUESTION, _answer(MARK)]), before([QUESTION])
  tail = usual(whole[len(left) + len(MARK) :])
  known = tokenizer.added_tokens_decoder
  # white space may stand before it
  end = next((token for token in tail if token in {*tokenizer.all_special_ids, *known}), None)
  if end is None:
    raise ValueError(
      f'the chat template of {name!r} ends an answer with {tail[:3]}, not with a special '
      'token; nothing would tell the model to stop.'
    )
  around = {*usual(render([QUESTION])), end} & known.keys()
  names = {**special} | {i: known[i].content for i in around}
  apart = control.make(tokenizer, names)
  ends = [names[i] for i in {end, tokenizer.eos_token_id} if i in names]
  asked = render([QUESTION], True)
  if not left.startswith(asked):
    kept = 'It is kept: this model was trained elsewhere.'
    left_out = 'Models are trained and asked without it.'
    _tell(
      f'the chat template of {name!r} asks for an answer with {_after(asked, left)!r}, which its '
      f'finished answers do not begin with. {kept if opened else left_out}'
    )

  def hidden(said: Any) -> tuple[list[dict[str, Any]], str | None]:
    messages = _messages(said)
    private = apart.private(messages)
    return (messages, None) if private is None else (apart.hide(messages, private), private)

  def prompt(said: Any) -> list[int]:
    messages, private = hidden(said)
    return apart.rendered(prompt_text(messages), private)

  def pair(said: Any, answer: str) -> tuple[list[int], list[int]]:
    messages, private = hidden([*_messages(said), _answer(without_end(answer, ends))])
    whole, text = render(messages), prompt_text(messages[:-1])
    if not whole.startswith(text):
      text = before(messages[:-1]) if opened else text
    if not whole.startswith(text):
      show = (lambda x: x) if private is None else lambda x: apart.reveal(x, private)
      raise ValueError(
        f'the chat template of {name!r} does not render the prompt and its answer as one '
        f'conversation. The prompt:\n'
        f'{show(text)!r}\nThe conversation with the answer:\n{show(whole)!r}'
      )
    first, both = apart.rendered(text, private), apart.rendered(whole, private)
    rest = (
      both[len(first) :]
      if both[: len(first)] == first
      else apart.rendered(whole[len(text) :], private)
    )
    if end not in rest:
      raise ValueError(
        f'the chat template of {name!r} does not end this answer with {names[end]!r}: '
        f'{whole[len(text) :]!r}'
      )
    return first, rest[: rest.index(end) + 1]

  return Chat(prompt, pair, end, apart)


def dated(tokenizer: Any) -> bool:
  """Whether the chat template prints the day, so that the same conversation has other tokens
  tomorrow."""
  return bool(tokenizer.chat_template) and CLOCK in tokenizer.get_chat_template()


def _answer(text: str) -> dict[str, str]:
  return {'role': 'assistant', 'content': text}


def _messages(said: Any) -> list[dict[str, Any]]:
  if isinstance(said, str):
    return [{'role': 'user', 'content': said}]
  good = lambda m: (
    isinstance(m, dict)
    and isinstance(m.get('role'), str)
    and (
      # templates render an absent text as '' or 'None'
      isinstance(m.get('content'), (str, list)) or bool(m.get('tool_calls'))
    )
  )
  if not isinstance(said, (list, tuple)) or not said or not all(map(good, said)):
    raise ValueError(
      f'a prompt is text, or a list of messages {{"role", "content"}}, one or more; this one is '
      f'{said!r:.200}.'
    )
  return list(said)


def _after(asked: str, left: str) -> str:
  """What `asked` has that `left` has not."""
  at = next(
    (i for i, (a, b) in enumerate(zip(asked, left, strict=False)) if a != b),
    min(len(asked), len(left)),
  )
  return asked[at:]


def _tell(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _on_day(tokenizer: Any, date: str | None) -> str:
  """The source of the chat template, its clock stopped at midnight of the day."""
  source = tokenizer.get_chat_template()
  if not dated(tokenizer):
    return source
  if date is None:
    date = datetime.date.today().isoformat()
    _tell(
      f'the chat template of {tokenizer.name_or_path!r} prints the day; {date} is taken. '
      f'data.template_date sets another.'
    )
  try:
    day = datetime.datetime.fromisoformat(date)
  except ValueError:
    raise ValueError(f'data.template_date={date!r} is no day of the form 2026-07-31.') from None
  percent = chr(0xFFFFD)
  codes = [
    f'%{flag}{letter}'
    for flag in ('-', '')
    for letter in 'aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ'
  ]
  steps = [('%%', percent), *((code, day.strftime(code)) for code in codes), (percent, '%')]
  chain = ''.join(f'|replace({old!r}, {new!r})' for old, new in steps)
  # a macro of the template hides the function of the same name; what follows it is no block, so no
  # line break is trimmed
  return f'{{% macro {CLOCK}(format) %}}{{{{ format{chain} }}}}{{% endmacro %}}{{{{ "" }}}}{source}'
