"""Averages of models: by hand, and as a stage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import train
from alignjax.configs import ppo_ptx, reward_ensemble
from alignjax.models import transformer
from alignjax.runtime import checkpoint
from alignjax.setup.objects import make_setup
from alignjax.stages import average
from tests.fakes import close


def trees(*seeds):
  """{'layers': {'w' [2,3,4]}, 'final' [3]} for each seed."""
  out = []
  for seed in seeds:
    rng = np.random.default_rng(seed)
    out.append(
      {
        'layers': {'w': jnp.float32(rng.standard_normal((2, 3, 4)))},
        'final': jnp.float32(rng.standard_normal(3)),
      }
    )
  return out


def test_linear():
  one, two, three = trees(0, 1, 2)
  close(
    average.linear([one, two, three])['final'], (one['final'] + two['final'] + three['final']) / 3
  )
  found = average.linear([one, two], weights=(1.5, -0.5))
  close(found['layers']['w'], 1.5 * one['layers']['w'] - 0.5 * two['layers']['w'])
  for weights in ((0.5, 0.4), (1.0,)):
    with pytest.raises(ValueError, match='must be 2 numbers, one for each member, with the sum 1'):
      average.linear([one, two], weights=weights)


def by_hand(first, one, other, share, towards):
  """The formula of the paper in float64, with its own angle for each layer."""
  first, one, other = (np.asarray(x, np.float64) for x in (first, one, other))
  d1, d2 = (one - first).ravel(), (other - first).ravel()
  angle = np.arccos(d1 @ d2 / np.linalg.norm(d1) / np.linalg.norm(d2))
  change = (np.sin((1 - share) * angle) * d1 + np.sin(share * angle) * d2) / np.sin(angle)
  return first + (1 - towards) * change.reshape(first.shape)


@pytest.mark.parametrize('share,towards', [(0.5, 0.0), (0.2, 0.3)])
def test_slerp(share, towards):
  members = trees(0, 1, 2)
  found = average.slerp(members, share=share, towards_first=towards)
  close(found['final'], by_hand(*(m['final'] for m in members), share, towards), atol=1e-5)
  for i in range(2):
    wanted = by_hand(*(m['layers']['w'][i] for m in members), share, towards)
    close(found['layers']['w'][i], wanted, atol=1e-5)


def test_slerp_where_the_angle_says_nothing():
  """Equal changes, opposite ones, and no change at all."""
  first, one, _ = trees(0, 1, 2)
  opposite = jax.tree.map(lambda a, b: 2 * a - b, first, one)
  for other, share, wanted in ((one, 0.3, one), (opposite, 0.5, first), (first, 0.0, one)):
    found = average.slerp([first, one, other], share=share)
    jax.tree.map(lambda x, y: close(x, y, atol=1e-6), found, wanted)
  still = average.slerp([first, first, first])
  jax.tree.map(lambda x, y: close(x, y), still, first)
  long = average.slerp([{'x': jnp.zeros(2)}, {'x': jnp.eye(2)[0]}, {'x': jnp.eye(2)[1]}])
  close(long['x'], [0.5**0.5] * 2, atol=1e-6)  # The linear average has the length .71.
  with pytest.raises(ValueError, match='three members'):
    average.slerp([first, one])
  with pytest.raises(ValueError, match='share=2 and towards_first=0.0 must be between 0 and 1'):
    average.slerp([first, one, one], share=2)


def config(*members, **entries):
  c = ppo_ptx.get_config('tiny')
  c.stages = dict(average=reward_ensemble.average(*members, **entries))
  c.stages_to_run, c.report.policies, c.cpu_devices = ('average',), {}, None
  return c


def test_a_stage_averages_finished_models(tmp_path):
  setup = make_setup(config(), tmp_path, jax.devices()[:1])
  init = jax.jit(lambda key: transformer.init(setup.reward_model, key, 'scalar'))
  models = [init(jax.random.key(i)) for i in range(3)]
  names = [str(tmp_path / f'rm_{i}' / 'final') for i in range(3)]
  for name, params in zip(names, models, strict=True):
    checkpoint.save_params(name, params, dict(head='scalar'))
  train.main(config(*names, head='scalar'), tmp_path / 'run')
  final = tmp_path / 'run' / 'average' / 'final'
  assert checkpoint.load_info(final)['members'] == names
  kept = checkpoint.load_params(final, models[0])
  wanted = jax.tree.map(lambda *x: sum(np.float64(y) for y in x) / 3, *models)
  jax.tree.map(lambda x, y: close(x, y, atol=1e-6), kept, wanted)
  with pytest.raises(ValueError, match="head='lm', but its member .* has the head 'scalar'"):
    train.main(config(*names), tmp_path / 'other')
  # It is made again where a member has changed.
  checkpoint.save_params(names[0], models[1], dict(head='scalar'))
  with pytest.raises(ValueError, match='rm_0'):
    train.main(config(*names, head='scalar'), tmp_path / 'run')


@pytest.mark.parametrize(
  'entries,message',
  [
    (dict(members=('a',)), r"stages.average.members=\('a',\) must name two models or more"),
    (dict(members=('a', 'random')), "members: 'a' must be 'stage:NAME'"),
    (dict(head='scalar'), "head='scalar', but its member .* has the head 'lm'"),
    (
      dict(merge=dict(fn='alignjax.stages.average:linear', weights=(float('nan'), 1))),
      'must be 2 numbers',
    ),
    (dict(head='value'), "stages.average.head='value' must be 'lm' or 'scalar'"),
    (
      dict(merge=dict(fn='alignjax.stages.average:linear', weights=(1,))),
      'stages.average.merge .* must be 2 numbers',
    ),
    (dict(merge=dict(fn='alignjax.stages.average:slerp')), 'three members'),
    (dict(merge=dict(fn='builtins:sum')), 'stages.average.merge'),
  ],
)
def test_entries_that_cannot_be(entries, message, tmp_path):
  names = [str(tmp_path / name / 'final') for name in 'ab']
  for name in names:
    checkpoint.save_params(name, {'x': jnp.zeros(1)}, dict(head='lm'))
  c = config(*names)
  c.stages.average.update(entries)
  with pytest.raises(ValueError, match=message):
    train.main(c, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'average' / 'final').exists()
