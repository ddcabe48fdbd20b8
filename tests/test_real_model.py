"""The study of a real model, on a small checkpoint and files; and the loss of text."""

import argparse
import json
import pathlib

import jax
import numpy as np
import pytest

from alignjax.configs import real_model as configs
from alignjax.data import hygiene
from alignjax.evals import table
from alignjax.evals.public import text
from alignjax.inference import loading
from alignjax.studies import real_model, study

CHAT = pathlib.Path(__file__).resolve().parent / 'golden' / 'chat'


def options(data=(), mapping=(), tasks='text_loss', checkpoint=f'hf:{CHAT}'):
  return argparse.Namespace(data=data, mapping=mapping, tasks=tasks, checkpoint=checkpoint, limit=4)


# ---- the loss of text


@pytest.fixture(scope='module')
def chat():
  return loading.load(f'hf:{CHAT}', 'lm')


def by_a_loop(model, documents, window):
  """(sum of losses, tokens), one row after the other, by the logits of the whole row."""
  total, count, logits_of = 0.0, 0, jax.jit(model.nets.logits)
  for document in documents:
    tokens = model.template.document(document)
    for start in range(0, len(tokens) - 1, window):
      row = tokens[start : start + window + 1]
      logits = logits_of(model.params, np.array([row[:-1]]), np.ones((1, len(row) - 1), bool))
      logprobs = jax.nn.log_softmax(np.asarray(logits[0], np.float64))
      total -= float(sum(logprobs[i, token] for i, token in enumerate(row[1:])))
      count += len(row) - 1
  return total, count


def test_the_loss_of_text_is_that_of_a_loop(chat, tmp_path, window=7):
  documents = ['abc def gab ' * 2, 'fed cab']
  path = tmp_path / 'text.jsonl'
  path.write_text(''.join(json.dumps(dict(text=d)) + '\n' for d in documents))
  (cell,) = text.text_loss(chat, data=str(path), limit=None, seed=0, keep=tmp_path, window=window)
  total, count = by_a_loop(chat, documents, window)
  assert table.figure(cell)['mean'] == pytest.approx(total / count, rel=1e-5)
  assert sum(n for _, n in cell.values) == count
  assert len(set(cell.clusters)) == 2 and len(cell.items) == len(set(cell.items))
  (few,) = text.text_loss(chat, data=str(path), limit=2, seed=0, keep=tmp_path, window=7)
  assert len(few.values) == 2
  plain = tmp_path / 'text.txt'
  plain.write_text(documents[0])
  (cell,) = text.text_loss(chat, data=str(plain), limit=None, seed=0, keep=tmp_path, window=window)
  total, count = by_a_loop(chat, documents[:1], window)
  assert table.figure(cell)['mean'] == pytest.approx(total / count, rel=1e-5)


def test_a_window_that_does_not_fit_is_refused(chat, tmp_path):
  most = chat.cfg.max_length
  with pytest.raises(ValueError, match=f'text_loss.window={most} must be from 1 to {most - 1}'):
    text.text_loss(chat, data=None, limit=None, seed=0, keep=tmp_path, window=most)


# ---- the division


def test_the_sides_share_no_prompt_and_no_labeler():
  records = [
    dict(prompt=prompt, responses=['a', 'b'], ranks=[0, 1]) | labeler
    for number in range(300)
    for labeler in ({}, dict(labeler_id=f'w{number % 20}'))
    for prompt in (f'prompt {number}', f'Prompt  {number}')
  ]
  made = real_model.divide(records, 3)
  of = {side: {hygiene.conversation(r['prompt']) for r in rows} for side, rows in made.items()}
  assert (
    not of['gold'] & of['proxy'] and not of['gold'] & of['test'] and not of['proxy'] & of['test']
  )
  people = {side: {r.get('labeler_id') for r in rows} - {None} for side, rows in made.items()}
  assert people['gold'] and people['proxy'] and not people['gold'] & people['proxy']
  assert set.union(*of.values()) == {f'prompt {n}' for n in range(300)}
  share = {side: len(found) / 300 for side, found in of.items()}
  assert abs(share['test'] - 0.1) < 0.06 and abs(share['gold'] - 0.45) < 0.1
  assert real_model.divide(records, 3) == made != real_model.divide(records, 4)


def test_flags_name_kinds_and_tasks(tmp_path):
  def trial(**flags):
    return study.Trial(1, tmp_path, True, options(**flags))

  config = real_model.config_of(trial(data=['comparisons=jsonl:mine.jsonl']))
  assert config.data.comparisons == 'jsonl:mine.jsonl' and config.data.mapping.comparisons is None
  assert config.data.mapping.demonstrations == 'dolly'
  assert config.stages.sft.init.policy == f'hf:{CHAT}' == config.data.tokenizer
  with pytest.raises(ValueError, match="--data=squadv2=...: 'squadv2' is none of comparisons"):
    real_model.protocol(trial(data=['squadv2=x.json']), 'tasks')
  with pytest.raises(ValueError, match="--mapping=prompts=...: 'prompts' is none of"):
    real_model.protocol(trial(mapping=['prompts=dolly']), 'tasks')
  with pytest.raises(ValueError, match='--data=x does not have the form NAME=VALUE'):
    real_model.protocol(trial(data=['x']), 'tasks')
  one = real_model.protocol(trial(), 'preference')
  assert one == real_model.protocol(trial()._replace(seed=2), 'preference')
  assert one != real_model.protocol(trial(checkpoint='hf:other'), 'preference')


