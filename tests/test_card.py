"""The model card of an export says what the run's folder knows, and pushing it to the hub is one
upload or one clear error."""

import json
import pathlib
import shutil
import types

import huggingface_hub
import jax.numpy as jnp
import pytest
from huggingface_hub import errors

from alignjax.commands import export as command
from alignjax.evals import card
from alignjax.inference import loading
from alignjax.models import hub
from alignjax.runtime import checkpoint, fingerprints

CHAT = pathlib.Path(__file__).parent / 'golden' / 'chat'
FIGURE = dict(mean=0.61, ci95=[0.58, 0.64], n=500)


@pytest.fixture(scope='module')
def model():
  return loading.load(f'hf:{CHAT}', form='chat')


def read(folder_or_text):
  """(front matter, the rest) as the hub's own package reads them."""
  text = folder_or_text if isinstance(folder_or_text, str) else folder_or_text.read_text()
  found = huggingface_hub.ModelCard(text)
  return found.data.to_dict(), found.text


def stage(workdir, name, info, inputs=None, **config):
  """A finished stage as the loop leaves it."""
  config = {'data': {'template': 'chat'}, 'stages': {name: config}}
  made = dict(
    origin='o',
    config=fingerprints.of_value(config),
    inputs={
      entry: dict(kind=kind, name=source, fingerprint=f'print of {entry}')
      for entry, (kind, source) in (inputs or {}).items()
    },
  )
  checkpoint.save_params(workdir / name / 'final', {'w': jnp.ones(2)}, info, made)
  path = workdir / name / 'checkpoints' / 'config.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(config))
  return made['config']


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """SFT, a reward model, PPO-ptx, and the two kinds of reports."""
  folder = tmp_path_factory.mktemp('run')
  stage(
    folder,
    'sft',
    {'head': 'lm'},
    {
      'data.demonstrations': ('data', 'hf:org/demos:train; jsonl:/home/me/mine.jsonl'),
      'model.source': ('architecture', 'hf:org/base'),
    },
    build='alignjax.stages.sft:build',
    loss=dict(fn='alignjax.losses:sft'),
  )
  stage(
    folder,
    'rm',
    {'head': 'scalar', 'bias': -0.5, 'accuracy_heldout_prompts': FIGURE},
    {
      'data.comparisons': ('data', 'hf:other/pairs/default:train'),
      'stage:sft': ('weights', 'stage:sft'),
    },
    build='alignjax.stages.rm:build',
    loss=dict(fn='alignjax.losses:reward_ranking'),
  )
  stage(
    folder,
    'ppo_ptx',
    {'head': 'lm'},
    {
      'data.prompts': ('data', 'jsonl:private/prompts.jsonl'),
      'stage:sft': ('weights', 'stage:sft'),
      'stage:rm': ('weights', 'stage:rm'),
    },
    build='alignjax.stages.ppo_ptx:build',
    loss=dict(fn='alignjax.losses:ppo_ptx', ptx_coef=8.0),
  )
  (folder / 'report.json').write_text(
    json.dumps(
      {
        'config': {'report': {'policies': {'sft': 'sft', 'tuned': 'ppo_ptx'}}},
        'policies': {'tuned': {'win_rate': FIGURE}, 'sft': {'win_rate': FIGURE | {'mean': 0.5}}},
      }
    )
  )
  (folder / 'evaluation').mkdir()
  row = dict(
    task='arc',
    metric='accuracy',
    prompt='plain',
    models={'a': FIGURE | {'mean': 0.25}, 'b': FIGURE | {'mean': 0.75}},
  )
  (folder / 'evaluation/table.json').write_text(
    json.dumps(
      {
        'models': {'a': f'{folder}/ppo_ptx', 'b': f'{folder}/sft', 'base': 'hf:org/ppo_ptx'},
        'rows': [row],
      }
    )
  )
  return folder


