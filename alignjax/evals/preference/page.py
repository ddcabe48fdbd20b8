"""Writes the preference figures as a page (preference.md) and a plot (preference.png)."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from alignjax.evals.markdown import table
from alignjax.evals.preference.judgment_rows import FLAGS
from alignjax.evals.stats import show


def markdown(
  result: Mapping[str, Any], notes: Sequence[str] = (), picture: str = 'preference.png'
) -> str:
  """Returns the page of the figures that statistics.summarize returns."""
  policies, baseline = result['policies'], result['baseline']
  lines = [
    '# Preference',
    '',
    'Mean and 95% interval by prompt; ties count half.',
    '',
    f'![win rates against {baseline}]({picture})',
  ]
  lines += [*(['', *[f'- {note}' for note in notes]] if notes else [])]
  for judge, found in result['judges'].items():
    people = f', {len(found["labelers"])} labelers' if len(found['labelers']) > 1 else ''
    lines += [
      '',
      f'## Judge: {judge}',
      '',
      f'{found["verdicts"]} verdicts on {found["prompts"]} prompts{people}; ties '
      f'{show(found["ties"])}'
      + (f'; {found["unjudged"]} without a verdict' if found['unjudged'] else '')
      + '.',
      '',
    ]
    lines += table(
      ['policy', f'win rate against {baseline}', 'strength (Bradley-Terry)', 'verdicts'],
      [
        [
          p,
          show(found['win_rate'][p].get(baseline)) or '-',
          '0 (baseline)' if p == baseline else show(found['bradley_terry'][p]) or 'no maximum',
          found['bradley_terry'][p]['n'],
        ]
        for p in policies
      ],
    )
    lines += ['', 'Win rate of the row over the column:', '']
    lines += table(
      ['', *policies],
      [[a, *(show(found['win_rate'][a].get(b), True) for b in policies)] for a in policies],
    )
    length = found['length']
    if length['longer_wins']['n']:
      lines += [
        '',
        f'The longer response wins {show(length["longer_wins"])}; correlation of the difference '
        f'in words and the '
        f'verdict {show(length["correlation"]) or "undefined"}.',
      ]
    if agreed := found['agreement']:
      lines += [
        '',
        f'Two labelers make the same choice {show(agreed["pairwise"])} '
        f'({agreed["pairwise"]["n"]} times two on '
        f'{agreed["pairs"]} pairs), {show(agreed["pairwise_without_ties"]) or "-"} where neither '
        f'says tie; '
        f"Krippendorff's alpha {show(agreed['alpha']) or 'undefined'}.",
      ]
    if found['position']:
      same = show(found['position']['consistent'])
      lines += [
        '',
        f'The response shown first wins {show(found["position"]["first_wins"])}'
        + (f'; the answer is the same in both orders for {same}.' if same else '.'),
      ]
  if result['between_judges']:
    lines += [
      '',
      '## Between judges',
      '',
      'How often two judges prefer the same response, where neither says tie:',
      '',
    ]
    lines += table(
      ['judge', 'judge', 'agreement', 'pairs'],
      [[*r['judges'], show(r['agreement']), r['agreement']['n']] for r in result['between_judges']],
    )
  for judge, ratings in result['ratings'].items():
    columns = [c for c in ('likert', *FLAGS) if any(c in ratings[p] for p in policies)]
    lines += ['', f'## Ratings: {judge}', '']
    lines += table(
      ['', *policies],
      [
        [
          'overall quality, 1 to 7' if c == 'likert' else FLAGS[c],
          *(show(ratings[p].get(c), True) for p in policies),
        ]
        for c in columns
      ],
    )
  if any(figure['n'] for figure in result['words'].values()):
    lines += ['', '## Responses', '']
    cut = result.get('ended', {})
    lines += table(
      ['policy', 'words', *(['ended by the model'] if cut else [])],
      [
        [p, show(result['words'][p], digits=1), *([show(cut.get(p))] if cut else [])]
        for p in policies
      ],
    )
  return '\n'.join([*lines, ''])


def plot(result: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws the win rates against the baseline as points with intervals, with one panel per judge."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  baseline, judges = result['baseline'], result['judges']
  shown = [p for p in result['policies'] if p != baseline]
  figure, axes = plt.subplots(
    len(judges),
    1,
    figsize=(7, len(judges) * (1.0 + 0.35 * len(shown))),
    constrained_layout=True,
    squeeze=False,
    sharex=True,
  )
  for axis, (judge, found) in zip(axes[:, 0], judges.items(), strict=True):
    for at, policy in enumerate(shown):
      rate = found['win_rate'][policy].get(baseline)
      if rate and rate['mean'] is not None:
        if rate['ci95'][0] is not None:
          axis.plot(rate['ci95'], [at, at], lw=2, color='#4477aa')
        axis.plot(rate['mean'], at, 'o', color='#4477aa')
    axis.axvline(0.5, color='#888888', lw=1)
    axis.set_yticks(range(len(shown)), shown)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_xlim(0, 1)
    axis.grid(axis='x', alpha=0.3)
    axis.set_title(judge, loc='left', fontsize=9)
  axes[-1, 0].set_xlabel(f'win rate against {baseline}')
  figure.savefig(path, dpi=110)
  plt.close(figure)
