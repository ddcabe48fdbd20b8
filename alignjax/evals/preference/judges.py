"""The judges, which decide which response is better. --judge is one of

rm:MODEL           a reward model, given by the folder of a finished stage, hf:FOLDER_OR_HUB_NAME,
                   or peft:FOLDER_OR_HUB_NAME for adapters of one; the response with the higher
                   score wins
sandbox            the sandbox's labelers, training and held-out, by their exact probabilities
openai:MODEL       a model behind an OpenAI-compatible endpoint (openai_judge.py)
file:PATH          people (judgments.py)
module:function    a function of your own, (pairs, *, keep) -> for each pair the probability that a
                   is better, or None; pairs are verdicts.Pair, and keep is a folder for what must
                   survive an interruption
"""

from __future__ import annotations

import difflib
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alignjax import plugins
from alignjax.evals.preference.verdicts import Judged, Pair, Rating, Verdict
from alignjax.inference import bulk
from alignjax.inference.loading import Model
from alignjax.runtime import fingerprints, journal, metrics

FORMS = 'rm:MODEL, sandbox, openai:MODEL, file:PATH, module:function'


def split(spec: str) -> tuple[str, str]:
  """Splits the name of a judge: 'rm:MODEL' becomes ('rm', MODEL) and 'module:function' becomes
  ('own', spec). Anything else is an error."""
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
  model: Model,
  fingerprint: str,
  folder: pathlib.Path,
  judge: str,
  rows: int = 32,
) -> Judged:
  """Judges pairs by a reward model: the response with the higher score wins, and equal scores are a
  tie.

  Responses are read with the reward model's own tokenizer and template. A response that was cut at
  the length limit has no end token, as in training. A response that is too long for the reward
  model's context gets no verdict. The scores are stored in FOLDER under the text that was scored.

  Args:
    pairs: the pairs of responses to compare.
    model: a loading.Model with a scalar head.
    fingerprint: the value of loading.fingerprint for the model.
    folder: the folder that stores the scores.
    judge: the name of the judge, in the verdicts and in messages.
    rows: the largest number of rows in a batch.
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
    print(f'{judge}: {len(before)} scores were already in {path}', flush=True)
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
    notes=[f'{judge}: {long} responses exceed its {model.cfg.max_length} tokens'] if long else [],
  )


def _name(pair: Pair, response: Any) -> str:
  return hashlib.sha256(
    json.dumps([pair.record['prompt'], response.text, response.ended]).encode()
  ).hexdigest()[:24]


def sandbox(pairs: Sequence[Pair], entries: Mapping[str, Any]) -> Judged:
  """Returns the exact probability that a randomly drawn labeler of each pool prefers a. The two
  pools are two judges. Two flags of the paper's Table 3 are also returned, because the sandbox
  knows their true values. entries: those of `world` in the config of the policies."""
  from alignjax import sandbox as box

  world, labelers = box.of_entries(entries)
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
  """Runs a judge of your own, as described at the top of this file. Its folder depends on the
  fingerprint of its source, so a changed judge starts anew."""
  keep = folder / f'{judge.replace(":", ".")}-{fingerprints.of_function(function, judge)}'
  if keep.exists() and any(keep.iterdir()):
    print(f'{judge}: goes on from {keep}', flush=True)
  keep.mkdir(parents=True, exist_ok=True)
  found = list(function(pairs, keep=keep))
  if len(found) != len(pairs):
    raise ValueError(f'--judge={judge} returned {len(found)} probabilities for {len(pairs)} pairs.')
  for pair, p in zip(pairs, found, strict=True):
    good = p is None or isinstance(p, (int, float, np.number)) and 0 <= p <= 1
    if not good:
      raise ValueError(
        f'--judge={judge}: {p!r} for the prompt {pair.record["prompt_id"]!r} is not a probability.'
      )
  return Judged(
    [
      Verdict(pair.record['prompt_id'], pair.a, pair.b, None if p is None else float(p), judge)
      for pair, p in zip(pairs, found, strict=True)
    ]
  )
