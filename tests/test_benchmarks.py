"""benchmarks/: every workload runs at tiny sizes, counts what it does, and makes a table."""

import json
import math

import pytest

from benchmarks import ours, run, workloads

KINDS = ('W1', 'W5', 'W2', 'ppo_1b3_half_packed')


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize('name', KINDS)
def test_each_kind_of_workload_runs(name):
  step, facts = ours.build(workloads.tiny(workloads.ALL[name]))
  first, second = step(), step()
  assert facts and all(value > 0 for value in facts.values())
  if name == 'W1':
    assert first.responses.shape == (8, 8) and (first.responses != second.responses).any()
  else:
    assert all(math.isfinite(value) for value in second.values())
  if name == 'ppo_1b3_half_packed':
    assert second['ppo/ratio_max_dev'] == 0 and 0.2 < second['rollout/live'] < 0.8


def test_the_least_that_decoding_reads():
  """A layer of width 4, one head: 2 x 1 x 4 numbers a slot and row."""
  model = workloads.GPT2 | dict(vocab_size=11, num_layers=1, d_model=4, num_heads=1, max_length=16)
  w = workloads.Workload('generate', 'tokens', model, rows=3, prompt=2, response=4)
  embedding, block, norm = 11 * 4 + 16 * 4, 3 * 20 + 20 + (4 * 16 + 16) + (16 * 4 + 4) + 16, 8
  weights = 4 * (embedding + block + norm)
  assert ours.build(w)[1] == {'bytes': 4 * weights + (2 + 3 + 4 + 5) * 3 * 4 * 8}


def test_what_a_run_counts():
  amounts = {name: w.amount for name, w in workloads.CPU.items()}
  assert amounts == {'W1': 1024, 'W2': 64, 'W3': 1024, 'W4': 8, 'W5': 72}


def test_the_table_by_hand():
  lines = [
    dict(machine='a card', jax='1', commit='abc', measured=dict(flops=2e12, bandwidth=3e9)),
    dict(
      workload='W1',
      framework='alignjax',
      seconds=2.0,
      rate=512.0,
      unit='tokens per second',
      times_ours=1.0,
      bandwidth_share=0.5,
    ),
    dict(workload='W1', framework='other', error='no memory'),
  ]
  assert run.table(lines).splitlines() == [
    'a card, jax 1, commit abc; a matrix product 2 TFLOP/s, a copy 3 GB/s',
    '',
    '| workload | framework | seconds | rate | times ours | of the peak |',
    '|---|---|---|---|---|---|',
    '| W1 | alignjax | 2 | 512 tokens per second | 1.00 | 50.0% of the bandwidth |',
    '| W1 | other | failed: no memory | | | |',
  ]


@pytest.mark.slow
def test_the_command_and_a_child_that_fails(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(run, 'installed_peers', lambda kind: ['transformers', 'nobody'])
  monkeypatch.setitem(run.NEEDS, 'nobody', ())
  monkeypatch.setitem(run.NEEDS, 'transformers', ())
  children = []

  class Children(run.Child):  # no torch is compiled here
    def __init__(self, framework, workload, tiny):
      children.append(framework)
      super().__init__('alignjax' if framework == 'transformers' else framework, workload, tiny)
      self.framework = framework

  monkeypatch.setattr(run, 'Child', Children)
  out = tmp_path / 'lines.jsonl'
  assert run.main(['--tiny', '--only=W1', '--repeats=3', f'--out={out}']) == 1
  machine, first, second, third = map(json.loads, out.read_text().splitlines())
  assert children == ['alignjax', 'transformers', 'nobody']
  assert machine['measured']['flops'] > 0 and machine['platform'] == 'cpu'
  assert len(first['all']) == 3 and first['times_ours'] == 1 and first['peak_gib'] > 0
  assert second['times_ours'] == pytest.approx(second['seconds'] / first['seconds'])
  assert third['error'].startswith('KeyError')
  capfd.readouterr()
  assert run.main([f'--table={out}']) == 0
  assert '| W1 | nobody | failed: KeyError' in capfd.readouterr().out
