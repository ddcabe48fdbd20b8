"""The model card of an export: the README.md for the Hugging Face hub, written from what the run's
folder records about the model. The card shows only the last part of a local path."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import alignjax
from alignjax.data import sources
from alignjax.evals.markdown import table
from alignjax.evals.stats import show
from alignjax.inference import loading
from alignjax.models import hub
from alignjax.runtime import checkpoint, files

# What each stage of alignjax does, and the hub's tag for it, by the module of its build function.
METHODS = {
  'pretrain': ('language modelling on documents', 'pretraining'),
  'sft': ('supervised fine-tuning on demonstrations', 'sft'),
  'rm': ('reward modelling on ranked responses', 'reward-model'),
  'preference': ('preference optimization on ranked responses, without sampling', 'preference'),
  'ppo_ptx': ('PPO against a reward model', 'ppo'),
  'selection': ('the best of several candidates by a reward model', 'selection'),
  'average': ('an average of finished models', 'merge'),
}
LIMITS = """The model follows what its demonstrations and comparisons reward: the judgement of the
people who wrote and ranked them, which is neither everybody's nor always right. It still makes
facts up, repeats what is biased or toxic in its data, and does what a harmful instruction asks;
measure it on your own use before you rely on it."""
REWARD_LIMITS = """Its scores predict the preferences of the people who ranked its training data,
which are neither everybody's nor always right. A policy that is optimized against it far enough
finds responses that it scores high and people do not like."""


def write(name: str, model: loading.Model, exported: Mapping[str, Any]) -> str:
  """Returns the text of the card.

  Args:
    name: the name of the model, as loading.load takes it.
    model: the loaded model.
    exported: what export.save reports: 'class' and, for a reward model, 'bias' and 'pad'.
  """
  stages = _behind(name)
  scalar = model.head == 'scalar'
  data = [
    (stage, entry, _public(source['name']), source['fingerprint'])
    for stage, _, made in stages
    for entry, source in sorted(made.get('inputs', {}).items())
    if source['kind'] == 'data'
  ]
  last = stages[-1] if stages else None
  title = last[0] if last else pathlib.PurePath(model.source).name
  kind = 'reward model' if scalar else 'policy'
  lines = [
    *_front_matter(model, stages),
    f'# {title}',
    '',
    f'A {kind} ({exported["class"]}), written by alignjax {alignjax.__version__}'
    + (f', which trained it: {_method(last[1])}.' if last else '; no training is on record.'),
  ]
  if last:
    lines += ['', '## Training', '']
    if base := _hub_name(model.source):
      lines += [f'It started from [{base}](https://huggingface.co/{base}).', '']
    lines += [f'- `{stage}`: {_method(config)}' for stage, config, _ in stages]
    if last[2].get('config'):
      lines += ['', f'The fingerprint of its config is `{last[2]["config"]}`.']
  if data:
    rows = [(s, e.removeprefix('data.'), f'`{n}`', f'`{f}`') for s, e, n, f in data]
    lines += ['', *table(('stage', 'data', 'source', 'fingerprint'), rows)]
  if figures := _figures(name):
    lines += ['', '## Results', '', 'Means with 95% intervals, and n.', '']
    lines += table(('measured', 'value'), figures)
  lines += ['', '## Use', '', *_use(name, model, exported)]
  lines += ['', '## Limits', '', *(REWARD_LIMITS if scalar else LIMITS).splitlines(), '']
  return '\n'.join(lines)


def _behind(name: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
  """Returns the training history of a stage: (name, config, inputs) of the stage and of the stages
  of its workdir that it started from, the earliest first. The list is empty for a Hugging Face
  checkpoint."""
  found: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {}

  def visit(name: str) -> None:
    config = loading.trained_with(name)
    folder, weights = loading.folders(name)
    if config is None or folder.name in found:
      return
    made = checkpoint.load_info(weights).get('made', {})
    for source in made.get('inputs', {}).values():
      if source['kind'] == 'weights' and source['name'].startswith('stage:'):
        visit(str(folder.parent / source['name'].removeprefix('stage:')))
    found[folder.name] = (folder.name, config['stages'][folder.name], made)

  if not name.startswith(hub.SCHEMES):
    visit(name)
  return list(found.values())


def _method(config: Mapping[str, Any]) -> str:
  build = str(config.get('build'))
  words = METHODS.get(_module(build), (f'`{build}`', ''))[0]
  loss = config.get('loss') or {}
  if members := config.get('members'):
    words += f' ({", ".join(f"`{_public(member)}`" for member in members)})'
  if loss.get('ptx_coef'):
    words += ', with the pretraining loss mixed in (PPO-ptx)'
  return words + (f', loss `{loss["fn"]}`' if 'fn' in loss else '')


def _module(build: str) -> str:
  """Returns the last name of a module of alignjax's own stages, and '' for the module of a fork."""
  found = re.fullmatch(r'alignjax\.stages\.(\w+):\w+', build)
  return found[1] if found else ''


