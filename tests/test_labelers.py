"""Held-out labelers: who is dealt where, what is trained on, accuracy and agreement by hand; the
command, twice."""

import collections
import json
import os
import pathlib

import numpy as np
import pytest

from alignjax.commands import heldout_labelers
from alignjax.configs import ukp_rm
from alignjax.data import sources
from alignjax.evals import stats
from alignjax.evals.reward import labelers

CHAT = pathlib.Path(__file__).parent / 'golden' / 'chat'
SHARED = pathlib.Path(
  os.environ.get('ALIGNJAX_DATA', pathlib.Path(__file__).parents[2] / 'shared' / 'data')
)


def vote(prompt, better, worse, who, tie=False):
  return dict(prompt=prompt, responses=[better, worse], ranks=[0, 0 if tie else 1], labeler_id=who)


def crowd(prompts=6, people=8):
  """Everybody prefers the longer of two responses; person 0 the shorter."""
  return [
    vote(f'p{p}', *(['aaa' + 'b' * i, 'a'] if who else ['a', 'aaa' + 'b' * i]), f'w{who}')
    for p in range(prompts)
    for who in range(people)
    for i in range(2)
  ]


def test_messages_are_one_prompt_however_their_fields_are_ordered():
  one, other = [dict(role='user', content='x')], [dict(content='x', role='user')]
  assert (
    labelers.prompt_key(dict(prompt=one))
    == labelers.prompt_key(dict(prompt=other))
    != labelers.prompt_key(dict(prompt='x'))
  )


def test_groups_are_a_pure_function_of_the_seed_and_leave_out_the_rare():
  records = [
    *crowd(),
    vote('p0', 'x', 'y', 'rare'),
    dict(prompt='p', responses=['a', 'b'], ranks=[0, 1]),
  ]
  made = labelers.groups(records, folds=3, min_votes=12, seed=0)
  assert sorted(x for g in made for x in g) == [f'w{i}' for i in range(8)] and sorted(
    map(len, made)
  ) == [2, 3, 3]
  assert made == labelers.groups(records[::-1], folds=3, min_votes=12, seed=0)
  assert any(made != labelers.groups(records, folds=3, min_votes=12, seed=s) for s in range(1, 4))
  with pytest.raises(ValueError, match='0 of 9 labelers have 13 votes'):
    labelers.groups(records, folds=3, min_votes=13, seed=0)
  with pytest.raises(ValueError, match='labeler_id'):
    labelers.groups(
      [dict(prompt='p', responses=['a', 'b'], ranks=[0, 1])], folds=2, min_votes=1, seed=0
    )


def test_folds_share_neither_labelers_nor_prompts():
  records = crowd()
  groups = labelers.groups(records, folds=3, min_votes=1, seed=0)
  measured = collections.Counter()
  for fold in range(3):
    cut = labelers.split(records, groups, fold, seed=0)
    who = lambda part: {r['labeler_id'] for r in part}
    where = lambda part: {r['prompt'] for r in part}
    assert who(cut.heldout) == set(groups[fold])
    assert who(cut.train) == who(cut.seen) == {f'w{i}' for i in range(8)} - set(groups[fold])
    assert where(cut.seen) == where(cut.heldout) and not where(cut.train) & where(cut.seen)
    measured.update(where(cut.seen))
  assert measured == {f'p{i}': 1 for i in range(6)}
  with pytest.raises(ValueError, match='6 distinct prompts'):
    labelers.split(records, [[f'w{i}'] for i in range(8)], 0, 0)


def test_votes_and_hits_by_hand():
  records = [
    dict(prompt='p', responses=['bb', 'a', 'ccc'], ranks=[1, 0, 1], labeler_id='w'),
    vote('q', 'x', 'y', 'v', tie=True),
  ]
  cast = labelers.votes(records)  # a > bb, a > ccc; bb and ccc tie
  assert [tuple(v) for v in cast] == [('"p"', 'a', 'bb', 'w', 1), ('"p"', 'a', 'ccc', 'w', 1)]
  assert labelers.hits(cast, labelers.longer).tolist() == [0.0, 0.0]
  assert labelers.hits(cast, lambda p, r: {'a': 1, 'bb': 1, 'ccc': 0}[r]).tolist() == [0.5, 1.0]


