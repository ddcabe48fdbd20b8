"""The main job in miniature: it ends with a report; stopped anywhere, it goes on and ends with the
same bits."""

import functools
import json
import os
import pathlib
import re
import shutil
import signal

import jax
import nbclient
import nbformat
import numpy as np
import pytest
from ml_collections import ConfigDict

from alignjax import train
from alignjax.commands import generate
from alignjax.configs import ppo_ptx
from alignjax.runtime import checkpoint, saved_config
from alignjax.setup.objects import make_setup

ROOT = pathlib.Path(__file__).resolve().parent.parent
READ: set[str] = set()


@pytest.fixture(scope='module')
def patch():
  with pytest.MonkeyPatch.context() as m:
    one = jax.devices()[:1]
    m.setattr(jax, 'devices', lambda *_: one)  # as on a laptop
    yield m


def config(**changes):
  c = ppo_ptx.get_config('tiny')
  bigger = ppo_ptx.get_config('bigger')
  c.stages.pretrain_bigger = c.stages.pretrain.copy_and_resolve_references()
  c.stages.pretrain_bigger.model = dict(num_layers=2)
  c.stages_to_run, c.report.policies = bigger.stages_to_run, bigger.report.policies
  c.update_from_flattened_dict(changes)
  return c.lock()


@pytest.fixture(scope='module')
def finished(patch, tmp_path_factory):
  """WORKDIR of a whole tiny run, with the names of all config entries that it read in READ."""
  get, attribute = ConfigDict.__getitem__, ConfigDict.__getattr__

  def read_item(self, key):
    READ.add(key)
    return get(self, key)

  def read_attribute(self, key):
    READ.add(key)
    return attribute(self, key)

  workdir = tmp_path_factory.mktemp('run')
  with pytest.MonkeyPatch.context() as m:
    m.setattr(ConfigDict, '__getitem__', read_item)
    m.setattr(ConfigDict, '__getattr__', read_attribute)
    train.main(config(), workdir)
  return workdir


@pytest.mark.slow
def test_generate_answers_of_the_main_jobs_result_with_its_defaults(finished, capsys):
  """Of 20 tokens at most, as in training: the context of 96 has no room for 128."""
  generate.main([f'--model={finished}/ppo_ptx', '--prompt=what is red ?', '--temperature=0'])
  assert len(capsys.readouterr().out.split()) <= 20


@pytest.mark.slow
def test_the_notebook_runs_on_a_finished_run(finished, monkeypatch):
  """examples/sandbox.ipynb: every cell, in a kernel of its own; it leaves the workdir as it was."""
  monkeypatch.setenv('PYTHONPATH', str(ROOT), prepend=os.pathsep)
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', jax.config.jax_compilation_cache_dir)
  notebook = nbformat.read(ROOT / 'examples' / 'sandbox.ipynb', 4)
  first = next(cell for cell in notebook.cells if cell.cell_type == 'code')
  assert first.source.count("'../runs/ppo_ptx-s0'") == 1
  first.source = first.source.replace('../runs/ppo_ptx-s0', str(finished))
  before = {p: p.stat().st_mtime_ns for p in finished.rglob('*')}
  nbclient.NotebookClient(notebook, timeout=300).execute()
  assert {p: p.stat().st_mtime_ns for p in finished.rglob('*')} == before
  outputs = [out for cell in notebook.cells for out in cell.get('outputs', ())]
  assert any('image/png' in out.get('data', {}) for out in outputs)
  text = ''.join(out.text for out in outputs if out.output_type == 'stream')
  for judge in ('reward model', 'gold, training labelers', 'gold, held-out labelers'):
    figure = r'-?\d+\.\d\d  \[-?\d+\.\d\d, -?\d+\.\d\d\]\n'
    assert re.search(rf'{judge}\n  SFT +{figure}  PPO-ptx +{figure}', text)
  assert re.search(r'KL of PPO-ptx on the test prompts: \d+\.\d\d nats', text)


