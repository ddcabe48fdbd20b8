"""What the sandbox's reward model is measured on."""

import jax

from alignjax import sandbox
from alignjax.configs import ppo_ptx
from alignjax.setup.objects import make_setup
from alignjax.stages import comparisons


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
