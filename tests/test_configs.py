"""Every config builds; the paper's build to shapes, with the paper's numbers."""

import importlib
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from alignjax import train
from alignjax.commands import command, configs, overrides
from alignjax.configs import (
  base,
  instructgpt_1b3,
  instructgpt_6b,
  instructgpt_175b,
  pretrain,
  rm,
  sft,
)
from alignjax.stages import abstract, ppo_ptx

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAPER = {'1b3': instructgpt_1b3, '6b': instructgpt_6b, '175b': instructgpt_175b}


def count(shapes):
  return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
  'module,stages',
  [(pretrain, ['pretrain']), (sft, ['pretrain', 'sft']), (rm, ['pretrain', 'sft', 'rm'])],
)
def test_the_sandbox_configs_name_their_stages(module, stages):
  assert train.resolve(module.get_config('tiny')) == train.resolve(module.get_config()) == stages
  with pytest.raises(ValueError, match='huge'):
    base.get_config('huge')


def test_the_papers_numbers():
  """Appendices C.1 to C.4 of the paper (docs/paper.md), written here by hand."""
  c = {size: module.get_config() for size, module in PAPER.items()}
  rate = lambda size, stage, net='policy': c[size].stages[stage].optimizer[net].lr
  assert [rate(s, 'sft') for s in c] == [9.65e-6, 9.65e-6, 5.03e-6]
  assert [rate(s, 'ppo_init') for s in c] == [5e-6, 1.04e-5, 2.45e-6]
  assert [rate(s, 'ppo_ptx', 'value') for s in c] == [9e-6, 9e-6, 5e-6]
  assert all(2.55e-6 <= rate(s, 'ppo') <= 2.55e-5 for s in c)
  assert [c[s].stages.sft.batch_size for s in c] == [32, 32, 8]
  for config in c.values():
    p, r = config.stages.ppo_ptx, config.stages.rm
    assert (
      p.rollout.episodes * p.iterations == 256_000 and p.rollout.episodes // p.minibatches == 64
    )
    assert (p.loss.ptx_coef, p.loss.clip_eps, p.kl.coef, p.ema_decay, p.inner_epochs) == (
      27.8,
      0.2,
      0.02,
      0.992,
      1,
    )
    assert p.ptx.rows_per_episode == 8 and p.rollout.temperature == 1.0 and p.advantage.gamma == 1.0
    assert p.optimizer.policy.warmup == 10 * p.minibatches and p.optimizer.policy.warmup_from == 0.1
    assert config.stages.ppo.loss.ptx_coef == 0 and config.stages.ppo.ptx.rows_per_episode == 0
    assert (r.optimizer.reward.lr, r.epochs, r.optimizer.reward.final) == (9e-6, 1, 0.1)
    assert (
      config.stages.sft.epochs == 16
      and config.stages.ppo_init.epochs == 2
      and config.stages.ppo_init.pretrain_mix == 0.1
    )
    assert config.reward_model.d_model == 4096 and config.model.dropout == 0.2
    adam = config.stages.sft.optimizer.policy
    assert (adam.b1, adam.b2, adam.schedule, adam.warmup) == (0.9, 0.95, 'cosine', 0)


@pytest.mark.sampled
@pytest.mark.parametrize('size,parameters', [('1b3', 1.316e9), ('6b', 6.658e9), ('175b', 174.6e9)])
def test_the_papers_sizes_build_to_shapes(size, parameters):
  """A whole PPO-ptx iteration at the paper's batch, traced without a byte of it."""
  c = PAPER[size].get_config()
  c.mesh.update(data=1, fsdp=2, tensor=4)
  plan = ppo_ptx.abstract_step(abstract.setup(c, jax.devices()), 'ppo_ptx')
  state, _, (prompts, _, ptx), _ = plan.arguments
  assert count(state.params['policy']) == pytest.approx(parameters, rel=0.01)
  assert prompts.shape == (512, 1024) and ptx.tokens.shape == (512 * 8, 2048)
  after, metrics, out = jax.eval_shape(plan.step, *plan.arguments)
  assert jax.tree.map(
    lambda a, b: a.shape == b.shape and a.dtype == b.dtype or pytest.fail(f'{a} {b}'), after, state
  )
  assert out.responses.shape == (512, 1024) and metrics['ppo/loss/ptx'].shape == ()


def test_configs_are_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  included = ROOT / 'alignjax/configs'
  for name in ('ppo_ptx', 'ppo_ptx.py', 'configs/ppo_ptx', 'configs/ppo_ptx.py'):
    assert configs.find(name) == included / 'ppo_ptx.py'
  assert configs.find(str(included / 'rm.py')) == included / 'rm.py'
  assert configs.find('../experiments/this_clone.py').samefile(ROOT / 'experiments/this_clone.py')
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs/sft.py').touch()
  assert configs.find('configs/sft.py') == pathlib.Path('configs/sft.py')
  assert configs.find('sft') == included / 'sft.py'


@pytest.mark.parametrize(
  'name', ['ppo_ptz', 'configs/ppo_ptz.py', '/nowhere/ppo_ptz.py', 'configs']
)
def test_a_config_that_is_not_there_is_an_error_with_the_nearest_names(name):
  with pytest.raises(ValueError, match=f'--config={name}: there is no such file') as error:
    configs.find(name)
  assert ('Did you mean ppo_ptx?' in str(error.value)) == ('ptz' in name)
  assert str(error.value).endswith(f'The included configs are {", ".join(configs.included())}.')


def test_every_included_config_is_listed_and_can_be_run():
  """What is not listed has no get_config that can be called without arguments."""
  made = {}
  for path in (ROOT / 'alignjax/configs').glob('*.py'):
    try:
      overrides.load(str(path), None)
    except ValueError as error:
      assert re.search("has no attribute 'get_config'|required positional arg", str(error)), error
    else:
      made[path.stem] = importlib.import_module(f'alignjax.configs.{path.stem}').__doc__
  assert configs.included() == {name: made[name].splitlines()[0] for name in sorted(made)}
  assert {'ppo_ptx', 'smollm2_135m'} <= made.keys() and 'recipe' not in made
  assert all(re.fullmatch('[A-Z].*[.]', line) for line in configs.included().values())
  assert all(len(line) <= 100 for line in command.listing(configs.included()).splitlines())


@pytest.mark.parametrize(
  'arguments,message',
  [
    (['--config.stages.ppo.iteration=3'], "Did you mean 'iterations'"),
    (['--config.seed=-1'], 'error: seed=-1 must be a whole number from 0 on'),
    (['--config.mesh.tensor=3'], 'error: mesh.fsdp=1 x mesh.tensor=3 does not divide'),
  ],
)
def test_a_users_mistake_ends_with_one_sentence(tmp_path, arguments, message):
  command = [
    sys.executable,
    str(ROOT / 'experiments/run.py'),
    '--config=configs/ppo_ptx.py:tiny',
    f'--workdir={tmp_path}',
  ]
  done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
  assert done.returncode == 1 and message in done.stderr and 'Traceback' not in done.stderr
