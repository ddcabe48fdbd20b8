"""Held-out labelers: does a reward model predict people whose votes it never saw as well as those
that it was trained on (paper 4.1, E.2)?

This module has the pure functions: groups of labelers, splits, rankings from votes, accuracy,
agreement. alignjax/commands/heldout_labelers.py trains the reward models. The records are those of
data/sources.py: {"prompt", "responses", "ranks", "labeler_id"}.
"""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax.data import fields
from alignjax.evals.stats import interval

Record = Mapping[str, Any]
Scores = Callable[[str, str], float]  # (key of the prompt, response) -> score


class Fold(NamedTuple):
  """The records of one cross-validation fold.

  Attributes:
    train: the records to train on.
    seen: records on the fold's held-out prompts by labelers of the training groups.
    heldout: records on the fold's held-out prompts by labelers of the held-out group.
  """

  train: list[Record]
  seen: list[Record]
  heldout: list[Record]


class Vote(NamedTuple):
  """One labeler's order of two responses.

  Attributes:
    prompt: the key of the prompt.
    first: the response that comes first in the order of texts.
    second: the other response.
    labeler: the name of the labeler.
    better: 1 if the first response is preferred, else -1.
  """

  prompt: str
  first: str
  second: str
  labeler: str
  better: int


def prompt_key(record: Record) -> str:
  return json.dumps(record['prompt'], sort_keys=True)


def labeler(record: Record) -> str | None:
  """Returns the name of the labeler who voted, or None if the record names nobody. A number is
  converted to text, and 0 is a valid name."""
  return None if record.get('labeler_id') in (None, '') else str(record['labeler_id'])


def groups(records: Sequence[Record], *, folds: int, min_votes: int, seed: int) -> list[list[str]]:
  """Deals the labelers with at least min_votes records to `folds` groups, by the seed alone."""
  counts = collections.Counter(who for who in map(labeler, records) if who is not None)
  if not counts:
    raise ValueError(
      'no comparison has a labeler_id: held-out labelers need to know who voted. A mapping may '
      'bring it '
      '(data/mappings.py: pandalm, summarize_from_feedback, ukp_convarg).'
    )
  known = sorted(who for who, count in counts.items() if count >= min_votes)
  if folds < 2 or len(known) < folds:
    raise ValueError(
      f'{len(known)} of {len(counts)} labelers have {min_votes} votes or more; {folds} groups '
      f'need at least '
      f'{max(folds, 2)}. Lower --min_votes or --folds (2 at least).'
    )
  order = np.random.default_rng([seed, 1]).permutation(len(known))
  return [sorted(known[i] for i in order[g::folds]) for g in range(folds)]


def split(records: Sequence[Record], groups: Sequence[Sequence[str]], fold: int, seed: int) -> Fold:
  """Returns fold number `fold`, which holds out one group of labelers and one block of prompts. The
  seed deals the prompts to as many blocks as there are groups.

  Both pools are measured on the same prompts, which occur in no record of `train`; over all folds
  every prompt is measured once. Records of labelers that are in no group are left out.
  """
  group = {who: g for g, members in enumerate(groups) for who in members}
  ours = [r for r in records if labeler(r) in group]
  prompts = sorted({prompt_key(r) for r in ours})
  if len(prompts) < len(groups):
    raise ValueError(
      f'{len(prompts)} distinct prompts cannot be held out in {len(groups)} blocks; lower --folds.'
    )
  order = np.random.default_rng([seed, 2]).permutation(len(prompts))
  block = {prompts[i] for i in order[fold :: len(groups)]}
  inside = [r for r in ours if prompt_key(r) in block]
  return Fold(
    [r for r in ours if group[labeler(r)] != fold and prompt_key(r) not in block],
    [r for r in inside if group[labeler(r)] != fold],
    [r for r in inside if group[labeler(r)] == fold],
  )


