"""Converts text to token rows and tokens back to text: it determines how a document and a prompt
begin, and what ends a response.

c.data.template is one of

  None         the sandbox's own form, for its own tokenizer
  'plain'      the prompt as it is; the response, then the tokenizer's end of text
  'dialogue'   "\\n\\nHuman: PROMPT\\n\\nAssistant:" and " RESPONSE", the form of hh-rlhf; a prompt
               that already has turns is kept
  'chat'       the tokenizer's chat template (data/chat.py); the response ends with the token that
               ends a turn in the template
  any text with {prompt} in it, such as "Question: {prompt}\\nAnswer:"

A prompt is text or, for 'chat', also a list of messages {"role", "content"}. The end token is part
of the response and of its loss, so that the model learns to stop (docs/pitfalls.md, 28). A response
whose text already ends with the name of the end token gets one end token and not two. Names of
control tokens elsewhere in people's text are text (data/control.py).

The tokenizer determines how a document begins, for prompts, pretraining text and evaluations alike.
If it puts a token before every text (the BOS of Llama and Mistral), this token begins all of them,
and pretraining documents are "BOS text EOS", as in Llama's own training. If it puts nothing there
(GPT-2, Pythia, SmolLM2), nothing precedes a text; its end of text separates documents of
pretraining text and represents the start of a document that has no text. A chat template determines
itself how a conversation begins, and nothing is added to its output.
"""

from __future__ import annotations

import json
import pathlib
import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from alignjax.data import chat, control

NAMES = ('plain', 'dialogue', 'chat')


class Template(NamedTuple):
  """Converts text to tokens and tokens to text, for every use.

  Attributes:
    prompt: a function of text (or messages) that returns at least one token.
    pair: a function of (prompt, response) that returns the tokens of both. Those of the response
      end with an end token.
    response: a function of text that returns its tokens with the end token, where the prompt does
      not matter.
    bare: a function of text that returns its tokens alone.
    decode: a function of tokens that returns their text.
    end: the token that ends a response in training.
    ends: all tokens that stop generation, including `end`.
    pad: the id that fills rows, which may be the same as `end`.
    first: the tokens before every text, or () if the tokenizer puts nothing there.
    start: the start of a document where a token is required: `first`, or the end of text.
    close: the tokens after a document.
  """

  prompt: Callable[[Any], list[int]]
  pair: Callable[[Any, str], tuple[list[int], list[int]]]
  response: Callable[[str], list[int]]
  bare: Callable[[str], list[int]]
  decode: Callable[[Sequence[int]], str]
  end: int
  ends: tuple[int, ...]
  pad: int
  first: tuple[int, ...]
  start: tuple[int, ...]
  close: tuple[int, ...]

  def text(self, text: str) -> list[int]:
    """Returns the tokens of a text that begins a document, such as a prompt, a context or a
    sentence. An empty text gives the start of a document."""
    return [*self.first, *self.bare(text)] or [*self.start]

  def document(self, text: str) -> list[int]:
    """Returns the tokens of a whole document of pretraining text."""
    return [*self.start, *self.bare(text), *self.close]

  def row(self, prompt: Any, response: str, ended: bool = True) -> tuple[list[int], list[int]]:
    """Returns the tokens of a prompt and of a response. A response that was cut at a limit (not
    ended) has no end token."""
    query, tokens = self.pair(prompt, response)
    return query, tokens if ended else tokens[:-1]

  def decode_response(self, tokens: Sequence[int]) -> tuple[str, bool]:
    """Returns (text, ended) for the tokens of a sampled response. The end token is not part of the
    text. Everything that reads responses as text (rewards on the host, judges, scorers,
    samples.jsonl, people) uses this function."""
    tokens = [int(token) for token in tokens]
    ended = bool(tokens) and tokens[-1] in self.ends
    return self.decode(tokens[:-1] if ended else tokens), ended


def make(tokenizer: Any, form: str, date: str | None = None, opened: bool = False) -> Template:
  """Returns the Template of a transformers tokenizer. `date` and `opened` are for chat templates
  (chat.make)."""
  eos = tokenizer.eos_token_id
  if eos is None:
    raise ValueError(
      f'data.tokenizer={tokenizer.name_or_path!r} has no end-of-text token: set eos_token in its '
      'tokenizer_config.json.'
    )
  pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
  first = _first(tokenizer)
  start, close = (first, (eos,)) if first else ((eos,), ())
  named = _named_ends(tokenizer)
  special = control.special(tokenizer, named)
  if text := sorted(named & {*tokenizer.get_vocab().values()} - special.keys()):
    print(
      f'the checkpoint of {tokenizer.name_or_path!r} names '
      f'{[tokenizer.convert_ids_to_tokens(i) for i in text]} (eos_token_id '
      f'{text}) as ends. They are text, so they do not end a response here, although they do in '
      f'transformers.',
      file=sys.stderr,
      flush=True,
    )

  def decode(tokens):
    return tokenizer.decode([int(token) for token in tokens])

  if form == 'chat':
    parts = _of_chat(chat.make(tokenizer, special, date, opened, without_end))
  else:
    parts = _of_text(tokenizer, form, control.make(tokenizer, special).encode, first)
  return Template(
    **parts,
    decode=decode,
    ends=tuple(sorted({parts['end'], eos, *named & special.keys()})),
    pad=pad,
    first=first,
    start=start,
    close=close,
  )


