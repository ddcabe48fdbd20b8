"""What the sandbox's reward model is measured on; records of files in the sandbox's words."""

import json
import types

import jax
import numpy as np
import pytest

from alignjax import sandbox, train
from alignjax.configs import ppo_ptx as presets
from alignjax.configs import selected
from alignjax.setup import records
from alignjax.setup.objects import make_setup
from alignjax.stages import comparisons, ppo_ptx, rm, selection
from alignjax.stages import sampled_comparisons as sampled


def test_item_20_accuracy_is_measured_on_test_prompts(tmp_path, monkeypatch):
  """Of the split 'test', with the first policy's responses; training takes prompts of 'train'."""
  setup = make_setup(presets.get_config('tiny'), tmp_path, jax.devices()[:1])
  cfg = setup.config.stages.rm
  prompts = lambda count, split: [
    setup.text.template.prompt(r['prompt']) for r in sandbox.prompts(setup.text.world, count, split)
  ]
  answer = setup.text.template.response(
    sandbox.demonstrations(setup.text.world, 1, 'train')[0]['response']
  )
  loaded = []
  monkeypatch.setattr(sampled, 'initial_params', lambda setup, spec, *_: loaded.append(spec))
  sample = lambda params, queries, *_: ([answer] * len(queries), None)
  monkeypatch.setattr(sampled.bulk, 'make_sampler', lambda *_, **__: sample)
  assert comparisons.evaluation(setup, 'rm').prompts == prompts(cfg.evaluation_prompts, 'test')
  assert loaded == [cfg.policies[0]['init']]
  cfg.evaluation_prompts = 0
  assert comparisons.evaluation(setup, 'rm').prompts == []
  cfg.evaluation_prompts = presets.get_config('tiny').stages.rm.evaluation_prompts
  assert prompts(cfg.evaluation_prompts, 'test') != prompts(cfg.evaluation_prompts, 'train')


def test_comparisons_of_a_file_about_the_sandbox_have_no_features(tmp_path):
  """They are measured as those of any file: only comparisons that the sandbox samples have features
  of its judge."""
  config = presets.get_config('tiny')
  world = make_setup(config, tmp_path, jax.devices()[:1]).text.world
  rows = [
    dict(prompt=d['prompt'], chosen=d['response'], rejected='hello , i am fine .')
    for d in sandbox.demonstrations(world, 40)
  ]
  path = tmp_path / 'comparisons.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  config.data.comparisons = f'jsonl:{path}'
  config.data.heldout.share = 0.3
  setup = make_setup(config, tmp_path, jax.devices()[:1])
  training, _, held_out, _ = rm.read_data(setup, 'rm')
  assert held_out is not None and held_out.features is None
  assert 4 < len(held_out.prompts) < 20
  names = lambda data: {tuple(prompt) for prompt in data.prompts}
  assert not names(training) & names(held_out)


def of_files(config, tmp_path, **sources):
  """The config with prompts of a file, and a world whose labelers know nothing about them."""
  for kind, rows in {'prompts': [dict(prompt='where is the crow ?')] * 3, **sources}.items():
    path = tmp_path / f'{kind}.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    config.data[kind] = f'jsonl:{path}'
  return make_setup(config, tmp_path, jax.devices()[:1])


def test_no_gold_score_of_prompts_of_a_file(tmp_path, monkeypatch):
  """The labelers would need to know what was asked."""
  setup = of_files(selected.get_config('tiny'), tmp_path)
  asked = [dict(prompt='where is the crow ?')] * 3
  response = setup.text.template.response('the crow is in the river .')
  rollout = types.SimpleNamespace(
    responses=np.array([response] * 3), mask=np.ones((3, len(response)), bool), scores=np.ones(3)
  )
  metrics, rows = ppo_ptx.samples_and_gold(setup, asked, rollout)
  assert metrics == {}
  assert rows == [('where is the crow ?', 'the crow is in the river .', 1.0, None)] * 3

  # Model selection measures the gold score on the sandbox's own prompts alone.
  cfg = setup.config.stages.sft_selected
  cfg.init.reward = cfg.init.ref = None
  monkeypatch.setattr(selection, '_load', lambda *_: {})
  monkeypatch.setattr(selection.checkpoint, 'weights', str)
  said = [[('the crow is in the river .', True)]] * 3
  monkeypatch.setattr(selection.samples, 'make_responder', lambda *_, **__: lambda *_: said)
  cfg.prompts.source = setup.config.data.prompts
  assert selection._measure(setup, 'sft_selected', asked, {'a': tmp_path}) == {'a': {}}


def test_sources_that_do_not_belong_together(tmp_path):
  config = presets.get_config('tiny')
  setup = of_files(config, tmp_path)
  with pytest.raises(
    ValueError, match="stages.rm: data.comparisons='sandbox:' .* data.prompts='js"
  ):
    comparisons.check(setup, 'rm')
  with pytest.raises(ValueError, match="data.prompts='sandbox:' needs data.tokenizer='sandbox:'"):
    config.data.prompts = 'sandbox:'
    records.records(setup._replace(text=setup.text._replace(world=None)), 'prompts', 3)


def test_a_wrong_line_of_a_later_stage_in_the_sandbox(tmp_path):
  """It is reported before the first stage runs; comparisons that are sampled cannot be read yet."""
  config = presets.get_config('tiny')
  setup = of_files(config, tmp_path, demonstrations=[dict(prompt='hello', answer='hello .')])
  config.data.prompts = 'sandbox:'
  builders = train.find_builders(setup, ('pretrain', 'rm', 'sft'))
  with pytest.raises(ValueError, match='demonstrations.jsonl, line 1'):
    train.check_data(setup, builders)
  del builders['sft']
  train.check_data(setup, builders)
