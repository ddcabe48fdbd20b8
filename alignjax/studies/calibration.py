"""Does RLHF cost calibration, and does the pretraining mix keep it?

The GPT-4 report (OpenAI 2023, figure 8) shows a pretrained model whose probabilities of
multiple-choice answers are calibrated, and that they are not after PPO. Here the same is measured
of the pretrained model, SFT, PPO and PPO-ptx, on two tasks of the sandbox: questions about a
passage with four choices, in the form of the pretraining corpus, and questions about a fact with
its six possible values, in the form of an instruction. Beside them stands the reward model, whose
difference of two scores is a log-odds (Ouyang et al. 2022, Eq. 1), against the choices of the
labelers that it was not trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignjax import report, sandbox
from alignjax.evals import calibration
from alignjax.evals import sandbox as evaluation
from alignjax.evals.markdown import table as markdown
from alignjax.evals.reward import accuracy
from alignjax.evals.stats import show
from alignjax.inference import bulk
from alignjax.runtime import files
from alignjax.sandbox import words
from alignjax.sandbox.universe import question, statement, stream
from alignjax.setup.objects import Setup
from alignjax.setup.weights import initial_params
from alignjax.stages import comparisons
from alignjax.studies import methods, study
from alignjax.studies.study import Row, Trial

POLICIES = {'pretrained': 'pretrain', 'sft': 'sft', 'ppo': 'ppo', 'ppo_ptx': 'ppo_ptx'}
NAMES = {
  'pretrained': 'pretrained',
  'sft': 'SFT',
  'ppo': 'PPO',
  'ppo_ptx': 'PPO-ptx',
  'train_labelers': 'reward model, training labelers',
  'heldout_labelers': 'reward model, held-out labelers',
}
TASKS = {'reading': 'reading, 4 choices', 'facts': 'facts, 6 choices', 'preference': 'preference'}
FIGURES = {
  'accuracy': 'accuracy',
  'confidence': 'mean confidence',
  'ece': 'calibration error',
  'brier': 'Brier score',
}
READING_CHOICES = 4


def parts(options: argparse.Namespace) -> list[str]:
  """The policies, and then the reward model."""
  return [*POLICIES, 'reward_model']


def protocol(trial: Trial, part: str) -> dict[str, Any]:
  """The entries of the config that decide the rows of a part."""
  config = methods.config_of(trial)
  made = study.deciding(trial, config, [POLICIES.get(part, 'rm')])
  return made | dict(items=config.report.tax_items)


def run(trial: Trial, part: str) -> list[Row]:
  """A row of figures for each task, and a row for each bin of its reliability curve."""
  setup = methods.train_stages(methods.config_of(trial), trial.workdir, [POLICIES.get(part, 'rm')])
  if part == 'reward_model':
    return of_reward_model(setup)
  ev = report.prepare(setup)
  params = initial_params(setup, f'stage:{POLICIES[part]}', 'lm', 0)
  made = []
  for task, items in (
    ('reading', reading_items(ev.world, setup.config.report.tax_items)),
    ('facts', fact_items(ev.world)),
  ):
    probabilities = choice_probabilities(ev, params, items)
    answers = np.zeros(len(items), int)  # The right choice stands first.
    chosen = probabilities.argmax(1)
    row = dict(policy=part, task=task, brier=calibration.brier(probabilities, answers))
    made += rows_of(row, probabilities.max(1), (chosen == answers).astype(float), 0.0)
  return made


def rows_of(row: Row, confidences: np.ndarray, hits: np.ndarray, low: float) -> list[Row]:
  """A row with the figures of predictions, and one for each bin of their reliability curve."""
  figures = dict(
    kind='figures',
    n=len(hits),
    accuracy=float(np.mean(hits)),
    confidence=float(np.mean(confidences)),
    ece=calibration.error(confidences, hits, low=low),
  )
  names = dict(policy=row['policy'], task=row['task'])
  found = calibration.bins(confidences, hits, low=low)
  return [row | figures, *(names | dict(kind='bin') | one for one in found)]


# ---- items


def reading_items(world: sandbox.World, count: int) -> list[tuple[str, list[str]]]:
  """(context, choices) of each item of reading comprehension, the right one first. The wrong ones
  are words of the same kind, those that occur in the context first."""
  rng = stream(world.seed, 'calibration', 'reading')
  made = []
  for item in sandbox.reading_comprehension(world, count):
    kind = next(
      found
      for found in (words.NAMES, words.OBJECTS, words.ATTRIBUTES['place'])
      if item['answer'] in found
    )
    others = [kind[i] for i in rng.permutation(len(kind)) if kind[i] != item['answer']]
    said = item['context'].split()
    others.sort(key=lambda word: word not in said)  # The order is kept otherwise.
    made.append((item['context'], [item['answer'], *others[: READING_CHOICES - 1]]))
  return made


def fact_items(world: sandbox.World) -> list[tuple[str, list[str]]]:
  """(prompt, choices) of each fact about the entities of the test split, the true value first."""
  return [
    (
      question(entity, attribute),
      [
        f'{statement(entity, attribute, value)} .'
        for value in sorted(values, key=lambda value: value != world.truth[entity, attribute])
      ],
    )
    for entity in world.entities['test']
    for attribute, values in words.ATTRIBUTES.items()
  ]


def choice_probabilities(
  ev: evaluation.Evaluation, params: Any, items: Sequence[tuple[str, list[str]]]
) -> np.ndarray:
  """f64[N,K]: the probability of each choice, exp(log p) over the sum of all choices.

  A choice that ends with a full stop is the response to a prompt, with its end token; others go on
  with a text.
  """
  template = ev.template
  pairs = [
    template.row(context, choice)
    if choice.endswith('.')
    else (template.text(context), template.bare(choice))
    for context, choices in items
    for choice in choices
  ]
  length = max(len(a) + len(b) for a, b in pairs)
  logprobs, _ = ev.likelihood(params, *evaluation.weighted_rows(pairs, length, template.pad))
  logprobs = logprobs.reshape(len(items), -1)
  relative = np.exp(logprobs - logprobs.max(1, keepdims=True))
  return relative / relative.sum(1, keepdims=True)


def of_reward_model(setup: Setup) -> list[Row]:
  """The reward model on held-out prompts: sigmoid(r_a - r_b) against the choices of every labeler
  of either pool, between two different samples of SFT."""
  data, labelers = comparisons.evaluation(setup, 'rm'), setup.text.labelers
  scorer = bulk.make_scorer(
    setup.nets, setup.sharder, length=setup.length, pad=setup.text.template.pad
  )
  params = initial_params(setup, 'stage:rm', 'scalar', 0)
  judged = accuracy.judged_pairs(
    labelers, data, lambda tokens: scorer(params, tokens), setup.config.seed
  )
  made = []
  for pool in ('train', 'heldout'):
    # The labeler's choice is the first of two.
    p = 1 / (1 + np.exp(-judged[pool].margins))
    brier = calibration.brier(np.stack([p, 1 - p], 1), np.zeros(len(p), int))
    row = dict(policy=f'{pool}_labelers', task='preference', brier=brier)
    hits = np.where(p == 0.5, 0.5, p > 0.5).astype(float)
    made += rows_of(row, np.maximum(p, 1 - p), hits, 0.5)
  return made


# ---- the table and the plot


def _of_task(rows: Sequence[Mapping[str, Any]], task: str, kind: str) -> list[Mapping[str, Any]]:
  return [row for row in rows if row['task'] == task and row['kind'] == kind]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The figures of each task, and the differences to the policy before."""
  cells, differences = [], []
  for task, title in TASKS.items():
    own = _of_task(rows, task, 'figures')
    figures = study.over_seeds(own, 'policy', FIGURES, ('accuracy', 'confidence', 'ece'))
    cells += [
      [title, NAMES[name], *(show(found[key]) for key in FIGURES)]
      for name, found in figures.items()
    ]
    for one, other in (('sft', 'pretrained'), ('ppo', 'sft'), ('ppo_ptx', 'ppo')):
      if one in figures and other in figures:
        less = [show(study.paired(own, 'policy', one, other, key)) for key in FIGURES]
        differences.append([title, f'{NAMES[one]} less {NAMES[other]}', *less])
  return '\n'.join(
    [
      f'Mean over {study.seeds_of(rows)}, with the 95% interval over seeds.',
      '',
      *markdown(('task', 'model', *FIGURES.values()), cells),
      '',
      'Differences, paired by seed:',
      '',
      *markdown(('task', 'difference', *FIGURES.values()), differences),
      '',
    ]
  )


