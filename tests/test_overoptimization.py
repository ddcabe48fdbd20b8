"""The study of over-optimization: its configs, curves and table; its run is marked long."""

import argparse
import pathlib

import numpy as np
import pytest

from alignjax.evals.reward import laws
from alignjax.runtime import files
from alignjax.setup import entries
from alignjax.studies import overoptimization, study


def trial(folder, seed=1):
  return study.Trial(seed, files.folder(folder), True, argparse.Namespace())


def rows_of(arm, method, seed, law, distances, start=(0.5, -1.0)):
  """Points on a law, from a proxy and a gold reward of `start` on; the proxy gains twice d."""
  gained = law.reward(np.array(distances))
  return [
    dict(
      arm=arm,
      method=method,
      seed=seed,
      n=None,
      distance=d,
      proxy=start[0] + 2 * d,
      gold=start[1] + g,
    )
    for d, g in zip(distances, gained, strict=True)
  ]


def test_the_arms_differ_in_what_they_say(tmp_path):
  made = {part: overoptimization._config(trial(tmp_path), part) for part in overoptimization.ARMS}
  for part, c in made.items():
    entries.check(c)
    own = c.stages[f'ppo_{part}']
    assert own.kl.coef == 0 and c.stages_to_run == (f'ppo_{part}',)
    assert own.init.reward == own.init.value
    assert (own.loss.ptx_coef > 0) == (part == 'ptx')
  full, few = made['full'].stages.rm, made['few'].stages.rm_few
  assert few.prompts == full.prompts // 8 and few.label_noise == full.label_noise == 0
  assert made['noisy'].stages.rm_noisy.label_noise == 0.25
  assert made['noisy'].stages.rm_noisy.prompts == full.prompts
  both = made['few_noisy'].stages.rm_few_noisy
  assert (both.prompts, both.label_noise) == (few.prompts, 0.25)
  assert made['small'].reward_model.num_layers == 1
  assert made['small'].stages.ppo_small.init.reward == str(tmp_path / 'small/rm/final')
  assert made['full'].stages.ppo_full.init.reward == 'stage:rm'


def test_the_protocol_names_no_folder_and_no_seed(tmp_path):
  one, other = (
    overoptimization.protocol(trial(tmp_path / f'seed-{seed}', seed), 'small') for seed in (1, 2)
  )
  assert one == other and str(tmp_path) not in str(one)


def test_curves_begin_at_the_first_point_of_best_of_n_and_at_the_first_three_of_ppo():
  law = laws.Law('best_of_n', 2.0, 0.5)
  rows = rows_of('full', 'best_of_n', 41, law, [0.0, 1.0, 2.0])
  rows += [
    dict(arm='full', method='ppo', seed=41, distance=d, proxy=p, gold=g)
    for d, p, g in [(0.0, 0.0, 1.0), (0.1, 1.0, 2.0), (0.1, 2.0, 3.0), (1.0, 5.0, 4.0)]
  ]
  found = overoptimization.curves(rows)
  assert found['full', 'best_of_n'][41] == pytest.approx(
    np.array([[0, 0, 0], [1, 2, 1.5], [2, 4, 2]])
  )
  assert found['full', 'ppo'][41][:, 1:] == pytest.approx(
    np.array([[-1, -1], [0, 0], [1, 1], [4, 2]])
  )


def test_the_table_has_the_laws_that_the_points_were_made_of(tmp_path):
  distances = np.sqrt([0, 0.19, 0.64, 1.2, 1.83, 2.5, 3.17])
  rows = [
    row
    for seed, alpha in ((41, 1.9), (42, 2.1))
    for row in rows_of('few', 'best_of_n', seed, laws.Law('best_of_n', alpha, 0.5), distances)
  ]
  figures = overoptimization._figures(
    'best_of_n', overoptimization.curves(rows)['few', 'best_of_n'][41]
  )
  d = distances[-1]
  assert figures['alpha'] == pytest.approx(1.9) and figures['beta'] == pytest.approx(0.5)
  assert figures['proxy'] == pytest.approx(2 * d) and figures['distance'] == pytest.approx(d)
  assert figures['gold'] == pytest.approx(d * (1.9 - 0.5 * d)) and figures['predicted'] < 1e-9
  text = overoptimization.table(rows)
  (line,) = [line for line in text.splitlines() if line.startswith('| 1,500 prompts |')]
  assert line.split('|')[2].strip().startswith('2.00 [')
  assert 'seeds 41, 42' in text and 'PPO: R(d)' not in text
  overoptimization.plot(rows, tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').stat().st_size > 10_000


@pytest.mark.long
def test_the_study_runs(tmp_path):
  module = study.find('overoptimization')
  rows = study.run_study(module, files.folder(tmp_path), [1], True, argparse.Namespace())
  assert {row['arm'] for row in rows} == {*overoptimization.ARMS}
  assert all(np.isfinite(row[key]) for row in rows for key in ('distance', 'proxy', 'gold'))
  assert pathlib.Path(tmp_path / 'overoptimization/plot.png').exists()
