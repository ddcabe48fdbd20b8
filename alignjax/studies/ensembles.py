"""Are several reward models harder to exploit than one, and what must they differ in?

Coste et al. (2023) and Eisenstein et al. (2023) optimize against the mean, the worst, or the mean
less the variance of several reward models; Ramé et al. (2024a, WARM) average their weights. Here
each reward model has 1,500 rankings, all as the labelers made them or a quarter in random order.
The five members of an ensemble differ in the order of their updates alone (and in their fresh
heads), or also in the responses and labels, or also in the seed of pretraining and fine-tuning. The
gold reward is measured at equal KL: by best of n, and along PPO without a KL penalty.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignjax import train
from alignjax.configs import base
from alignjax.configs.reward_ensemble import average
from alignjax.evals.markdown import table as markdown
from alignjax.evals.stats import ANY, interval, show
from alignjax.inference import loading, samples
from alignjax.runtime import files
from alignjax.setup.objects import make_setup, stage_dir
from alignjax.stages import sampled_comparisons
from alignjax.studies import overoptimization, study
from alignjax.studies.study import Row, Trial

NOISES = {'clean': 'labels as made', 'noisy': '25% random rankings'}
KINDS = {
  'labels': 'responses and labels',
  'order': 'order of updates',
  'pretraining': 'pretraining, responses and labels',
}
MEMBERS = 5
UNCERTAINTY_COEF = 0.5  # between those of Coste et al., 0.1 for PPO and 0.5 for best of n
NAMES = {
  'one': 'one',
  'mean_3': 'mean of 3',
  'mean_5': 'mean of 5',
  'min_5': 'worst of 5',
  'uwo_5': 'mean less variance of 5',
  'warm_3': 'average weights of 3',
  'warm_5': 'average weights of 5',
}
# What PPO is run against; weights of different pretraining cannot be averaged.
POLICIES = {
  'labels': ('one', 'mean_3', 'mean_5', 'uwo_5', 'warm_5'),
  'order': ('mean_5', 'warm_5'),
  'pretraining': ('mean_3', 'mean_5', 'uwo_5'),
}
DISTANCES = (1.0, 2.0, 3.0)  # sqrt(KL) at which policies are compared
NS = (4, 16, 64)
WIDTH = 10  # iterations of the moving means of PPO


def parts(options: argparse.Namespace) -> list[str]:
  return [f'{noise}_{kind}' for noise, kind in itertools.product(NOISES, KINDS)]


def protocol(trial: Trial, part: str) -> dict[str, Any]:
  made = [config_of(trial, part), *(_of_pretraining(trial, part, i) for i in range(2, MEMBERS + 1))]
  configs = [study.deciding(trial, c) for c in made if c is not None]
  return dict(configs=configs, ns=NS, uncertainty_coef=UNCERTAINTY_COEF)


def config_of(trial: Trial, part: str) -> Any:
  """The config of a part: its reward models, their averages, and its policies. The first member is
  the reward model of few prompts of the study of over-optimization, and has that name."""
  noise, kind = part.split('_')
  c = base.get_config('tiny' if trial.tiny else 'default')
  c.seed = trial.seed
  s, first = c.stages, overoptimization.stage_of('few' if noise == 'clean' else 'few_noisy')
  s[first] = _few(s.rm, noise)
  names = [first]
  if kind != 'pretraining':
    names += [f'{first}_{kind}_{i}' for i in range(2, MEMBERS + 1)]
    for name in names[1:]:
      s[name] = s[first].copy_and_resolve_references()
    for count in (3, 5):
      members = [f'stage:{name}' for name in names[:count]]
      s[f'warm_{count}_{part}'] = average(*members, head='scalar')
    specs = [f'stage:{name}' for name in names]
  else:
    others = (_folder(trial, i) / first / 'final' for i in range(2, MEMBERS + 1))
    specs = [f'stage:{first}', *map(str, others)]
  for how in POLICIES[kind]:
    s[f'ppo_{how}_{part}'] = _policy(s.ppo, how, part, specs)
  c.stages_to_run = tuple(f'ppo_{how}_{part}' for how in POLICIES[kind])
  if kind != 'pretraining':
    c.stages_to_run = (*names, f'warm_3_{part}', f'warm_5_{part}', *c.stages_to_run)
  return c


def _few(rm: Any, noise: str) -> Any:
  made = rm.copy_and_resolve_references()
  made.prompts //= 8
  made.label_noise = 0.0 if noise == 'clean' else 0.25
  return made


def _policy(ppo: Any, how: str, part: str, specs: Sequence[str]) -> Any:
  """PPO without a KL penalty against one reward model or several."""
  made = ppo.copy_and_resolve_references()
  made.kl.coef = 0.0
  combine, _, count = how.partition('_')
  reward, *others = specs[: int(count or 1)]
  if combine == 'warm':
    reward, others = f'stage:{how}_{part}', []
  made.init.update(value=specs[0], reward=reward)
  with made.unlocked():
    for number, spec in enumerate(others, 2):
      made.init[f'reward_{number}'] = spec
    if others:
      made.reward = dict(
        fn='alignjax.rewards:ensemble', combine=combine, uncertainty_coef=UNCERTAINTY_COEF
      )
  return made


def _folder(trial: Trial, member: int) -> files.Folder:
  return trial.workdir / f'member-{member}'


def _of_pretraining(trial: Trial, part: str, member: int) -> Any:
  """The config of a member with a pretraining of its own, in the world of the trial, or None."""
  noise, kind = part.split('_')
  if kind != 'pretraining':
    return None
  c = base.get_config('tiny' if trial.tiny else 'default')
  with c.unlocked(), c.ignore_type():
    c.seed = 1000 * member + trial.seed
    c.world = dict(seed=trial.seed)
  s, first = c.stages, overoptimization.stage_of('few' if noise == 'clean' else 'few_noisy')
  s[first] = _few(s.rm, noise)
  # All members rank responses of the policy that is optimized.
  s[first].policies = tuple(
    dict(p, init=str(trial.workdir / p['init'].removeprefix('stage:') / 'final'))
    for p in s.rm.policies
  )
  c.stages_to_run = (first,)
  return c


def run(trial: Trial, part: str) -> list[Row]:
  """Trains the members and the policies of a part and returns their points."""
  noise, kind = part.split('_')
  config = config_of(trial, part)
  first, *others = (name for name in config.stages if name.startswith('rm_few'))
  folders = [trial.workdir / first]
  _train(config, trial.workdir, [first])
  if kind == 'order':
    for name in others:
      same_comparisons(config, trial.workdir, first, name)
  if kind == 'pretraining':
    for member in range(2, MEMBERS + 1):
      train.main(_of_pretraining(trial, part, member), _folder(trial, member))
      folders.append(_folder(trial, member) / first)
  else:
    _train(config, trial.workdir, others)
    folders += [trial.workdir / name for name in others]
  train.main(config, trial.workdir)
  rows = _best_of_n(trial, part, kind, folders)
  for how in POLICIES[kind]:
    points = overoptimization.training(trial.workdir / f'ppo_{how}_{part}')
    rows += [dict(row, reward=how) for row in points]
  return [dict(row, noise=noise, kind=kind) for row in rows]


def _train(config: Any, workdir: files.Folder, stages: Sequence[str]) -> None:
  own = config.copy_and_resolve_references()
  own.stages_to_run = tuple(stages)
  train.main(own, workdir)


def same_comparisons(config: Any, workdir: files.Folder, source: str, name: str) -> None:
  """Gives the stage `name` the comparisons that the finished stage `source` was trained on."""
  setup = make_setup(config, workdir)

  def kept(stage: str, make: Any) -> sampled_comparisons.Comparisons:
    return sampled_comparisons.read_or_make(
      stage_dir(setup, stage) / 'comparisons.json',
      sampled_comparisons.made_from(setup, stage),
      make,
    )

  def missing():
    raise ValueError(f'{stage_dir(setup, source)} has no comparisons.json of this run.')

  stage_dir(setup, name).mkdir(parents=True, exist_ok=True)
  kept(name, lambda: kept(source, missing))


def _best_of_n(trial: Trial, part: str, kind: str, folders: Sequence[files.Folder]) -> list[Row]:
  """The points of best of n. Those of fewer than all members are means over every choice of them,
  as far as that is no more work."""
  prompts, responses, gold = overoptimization.samples_of_sft(trial)
  loaded = [loading.load(str(folder), 'scalar') for folder in folders]
  score = samples.make_rewarder(loaded[0], prompts)
  scores = np.stack([score(model.params, responses) for model in loaded])
  one = {'one': list(scores)} if 'one' in POLICIES[kind] else {}
  combined: dict[str, list[np.ndarray]] = one | {
    'mean_3': [scores[list(c)].mean(0) for c in itertools.combinations(range(MEMBERS), 3)],
    'mean_5': [scores.mean(0)],
    'min_5': [scores.min(0)],
    'uwo_5': [scores.mean(0) - UNCERTAINTY_COEF * scores.var(0)],
  }
  if 'warm_5' in POLICIES[kind]:
    for count in (3, 5):
      model = loading.load(str(trial.workdir / f'warm_{count}_{part}'), 'scalar')
      combined[f'warm_{count}'] = [score(model.params, responses)]
  rows = []
  for how, choices in combined.items():
    for found in zip(*(overoptimization.points(x, gold) for x in choices), strict=True):
      mean = {key: float(np.mean([row[key] for row in found])) for key in ('proxy', 'gold')}
      rows.append(dict(found[0], reward=how, **mean))
  return rows


def gained(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
  """Returns a row for each seed, noise, kind and reward: the gold reward gained by best of n at
  each of NS, and by PPO at each of DISTANCES and at the end."""
  groups: dict[tuple, list[Mapping[str, Any]]] = {}
  for row in rows:
    key = tuple(row[k] for k in ('seed', 'noise', 'kind', 'reward', 'method'))
    groups.setdefault(key, []).append(row)
  made: dict[tuple, Row] = {}
  for (seed, noise, kind, reward, method), own in groups.items():
    out = made.setdefault(
      (seed, noise, kind, reward), dict(seed=seed, noise=noise, kind=kind, reward=reward)
    )
    gold = np.array([row['gold'] for row in own])
    if method == 'best_of_n':
      start = next(row['gold'] for row in own if row['n'] == 1)
      out |= {f'n={row["n"]}': row['gold'] - start for row in own if row['n'] in NS}
      continue
    distance = _moving_mean([row['distance'] for row in own])
    gold = _moving_mean(gold - gold[:3].mean())
    for target in DISTANCES:
      value = study.where_reached(distance.tolist(), gold.tolist(), target)
      if value is not None:
        out[f'd={target:g}'] = value
    out |= {'d at the end': float(distance[-1]), 'at the end': float(gold[-1])}
  return list(made.values())


def _moving_mean(x: Any) -> np.ndarray:
  width = min(WIDTH, len(x))
  return np.convolve(x, np.ones(width) / width, 'valid')


COLUMNS = {
  'best of n': tuple(f'n={n}' for n in NS),
  'PPO': (*(f'd={d:g}' for d in DISTANCES), 'at the end', 'd at the end'),
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The gold reward that is gained, and its difference from one reward model, paired by seed."""
  found = gained(rows)
  lines = [
    f'The gold reward that is gained, means over {study.seeds_of(rows)}, with 95% intervals.'
  ]
  for method, columns in COLUMNS.items():
    columns = [key for key in columns if any(key in row for row in found)]
    if not columns:
      continue
    last = 'at the end' if method == 'PPO' else columns[-1]
    one = {(r['seed'], r['noise']): r[last] for r in found if r['reward'] == 'one' and last in r}
    body = []
    for noise, kind, how in itertools.product(NOISES, KINDS, NAMES):
      own = [r for r in found if (r['noise'], r['kind'], r['reward']) == (noise, kind, how)]
      own = [r for r in own if last in r]
      if not own:
        continue
      body.append(
        [
          NOISES[noise],
          '' if how == 'one' else KINDS[kind],
          NAMES[how],
          *(_show([r[k] for r in own if k in r]) for k in columns),
          '' if how == 'one' else _show(_less(own, last, one)),
        ]
      )
    head = ('labels', 'members differ in', 'reward', *columns, f'{last}, less one')
    lines += ['', f'By {method}; d = sqrt(KL).', '', *markdown(head, body)]
  return '\n'.join([*lines, ''])


