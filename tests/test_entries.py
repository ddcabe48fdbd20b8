"""What an entry of the config cannot be is told by its name before any stage runs, also where a
flag says None or 0."""

import pytest

from alignjax import train
from alignjax.commands import config_flags
from alignjax.setup import entries

WRONG = {
  'data.prompt_length=None': 'data.prompt_length=None must be a whole number, 1 or more.',
  'data.tokenizer=None': "data.tokenizer=None must be text, such as 'hf:FOLDER'.",
  'data=None': 'data=None must be a dict.',
  'data={}': "the config lacks the entry 'tokenizer'",
  'mesh.fsdp=0': 'mesh.fsdp=0 must be a whole number, 1 or more.',
  'mesh=None': 'mesh=None must be a dict.',
  'model={}': 'model lacks num_layers, d_model, num_heads, max_length; or model.source names a '
  'checkpoint',
  'model.num_heads=0': 'model.num_heads=0 must be',
  'report=None': 'report=None must be a dict.',
  'report.win_prompts=None': 'report.win_prompts=None must be',
  'report.tax_items=0': 'report.tax_items=0 must be',
  'report.policies.ppo=foo': "report.policies.ppo='foo' must be a stage of the config: ppo, "
  'ppo_ptx, pretrain, rm, sft.',
  'stages_to_run=None': 'stages_to_run=None must be a tuple of names of stages.',
  'max_bad_updates=None': 'max_bad_updates=None',
  'grace_seconds=None': 'grace_seconds=None must be a number',
  'stages.sft=None': "stage 'sft' is not in config.stages",
  'stages.sft.log_every=0': 'stages.sft.log_every=0 must be a whole number, 1 or more.',
  'stages.sft.log_every=None': 'stages.sft.log_every=None must be',
  'stages.sft.save_every=-1': 'stages.sft.save_every=-1 must be',
  'stages.sft.batch_size=None': 'stages.sft.batch_size=None must be',
  'stages.sft.optimizer=None': 'stages.sft.optimizer=None must',
  'stages.sft.optimizer.policy.lr=None': 'stages.sft.optimizer.policy: alignjax.optim:adam does '
  'not take .*lr=None',
  'stages.sft.init.policy=runs/none': "stages.sft.init.policy='runs/none' must be 'random', "
  "'stage:NAME', 'hf:",
  'stages.ppo_ptx.ema_decay=foo': "stages.ppo_ptx.ema_decay='foo' must be a number from 0 on, "
  'below 1, or None.',
  'stages.ppo_ptx.kl.target=nan': (
    "stages.ppo_ptx.kl.target='nan' must be a number above 0, or None."
  ),
  'stages.ppo_ptx.kl.target=0': 'stages.ppo_ptx.kl.target=0 must be a number above 0, or None.',
  'stages.ppo_ptx.kl.horizon=-10000': (
    'stages.ppo_ptx.kl.horizon=-10000 must be a number above 0, or None.'
  ),
  'stages.ppo_ptx.kl.coef=-0.1': 'stages.ppo_ptx.kl.coef=-0.1 must be a number, 0 or more.',
  'stages.ppo_ptx.kl={}': "the config lacks the entry 'target'",
  'stages.ppo_ptx.rollout=None': 'stages.ppo_ptx.rollout=None must',
  'stages.ppo_ptx.iterations=None': 'stages.ppo_ptx.iterations=None must be',
  'stages.ppo_ptx={}': "the config lacks the entry 'build'",
  'stages.rm.k_buckets=None': 'stages.rm.k_buckets=None must be a tuple of whole numbers.',
}
RIGHT = (
  'stages.sft.save_every=None',
  'stages.ppo_ptx.ema_decay=0.992',
  'stages.ppo_ptx.keep_candidates=None',
  'reward_model=None',
  'stages.ppo_ptx.loss.value_clip=0.2',
  'report.policies=None',
  'mesh.data=None',
)


class Started(Exception):
  pass


def start(flag, folder, monkeypatch):
  def begun(*_, **__):
    raise Started

  monkeypatch.setattr(train, 'run_stage', begun)
  with pytest.raises((ValueError, Started)) as caught:
    train.main(
      config_flags.read_config(['--config=configs/ppo_ptx.py:tiny', f'--config.{flag}']).config,
      folder,
    )
  return caught


@pytest.mark.parametrize('flag', WRONG)
def test_what_an_entry_cannot_be_is_named_before_any_stage(flag, tmp_path, monkeypatch):
  assert start(flag, tmp_path, monkeypatch).match(WRONG[flag])


@pytest.mark.parametrize('flag', RIGHT)
def test_what_it_can_be_is_taken(flag, tmp_path, monkeypatch):
  assert start(flag, tmp_path, monkeypatch).type is Started


@pytest.mark.parametrize(
  'name',
  ['selected.py', 'instructgpt_6b.py', 'smollm2_135m.py', 'ukp_rm.py', 'dpo.py', 'truth_judge.py'],
)
def test_the_configs_are_right(name):
  config = config_flags.read_config([f'--config=configs/{name}']).config
  entries.check(config)
  # which start from folders that are not here
  for stage in config.stages if 'instructgpt' not in name else ():
    entries.check_stage(config, stage)