def test_other_comparisons_are_divided_anew(tmp_path):
  def prompts(text):
    path = tmp_path / 'mine.jsonl'
    rows = [dict(prompt=f'{text} {i}', responses=['a', 'b'], ranks=[0, 1]) for i in range(60)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    trial = study.Trial(1, tmp_path, True, options(data=[f'comparisons=jsonl:{path}']))
    paths = real_model.prepare(trial, real_model.config_of(trial))
    return {side: path.read_text() for side, path in paths.items()}

  first = prompts('one')
  assert first == prompts('one') and all('one ' in text for text in first.values())
  assert not any('one ' in text for text in prompts('two').values())


# ---- the table


def test_the_table_is_over_prompts_of_one_seed_or_over_seeds(tmp_path):
  def answers(seed, wins):
    return [
      dict(kind='answer', policy=policy, prompt=i, seed=seed, win=win, gold=1.0 + seed, proxy=0.0)
      | dict(kl=0.5, length=3.0)
      for policy, found in (('sft', [0.5] * 4), ('ppo', wins))
      for i, win in enumerate(found)
    ]

  task = dict(kind='task', task='text_loss', metric='loss', prompt='', better='lower')
  figures = {'mean': 2.0, 'low': 1.5, 'high': 2.5}
  figures |= {f'less SFT, {k}': v for k, v in (('mean', 0.25), ('low', 0.0), ('high', 0.5))}
  rows = answers(1, [1.0, 1.0, 1.0, 0.0]) + [
    dict(task, policy='ppo', seed=1, **figures),
    dict(kind='reward model', model='gold', accuracy=0.75, seed=1),
  ]
  first = real_model.table(rows)
  assert 'over seed 1, with 95% intervals over the prompts and items of one seed' in first
  assert '| PPO | 0.75 [' in first and '2.000 [1.500, 2.500]' in first
  assert '0.250 [0.000, 0.500]' in first and 'gold reward model on held-out pairs: 0.750' in first
  more = rows + answers(2, [1.0, 0.0, 0.0, 0.0]) + [dict(task, policy='ppo', seed=2, **figures)]
  second = real_model.table(more)
  assert 'over seeds 1, 2, with 95% intervals over seeds' in second and '| PPO | 0.50 [' in second
  assert '2.000 [2.000, 2.000]' in second
  curve = [
    dict(kind='curve', policy='ppo', step=i, seed=1, kl=i, gold=i, proxy=i, length=1.0)
    for i in range(3)
  ]
  real_model.plot([*more, *curve], tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').read_bytes()[:4] == b'\x89PNG'


# ---- the whole


@pytest.mark.long
def test_the_study_runs_from_a_checkpoint_and_files(tmp_path, monkeypatch):
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *_: one)
  made = configs.get_config

  def small(size):
    c = made(size)
    c.model.max_length = 256
    c.data.update(prompt_length=64, response_length=16, row_length=32)
    for name in ('ppo', 'ppo_ptx'):
      c.stages[name].update(iterations=2, save_every=1, minibatches=2)
      c.stages[name].optimizer.policy.warmup = 2
    return c

  monkeypatch.setattr(configs, 'get_config', small)
  rng = np.random.default_rng(0)
  word = lambda: ''.join(rng.choice(list('abcdefg '), 6))
  kinds = dict(
    demonstrations=[dict(prompt=word(), response=word()) for _ in range(16)],
    comparisons=[
      dict(prompt=f'{i} {word()}', responses=[word(), word()], ranks=[0, 1]) for i in range(120)
    ],
    pretrain=[dict(text=' '.join(word() for _ in range(40))) for _ in range(8)],
  )
  for kind, records in kinds.items():
    (tmp_path / f'{kind}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
  flags = options(
    [
      *(f'{kind}=jsonl:{tmp_path / kind}.jsonl' for kind in kinds),
      f'text_loss={tmp_path}/pretrain.jsonl',
    ]
  )
  rows = study.run_study(real_model, tmp_path, [1], True, flags)
  answers = [row for row in rows if row['kind'] == 'answer']
  assert {row['policy'] for row in answers} == set(real_model.POLICIES)
  sft = [row for row in answers if row['policy'] == 'sft']
  assert {row['win'] for row in sft} == {0.5} and {abs(row['kl']) < 1e-6 for row in sft} == {True}
  ppo = {row['prompt']: row for row in answers if row['policy'] == 'ppo'}
  for row in sft:
    mine = ppo[row['prompt']]
    wanted = 0.5 if mine['gold'] == row['gold'] else float(mine['gold'] > row['gold'])
    assert mine['win'] == wanted
  curve = {(r['policy'], r['step']) for r in rows if r['kind'] == 'curve'}
  assert curve == {(name, step) for name in ('ppo', 'ppo_ptx') for step in (1, 2)}
  tasks = {row['policy']: row for row in rows if row['kind'] == 'task'}
  assert tasks['sft']['less SFT, mean'] is None
  difference = tasks['ppo']['mean'] - tasks['sft']['mean']
  assert tasks['ppo']['less SFT, mean'] == pytest.approx(difference, abs=1e-6)
  asked = [
    json.loads(s) for s in (tmp_path / 'seed-1/real_data/test.jsonl').read_text().splitlines()
  ]
  trained = (tmp_path / 'seed-1/real_data/proxy.jsonl').read_text()
  assert asked and not any(json.dumps(row['prompt']) in trained for row in asked)
  found = json.loads((tmp_path / 'seed-1/real_gold/rm/checkpoints/config.json').read_bytes())
  assert found['data']['comparisons'].endswith('gold.jsonl')
