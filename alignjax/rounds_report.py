"""The figures of rounds of collection (rounds.py), and their report.

A round is measured on held-out prompts, by samples of three policies: the one that its candidates
came from, its own, and the one of round 0, where PPO-ptx starts. In the sandbox all labelers rank
all of these samples, which costs no labels, and know their true reward. Elsewhere the reward models
are measured on what people ranked of the held-out prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax import rounds_items
from alignjax.data import encode, sources
from alignjax.evals.markdown import table
from alignjax.evals.reward import accuracy
from alignjax.evals.stats import ANY, interval, show, statistic
from alignjax.inference import bulk
from alignjax.rounds_items import Row, Run
from alignjax.runtime import files, fingerprints, journal
from alignjax.setup.objects import seed_of
from alignjax.setup.records import encoded, of_sandbox, records, say
from alignjax.setup.weights import initial_params
from alignjax.stages.sampled_comparisons import Comparisons, make_sampler

COLUMNS = {
  'accuracy_before': 'accuracy before',
  'accuracy_after': 'accuracy after',
  'accuracy_first': 'accuracy on round 0',
  'gold': 'gold reward',
  'gold_gain': 'gain',
  'gap': 'proxy less gold',
  'kl': 'KL',
}


class Samples(NamedTuple):
  """Samples of a policy on held-out prompts.

  Attributes:
    names: the prompts, as the clusters of figures.
    comparisons: prompts and responses as tokens and, in the sandbox, features of the responses.
    kl: f[E,S], log p(response) - log p(response) of the policy of round 0.
  """

  names: list[str]
  comparisons: Comparisons
  kl: np.ndarray


def measure(run: Run, number: int) -> Row:
  """Returns the figures of a finished round, which measured.json keeps."""
  path, cfg = run.folder(number) / 'measured.json', run.config.rounds
  specs = [run.policy(i) for i in sorted({0, number - 1, number})]
  specs += [run.reward_model(i) for i in (number - 1, number) if i]
  key = fingerprints.of_value(
    [run.fingerprints(specs), cfg.evaluation_prompts, cfg.evaluation_samples, run.config.seed]
  )
  found = journal.read_whole(path)
  if found is not None and found['key'] == key:
    return found['figures']
  say(f'round {number}: measuring')
  figures = _measured(run, number)
  journal.write_whole(path, dict(key=key, figures=figures))
  return figures


def _measured(run: Run, number: int) -> Row:
  rows = sources.read(f'jsonl:{run.comparisons(number)}', 'comparisons')
  samples = {i: sampled(run, i) for i in sorted({0, number - 1, number})}
  proxy = {i: scores(run, number, samples[i].comparisons) for i in (0, number)}
  figures: Row = dict(
    round=number,
    labels=len(rows),
    kl=interval(samples[number].kl.mean(1), samples[number].names, ANY),
    proxy_gain=_gain(proxy[number], proxy[0], samples[0].names),
  )
  if not of_sandbox(run.setup, 'prompts'):
    held_out = _held_out(run, rows)
    figures['labels_held_out'] = len(held_out.prompts)
    for name, model in (('before', number - 1), ('after', number)):
      if model and held_out.prompts:
        figures[f'accuracy_{name}'] = accuracy.on_ranks(
          held_out, lambda tokens, model=model: _score(run, model, tokens)
        )
    return figures
  for name, model, policy in (
    ('before', number - 1, number - 1),
    ('after', number, number - 1),
    ('first', number, 0),
    ('own', number, number),
  ):
    if model:
      figures |= _accuracy(run, name, model, samples[policy].comparisons)
  figures |= gold(run, samples[number], samples[0])
  true = {i: _gold(run, samples[i], 'train') for i in (0, number)}
  figures['gap'] = gap(proxy[number], proxy[0], true[number], true[0], samples[0].names)
  return figures


def sampled(run: Run, number: int) -> Samples:
  """Samples the policy of a round on held-out prompts at temperature 1."""
  setup, cfg = run.setup, run.config.rounds
  rows = records(setup, 'prompts', cfg.evaluation_prompts, 'test')
  limited = encoded(setup, 'prompts', rows)
  prompts, each = [prompt for prompt, _ in limited.rows], cfg.evaluation_samples
  asked = [prompt for prompt in prompts for _ in range(each)]
  sampler = make_sampler(setup)
  params = initial_params(setup, run.policy(number), 'lm', 0)
  out, _ = sampler(params, asked, seed_of(f'{run.config.seed}/rounds/evaluation'))
  logprobs = bulk.make_response_logprobs(
    setup.nets, setup.sharder, length=setup.length, pad=setup.text.template.pad
  )
  first = initial_params(setup, run.policy(0), 'lm', 0)
  kl = (logprobs(params, asked, out) - logprobs(first, asked, out)).reshape(-1, each)
  responses = [out[i : i + each] for i in range(0, len(out), each)]
  kept = [rows[i] for i in limited.index]
  features = None
  if of_sandbox(setup, 'prompts'):
    from alignjax import sandbox

    features = [
      setup.text.labelers.features(
        [
          sandbox.judge(setup.text.world, row['meta'], *setup.text.template.decode_response(tokens))
          for tokens in own
        ]
      )
      for row, own in zip(kept, responses, strict=True)
    ]
  names = [json.dumps(row['prompt']) for row in kept]
  return Samples(names, Comparisons(prompts, responses, [], features), kl)


def _score(run: Run, number: int, tokens: Sequence[Sequence[int]]) -> np.ndarray:
  """The scores of rows of tokens by the reward model of a round."""
  score = rounds_items.make_scorer(run)
  return score(initial_params(run.setup, run.reward_model(number), 'scalar', 0), tokens)


def scores(run: Run, number: int, found: Comparisons) -> np.ndarray:
  """Returns f[E,S], the scores of samples by the reward model of a round."""
  tokens = [[*p, *r] for p, rs in zip(found.prompts, found.responses, strict=True) for r in rs]
  return _score(run, number, tokens).astype(np.float64).reshape(len(found.prompts), -1)


def _accuracy(run: Run, name: str, model: int, found: Comparisons) -> Row:
  """How often a reward model orders samples as the labelers of both pools do."""
  made = accuracy.by_pool(
    run.setup.text.labelers, found, lambda tokens: _score(run, model, tokens), run.config.seed
  )
  return {
    f'accuracy_{name}': made['accuracy_train_labelers'],
    f'accuracy_{name}_heldout': made['accuracy_heldout_labelers'],
    f'agreement_{name}': made['agreement_train_labelers'],
  }


def _held_out(run: Run, rows: Sequence[Row]) -> Comparisons:
  """The rankings of a round on held-out prompts, as tokens."""
  own = [row for row in rows if rounds_items.is_held_out(run, row)]
  template = run.setup.text.template
  pairs = [
    (
      template.row(row['prompt'], '')[0],
      [template.row(row['prompt'], text)[1] for text in row['responses']],
    )
    for row in own
  ]
  limited = encode.limit_lengths(
    pairs, run.setup.prompt_length, run.setup.response_length, 'truncate', 'held out', none=True
  )
  return Comparisons(
    [prompt for prompt, _ in limited.rows],
    [responses for _, responses in limited.rows],
    [row['ranks'] for row in own],
  )


# ---- figures of arrays


def _gold(run: Run, found: Samples, pool: str) -> np.ndarray:
  """f[E,S]: the mean utility of each sample to the labelers of a pool."""
  labelers = run.setup.text.labelers
  ids = getattr(labelers, pool)
  return np.array([labelers.gold(f, ids) for f in found.comparisons.features or ()])


def gold(run: Run, found: Samples, first: Samples) -> Row:
  """Returns the gold reward, its difference to that of round 0, and the same for the held-out
  labelers."""
  made = {}
  for pool, more in (('train', ''), ('heldout', '_heldout')):
    now, then = _gold(run, found, pool).mean(1), _gold(run, first, pool).mean(1)
    made[f'gold{more}'] = interval(now, found.names, ANY)
    made[f'gold_gain{more}'] = interval(now - then, found.names, ANY)
    made[f'gold_of_round_0{more}'] = interval(then, found.names, ANY)
  return made


def _in_deviations(now: np.ndarray, first: np.ndarray) -> float:
  """The rise of a mean, in standard deviations of the values that it rose from."""
  return float((now.mean() - first.mean()) / max(first.std(), np.finfo(np.float64).tiny))


def _gain(now: np.ndarray, first: np.ndarray, names: Sequence[str]) -> Row:
  return statistic(lambda rows: _in_deviations(now[rows], first[rows]), names)


def gap(
  proxy: np.ndarray,
  proxy_first: np.ndarray,
  true: np.ndarray,
  true_first: np.ndarray,
  names: Sequence[str],
) -> Row:
  """Returns how much more the proxy rose than the true reward, each in standard deviations of its
  values in round 0, because their units differ. Above 0 the policy has learnt what the reward model
  overrates.

  Args:
    proxy: f[E,S], the reward model's scores of samples of the policy.
    proxy_first: f[E,S], its scores of samples of the policy of round 0.
    true: f[E,S], the gold reward of the same samples of the policy.
    true_first: f[E,S], that of the samples of the policy of round 0.
    names: the clusters of the E prompts.
  """
  return statistic(
    lambda rows: (
      _in_deviations(proxy[rows], proxy_first[rows]) - _in_deviations(true[rows], true_first[rows])
    ),
    names,
  )


# ---- the report


def result(run: Run, figures: Sequence[Mapping[str, Any]]) -> Row:
  """Returns the contents of rounds.json."""
  cfg = run.config.rounds.to_dict()
  left_out = ('database', 'task', 'base')
  return dict(
    seed=run.config.seed,
    sandbox=of_sandbox(run.setup, 'prompts'),
    rounds=[
      dict(one, labels_so_far=sum(f['labels'] for f in figures[: i + 1]))
      for i, one in enumerate(figures)
    ],
    config={k: v for k, v in json.loads(json.dumps(cfg)).items() if k not in left_out},
  )


def write(workdir: files.Folder, result: Mapping[str, Any]) -> None:
  """Writes rounds.json, rounds.png and rounds.md."""
  files.write(workdir / 'rounds.json', json.dumps(result, indent=2))
  plot(result, workdir / 'rounds.png')
  files.write(workdir / 'rounds.md', markdown(result))
  say(markdown(result))


def markdown(result: Mapping[str, Any]) -> str:
  """Returns the contents of rounds.md."""
  rows = result['rounds']
  shown = {k: v for k, v in COLUMNS.items() if any(k in row for row in rows)}
  cells = [
    [row['round'], row['labels_so_far'], *(show(row.get(k), digits=2) for k in shown)]
    for row in rows
  ]
  lines = [
    '# Rounds of collection',
    '',
    f'Seed {result["seed"]}, items chosen by {result["config"]["choose"]["fn"]}; means and 95% '
    f'intervals by held-out prompt.',
    '',
    *table(('round', 'labels so far', *shown.values()), cells),
    '',
    '- **Labels**: rankings, each by one labeler.',
    '- **Accuracy before and after**: how often the reward models of the round before and of the '
    'round order two samples of the policy of the round before as the training labelers do.',
    '- **KL** to the policy of round 0, where PPO-ptx starts in every round, in nats per response.',
  ]
  if result['sandbox']:
    first = rows[0]['gold_of_round_0']
    lines += [
      '- **Accuracy on round 0**: the same on samples of the policy of round 0. Two labelers agree '
      f'on those in {show(rows[0]["agreement_first"], digits=2)}.',
      '- **Gold reward** of the policy that the round ends with: the mean utility to the training '
      f'labelers. That of round 0 is {show(first, digits=2)}; **gain** is the paired difference.',
      "- **Proxy less gold**: the rise of the reward model's score less that of the gold reward, "
      'each in standard deviations of the samples of round 0. Above 0 the policy exploits the '
      'reward model.',
    ]
  else:
    lines.append(
      '- It is measured on what people ranked of held-out prompts, which no stage is trained on. '
      'These rankings count as labels too.'
    )
  return '\n'.join([*lines, '', '![The rounds](rounds.png)', ''])


def plot(result: Mapping[str, Any], path: files.Folder) -> None:
  """Draws the figures of each round against the labels so far, with their intervals."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  panels = {
    'accuracy of the reward model': ('accuracy_before', 'accuracy_after', 'accuracy_first'),
    'gold reward of the policy': ('gold', 'gold_heldout'),
    'proxy less gold, standard deviations': ('gap',),
    'KL to round 0, nats per response': ('kl',),
  }
  rows = result['rounds']
  panels = {
    title: found
    for title, names in panels.items()
    if (found := [n for n in names if any(n in row for row in rows)])
  }
  labels = COLUMNS | {'gold': 'training labelers', 'gold_heldout': 'held-out labelers'}
  figure, axes = plt.subplots(
    1, len(panels), figsize=(3.6 * len(panels), 3.4), squeeze=False, constrained_layout=True
  )
  for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
    for i, name in enumerate(names):
      color = plt.get_cmap('tab10')(i)
      own = [(row['labels_so_far'], row[name]) for row in rows if name in row]
      axis.plot([x for x, _ in own], [f['mean'] for _, f in own], 'o-', color=color)
      axis.lines[-1].set_label(labels.get(name, name))
      for x, f in own:
        if f['ci95'][0] is not None:
          axis.plot([x, x], f['ci95'], color=color, lw=1)
    axis.set(title=title, xlabel='labels so far')
    axis.grid(alpha=0.3)
    if len(names) > 1:
      axis.legend(fontsize=8)
  files.save_figure(figure, path)
  plt.close(figure)