def _front_matter(model: loading.Model, stages: list) -> list[str]:
  """Returns the YAML that the hub reads. The values are written as JSON, which is valid YAML."""
  scalar = model.head == 'scalar'
  tags = ['alignjax']
  for _, config, _ in stages[-1:]:
    tags += [tag for _, tag in [METHODS.get(_module(str(config.get('build'))), ('', ''))] if tag]
  facts: dict[str, Any] = dict(
    library_name='transformers',
    pipeline_tag='text-classification' if scalar else 'text-generation',
    tags=tags,
  )
  if base := _hub_name(model.source):
    facts['base_model'] = base
  if known := _license(model.source):
    facts['license'] = known
  if datasets := sorted(
    {
      name
      for _, _, made in stages
      for source in made.get('inputs', {}).values()
      if source['kind'] == 'data'
      for part in sources.split(source['name'])
      if (name := _hub_data(part))
    }
  ):
    facts['datasets'] = datasets
  return ['---', *(f'{k}: {json.dumps(v)}' for k, v in facts.items()), '---', '']


def _hub_name(source: str | None) -> str | None:
  """Returns the name of the checkpoint on the hub, or None for a local folder."""
  if source and hub.is_hub_name(source) and not pathlib.Path(source).is_dir():
    return source
  return None


def _license(source: str | None) -> str | None:
  """Returns the license that the card of the checkpoint names, if the checkpoint has a card in its
  folder."""
  from huggingface_hub import metadata_load

  path = pathlib.Path(source or '').expanduser() / 'README.md'
  try:
    found = (metadata_load(path) or {}).get('license') if path.is_file() else None
  except Exception:  # noqa: BLE001 a card is anybody's text
    return None
  return found if isinstance(found, str) else None


def _hub_data(part: str) -> str | None:
  """Returns ORGANIZATION/NAME of a data source on the hub."""
  found = re.match(r'hf:([\w-][\w.-]*/[\w.-]+)[/:]', part)
  return found[1] if found and not pathlib.Path(found[1]).exists() else None


def _public(source: str) -> str:
  """Returns the name of a source without the folders that its files lie in."""
  shown = []
  for part in sources.split(source):
    form, _, rest = part.partition(':')
    local = form in ('jsonl', 'text') or rest.startswith(('/', '~', '.', 'gs://'))
    shown.append(f'{form}:{os.path.basename(rest)}' if local else part)
  return '; '.join(shown)


def _figures(name: str) -> list[tuple[str, str]]:
  """Returns pairs of (what was measured, figure with its interval): what the stage measured at its
  end and, for the last stage of a run, what the reports in its workdir say about it."""
  if loading.trained_with(name) is None:
    return []
  folder, weights = loading.folders(name)
  found = [
    (key.replace('_', ' '), value)
    for key, value in checkpoint.load_info(weights).items()
    if isinstance(value, Mapping) and {'mean', 'ci95'} <= set(value)
  ]
  if weights.name == 'final':
    found += _of_sandbox(folder) + _of_tasks(folder)
  return [(what, show(figure, count=True)) for what, figure in found if show(figure)]


def _of_sandbox(folder: files.Folder) -> list[tuple[str, Mapping[str, Any]]]:
  """Returns the figures in WORKDIR/report.json."""
  report = _json(folder.parent / 'report.json')
  policies = report.get('config', {}).get('report', {}).get('policies', {})
  return [
    (figure.replace('_', ' '), value)
    for policy, stage in policies.items()
    if stage == folder.name
    for figure, value in report['policies'].get(policy, {}).items()
  ]


def _of_tasks(folder: files.Folder) -> list[tuple[str, Mapping[str, Any]]]:
  """Returns the figures in WORKDIR/evaluation/table.json."""
  measured = _json(folder.parent / 'evaluation' / 'table.json')
  names = [
    policy
    for policy, spec in measured.get('models', {}).items()
    if not spec.startswith(hub.SCHEMES) and os.path.basename(spec) == folder.name
  ]
  return [
    (f'{row["task"]}, {row["metric"]}' + f', {row["prompt"]}' * bool(row['prompt']), figure)
    for row in measured.get('rows', ())
    for policy in names
    if (figure := row['models'].get(policy))
  ]


def _json(path: files.Folder) -> dict[str, Any]:
  return json.loads(path.read_bytes()) if path.exists() else {}


def _use(name: str, model: loading.Model, exported: Mapping[str, Any]) -> list[str]:
  trained = loading.trained_with(name)
  form = f', form={trained["data"]["template"]!r}' if trained else ''
  made = exported['class']
  load = [
    'NAME is this folder, or its name on the hub.',
    '',
    '```python',
    f'from transformers import AutoTokenizer, {made}',
    '',
    "tokenizer = AutoTokenizer.from_pretrained('NAME')",
    f"model = {made}.from_pretrained('NAME')",
    '```',
    '',
    'In alignjax:',
    '',
    '```python',
    'from alignjax.inference import loading',
    '',
    f"model = loading.load('hf:NAME', {model.head!r}{form})",
    '```',
  ]
  if model.tokenizer is not None:
    prompt = model.tokenizer.decode(model.template.prompt('PROMPT'))
    load += ['', f'In training, prompts had the form `{prompt!r}`.']
  facts = [f'- {what}: {exported[what]}' for what in ('bias', 'pad') if what in exported]
  return [*load, *([''] if facts else []), *facts]
