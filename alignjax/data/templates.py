"""How text becomes token rows, and tokens text again: how a document begins, a prompt, a response,
and what ends one.

c.data.template:
  None         the sandbox's own form, for its own tokenizer
  'plain'      the prompt as it is; the response, then the tokenizer's end of text
  'dialogue'   "\\n\\nHuman: PROMPT\\n\\nAssistant:" and " RESPONSE", the form of hh-rlhf; a prompt
               that already has turns is kept
  'chat'       the tokenizer's chat template (data/chat.py); the response ends with the token that
               ends a turn in the template
  any text with {prompt} in it, such as "Question: {prompt}\\nAnswer:"

A prompt is text or, for 'chat', also a list of messages {"role", "content"}. The end token is part
of the response and of its loss, so that the model learns to stop (docs/pitfalls.md, 28); a response
whose text already ends with its name gets one and not two. Names of control tokens elsewhere in
people's text are text (data/control.py).

How a document begins is the tokenizer's decision, taken here for prompts, pretraining text and
evaluations alike. One that puts a token before every text (the BOS of Llama and Mistral) has it
before all of them, and pretraining documents are "BOS text EOS", as in Llama's own training. One
that puts none there (GPT-2, Pythia, SmolLM2) has nothing before a text; its end of text stands
between documents of pretraining text, and stands for the start where there is no text at all. A
chat template says itself how a conversation begins: nothing is added to what it renders.
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
  """Text to tokens and back, for every use.

  prompt: text (or messages) -> tokens, never none.
  pair: (prompt, response) -> tokens of both; the response's end with an end token.
  response: text -> tokens with the end token, where the prompt does not matter.
  bare: text -> its tokens alone. decode: tokens -> text.
  end: what a response is taught to end with. ends: all that stop generation, `end` among them.
  pad: fills rows, may be the same id as `end`.
  first: stands before every text; () for tokenizers that put nothing there.
  start: the start of a document where something has to stand: `first`, or the end of text. close:
    after a document.
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

  def text(self, said: str) -> list[int]:
    """Tokens of a text that begins a document: a prompt, a context, a sentence. Of an empty one the
    start of a document."""
    return [*self.first, *self.bare(said)] or [*self.start]

  def document(self, said: str) -> list[int]:
    """Tokens of a whole document of pretraining text."""
    return [*self.start, *self.bare(said), *self.close]

  def row(self, prompt: Any, said: str, ended: bool = True) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of a response; of one that was cut at a limit (not ended) without an
    end token."""
    asked, tokens = self.pair(prompt, said)
    return asked, tokens if ended else tokens[:-1]

  def decode_response(self, tokens: Sequence[int]) -> tuple[str, bool]:
    """(text, ended) of the tokens of a sampled response: the end token is no part of the text.
    Everything that reads responses as text (rewards on the host, judges, scorers, samples.jsonl, a
    person) reads this."""
    tokens = [int(token) for token in tokens]
    ended = bool(tokens) and tokens[-1] in self.ends
    return self.decode(tokens[:-1] if ended else tokens), ended


def make(tokenizer: Any, form: str, date: str | None = None, opened: bool = False) -> Template:
  """A Template of a transformers tokenizer. date, opened: of chat templates, see chat.make."""
  eos = tokenizer.eos_token_id
  if eos is None:
    raise ValueError(
      f'data.tokenizer={tokenizer.name_or_path!r} has no end-of-text token: set eos_token in its '
      'tokenizer_config.json.'
    )
  pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
  first = _first(tokenizer)
  start, close = (first, (eos,)) if first else ((eos,), ())

  def decode(tokens):
    return tokenizer.decode([int(token) for token in tokens])

  named = _named_ends(tokenizer)
  special = control.special(tokenizer, named)
  if text := sorted(named & {*tokenizer.get_vocab().values()} - special.keys()):
    print(
      f'the checkpoint of {tokenizer.name_or_path!r} names '
      f'{[tokenizer.convert_ids_to_tokens(i) for i in text]} (eos_token_id '
      f'{text}) as ends; they are text, so they end no response here, though in transformers.',
      file=sys.stderr,
      flush=True,
    )

  def ends(end):
    return tuple(sorted({end, eos, *named & special.keys()}))

  if form == 'chat':
    made = chat.make(tokenizer, special, date, opened, without_end)

    def chat_response(said):
      return made.pair([chat.QUESTION], said)[1]

    return Template(
      prompt=made.prompt,
      pair=made.pair,
      response=chat_response,
      bare=made.control.encode,
      decode=decode,
      end=made.end,
      ends=ends(made.end),
      pad=pad,
      first=first,
      start=start,
      close=close,
    )
  template = {'plain': '{prompt}', 'dialogue': '\n\nHuman: {prompt}\n\nAssistant:'}.get(form, form)
  if '{prompt}' not in template:
    raise ValueError(
      f'data.template={form!r} is none of {NAMES}, nor a text with {{prompt}} in it.'
    )
  before, after = template.split('{prompt}', 1)
  space = ' ' if form == 'dialogue' else ''
  bare = control.make(tokenizer, special).encode

  def prompt(said):
    if not isinstance(said, str):
      raise ValueError(
        f'data.template={form!r} takes prompts of text; lists of messages need '
        f"data.template='chat'."
      )
    if form == 'dialogue' and said.startswith('\n\nHuman:'):
      return [*first, *bare(said.removesuffix(' '))]
    return [*first, *bare(before + said + after)] or [*start]

  def response(said):
    return [
      *bare(space + without_end(said, [tokenizer.eos_token]).removeprefix(' ' if space else '')),
      eos,
    ]

  def pair(asked, said):
    return prompt(asked), response(said)

  return Template(
    prompt=prompt,
    pair=pair,
    response=response,
    bare=bare,
    decode=decode,
    end=eos,
    ends=ends(eos),
    pad=pad,
    first=first,
    start=start,
    close=close,
  )


def of_words(
  encode: Callable[[str], list[int]],
  decode: Callable[[Sequence[int]], str],
  end: int,
  pad: int,
  newline: str,
) -> Template:
  """The sandbox's form: every text begins with the end of the one before, and a line break ends a
  prompt."""

  def prompt(said):
    return [end, *encode(said), *encode(newline)]

  def response(said):
    return [*encode(without_end(said, [decode([end])])), end]

  return Template(
    prompt=prompt,
    pair=lambda asked, said: (prompt(asked), response(said)),
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
  """function(thing) of each; an error says which one it was and how it begins.

  where: where each of them stands, or where all of them do; then they are counted from 1.
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


def without_end(said: str, names: Sequence[str]) -> str:
  """A response without the end tokens that its text already ends with, and the white space after
  them."""
  return re.sub(f'(?:(?:{"|".join(map(re.escape, names))})\\s*)+\\Z', '', said)


def _named_ends(tokenizer: Any) -> set[int]:
  """The ids that the checkpoint beside the tokenizer names as ends, where transformers' generate
  stops: those of generation_config.json, else of config.json."""
  for name in ('generation_config.json', 'config.json'):
    path = pathlib.Path(tokenizer.name_or_path) / name
    if path.is_file():
      try:
        found = json.loads(path.read_text(encoding='utf-8')).get('eos_token_id')
      except (ValueError, AttributeError) as error:
        raise ValueError(f'{path}: not a JSON object in UTF-8 ({error}).') from None
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
  """What the tokenizer itself puts before a text."""
  whole, bare = tokenizer.encode('a'), tokenizer.encode('a', add_special_tokens=False)
  at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
  return tuple(whole[:at])
