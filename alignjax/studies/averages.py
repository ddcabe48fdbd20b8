"""Is an average of policies as good as the pretraining gradient against the alignment tax?

Between SFT and PPO lie the averages of their weights (Lin et al. 2023), and an average of several
PPO policies may go further than any of them (WARP, Ramé et al. 2024b). Three lines of models start
at SFT: one ends in PPO, one in PPO-ptx, and one in the spherical merge of two PPO policies that
differ by their seeds. Every fourth part of each line is measured. The tax is then compared where
the lines reach the same gold score: half, three quarters and all of what PPO gains.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignjax.evals.markdown import table as markdown
from alignjax.evals.stats import ANY, interval, show
from alignjax.runtime import files
from alignjax.setup.objects import Setup
from alignjax.setup.weights import initial_params
from alignjax.stages import average
from alignjax.studies import methods, study
from alignjax.studies.study import Row, Trial
from alignjax.types import Params

LINES = {
  'ppo': 'SFT to PPO',
  'ppo_ptx': 'SFT to PPO-ptx',
  'warp': 'SFT to the merge of two PPO policies',
}
STAGES = {'sft': ('sft',), 'ppo': ('ppo',), 'ppo_ptx': ('ppo_ptx',), 'warp': ('ppo', 'ppo_2')}
SHARES = (0.25, 0.5, 0.75, 1.0)
LEVELS = (0.5, 0.75, 1.0)  # of the gold score that PPO gains
MEASURED = {
  'gold_train_labelers': 'gold score',
  'win_rate_heldout_labelers': 'win rate, held-out labelers',
  'pretraining_loss': 'pretraining loss',
  'translation': 'translation',
  'reading_comprehension': 'reading',
  'kl': 'KL to SFT',
}
SHARES_OF_ITEMS = ('win_rate_heldout_labelers', 'translation', 'reading_comprehension')
TAXES = ('pretraining_loss', 'translation', 'reading_comprehension')


def parts(options: argparse.Namespace) -> list[str]:
  """SFT, where all lines start, and the lines."""
  return list(STAGES)


def config_of(trial: Trial) -> Any:
  """The leaderboard's config with a second PPO policy, whose name gives it other samples."""
  config = methods.config_of(trial)
  config.stages.ppo_2 = config.stages.ppo.copy_and_resolve_references()
  return config


def protocol(trial: Trial, part: str) -> dict[str, Any]:
  config = config_of(trial)
  report = config.report.to_dict()
  return study.deciding(trial, config, STAGES[part]) | dict(report=report, shares=SHARES)


def run(trial: Trial, part: str) -> list[Row]:
  """The rows of a line, one for each share of its end."""
  setup = methods.train_stages(config_of(trial), trial.workdir, STAGES[part])
  sft = initial_params(setup, 'stage:sft', 'lm', 0)
  if part == 'sft':
    return [_row(setup, part, 0.0, sft)]
  ends = [initial_params(setup, f'stage:{name}', 'lm', 0) for name in STAGES[part]]
  end = ends[0] if part != 'warp' else average.slerp([sft, *ends])
  return [
    _row(setup, part, share, average.linear([sft, end], weights=(1 - share, share)))
    for share in SHARES
  ]


def _row(setup: Setup, part: str, share: float, params: Params) -> Row:
  figures, _ = methods.measure(setup, params)
  return dict(line=part, share=share) | {key: figures[key]['mean'] for key in MEASURED}


def at_equal_gold(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
  """Returns a row for each seed, line and level of gold score that the line reaches, with the tax
  there: what SFT has lost in each of TAXES, larger is worse."""
  made = []
  for seed in dict.fromkeys(row['seed'] for row in rows):
    own = [row for row in rows if row['seed'] == seed]
    points = {(row['line'], row['share']): row for row in own}
    if ('sft', 0.0) not in points or ('ppo', 1.0) not in points:
      continue
    start, most = points['sft', 0.0], points['ppo', 1.0]
    if most['gold_train_labelers'] <= start['gold_train_labelers']:
      continue  # There is no gain to take shares of.
    for line, level in itertools.product(LINES, LEVELS):
      path = [start, *(points[line, s] for s in SHARES if (line, s) in points)]
      gold = [p['gold_train_labelers'] for p in path]
      target = gold[0] + level * (most['gold_train_labelers'] - gold[0])
      found = {}
      for tax in TAXES:
        value = study.where_reached(gold, [p[tax] for p in path], target)
        if value is not None:
          found[tax] = (value - start[tax]) * (1 if tax == 'pretraining_loss' else -1)
      if found:
        made.append(dict(seed=seed, line=line, level=level, **found))
  return made


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """All points, and the tax where the lines reach the same gold score."""
  points = [dict(row, point=(row['line'], row['share'])) for row in rows]
  figures = study.over_seeds(points, 'point', MEASURED, SHARES_OF_ITEMS)
  seeds = len({row['seed'] for row in rows})
  taxes = []
  equal = at_equal_gold(rows)
  for level, line in itertools.product(LEVELS, LINES):
    own = [row for row in equal if (row['line'], row['level']) == (line, level)]
    against = [row for row in equal if row['level'] == level]
    taxes.append(
      [
        f'{level:.0%}',
        LINES[line],
        f'{len(own)} of {seeds}',
        *(show(interval([r[k] for r in own], None, ANY), digits=2) for k in TAXES),
        ''
        if line == 'ppo_ptx'
        else show(study.paired(against, 'line', line, 'ppo_ptx', 'pretraining_loss'), digits=2),
      ]
    )
  names = [MEASURED[key] for key in TAXES]
  return '\n'.join(
    [
      f'Mean over {study.seeds_of(rows)}, with the 95% interval over seeds.',
      '',
      *markdown(
        ('line', 'share', *MEASURED.values()),
        [
          [LINES.get(line, 'SFT'), f'{share:.2f}', *(show(f[k], digits=2) for k in MEASURED)]
          for (line, share), f in figures.items()
        ],
      ),
      '',
      'The tax where a line first reaches a share of the gold score that PPO gains: what is lost '
      'against SFT, and the loss of pretraining text less that of the line to PPO-ptx, paired by '
      'seed.',
      '',
      *markdown(('gold gained', 'line', 'reached', *names, 'less PPO-ptx'), taxes),
      '',
    ]
  )


def plot(rows: Sequence[Mapping[str, Any]], path: files.Folder) -> None:
  """Gold score against each tax: the mean line over seeds, and thin the line of each seed."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
  for axis, tax in zip(axes, TAXES[:2], strict=True):
    for number, (line, words) in enumerate(LINES.items()):
      curves = []
      for seed in dict.fromkeys(row['seed'] for row in rows):
        own = [r for r in rows if r['seed'] == seed and r['line'] in ('sft', line)]
        curves.append([(r[tax], r['gold_train_labelers']) for r in own])
      color = plt.get_cmap('tab10')(number)
      length = max(map(len, curves))
      for curve in curves:
        axis.plot(*zip(*curve, strict=True), color=color, lw=0.5, alpha=0.5)
      mean = np.mean([curve for curve in curves if len(curve) == length], 0)
      axis.plot(*mean.T, 'o-', ms=4, color=color, label=words)
    axis.set(xlabel=MEASURED[tax], ylabel='gold score')
    axis.grid(alpha=0.3)
  axes[1].legend(fontsize=8)
  files.save_figure(figure, path)
  plt.close(figure)
