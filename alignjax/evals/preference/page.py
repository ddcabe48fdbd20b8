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
  lines = [
    '# Preference',
    '',
    'Mean and 95% interval by prompt; ties count half.',
    '',
    f'![win rates against {result["baseline"]}]({picture})',
  ]
  if notes:
    lines += ['', *(f'- {note}' for note in notes)]
  for judge, found in result['judges'].items():
    lines += _judge(judge, found, result['policies'], result['baseline'])
  if result['between_judges']:
    lines += _between_judges(result['between_judges'])
  for judge, ratings in result['ratings'].items():
    lines += _ratings(judge, ratings, result['policies'])
  if any(figure['n'] for figure in result['words'].values()):
    lines += _responses(result['words'], result.get('ended', {}), result['policies'])
  return '\n'.join([*lines, ''])


def _judge(
  judge: str, found: Mapping[str, Any], policies: Sequence[str], baseline: str
) -> list[str]:
  people = f', {len(found["labelers"])} labelers' if len(found['labelers']) > 1 else ''
  unjudged = f'; {found["unjudged"]} without a verdict' if found['unjudged'] else ''
  rates = found['win_rate']

  def strength(policy):
    if policy == baseline:
      return '0 (baseline)'
    return show(found['bradley_terry'][policy]) or 'no maximum'

  return [
    '',
    f'## Judge: {judge}',
    '',
    f'{found["verdicts"]} verdicts on {found["prompts"]} prompts{people}; ties '
    f'{show(found["ties"])}{unjudged}.',
    '',
    *table(
      [
        'policy',
        f'win rate against {baseline}',
        'at equal length',
        'strength (Bradley-Terry)',
        'verdicts',
      ],
      [
        [
          p,
          show(rates[p].get(baseline)) or '-',
          show(found['length_controlled'].get(p)) or '-',
          strength(p),
          found['bradley_terry'][p]['n'],
        ]
        for p in policies
      ],
    ),
    '',
    'Win rate of the row over the column:',
    '',
    *table(
      ['', *policies], [[a, *(show(rates[a].get(b), True) for b in policies)] for a in policies]
    ),
    *_remarks(found),
  ]


def _remarks(found: Mapping[str, Any]) -> list[str]:
  """Lines about the length of responses, the agreement of labelers and the order of presentation,
  as far as the judge's verdicts say something about them."""
  lines = []
  length, agreed, position = found['length'], found['agreement'], found['position']
  if length['longer_wins']['n']:
    lines += [
      '',
      f'The longer response wins {show(length["longer_wins"])}; correlation of the difference in '
      f'words and the verdict {show(length["correlation"]) or "undefined"}.',
    ]
  if agreed:
    lines += [
      '',
      f'Two labelers make the same choice {show(agreed["pairwise"])} ({agreed["pairwise"]["n"]} '
      f'times two on {agreed["pairs"]} pairs), {show(agreed["pairwise_without_ties"]) or "-"} '
      f"where neither says tie; Krippendorff's alpha {show(agreed['alpha']) or 'undefined'}.",
    ]
  if position:
    same = show(position['consistent'])
    lines += [
      '',
      f'The response shown first wins {show(position["first_wins"])}'
      + (f'; the answer is the same in both orders for {same}.' if same else '.'),
    ]
  return lines


def _between_judges(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  return [
    '',
    '## Between judges',
    '',
    'How often two judges prefer the same response, where neither says tie:',
    '',
    *table(
      ['judge', 'judge', 'agreement', 'pairs'],
      [[*r['judges'], show(r['agreement']), r['agreement']['n']] for r in rows],
    ),
  ]


def _ratings(judge: str, ratings: Mapping[str, Any], policies: Sequence[str]) -> list[str]:
  names = {'likert': 'overall quality, 1 to 7', **FLAGS}
  return [
    '',
    f'## Ratings: {judge}',
    '',
    *table(
      ['', *policies],
      [
        [name, *(show(ratings[p].get(key), True) for p in policies)]
        for key, name in names.items()
        if any(key in ratings[p] for p in policies)
      ],
    ),
  ]


def _responses(
  words: Mapping[str, Any], ended: Mapping[str, Any], policies: Sequence[str]
) -> list[str]:
  """The lengths of the responses and, if it is known, how many of them the model ended itself."""
  return [
    '',
    '## Responses',
    '',
    *table(
      ['policy', 'words', *(['ended by the model'] if ended else [])],
      [[p, show(words[p], digits=1), *([show(ended.get(p))] if ended else [])] for p in policies],
    ),
  ]


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
