"""Control tokens (<|im_end|>, <s>, ...) and people's text that contains their names.

What a person wrote is text: its "<|im_end|>" is ten characters and not the token that ends a turn,
which only the template may write. By default, transformers reads both as the token. Here, a text
that contains such a name is encoded by a copy of the tokenizer whose control tokens have private
names that do not occur in the text. Everything else (merges, normalization, the white space that a
token strips) remains the tokenizer's own. A text without such names is encoded by the tokenizer
itself.

Control tokens are the tokens that the tokenizer marks as special, those that a chat template writes
around a turn, and added tokens that the checkpoint names as ends. Other added tokens, such as runs
of blanks or a <think> that is not marked as special, are read in text as the tokenizer reads them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

PRIVATE = range(0xF0000, 0xFFFFE)  # Code points that Unicode reserves for private use.


class Control(NamedTuple):
  """Functions that keep people's text and control tokens apart.

  Attributes:
    encode: a function that maps people's text to ids, none of which is a control token.
    private: a function that maps any JSON value to a character that its strings do not contain and
      with which control names are hidden, or to None if they contain no control name.
    hide: a function of (JSON value, private character) that returns the value with every control
      name in its strings replaced by a private one.
    reveal: a function of (text, private character) that restores the hidden names.
    rendered: a function of (text, private character or None) that returns the ids of a template's
      output: the template's own control names are tokens, and hidden ones are text.
  """

  encode: Callable[[str], list[int]]
  private: Callable[[Any], str | None]
  hide: Callable[[Any, str], Any]
  reveal: Callable[[str, str], str]
  rendered: Callable[[str, str | None], list[int]]


def special(tokenizer: Any, ends: Collection[int] = ()) -> dict[int, str]:
  """Returns {id: name} of the tokens that the tokenizer marks as special, and of the added tokens
  among `ends`, which end a response whether they are marked or not. Tokens of single bytes, such as
  <0x0A>, are not included, because they stand for text."""
  found = {
    i: token.content
    for i, token in tokenizer.added_tokens_decoder.items()
    if token.special or i in ends
  }
  found |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
  return {i: name for i, name in found.items() if not re.fullmatch('<0x[0-9A-F]{2}>', name)}


def make(tokenizer: Any, control: Mapping[int, str]) -> Control:
  """Returns the Control of a transformers tokenizer. `control` is {id: name} of its control
  tokens."""
  # Of names with a common beginning, the longest one matches first, as in the tokenizer.
  names = sorted(control.values(), key=len, reverse=True)
  pattern = re.compile('|'.join(map(re.escape, names)))
  number = {name: i for i, name in enumerate(names)}

  def usual(text):
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)

  @functools.lru_cache(maxsize=2)
  def renamed(private: str) -> Any:
    return _renamed(tokenizer, names, lambda name: _token(private, number[name]))

  def unused(text: str) -> str:
    return next(c for c in map(chr, PRIVATE) if c not in text)

  def encode(text: str) -> list[int]:
    ids = usual(text)
    if control.keys().isdisjoint(ids):
      return ids
    return renamed(unused(text)).encode(text, add_special_tokens=False).ids

  def hide(value: Any, private: str) -> Any:
    if isinstance(value, str):
      return pattern.sub(lambda m: _hidden(private, number[m[0]]), value)
    if isinstance(value, dict):
      return {k: hide(v, private) for k, v in value.items()}
    return [hide(v, private) for v in value] if isinstance(value, (list, tuple)) else value

  def reveal(text: str, private: str) -> str:
    return re.sub(f'{private}h([0-9]+){private}', lambda m: names[int(m[1])], text)

  def rendered(text: str, private: str | None) -> list[int]:
    if private is None:
      return usual(text)
    own = pattern.sub(lambda m: _token(private, number[m[0]]), text)
    return renamed(private).encode(reveal(own, private), add_special_tokens=False).ids

  def private(value: Any) -> str | None:
    text = '\n'.join(_strings(value))
    return unused(text) if pattern.search(text) else None

  return Control(encode, private, hide, reveal, rendered)


def _strings(value: Any) -> Iterator[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, (dict, list, tuple)):
    for part in value.values() if isinstance(value, dict) else value:
      yield from _strings(part)


def _token(private: str, number: int) -> str:
  return f'{private}t{number}{private}'


def _hidden(private: str, number: int) -> str:
  return f'{private}h{number}{private}'


def _renamed(tokenizer: Any, names: Collection[str], rename: Callable[[str], str]) -> Any:
  """Returns a tokenizers.Tokenizer in which the given tokens keep their ids and get other names."""
  from tokenizers import Tokenizer

  backend = getattr(tokenizer, 'backend_tokenizer', None)
  if backend is None:
    raise ValueError(
      f'a text names a control token (one of {sorted(names)}), and the tokenizer '
      f'{tokenizer.name_or_path!r} has no '
      'tokenizer.json, without which text and control tokens cannot be distinguished: write one, '
      'or leave the text out.'
    )
  spec = json.loads(backend.to_str())
  other = {name: rename(name) for name in names}
  for token in spec['added_tokens']:
    token['content'] = other.get(token['content'], token['content'])
  model = spec['model']
  if isinstance(model.get('vocab'), dict):
    model['vocab'] = {other.get(name, name): i for name, i in model['vocab'].items()}
  else:  # Unigram: pairs of a name and its score
    model['vocab'] = [[other.get(name, name), score] for name, score in model['vocab']]
  if model.get('unk_token') in other:
    model['unk_token'] = other[model['unk_token']]
  spec['post_processor'] = None
  made = Tokenizer.from_str(json.dumps(spec))
  made.no_truncation()
  made.no_padding()
  return made
