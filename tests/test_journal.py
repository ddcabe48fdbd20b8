"""What is kept on the disk: read back as it was written, or named as damaged, or without effect on
any number."""

import json
import pathlib
import random
import types

import numpy as np
import pytest

from alignjax.evals import evaluation, items, registry, table
from alignjax.evals.preference import judges, responses
from alignjax.evals.preference.responses import Response
from alignjax.evals.preference.verdicts import Pair
from alignjax.evals.table import Cell
from alignjax.inference import bulk, loading
from alignjax.runtime import journal

ROWS = [
  {'item': 'a', 'value': 0.1},
  {'item': 'ü "x", "crc32": "', 'value': None},
  {'item': '\ud800', 'value': [1, {'b': '\n'}]},
]


def test_rows_come_back_and_a_torn_line_is_cut(tmp_path):
  path = tmp_path / 'new' / 'k.jsonl'
  assert journal.read(path) == []
  journal.append(path, ROWS[:1])
  journal.append(path, ROWS[1:])
  assert journal.read(path) == ROWS
  # for people and jq
  assert [json.loads(line)['item'] for line in path.read_text().splitlines()][:2] == [
    'a',
    ROWS[1]['item'],
  ]
  whole = path.read_bytes()
  path.write_bytes(whole + whole[:20])
  assert journal.read(path) == ROWS and path.read_bytes() == whole


def test_any_bit_of_any_line_is_noticed(tmp_path):
  path = tmp_path / 'k.jsonl'
  journal.append(path, ROWS)
  whole = path.read_bytes()
  for at in range(len(whole)):
    for bit in (0, 5, 7):
      path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
      if at == len(whole) - 1:  # the last newline: as a line that a kill left torn
        assert journal.read(path) == ROWS[:2]
      else:
        with pytest.raises(ValueError, match=r'k.jsonl, line \d: the line is damaged'):
          journal.read(path)


def test_whole_files(tmp_path):
  path, value = tmp_path / 'new' / 'x.json', {'b': (1, 2.5), 'a': {10: 'x', 9: None}}
  assert journal.read_whole(path) is None
  journal.write_whole(path, value)
  assert journal.read_whole(path) == {'b': [1, 2.5], 'a': {'10': 'x', '9': None}}
  whole = path.read_bytes()
  for damaged in (
    b'',
    whole[:-1],
    whole[:10],
    b'[]',
    b'{}',
    b'3',
    b'\xff',
    whole.replace(b'2.5', b'2.6'),
  ):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match='x.json is damaged.*Remove it'):
      journal.read_whole(path)


def damages(path, rng):
  """(what, bytes or None: removed)."""
  whole = path.read_bytes()
  at = rng.randrange(len(whole))
  yield 'flipped', whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
  yield 'cut', whole[: rng.randrange(len(whole))]
  yield 'emptied', b''
  yield 'removed', None


def under_fire(folder, run, seed, repeats=1):
  """Damages each file in turn; `run` has to give what it gave, or a ValueError that names the file.
  How often it was named."""
  expected, named = run(), 0
  rng = random.Random(seed)
  for path in sorted(p for p in folder.rglob('*') if p.is_file()):
    before = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    for _ in range(repeats):
      for what, contents in damages(path, rng):
        path.unlink() if contents is None else path.write_bytes(contents)
        try:
          assert run() == expected, (what, path)
        except ValueError as error:
          assert path.name in str(error) and what in ('flipped', 'cut', 'emptied'), (
            what,
            path,
            error,
          )
          named += 1
        for p in [p for p in folder.rglob('*') if p.is_file() and p not in before]:
          p.unlink()
        for p, contents in before.items():
          p.write_bytes(contents)
  return named


def drawn(model, *, data, limit, seed, keep):
  """A task whose values are made one by one and kept."""
  names = [f'item {i}' for i in range(6)]
  values = items.fill(
    keep / 'values.jsonl',
    names,
    lambda some: [float(np.sin(i + model.params['w'].sum())) for i in some],
  )
  (keep / 'samples-x.jsonl').write_text('to be read')
  return [Cell('sine', '', values, names), Cell('sine', 'again', values[::-1], names)]


@pytest.mark.parametrize('interrupted', [False, True])
def test_a_damaged_evaluation_has_no_other_numbers(tmp_path, monkeypatch, interrupted):
  model = lambda name: types.SimpleNamespace(params={'w': np.full(2, float(name))})
  monkeypatch.setattr(loading, 'load', lambda name, *_: model(name))
  monkeypatch.setattr(loading, 'facts', lambda model: {'weights': float(model.params['w'].sum())})
  monkeypatch.setattr(table, 'plot', lambda rows, models, baseline, path: path.write_bytes(b'plot'))
  out = tmp_path / 'out'

  def run():
    if interrupted:
      for path in out.glob('cells/*'):
        path.unlink()
    return json.dumps(evaluation.evaluate({'a': '1', 'b': '2'}, ['tests.test_journal:drawn'], out))

  assert under_fire(out, run, 0) >= 1
  assert len(list(out.glob('cells/*.json'))) == 2


