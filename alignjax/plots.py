"""Plots of a finished run: reward against KL, the alignment tax, learning curves."""

from __future__ import annotations

import numpy as np

from alignjax.runtime import files, metrics

COLORS = {
  'pretrained': '#999999',
  'pretrained_prompted': '#c0c0c0',
  'sft': '#4477aa',
  'ppo': '#cc6677',
  'ppo_ptx': '#228833',
  'pretrained_bigger': '#777777',
}
OTHER = '#aa4499'  # a policy of a fork, or a selected one
# The policies, in the order of the pipeline.
NAMES = {
  'pretrained': 'pretrained',
  'pretrained_prompted': 'pretrained, best prompt',
  'sft': 'SFT',
  'ppo': 'PPO',
  'ppo_ptx': 'PPO-ptx',
  'pretrained_bigger': 'pretrained, bigger',
}
STAGES = {
  'pretrain': 'pretraining',
  'pretrain_bigger': 'pretraining, bigger',
  'sft': 'SFT',
  'rm': 'reward model',
  'ppo': 'PPO',
  'ppo_ptx': 'PPO-ptx',
}
CURVES = {
  'sft/loss': 'loss, nats per token',
  'rm/loss': 'ranking loss, nats per pair',
  'objective/scores': 'mean reward',
}


def all_plots(workdir: files.Folder, result: dict) -> list[str]:
  """Writes the PNG files into workdir and returns their names. A plot whose data is missing is left
  out."""
  import matplotlib

  matplotlib.use('Agg')
  found = {p.parent.name: metrics.read(p) for p in workdir.glob('*/metrics.jsonl')}
  known = list(STAGES)
  curves = {
    n: found[n]
    for n in sorted(found, key=lambda n: (known.index(n) if n in known else len(known), n))
  }
  made = [
    reward_against_kl(workdir, curves),
    tax(workdir, result),
    learning_curves(workdir, curves),
  ]
  return [name for name in made if name]


def reward_against_kl(workdir: files.Folder, curves: dict) -> str | None:
  """Proxy reward (the reward model's) and gold reward (the training labelers') against KL, for each
  RL run. Where the first rises and the second falls, the policy exploits the reward model. There is
  a dot for each logged step and a line for their running mean."""
  import matplotlib.pyplot as plt

  runs = {n: c for n, c in curves.items() if 'objective/kl' in c and 'gold/train_labelers' in c}
  if not runs:
    return None
  figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
  for axis, key, title in (
    (axes[0], 'objective/scores', 'proxy: reward model'),
    (axes[1], 'gold/train_labelers', 'gold: training labelers'),
  ):
    for name, c in runs.items():
      color = COLORS.get(name, OTHER)
      axis.plot(c['objective/kl'], c[key], '.', color=color, alpha=0.3)
      axis.plot(
        smooth(c['objective/kl']), smooth(c[key]), color=color, label=STAGES.get(name, name)
      )
    axis.set(
      title=title,
      xlabel='KL to the reference, nats per response',
      ylabel='mean reward of training prompts',
    )
    axis.grid(alpha=0.3)
    axis.legend()
  return _save(figure, workdir, 'reward_against_kl.png')


def tax(workdir: files.Folder, result: dict) -> str | None:
  """The two tax tasks and the pretraining loss, as a bar per policy with 95% intervals."""
  import matplotlib.pyplot as plt

  shown = {n: p for n, p in result['policies'].items() if 'pretraining_loss' in p}
  if not shown:
    return None
  figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), constrained_layout=True)
  for axis, key in zip(
    axes, ('reading_comprehension', 'translation', 'pretraining_loss'), strict=True
  ):
    for at, (name, policy) in enumerate(shown.items()):
      axis.bar(at, policy[key]['mean'], color=COLORS.get(name, OTHER))
      if policy[key]['ci95'][0] is not None:
        axis.plot([at, at], policy[key]['ci95'], color='black', lw=1.5)
    axis.set_xticks(range(len(shown)), [NAMES.get(n, n) for n in shown], rotation=20)
    axis.set(
      title=key.replace('_', ' '),
      ylabel='nats per token' if 'loss' in key else 'share of items solved exactly',
    )
  return _save(figure, workdir, 'alignment_tax.png')


def learning_curves(workdir: files.Folder, curves: dict) -> str | None:
  """The loss of every supervised stage, and the reward and gold reward of the RL stages: pale as
  logged, strong as running mean."""
  import matplotlib.pyplot as plt

  panels = [(n, k, c) for n, c in curves.items() for k in CURVES if k in c]
  if not panels:
    return None
  columns = min(len(panels), 3)
  rows = -(-len(panels) // columns)
  figure, axes = plt.subplots(
    rows, columns, figsize=(3.6 * columns, 3 * rows), constrained_layout=True, squeeze=False
  )
  for axis, (name, key, c) in zip(axes.flat, panels, strict=False):
    lines = {
      key: (COLORS.get(name, '#4477aa'), 'reward model' if key == 'objective/scores' else None)
    }
    if key == 'objective/scores':
      lines |= {'gold/train_labelers': ('#ddaa33', 'gold, training labelers')}
    for line, (color, label) in lines.items():
      if line in c:
        axis.plot(c['step'], c[line], color=color, alpha=0.25, lw=1)
        axis.plot(smooth(c['step']), smooth(c[line]), color=color, label=label)
    axis.set(title=STAGES.get(name, name), xlabel='step', ylabel=CURVES[key])
    axis.grid(alpha=0.3)
    if len(lines) > 1:
      axis.legend(fontsize=8)
  for axis in axes.flat[len(panels) :]:
    axis.set_axis_off()
  return _save(figure, workdir, 'learning_curves.png')


def smooth(x: np.ndarray) -> np.ndarray:
  """The running mean over a tenth of the values, f[N - width + 1]; over up to 3 of a few values."""
  width = max(1, min(len(x) // 3, max(3, len(x) // 10)))
  return np.convolve(x, np.ones(width) / width, 'valid')


def _save(figure, workdir: files.Folder, name: str) -> str:
  import matplotlib.pyplot as plt

  files.save_figure(figure, workdir / name)
  plt.close(figure)
  return name
