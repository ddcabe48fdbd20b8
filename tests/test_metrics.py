"""What a run writes down, and that a resumed run writes the same."""

import json

import numpy as np
import pytest

from alignjax.runtime import metrics


def lines(path):
  return [json.loads(x) for x in (path / 'metrics.jsonl').read_text().splitlines()]


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    for step in (1, 2, 3):
      writer.write(step, {'b': step / 2, 'a': float('nan')})
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 4, "b"')  # torn by a kill
  with metrics.Writer(tmp_path, start_step=2) as writer:
    writer.write(3, {'b': 9.0})
  assert lines(tmp_path) == [
    {'step': 1, 'a': None, 'b': 0.5},
    {'step': 2, 'a': None, 'b': 1.0},
    {'step': 3, 'b': 9.0},
  ]
  assert any(p.name.startswith('events.') for p in tmp_path.iterdir())


def test_columns(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    writer.write(1, {'x': 1.0})
    writer.write(2, {'y': 2.0})
  columns = metrics.read(tmp_path / 'metrics.jsonl')
  assert columns['step'].tolist() == [1, 2]
  np.testing.assert_array_equal(columns['x'], [1, np.nan])


def test_inactive_processes_write_nothing(tmp_path):
  with metrics.Writer(tmp_path / 'x', active=False) as writer:
    writer.write(1, {'x': 1.0})
  assert not (tmp_path / 'x').exists()


def test_not_finite():
  metrics.check_finite({'a': 1.0}, 3)
  with pytest.raises(FloatingPointError, match='step 3: b=nan, c=inf'):
    metrics.check_finite({'a': 1.0, 'b': float('nan'), 'c': float('inf')}, 3)


def test_plain_progress(capsys):
  with metrics.Progress(10, name='sft') as progress:
    progress.update(1, {'sft/loss': 0.5})
    progress.update(2, {'sft/loss': 0.4})  # throttled
    progress.update(10, {'sft/loss': 0.25})
    progress.table('samples', ('prompt', 'score'), [('hello', '1.0')])
  out = capsys.readouterr().out
  assert 'sft 1/10' in out and 'loss 0.500' in out and 'sft 10/10' in out and 'sft 2/10' not in out
  assert 'hello   1.0' in out


def test_live_progress(monkeypatch, capsys):
  monkeypatch.setattr('sys.stdout.isatty', lambda: True, raising=False)
  with metrics.Progress(3, name='rm') as progress:
    progress.update(3, {'rm/loss': 0.5})
    progress.table('samples', ('prompt',), [('hello',)])
  metrics.print_table('more', ('a',), [('world',)])
  out = capsys.readouterr().out
  assert 'rm' in out and 'hello' in out and 'world' in out