def _of_chat(made: chat.Chat) -> dict[str, Any]:
  """Returns the attributes prompt, pair, response, bare and end of a Template for 'chat'."""

  def response(text):
    return made.pair([chat.QUESTION], text)[1]

  return dict(
    prompt=made.prompt, pair=made.pair, response=response, bare=made.control.encode, end=made.end
  )


def _of_text(
  tokenizer: Any, form: str, bare: Callable[[str], list[int]], first: tuple[int, ...]
) -> dict[str, Any]:
  """Returns the same attributes for every other form. bare and first are those of the Template."""
  eos = tokenizer.eos_token_id
  around = {'plain': '{prompt}', 'dialogue': '\n\nHuman: {prompt}\n\nAssistant:'}.get(form, form)
  if '{prompt}' not in around:
    raise ValueError(
      f'data.template={form!r} is none of {NAMES}, nor a text with {{prompt}} in it.'
    )
  before, after = around.split('{prompt}', 1)
  space = ' ' if form == 'dialogue' else ''

  def prompt(text):
    if not isinstance(text, str):
      raise ValueError(
        f'data.template={form!r} takes prompts of text; lists of messages need '
        f"data.template='chat'."
      )
    if form == 'dialogue' and text.startswith('\n\nHuman:'):
      return [*first, *bare(text.removesuffix(' '))]
    return [*first, *bare(before + text + after)] or [eos]

  def response(text):
    answer = without_end(text, [tokenizer.eos_token]).removeprefix(' ' if space else '')
    return [*bare(space + answer), eos]

  def pair(question, answer):
    return prompt(question), response(answer)

  return dict(prompt=prompt, pair=pair, response=response, bare=bare, end=eos)


def of_words(
  encode: Callable[[str], list[int]],
  decode: Callable[[Sequence[int]], str],
  end: int,
  pad: int,
  newline: str,
) -> Template:
  """Returns the sandbox's Template: every text begins with the end of the previous one, and a line
  break ends a prompt."""

  def prompt(text):
    return [end, *encode(text), *encode(newline)]

  def response(text):
    return [*encode(without_end(text, [decode([end])])), end]

  return Template(
    prompt=prompt,
    pair=lambda question, answer: (prompt(question), response(answer)),
    response=response,
    bare=encode,
    decode=decode,
    end=end,
    ends=(end,),
    pad=pad,
    first=(end,),
    start=(end,),
    close=(),
  )


def each(
  function: Callable[[Any], Any], things: Sequence[Any], where: str | Sequence[str]
) -> list[Any]:
  """Returns function(thing) for each thing. An error names the thing and shows its beginning.

  Args:
    function: the function to apply.
    things: its arguments.
    where: the place of each thing, or one place for all of them, which are then counted from 1.
  """
  out = []
  for i, thing in enumerate(things):
    try:
      out.append(function(thing))
    except ValueError as error:
      shown = thing.get('prompt', thing) if isinstance(thing, dict) else thing
      place = f'{where}, record {i + 1}' if isinstance(where, str) else where[i]
      raise ValueError(f'{place} ({str(shown)[:80]!r}): {error}') from None
  return out


def without_end(text: str, names: Sequence[str]) -> str:
  """Returns a response without the end tokens at the end of its text, and without the white space
  after them."""
  return re.sub(f'(?:(?:{"|".join(map(re.escape, names))})\\s*)+\\Z', '', text)


def _named_ends(tokenizer: Any) -> set[int]:
  """Returns the ids that the checkpoint of the tokenizer names as ends, at which transformers'
  generate stops: those of generation_config.json, or else those of config.json."""
  for name in ('generation_config.json', 'config.json'):
    path = pathlib.Path(tokenizer.name_or_path) / name
    if path.is_file():
      try:
        found = json.loads(path.read_text(encoding='utf-8')).get('eos_token_id')
      except (ValueError, AttributeError) as error:
        raise ValueError(f'{path} is not a JSON object in UTF-8 ({error}).') from None
      if found is None:
        continue
      named = found if isinstance(found, list) else [found]
      if not all(type(i) is int for i in named):
        raise ValueError(
          f'{path}: eos_token_id={reprlib.repr(found)} is neither an id nor a list of ids.'
        )
      return {*named}
  return set()


def _first(tokenizer: Any) -> tuple[int, ...]:
  """Returns the tokens that the tokenizer itself puts before a text."""
  whole, bare = tokenizer.encode('a'), tokenizer.encode('a', add_special_tokens=False)
  at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
  return tuple(whole[:at])
