"""What the sandbox's reward model is measured on."""

import json

import jax

from alignjax import sandbox
from alignjax.configs import ppo_ptx
from alignjax.setup.objects import make_setup
from alignjax.stages import comparisons, rm


def test_item_20_accuracy_is_measured_on_test_prompts(tmp_path, monkeypatch):
  """Of the split 'test', with the first policy's responses; training takes prompts of 'train'."""
  setup = make_setup(ppo_ptx.get_config('tiny'), tmp_path, jax.devices()[:1])
  cfg = setup.config.stages.rm
  prompts = lambda count, split: [
    setup.text.template.prompt(r['prompt']) for r in sandbox.prompts(setup.text.world, count, split)
  ]
  answer = setup.text.template.response(
    sandbox.demonstrations(setup.text.world, 1, 'train')[0]['response']
  )
  loaded = []
  monkeypatch.setattr(comparisons, 'initial_params', lambda setup, spec, *_: loaded.append(spec))
  sample = lambda params, queries, *_: ([answer] * len(queries), None)
  monkeypatch.setattr(comparisons.bulk, 'make_sampler', lambda *_, **__: sample)
  assert comparisons.evaluation(setup, 'rm').prompts == prompts(cfg.evaluation_prompts, 'test')
  assert loaded == [cfg.policies[0]['init']]
  cfg.evaluation_prompts = 0
  assert comparisons.evaluation(setup, 'rm').prompts == []
  cfg.evaluation_prompts = ppo_ptx.get_config('tiny').stages.rm.evaluation_prompts
  assert prompts(cfg.evaluation_prompts, 'test') != prompts(cfg.evaluation_prompts, 'train')


def test_comparisons_of_a_file_about_the_sandbox_have_no_features(tmp_path):
  """They are measured as those of any file: only comparisons that the sandbox samples have features
  of its judge."""
  config = ppo_ptx.get_config('tiny')
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
