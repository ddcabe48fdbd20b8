"""The studies of averaged policies and of reward models in ensembles."""

import argparse
import json

import jax
import numpy as np
import pytest

from alignjax.inference import loading
from alignjax.setup.objects import make_setup
from alignjax.setup.weights import initial_params
from alignjax.studies import averages, ensembles, methods, overoptimization, study


def trial_of(folder, seed=1):
  return study.Trial(seed, folder / f'seed-{seed}', True, argparse.Namespace())


def test_where_a_curve_first_reaches_a_value():
  x, y = [0.0, 1.0, 0.5, 3.0], [10.0, 20.0, 0.0, 25.0]
  assert study.where_reached(x, y, 0.5) == 15.0
  assert study.where_reached(x, y, 1.0) == 20.0
  assert study.where_reached(x, y, 2.0) == pytest.approx(25.0 * 1.5 / 2.5)
  assert study.where_reached(x, y, -1.0) == 10.0
  assert study.where_reached(x, y, 3.1) is None


def test_what_decides_rows_is_of_the_stages_that_make_them(tmp_path):
  trial = trial_of(tmp_path)

  def of(change=lambda c: None, stages=('rm',)):
    config = methods.config_of(trial)
    with config.unlocked(), config.ignore_type():
      change(config)
    return study.deciding(trial, config, stages)

  one = of()
  assert set(one['stages']) == {'pretrain', 'sft', 'rm'}
  assert 'seed' not in one and one['world'] == {}
  # A later version has an entry more, and another stage has another setting.
  assert one == of(lambda c: c.update(later_entry=1))
  assert one == of(lambda c: c.stages.ppo.kl.update(coef=0.7))
  assert one == of(lambda c: c.update(seed=7))
  assert one != of(lambda c: c.stages.sft.update(epochs=9))
  assert one != of(lambda c: c.data.update(row_length=32))
  at = of(lambda c: c.stages.rm.init.update(reward=str(trial.workdir / 'sft' / 'final')))
  assert at['stages']['rm']['init']['reward'] == 'WORKDIR/sft/final'
  assert set(of(stages=None)['stages']) > {'ppo', 'dpo', 'rloo'}


# ---- averages


def point(line, share, gold, loss, seed=1):
  return dict(
    seed=seed,
    line=line,
    share=share,
    gold_train_labelers=gold,
    pretraining_loss=loss,
    translation=1.0 - loss,
    reading_comprehension=0.5,
    win_rate_heldout_labelers=0.5,
    kl=share,
  )


def lines(seed=1, more=0.0):
  """PPO gains 1 of gold and 0.4 + more of loss; PPO-ptx gains half as much for a tenth of that."""
  rows = [point('sft', 0.0, 1.0, 0.2, seed)]
  for share in averages.SHARES:
    rows.append(point('ppo', share, 1.0 + share, 0.2 + (0.4 + more) * share**2, seed))
    rows.append(point('ppo_ptx', share, 1.0 + 0.6 * share, 0.2 + 0.04 * share, seed))
  return rows


def test_the_tax_at_equal_gold_by_hand():
  found = {(r['line'], r['level']): r for r in averages.at_equal_gold(lines())}
  # Three quarters of what PPO gains are 0.6 of 0.6 and more for PPO-ptx: never reached.
  assert set(found) == {('ppo', 0.5), ('ppo_ptx', 0.5), ('ppo', 0.75), ('ppo', 1.0)}
  assert found['ppo', 0.5]['pretraining_loss'] == pytest.approx(0.4 * 0.25)
  assert found['ppo', 1.0]['pretraining_loss'] == pytest.approx(0.4)
  assert found['ppo', 1.0]['translation'] == pytest.approx(0.4)  # What is lost is positive.
  # 0.5 of 0.6 is a share of 5/6, on a straight line.
  assert found['ppo_ptx', 0.5]['pretraining_loss'] == pytest.approx(0.04 * 5 / 6)
  assert averages.at_equal_gold([r for r in lines() if r['line'] != 'sft']) == []
  worse = [dict(r, gold_train_labelers=-r['gold_train_labelers']) for r in lines()]
  assert averages.at_equal_gold(worse) == []