@pytest.mark.slow
def test_the_report_has_every_figure(finished):
  report = json.loads((finished / 'report.json').read_text())
  assert list(report['policies']) and set(report['policies']) == {
    'pretrained',
    'pretrained_prompted',
    'sft',
    'ppo',
    'ppo_ptx',
    'pretrained_bigger',
  }
  for name, policy in report['policies'].items():
    names = {
      'win_rate_train_labelers',
      'win_rate_heldout_labelers',
      'gold_train_labelers',
      'truthful',
      'toxic',
    }
    if name != 'pretrained_prompted':
      names |= {'reading_comprehension', 'translation', 'pretraining_loss'}
    if name not in ('pretrained_prompted', 'pretrained_bigger'):
      names |= {'kl'}
    assert names <= set(policy)
    for figure in policy.values():
      low, high = figure['ci95']
      assert low <= figure['mean'] + 1e-9 and figure['mean'] <= high + 1e-9 and figure['n'] > 0
  assert report['policies']['sft']['win_rate_train_labelers']['mean'] == 0.5
  assert report['policies']['sft']['kl']['mean'] == pytest.approx(0, abs=1e-5)
  assert 0 < report['reward_model']['accuracy_train_labelers']['mean'] < 1
  assert set(report['seconds']) == {
    'pretrain',
    'pretrain_bigger',
    'sft',
    'rm',
    'ppo',
    'ppo_ptx',
    'report',
  }
  assert {'jax', 'flax', 'python'} <= set(report['versions'])
  for name in ('reward_against_kl', 'alignment_tax', 'learning_curves'):
    assert (finished / f'{name}.png').stat().st_size > 5000
  text = (finished / 'report.md').read_text()
  assert 'PPO-ptx is preferred to SFT' in text and '| SFT |' in text and '## Samples' in text
  assert list(report['policies'])[:5] == [
    'pretrained',
    'pretrained_prompted',
    'sft',
    'ppo',
    'ppo_ptx',
  ], 'as in the pipeline'
  assert {f['held'] for f in report['findings'].values()} <= {'yes', 'no', 'not shown'} and len(
    report['findings']
  ) == 8
  assert report['made_by']['config']['seed'] == report['seed']
  assert all(s['responses'].keys() == report['policies'].keys() for s in report['samples'])


@pytest.mark.slow
def test_a_table_of_several_runs(finished, tmp_path, capsys):
  from alignjax.commands import summarize

  def other(name, **changes):
    report = json.loads((finished / 'report.json').read_text())
    report['seed'] = report['config']['seed'] = report['config']['world']['seed'] = 1
    report['config']['stages']['sft'] |= changes
    (tmp_path / name).mkdir()
    (tmp_path / name / 'report.json').write_text(json.dumps(report))
    return str(tmp_path / name)

  second = other('second')
  summarize.main([str(finished), second])
  out = capsys.readouterr().out
  assert '| SFT | 0.50 (0.50 to 0.50) |' in out and ' of 2 |' in out and 'Seeds 0, 1' in out
  with pytest.raises(SystemExit, match='are both of seed 1'):
    summarize.main([str(finished), second, other('copy')])
  with pytest.raises(SystemExit, match='second/ is named twice'):
    summarize.main([str(finished), second, f'{second}/'])
  with pytest.raises(SystemExit, match=r'different configs.*\n  stages.sft.epochs: 3, 16'):
    summarize.main([str(finished), other('longer', epochs=16)])
  with pytest.raises(SystemExit, match='no report in'):
    summarize.main([str(finished / 'sft')])


@pytest.mark.slow
def test_what_was_logged(finished):
  from alignjax.runtime import metrics

  for stage in ('ppo', 'ppo_ptx'):
    log = metrics.read(finished / stage / 'metrics.jsonl')
    assert (log['ppo/ratio_max_dev'] == 0).all(), (
      'docs/pitfalls.md, 8: exactly 1 at every first minibatch'
    )
    assert log['objective/kl'][0] == pytest.approx(0, abs=1e-5) and len(log['step']) == 6
    assert ('ppo/loss/ptx' in log) == (stage == 'ppo_ptx')
  assert metrics.read(finished / 'pretrain' / 'metrics.jsonl')['sft/loss'][-1] < 3.0
  assert (finished / 'ppo_ptx' / 'samples.jsonl').exists()
  documented = (pathlib.Path(__file__).parent.parent / 'docs/metrics.md').read_text()
  stages = ('pretrain', 'sft', 'rm', 'ppo', 'ppo_ptx')
  logged = {name for stage in stages for name in metrics.read(finished / stage / 'metrics.jsonl')}
  missing = [
    name
    for name in logged
    if not name.startswith(('time/', 'step')) and f'`{name}`' not in documented
  ]
  assert not missing, f'docs/metrics.md explains every metric; not {missing}'


