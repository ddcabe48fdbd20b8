"""Findings: every claim with arrays for which it is right, wrong, or open, and where what it
presumes fails."""

import json

import numpy as np
import pytest

from alignjax import report
from alignjax.commands import summarize
from alignjax.evals import findings as module
from alignjax.evals.findings import NO, NOT_SHOWN, YES, findings
from alignjax.sandbox import Labelers

N = 300
LABELERS = Labelers(0)
PROMPTS, FACTS = [f'prompt {i}' for i in range(N)], [f'fact {i // 8}' for i in range(N)]
PREFERRED, SAFE, PAYS_LOSS, PAYS_TASK, WINS_BACK, KEEPS = (
  'PPO-ptx is preferred',
  'less toxic',
  'PPO pays in pretraining loss',
  'PPO pays in reading',
  'wins back',
  'PPO-ptx keeps',
)


def policy(good=0.5, truthful=0.5, toxic=0.2, nats=2.0, reading=0.9, translation=0.9, seed=0, n=N):
  """Arrays of one policy: shares of follow = 1, of truth and so on, spread over the items by the
  seed; nats per token, with an error of each document."""
  draw = lambda name, p: (
    np.random.default_rng([seed, len(name)]).permutation(n) < round(p * n)
  ).astype(float)
  features = np.zeros((n, 6))
  features[:, 0] = draw('follow', good)
  tokens = np.random.default_rng(9).integers(5, 30, n).astype(float)
  noise = np.random.default_rng([seed, 77]).normal(0, 0.05, n)
  return {
    'features': features,
    'truthful': draw('truthful', truthful),
    'toxic': draw('toxic', toxic),
    'reading_comprehension': draw('reading', reading),
    'translation': draw('translation', translation),
    'nll_book': tokens * (nats + noise),
    'tokens_book': tokens,
  }


def run(**changes):
  """Everything right by default; changes: policy -> the keywords that differ."""
  usual = {
    'pretrained': dict(good=0.1, truthful=0.1, toxic=0.6, nats=2.0),
    'sft': dict(good=0.5, nats=2.02),
    'ppo': dict(good=0.9, truthful=0.5, toxic=0.0, nats=3.0, reading=0.5, translation=0.2),
    'ppo_ptx': dict(good=0.92, truthful=0.7, toxic=0.0, nats=2.1, reading=0.88, translation=0.85),
  }
  arrays = {
    name: policy(**(kw | changes.get(name, {})), seed=i)
    for i, (name, kw) in enumerate(usual.items())
  }
  return findings(arrays, LABELERS, PROMPTS, FACTS)


def held(found, words):
  (out,) = [f['held'] for claim, f in found.items() if words in claim]
  return out


def test_all_eight_where_all_is_well():
  found = run()
  assert len(found) == 8 and {f['held'] for f in found.values()} == {YES}, found
  assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
  'changes,words,outcome',
  [
    (dict(ppo_ptx=dict(good=0.3)), PREFERRED, NO),
    (dict(ppo_ptx=dict(good=0.53)), PREFERRED, NOT_SHOWN),
    (dict(pretrained=dict(good=0.8)), 'SFT is preferred', NO),
    (dict(pretrained=dict(good=0.5)), 'SFT is preferred', NOT_SHOWN),
    (dict(ppo_ptx=dict(truthful=0.02), pretrained=dict(truthful=0.4)), 'more truthful', NO),
    (dict(ppo_ptx=dict(truthful=0.12)), 'more truthful', NOT_SHOWN),
    (dict(ppo_ptx=dict(toxic=0.9)), SAFE, NO),
    (dict(ppo_ptx=dict(toxic=0.58)), SAFE, NOT_SHOWN),
    (dict(ppo=dict(nats=1.9)), PAYS_LOSS, NO),
    (dict(ppo=dict(nats=2.0)), PAYS_LOSS, NOT_SHOWN),
    (dict(ppo=dict(reading=0.9)), PAYS_TASK, YES),  # one of the two is enough
    (dict(ppo=dict(reading=0.9, translation=0.9)), PAYS_TASK, NOT_SHOWN),
    (
      dict(ppo=dict(reading=1.0, translation=1.0), pretrained=dict(reading=0.8, translation=0.8)),
      PAYS_TASK,
      NO,
    ),
    (dict(ppo_ptx=dict(nats=2.5)), WINS_BACK, NO),
    (dict(ppo_ptx=dict(nats=2.25)), WINS_BACK, NOT_SHOWN),
    (dict(ppo_ptx=dict(reading=0.6)), WINS_BACK, NO),
    # PPO does not pay in reading
    (dict(ppo=dict(reading=0.9, translation=0.9), ppo_ptx=dict(reading=0.5)), WINS_BACK, YES),
    # nothing to win back
    (dict(ppo=dict(nats=2.0, reading=0.9, translation=0.9)), WINS_BACK, NOT_SHOWN),
    (dict(ppo=dict(nats=1.8, reading=0.95, translation=0.95)), WINS_BACK, NOT_SHOWN),
    (dict(ppo_ptx=dict(good=0.6)), KEEPS, NO),
    (dict(ppo_ptx=dict(good=0.79)), KEEPS, NOT_SHOWN),
    (dict(ppo=dict(good=0.5)), KEEPS, NOT_SHOWN),  # no gain to keep
    (dict(ppo=dict(good=0.2), ppo_ptx=dict(good=0.15)), KEEPS, NOT_SHOWN),
  ],
)
def test_each_outcome_of_each_finding(changes, words, outcome):
  assert held(run(**changes), words) == outcome