def rankings(records: Sequence[Record], *, k: int, rounds: int, seed: int) -> list[dict[str, Any]]:
  """Converts votes on pairs to rankings of up to k responses, for data in which many people judged
  many pairs of a prompt's responses.

  In each round a prompt's responses are shuffled and cut into sets of k or fewer. A set is ranked
  by the mean share of votes that a response won (a tie is half a vote), over the other responses of
  the set that it was compared with. With k = 2 the ranking is the majority vote on each drawn pair.

  As independent pairs, each response would pass through the model, and be trained on, once per
  vote, and such an epoch overfits (the paper's footnote 5); as rankings it does so once per round.
  The rankings lose the margins of the votes and who cast them.
  """
  if k < 2 or rounds < 1:
    raise ValueError(
      f'rankings of {k} responses in {rounds} rounds: at least two responses, and one round.'
    )
  rng = np.random.default_rng([seed, 3])
  by_prompt: dict[str, dict] = {}
  for r in records:
    won = by_prompt.setdefault(
      prompt_key(r), dict(prompt=r['prompt'], votes=collections.defaultdict(list))
    )['votes']
    for (a, i), (b, j) in itertools.combinations(zip(r['responses'], r['ranks'], strict=True), 2):
      if a != b:
        won[a, b].append((np.sign(j - i) + 1) / 2)
        won[b, a].append((np.sign(i - j) + 1) / 2)
  shares = [
    (e['prompt'], {pair: float(np.mean(v)) for pair, v in e['votes'].items()})
    for e in by_prompt.values()
    if e['votes']
  ]
  out = []
  for _ in range(rounds):
    for prompt, share in shares:
      texts = sorted({a for a, _ in share})
      for chosen in np.array_split(rng.permutation(len(texts)), -(-len(texts) // k)):
        names = [texts[i] for i in chosen]
        won = {
          a: np.mean([share[a, b] for b in names if (a, b) in share])
          for a in names
          if any((a, b) in share for b in names)
        }
        ranks = fields.dense_ranks(-w for w in won.values())
        if len(set(ranks)) > 1:
          out.append(dict(prompt=prompt, responses=list(won), ranks=ranks))
  return out


def votes(records: Sequence[Record]) -> list[Vote]:
  """Returns all pairs of all records that are not ties."""
  out = []
  for r in records:
    key = prompt_key(r)
    for (a, i), (b, j) in itertools.combinations(zip(r['responses'], r['ranks'], strict=True), 2):
      if i != j and a != b:
        first, second, better = (a, b, i < j) if a < b else (b, a, j < i)
        out.append(Vote(key, first, second, str(r['labeler_id']), 1 if better else -1))
  return out


def hits(cast: Sequence[Vote], score: Scores) -> np.ndarray:
  """Returns f64[votes]: 1 where the score orders the two responses as the labeler did, 0 where it
  does not, and 0.5 where both have the same score."""
  return np.array(
    [
      0.5 + 0.5 * v.better * np.sign(score(v.prompt, v.first) - score(v.prompt, v.second))
      for v in cast
    ],
    np.float64,
  )


def longer(prompt: str, response: str) -> float:
  """A trivial baseline for a reward model: the response with more characters is better."""
  del prompt
  return float(len(response))


def agreement(
  one: Sequence[Vote], other: Sequence[Vote] | None = None
) -> tuple[np.ndarray, list[str]]:
  """Returns whether two labelers who ordered the same pair of responses agreed: (f64[pairs of
  votes], the prompt of each).

  It shows how well one labeler predicts another and is the reference for a reward model, though not
  a strict ceiling, because a model that learns from many votes may predict a vote better than a
  single other vote does.

  Args:
    one: votes.
    other: more votes. Each of `one` is compared with each of `other`; with None, every two votes of
      `one` are compared.
  """

  def of(cast):
    found = collections.defaultdict(list)
    for v in cast:
      found[v.prompt, v.first, v.second].append(v)
    return found

  alike, prompts = [], []
  mine, theirs = of(one), of(other or ())
  for pair, cast in mine.items():
    couples = (
      itertools.combinations(cast, 2)
      if other is None
      else itertools.product(cast, theirs.get(pair, ()))
    )
    for a, b in couples:
      if a.labeler != b.labeler:
        alike.append(float(a.better == b.better))
        prompts.append(pair[0])
  return np.array(alike, np.float64), prompts


def over_models(
  values: Sequence[Sequence[np.ndarray]], prompts: Sequence[Sequence[str]]
) -> dict[str, Any]:
  """Returns a figure over folds and seeds: that of the votes, each averaged over the seeds, with an
  interval by prompt. 'models' is the number of reward models. 'mean_over_models' and
  'sd_over_models' are those of the models' accuracies, with each model counted once (the paper's
  "72.4 +- 0.4%", of which it does not say whether 0.4 is a deviation or an error).

  Args:
    values: [fold][seed] of f64[votes of the fold].
    prompts: [fold] of the prompts of the votes.
  """
  each = np.array([v.mean() for fold in values for v in fold if len(v)])
  figure = interval(
    np.concatenate([np.mean(fold, 0) for fold in values]),
    [p for fold in prompts for p in fold],
    (0, 1),
  )
  return figure | dict(
    models=len(each),
    mean_over_models=float(each.mean()),
    sd_over_models=float(each.std(ddof=1)) if len(each) > 1 else None,
  )