@pytest.mark.slow
def test_a_report_keeps_what_holds_and_nothing_else(finished, patch, tmp_path, capsys):
  """Kept by weights and protocol: another policy under the same name, or other prompts, is measured
  anew, the rest reused."""
  from alignjax import report

  workdir = tmp_path / 'w'
  shutil.copytree(finished, workdir)
  policies = ConfigDict(dict(sft='sft', ppo='ppo'))
  c = config(stages_to_run=('ppo',), **{'report.policies': policies})
  old = json.loads((finished / 'report.json').read_text())['policies']
  capsys.readouterr()
  kept = {p.name for p in (workdir / 'report').iterdir()}
  train.main(c, workdir)
  out = capsys.readouterr().out
  assert out.count('was measured before, reused') == 2
  assert {p.name for p in (workdir / 'report').iterdir()} <= kept and len(
    list((workdir / 'report').glob('*.npz'))
  ) == 2
  assert json.loads((workdir / 'report.json').read_text())['policies']['ppo'] == old['ppo']
  measured = []
  real = report.evaluation.measure

  @functools.wraps(real)  # so that its source is that of the real one
  def measure(*args):
    measured.append(1)
    return real(*args)

  patch_measure = pytest.MonkeyPatch()
  patch_measure.setattr(report.evaluation, 'measure', measure)
  shutil.rmtree(workdir / 'ppo/final')  # another policy in the place of the old one
  shutil.copytree(workdir / 'ppo_ptx/final', workdir / 'ppo/final')
  setup = make_setup(c, workdir)
  report.build(setup)
  assert 'report: sft was measured before' in capsys.readouterr().out and len(measured) == 1
  new = json.loads((workdir / 'report.json').read_text())['policies']
  assert new['sft'] == old['sft'] and new['ppo'] == old['ppo_ptx'] != old['ppo']
  (path,) = (workdir / 'report').glob('ppo-*.npz')
  raw = path.read_bytes()
  path.write_bytes(
    raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]
  )
  report.build(setup)
  assert f'{path} is damaged, measured again' in capsys.readouterr().out
  assert json.loads((workdir / 'report.json').read_text())['policies'] == new
  fewer = make_setup(
    config(stages_to_run=('ppo',), **{'report.policies': policies, 'report.win_prompts': 16}),
    workdir,
  )
  report.build(fewer)
  assert (
    json.loads((workdir / 'report.json').read_text())['policies']['ppo']['win_rate_train_labelers'][
      'n'
    ]
    == 16
  )
  assert len(measured) == 4 and len(list((workdir / 'report').glob('*.npz'))) == 2
  patch_measure.undo()


@pytest.mark.slow
def test_comparisons_of_another_policy_are_not_used(finished, patch, tmp_path, capsys):
  from alignjax.stages import comparisons

  shutil.copytree(finished, tmp_path / 'w')
  path = tmp_path / 'w/rm/comparisons.json'
  before = path.read_bytes()
  setup = make_setup(config(), tmp_path / 'w')
  first = comparisons.training(setup, 'rm')
  assert 'made again' not in capsys.readouterr().out and setup.read['stage:sft'] == (
    'weights',
    'stage:sft',
  )
  path.write_bytes(before.replace(b'[[', b'[[7, ', 1))
  assert comparisons.training(setup, 'rm') == first and path.read_bytes() == before
  assert 'comparisons.json is damaged: the comparisons are made again' in capsys.readouterr().out
  shutil.rmtree(tmp_path / 'w/sft/final')
  shutil.copytree(finished / 'ppo/final', tmp_path / 'w/sft/final')
  assert comparisons.training(setup, 'rm') != first
  assert 'was made from other policies' in capsys.readouterr().out


