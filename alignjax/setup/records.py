"""The records of a stage: those of the sandbox, or a random choice from a source, without what is
held out and within the lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from alignjax.data import batches, encode, hygiene, sources, templates
from alignjax.setup import inputs
from alignjax.setup.objects import Setup, seed_of


def records(setup: Setup, kind: str, count: int | None, split: str = 'train') -> list[dict]:
  """`count` records of data.<kind>: generated where the source is 'sandbox:', and otherwise a
  random choice by the seed (None: all).

  Args:
    kind: 'pretrain', 'demonstrations', 'comparisons' or 'prompts'.
    split: 'train' leaves out what is held out, and 'test' returns that alone. In the sandbox the
      two are different worlds. In any other source a prompt is held out by itself and data.heldout
      (data/hygiene.py: held_out), whatever kind of record it is in, so that no stage is trained on
      a prompt that another stage measures on.
  """
  data = setup.config.data
  source, share, seed = data[kind], data.heldout.share, data.heldout.seed
  check_share(setup)
  if of_sandbox(setup, kind):
    from alignjax import sandbox

    make = {
      'pretrain': sandbox.documents,
      'demonstrations': sandbox.demonstrations,
      'prompts': sandbox.prompts,
    }[kind]
    return make(setup.text.world, count, split)
  setup.read.update(inputs.of_data(f'data.{kind}', source, data.mapping[kind]))
  order = (setup.config.seed, seed_of(kind))
  if kind == 'pretrain':  # The choice is among raw records.
    opened = sources.open_source(source, kind, data.mapping[kind])
    numbers = batches.drawn(opened.count, count, order).tolist()
    return [record for i in numbers for record in opened.records(i)]
  found = sources.read(source, kind, data.mapping[kind])
  made = [r for r in found if hygiene.held_out(r['prompt'], share, seed) == (split == 'test')]
  if not made and split == 'train':
    raise none_left(setup, kind, len(found))
  return batches.draw(made, count, order)


def check_share(setup: Setup) -> None:
  """Raises ValueError for a share of held-out prompts that cannot be."""
  share = setup.config.data.heldout.share
  if not 0 <= share < 1:
    raise ValueError(
      f'data.heldout.share={share} must be from 0 to below 1: the share of prompts that no stage '
      f'is trained on.'
    )


def none_left(setup: Setup, kind: str, count: int) -> ValueError:
  """The error of a share that holds out all `count` records."""
  return ValueError(
    f'data.heldout.share={setup.config.data.heldout.share} holds out every prompt of the {count} '
    f'records of data.{kind}; lower it.'
  )


def of_sandbox(setup: Setup, kind: str) -> bool:
  """Returns whether the records of data.<kind> are the sandbox's own. Only of these do its labelers
  know what a response should say: the words of a run (data.tokenizer) may be the sandbox's, and its
  records those of a file.

  Raises:
    ValueError: the records are the sandbox's and the tokenizer is another, which lacks its words.
  """
  own = setup.config.data[kind] == 'sandbox:'
  if own and setup.text.world is None:
    raise ValueError(
      f"data.{kind}='sandbox:' needs data.tokenizer='sandbox:', which is "
      f'{setup.config.data.tokenizer!r}. Name a source of {kind} (docs/data.md), or set the '
      f'tokenizer.'
    )
  return own


def encoded(
  setup: Setup,
  kind: str,
  found: Sequence[Mapping[str, Any]],
  responses: Callable[[Mapping[str, Any]], Sequence[str]] = lambda record: (),
  none: bool = False,
) -> encode.LimitedRows:
  """Records of data.<kind> as token rows in the template. data.too_long says what happens to those
  beyond data.prompt_length and data.response_length: they are dropped, truncated, or an error.

  Args:
    found: the records.
    responses: record -> its responses as text.
    none: whether an empty result is allowed.

  Raises:
    ValueError: with the source and the record.
  """

  def one(record):
    pairs = [setup.text.template.row(record['prompt'], said) for said in responses(record)]
    return setup.text.template.prompt(record['prompt']), [tokens for _, tokens in pairs]

  entry = f'data.{kind}'
  places = [
    sources.place(record, f'{entry}={setup.config.data[kind]!r}, record {i}')
    for i, record in enumerate(found, 1)
  ]
  limited = encode.limit_lengths(
    templates.each(one, found, places),
    setup.prompt_length,
    setup.response_length,
    setup.config.data.too_long,
    entry,
    places,
    none,
  )
  if limited.note:
    say(limited.note)
  return limited


def say(text: str) -> None:
  """Prints a line for the user, once and not from every process."""
  if jax.process_index() == 0:
    print(text, flush=True)
