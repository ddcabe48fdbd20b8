"""Comparisons for the reward model and for losses of a policy, which are read from a file or made
as the paper made them (sampled_comparisons.py), and how they are divided into the updates of a
stage, each of the same number of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from alignjax.data import batches
from alignjax.data.rows import Chosen
from alignjax.setup import encoded
from alignjax.setup.entries import check_counts, check_epochs
from alignjax.setup.objects import Setup, seed_of, stage_dir
from alignjax.setup.records import of_sandbox, say
from alignjax.stages import abstract
from alignjax.stages.sampled_comparisons import (
  Comparisons,
  made_from,
  read_or_make,
  sampled,
  with_noise,
)
from alignjax.types import ComparisonBatch


class _Field(Sequence):
  """A field of comparisons, each of which is read when it is asked for.

  Args:
    rows: the comparisons.
    get: a function of a row's number that returns its value.
  """

  def __init__(self, rows: Chosen, get: Callable[[int], Any]):
    self.rows, self._get = rows, get

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, i: int) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
    return self._get(range(len(self))[i])


def training(setup: Setup, name: str) -> Comparisons:
  """The comparisons to train on. Sampled ones are ranked by labelers of the training pool, one for
  each prompt. Prompts whose responses all tie carry no information and are left out, with a notice;
  it is an error if no other prompt is left."""
  cfg = setup.config.stages[name]
  if of_sandbox(setup, 'comparisons'):
    made = read_or_make(
      stage_dir(setup, name) / 'comparisons.json',
      made_from(setup, name),
      lambda: with_noise(setup, name, sampled(setup, name, cfg.policies, cfg.prompts, 'train')),
    )
    count, ranked = len(made.prompts), without_ties(made)
  else:
    made = encoded.chosen(setup, 'comparisons', cfg.prompts)
    count, ranked = len(made), _without_ties(made, max(cfg.k_buckets))
  if tied := count - len(ranked.prompts):
    say(
      f'{name}: {tied} of {count} comparisons rank all of their responses the same and are left out'
    )
  if not ranked.prompts:
    raise ValueError(
      f'stages.{name}: none of the {count} comparisons of data.comparisons='
      f'{setup.config.data.comparisons!r} ranks a response above another; there is nothing to '
      f'learn from ties.'
    )
  return ranked


def evaluation(setup: Setup, name: str) -> Comparisons:
  """Comparisons on at most `evaluation_prompts` prompts (None: all) that no stage is trained on.

  In the sandbox the responses are those of the first policy, with their features, so that both
  pools of labelers rank the same ones. Of a file they are the held-out records (setup/records.py),
  without those whose responses all tie.
  """
  cfg = setup.config.stages[name]
  if of_sandbox(setup, 'comparisons'):
    return sampled(setup, name, cfg.policies[:1], cfg.evaluation_prompts, 'test')
  found = encoded.drawn(setup, 'comparisons', None, 'test')
  names = [json.dumps(found.rows.text(i)[1], sort_keys=True) for i in found.numbers.tolist()]
  chosen = set(
    batches.draw(
      sorted(set(names)), cfg.evaluation_prompts, (setup.config.seed, seed_of(f'{name}/held out'))
    )
  )
  own = found.numbers[np.array([prompt in chosen for prompt in names], bool)]
  rows = _without_ties(encoded.within(setup, 'comparisons', found._replace(numbers=own), none=True))
  made = Comparisons(list(rows.prompts), list(rows.responses), list(rows.ranks))
  if not made.prompts and cfg.evaluation_prompts != 0:
    say(
      f'{name}: no comparison without ties and within the lengths is held out (data.heldout.share='
      f'{setup.config.data.heldout.share}), so its accuracy is not measured'
    )
  return made


def _without_ties(rows: Chosen, most: int | None = None) -> Comparisons:
  """The rows that rank at least one response above another, as comparisons. most: the most
  responses that a row may have."""
  sizes = rows.sizes()
  for i in np.flatnonzero(sizes.stay > most)[:1].tolist() if most is not None else ():
    raise ValueError(
      f'{rows.rows.text(int(rows.numbers[i]))[0]}: {sizes.stay[i]} responses, more than the {most} '
      "that the stage's k_buckets leave room for; add that number to them, or leave responses out."
    )
  rows = rows.take(~sizes.tied)
  return Comparisons(
    _Field(rows, lambda i: rows[i][0]), _Field(rows, lambda i: rows[i][1]), _Field(rows, rows.ranks)
  )


def without_ties(data: Comparisons) -> Comparisons:
  """The comparisons that rank at least one response above another."""
  keep = [i for i, ranks in enumerate(data.ranks) if len(set(ranks)) > 1]
  return Comparisons(*(field if field is None else [field[i] for i in keep] for field in data))


def sizes_of(data: Comparisons) -> tuple[np.ndarray, np.ndarray]:
  """Of each comparison, the number of responses, and the tokens of its prompt and its longest
  response."""
  if isinstance(data.prompts, _Field):
    sizes = data.prompts.rows.sizes()
    return sizes.stay, sizes.longest
  longest = [
    len(p) + max(map(len, responses))
    for p, responses in zip(data.prompts, data.responses, strict=True)
  ]
  return np.array([len(r) for r in data.ranks], np.int64), np.array(longest, np.int64)


def pairs(data: Comparisons) -> int:
  """The number of pairs of responses to the same prompt."""
  counts, _ = sizes_of(data)
  return int((counts * (counts - 1) // 2).sum())


class Updates(NamedTuple):
  """The order in which a stage trains on its comparisons.

  Attributes:
    order: of each update, its shape (responses, tokens) and the numbers of its prompts.
    prompts: the prompts of every update but the last ones of a shape, which may have fewer.
    rows: the prompts of a batch: an update is filled with rows of weight 0, so that it can be
      divided over the devices and microbatches.
  """

  order: list[tuple[tuple[int, int], np.ndarray]]
  prompts: int
  rows: int


def updates(setup: Setup, name: str, data: Comparisons) -> Updates:
  """The updates of a stage: every prompt once per epoch, and prompts with similar K and length
  together, so that there is little padding."""
  cfg, length = setup.config.stages[name], setup.length
  counts, longest = sizes_of(data)
  k_of = _bucket(counts, cfg.k_buckets, f'stages.{name}.k_buckets')
  t_of = _bucket(
    longest, [t for t in cfg.row_lengths if t < length] + [length], f'stages.{name}.row_lengths'
  )
  kinds = np.stack([k_of, t_of], axis=1)
  size = prompts_per_update(setup, name, max(k_of))
  rows = filled(setup, name, size)
  if rows > size:
    say(
      f'{name}: an update of {size} prompts is filled to {rows}, for {setup.sharder.batch_shards} '
      f'devices that share a batch and stages.{name}.microbatches={cfg.microbatches}'
    )
  seed = (setup.config.seed, seed_of(name))
  return Updates(
    [
      one
      for epoch in range(int(cfg.epochs))
      for one in batches.bucketed(kinds, size, (*seed, epoch))
    ],
    size,
    rows,
  )


def prompts_per_update(setup: Setup, name: str, k: int) -> int:
  """The prompts of an update. It is the same number for all, because Eq. 1 is a mean over prompts
  (the paper's batches are 64 prompts of 4 to 9 responses, C.2). Prompts with the most responses, k,
  come to about responses_per_batch. Devices and microbatches do not count, so that a run goes on
  with the same updates on another mesh."""
  return max(1, round(setup.config.stages[name].responses_per_batch / k))


def filled(setup: Setup, name: str, prompts: int) -> int:
  """The rows of a batch for so many prompts: equally many on every device and in every
  microbatch."""
  parts = setup.sharder.batch_shards * setup.config.stages[name].microbatches
  return -(-prompts // parts) * parts


def batch(setup: Setup, data: Comparisons, plan: Updates, step: int, encode_rows: Callable) -> Any:
  """The batch of an update, on its devices. encode_rows: encode.comparisons or
  encode.preferences."""
  (k, t), rows = plan.order[step]

  def pick(field):
    return [field[j] for j in rows]

  made = encode_rows(
    pick(data.prompts), pick(data.responses), pick(data.ranks), t, k, setup.text.template.pad
  )
  made = batches.fill(made, plan.rows).replace(prompts=plan.prompts)
  return setup.sharder.put(batches.take(made, setup.sharder.local(np.arange(plan.rows))))


def work(plan: Updates, step: int, of: Callable[[int, int], dict[str, float]]) -> dict[str, float]:
  """of(rows, tokens of a row) for an update, for the metrics of throughput. Rows that only fill a
  batch do not count."""
  (k, t), prompts = plan.order[step]
  return of(len(prompts) * k, t)


def abstract_batch(setup: Setup, name: str) -> ComparisonBatch:
  """A batch of the largest K as shapes."""
  k = max(setup.config.stages[name].k_buckets)
  prompts = prompts_per_update(setup, name, k)
  rows = filled(setup, name, prompts)

  def array(shape, dtype):
    return abstract.array(setup, (rows, *shape), dtype)

  return ComparisonBatch(
    tokens=array((k, setup.length), jnp.int32),
    mask=array((k, setup.length), bool),
    ranks=array((k,), jnp.int32),
    weights=array((), jnp.float32),
    prompts=prompts,
  )


def check(setup: Setup, name: str) -> None:
  """Raises ValueError for wrong entries that decide which comparisons a stage has, and in which
  updates."""
  cfg, where = setup.config.stages[name], f'stages.{name}'
  check_epochs(cfg.epochs, where, whole=True)
  check_counts(setup, where, 'comparisons', prompts=cfg.prompts)
  check_counts(setup, where, 'comparisons', 0, evaluation_prompts=cfg.get('evaluation_prompts', 0))
  if not cfg.k_buckets or min(cfg.k_buckets) < 2:
    raise ValueError(
      f'{where}.k_buckets={tuple(cfg.k_buckets)} must name numbers of responses, each 2 or more.'
    )
  most = prompts_per_update(setup, name, min(cfg.k_buckets))
  if not 1 <= cfg.microbatches <= most:
    raise ValueError(
      f'{where}.microbatches={cfg.microbatches} cuts an update of {where}.responses_per_batch='
      f'{cfg.responses_per_batch} into parts of no prompt: lower microbatches, or raise '
      f'responses_per_batch.'
    )
  if of_sandbox(setup, 'comparisons') and not of_sandbox(setup, 'prompts'):
    raise ValueError(
      f"{where}: data.comparisons='sandbox:' ranks responses to the sandbox's prompts, but "
      f'data.prompts={setup.config.data.prompts!r}. Name a file of comparisons, or set '
      f"data.prompts='sandbox:'."
    )
  if of_sandbox(setup, 'comparisons') and not 2 <= cfg.responses[0] <= cfg.responses[1] <= max(
    cfg.k_buckets
  ):
    raise ValueError(
      f'{where}.responses={cfg.responses} must be a range from 2 up to k_buckets={cfg.k_buckets}.'
    )
  if of_sandbox(setup, 'comparisons'):
    _check_policies(cfg.policies, f'{where}.policies')
  elif cfg.get('label_noise'):
    raise ValueError(
      f"{where}.label_noise={cfg.label_noise} is for the sandbox's labelers, but data.comparisons="
      f'{setup.config.data.comparisons!r} has rankings of its own: set {where}.label_noise=0.'
    )


def _check_policies(policies: Any, where: str) -> None:
  """Raises ValueError for policies that no response can be sampled from."""
  if not policies:
    raise ValueError(f'{where} is empty: name a policy whose responses are to be ranked.')
  for i, policy in enumerate(policies):
    here = f'{where}[{i}]'
    if set(policy) != {'init', 'temperature', 'share'}:
      raise ValueError(f'{here}={dict(policy)} must have init, temperature and share.')
    for entry in ('temperature', 'share'):
      value = policy[entry]
      if not isinstance(value, (int, float)) or not 0 <= value < float('inf'):
        raise ValueError(f'{here}.{entry}={value!r} must be a number, 0 or more.')
  if not sum(policy['share'] for policy in policies):
    raise ValueError(f'{where}: the shares add up to 0.')


def _bucket(values: np.ndarray, edges, key: str) -> np.ndarray:
  """The smallest edge that is at least each value."""
  edges = np.asarray(sorted(edges))
  if values.max() > edges[-1]:
    raise ValueError(f'{key}={edges.tolist()}: the data has {values.max()}.')
  return edges[np.searchsorted(edges, values)]
