"""Comparisons as the paper made them: K responses to each prompt are sampled from the policies so
far and ranked by one labeler each, here of the sandbox. They are saved in the stage's folder, where
a restart reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from alignjax.inference import bulk
from alignjax.runtime import files, fingerprints
from alignjax.setup import inputs
from alignjax.setup.objects import Setup, seed_of
from alignjax.setup.records import records
from alignjax.setup.weights import initial_params
from alignjax.sharding import sync


class Comparisons(NamedTuple):
  """Ranked responses as token lists.

  Attributes:
    prompts: [i], in their template.
    responses: [i][j], including the end token where there is one.
    ranks: [i][j], 0 is best.
    features: f[N_i,F] of each response where the sandbox's judge made the ranking, else None.
  """

  prompts: Sequence[list[int]]
  responses: Sequence[list[list[int]]]
  ranks: Sequence[list[int]]
  features: list | None = None


def sampled(setup: Setup, name: str, policies, count: int, split: str) -> Comparisons:
  """K responses to each prompt, each from a policy that is drawn by its share, ranked by a labeler
  of the training pool."""
  if not count:
    return Comparisons(prompts=[], responses=[], ranks=[], features=[])
  from alignjax import sandbox

  cfg = setup.config.stages[name]
  rng = np.random.default_rng([setup.config.seed, seed_of(f'{name}/{split}')])
  rows = records(setup, 'prompts', count, split)
  prompts = [setup.text.template.prompt(r['prompt']) for r in rows]
  k = rng.integers(cfg.responses[0], cfg.responses[1] + 1, count)
  owner = np.repeat(np.arange(count), k)
  shares = np.array([p['share'] for p in policies], float)
  drawn = rng.choice(len(policies), len(owner), p=shares / shares.sum())
  sample = make_sampler(setup)
  responses: list = [None] * len(owner)
  loaded = {}
  for i, policy in enumerate(policies):
    chosen = np.flatnonzero(drawn == i)
    if len(chosen) == 0:
      continue
    if policy['init'] not in loaded:
      loaded[policy['init']] = initial_params(setup, policy['init'], 'lm', seed_of(name))
    queries = [prompts[owner[j]] for j in chosen]
    out, _ = sample(
      loaded[policy['init']],
      queries,
      seed_of(f'{setup.config.seed}/{name}/{split}/{i}'),
      policy['temperature'],
    )
    for j, response in zip(chosen, out, strict=True):
      responses[j] = response
  judged = [
    sandbox.judge(setup.text.world, rows[j]['meta'], *setup.text.template.decode_response(response))
    for j, response in zip(owner, responses, strict=True)
  ]
  features = np.split(setup.text.labelers.features(judged), np.cumsum(k)[:-1])
  grouped = [list(x) for x in _split(responses, k)]
  labelers = rng.choice(setup.text.labelers.train, count)
  ranks = [
    np.asarray(setup.text.labelers.rank(f, labeler, rng)).tolist()
    for f, labeler in zip(features, labelers, strict=True)
  ]
  return Comparisons(
    prompts=prompts, responses=grouped, ranks=ranks, features=[f.tolist() for f in features]
  )


def with_noise(setup: Setup, name: str, data: Comparisons) -> Comparisons:
  """Returns the comparisons with the rankings of a share `label_noise` of the prompts replaced by
  random orders."""
  noise = setup.config.stages[name].get('label_noise', 0.0)
  if not noise:
    return data
  rng = np.random.default_rng([setup.config.seed, seed_of(f'{name}/label_noise')])
  ranks = [
    rng.permutation(len(own)).tolist() if random else own
    for own, random in zip(data.ranks, rng.random(len(data.ranks)) < noise, strict=True)
  ]
  return data._replace(ranks=ranks)


def make_sampler(setup: Setup) -> Callable:
  """Returns the sampler of whole sets of prompts (bulk.make_sampler) for a run's own networks and
  lengths."""
  return bulk.make_sampler(
    setup.nets,
    setup.sharder,
    prompt_length=setup.prompt_length,
    max_tokens=setup.response_length,
    stop_ids=setup.text.template.ends,
    pad=setup.text.template.pad,
  )


def _split(items: list, counts: np.ndarray):
  start = 0
  for count in counts:
    yield items[start : start + count]
    start += count


def made_from(setup: Setup, name: str) -> str:
  """The fingerprint of what the sandbox's comparisons are made from: the weights of the policies
  and all that decides their samples."""
  cfg = setup.config.stages[name].to_dict()
  for policy in cfg['policies']:
    setup.read.update(inputs.of_weights(policy['init']))
  weights = {
    spec: inputs.fingerprint(kind, spec, setup.workdir, {})
    for spec, (kind, _) in setup.read.items()
    if spec in {p['init'] for p in cfg['policies']}
  }
  config = setup.config.to_dict()
  return fingerprints.of_value(
    [
      weights,
      [cfg[k] for k in ('policies', 'prompts', 'responses')],
      [config[k] for k in ('seed', 'world', 'data', 'model')],
      name,
      *([cfg['label_noise']] if cfg.get('label_noise') else []),
    ]
  )


def read_or_make(path: files.Folder, key: str, make: Callable[[], Comparisons]) -> Comparisons:
  """Reads `path` if it is undamaged and was made from the same (`key`). Otherwise it makes the
  comparisons and writes them, whole or not at all."""
  if path.exists():
    try:
      saved = json.loads(path.read_bytes())
      reason = ''
      if saved['checksum'] != fingerprints.of_value(saved['comparisons']):
        reason = 'is damaged'
      elif saved['made_from'] != key:
        reason = 'was made from other policies or settings'
      found = Comparisons(**saved['comparisons'])
    except (ValueError, KeyError, TypeError, OSError):
      reason = 'is damaged'
    if not reason:
      return found
    if jax.process_index() == 0:
      print(f'{path} {reason}: the comparisons are made again', flush=True)
    sync(f'{path} read')  # All processes have read it before one writes it.
  made = make()._replace(features=None)
  if jax.process_index() == 0:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = made._asdict()
    files.write(
      path,
      json.dumps(
        {'made_from': key, 'checksum': fingerprints.of_value(content), 'comparisons': content}
      ),
    )
  return made