def test_the_card_of_an_average(workdir, model):
  """It names the members, and has their stages before its own."""
  stage(
    workdir,
    'soup',
    {'head': 'lm', 'members': ['stage:sft', 'stage:ppo_ptx']},
    {'stage:sft': ('weights', 'stage:sft'), 'stage:ppo_ptx': ('weights', 'stage:ppo_ptx')},
    build='alignjax.stages.average:build',
    members=['stage:sft', 'stage:ppo_ptx'],
  )
  facts, text = read(card.write(str(workdir / 'soup'), model, {'class': 'LlamaForCausalLM'}))
  assert facts['tags'] == ['alignjax', 'merge']
  assert '- `soup`: an average of finished models (`stage:sft`, `stage:ppo_ptx`)\n' in text
  assert text.index('- `sft`') < text.index('- `ppo_ptx`') < text.index('- `soup`')


def test_the_card_of_a_policy(workdir, model):
  policy = model._replace(source='org/base')
  made = {'class': 'LlamaForCausalLM'}
  facts, text = read(card.write(str(workdir / 'ppo_ptx'), policy, made))
  assert facts == {
    'library_name': 'transformers',
    'pipeline_tag': 'text-generation',
    'tags': ['alignjax', 'ppo'],
    'base_model': 'org/base',
    'datasets': ['org/demos', 'other/pairs'],
  }
  assert (
    '# ppo_ptx\n' in text
    and '/home' not in text
    and 'private' not in text
    and 'A policy (LlamaForCausalLM)' in text
  )
  assert '- `ppo_ptx`: PPO against a reward model, with the pretraining loss mixed in' in text
  assert text.index('- `sft`') < text.index('- `rm`') < text.index('- `ppo_ptx`')
  assert '| sft | demonstrations | `hf:org/demos:train; jsonl:mine.jsonl` | `print of' in text
  assert '| ppo_ptx | prompts | `jsonl:prompts.jsonl` | `print of data.prompts` |' in text
  assert '| win rate | 0.610 [0.580, 0.640] (500) |' in text
  assert (
    '| arc, accuracy, plain | 0.250 [0.580, 0.640] (500) |' in text
    and '0.500' not in text
    and '0.750' not in text
  )
  config = json.loads((workdir / 'ppo_ptx/checkpoints/config.json').read_text())
  assert f'config is `{fingerprints.of_value(config)}`' in text
  assert "loading.load('hf:NAME', 'lm', form='chat')" in text and '## Limits' in text
  assert repr(policy.tokenizer.decode(policy.template.prompt('PROMPT'))) in text


def test_the_card_of_a_reward_model(workdir, model):
  made = {'class': 'GPT2ForSequenceClassification', 'bias': '-0.5, left out', 'pad': '<pad>'}
  reward = model._replace(head='scalar', source=str(CHAT))
  facts, text = read(card.write(str(workdir / 'rm'), reward, made))
  assert facts['pipeline_tag'] == 'text-classification' and facts['tags'][1] == 'reward-model'
  assert 'base_model' not in facts and 'license' not in facts, 'of a local folder none is known'
  assert '| accuracy heldout prompts | 0.610 [0.580, 0.640] (500) |' in text
  assert 'win rate' not in text and '- bias: -0.5, left out' in text and 'prompts.jsonl' not in text
  assert "'scalar', form='chat'" in text and card.REWARD_LIMITS in text


def test_a_forks_stage_is_named_by_its_function(tmp_path, model):
  stage(tmp_path, 'mine', {'head': 'lm'}, build='mylab.stages:build', loss=dict(fn='mylab:loss'))
  facts, text = read(card.write(str(tmp_path / 'mine'), model, {'class': 'C'}))
  assert (
    facts['tags'] == ['alignjax'] and '- `mine`: `mylab.stages:build`, loss `mylab:loss`' in text
  )


def exported(folder, *flags):
  command.main([f'--model=hf:{CHAT}', f'--out={folder}', *flags])


def test_the_export_has_a_card_that_people_may_edit(tmp_path, capsys):
  exported(tmp_path / 'out')
  path = tmp_path / 'out' / 'README.md'
  facts, text = read(path)
  assert facts['library_name'] == 'transformers' and 'no training is on record' in text
  path.write_text(path.read_text() + '\nMore words.\n')
  for weights in (False, True):
    hub.verify(tmp_path / 'out', weights)
  names = {line.split()[1] for line in (tmp_path / 'out' / hub.SUMS).read_text().splitlines()}
  assert names == {p.name for p in (tmp_path / 'out').iterdir()} - {'README.md', hub.SUMS}