def test_agreement_by_hand():
  cast = labelers.votes(
    [
      vote('p', 'x', 'y', 'u'),
      vote('p', 'y', 'x', 'v'),
      vote('p', 'x', 'y', 'w'),
      vote('q', 'x', 'y', 'u'),
    ]
  )
  alike, prompts = labelers.agreement(cast)  # u-v no, u-w yes, v-w no
  assert sorted(alike) == [0.0, 0.0, 1.0] and prompts == ['"p"'] * 3
  other = labelers.votes(
    [vote('p', 'y', 'x', 'z'), vote('q', 'x', 'y', 'z'), vote('q', 'y', 'x', 'u')]
  )
  # p: no, yes, no; q: u-z yes, u with u is not counted
  alike, prompts = labelers.agreement(cast, other)
  assert sorted(alike) == [0.0, 0.0, 1.0, 1.0] and collections.Counter(prompts) == {
    '"p"': 3,
    '"q"': 1,
  }


def test_rankings_from_votes_by_hand():
  """a beats b 2:1, a and c tie once, b beats c 1:0: shares a (2/3 + 1/2)/2, b (1/3 + 1)/2, c (1/2 +
  0)/2."""
  records = [
    vote('p', 'a', 'b', '1'),
    vote('p', 'a', 'b', '2'),
    vote('p', 'b', 'a', '3'),
    vote('p', 'a', 'c', '1', tie=True),
    vote('p', 'b', 'c', '2'),
  ]
  made = labelers.rankings(records, k=3, rounds=2, seed=0)
  assert len(made) == 2 and all(r['prompt'] == 'p' for r in made)
  assert all(
    dict(zip(r['responses'], r['ranks'], strict=True)) == {'a': 1, 'b': 0, 'c': 2} for r in made
  )
  pairs = labelers.rankings(records, k=2, rounds=30, seed=0)
  best = {tuple(sorted(r['responses'])): r['responses'][r['ranks'].index(0)] for r in pairs}
  assert best == {('a', 'b'): 'a', ('b', 'c'): 'b'}  # the tie is no ranking
  many = [vote('p', f'{i:02}', f'{j:02}', 'w') for i in range(33) for j in range(i + 1, 33)]
  sets = labelers.rankings(many, k=9, rounds=1, seed=0)
  assert (
    sorted(len(r['responses']) for r in sets) == [8, 8, 8, 9]
    and len({x for r in sets for x in r['responses']}) == 33
  )
  assert all(r['responses'][r['ranks'].index(0)] == min(r['responses']) for r in sets)
  with pytest.raises(ValueError, match='at least two'):
    labelers.rankings(many, k=1, rounds=1, seed=0)


def test_figures_over_models_by_hand():
  # two folds, two seeds
  values = [[np.array([1.0, 0.0]), np.array([1.0, 1.0])], [np.array([0.0]), np.array([0.0])]]
  found = labelers.over_models(values, [['p', 'p'], ['q']])
  assert found['mean'] == pytest.approx(1.5 / 3) and found['n'] == 3 and found['models'] == 4
  assert found['mean_over_models'] == pytest.approx(0.375)
  assert found['sd_over_models'] == pytest.approx(np.std([0.5, 1, 0, 0], ddof=1))
  # averaged over the seeds, by prompt
  assert found['ci95'] == stats.interval([1.0, 0.5, 0.0], list('ppq'), (0, 1))['ci95']
  gap = stats.gap([1.0, 1.0, 0.0], ['p', 'p', 'q'], [1.0, 0.0], ['p', 'q'])
  assert (
    gap['mean'] == pytest.approx(2 / 3 - 1 / 2)
    and gap['n'] == 5
    and gap['ci95'][0] < 0 < gap['ci95'][1]
  )