def test_damaged_responses_and_scores_have_no_other_numbers(tmp_path, monkeypatch):
  from tests.test_preference import CHAT

  model = loading.load(f'hf:{CHAT}', 'lm', 'chat')

  def make_sampler(nets, sharder, **_):
    def sample(params, prompts, seed, temperature, numbers, done):
      for i, (prompt, number) in enumerate(zip(prompts, numbers, strict=True)):
        done(i, ([65 + (sum(prompt) + number) % 20, model.template.end], True))

    return sample

  def make_scorer(nets, sharder, **_):
    return lambda params, rows, done: [done(i, sum(row) % 11) for i, row in enumerate(rows)]

  monkeypatch.setattr(bulk, 'make_sampler', make_sampler)
  monkeypatch.setattr(bulk, 'make_scorer', make_scorer)
  records = [dict(prompt=f'p{i % 4}', prompt_id=f'q{i}') for i in range(5)]

  def run():
    said = [
      responses.respond(
        model, name, records, tmp_path / 'out' / 'responses', max_tokens=4, name=name
      )
      for name in 'ab'
    ]
    assert said[0][0].text != said[0][4].text  # the same prompt twice
    pairs = [
      Pair(r, 'a', 'b', Response('x' * i), y)
      for i, (r, y) in enumerate(zip(records, said[1], strict=True))
    ]
    return said, judges.reward_model(pairs, model, 'f', tmp_path / 'out' / 'judged', 'rm')

  assert under_fire(tmp_path / 'out', run, 1) >= 2


def test_a_judge_of_ones_own_begins_anew_after_its_source_changed(tmp_path, monkeypatch, capsys):
  import importlib

  source = (
    'def judge(pairs, *, keep):\n  seen = len(list(keep.iterdir()))\n  (keep / '
    "str(seen)).write_text('')\n"
    '  return [0.0] * len(pairs)\n'
  )
  (tmp_path / 'ownjudge.py').write_text(source)
  monkeypatch.syspath_prepend(str(tmp_path))
  module = importlib.import_module('ownjudge')
  pairs = [Pair(dict(prompt='p', prompt_id='q'), 'a', 'b', Response('x'), Response('y'))]
  ask = lambda: judges.own(pairs, module.judge, tmp_path / 'judged', 'ownjudge:judge').verdicts[0].p
  assert (ask(), ask()) == (0.0, 0.0) and 'goes on from' in capsys.readouterr().out
  (tmp_path / 'ownjudge.py').write_text(source.replace('[0.0]', '[1.00]'))
  importlib.reload(module)
  assert ask() == 1.0 and 'goes on' not in capsys.readouterr().out
  assert sorted(len(list(p.iterdir())) for p in (tmp_path / 'judged').iterdir()) == [1, 2]


def test_results_of_functions_of_ones_own_are_kept_by_their_source(tmp_path, monkeypatch):
  """A task, what it imports, and a function that an option names: changed, they are measured again;
  a comment is no change."""
  import importlib

  files = dict(
    mytask='import myhelp\nfrom alignjax.evals.table import Cell\n\n\n'
    "def task(model, *, data, limit, seed, keep, scorer='myscore:f'):\n"
    "  return [Cell('m', '', [myhelp.value()], ['a'])]\n",
    myhelp='def value():\n  return 1.0\n',
    myscore='def f(texts):\n  return 1\n',
  )
  for name, text in files.items():
    (tmp_path / f'{name}.py').write_text(text)
  monkeypatch.syspath_prepend(str(tmp_path))
  importlib.invalidate_caches()
  (task,) = registry.find_tasks(['mytask:task']).values()
  run = lambda **more: registry.run_task('mytask:task', task, None, {}, tmp_path / 'out', **more)[1]
  assert (run(), run()) == (False, True)
  for name in files:
    path = pathlib.Path(tmp_path / f'{name}.py')
    path.write_text(f'# a comment\n{files[name]}')
    assert run()
    path.write_text(
      files[name].replace('1', '2') if '1' in files[name] else files[name].replace("'m'", "'n'")
    )
    assert (run(), run()) == (False, True), name
  assert not run(options=dict(scorer='myscore:g')) and run()


def test_a_model_that_an_option_names_is_kept_by_its_contents(tmp_path):
  (tmp_path / 'judge' / 'final').mkdir(parents=True)
  (tmp_path / 'judge' / 'checkpoints').mkdir()
  (tmp_path / 'judge' / 'checkpoints' / 'config.json').write_text('{}')
  weights = tmp_path / 'judge' / 'final' / 'weights'
  weights.write_text('1')
  task = lambda model, *, data, limit, seed, keep, truth: [Cell('m', '', [1.0], ['a'])]
  task.__module__ = __name__
  run = lambda: registry.run_task(
    't', task, None, {}, tmp_path / 'out', options=dict(truth=str(tmp_path / 'judge'))
  )[1]
  assert (run(), run()) == (False, True)
  weights.write_text('2')
  assert (run(), run()) == (False, True)