def test_the_license_is_that_of_the_checkpoints_card(tmp_path, model):
  source = shutil.copytree(CHAT, tmp_path / 'source')
  (source / 'README.md').write_text('---\nlicense: apache-2.0\n---\n# Base\n')
  facts, _ = read(card.write(f'hf:{source}', model._replace(source=str(source)), {'class': 'C'}))
  assert facts['license'] == 'apache-2.0'
  (source / 'README.md').write_text('---\nlicense: [\n---\n')
  facts, _ = read(card.write(f'hf:{source}', model._replace(source=str(source)), {'class': 'C'}))
  assert 'license' not in facts


# ---- pushing


class Hub:
  """The calls of HfApi that `push` makes. error: what the one called `at` raises."""

  def __init__(self, private=False, at='', error=None):
    self.calls, self.private, self.at, self.error = [], private, at, error

  def _call(self, call, **facts):
    self.calls.append((call, facts))
    if call == self.at:
      raise self.error

  def create_repo(self, name, private, exist_ok):
    self._call('create', name=name, private=private, exist_ok=exist_ok)
    return f'https://huggingface.co/{name}'

  def model_info(self, name):
    return types.SimpleNamespace(private=self.private)

  def upload_folder(self, repo_id, folder_path, commit_message):
    files = {p.name for p in pathlib.Path(folder_path).iterdir()}
    self._call('upload', name=repo_id, files=files)


@pytest.fixture
def fake(monkeypatch):
  def make(**options):
    made = Hub(**options)
    monkeypatch.setattr(huggingface_hub, 'HfApi', lambda: made)
    monkeypatch.setattr(huggingface_hub, 'get_token', lambda: 'hf_x')
    return made

  return make


@pytest.mark.parametrize('private', [False, True])
def test_a_push_makes_the_repository_and_uploads_the_folder(private, tmp_path, fake, capsys):
  calls = fake(private=private).calls
  exported(tmp_path / 'out', '--push=me/mine', *['--private'] * private)
  (create, asked), (upload, sent) = calls
  assert (create, upload) == ('create', 'upload')
  assert asked == dict(name='me/mine', private=private or None, exist_ok=True)
  assert sent['name'] == 'me/mine' and {'README.md', 'config.json', hub.SUMS} <= sent['files']
  assert 'pushed to https://huggingface.co/me/mine' in capsys.readouterr().out


@pytest.mark.parametrize(
  'at, error, words',
  [
    ('create', errors.HTTPError('401 Unauthorized'), '401 Unauthorized'),
    ('upload', ConnectionError('no way to huggingface.co'), 'no way to huggingface.co'),
    ('upload', errors.HTTPError(''), 'HTTPError'),
  ],
)
def test_a_push_that_fails_leaves_the_export_and_says_how_to_go_on(
  at, error, words, tmp_path, fake
):
  fake(at=at, error=error)
  out = tmp_path / 'out'
  with pytest.raises(ValueError, match=f'--push=me/mine: {words}. .*`hf upload me/mine {out}`'):
    exported(out, '--push=me/mine')
  assert (out / 'README.md').exists()


def test_nothing_private_goes_to_a_public_repository(tmp_path, fake):
  calls = fake(private=False).calls
  with pytest.raises(ValueError, match='me/mine is there already, and is public'):
    hub.push(tmp_path, 'me/mine', private=True)
  assert [name for name, _ in calls] == ['create']


def test_what_cannot_be_pushed_is_said_before_any_work(tmp_path, monkeypatch):
  monkeypatch.setattr(loading, 'load', None)
  monkeypatch.setattr(huggingface_hub, 'get_token', lambda: None)
  with pytest.raises(ValueError, match='--push=mine: .* is named USER/NAME'):
    exported(tmp_path / 'out', '--push=mine')
  with pytest.raises(ValueError, match='--push=me/mine: nobody is logged in.*hf auth login'):
    exported(tmp_path / 'out', '--push=me/mine')
  with pytest.raises(ValueError, match='--private requires --push'):
    exported(tmp_path / 'out', '--private')
