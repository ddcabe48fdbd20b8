"""Every entry of every config can be set by a flag, to what it may be and to None; what it may not
be is named in one line."""

import pathlib
import subprocess
import sys

import ml_collections
import pytest

from alignjax.commands import config_flags, overrides
from alignjax.configs import base, ppo_ptx, recipe, selected, smollm2_135m, truth_judge, ukp_rm

ROOT = pathlib.Path(__file__).resolve().parent.parent


def changed(*flags, config=None):
  c = config or ppo_ptx.get_config('tiny')
  c.lock()
  overrides.apply(c, [tuple(f.split('=', 1)) for f in flags])
  return c


@pytest.mark.parametrize(
  'flag,expected',
  [
    ('stages.ppo_ptx.kl.target=6.0', 6.0),
    ('stages.ppo_ptx.kl.target=6', 6),
    ('stages.ppo_ptx.ema_decay=0.992', 0.992),
    ('stages.ppo_ptx.loss.value_clip=0.2', 0.2),
    ('stages.ppo_ptx.rollout.generate_rows=16', 16),
    ('data.template=chat', 'chat'),
    ('data.mapping.prompts=', ''),
    ('mesh.data=2', 2),
    ('stages.sft.demonstrations=None', None),
    ('stages.sft.optimizer.policy.clip_norm=None', None),
    ('data.template=None', None),
    ('stages.sft.save_every=None', None),
    ('reward_model=None', None),
    ('stages.sft.loss=None', None),
    ('stages_to_run=None', None),
    ('seed=3', 3),
    ('stages.sft.demonstrations=1e2', 100),
    ('stages.sft.epochs=0.5', 0.5),
    ('stages.ppo.optimizer.policy.warmup=0.05', 0.05),
    ('stages.ppo.optimizer.policy.lr=1', 1.0),
    ('stages.ppo.kl.coef=1e-3', 0.001),
    ('data.pack=True', True),
    ('data.pack=false', False),
    ('stages.ppo.whiten_advantages=False', False),
    ("stages_to_run=('sft', 'rm')", ('sft', 'rm')),
    ("stages_to_run=['sft']", ('sft',)),
    ('stages_to_run=sft', ('sft',)),
    ('stages.rm.k_buckets=9', (9,)),
    ('stages.rm.row_lengths=()', ()),
    ('stages.rm.responses=(2, 4)', (2, 4)),
    ('stages.rm.responses[1]=5', (4, 5)),
    ('sharding.batch=None', None),
    ('data.prompts=jsonl:a=b.jsonl', 'jsonl:a=b.jsonl'),
    ('data.template="\'None\'"'.replace('"', ''), 'None'),
    ('stages.ppo.kl.coef=-0.5', -0.5),
    ('stages.ppo.loss.a_coefficient_with_a_default=2', 2),
    ('model.dtype=bfloat16', 'bfloat16'),
    ('model.remat=none', 'none'),
    ('reward_model.num_layers=3', 3),
    ('report.policies.mine=sft', 'sft'),
  ],
)
def test_a_flag_sets_an_entry(flag, expected):
  c = changed(flag)
  found = c
  for key in flag.split('=')[0].replace('[1]', '').split('.'):
    found = found[key]
  assert found == expected and type(found) is type(expected)
  assert c.is_locked


def test_a_dict_takes_the_place_of_a_whole_dict():
  c = changed(
    "stages.ppo.loss=dict(fn='mylab:dpo', beta=0.1, inner=dict(a=(1, -2)))",
    'stages.ppo.loss.beta=0.3',
    'report.policies={}',
    "model={'num_layers': 1}",
  )
  assert c.stages.ppo.loss.to_dict() == {'fn': 'mylab:dpo', 'beta': 0.3, 'inner': {'a': (1, -2)}}
  assert c.report.policies.to_dict() == {} and c.model.to_dict() == {'num_layers': 1}
  assert (
    changed('stages.rm.policies[1].temperature=0.7').stages.rm.policies[1]['temperature'] == 0.7
  )


@pytest.mark.parametrize(
  'flag,words',
  [
    ('stages.ppo.iteration=3', "no entry stages.ppo.iteration. Did you mean 'iterations'?"),
    ('coef=3', 'Did you mean stages.ppo.kl.coef'),
    ('data.zzz=1', 'data has comparisons, demonstrations'),
    ('seed.x=1', 'seed=0 has no entries of its own'),
    ('seed=a', 'seed is a whole number or None'),
    ('seed=1.5', 'seed is a whole number or None, not 1.5'),
    ('seed=True', 'not True'),
    ('seed=', 'seed is a whole number'),
    ('seed=1e999', 'not inf'),
    ('stages.ppo.kl.coef=1' + '0' * 400, 'a number or None'),
    ('data.pack=1', 'True or False or None, not 1'),
    ('stages.ppo.kl.coef=high', 'a number or None'),
    ("stages.ppo.kl.coef='0.1'", 'a number or None'),
    ("stages.rm.k_buckets=('a',)", 'a tuple such as (5, 7, 9) or None'),
    ('stages.rm.k_buckets={}', 'a tuple'),
    ('stages.ppo.loss=dict(3)', 'a dict or None'),
    ('stages.ppo.loss=__import__("os").getcwd()', 'a value is a literal'),
    ('stages.ppo.loss={1: 2}', 'a dict'),
    ('stages.rm.responses[2]=5', 'has 2 items'),
    ('seed[0]=1', 'is not a list'),
    ('=3', 'must have a name'),
    ('stages.ppo.kl.coef=' + '(' * 5000, 'a number'),
  ],
)
def test_what_an_entry_cannot_be_is_named(flag, words):
  with pytest.raises(ValueError) as error:
    changed(flag)
  assert f'--config.{flag}'[:60] in str(error.value) and words in str(error.value)


