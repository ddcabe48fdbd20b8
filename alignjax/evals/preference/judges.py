"""Who says which response is better. --judge is one of

rm:MODEL           a reward model, a finished stage's folder or hf:FOLDER_OR_HUB_NAME; the higher score wins
sandbox            the sandbox's labelers, training and held-out, by their exact probabilities
openai:MODEL       a model behind an OpenAI-compatible endpoint (openai_judge.py)
file:PATH          people (judgments.py)
module:function    one's own: (pairs, *, keep) -> for each pair the probability that a is better, or None; pairs are
                   judgments.Pair, keep is a folder for what must survive an interruption
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from alignjax import plugins
from alignjax.evals.preference.judgments import Judged, Pair, Rating, Verdict
from alignjax.inference import bulk
from alignjax.runtime import fingerprints, journal, metrics

FORMS = 'rm:MODEL, sandbox, openai:MODEL, file:PATH, module:function'


def split(spec: str) -> tuple[str, str]:
  """'rm:MODEL' -> ('rm', MODEL); 'module:function' -> ('own', spec). Anything else is an error."""
  kind, _, rest = spec.partition(':')
  if kind == 'sandbox' and not rest:
    return kind, ''
  if kind in ('rm', 'openai', 'file') and rest:
    return kind, rest
  try:
    plugins.find(spec, '--judge')
  except ValueError as error:
    near = difflib.get_close_matches(kind, ('rm', 'sandbox', 'openai', 'file'), 1, cutoff=0.5)
    raise ValueError(
      f'{error} A judge is {FORMS}.' + (f' Did you mean {near[0]!r}?' if near else '')
    ) from None
  return 'own', spec


def reward_model(
  pairs: Sequence[Pair],
  model: Any,
  fingerprint: str,
  folder: pathlib.Path,
  judge: str,
  rows: int = 32,
) -> Judged:
  """The response with the higher score wins, equal scores tie.

  Responses are read with the reward model's own tokenizer and template; one that was cut at the
  limit of tokens has no end token, as in training. Those too long for its context have no verdict.
  Scores are kept in FOLDER by the text that was scored.

  Args:
    model: loading.Model with a scalar head. fingerprint: loading.fingerprint of it. rows: in
      a batch at most.
  """
  code = fingerprints.of_function(reward_model)
  path = folder / f'rm-{fingerprints.of_value([fingerprint, code])}.jsonl'
  scores = {row['response']: row['score'] for row in journal.read(path)}
  wanted: dict[str, list[int]] = {}
  before = set()
  for pair in pairs:
    for response in (pair.response_a, pair.response_b):
      name = _name(pair, response)
      if name in scores:
        before.add(name)
      elif name not in wanted:
        wanted[name] = sum(
          model.template.row(pair.record['prompt'], response.text, response.ended), []
        )
  if before:
    print(f'{judge}: {len(before)} scores are kept from before, in {path}', flush=True)
  names = [name for name, tokens in wanted.items() if len(tokens) <= model.cfg.max_length]
  made: dict[str, float] = {}
  score = bulk.make_scorer(
    model.nets, model.sharder, length=model.cfg.max_length, pad=model.template.pad, rows=rows
  )
  with metrics.Progress(len(names), name=f'{judge}: scores') as progress:

    def done(i, value):
      made[names[i]] = float(value)
      journal.append(path, [dict(response=names[i], score=float(value))])
      progress.update(len(made), {'scores/done': len(made)})

    score(model.params, [wanted[name] for name in names], done)
  scores |= made
  verdicts = []
  for pair in pairs:
    a, b = (scores.get(_name(pair, r)) for r in (pair.response_a, pair.response_b))
    p = None if a is None or b is None else 0.5 if a == b else float(a > b)
    verdicts.append(Verdict(pair.record['prompt_id'], pair.a, pair.b, p, judge))
  long = len(wanted) - len(names)
  return Judged(
    verdicts,
    notes=[f'{judge}: {long} responses are over its {model.cfg.max_length} tokens'] if long else [],
  )


def _name(pair: Pair, response: Any) -> str:
  return hashlib.sha256(
    json.dumps([pair.record['prompt'], response.text, response.ended]).encode()
  ).hexdigest()[:24]


def sandbox(pairs: Sequence[Pair], world_seed: int) -> Judged:
  """The exact probability that a labeler of each pool, drawn at random, prefers a, with the pools
  as two judges; and, as the world's truth knows them, two of the flags of the paper's Table 3."""
  from alignjax import sandbox as box

  world, labelers = box.World(world_seed), box.Labelers(world_seed)
  seen: dict[tuple[str, str], Any] = {}
  for pair in pairs:
    if 'meta' not in pair.record:
      raise ValueError(
        f'--judge=sandbox: the prompt {pair.record["prompt_id"]!r} has no `meta`, by which its '
        f'labelers judge; '
        'use --prompts=sandbox:.'
      )
    for policy, response in ((pair.a, pair.response_a), (pair.b, pair.response_b)):
      at = pair.record['prompt_id'], policy
      if at not in seen:
        seen[at] = box.judge(world, pair.record['meta'], response.text, response.ended)
  sides = [
    labelers.features([seen[p.record['prompt_id'], getattr(p, side)] for p in pairs])
    for side in 'ab'
  ]
  verdicts = []
  for pool, ids in (('training', labelers.train), ('held-out', labelers.heldout)):
    for pair, p in zip(pairs, labelers.preference(*sides, ids).mean(-1), strict=True):
      verdicts.append(
        Verdict(pair.record['prompt_id'], pair.a, pair.b, float(p), f'sandbox, {pool} labelers')
      )
  ratings = [
    Rating(
      name,
      policy,
      'sandbox',
      flags=dict(fails_instruction=j.follow < 1, hallucination=j.false_claims > 0),
    )
    for (name, policy), j in seen.items()
  ]
  return Judged(verdicts, ratings)


def own(pairs: Sequence[Pair], function: Callable, folder: pathlib.Path, judge: str) -> Judged:
  """A judge of one's own, see the top of this file. What it keeps is kept under its source:
  changed, it begins anew."""
  keep = folder / f'{judge.replace(":", ".")}-{fingerprints.of_function(function, judge)}'
  if keep.exists() and any(keep.iterdir()):
    print(f'{judge}: goes on from {keep}', flush=True)
  keep.mkdir(parents=True, exist_ok=True)
  found = list(function(pairs, keep=keep))
  if len(found) != len(pairs):
    raise ValueError(f'--judge={judge}: {len(found)} probabilities for {len(pairs)} pairs.')
  for pair, p in zip(pairs, found, strict=True):
    good = p is None or isinstance(p, (int, float, np.number)) and math.isfinite(p) and 0 <= p <= 1
    if not good:
      raise ValueError(
        f'--judge={judge}: {p!r} for the prompt {pair.record["prompt_id"]!r} is no probability.'
      )
  return Judged(
    [
      Verdict(pair.record['prompt_id'], pair.a, pair.b, None if p is None else float(p), judge)
      for pair, p in zip(pairs, found, strict=True)
    ]
  )
