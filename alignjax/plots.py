"""Pictures of a finished run: reward against KL, the alignment tax, learning curves."""

from __future__ import annotations

import numpy as np

from alignjax import files, metrics

COLORS = {'pretrained': '#999999', 'pretrained_prompted': '#c0c0c0', 'sft': '#4477aa', 'ppo': '#cc6677',
          'ppo_ptx': '#228833', 'pretrained_bigger': '#777777'}
OTHER = '#aa4499'  # a policy of a fork's, or a selected one


def all_plots(workdir: files.Folder, result: dict) -> list[str]:
  """Writes the PNG files into workdir and returns their names; one whose data is missing is left out."""
  import matplotlib
  matplotlib.use('Agg')
  curves = {p.parent.name: metrics.read(p) for p in sorted(workdir.glob('*/metrics.jsonl'))}
  made = [reward_against_kl(workdir, curves), tax(workdir, result), learning_curves(workdir, curves)]
  return [name for name in made if name]


def reward_against_kl(workdir: files.Folder, curves: dict) -> str | None:
  """Proxy reward (the RM's) and gold reward (the training labelers') against KL, for each RL run: where the first rises
  and the second falls, the policy exploits the reward model."""
  import matplotlib.pyplot as plt
  runs = {n: c for n, c in curves.items() if 'objective/kl' in c and 'gold/train_labelers' in c}
  if not runs:
    return None
  figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
  for axis, key, title in ((axes[0], 'objective/scores', 'proxy: reward model'),
                           (axes[1], 'gold/train_labelers', 'gold: training labelers')):
    for name, c in runs.items():
      order = np.argsort(c['objective/kl'])
      axis.plot(c['objective/kl'], c[key], '.', color=COLORS.get(name, OTHER), alpha=0.35)
      axis.plot(_smooth(c['objective/kl'][order]), _smooth(c[key][order]), color=COLORS.get(name, OTHER), label=name)
    axis.set(title=title, xlabel='KL to the reference (nats a response)', ylabel='mean reward')
    axis.legend()
  return _save(figure, workdir, 'reward_against_kl.png')


def tax(workdir: files.Folder, result: dict) -> str | None:
  """The two tax tasks and the pretraining loss, a bar a policy, with intervals."""
  import matplotlib.pyplot as plt
  shown = {n: p for n, p in result['policies'].items() if 'pretraining_loss' in p}
  if not shown:
    return None
  figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), constrained_layout=True)
  for axis, key in zip(axes, ('reading_comprehension', 'translation', 'pretraining_loss'), strict=True):
    means = np.array([p[key]['mean'] for p in shown.values()])
    low, high = np.array([p[key]['ci95'] for p in shown.values()]).T
    axis.bar(list(shown), means, yerr=[means - low, high - means], capsize=3, color=[COLORS.get(n, OTHER) for n in shown])
    axis.set(title=key.replace('_', ' '), ylabel='nats a token' if 'loss' in key else 'exact match')
    axis.tick_params(axis='x', rotation=20)
  return _save(figure, workdir, 'alignment_tax.png')


def learning_curves(workdir: files.Folder, curves: dict) -> str | None:
  """The loss of every supervised stage, the reward and the gold reward of the RL ones."""
  import matplotlib.pyplot as plt
  panels = [(n, k, c) for n, c in curves.items() for k in ('sft/loss', 'rm/loss', 'objective/scores') if k in c]
  if not panels:
    return None
  figure, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3), constrained_layout=True, squeeze=False)
  for axis, (name, key, c) in zip(axes[0], panels, strict=True):
    axis.plot(c['step'], c[key], color=COLORS.get(name, '#4477aa'), label=key)
    if 'gold/train_labelers' in c:
      axis.plot(c['step'], c['gold/train_labelers'], '--', color='#ddaa33', label='gold')
    axis.set(title=name, xlabel='step')
    axis.legend(fontsize=8)
  return _save(figure, workdir, 'learning_curves.png')


def _smooth(x: np.ndarray, width: int = 9) -> np.ndarray:
  width = min(width, len(x))
  return np.convolve(x, np.ones(width) / width, 'valid')


def _save(figure, workdir: files.Folder, name: str) -> str:
  import matplotlib.pyplot as plt
  files.save_figure(figure, workdir / name)
  plt.close(figure)
  return name