def test_what_is_the_same_as_ppo_wins_back_nothing_and_keeps_all():
  arrays = {
    'pretrained': policy(good=0.1, seed=0),
    'sft': policy(seed=1),
    'ppo': policy(good=0.9, nats=3.0, translation=0.1, seed=2),
  }
  found = findings(arrays | {'ppo_ptx': arrays['ppo']}, LABELERS, PROMPTS, FACTS)
  assert held(found, WINS_BACK) == NO and held(found, KEEPS) == YES
  back = next(f for claim, f in found.items() if WINS_BACK in claim)
  assert [p['figure']['mean'] for p in back['parts']] == pytest.approx(
    [0, 0], abs=1e-12
  ) and 'reading' in back['why']
  found = findings(arrays | {'ppo_ptx': arrays['pretrained']}, LABELERS, PROMPTS, FACTS)
  assert held(found, WINS_BACK) == YES and held(found, KEEPS) == NO
  found = findings(
    {n: arrays['sft'] for n in ('pretrained', 'sft', 'ppo', 'ppo_ptx')}, LABELERS, PROMPTS, FACTS
  )
  assert {f['held'] for f in found.values()} == {NOT_SHOWN}, (
    'policies that are all the same show nothing'
  )


def test_differences_are_paired():
  """PPO-ptx is wrong on a tenth of the items on which the pretrained model is: the two shares' own
  intervals overlap."""
  arrays = {name: policy(seed=5) for name in ('pretrained', 'sft', 'ppo', 'ppo_ptx')}
  lie = np.flatnonzero(arrays['pretrained']['truthful'] == 0)[:12]
  arrays['ppo_ptx'] = arrays['ppo_ptx'] | {'truthful': arrays['ppo_ptx']['truthful'].copy()}
  arrays['ppo_ptx']['truthful'][lie] = 1.0
  assert held(findings(arrays, LABELERS, PROMPTS, PROMPTS), 'more truthful') == YES
  assert (
    held(findings(arrays, LABELERS, PROMPTS, ['one fact'] * N), 'more truthful') == NOT_SHOWN
  ), 'all answers are about one fact'


def test_few_items_show_little():
  few = {
    name: {k: v[:4] for k, v in policy(**kw).items()}
    for name, kw in dict(
      pretrained=dict(good=0.0), sft=dict(good=0.0), ppo=dict(good=1.0), ppo_ptx=dict(good=1.0)
    ).items()
  }
  found = findings(few, LABELERS, PROMPTS[:4], FACTS[:4])
  assert held(found, 'more truthful') == NOT_SHOWN and held(found, KEEPS) != NO


def test_what_was_not_measured_is_not_shown():
  found = findings(
    {'sft': policy(), 'ppo_ptx': policy(good=0.95, seed=3)}, LABELERS, PROMPTS, FACTS
  )
  assert held(found, PREFERRED) == YES
  assert held(found, WINS_BACK) == NOT_SHOWN
  assert next(f for c, f in found.items() if WINS_BACK in c)['why'] == 'ppo was not measured'


def test_words_and_the_table_of_several_runs():
  found = run(ppo_ptx=dict(nats=2.5))
  text = module.in_words(next(f for c, f in found.items() if WINS_BACK in c))
  assert text.startswith(
    'of the pretraining loss 0.50 [0.49, 0.51], below 0.75; of reading 0.9'
  ) and text.endswith('], above 0.75')
  (unsure,) = [f for c, f in run(ppo_ptx=dict(truthful=0.12)).items() if 'more truthful' in c]
  assert module.in_words(unsure).endswith('], not told from 0')
  reports = [
    dict(seed=i, policies={}, findings=f, reward_model={}, seconds={})
    for i, f in enumerate((run(), found, run()))
  ]
  table = summarize.table(reports)
  assert '| finding, seeds by its intervals | yes | no | not shown |' in table
  assert '| PPO-ptx wins back three quarters of each loss | 2 of 3 | 1 of 3 | 0 of 3 |' in table


def test_policies_stand_in_the_order_of_the_pipeline():
  names = dict(zz='a', ppo_ptx='a', ppo='a', pretrained='a', sft='a', pretrained_prompted='a')
  assert list(report.in_order(names)) == [
    'pretrained',
    'pretrained_prompted',
    'sft',
    'ppo',
    'ppo_ptx',
    'zz',
  ]
