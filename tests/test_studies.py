"""The laboratory: the loop over seeds, and the studies that are included."""

import argparse
import json
import signal
import sys
import types

import jax
import numpy as np
import pytest
from scipy import special

from alignjax.commands import study as command
from alignjax.runtime import journal
from alignjax.studies import study


def make(calls, seen=None):
  """A study of two parts that notes its calls and stops in a part for which `seen` says so."""

  def run(trial, part):
    if seen and (trial.seed, part) in seen:
      raise KeyboardInterrupt
    calls.append((trial.seed, part, trial.workdir.name))
    return [dict(method=part, score=trial.seed + len(part) * trial.options.scale)]

  def table(rows):
    figures = study.over_seeds(rows, 'method', ['score'])
    return ''.join(
      f'{name} {f["score"]["mean"]} {study.seeds_of(rows)}\n' for name, f in figures.items()
    )

  return types.SimpleNamespace(
    __name__='mylab.toy',
    parts=lambda options: options.methods,
    protocol=lambda trial, part: dict(scale=trial.options.scale, tiny=trial.tiny),
    run=run,
    table=table,
    plot=lambda rows, path: path.write_text(f'{len(rows)} rows'),
  )


def options(*methods, scale=1.0):
  return argparse.Namespace(methods=methods, scale=scale)


def test_a_study_goes_on_and_takes_further_seeds_and_parts(tmp_path):
  calls = []
  with pytest.raises(KeyboardInterrupt):
    study.run_study(make(calls, [(2, 'abc')]), tmp_path, [1, 2], True, options('a', 'abc'))
  assert calls == [(1, 'a', 'seed-1'), (1, 'abc', 'seed-1'), (2, 'a', 'seed-2')]
  assert (tmp_path / 'toy/table.md').read_text() == 'a 2.0 seed 1\nabc 4.0 seed 1\n'
  calls.clear()
  rows = study.run_study(make(calls), tmp_path, [1, 2], True, options('a', 'abc'))
  assert calls == [(2, 'abc', 'seed-2')]
  assert rows == [
    dict(method=name, score=seed + len(name), seed=seed) for seed in (1, 2) for name in ('a', 'abc')
  ]
  calls.clear()
  study.run_study(make(calls), tmp_path, [3], True, options('a', 'ab'))
  assert [call[:2] for call in calls] == [(3, 'a'), (3, 'ab')]
  folder = tmp_path / 'toy'
  assert (folder / 'table.md').read_text() == (
    'a 3.0 seeds 1, 2, 3\nabc 4.5 seeds 1, 2, 3\nab 5.0 seeds 1, 2, 3\n'
  )
  assert (folder / 'plot.png').read_text() == '6 rows'
  assert len(study.read_rows(folder / 'rows.jsonl')) == 6
  facts = json.loads((folder / 'facts.json').read_bytes())
  assert [(one['seed'], one['part']) for one in facts['facts']][-2:] == [(3, 'a'), (3, 'ab')]
  assert {'seconds', 'machine', 'command', 'commit'} == facts['facts'][0]['facts'].keys()
  assert facts['protocols']['ab'] == dict(scale=1.0, tiny=True)


def test_rows_of_another_protocol_and_damaged_rows_are_refused(tmp_path):
  calls = []
  study.run_study(make(calls), tmp_path, [1], True, options('a'))
  with pytest.raises(ValueError, match='seed-1/a.json has rows of another protocol: scale differs'):
    study.run_study(make(calls), tmp_path, [2], True, options('a', scale=2.0))
  assert len(calls) == 1
  path = tmp_path / 'toy/seed-1/a.json'
  path.write_text(path.read_text().replace('"score": 2.0', '"score": 3.0'))
  with pytest.raises(ValueError, match='a.json is damaged'):
    study.run_study(make(calls), tmp_path, [1], True, options('a'))
  with pytest.raises(ValueError, match='damaged'):
    journal.read_whole(path)


def test_figures_over_seeds_by_hand():
  rows = [
    dict(seed=s, method=m, gold=g)
    for s, m, g in [(1, 'x', 1.0), (1, 'y', 4.0), (2, 'x', 3.0), (2, 'y', 5.0), (3, 'x', None)]
  ]
  found = study.over_seeds(rows, 'method', ['gold', 'other'])
  assert list(found) == ['x', 'y'] and found['x']['gold']['n'] == 2
  assert found['x']['gold']['mean'] == 2.0 and found['x']['other']['mean'] is None
  # Two values, 1 apart from their mean: the standard error is 1, without skewness.
  reach = special.stdtrit(1, 0.975)
  assert np.allclose(found['x']['gold']['ci95'], [2 - reach, 2 + reach])
  difference = study.paired(rows, 'method', 'y', 'x', 'gold')
  assert difference['mean'] == 2.5 and difference['n'] == 2
  assert study.paired(rows, 'method', 'y', 'z', 'gold')['mean'] is None


def test_the_command_lists_studies_and_refuses_what_is_none(capsys, tmp_path):
  command.main([])
  lines = capsys.readouterr().out.split('\n')
  assert [line.split()[0] for line in lines if line] == list(study.studies.NAMES)
  with pytest.raises(ValueError, match="no study 'leaderbord'"):
    command.main(['leaderbord', f'--workdir={tmp_path}'])
  with pytest.raises(ValueError, match='mylab.none: No module'):
    command.main(['mylab.none', f'--workdir={tmp_path}'])
  with pytest.raises(ValueError, match='json.decoder is no study, as it has no function parts'):
    command.main(['json.decoder', f'--workdir={tmp_path}'])
  with pytest.raises(ValueError, match='whole numbers'):
    command.numbers('1,x')
  with pytest.raises(ValueError, match='different'):
    command.numbers('1,1')


def test_the_command_runs_a_study_of_a_fork(capsys, tmp_path, monkeypatch):
  calls = []
  toy = make(calls)
  toy.__doc__ = 'Whether toys play.'
  toy.arguments = lambda parser: (
    parser.add_argument('--methods', type=lambda text: text.split(',')),
    parser.add_argument('--scale', type=float, default=1.0),
  )
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(jax.config.jax_compilation_cache_dir))
  monkeypatch.setattr(signal, 'signal', lambda *_: None)
  monkeypatch.setitem(sys.modules, 'mylab', types.ModuleType('mylab'))
  monkeypatch.setitem(sys.modules, 'mylab.toy', toy)
  command.main(['mylab.toy', f'--workdir={tmp_path}', '--methods=a', '--tiny'])
  assert [call[:2] for call in calls] == [(1, 'a'), (11, 'a')]
  command.main(['mylab.toy', f'--workdir={tmp_path}', '--methods=a', '--tiny', '--seeds=5'])
  out = capsys.readouterr().out
  assert 'a 6.66' in out and ' seeds 1, 5, 11\n' in out and 'seed 5, a (1 of 1): done' in out