@pytest.mark.slow
def test_label_noise_makes_a_share_of_the_rankings_random(finished, tmp_path, capsys):
  from alignjax.stages import comparisons

  shutil.copytree(finished, tmp_path / 'w')
  (before, half, all_of_it) = (
    comparisons.training(
      make_setup(config(**{'stages.rm.label_noise': noise}), tmp_path / 'w'), 'rm'
    )
    for noise in (0.0, 0.5, 1.0)
  )
  assert capsys.readouterr().out.count('was made from other policies or settings') == 2
  kept = {
    tuple(map(tuple, r)): ranks for r, ranks in zip(before.responses, before.ranks, strict=True)
  }

  def share_of_same(data):
    pairs = [
      (kept[key], ranks)
      for r, ranks in zip(data.responses, data.ranks, strict=True)
      if (key := tuple(map(tuple, r))) in kept
    ]
    assert all(sorted(ranks) == list(range(len(ranks))) for a, ranks in pairs if a != ranks)
    return np.mean([a == b for a, b in pairs])

  # Of K responses in random order, 1 / K! have the order of the labeler, with K from 4 to 9.
  assert share_of_same(all_of_it) < 0.1 and 0.3 < share_of_same(half) < 0.7


@pytest.mark.slow
def test_demonstrations_score_0_after_the_bias(finished):
  """Paper 3.5: recompute the mean score of the very demonstrations from the saved reward model."""
  from alignjax.inference import bulk
  from alignjax.setup.records import records
  from alignjax.setup.weights import initial_params

  setup = make_setup(config(), finished)
  params = initial_params(setup, 'stage:rm', 'scalar', 0)
  score = bulk.make_scorer(setup.nets, setup.sharder, length=setup.length, pad=0)
  rows = [
    setup.text.template.prompt(r['prompt']) + setup.text.template.response(r['response'])
    for r in records(setup, 'demonstrations', config().stages.rm.bias_demonstrations)
  ]
  assert score(params, rows).mean() == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_item_16_every_entry_of_the_config_is_read(finished):
  def leaves(tree, path=()):
    for key, value in tree.items():
      if (
        isinstance(value, dict)
        and value
        and 'fn' not in value
        and key not in ('model', 'sharding', 'mesh', 'optimizer')
      ):
        yield from leaves(value, (*path, key))
      elif 'fn' not in path:
        yield (*path, key)

  unread = ['.'.join(path) for path in leaves(config().to_dict()) if path[-1] not in READ]
  assert not unread, f'entries that nothing reads: {unread}'


def params_of(workdir, stage):
  setup = make_setup(config(), workdir)
  from alignjax.setup.weights import initial_params

  return initial_params(setup, f'stage:{stage}', 'lm', 0)


def stopped_at(patch, stage_step, action):
  """Runs `action` inside the given call of a stage's step."""
  calls = []
  real = train.loop

  def loop(stage, *args):
    def step(state, batch):
      calls.append(1)
      if len(calls) == stage_step:
        action()
      return stage.step(state, batch)

    return real(stage._replace(step=step), *args)

  patch.setattr(train, 'loop', loop)
  return real


class Killed(BaseException):
  pass


def kill():
  raise Killed


def terminate():
  os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize(
  'stage,at,how', [('sft', 13, 'kill'), ('ppo_ptx', 4, 'kill'), ('ppo_ptx', 3, 'SIGTERM')]
)
def test_item_23_a_stopped_run_ends_with_the_same_bits(finished, patch, tmp_path, stage, at, how):
  """sft step 13 lies in the second epoch; ppo_ptx saves every 2 of 6 iterations."""
  for needed in ('pretrain', 'sft', 'rm'):
    if needed != stage:
      shutil.copytree(finished / needed, tmp_path / needed)
  changes = {
    'stages_to_run': (stage,),
    f'stages.{stage}.save_every': 2,
    'report.policies': ConfigDict(),
  }
  real = stopped_at(patch, at, kill if how == 'kill' else terminate)
  try:
    if how == 'kill':
      with pytest.raises(Killed):
        train.main(config(**changes), tmp_path)
    else:
      with pytest.raises(SystemExit) as error:
        train.main(config(**changes), tmp_path)
      assert error.value.code == 75
  finally:
    patch.setattr(train, 'loop', real)
  assert not checkpoint.is_finished(tmp_path / stage / 'final')
  train.main(config(**changes), tmp_path)
  assert checkpoint.same(params_of(tmp_path, stage), params_of(finished, stage))
  lines = [
    [
      {k: v for k, v in json.loads(x).items() if not k.startswith('time/')}
      for x in (folder / stage / 'metrics.jsonl').read_text().splitlines()
    ]
    for folder in (tmp_path, finished)
  ]
  assert lines[0] == lines[1]


