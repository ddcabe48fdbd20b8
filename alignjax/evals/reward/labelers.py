"""Held-out labelers: does a reward model predict people whose votes it never saw as well as those
it learnt from (paper 4.1, E.2)?

The pure parts: groups of labelers, splits, rankings from votes, accuracy, agreement.
alignjax/commands/heldout_labelers.py trains the reward models. Records are those of
data/sources.py: {"prompt", "responses", "ranks", "labeler_id"}.
"""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax.evals.stats import interval

Record = Mapping[str, Any]
Scores = Callable[[str, str], float]  # (prompt's key, response) -> score


class Fold(NamedTuple):
  """train: records to learn from. seen, heldout: records on the fold's held-out prompts, by
  labelers of the training groups and by those of the held-out group."""

  train: list[Record]
  seen: list[Record]
  heldout: list[Record]


class Vote(NamedTuple):
  """One labeler's order of two responses, first < second as texts; better: 1 where the first is
  preferred, else -1."""

  prompt: str
  first: str
  second: str
  labeler: str
  better: int


def prompt_key(record: Record) -> str:
  return json.dumps(record['prompt'], sort_keys=True)


def labeler(record: Record) -> str | None:
  """Who voted, by name; None where nobody is named. Number 0 is a person like any other, and 7 is
  the person '7'."""
  return None if record.get('labeler_id') in (None, '') else str(record['labeler_id'])


def groups(records: Sequence[Record], *, folds: int, min_votes: int, seed: int) -> list[list[str]]:
  """Labelers with at least min_votes records, dealt to `folds` groups by the seed alone."""
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
  """Fold number `fold` holds out a group of labelers and, of the prompts, dealt by the seed into as
  many blocks, one block.

  Both pools are measured on the same prompts, which no record of `train` has; over all folds every
  prompt is measured once. Records of labelers in no group are left out.
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
  """Votes on pairs as rankings of up to k responses: for data where many people judged many pairs
  of a prompt's responses.

  In each round a prompt's responses are shuffled and cut into sets of k or fewer; a set is ranked
  by the mean, over the others in it that a response was compared with, of the share of votes that
  it won (a tie is half a vote). k = 2 is the majority of each drawn pair. What it is for: as
  independent pairs, each response would pass through the model, and be trained on, once a vote (the
  paper's footnote 5: such an epoch overfits); as rankings, once a round. What it loses: by how
  much, and who.
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
        order = sorted(set(won.values()), reverse=True)
        if len(order) > 1:
          out.append(
            dict(prompt=prompt, responses=list(won), ranks=[order.index(w) for w in won.values()])
          )
  return out


def votes(records: Sequence[Record]) -> list[Vote]:
  """All pairs of all records without a tie."""
  out = []
  for r in records:
    key = prompt_key(r)
    for (a, i), (b, j) in itertools.combinations(zip(r['responses'], r['ranks'], strict=True), 2):
      if i != j and a != b:
        first, second, better = (a, b, i < j) if a < b else (b, a, j < i)
        out.append(Vote(key, first, second, str(r['labeler_id']), 1 if better else -1))
  return out


def hits(cast: Sequence[Vote], score: Scores) -> np.ndarray:
  """f64[votes]: 1 where the score orders the two as the labeler did, 0 where not, 0.5 where it
  scores both the same."""
  return np.array(
    [
      0.5 + 0.5 * v.better * np.sign(score(v.prompt, v.first) - score(v.prompt, v.second))
      for v in cast
    ],
    np.float64,
  )


def longer(prompt: str, response: str) -> float:
  """The trivial rule beside a reward model: more characters are better."""
  del prompt
  return float(len(response))


def agreement(
  one: Sequence[Vote], other: Sequence[Vote] | None = None
) -> tuple[np.ndarray, list[str]]:
  """Whether two labelers who ordered the same pair of responses did so alike: (f64[pairs of votes],
  prompt of each).

  other None: every two of `one`; else each of `one` with each of `other`. How well one labeler
  predicts another: what an RM is compared with, though no strict ceiling, for one that learns from
  many votes may predict a vote better than a single other vote does.
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
  """A figure over folds and seeds.

  Args:
    values: [fold][seed] of f64[votes of the fold]; prompts: [fold] of the votes' prompts.

  Returns:
    The figure of the votes, each averaged over the seeds, with an interval by prompt; 'models': how
    many reward models, and 'mean_over_models', 'sd_over_models': of their accuracies, each model
    counted once (the paper's "72.4 +- 0.4%"; whether that is a deviation or an error it does not
    say).
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
