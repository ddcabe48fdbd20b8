"""Best-of-n and over-optimization: the reward against the KL if the best of n samples is taken,
beside policies that were trained for the reward.

`kl` is the formula of Stiennon et al. 2020, log n - (n-1)/n. It is the exact divergence if no two
samples have the same score, and an upper bound (Beirami et al. 2024) if few responses are likely,
as in the sandbox. `expected` estimates every n from the same N samples.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignjax.evals.markdown import table
from alignjax.evals.stats import ANY, interval, show, show_difference


def kl(n: int) -> float:
  """Returns log n - (n-1)/n in nats, an upper bound of the divergence between the best of n samples
  and one sample."""
  return math.log(n) - (n - 1) / n


def expected(scores: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
  """Returns the unbiased estimate of E[value of the best of n samples by score] from N >= n samples
  of each prompt.

  The sample that is i-th from below is the best in C(i-1, n-1) of the C(N, n) subsets, which are
  equally likely. Samples with the same score share their weight, as if ties were broken at random.

  Args:
    scores: f[P,N], by which the best is chosen (the reward model's scores).
    values: f[P,N], the values to average (scores, or gold scores).
    n: the number of samples that the best is chosen from.

  Returns:
    f64[P].
  """
  count = scores.shape[1]
  if not 1 <= n <= count:
    raise ValueError(f'best of n={n} needs 1 <= n <= {count}, the number of samples of a prompt.')
  weights = np.array([math.comb(i, n - 1) / math.comb(count, n) for i in range(count)])
  out = np.empty(len(scores))
  for row, (s, v) in enumerate(
    zip(np.asarray(scores, np.float64), np.asarray(values, np.float64), strict=True)
  ):
    order = np.argsort(s, kind='stable')
    _, group = np.unique(s[order], return_inverse=True)
    shared = np.bincount(group, weights) / np.bincount(group)
    out[row] = shared[group] @ v[order]
  return out


def curve(
  scores: np.ndarray,
  measures: Mapping[str, np.ndarray],
  ns: Sequence[int],
  prompts: Sequence[Any] | None = None,
) -> list[dict[str, Any]]:
  """Returns rows {'n', 'kl', measure: figure} of best-of-n by `scores`, with intervals by prompt.

  From the second n on, the rows also have 'MEASURE, change', the difference to the previous n,
  paired by prompt.

  Args:
    scores: f[P,N], by which the best is chosen.
    measures: {measure: f[P,N]}, the values to average.
    ns: the values of n.
    prompts: one label per row. None means that all prompts differ.
  """
  rows, before = [], {}
  for n in ns:
    each = {name: expected(scores, values, n) for name, values in measures.items()}
    row: dict[str, Any] = dict(
      n=n, kl=kl(n), **{name: interval(v, prompts, ANY) for name, v in each.items()}
    )
    row |= {
      f'{name}, change': interval(v - before[name], prompts, ANY)
      for name, v in each.items()
      if name in before
    }
    rows.append(row)
    before = each
  return rows


def policy(
  kl_values: np.ndarray, measures: Mapping[str, np.ndarray], prompts: Sequence[Any] | None = None
) -> dict[str, Any]:
  """Returns the point {'kl', measure: figure} of a trained policy. Values are averaged over the
  samples of a prompt first.

  Args:
    kl_values: f[P,M], log p(response) - log p_ref(response).
    measures: {measure: f[P,M]}.
    prompts: one label per row. None means that all prompts differ.
  """
  return {
    name: interval(v.mean(1), prompts, ANY) for name, v in dict(kl=kl_values, **measures).items()
  }


def markdown(result: Mapping[str, Any]) -> str:
  """Returns the tables of best-of-n and of the trained policies."""
  names = result['measures']
  lines = [
    '# Reward against KL',
    '',
    f'{result["prompts"]} prompts, {result["samples"]} samples each at temperature '
    f'{result["temperature"]}; mean and 95% interval by prompt. KL of best-of-n: log n - (n-1)/n, '
    f'an upper bound.',
    '',
    '## Best of n by the reward model',
    '',
    *table(
      ['n', 'KL', *names],
      [[r['n'], f'{r["kl"]:.2f}', *(show(r[m]) for m in names)] for r in result['best_of_n']],
    ),
    '',
    'Change from the n before, paired by prompt; bold where the interval leaves out 0:',
    '',
    *table(
      ['n', *names],
      [
        [r['n'], *(show_difference(r[f'{m}, change']) for m in names)]
        for r in result['best_of_n'][1:]
      ],
    ),
  ]
  if result['policies']:
    lines += [
      '',
      '## Trained policies',
      '',
      'Measured on the same prompts; KL to the policy above, both at temperature '
      f'{result["temperature"]}.',
      '',
      *table(
        ['policy', 'KL', *names],
        [
          [name, show(p['kl']), *(show(p[m]) for m in names)]
          for name, p in result['policies'].items()
        ],
      ),
    ]
  return '\n'.join([*lines, ''])


def plot(result: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws one panel per measure, with sqrt(KL) on the horizontal axis, because the reward is
  approximately linear in it (Bai et al. 2022). Best-of-n is a line with its band and trained
  policies are points with intervals, all on the same prompts. A second row of panels shows what
  training logged on its own prompts."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  names = result['measures']
  logged = {label: p['training'] for label, p in result['policies'].items() if 'training' in p}
  figure, axes = plt.subplots(
    1 + bool(logged),
    len(names),
    figsize=(4.6 * len(names), 3.8 * (1 + bool(logged))),
    squeeze=False,
    constrained_layout=True,
  )
  colors = {
    label: plt.get_cmap('tab10')(i) for i, label in enumerate(('best of n', *result['policies']))
  }
  for axis, name in zip(axes[0], names, strict=True):
    rows = result['best_of_n']
    x = np.sqrt([r['kl'] for r in rows])
    axis.plot(
      x, [r[name]['mean'] for r in rows], 'o-', ms=3, color=colors['best of n'], label='best of n'
    )
    axis.fill_between(
      x, *np.array([r[name]['ci95'] for r in rows], float).T, color=colors['best of n'], alpha=0.2
    )
    for label, p in result['policies'].items():
      at = math.sqrt(max(p['kl']['mean'], 0))
      axis.plot([at, at], np.array(p[name]['ci95'], float), color=colors[label], lw=2)
      axis.plot(at, p[name]['mean'], 'D', color=colors[label], label=label)
    axis.set(title=f'{name}\non the same {result["prompts"]} prompts', ylabel='mean')
  for axis, name in zip(axes[1] if logged else (), names, strict=False):
    for label, training in logged.items():
      if name in training:
        axis.plot(
          np.sqrt(np.maximum(training['kl'], 0)),
          training[name],
          '.',
          ms=4,
          alpha=0.5,
          color=colors[label],
          label=label,
        )
    if axis.lines:
      axis.set(title=f'{name}\nin training, on its own prompts', ylabel='mean of a step')
  for axis in axes.flat:
    axis.set_xlabel('sqrt(KL to the policy that is sampled, nats)')
    axis.grid(alpha=0.3)
    if axis.lines:
      axis.legend(fontsize=8)
    else:
      axis.set_axis_off()  # Training did not log this measure.
  figure.savefig(path, dpi=110)
  plt.close(figure)