@pytest.mark.slow
def test_a_reward_model_of_another_size_trains_and_rewards(patch, tmp_path):
  """Paper 3.5: the 6B reward model serves every policy size. Its trunk comes from stages of its own
  size."""
  size = dict(num_layers=2, d_model=16, num_heads=2, embedding_scale=2.0)
  c = ppo_ptx.get_config('tiny')
  c.reward_model = {**c.model.to_dict(), **size}
  for stage in ('pretrain', 'sft'):
    c.stages[f'{stage}_rm'] = c.stages[stage].copy_and_resolve_references()
    c.stages[f'{stage}_rm'].model = size
  c.stages.sft_rm.init.policy, c.stages.rm.init.reward = 'stage:pretrain_rm', 'stage:sft_rm'
  c.stages_to_run, c.report.policies = ('ppo_ptx',), ConfigDict()
  small = {
    'stages.pretrain.documents': 300,
    'stages.pretrain_rm.documents': 300,
    'stages.sft.demonstrations': 32,
    'stages.sft_rm.demonstrations': 32,
    'stages.rm.prompts': 40,
    'stages.rm.bias_demonstrations': 16,
    'stages.ppo_ptx.iterations': 2,
    'stages.ppo_ptx.optimizer.policy.warmup': 4,
    'stages.ppo_ptx.ptx.documents': 300,
  }
  c.update_from_flattened_dict(small)
  train.main(c, tmp_path)
  setup = make_setup(c, tmp_path)
  from alignjax.runtime import metrics
  from alignjax.setup.weights import initial_params

  assert initial_params(setup, 'stage:rm', 'scalar', 0)['embed']['tokens'].shape[1] == 16
  assert initial_params(setup, 'stage:ppo_ptx', 'lm', 0)['embed']['tokens'].shape[1] == 32
  log = metrics.read(tmp_path / 'ppo_ptx' / 'metrics.jsonl')
  assert (log['ppo/ratio_max_dev'] == 0).all() and np.isfinite(log['objective/scores']).all()
  with pytest.raises(
    ValueError, match=r'weights of another model: .*\(.*16\) on disk.*32\) in the model'
  ):
    initial_params(setup, 'stage:sft_rm', 'lm', 0)


@pytest.mark.slow
def test_kill_9_of_the_real_process_loses_nothing(capsys):
  """A sample of tests/kills.py, which can do a hundred at every stage: four of two short stages, in
  real processes, of which some are to fall into a save and into the writing of a result."""
  import kills

  small = [
    '--config.stages.pretrain.documents=600',
    '--config.stages.pretrain.save_every=3',
    '--config.stages.sft.demonstrations=32',
  ]
  assert (
    kills.main(
      [
        '--kills=4',
        '--stages=pretrain,sft',
        '--moments=save,final',
        '--config=configs/sft.py:tiny',
        *small,
      ]
    )
    == 0
  )
  table = capsys.readouterr().out.split('| killed in |')[1]
  cells = np.array(
    [
      [int(x) for x in line.split('|')[2:-1]]
      for line in table.splitlines()[2:]
      if line.startswith('|')
    ]
  )
  assert cells.sum() == 4 and cells[:, 1:3].sum() >= 2, table


@pytest.mark.slow
def test_finished_stages_are_reused_and_another_config_is_refused(finished, patch, capsys):
  before = (finished / 'sft' / 'final' / 'info.json').stat().st_mtime
  train.main(config(stages_to_run=('sft',), **{'report.policies': ConfigDict()}), finished)
  assert 'sft: finished before, reused' in capsys.readouterr().out
  assert (finished / 'sft' / 'final' / 'info.json').stat().st_mtime == before
  with pytest.raises(saved_config.Mismatch, match='model.d_model: 32 -> 64'):
    train.main(config(stages_to_run=('sft',), **{'model.d_model': 64}), finished)


