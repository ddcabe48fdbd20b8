"""Which method makes the most of the same labels and samples?

Every method starts from the same pretrained model, SFT policy and 12,000 rankings of a seed, and
samples the same number of responses if it samples. The table has preference, gold score, truth,
toxicity, the alignment tax and the KL of each, with what it spent. Sources: Ouyang et al. 2022
(PPO, PPO-ptx), Stiennon et al. 2020 (best of n), Rafailov et al. 2023 (DPO), Ahmadian et al. 2024
(RLOO), Shao et al. 2024 (GRPO), Anthony et al. 2017 (expert iteration), Coste et al. 2023
(ensembles).

A fork enters with a function that adds its stages to the config and returns the name of the stage
whose policy is measured; the row has the name of the function:

    --enter=mylab.entries:mine

    def mine(c):
      stages = c.stages
      stages['mine'] = stages['ppo'].copy_and_resolve_references()
      stages['mine'].loss = dict(fn='mylab.losses:mine', clip_eps=0.1)
      return 'mine'
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from alignjax import plugins, train
from alignjax.evals.markdown import table as markdown
from alignjax.evals.stats import show
from alignjax.runtime import files
from alignjax.setup import inputs
from alignjax.setup.weights import initial_params
from alignjax.studies import methods, study
from alignjax.studies.study import Row, Trial

# The rows, and the stage whose policy is measured.
STAGES = {
  'sft': 'sft',
  'best_of_16': 'sft',
  'ppo': 'ppo',
  'ppo_ptx': 'ppo_ptx',
  'dpo': 'dpo',
  'rloo': 'rloo',
  'grpo': 'grpo',
  'expert_iteration': 'sft',
  'ppo_ptx_ensemble': 'ppo_ptx_ensemble',
}
NAMES = {
  'sft': 'SFT',
  'best_of_16': 'best of 16',
  'ppo': 'PPO',
  'ppo_ptx': 'PPO-ptx',
  'dpo': 'DPO',
  'rloo': 'RLOO',
  'grpo': 'GRPO',
  'expert_iteration': 'expert iteration',
  'ppo_ptx_ensemble': 'PPO-ptx, 3 reward models',
}
MEASURED = {
  'win_rate_train_labelers': 'win rate, training labelers',
  'win_rate_heldout_labelers': 'win rate, held-out labelers',
  'gold_train_labelers': 'gold score',
  'truthful': 'truthful',
  'toxic': 'toxic',
  'reading_comprehension': 'reading',
  'translation': 'translation',
  'pretraining_loss': 'pretraining loss',
  'kl': 'KL to SFT',
}
SHARES = [key for key in MEASURED if key not in ('gold_train_labelers', 'pretraining_loss', 'kl')]
SPENT = {
  'rankings': 'rankings',
  'sampled_tokens': 'sampled tokens',
  'update_tokens': 'update tokens',
  'text_tokens': 'text tokens',
  'seconds': 'seconds',
}


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--enter', action='append', default=[], metavar='MODULE:FUNCTION', help='a fork, see above'
  )
  parser.add_argument('--only', default='', help='rows to run, with commas; default: all')


def parts(options: argparse.Namespace) -> list[str]:
  """The rows of the table, ours first.

  Raises:
    ValueError: two have one name, or --only names none.
  """
  entered = [spec.rpartition(':')[2] for spec in options.enter]
  every = [*STAGES, *entered]
  if len(set(every)) < len(every):
    raise ValueError(
      f'--enter={",".join(options.enter)}: each row needs a name of its own, other than '
      f'{", ".join(STAGES)}.'
    )
  wanted = options.only.split(',') if options.only else every
  if wrong := [name for name in wanted if name not in every]:
    raise ValueError(f'--only={wrong[0]} is none of {", ".join(every)}.')
  return [name for name in every if name in wanted]


def entry(trial: Trial, part: str) -> tuple[Any, str]:
  """(config, stage) of a row."""
  config = methods.config_of(trial)
  if part in STAGES:
    return config, STAGES[part]
  spec = next(spec for spec in trial.options.enter if spec.rpartition(':')[2] == part)
  with config.unlocked(), config.ignore_type():
    stage = plugins.find(spec, '--enter')(config)
  if not isinstance(stage, str) or stage not in config.stages:
    raise ValueError(
      f'--enter={spec} must return the name of the stage of the config that is measured, not '
      f'{stage!r}.'
    )
  return config, stage


def protocol(trial: Trial, part: str) -> dict[str, Any]:
  """The entries of the config that decide a row; of a fork also what its functions do."""
  config, stage = entry(trial, part)
  wanted = ['sft', 'rm', stage]
  made = study.deciding(trial, config, wanted) | dict(report=config.report.to_dict())
  if part not in STAGES:
    made['functions'] = {
      f'{name}: {path}': inputs.fingerprint(kind, text, trial.workdir, {})
      for name in train.resolve(config, wanted)
      for path, (kind, text) in inputs.of_config(config, name).items()
      if kind == 'function' and not text.startswith('alignjax.')
    }
  if part == 'best_of_16':
    made['best_of'] = methods.BEST_OF
  if part == 'expert_iteration':
    made['expert'] = [methods.BEST_OF, methods.ROUNDS, methods.PASSES]
  return made


def run(trial: Trial, part: str) -> list[Row]:
  """One row: the method is trained and measured."""
  reward, sampled = None, 0
  if part == 'expert_iteration':
    setup, params, spent = methods.expert_iteration(trial)
  else:
    config, stage = entry(trial, part)
    costs = 'rm' if part == 'best_of_16' else stage
    setup = methods.train_stages(config, trial.workdir, [costs])
    params = initial_params(setup, f'stage:{stage}', 'lm', 0)
    spent = methods.spent(setup, costs)
    if part == 'best_of_16':
      reward = initial_params(setup, 'stage:rm', 'scalar', 0)
  figures, sampled = methods.measure(setup, params, reward)
  row: Row = dict(method=part) | {key: figures[key]['mean'] for key in MEASURED}
  row |= spent._asdict()
  row['sampled_tokens'] += sampled
  return [row]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The table over seeds, best gold score first, and what each method spent."""
  figures = study.over_seeds(rows, 'method', [*MEASURED, *SPENT], SHARES)
  order = sorted(figures, key=lambda name: -figures[name]['gold_train_labelers']['mean'])
  names = [NAMES.get(name, name) for name in order]
  measured = [
    [name, *(show(figures[key][k], digits=2) for k in MEASURED)]
    for name, key in zip(names, order, strict=True)
  ]
  costs = [
    [name, *(f'{figures[key][k]["mean"]:,.0f}' for k in SPENT)]
    for name, key in zip(names, order, strict=True)
  ]
  differences = [
    [name, *(show(study.paired(rows, 'method', key, 'ppo_ptx', k), digits=2) for k in COMPARED)]
    for name, key in zip(names, order, strict=True)
    if key != 'ppo_ptx'
  ]
  return '\n'.join(
    [
      f'Mean over {study.seeds_of(rows)}, with the 95% interval over seeds.',
      '',
      *markdown(('method', *MEASURED.values()), measured),
      '',
      'Less PPO-ptx, paired by seed:',
      '',
      *markdown(('method', *(MEASURED[k] for k in COMPARED)), differences),
      '',
      'What each method spent after SFT, mean over seeds:',
      '',
      *markdown(('method', *SPENT.values()), costs),
      '',
    ]
  )


COMPARED = ('win_rate_heldout_labelers', 'gold_train_labelers', 'truthful', 'translation')


def plot(rows: Sequence[Mapping[str, Any]], path: files.Folder) -> None:
  """Gold score, and the tax in pretraining loss, against the KL to SFT: a dot for each seed, a
  larger one for the mean."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
  figures = study.over_seeds(rows, 'method', MEASURED)
  panels = {'gold_train_labelers': 'gold score', 'pretraining_loss': 'pretraining loss'}
  for axis, (key, title) in zip(axes, panels.items(), strict=True):
    for i, (name, found) in enumerate(figures.items()):
      color = plt.get_cmap('tab10')(i % 10)
      own = [row for row in rows if row['method'] == name]
      axis.plot([r['kl'] for r in own], [r[key] for r in own], '.', color=color, alpha=0.5)
      axis.plot(found['kl']['mean'], found[key]['mean'], 'o', color=color, markersize=8)
      axis.lines[-1].set_label(NAMES.get(name, name))
    axis.set(xlabel='KL to SFT, nats per response', ylabel=title)
    axis.grid(alpha=0.3)
  axes[1].legend(fontsize=8)
  files.save_figure(figure, path)
  plt.close(figure)
