"""Do the paper's findings hold for a real model on people's comparisons?

A checkpoint (SmolLM2-135M unless --checkpoint names another one) goes through SFT, a reward model,
PPO and PPO-ptx. The judge is a second, gold reward model: a prompt of the comparisons belongs to
one of the two, or to the test, and where comparisons have labelers, so do these. Policies answer
the test's prompts, which no stage has seen, and the gold model compares each answer with SFT's.
The alignment tax is that of --tasks, by default the loss of text; toxicity is a task too.

  --data=comparisons=SOURCE --data=demonstrations=SOURCE --data=pretrain=SOURCE
  --mapping=comparisons=NAME --mapping=demonstrations=NAME     (alignjax/data/mappings.py)
  --tasks=text_loss,squadv2,truthfulqa_mc --data=text_loss=FILE --data=squadv2=FILE

What is not named is read from the Hugging Face hub.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignjax import train
from alignjax.configs import real_model as configs
from alignjax.data import hygiene, sources
from alignjax.evals import evaluation, stats
from alignjax.evals.markdown import table as markdown
from alignjax.evals.stats import ANY, interval, show
from alignjax.inference import loading, samples
from alignjax.runtime import checkpoint, files, fingerprints
from alignjax.setup.records import say
from alignjax.studies import study
from alignjax.studies.study import Row, Trial

CPU_DEVICES = None  # As in the recipes: each would hold the weights once more.
GOLD, TEST = 0.45, 0.1  # shares of the comparisons' prompts; the other ones are the reward model's
PROMPTS = 256  # of the test
POLICIES = ('pretrained', 'sft', 'ppo', 'ppo_ptx')
NAMES = {'pretrained': 'pretrained', 'sft': 'SFT', 'ppo': 'PPO', 'ppo_ptx': 'PPO-ptx'}
KINDS = ('comparisons', 'demonstrations', 'pretrain')
FIGURES = {
  'win': 'preferred to SFT by the gold model',
  'gold': 'gold score',
  'proxy': 'score of the reward model',
  'kl': 'KL to SFT',
  'length': 'tokens',
}


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--checkpoint', help='hf:FOLDER_OR_HUB_NAME; default: SmolLM2-135M-Instruct')
  for flag, form in (('--data', 'KIND=SOURCE'), ('--mapping', 'KIND=NAME')):
    parser.add_argument(flag, action='append', default=[], metavar=form, help='see above')
  parser.add_argument('--tasks', default='text_loss', help='of `alignjax evaluate`, with commas')
  parser.add_argument('--limit', type=int, default=500, help='items of each task')


def parts(options: argparse.Namespace) -> list[str]:
  return ['preference', 'tasks']


def _data(trial: Trial) -> tuple[dict[str, str], dict[str, str]]:
  """(sources by kind, files by task).

  Raises:
    ValueError: --data or --mapping names what is neither a kind of record nor a task.
  """
  data = _named(trial.options.data, '--data')
  tasks = trial.options.tasks.split(',')
  if wrong := [name for name in data if name not in (*KINDS, *tasks)]:
    raise ValueError(
      f'--data={wrong[0]}=...: {wrong[0]!r} is none of {", ".join(KINDS)}, and not in '
      f'--tasks={trial.options.tasks}.'
    )
  mapping = _named(trial.options.mapping, '--mapping')
  if wrong := [name for name in mapping if name not in KINDS]:
    raise ValueError(f'--mapping={wrong[0]}=...: {wrong[0]!r} is none of {", ".join(KINDS)}.')
  return data, mapping


def _named(words: Sequence[str], flag: str) -> dict[str, str]:
  if wrong := [word for word in words if not all(word.partition('='))]:
    raise ValueError(f'{flag}={wrong[0]} does not have the form NAME=VALUE.')
  return dict(word.split('=', 1) for word in words)


def config_of(trial: Trial) -> Any:
  """The config of the run, before its comparisons are divided."""
  c = configs.get_config('tiny' if trial.tiny else 'default')
  c.seed = trial.seed
  if trial.options.checkpoint:
    c.checkpoint = trial.options.checkpoint
  data, mapping = _data(trial)
  for kind in KINDS:
    if kind in data:  # The mapping is that of the source, and none where none is given.
      c.data[kind], c.data.mapping[kind] = data[kind], mapping.get(kind)
    elif kind in mapping:
      c.data.mapping[kind] = mapping[kind]
  return c


def protocol(trial: Trial, part: str) -> dict[str, Any]:
  made = dict(config=study.deciding(trial, config_of(trial)), shares=[GOLD, TEST])
  if part == 'tasks':
    made |= dict(tasks=trial.options.tasks, data=_data(trial)[0], limit=_limit(trial))
  return made | dict(prompts=_count(trial))


def _limit(trial: Trial) -> int:
  return 8 if trial.tiny else trial.options.limit


def _count(trial: Trial) -> int:
  return 8 if trial.tiny else PROMPTS


# ---- the division of the comparisons


def divide(records: Sequence[Mapping[str, Any]], seed: int) -> dict[str, list[dict[str, Any]]]:
  """Divides comparisons into those of the gold model, those of the reward model, and the test, so
  that no two have a prompt in common. Where records have labelers, these are divided too, and a
  comparison of a labeler of the other side is left out."""
  made: dict[str, list[dict[str, Any]]] = dict(gold=[], proxy=[], test=[])
  for record in records:
    place = hygiene.place(f'real model/{seed}', hygiene.conversation(record['prompt']))
    side = 'test' if place < TEST else 'gold' if place < TEST + GOLD else 'proxy'
    labeler = record.get('labeler_id')
    if side != 'test' and labeler is not None:
      of_gold = hygiene.place(f'real model, labelers/{seed}', str(labeler)) < 0.5
      if of_gold != (side == 'gold'):
        continue
    made[side].append(dict(record))
  return made


def prepare(trial: Trial, config: Any) -> dict[str, files.Folder]:
  """Writes the divided comparisons as JSON lines and returns the file of each side."""
  folder = trial.workdir / 'real_data'
  paths = {side: folder / f'{side}.jsonl' for side in ('gold', 'proxy', 'test')}
  data = config.data
  folder.mkdir(parents=True, exist_ok=True)
  made = divide(sources.read(data.comparisons, 'comparisons', data.mapping.comparisons), trial.seed)
  for side, records in made.items():
    if not records:
      raise ValueError(
        f'data.comparisons={data.comparisons!r} has too few prompts or labelers: none is left '
        f'for the {side} side.'
      )
    files.write(paths[side], ''.join(json.dumps(record) + '\n' for record in records))
  say('real_model: ' + ', '.join(f'{len(r)} comparisons for {side}' for side, r in made.items()))
  return paths


# ---- what is run


def run(trial: Trial, part: str) -> list[Row]:
  config = config_of(trial)
  paths = prepare(trial, config)
  folder, gold = trial.workdir / 'real', trial.workdir / 'real_gold'
  config.data.comparisons, config.data.mapping.comparisons = f'jsonl:{paths["proxy"]}', None
  config.data.prompts = config.data.comparisons
  config.data.mapping.prompts = 'comparisons_prompts'
  train.main(config, folder)
  own = config.copy_and_resolve_references()
  own.data.comparisons = f'jsonl:{paths["gold"]}'
  own.stages.rm.init.reward = str(folder / 'sft' / 'final')
  own.stages_to_run = ('rm',)
  train.main(own, gold)
  specs = {name: str(folder / name) for name in POLICIES[1:]}
  specs = {'pretrained': config.checkpoint, **specs}
  if part == 'tasks':
    return _tasks(trial, specs)
  rows = [
    dict(kind='reward model', model=name, accuracy=_accuracy(where / 'rm'))
    for name, where in (('proxy', folder), ('gold', gold))
  ]
  records = sources.read(f'jsonl:{paths["test"]}', 'prompts', 'comparisons_prompts')
  distinct = list({json.dumps(r['prompt']): r['prompt'] for r in records}.values())
  return rows + _preference(trial, config, specs, folder, gold, distinct)


def _accuracy(stage: files.Folder) -> float | None:
  found = checkpoint.load_info(stage / 'final').get('accuracy_heldout_prompts')
  return found['mean'] if found else None


def _preference(
  trial: Trial,
  config: Any,
  specs: Mapping[str, str],
  folder: files.Folder,
  gold: files.Folder,
  prompts: Sequence[Any],
) -> list[Row]:
  """A row for each policy and prompt, and one for each checkpoint of PPO and PPO-ptx."""
  sft = loading.load(specs['sft'], 'lm')
  fits = [p for p in prompts if len(sft.template.prompt(p)) <= config.data.prompt_length]
  chosen = fits[: _count(trial)]
  most = config.data.response_length
  rewards = {'proxy': loading.load(str(folder / 'rm'), 'scalar')}
  rewards['gold'] = loading.load(str(gold / 'rm'), 'scalar')
  scorers = {name: samples.make_rewarder(model, chosen) for name, model in rewards.items()}
  divergence = samples.make_divergence(sft, chosen, max_tokens=most)

  def measured(spec: str, template: str | None = None) -> dict[str, np.ndarray]:
    policy = loading.load(spec, 'lm', template)
    respond = samples.make_responder(policy, chosen, count=1, max_tokens=most)
    key = fingerprints.of_value([loading.fingerprint(policy), chosen, most])
    responses = respond(policy.params, trial.seed, trial.workdir / 'real_data' / f'{key}.jsonl')
    found = {n: scorers[n](rewards[n].params, responses)[:, 0] for n in scorers}
    found['kl'] = divergence(policy.params, sft.params, responses)[:, 0]
    return found | {'length': np.array([len(tokens[0]) for tokens in responses.tokens])}

  base = measured(specs['sft'])
  rows: list[Row] = []
  for name, spec in specs.items():
    found = measured(spec, config.data.template if name == 'pretrained' else None)
    wins = np.where(found['gold'] == base['gold'], 0.5, found['gold'] > base['gold'])
    for i in range(len(chosen)):
      figures = {key: float(found[key][i]) for key in ('gold', 'proxy', 'kl', 'length')}
      rows.append(dict(kind='answer', policy=name, prompt=i, win=float(wins[i])) | figures)
  for name in ('ppo', 'ppo_ptx'):
    for step, path in study.checkpoints(folder / name, config.stages[name].iterations):
      means = {key: float(value.mean()) for key, value in measured(str(path)).items()}
      rows.append(dict(kind='curve', policy=name, step=step) | means)
  return rows


def _tasks(trial: Trial, specs: Mapping[str, str]) -> list[Row]:
  """A row for each task, prompt and model: its figure, and its difference to SFT."""
  tasks = trial.options.tasks.split(',')
  data = {name: path for name, path in _data(trial)[0].items() if name in tasks}
  found = evaluation.evaluate(
    specs,
    tasks,
    trial.workdir / 'real_tasks',
    data=data,
    baseline='sft',
    limit=_limit(trial),
    seed=trial.seed,
  )
  return [
    dict(kind='task', policy=name, better=row['better'])
    | {key: row[key] for key in ('task', 'metric', 'prompt')}
    | _flat('', figure)
    | _flat('less SFT, ', figure.get('difference'))
    for row in found
    for name, figure in row['models'].items()
  ]


def _flat(name: str, figure: Mapping[str, Any] | None) -> Row:
  mean, (low, high) = (figure['mean'], figure['ci95']) if figure else (None, (None, None))
  return {f'{name}mean': mean, f'{name}low': low, f'{name}high': high}


# ---- the table and the plot


def over_prompts(rows: Sequence[Mapping[str, Any]], key: str) -> stats.Figure:
  """The figure of rows of answers: over the seeds where there are several, else over prompts."""
  several = len({row['seed'] for row in rows}) > 1
  clusters = [row['seed'] if several else row['prompt'] for row in rows]
  bounds = (0, 1) if key == 'win' else ANY
  return interval([row[key] for row in rows], clusters, bounds)


def _task_figure(rows: Sequence[Mapping[str, Any]], name: str = '') -> stats.Figure:
  """The figure of a task: over seeds where there are several, else that of the seed's items."""
  if len(rows) != 1:
    return interval([r[f'{name}mean'] for r in rows if r[f'{name}mean'] is not None], None, ANY)
  (row,) = rows
  limits = [row[f'{name}low'], row[f'{name}high']]
  return dict(mean=row[f'{name}mean'], ci95=limits, n=1, kind='mean')


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  answers = [row for row in rows if row['kind'] == 'answer']
  models = [row for row in rows if row['kind'] == 'reward model']
  several = len({row['seed'] for row in rows}) > 1
  over = 'seeds' if several else 'the prompts and items of one seed'
  lines = [f'Means over {study.seeds_of(rows)}, with 95% intervals over {over}.', '']
  lines += markdown(
    ('policy', *FIGURES.values()),
    [
      [NAMES[p], *(show(over_prompts(own, k), digits=2) for k in FIGURES)]
      for p in POLICIES
      if (own := [row for row in answers if row['policy'] == p])
    ],
  )
  for name in ('proxy', 'gold'):
    found = [r['accuracy'] for r in models if r['model'] == name and r['accuracy'] is not None]
    if found:
      lines += ['', f'Accuracy of the {name} reward model on held-out pairs: {np.mean(found):.3f}.']
  tasks: dict[tuple, dict[str, list]] = {}
  for row in rows:
    if row['kind'] == 'task':
      key = row['task'], row['metric'], row['prompt']
      tasks.setdefault(key, {}).setdefault(row['policy'], []).append(row)
  if tasks:
    head = ('task', 'metric', 'prompt', *(NAMES[p] for p in POLICIES), 'PPO less SFT')
    body = [
      [
        *key,
        *(show(_task_figure(by.get(p, [])), digits=3) for p in POLICIES),
        *(show(_task_figure(by.get(p, []), 'less SFT, '), digits=3) for p in ('ppo', 'ppo_ptx')),
      ]
      for key, by in tasks.items()
    ]
    lines += ['', *markdown((*head, 'PPO-ptx less SFT'), body)]
  return '\n'.join([*lines, ''])


def plot(rows: Sequence[Mapping[str, Any]], path: files.Folder) -> None:
  """Gold score and reward model's score against KL: the checkpoints of each policy and seed."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(7, 4.4), constrained_layout=True)
  for number, policy in enumerate(('ppo', 'ppo_ptx')):
    own = [row for row in rows if row['kind'] == 'curve' and row['policy'] == policy]
    color = plt.get_cmap('tab10')(number)
    for i, seed in enumerate(dict.fromkeys(row['seed'] for row in own)):
      points = [(r['kl'], r['gold'], r['proxy']) for r in own if r['seed'] == seed]
      kl, gold, proxy = np.array(points).T
      label = NAMES[policy] if i == 0 else None
      axis.plot(kl, gold, 'o-', ms=4, color=color, label=label and f'{label}, gold')
      axis.plot(kl, proxy, 's--', ms=3, lw=0.7, color=color, label=label and f'{label}, proxy')
  axis.set(xlabel='KL to SFT, nats per response', ylabel='score')
  axis.grid(alpha=0.3)
  if axis.get_legend_handles_labels()[0]:
    axis.legend(fontsize=8)
  files.save_figure(figure, path)
  plt.close(figure)
