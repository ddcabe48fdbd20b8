"""A tokenizer's chat template: it determines what a finished conversation is, which part of it is
the prompt, and on which date it is rendered."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alignjax.data import control

MARK = 'zq7xj'  # A placeholder answer that shows what a template puts around an answer.
QUESTION = {'role': 'user', 'content': 'Hello.'}
CLOCK = 'strftime_now'  # The only clock that transformers gives to a template.


class Chat(NamedTuple):
  """The functions of a chat template.

  Attributes:
    prompt: a function of a text or messages that returns the tokens up to where the answer begins.
    pair: a function of (prompt, answer) that returns the tokens of both. Those of the answer end
      with `end`.
    end: the token that ends a turn.
    control: distinguishes people's text from control tokens.
  """

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
  """Returns the functions of a tokenizer's chat template.

  A prompt is what the template renders before an answer in a finished conversation, which usually
  is the template's generation prompt. If the generation prompt has more than finished conversations
  have (for example the beginning of a thought), a model that was trained on finished answers has
  not seen the rest, and it is left out.

  Args:
    tokenizer: a transformers tokenizer.
    special: {id: name} of its control tokens.
    date: 'YYYY-MM-DD', the date that a template which prints the date renders. None means today.
    opened: whether the generation prompt is kept as it is, for a model that others trained.
    without_end: a function of (answer, names of end tokens) that returns the answer without the end
      tokens at its end.
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
      message = (str(error).splitlines() or [type(error).__name__])[0]
      roles = ', '.join(str(m.get('role')) for m in messages)
      raise ValueError(
        f'the chat template of {name!r} refuses a conversation of the roles {roles}: {message}'
      ) from None

  def before(messages: list[dict[str, Any]]) -> str:
    """Returns the text before the answer in a finished conversation."""
    left, found, _ = render([*messages, _answer(MARK)]).rpartition(MARK)
    if not found:
      raise ValueError(
        f'the chat template of {name!r} does not render the answer of a conversation.'
      )
    return left

  def prompt_text(messages: list[dict[str, Any]]) -> str:
    asked, left = render(messages, True), before(messages)
    return asked if opened or left.startswith(asked) else left

  def usual(text):
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)

  whole, left = render([QUESTION, _answer(MARK)]), before([QUESTION])
  tail = usual(whole[len(left) + len(MARK) :])
  known = tokenizer.added_tokens_decoder
  # White space may precede the end token.
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
    kept = (
      'It is kept, because this model was trained elsewhere.'
      if opened
      else 'Models are trained and prompted without it.'
    )
    _tell(
      f'the chat template of {name!r} asks for an answer with {_after(asked, left)!r}, which its '
      f'finished answers do not begin with. {kept}'
    )

  def hidden(conversation: Any) -> tuple[list[dict[str, Any]], str | None]:
    messages = _messages(conversation)
    private = apart.private(messages)
    return (messages, None) if private is None else (apart.hide(messages, private), private)

  def prompt(conversation: Any) -> list[int]:
    messages, private = hidden(conversation)
    return apart.rendered(prompt_text(messages), private)

  def pair(conversation: Any, answer: str) -> tuple[list[int], list[int]]:
    messages, private = hidden([*_messages(conversation), _answer(without_end(answer, ends))])
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
  """Returns whether the chat template prints the date, so that the same conversation has other
  tokens on another day."""
  return bool(tokenizer.chat_template) and CLOCK in tokenizer.get_chat_template()


def _answer(text: str) -> dict[str, str]:
  return {'role': 'assistant', 'content': text}


def _messages(prompt: Any) -> list[dict[str, Any]]:
  if isinstance(prompt, str):
    return [{'role': 'user', 'content': prompt}]

  def good(m):
    return (
      isinstance(m, dict)
      and isinstance(m.get('role'), str)
      and (
        # Templates render an absent text as '' or 'None'.
        isinstance(m.get('content'), (str, list)) or bool(m.get('tool_calls'))
      )
    )

  if not isinstance(prompt, (list, tuple)) or not prompt or not all(map(good, prompt)):
    raise ValueError(
      f'a prompt must be a text, or a list of one or more messages {{"role", "content"}}; '
      f'this one is {prompt!r:.200}.'
    )
  return list(prompt)


def _after(asked: str, left: str) -> str:
  """Returns the part of `asked` that `left` does not have."""
  at = next(
    (i for i, (a, b) in enumerate(zip(asked, left, strict=False)) if a != b),
    min(len(asked), len(left)),
  )
  return asked[at:]


def _tell(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _on_day(tokenizer: Any, date: str | None) -> str:
  """Returns the source of the chat template with its clock stopped at midnight of the date."""
  source = tokenizer.get_chat_template()
  if not dated(tokenizer):
    return source
  if date is None:
    date = datetime.date.today().isoformat()
    _tell(
      f'the chat template of {tokenizer.name_or_path!r} prints the day; {date} is used. '
      f'data.template_date sets another.'
    )
  try:
    day = datetime.datetime.fromisoformat(date)
  except ValueError:
    raise ValueError(f'data.template_date={date!r} is not a day of the form 2026-07-31.') from None
  percent = chr(0xFFFFD)
  codes = [
    f'%{flag}{letter}'
    for flag in ('-', '')
    for letter in 'aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ'
  ]
  steps = [('%%', percent), *((code, day.strftime(code)) for code in codes), (percent, '%')]
  chain = ''.join(f'|replace({old!r}, {new!r})' for old, new in steps)
  # A macro of the template hides the function of the same name. The text after the macro does not
  # begin with a block, so no line break is trimmed.
  return f'{{% macro {CLOCK}(format) %}}{{{{ format{chain} }}}}{{% endmacro %}}{{{{ "" }}}}{source}'
