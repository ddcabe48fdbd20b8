"""What earlier versions wrote is still read; other numbers have another version."""

import json
import pathlib
import tarfile

import ml_collections
import numpy as np
import pytest

from alignjax import plugins, train
from alignjax.evals import registry, table
from alignjax.inference import loading
from alignjax.runtime import fingerprints, metrics
from alignjax.runtime.versions import VERSIONS
from alignjax.setup import objects
from tests import versions

GOLDEN = pathlib.Path(__file__).parent / 'golden'


@pytest.fixture(scope='module')
def earlier(tmp_path_factory):
  """What alignjax 0.1.0 wrote: the workdir of a run that was stopped in its last stage, its config,
  and an evaluation."""
  folder = tmp_path_factory.mktemp('earlier')
  with tarfile.open(GOLDEN / 'version-0.1.0.tar.xz') as archive:
    archive.extractall(folder, filter='data')
  return folder


@pytest.mark.slow
def test_an_earlier_run_goes_on_and_ends_with_the_same_numbers(earlier, capsys):
  then = json.loads((earlier / 'config.json').read_text())
  config = ml_collections.ConfigDict(plugins.current_names(then))
  assert config.to_dict() != then, 'functions have moved'
  for name in ('rm', 'ppo_ptx'):  # entries of today, at their defaults
    config.stages[name].packed_rows = ()
  config.stages.ppo_ptx.rollout.update(segments=None, halvings=0, engine=None)
  workdir = earlier / 'workdir'
  before = metrics.read(workdir / 'ppo_ptx' / 'metrics.jsonl')
  report = json.loads((workdir / 'report.json').read_text())
  train.main(config, workdir)
  said = capsys.readouterr().out
  assert 'sft: finished before, reused' in said and 'rm: finished before, reused' in said
  assert 'ppo_ptx: goes on from step 1 of 2' in said
  after = metrics.read(workdir / 'ppo_ptx' / 'metrics.jsonl')
  for name in ('objective/scores', 'objective/kl', 'ppo/loss/ptx', 'ppo/loss/total'):
    np.testing.assert_allclose(after[name], before[name], rtol=1e-4, atol=1e-5, err_msg=name)
  again = json.loads((workdir / 'report.json').read_text())
  for policy, found in report['policies'].items():
    figure, name = found['gold_train_labelers']['mean'], 'gold_train_labelers'
    assert again['policies'][policy][name]['mean'] == pytest.approx(figure, abs=1e-4)


def test_an_earlier_stage_is_a_model_to_use(earlier, monkeypatch):
  """Nor is a training run built to use it."""
  monkeypatch.setattr(objects, 'make_setup', None)
  spec = str(earlier / 'workdir' / 'rm')
  assert loading.load(spec).head == 'scalar'
  assert loading.trained_with(spec)['seed'] == 0


@pytest.mark.parametrize(
  'name,data',
  [
    ('sst', 'sst'),
    ('wmt15_fr_en', 'wmt'),
    ('crows_pairs', 'crows.csv'),
    ('realtoxicityprompts', 'toxicity.jsonl'),
  ],
)
def test_earlier_results_of_tasks_are_served(earlier, monkeypatch, name, data):
  """Under the versions of the function and the packages that scored them then: another version of
  these is another result."""
  out = earlier / 'evaluation' / 'out'
  (path,) = (out / 'cells').glob(f'{name}-*.json')
  kept = json.loads(path.read_text())
  monkeypatch.setattr(registry, '_versions', lambda: kept['protocol']['packages'])
  monkeypatch.setitem(VERSIONS, registry.TASKS[name], kept['protocol']['code'])
  data = str(earlier / 'evaluation' / 'data' / data)
  task, options = registry.find_tasks([name])[name], kept['protocol']['options']
  run = lambda: registry.run_task(name, task, None, kept['model'], out, data=data, options=options)
  found, before = run()
  assert before and [c.metric for c in found] == [c['metric'] for c in kept['cells']]
  figure = table.figure(found[0])
  # the BLEU of a corpus is found by the name that its function had
  assert figure['n'] == len(found[0].values) and figure['mean'] is not None
  monkeypatch.setitem(VERSIONS, registry.TASKS[name], 'another')
  with pytest.raises((AttributeError, TypeError)):  # it is measured anew, and there is no model
    run()


def test_earlier_names_of_functions_are_found():
  for then, now in plugins.MOVED.items():
    assert plugins.find(then, 'reward.fn') is plugins.find(now, 'reward.fn')
  old = dict(reward=dict(fn='alignjax.rollout:model_reward'), tasks=('alignjax.evals.public:sst',))
  new = plugins.current_names(old)
  assert new['reward']['fn'] == 'alignjax.rewards:model_reward'
  assert new['tasks'] == ('alignjax.evals.public.nlp:sst',)
  assert plugins.earlier_names(new) == old
  for text in ('mylab.rewards:rule', 'hf:alignjax.x', 7, None):
    assert plugins.current_names(text) == text
  for module in plugins.MOVED_MODULES.values():
    __import__(module)


def assert_alike(now, then, where):
  """JSON values, numbers to the tolerance of float32 on another machine."""
  if isinstance(then, list):
    assert isinstance(now, list) and len(now) == len(then), where
    for i, (a, b) in enumerate(zip(now, then, strict=True)):
      assert_alike(a, b, f'{where}[{i}]')
  elif isinstance(then, float):
    assert now == pytest.approx(then, rel=1e-3, abs=1e-4), where
  else:
    assert now == then, where


@pytest.mark.slow
def test_other_numbers_have_another_version(tmp_path):
  """`python tests/versions.py --write` follows a new version in alignjax/runtime/versions.py."""
  golden = json.loads((GOLDEN / 'versions.json').read_text())
  assert set(golden) == set(VERSIONS) - set(versions.NOT_HERE)
  found = versions.measure(tmp_path)
  for name, then in golden.items():
    assert then['version'] == VERSIONS[name], f'{name}: write the results of its new version'
    assert_alike(found[name], then['measured'], f'{name} needs a new version')


def test_every_version_is_of_a_function_and_every_task_has_one():
  for name in VERSIONS:
    function = plugins.find(name, 'a version')
    assert fingerprints.of_function(function, name) == VERSIONS[name]
  assert set(registry.TASKS.values()) <= set(VERSIONS)
