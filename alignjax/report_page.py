"""The page of the sandbox's report, report.md, from the contents of report.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignjax.evals import findings
from alignjax.evals.markdown import table
from alignjax.evals.reward import selection
from alignjax.evals.stats import show
from alignjax.plots import NAMES

COLUMNS = {
  'win_rate_train_labelers': 'win rate, training labelers',
  'win_rate_heldout_labelers': 'win rate, held-out labelers',
  'gold_train_labelers': 'gold score',
  'truthful': 'truthful',
  'toxic': 'toxic',
  'toxic_rude_context': 'toxic after rudeness',
  'reading_comprehension': 'reading',
  'translation': 'translation',
  'pretraining_loss': 'pretraining loss',
  'kl': 'KL to SFT',
}
MEANING = {
  'win rate': 'how often labelers of a pool prefer the response to that of SFT, by their exact '
  'probabilities; 0.5 is as good as SFT. The reward model was trained on the training labelers and '
  'never saw the held-out ones',
  'gold score': 'mean utility of a response to the training labelers; 0 is a response without '
  'merit or fault',
  'truthful': 'share of answers about misconceived facts that are true and to the point',
  'toxic': 'share of responses with an insult; after rudeness: to prompts that follow a rude '
  'sentence',
  'reading, translation': 'share of items that greedy decoding solves exactly: what alignment may '
  'make a policy forget',
  'pretraining loss': 'cross-entropy of documents like those of pretraining, nats per token',
  'KL to SFT': 'mean of log pi(response) - log pi_SFT(response), nats per response',
}


def markdown(result: dict[str, Any], pictures: Sequence[str]) -> str:
  """report.md. pictures: the names of the plots beside it."""
  lines = [
    *_head(result),
    *_findings(result),
    *_reward_model(result),
    *_losses_by_kind(result),
    *_prompted_baseline(result),
    *_samples(result),
    *['', '## Plots', '', *(f'![{name}]({name})\n' for name in pictures)],
    *_seconds(result),
  ]
  return '\n'.join(lines)


def _head(result) -> list[str]:
  made = result['made_by']
  commit = f', commit {made["commit"]}' if made['commit'] else ''
  rows = [
    [_name(name), *(show(policy.get(c), digits=2) for c in COLUMNS)]
    for name, policy in result['policies'].items()
  ]
  return [
    '# Report',
    '',
    '    ' + made['command'],
    '',
    f'Seed {result["seed"]}{commit}; report.json has every entry of the config, n of each figure '
    f'and more digits. Mean and 95% interval. No test prompt is among the prompts of '
    f'demonstrations, comparisons or RL, and these name none of the entities of the test. '
    f'Pretraining text states facts about all entities, but holds none of the passages and '
    f'sentences of the two tasks.',
    '',
    *table(['policy', *COLUMNS.values()], rows),
    '',
    *(f'- {what}: {text}.' for what, text in MEANING.items()),
  ]


def _findings(result) -> list[str]:
  rows = []
  for claim, found in result['findings'].items():
    outcome = 'yes' if found['held'] == findings.YES else f'**{found["held"]}**'
    rows.append([claim, outcome, findings.in_words(found)])
  return [
    '',
    '## Findings',
    '',
    'yes: the whole interval is on the claimed side; no: it is on the other side; not shown: '
    'neither, or what the claim presumes is not shown. Differences are paired by item.',
    '',
    *table(['finding', 'outcome', 'figures, 95% interval'], rows),
  ]


def _reward_model(result) -> list[str]:
  lines = [f'- {k.replace("_", " ")}: {_text(v)}' for k, v in result['reward_model'].items()]
  if result['selection']:
    lines += ['', selection.markdown(result['selection'])]
  return ['', '## Reward model', '', *lines]


def _losses_by_kind(result) -> list[str]:
  policies = result['policies']
  kinds = [k for k in policies.get('sft', {}) if k.startswith('pretraining_loss_')]
  if not kinds:
    return []
  rows = [
    [_name(name), *(show(policy[k], digits=2) for k in kinds)]
    for name, policy in policies.items()
    if kinds[0] in policy
  ]
  return [
    '',
    '## Pretraining loss by kind of document, nats per token',
    '',
    *table(['policy', *(k.removeprefix('pretraining_loss_') for k in kinds)], rows),
  ]


def _prompted_baseline(result) -> list[str]:
  baseline = result['prompted_baseline']
  if not baseline:
    return []
  return [
    '',
    f'Best prompt of the pretrained model, chosen on validation prompts among '
    f'{len(baseline["gold"])}: `{baseline["best"]}`.',
  ]


def _samples(result) -> list[str]:
  lines = [
    '',
    '## Samples',
    '',
    'One response of each policy to the first test prompt of every use case, at temperature 1.',
  ]
  for sample in result['samples']:
    rows = [[_name(n), f'`{text}`' if text else ''] for n, text in sample['responses'].items()]
    lines += [
      '',
      f'**{sample["use_case"].replace("_", " ")}:** `{sample["prompt"]}`',
      '',
      *table(['policy', 'response'], rows),
    ]
  return lines


def _seconds(result) -> list[str]:
  return [
    '## Seconds',
    '',
    ', '.join(f'{k} {v:.0f}' for k, v in result['seconds'].items()),
    '',
    ', '.join(f'{k} {v}' for k, v in result['versions'].items()),
    '',
  ]


def _name(policy: str) -> str:
  return NAMES.get(policy, policy)


def _text(value: object) -> str:
  """A figure with its interval, or a number that has none."""
  if isinstance(value, dict):
    return show(value)
  return f'{value:.3f}' if isinstance(value, float) else str(value)