def tiny(path):
  c = ukp_rm.get_config()
  c.data.update(
    tokenizer=f'hf:{CHAT}',
    comparisons=f'jsonl:{path}',
    demonstrations=f'jsonl:{path}',
    prompt_length=8,
    response_length=8,
    row_length=8,
  )
  c.data.mapping.update(comparisons=None, demonstrations='prompt=prompt,response=prompt')
  c.model.update(num_layers=1, d_model=32, num_heads=2, max_length=32)
  c.stages.rm.update(bias_demonstrations=4, responses_per_batch=16, k_buckets=(2,), row_lengths=())
  c.stages.rm.optimizer.reward.lr = 1e-2
  return c


@pytest.mark.slow
def test_the_whole_protocol_and_that_it_goes_on(tmp_path, monkeypatch):
  path = tmp_path / 'votes.jsonl'
  records = crowd(people=6)
  path.write_text(''.join(json.dumps(r) + '\n' for r in records))
  run = lambda **kw: heldout_labelers.cross_validate(
    tiny(path), tmp_path / 'out', **{**dict(folds=2, seeds=1, min_votes=12), **kw}
  )
  result = run()
  f = result['figures']
  assert f['accuracy_seen']['models'] == 2 and f['accuracy_seen']['n'] + f['accuracy_heldout'][
    'n'
  ] == len(records)
  everything = [
    v for fold in range(2) for v in labelers.split(records, result['groups'], fold, 0).heldout
  ]
  contrary = sum(r['labeler_id'] == 'w0' for r in everything) / len(everything)
  assert f['longer_heldout']['mean'] == pytest.approx(1 - contrary)
  # the model learnt what the crowd does
  assert f['accuracy_heldout']['mean'] == pytest.approx(f['longer_heldout']['mean'])
  trained = [
    json.loads(line) for line in (tmp_path / 'out/fold0-seed0/train.jsonl').read_text().splitlines()
  ]
  assert not {r['labeler_id'] for r in trained} & set(result['groups'][0])
  text = heldout_labelers.markdown(result)
  assert '| reward model |' in text and 'Seen less held out' in text
  (tmp_path / 'out/fold1-seed0/scores.json').unlink()
  trainings = []
  monkeypatch.setattr(
    heldout_labelers,
    'trained',
    lambda config, folder, *rest, of=heldout_labelers.trained: (
      trainings.append(folder.name) or of(config, folder, *rest)
    ),
  )
  assert run() == result and trainings == ['fold1-seed0']
  with pytest.raises(ValueError, match='another protocol'):
    run(min_votes=11)
  other = tiny(path)
  # a reward model of another config is not served for this one
  other.stages.rm.optimizer.reward.lr = 2e-2
  with pytest.raises(ValueError, match='another protocol'):
    heldout_labelers.cross_validate(other, tmp_path / 'out', folds=2, seeds=1, min_votes=12)


@pytest.mark.skipif(not SHARED.exists(), reason=f'no data under {SHARED}: set ALIGNJAX_DATA')
def test_the_real_votes():
  path = SHARED / 'comparisons/ukp_convarg'
  records = sources.read(f'jsonl:{path}/judgments.jsonl.gz', 'comparisons', 'ukp_convarg')
  groups = labelers.groups(records, folds=5, min_votes=100, seed=0)
  assert len(records) == 84_445 and sum(map(len, groups)) == 117  # by hand from the file
  alike, _ = labelers.agreement(labelers.votes(records))
  # two workers, where neither says equal: .7311 by the file's ids; some arguments have the same
  # text, which here counts as one
  assert alike.mean() == pytest.approx(0.7311, abs=0.003)
  arguments = sources.read(
    f'jsonl:{path}/arguments.jsonl.gz', 'demonstrations', 'ukp_convarg_demonstrations'
  )
  assert len(arguments) == 1052 and {a['prompt'] for a in arguments} == {
    r['prompt'] for r in records
  }
