"""The page and the pictures of a report, from results made by hand."""

import json
import os
import sys
import types

import ml_collections
import numpy as np
import pytest

from alignjax import plots, report, report_page
from alignjax.evals.reward import best_of_n
from alignjax.runtime import files

FIGURE = {'mean': 0.51234, 'ci95': [0.40111, 0.60999], 'n': 20, 'kind': 'share'}


@pytest.fixture
def result():
  policies = {
    n: {c: FIGURE for c in report_page.COLUMNS} for n in ('pretrained', 'sft', 'ppo', 'mine')
  }
  policies['sft'] |= {'pretraining_loss_book': FIGURE}
  part = {'what': 'of the loss', 'figure': FIGURE, 'bar': 0.75, 'above': True, 'held': 'not shown'}
  finding = {'held': 'not shown', 'parts': [part], 'why': 'PPO is not shown to pay in reading'}
  sample = dict(
    use_case='open_qa',
    prompt='what color is the fox ?',
    responses={'sft': 'the fox is red .', 'ppo': ''},
  )
  return dict(
    policies=policies,
    findings={'PPO-ptx wins back': finding, 'it is so': finding | {'held': 'yes'}},
    samples=[sample],
    selection={},
    seed=3,
    reward_model={'accuracy_train_labelers': FIGURE, 'bias': -0.123456, 'pairs': 7},
    made_by=dict(command='python run.py --config=c.py', commit='0123456789ab', config={}),
    prompted_baseline=dict(best='school:', gold={'school:': 1.0}),
    seconds={'sft': 3.2},
    versions={'jax': '1'},
  )


def test_the_page(result):
  text = report_page.markdown(json.loads(json.dumps(result)), ['a.png'])
  assert '    python run.py --config=c.py\n' in text
  assert 'Seed 3, commit 0123456789ab; report.json has every entry of the config' in text
  assert '| SFT | 0.51 [0.40, 0.61] |' in text and '0.51234' not in text, 'rounded'
  assert (
    text.index('| pretrained |')
    < text.index('| SFT |')
    < text.index('| PPO |')
    < text.index('| mine |')
  )
  assert all(f'- {what}: {words}.' in text for what, words in report_page.MEANING.items())
  explained = [part for key in report_page.MEANING for part in key.split(', ')]
  assert all(
    any(part in column for part in explained) for column in report_page.COLUMNS.values()
  ), 'every column is explained'
  assert (
    '| PPO-ptx wins back | **not shown** | of the loss 0.51 [0.40, 0.61], not told from 0.75; PPO '
    'is not shown to pay' in text
  )
  assert '| it is so | yes |' in text
  assert (
    '- bias: -0.123\n- pairs: 7' in text and 'accuracy train labelers: 0.512 [0.401, 0.610]' in text
  )
  assert (
    '**open qa:** `what color is the fox ?`' in text
    and '| SFT | `the fox is red .` |' in text
    and '| PPO |  |' in text
  )
  assert '![a.png](a.png)' in text


def test_samples_are_the_first_of_each_use_case():
  prompts = [dict(use_case=c, prompt=f'{c} {i}') for i, c in enumerate(['chat', 'open_qa', 'chat'])]
  arrays = {
    'sft': {'responses': np.array(['a', 'b', 'c'])},
    'ppo': {'responses': np.array(['d', '', 'f'])},
  }
  assert report.samples(prompts, arrays) == [
    dict(use_case='chat', prompt='chat 0', responses=dict(sft='a', ppo='d')),
    dict(use_case='open_qa', prompt='open_qa 1', responses=dict(sft='b', ppo='')),
  ]


@pytest.fixture
def drawn(monkeypatch):
  """name -> axes of the figures that were saved."""
  out = {}
  monkeypatch.setattr(
    files, 'save_figure', lambda figure, path: out.update({path.name: list(figure.axes)})
  )
  return out


def logs(folder, stages):
  for name, columns in stages.items():
    (folder / name).mkdir()
    count = len(next(iter(columns.values())))
    lines = [
      json.dumps({'step': i + 1} | {k: float(v[i]) for k, v in columns.items()})
      for i in range(count)
    ]
    (folder / name / 'metrics.jsonl').write_text('\n'.join(lines))


