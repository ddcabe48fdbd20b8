"""Text as tokens, as the config has it: the tokenizer, the prompt template, and the world and the
labelers of the sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections

from alignjax.data import templates
from alignjax.data.templates import Template
from alignjax.models import hub


class Text(NamedTuple):
  """What turns text into tokens and back.

  Attributes:
    template: turns prompts and responses into token ids and back.
    ids: the ids that have a token, in order.
    tokenizer: that of transformers; None in the sandbox, whose words are its tokens.
    world, labelers: those of the sandbox; None elsewhere.
  """

  template: Template
  ids: Sequence[int]
  tokenizer: Any = None
  world: Any = None
  labelers: Any = None

  @property
  def vocabulary(self) -> int:
    """One more than the largest id of a token. The model's vocabulary may be larger."""
    return self.ids[-1] + 1


def of_config(config: ml_collections.ConfigDict) -> Text:
  """The Text of config.data.tokenizer, data.template and world."""
  if config.data.tokenizer == 'sandbox:':
    from alignjax import sandbox

    template = templates.of_words(
      sandbox.encode, sandbox.decode, sandbox.EOS_ID, sandbox.PAD_ID, sandbox.NEWLINE
    )
    world, labelers = sandbox.of_entries(config.world)
    return Text(
      template=template,
      ids=range(len(sandbox.VOCAB)),
      tokenizer=None,
      world=world,
      labelers=labelers,
    )
  tokenizer = load_tokenizer(config.data.tokenizer)
  template = templates.make(
    tokenizer, config.data.template or 'plain', config.data.get('template_date')
  )
  return Text(template, token_ids(tokenizer), tokenizer)


def load_tokenizer(name: str) -> Any:
  """The tokenizer of 'hf:FOLDER_OR_HUB_NAME'; the prefix may be left out."""
  from transformers import AutoTokenizer

  folder = hub.folder_of(name.removeprefix('hf:'))
  hub.verify(folder, weights=False)
  try:
    return AutoTokenizer.from_pretrained(folder)
  except Exception as error:  # noqa: BLE001 damaged files raise what their readers raise, a bare Exception of tokenizers included
    raise ValueError(
      f'data.tokenizer={name!r}: no tokenizer can be read from {folder} '
      f'({type(error).__name__}: {error}).'
    ) from error


def token_ids(tokenizer: Any) -> list[int]:
  """The ids that have a token, in order. They are not 0 .. len(tokenizer) - 1, because added tokens
  may leave holes before them."""
  return sorted(set(tokenizer.get_vocab().values()))
