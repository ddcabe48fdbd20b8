"""The token form of a dialogue: how a prompt and a response become token ids, and which token ends a response.

c.data.template:
  None         the sandbox's own form, for its own tokenizer
  'plain'      the prompt as it is; the response, then the tokenizer's end of text
  'dialogue'   "\\n\\nHuman: PROMPT\\n\\nAssistant:" and " RESPONSE": the form of hh-rlhf; a prompt that already has turns is kept
  'chat'       the tokenizer's chat template; the response ends with the token that the template ends a turn with
  any text with {prompt} in it, such as "Question: {prompt}\\nAnswer:"

A prompt is text or, for 'chat', also a list of messages {"role", "content"}. The end token is part of the response and of
its loss, so that the model learns to stop (CHECKLIST 28).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

NAMES = ('plain', 'dialogue', 'chat')


class Template(NamedTuple):
  """prompt: text (or messages) -> tokens; response: text -> tokens with `end` after them; end: what stops generation;
  pad: fills rows, may be the same id as `end`; separator: between documents of pretraining text."""
  prompt: Callable[[Any], list[int]]
  response: Callable[[str], list[int]]
  end: int
  pad: int
  separator: int


def make(tokenizer: Any, form: str) -> Template:
  """A Template of a transformers tokenizer."""
  encode = lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False)
  eos = tokenizer.eos_token_id
  if eos is None:
    raise ValueError(f'data.tokenizer={tokenizer.name_or_path!r} has no end-of-text token: set eos_token in its '
                     'tokenizer_config.json.')
  pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
  bos = tokenizer.bos_token_id
  first = [bos] if bos is not None and tokenizer.encode('a')[:1] == [bos] else []  # where the tokenizer itself begins so
  if form == 'chat':
    return _chat(tokenizer, encode, pad, eos)
  text = {'plain': '{prompt}', 'dialogue': '\n\nHuman: {prompt}\n\nAssistant:'}.get(form, form)
  if '{prompt}' not in text:
    raise ValueError(f'data.template={form!r} is none of {NAMES}, nor a text with {{prompt}} in it.')
  before, after = text.split('{prompt}', 1)
  space = ' ' if form == 'dialogue' else ''

  def prompt(said):
    if not isinstance(said, str):
      raise ValueError(f"data.template={form!r} takes prompts of text; lists of messages need data.template='chat'.")
    if form == 'dialogue' and said.startswith('\n\nHuman:'):
      return [*first, *encode(said.removesuffix(' '))]
    return [*first, *encode(before + said + after)]

  return Template(prompt, lambda said: [*encode(space + said.removeprefix(' ' if space else '')), eos], eos, pad, eos)


def _chat(tokenizer: Any, encode: Callable[[str], list[int]], pad: int, eos: int) -> Template:
  if not tokenizer.chat_template:
    raise ValueError(f"data.template='chat', but the tokenizer {tokenizer.name_or_path!r} has no chat template; use one of "
                     "'plain', 'dialogue' or a text with {prompt}.")
  render = lambda messages, **kw: tokenizer.apply_chat_template(messages, tokenize=False, **kw)
  question, mark = {'role': 'user', 'content': 'Hello.'}, 'zq7xj'
  whole = render([question, {'role': 'assistant', 'content': mark}])
  before, _, after = whole.partition(mark)
  tail = encode(after)
  asked = render([question], add_generation_prompt=True)
  lead = before[len(asked):] if before.startswith(asked) else ''  # what a template puts before an answer: Mistral's space
  if not tail or tail[0] not in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
    raise ValueError(f'the chat template of {tokenizer.name_or_path!r} ends an answer with {tail[:3]}, not with a special '
                     'token; nothing would tell the model to stop.')

  def prompt(said):
    messages = [{'role': 'user', 'content': said}] if isinstance(said, str) else said
    return encode(render(messages, add_generation_prompt=True))

  return Template(prompt, lambda said: [*encode(lead + said), tail[0]], tail[0], pad, eos)