def test_learning_curves_are_smoothed_and_named(tmp_path, result, drawn):
  rng = np.random.default_rng(0)
  noisy = np.linspace(3, 1, 100) + rng.normal(0, 0.3, 100)
  rl = {
    'objective/scores': noisy,
    'gold/train_labelers': noisy,
    'objective/kl': np.arange(100) / 50,
  }
  logs(
    tmp_path,
    {
      'rm': {'rm/loss': noisy},
      'sft': {'sft/loss': noisy},
      'ppo': rl,
      'mine': rl,
      'pretrain': {'sft/loss': noisy[:2]},
    },
  )
  assert plots.all_plots(files.folder(tmp_path), result) == [
    'reward_against_kl.png',
    'alignment_tax.png',
    'learning_curves.png',
  ]
  panels = [a for a in drawn['learning_curves.png'] if a.get_title()]
  assert [a.get_title() for a in panels] == ['pretraining', 'SFT', 'reward model', 'PPO', 'mine']
  assert [a.get_ylabel() for a in panels] == ['loss, nats per token'] * 2 + [
    'ranking loss, nats per pair'
  ] + ['mean reward'] * 2
  assert {a.get_xlabel() for a in panels} == {'step'}
  raw, smooth = (line.get_ydata() for line in panels[1].lines)
  assert np.diff(smooth).std() < np.diff(raw).std() / 5 and len(smooth) == 91
  assert smooth[0] == pytest.approx(noisy[:10].mean())
  assert panels[1].lines[1].get_xdata()[0] == pytest.approx(5.5), (
    'in the middle of what is averaged'
  )
  assert len(panels[3].lines) == 4 and len(panels[3].get_legend().get_texts()) == 2
  kl = drawn['reward_against_kl.png']
  assert all('nats per response' in a.get_xlabel() for a in kl)
  assert [t.get_text() for t in kl[0].get_legend().get_texts()] == ['PPO', 'mine']
  bars = drawn['alignment_tax.png'][2]
  assert [t.get_text() for t in bars.get_xticklabels()] == ['pretrained', 'SFT', 'PPO', 'mine']
  assert bars.get_ylabel() == 'nats per token'


def test_best_of_n_has_training_prompts_in_panels_of_their_own(tmp_path, monkeypatch):
  import matplotlib.figure

  saved = []
  monkeypatch.setattr(
    matplotlib.figure.Figure, 'savefig', lambda self, *a, **kw: saved.append(list(self.axes))
  )
  rng = np.random.default_rng(0)
  values = {
    'reward model': rng.normal(size=(20, 8)),
    'gold, training labelers': rng.normal(size=(20, 8)),
  }
  point = best_of_n.policy(np.abs(rng.normal(size=(20, 4))), values)
  made = dict(
    prompts=20,
    measures=list(values),
    best_of_n=best_of_n.curve(values['reward model'], values, [1, 2]),
  )
  logged = {'training': {'kl': [0.0, 1.0], 'reward model': [5.0, 7.0]}}
  best_of_n.plot(made | dict(policies={'ppo': point | logged}), tmp_path / 'x.png')
  assert [a.get_title() for a in saved[0]] == [
    'reward model\non the same 20 prompts',
    'gold, training labelers\non the same 20 prompts',
    'reward model\nin training, on its own prompts',
    '',
  ]
  drawn = [[y for line in a.lines for y in np.atleast_1d(line.get_ydata())] for a in saved[0]]
  assert drawn[2] == [5.0, 7.0] and max(drawn[0]) < 3, 'no axis has both'
  best_of_n.plot(made | dict(policies={'ppo': point}), tmp_path / 'y.png')
  assert len(saved[1]) == 2


@pytest.mark.parametrize(
  'argv,said',
  [
    (['experiments/run.py', '--config=c'], 'python experiments/run.py --config=c'),
    ([os.path.abspath('a/run.py'), '--x=b c'], "python a/run.py '--x=b c'"),
    (['/somewhere/bin/alignjax', 'run', '--config=c'], 'alignjax run --config=c'),
  ],
)
def test_the_command_can_be_given_again(monkeypatch, argv, said):
  monkeypatch.setattr(sys, 'argv', argv)
  setup = types.SimpleNamespace(config=ml_collections.ConfigDict())
  assert report.made_by(setup)['command'] == said