def test_a_flag_that_a_later_one_would_undo_is_refused():
  with pytest.raises(ValueError, match='put it first'):
    changed('stages.ppo.loss.clip_eps=0.1', "stages.ppo.loss=dict(fn='a:b')")


def entries(node, path=()):
  for key in node:
    if isinstance(node[key], ml_collections.ConfigDict):
      yield from entries(node[key], (*path, key))
    else:
      yield (*path, key)


@pytest.mark.parametrize(
  'make',
  [
    base.get_config,
    lambda: selected.get_config('tiny'),
    lambda: smollm2_135m.get_config('tiny'),
    truth_judge.get_config,
    lambda: ukp_rm.get_config('smollm2'),
  ],
)
def test_a_flag_changes_one_entry_alone(make):
  """None, and back to what it was: of every entry, and no other entry follows, but for those that a
  config derives."""
  c = make().lock()
  before = c.to_dict()
  flat = {path: value for path, value in ((p, _get(before, p)) for p in entries(c))}
  for path, value in flat.items():
    fresh = make().lock()
    overrides.apply(fresh, [('.'.join(path), 'None')])
    now = fresh.to_dict()
    followed = {p for p in flat if p != path and _get(now, p) != flat[p]}
    assert _get(now, path) is None
    assert not followed or path in (('seed',), ('checkpoint',)), (path, followed)
    if value is not None:
      overrides.apply(fresh, [('.'.join(path), value if isinstance(value, str) else repr(value))])
      assert fresh.to_dict() == before, path


def _get(tree, path):
  for key in path:
    tree = tree[key]
  return tree


def test_what_follows_another_entry_still_does():
  c = changed('checkpoint=hf:mine', config=smollm2_135m.get_config('tiny'))
  assert c.data.tokenizer == c.model.source == c.stages.sft.init.policy == 'hf:mine'
  c = changed('data.tokenizer=hf:other', config=c)
  assert (c.data.tokenizer, c.checkpoint, c.model.source) == ('hf:other', 'hf:mine', 'hf:mine')
  assert changed('seed=4').world.seed == 4


def test_the_words_of_a_command_line(tmp_path, monkeypatch):
  found = config_flags.read_config(
    [
      '--config',
      'configs/ppo_ptx.py:tiny',
      '--config.seed',
      '-1',
      '--config.data.pack',
      '--workdir=x',
      '--noconfig.stages.ppo.whiten_advantages',
      '-config.mesh.data=2',
      '--',
      '--config.seed=7',
    ]
  )
  c = found.config
  assert (c.seed, c.data.pack, c.stages.ppo.whiten_advantages, c.mesh.data) == (-1, True, False, 2)
  assert found.name == 'ppo_ptx-tiny' and found.rest[1:] == ['--workdir=x', '--', '--config.seed=7']
  (tmp_path / 'flags').write_text('--config.seed=9\n')
  assert (
    config_flags.read_config(
      ['--config=configs/sft.py', f'--flagfile={tmp_path}/flags']
    ).config.seed
    == 9
  )
  with pytest.raises(ValueError, match='--config=NAME'):
    config_flags.read_config(['--workdir=x'])
  assert config_flags.read_config(['--help']).config is None


@pytest.mark.parametrize(
  'name', sorted(p.name for p in (ROOT / 'experiments/configs').glob('[a-z]*.py'))
)
def test_a_wrong_argument_of_a_config_is_one_line(name, tmp_path):
  if name == 'recipe.py' or name == 'instructgpt.py':
    return  # what other configs share
  with pytest.raises(ValueError) as error:
    config_flags.read_config([f'--config=configs/{name}:tinyy'])
  assert 'tinyy' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
  'text,words',
  [
    ('def get_config(:', r'SyntaxError: .*line 1\)'),
    ('import nowhere', "ModuleNotFoundError: No module named 'nowhere' .*line 1"),
    ('def get_config():\n  return 3', 'returns int'),
    ('x = 1', 'has no attribute'),
    ('def get_config():\n  return 1 / 0', r'ZeroDivisionError.*line 2\)'),
  ],
)
def test_a_config_that_cannot_be_read_is_one_line(tmp_path, text, words):
  path = tmp_path / 'c.py'
  path.write_text(text)
  with pytest.raises(ValueError, match=words) as error:
    config_flags.read_config([f'--config={path}'])
  assert '\n' not in str(error.value)
  assert recipe.check_size('tiny') is None


def test_every_command_that_takes_a_config_takes_these_flags(tmp_path):
  for name in ('estimate', 'heldout_labelers'):
    command_line = [
      sys.executable,
      str(ROOT / f'experiments/{name}.py'),
      '--config=configs/sft.py:tiny',
      '--config.data.pack=3',
    ]
    done = subprocess.run(command_line, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith(
      'error: --config.data.pack=3: data.pack is True or False'
    )
