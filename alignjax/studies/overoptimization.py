"""How far can a reward model be optimized before the gold reward falls?

Gao, Schulman and Hilton (2022), on the sandbox, whose labelers' true utility is the gold reward:
the reward model's score and the gold reward against sqrt(KL), by best of n and by PPO without a KL
penalty. The reward models differ in their comparisons (12,000 prompts, or 1,500), in the labels
(as the labelers rank, or a quarter of the rankings in random order), and in size (that of the
policy, or one layer of half the width); one policy also gets the pretraining gradient. The laws
that are fitted are those of alignjax/evals/reward/laws.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignjax import sandbox, train
from alignjax.configs import base
from alignjax.evals.markdown import table as markdown_table
from alignjax.evals.reward import best_of_n, laws
from alignjax.evals.stats import ANY, Figure, interval, show
from alignjax.inference import loading, samples
from alignjax.runtime import files, metrics
from alignjax.studies import study
from alignjax.studies.study import Row, Trial

ARMS = {
  'full': '12,000 prompts',
  'few': '1,500 prompts',
  'noisy': '12,000 prompts, 25% random rankings',
  'few_noisy': '1,500 prompts, 25% random rankings',
  'small': '12,000 prompts, a smaller model',
  'ptx': '12,000 prompts; PPO with the pretraining gradient',
}
METHODS = {'best_of_n': 'best of n', 'ppo': 'PPO'}
NS = (1, 2, 4, 8, 16, 32, 64)
SAMPLES, PROMPTS = 128, 200
FITTED = 0.6  # of the largest distance: what the laws are fitted to before they predict the rest


def parts(options: Any) -> list[str]:
  return list(ARMS)


def protocol(trial: Trial, part: str) -> dict[str, Any]:
  configs = [_config(trial, part), *([_small(trial)] if part == 'small' else [])]
  made = [study.deciding(trial, config) for config in configs]
  return dict(configs=made, ns=NS, samples=SAMPLES, prompts=PROMPTS)


def run(trial: Trial, part: str) -> list[Row]:
  """Trains the reward model and the policy of an arm and returns their points."""
  reward_model = _reward_model(trial, part)
  config = _config(trial, part)
  folder = trial.workdir / 'small_ppo' if part == 'small' else trial.workdir
  train.main(config, folder)
  rows = [] if part == 'ptx' else _best_of_n(trial, reward_model)
  return [dict(row, arm=part) for row in [*rows, *training(folder / f'ppo_{part}')]]


def _config(trial: Trial, part: str) -> Any:
  """The config of an arm: the sandbox's, with a reward model and a policy of its own."""
  c = base.get_config('tiny' if trial.tiny else 'default')
  c.seed = trial.seed
  s, rm = c.stages, stage_of(part)
  if rm not in s:
    s[rm] = s.rm.copy_and_resolve_references()
  if part.startswith('few'):
    s[rm].prompts //= 8
  if part.endswith('noisy'):
    s[rm].label_noise = 0.25
  ppo = s.ppo_ptx if part == 'ptx' else s.ppo
  s[f'ppo_{part}'] = ppo.copy_and_resolve_references()
  s[f'ppo_{part}'].kl.coef = 0.0
  reward = f'stage:{rm}'
  if part == 'small':
    reward = str(trial.workdir / 'small' / 'rm' / 'final')
    c.reward_model = _smaller(c)
    for name in ('policy', 'ref'):
      s.ppo_small.init[name] = str(trial.workdir / 'sft' / 'final')
  s[f'ppo_{part}'].init.update(value=reward, reward=reward)
  c.stages_to_run = (f'ppo_{part}',)
  return c


def stage_of(part: str) -> str:
  """The stage of an arm's reward model."""
  return 'rm' if part in ('full', 'ptx', 'small') else f'rm_{part}'


def _smaller(config: Any) -> dict[str, Any]:
  """The architecture of the smaller reward model."""
  model = config.model.to_dict()
  width = model['d_model'] // 2
  return model | dict(num_layers=1, d_model=width, embedding_scale=0.5 * width**0.5)


