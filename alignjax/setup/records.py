"""The records of a stage: the sandbox's, or those of a source, drawn by the seed, without what is
held out, within the lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from alignjax.data import batches, encode, hygiene, sources, templates
from alignjax.setup import inputs
from alignjax.setup.objects import Setup, seed_of


def records(setup: Setup, kind: str, count: int | None, split: str = 'train') -> list[dict]:
  """`count` records of data.<kind>: generated where the source is 'sandbox:', else a random choice
  of the source's by the seed (None: all).

  split: 'train' leaves out what is held out, 'test' gives that alone. Of the sandbox these are
  worlds apart; of any other source a prompt is held out by itself and data.heldout
  (data/hygiene.py: held_out), whatever kind of record it stands in, so no stage is trained on a
  prompt that another stage measures on.
  """
  data = setup.config.data
  source, share, seed = data[kind], data.heldout.share, data.heldout.seed
  if not 0 <= share < 1:
    raise ValueError(
      f'data.heldout.share={share} must be from 0 to below 1: the share of prompts that no stage '
      f'is trained on.'
    )
  if source == 'sandbox:':
    from alignjax import sandbox

    make = {
      'pretrain': sandbox.documents,
      'demonstrations': sandbox.demonstrations,
      'prompts': sandbox.prompts,
    }[kind]
    return make(setup.text.world, count, split)
  if kind == 'pretrain':
    opened = open_documents(setup, count)
    return [r for i in range(opened.count) for r in opened.records(i)]
  setup.read.update(inputs.of_data(f'data.{kind}', source, data.mapping[kind]))
  found = sources.read(source, kind, data.mapping[kind])
  made = [r for r in found if hygiene.held_out(r['prompt'], share, seed) == (split == 'test')]
  if not made and split == 'train':
    raise ValueError(
      f'data.heldout.share={share} holds out every prompt of the {len(found)} records of '
      f'data.{kind}; lower it.'
    )
  return batches.draw(made, count, (setup.config.seed, seed_of(kind)))


def open_documents(setup: Setup, count: int | None) -> sources.Source:
  """`count` documents of data.pretrain, a random choice by the seed, to read from by index (None:
  all)."""
  config = setup.config
  if config.data.pretrain == 'sandbox:':
    made = records(setup, 'pretrain', count)
    return sources.Source(len(made), lambda i: [made[i]])
  setup.read.update(
    inputs.of_data('data.pretrain', config.data.pretrain, config.data.mapping.pretrain)
  )
  opened = sources.open_source(config.data.pretrain, 'pretrain', config.data.mapping.pretrain)
  chosen = batches.draw(range(opened.count), count, (config.seed, seed_of('pretrain')))
  return sources.Source(len(chosen), lambda i: opened.records(chosen[i]))


def encoded(
  setup: Setup,
  kind: str,
  found: Sequence[Mapping[str, Any]],
  responses: Callable[[Mapping[str, Any]], Sequence[str]] = lambda record: (),
  none: bool = False,
) -> encode.LimitedRows:
  """Records of data.<kind> as token rows in the template, those within data.prompt_length and
  data.response_length: data.too_long drops the others, cuts them, or is an error.

  responses: record -> its responses as text. none: whether an empty result is allowed. An error
    names the source and the record.
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
  """A line for the person who waits, once and not from every process."""
  if jax.process_index() == 0:
    print(text, flush=True)
