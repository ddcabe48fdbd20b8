"""Comparisons for the reward model: read from a file, or made as the paper made them: K responses to each prompt sampled
from the policies so far, ranked by one labeler each. Made ones are kept in the stage's folder, so that a restart reads
them."""

from __future__ import annotations

import json
from typing import NamedTuple

import jax
import numpy as np

from alignjax import files
from alignjax.evals import bulk
from alignjax.stages.setup import Setup, fit, initial_params, records, seed_of, stage_dir


class Comparisons(NamedTuple):
  """Token lists: prompts[i] in their template; responses[i][j] with their end token, where they have one; ranks[i][j],
  0 best. features f[N_i,F] of each response where the sandbox's judge made the ranking, else None."""
  prompts: list[list[int]]
  responses: list[list[list[int]]]
  ranks: list[list[int]]
  features: list | None = None


def training(setup: Setup, name: str) -> Comparisons:
  """Ranked by the labelers of the training pool, one labeler a prompt."""
  source = setup.config.data.comparisons
  if source == 'sandbox:':
    cfg = setup.config.stages[name]
    return _kept(stage_dir(setup, name) / 'comparisons.json',
                 lambda: _sampled(setup, name, cfg.policies, cfg.prompts, 'train'))
  return _read(setup, name, held_out=False)


def evaluation(setup: Setup, name: str) -> Comparisons:
  """Held-out prompts. Of the sandbox: with responses of the first policy, and features, so that both pools of labelers rank
  the same ones. Of a file: `evaluation_prompts` of its prompts, drawn by the seed, which training leaves out."""
  cfg = setup.config.stages[name]
  if setup.config.data.comparisons != 'sandbox:':
    return _read(setup, name, held_out=True)
  return _sampled(setup, name, cfg.policies[:1], cfg.evaluation_prompts, 'test')


def _read(setup: Setup, name: str, held_out: bool) -> Comparisons:
  """Comparisons of data.comparisons, split by prompt: one prompt's comparisons are all on one side. `prompts` of them, a random
  choice (None: all), to train on; of the held-out prompts all."""
  cfg = setup.config.stages[name]
  rows = records(setup, 'comparisons', None)
  names = [json.dumps(r['prompt'], sort_keys=True) for r in rows]
  distinct = sorted(set(names))
  rng = np.random.default_rng([setup.config.seed, seed_of(f'{name}/held out')])
  order = rng.permutation(len(distinct))
  if cfg.evaluation_prompts >= len(distinct):
    raise ValueError(f'stages.{name}.evaluation_prompts={cfg.evaluation_prompts} of {len(distinct)} distinct prompts would '
                     'leave none to train on.')
  out = {distinct[i] for i in order[:cfg.evaluation_prompts]}
  rows = [r for r, prompt in zip(rows, names, strict=True) if (prompt in out) == held_out]
  if not rows:
    return Comparisons([], [], [])
  if cfg.prompts is not None and not held_out:
    rows = [rows[i] for i in np.sort(rng.permutation(len(rows))[:cfg.prompts])]
  tokens = [(setup.template.prompt(r['prompt']), [setup.template.response(x) for x in r['responses']]) for r in rows]
  fitted = fit(setup, 'comparisons', tokens)
  return Comparisons([prompt for prompt, _ in fitted.rows], [responses for _, responses in fitted.rows],
                     [[rows[i]['ranks'][j] for j in kept] for i, kept in zip(fitted.index, fitted.kept, strict=True)])


def _sampled(setup: Setup, name: str, policies, count: int, split: str) -> Comparisons:
  """K responses to each prompt, each from a policy drawn by its share, ranked by a labeler of the training pool."""
  from alignjax import sandbox
  cfg = setup.config.stages[name]
  rng = np.random.default_rng([setup.config.seed, seed_of(f'{name}/{split}')])
  rows = records(setup, 'prompts', count, split)
  prompts = [setup.template.prompt(r['prompt']) for r in rows]
  k = rng.integers(cfg.responses[0], cfg.responses[1] + 1, count)
  owner = np.repeat(np.arange(count), k)
  shares = np.array([p['share'] for p in policies], float)
  drawn = rng.choice(len(policies), len(owner), p=shares / shares.sum())
  sample = bulk.make_sampler(setup.nets, setup.sharder, prompt_length=setup.prompt_length,
                             max_tokens=setup.response_length, stop_ids=(setup.template.end,), pad=setup.template.pad)
  responses: list = [None] * len(owner)
  loaded = {}
  for i, policy in enumerate(policies):
    chosen = np.flatnonzero(drawn == i)
    if len(chosen) == 0:
      continue
    if policy['init'] not in loaded:
      loaded[policy['init']] = initial_params(setup, policy['init'], 'lm', seed_of(name))
    queries = [prompts[owner[j]] for j in chosen]
    out, _ = sample(loaded[policy['init']], queries, seed_of(f'{setup.config.seed}/{name}/{split}/{i}'),
                    policy['temperature'])
    for j, response in zip(chosen, out, strict=True):
      responses[j] = response
  end = setup.template.end
  judged = []
  for j, response in zip(owner, responses, strict=True):
    ended = response[-1] == end
    text = setup.decode(response[:-1] if ended else response)
    judged.append(sandbox.judge(setup.world, rows[j]['meta'], text, ended))
  features = np.split(setup.labelers.features(judged), np.cumsum(k)[:-1])
  grouped = [list(x) for x in _split(responses, k)]
  labelers = rng.choice(setup.labelers.train, count)
  ranks = [np.asarray(setup.labelers.rank(f, labeler, rng)).tolist()
           for f, labeler in zip(features, labelers, strict=True)]
  return Comparisons(prompts, grouped, ranks, [f.tolist() for f in features])


def _split(items: list, counts: np.ndarray):
  start = 0
  for count in counts:
    yield items[start:start + count]
    start += count


def _kept(path, make) -> Comparisons:
  """Reads `path` if it is there, else makes and writes it: whole or not at all."""
  if path.exists():
    return Comparisons(**json.loads(path.read_text()))
  made = make()._replace(features=None)
  if jax.process_index():
    return made
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write(path, json.dumps(made._asdict()))
  return made