def _reward_model(trial: Trial, part: str) -> files.Folder:
  """Trains what the reward model of an arm needs beside the arm's own config, and returns its
  folder. A smaller one is pretrained and fine-tuned like the policy, in a workdir of its own, and
  ranks the responses of policies of its size."""
  if part != 'small':
    return trial.workdir / stage_of(part)
  first = base.get_config('tiny' if trial.tiny else 'default')
  first.seed, first.stages_to_run = trial.seed, ('sft',)
  train.main(first, trial.workdir)
  train.main(_small(trial), trial.workdir / 'small')
  return trial.workdir / 'small' / 'rm'


def _small(trial: Trial) -> Any:
  """The config of the smaller reward model."""
  c = base.get_config('tiny' if trial.tiny else 'default')
  c.seed = trial.seed
  c.model = _smaller(c)
  c.stages_to_run = ('rm',)
  return c


def _best_of_n(trial: Trial, reward_model: files.Folder) -> list[Row]:
  """The points of best of n by a reward model."""
  prompts, responses, gold = samples_of_sft(trial)
  reward = loading.load(str(reward_model), 'scalar')
  scores = samples.make_rewarder(reward, prompts)(reward.params, responses)
  return points(scores, gold)


def samples_of_sft(trial: Trial) -> tuple[list[Any], samples.Responses, np.ndarray]:
  """(held-out prompts, SFT's samples of each, their gold rewards, f[prompts, samples])."""
  count, most = (16, 8) if trial.tiny else (PROMPTS, SAMPLES)
  world, labelers = sandbox.World(trial.seed), sandbox.Labelers(trial.seed)
  records = sandbox.prompts(world, count, 'test')
  prompts = [record['prompt'] for record in records]
  policy = loading.load(str(trial.workdir / 'sft'), 'lm')
  kept = trial.workdir / 'overoptimization' / f'{loading.fingerprint(policy)}-{count}-{most}.jsonl'
  respond = samples.make_responder(
    policy, prompts, count=most, max_tokens=base.get_config().data.response_length
  )
  responses = respond(policy.params, trial.seed, kept)
  gold = samples.gold(world, labelers, records, responses)['gold, training labelers']
  return prompts, responses, gold


def points(scores: np.ndarray, gold: np.ndarray) -> list[Row]:
  """The points of best of n by scores, f[prompts, samples]."""
  return [
    dict(
      method='best_of_n',
      n=n,
      distance=best_of_n.kl(n) ** 0.5,
      proxy=float(best_of_n.expected(scores, scores, n).mean()),
      gold=float(best_of_n.expected(scores, gold, n).mean()),
    )
    for n in NS
    if n <= scores.shape[1]
  ]


def training(stage: files.Folder) -> list[Row]:
  """The points of a PPO run: what each iteration's samples were worth, on its training prompts."""
  log = metrics.read(stage / 'metrics.jsonl')
  return [
    dict(method='ppo', n=None, distance=max(kl, 0.0) ** 0.5, proxy=proxy, gold=gold)
    for kl, proxy, gold in zip(
      log['objective/kl'].tolist(),
      log['objective/scores'].tolist(),
      log['gold/train_labelers'].tolist(),
      strict=True,
    )
  ]


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[int, np.ndarray]]:
  """Returns {(arm, method): {seed: f64[points, 3]}}: the distance, and the proxy's and the gold
  reward less those at the start. The start is n = 1, or the mean of a policy's first three
  iterations, in which it has hardly moved."""
  points: dict[tuple[str, str], dict[int, list]] = {}
  for row in rows:
    own = points.setdefault((row['arm'], row['method']), {}).setdefault(row['seed'], [])
    own.append((row['distance'], row['proxy'], row['gold']))
  out: dict[tuple[str, str], dict[int, np.ndarray]] = {}
  for key, seeds in points.items():
    first = 1 if key[1] == 'best_of_n' else 3
    for seed, found in seeds.items():
      curve = np.array(found, np.float64)
      curve[:, 1:] -= curve[:first, 1:].mean(0)
      out.setdefault(key, {})[seed] = curve
  return out


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  found = {
    key: [_figures(key[1], c) for c in seeds.values()] for key, seeds in curves(rows).items()
  }

  def over_seeds(key: tuple[str, str], name: str) -> Figure:
    return interval([one[name] for one in found[key] if name in one], None, ANY)

  lines = [f'Means over {study.seeds_of(rows)}, with 95% intervals.']
  for method, words in METHODS.items():
    arms = [arm for arm in ARMS if (arm, method) in found]
    if not arms:
      continue
    # The distance at n samples is known.
    shown = {k: v for k, v in FIGURES.items() if method == 'ppo' or k != 'distance'}
    lines += [
      '',
      f'{words}: R(d) = d (alpha - beta {"log d" if method == "ppo" else "d"}), d = sqrt(KL); the '
      f'end is {"that of training" if method == "ppo" else f"n = {NS[-1]}"}.',
      '',
      *markdown_table(
        ['reward model', *shown.values()],
        [
          [ARMS[arm], *(show(over_seeds((arm, method), k), digits=2) for k in shown)]
          for arm in arms
        ],
      ),
    ]
  return '\n'.join([*lines, ''])