def plot(rows: Sequence[Mapping[str, Any]], path: files.Folder) -> None:
  """The reliability curves: the accuracy of each bin against its mean confidence, over all seeds. A
  larger dot has more predictions; on the diagonal a model is calibrated."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  shown = [task for task in TASKS if _of_task(rows, task, 'bin')]
  figure, axes = plt.subplots(
    1, len(shown), figsize=(4.2 * len(shown), 4), squeeze=False, constrained_layout=True
  )
  for axis, task in zip(axes[0], shown, strict=True):
    low = 0.5 if task == 'preference' else 0.0
    axis.plot([low, 1], [low, 1], color='#999999', lw=1, ls='--')
    own = _of_task(rows, task, 'bin')
    for i, name in enumerate(dict.fromkeys(row['policy'] for row in own)):
      curve = pooled([row for row in own if row['policy'] == name])
      counts = np.array([one['count'] for one in curve])
      x, y = ([one[key] for one in curve] for key in ('confidence', 'accuracy'))
      color = plt.get_cmap('tab10')(i)
      axis.plot(x, y, color=color, lw=1, label=NAMES[name])
      axis.scatter(x, y, s=4 + 120 * counts / counts.sum(), color=color)
    axis.set(title=TASKS[task], xlabel='confidence', ylabel='accuracy')
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
  files.save_figure(figure, path)
  plt.close(figure)


def pooled(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
  """The bins of several seeds as one: counts are added, and means weighted by them."""
  made = []
  for number in sorted({row['bin'] for row in rows}):
    own = [row for row in rows if row['bin'] == number]
    counts = [row['count'] for row in own]
    made.append(
      dict(bin=number, count=sum(counts))
      | {
        key: float(np.average([row[key] for row in own], weights=counts))
        for key in ('confidence', 'accuracy')
      }
    )
  return made