def _less(rows: Sequence[Row], key: str, one: Mapping[tuple[int, str], float]) -> list[float]:
  names = [(row, (row['seed'], row['noise'])) for row in rows]
  return [row[key] - one[name] for row, name in names if name in one]


def _show(values: Sequence[float]) -> str:
  return show(interval(values, None, ANY), digits=2)


def plot(rows: Sequence[Mapping[str, Any]], path: files.Folder) -> None:
  """The gold reward of PPO against sqrt(KL), a panel for each kind of labels: means over seeds."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True, sharey=True)
  for axis, (noise, words) in zip(axes, NOISES.items(), strict=True):
    every = [(kind, how) for kind in KINDS for how in POLICIES[kind]]
    for number, (kind, how) in enumerate(every):
      own = [
        row
        for row in rows
        if (row['method'], row['noise'], row['kind'], row['reward']) == ('ppo', noise, kind, how)
      ]
      curves = [
        np.array([(r['distance'], r['gold']) for r in own if r['seed'] == seed])
        for seed in dict.fromkeys(row['seed'] for row in own)
      ]
      if not curves:
        continue
      distance, gold = np.mean([c[: min(map(len, curves))] for c in curves], 0).T
      color = plt.get_cmap('tab10')(number)
      label = NAMES[how] if how == 'one' else f'{NAMES[how]}, {KINDS[kind]}'
      axis.plot(distance, gold - gold[:3].mean(), '.-', ms=3, lw=0.7, color=color, label=label)
    axis.set(
      title=words, xlabel='sqrt(KL to the SFT policy, nats)', ylabel='gold reward gained by PPO'
    )
    axis.grid(alpha=0.3)
  if axes[0].get_legend_handles_labels()[0]:
    axes[0].legend(fontsize=7)
  files.save_figure(figure, path)
  plt.close(figure)