FIGURES = {
  'alpha': 'alpha',
  'beta': 'beta',
  'distance': 'd at the end',
  'proxy': 'proxy gained at the end',
  'gold': 'gold gained at the end',
  'best': 'most gold gained',
  'predicted': 'error of the prediction',
  'constant': 'error if nothing changed',
}


def _figures(method: str, curve: np.ndarray) -> dict[str, float]:
  """The numbers of the table of one seed. The end of a policy's curve is the mean of its last ten
  iterations, and its largest gold reward that of a moving mean of ten."""
  distance, proxy, gold = curve.T
  width = 10 if method == 'ppo' and len(curve) > 20 else 1
  smooth = np.convolve(gold, np.ones(width) / width, 'valid')
  out = dict(
    distance=distance[-width:].mean(),
    proxy=proxy[-width:].mean(),
    gold=smooth[-1],
    best=smooth.max(),
  )
  if len(np.unique(distance[distance > 0])) > 1:
    law = laws.fit(method, distance, gold)
    out |= dict(alpha=law.alpha, beta=law.beta)
  near = distance <= FITTED * distance.max()
  if len(np.unique(distance[near & (distance > 0)])) > 1:
    error = laws.prediction_error(method, distance, gold, FITTED * distance.max())
    out |= dict(predicted=error[0], constant=error[1])
  return {name: float(value) for name, value in out.items()}


def plot(rows: Sequence[Mapping[str, Any]], path: Any) -> None:
  """Draws the gold reward of every arm against sqrt(KL), a panel for each method: the means over
  seeds, dashed the reward model's score, and thin the fitted law."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  found = curves(rows)
  figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
  for axis, (method, words) in zip(axes, METHODS.items(), strict=True):
    for number, arm in enumerate(ARMS):
      seeds = list(found.get((arm, method), {}).values())
      if not seeds:
        continue
      length = min(map(len, seeds))
      distance, proxy, gold = np.mean([curve[:length] for curve in seeds], 0).T
      color = plt.get_cmap('tab10')(number)
      axis.plot(distance, gold, 'o' if method == 'best_of_n' else '.', ms=4, color=color, alpha=0.6)
      axis.plot(distance, proxy, '--', lw=0.7, color=color)
      if len(np.unique(distance[distance > 0])) > 1:
        at = np.linspace(0, distance.max(), 100)
        axis.plot(at, laws.fit(method, distance, gold).reward(at), color=color, label=ARMS[arm])
    axis.set(
      title=f'{words}: gold (points, law) and proxy (dashed)',
      xlabel='sqrt(KL to the SFT policy, nats)',
      ylabel='reward gained, utility or score',
    )
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
      axis.legend(fontsize=8, loc='upper left' if method == 'best_of_n' else 'lower left')
  figure.savefig(path, dpi=110)
  plt.close(figure)