def test_the_table_of_averages_counts_and_pairs(tmp_path):
  rows = [*lines(1), *lines(2, more=0.4)]
  text = averages.table(rows)
  cells = [line.strip('| ').split(' | ') for line in text.split('\n') if line.startswith('| ')]
  tax = {(c[0], c[1]): c[2:] for c in cells if c[0].endswith('%')}
  assert tax['50%', 'SFT to PPO'][0] == '2 of 2' and tax['100%', 'SFT to PPO-ptx'][0] == '0 of 2'
  # 0.1 and 0.2, less 0.0333 each.
  assert tax['50%', 'SFT to PPO'][1].startswith('0.15 [')
  assert tax['50%', 'SFT to PPO'][-1].startswith('0.12 [')
  assert cells[1][:3] == ['SFT', '0.00', '1.00 [1.00, 1.00]']
  averages.plot(rows, tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').read_bytes()[:4] == b'\x89PNG'


# ---- ensembles


def test_the_gain_at_equal_distance_by_hand(monkeypatch):
  monkeypatch.setattr(ensembles, 'WIDTH', 2)
  names = dict(seed=1, noise='clean', kind='labels', reward='one')
  rows = [
    dict(names, method='best_of_n', n=n, distance=0.0, gold=gold, proxy=0.0)
    for n, gold in ((1, 0.5), (4, 1.0), (8, 9.0), (16, 1.25))
  ]
  for distance, gold in ((0.0, 1.0), (0.0, 2.0), (0.0, 3.0), (1.0, 4.0), (3.0, 6.0), (3.0, 4.0)):
    rows.append(dict(names, method='ppo', n=None, distance=distance, gold=gold, proxy=0.0))
  (found,) = ensembles.gained(rows)
  # Moving means of two: distances 0, 0, 0.5, 2, 3 and gold less its start 2: -.5, .5, 1.5, 3, 3.
  assert found == names | {
    'n=4': 0.5,
    'n=16': 0.75,
    'd=1': pytest.approx(2.0),
    'd=2': pytest.approx(3.0),
    'd=3': pytest.approx(3.0),
    'd at the end': 3.0,
    'at the end': 3.0,
  }


def test_the_table_of_ensembles_compares_with_one_of_the_same_labels(tmp_path):
  rows = []
  for seed in (1, 2):
    for noise, base in (('clean', 0.0), ('noisy', 1.0)):
      for kind, reward, gain in (
        ('labels', 'one', 1.0),
        ('labels', 'mean_5', 2.0 + seed),
        ('order', 'mean_5', 0.5),
      ):
        names = dict(seed=seed, noise=noise, kind=kind, reward=reward, proxy=0.0)
        for n, gold in ((1, 0.0), (4, 0.0), (16, 0.0), (64, base + gain)):
          rows.append(dict(names, method='best_of_n', n=n, distance=float(n), gold=gold))
  text = ensembles.table(rows)
  assert 'By PPO' not in text
  cells = [line.strip('| ').split(' | ') for line in text.split('\n') if line.startswith('| ')][1:]
  assert [c[2] for c in cells] == ['one', 'mean of 5', 'mean of 5'] * 2
  assert cells[4][:2] == ['25% random rankings', 'responses and labels']
  # 1 + 3 and 1 + 4 less 1 + 1.
  assert cells[4][5].startswith('4.50 [') and cells[4][6].startswith('2.50 [')
  assert cells[5][6] == '-0.50 [-0.50, -0.50]'
  ensembles.plot(rows, tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').read_bytes()[:4] == b'\x89PNG'


def test_members_differ_in_what_their_kind_says(tmp_path):
  trial = trial_of(tmp_path)
  assert ensembles.parts(trial.options)[:2] == ['clean_labels', 'clean_order']
  config = ensembles.config_of(trial, 'noisy_labels')
  members = [name for name in config.stages if name.startswith('rm_few')]
  assert members[:2] == ['rm_few_noisy', 'rm_few_noisy_labels_2'] and len(members) == 5
  assert {config.stages[name].label_noise for name in members} == {0.25}
  roles = config.stages.ppo_mean_3_noisy_labels.init.to_dict()
  assert [roles[k] for k in ('reward', 'reward_2', 'reward_3')] == [
    f'stage:{m}' for m in members[:3]
  ]
  assert 'reward_4' not in roles
  assert config.stages.warm_5_noisy_labels.members == tuple(f'stage:{m}' for m in members)
  # The first member is that of another study, which may have trained it.
  other = overoptimization._config(trial, 'few_noisy').stages
  assert other.rm_few_noisy.to_dict() == config.stages.rm_few_noisy.to_dict()

  configs = [
    ensembles._of_pretraining(trial, 'clean_pretraining', member) for member in range(2, 6)
  ]
  assert len({c.seed for c in configs}) == 4 and trial.seed not in {c.seed for c in configs}
  assert {c.world.seed for c in configs} == {trial.seed}
  sft = str(trial.workdir / 'sft' / 'final')
  assert configs[0].stages.rm_few.policies[0]['init'] == sft
  assert configs[0].stages.rm_few.init.reward == 'stage:sft'

  one, two = (ensembles.protocol(trial_of(tmp_path, seed), 'clean_pretraining') for seed in (1, 2))
  assert one == two != ensembles.protocol(trial, 'noisy_pretraining')


@pytest.mark.slow
def test_studies_of_merges_train_what_they_say(tmp_path, monkeypatch):
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *_: one)
  monkeypatch.setattr(averages, 'SHARES', (0.5, 1.0))
  monkeypatch.setattr(averages, 'parts', lambda _: ['sft', 'ppo'])
  monkeypatch.setattr(ensembles, 'parts', lambda _: ['noisy_order'])
  monkeypatch.setitem(ensembles.POLICIES, 'order', ('warm_5',))
  options = argparse.Namespace()
  rows = study.run_study(averages, tmp_path, [1], True, options)
  assert [(r['line'], r['share']) for r in rows] == [('sft', 0.0), ('ppo', 0.5), ('ppo', 1.0)]
  trial = trial_of(tmp_path)
  setup = make_setup(averages.config_of(trial), trial.workdir)
  sft, ppo = (initial_params(setup, f'stage:{name}', 'lm', 0) for name in ('sft', 'ppo'))
  half = jax.tree.map(lambda a, b: (a + b) / 2, sft, ppo)
  for row, params in ((rows[1], half), (rows[2], ppo)):
    figures, _ = methods.measure(setup, params)
    for key in averages.MEASURED:
      assert row[key] == pytest.approx(figures[key]['mean'], abs=1e-5)

  rows = study.run_study(ensembles, tmp_path, [1], True, options)
  assert {(r['method'], r['reward']) for r in rows} >= {('best_of_n', 'warm_3'), ('ppo', 'warm_5')}
  folders = [trial.workdir / 'rm_few_noisy'] + [
    trial.workdir / f'rm_few_noisy_order_{i}' for i in range(2, 6)
  ]
  kept = [json.loads((f / 'comparisons.json').read_bytes())['comparisons'] for f in folders]
  assert all(found == kept[0] for found in kept)
  members = [loading.load(str(f), 'scalar').params for f in folders]
  scores = [np.asarray(jax.tree.leaves(m)[0]) for m in members]
  assert all(not np.array_equal(scores[0], other) for other in scores[1:])
  merged = loading.load(str(trial.workdir / 'warm_5_noisy_order'), 'scalar').params
  mean = jax.tree.map(lambda *leaves: np.mean(leaves, 0), *members)
  for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(mean), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