@pytest.mark.parametrize(
  'changes,words',
  [
    ({'stages.ppo.minibatches': 5}, '32 does not divide by 5'),
    ({'stages.ppo.microbatches': 3}, 'does not divide by 3'),
    ({'stages.ppo.rollout.score_rows': 3}, 'by score_rows: 32 does not divide by 3'),
    (
      {'stages.ppo.packed_rows': (0.5,), 'stages.ppo.rollout.score_rows': 16},
      'score_rows=16 does not go with stages.ppo.packed_rows: scoring has to pack the same 8 rows',
    ),
    (
      {
        'stages.ppo_ptx.packed_rows': (0.5,),
        'stages.ppo_ptx.ptx.rows_per_episode': 1,
        'data.row_length': 44,
      },
      'packed_rows cannot tell the 8 pretraining rows of 44 tokens from the episodes',
    ),
    (
      {'stages.rm.packed_rows': (0.5, 1.5)},
      'stages.rm.packed_rows=.* must be a tuple of numbers above 0 and below 1',
    ),
    ({'stages.ppo.rollout.temperature': 0.0}, 'temperature'),
    ({'stages.ppo.kl.target': 6.0}, 'target and horizon'),
    (
      {'stages.ppo.kl.target': 6.0, 'stages.ppo.kl.horizon': 3, 'stages.ppo.rollout.episodes': 16},
      r'stages.ppo.kl.horizon=3 would let one iteration of 16 episodes .* above 3.2',
    ),
    ({'stages.rm.policies': ()}, 'stages.rm.policies is empty'),
    (
      {'stages.rm.policies': (dict(init='stage:sft', temperature=-1.0, share=1.0),)},
      r'stages.rm.policies\[0\].temperature=-1.0 must be a number, 0 or more',
    ),
    (
      {'stages.rm.policies': (dict(init='stage:sft', temperature=1.0),)},
      r'stages.rm.policies\[0\]=.* must have init, temperature and share',
    ),
    ({'stages.ppo.loss.ptx_coef': 1.0}, 'rows_per_episode'),
    ({'stages.ppo.keep': 'ema'}, 'ema_decay'),
    ({'stages.ppo.loss.fn': 'alignjax.losses:ppoo'}, 'stages.ppo.loss.fn'),
    ({'stages.ppo.reward.fn': 'nowhere:reward'}, "no module named 'nowhere'"),
    ({'stages.rm.optimizer.reward.schedule': 'linear'}, 'linear'),
    ({'stages.rm.responses': (4, 12)}, 'k_buckets'),
    ({'stages.sft.pretrain_mix': 1.0}, 'no demonstration'),
    ({'stages.ppo.build': 'alignjax.stages.ppo_ptx:biuld'}, 'did you mean build'),
  ],
)
def test_settings_that_do_not_fit_fail_before_anything_is_loaded(patch, tmp_path, changes, words):
  with pytest.raises(ValueError, match=words):
    train.main(config(**changes), tmp_path)
  assert not list(tmp_path.iterdir()), 'no stage has run'


@pytest.mark.parametrize(
  'changes,words',
  [
    ({'model.num_heads': 5}, 'num_heads=5'),
    ({'model.max_length': 32}, 'max_length=32'),
    ({'mesh.tensor': 3}, 'does not divide'),
    ({'data.tokenizer': '/nowhere'}, 'nowhere'),
  ],
)
def test_a_setup_that_cannot_be_is_refused(patch, tmp_path, changes, words):
  with pytest.raises(Exception, match=words):
    make_setup(config(**changes), tmp_path)


def test_item_9_a_cut_distribution_is_refused(patch, tmp_path):
  c = ppo_ptx.get_config('tiny')
  c.stages.ppo_ptx.rollout.top_p = 0.9
  with pytest.raises(ValueError, match='rollout.top_p=0.9 is refused'):
    train.main(c, tmp_path)


def test_wrong_stages(patch, tmp_path):
  with pytest.raises(ValueError, match="'dpo' is not in config.stages"):
    train.resolve(config(stages_to_run=('dpo',)))
  with pytest.raises(ValueError, match='circle:.* sft -> sft'):
    train.resolve(config(**{'stages.sft.init.policy': 'stage:sft'}))
  assert train.resolve(ppo_ptx.get_config()) == ['pretrain', 'sft', 'rm', 'ppo', 'ppo_ptx']
  setup = make_setup(config(), tmp_path)
  from alignjax.setup.weights import initial_params

  with pytest.raises(FileNotFoundError, match='stage:NAME'):
    initial_params(setup, 'stage:sft', 'lm', 0)


def test_an_unknown_model_field_is_named(patch, tmp_path):
  c = ppo_ptx.get_config('tiny')
  c.model.d_modle = 3
  with pytest.raises(ValueError, match="model.d_modle.*Did you mean 'd_model'"):
    make_setup(c, tmp_path)
  assert np.isfinite(0)
