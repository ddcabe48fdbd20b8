"""Rounds of collection: what is labelled next, by hand; who labels it; a tiny run of two rounds,
stopped anywhere; the same with people."""

import contextlib
import importlib
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import sqlalchemy as sa

from alignjax import rounds, rounds_items, rounds_report, sandbox, train
from alignjax.configs import rounds as config_of_rounds
from alignjax.configs import smollm2_135m
from alignjax.data import hygiene
from alignjax.evals import stats
from alignjax.label import assignment, catalog, choose, client, collect, schema, submissions
from alignjax.runtime import checkpoint, files, saved_config
from alignjax.setup.objects import make_setup
from tests import fakes, labeling

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHAT = ROOT / 'tests' / 'golden' / 'chat'
NAN = np.nan


def get_config():
  """Two rounds in which every step is compiled once. The reward models have one shape, and the
  number of their updates does not change the schedule."""
  c = config_of_rounds.get_config('tiny')
  c.stages.sft.update(demonstrations=16, documents=20, epochs=1)
  c.stages.sft.init.policy = 'random'
  rm, ppo = c.stages.rm, c.stages.ppo_ptx
  rm.update(bias_demonstrations=8, k_buckets=(5,), row_lengths=(), responses_per_batch=20)
  rm.optimizer.reward.update(schedule='constant', warmup=0)
  ppo.update(prompts=16, iterations=1, minibatches=1)
  ppo.rollout.update(episodes=8, segments=1)
  ppo.optimizer.policy.warmup = ppo.ptx.documents = ppo.ptx.rows_per_episode = 0
  ppo.loss.ptx_coef = 0.0
  c.rounds.update(
    labels=(10, 10),
    prompts=20,
    responses=(3, 5),
    choose=dict(fn='alignjax.label.choose:disagreement'),
    ensemble=2,
    evaluation_prompts=6,
    evaluation_samples=2,
  )
  return c


# ---- what is labelled next


def padded(*items):
  """f[1,N,K] of the scores of items."""
  most = max(map(len, items))
  return np.array([[[*scores, *[NAN] * (most - len(scores))] for scores in items]], float)


def test_near_tie_takes_the_smallest_margin_of_the_two_best():
  scores = padded([1.0, 0.7, 0.69], [3.0, 1.0], [5.0, 4.9, -9.0])
  assert choose.near_tie('abc', scores, seed=0).tolist() == [2, 0, 1]
  # Of two models the mean counts: the margins are now .3, 0 and .1.
  other = padded([1.0, 0.7, 0.69], [1.0, 3.0], [5.0, 4.9, -9.0])
  assert choose.near_tie('abc', np.concatenate([scores, other]), seed=0).tolist() == [1, 2, 0]


def test_disagreement_is_about_differences_of_scores():
  """Item 0: the models differ by a constant, which orders nothing; item 1: they order the two
  responses in opposite ways, variance .25; item 2: they agree on the order but not on the margin,
  variance (0 + .25 + .25) / 3."""
  one, other = padded([0, 1], [0, 1], [0, 1, -1]), padded([10, 11], [1, 0], [0, 2, -2])
  order = choose.disagreement('abc', np.concatenate([one, other]), seed=0)
  assert order.tolist() == [1, 2, 0]
  with pytest.raises(ValueError, match='needs the scores of two reward models'):
    choose.disagreement('abc', one, seed=0)


def test_without_a_reward_model_the_order_is_random_and_equal_items_are_shuffled():
  none, items = np.zeros((0, 50, 4)), list(range(50))
  found = choose.random(items, none, seed=3).tolist()
  assert sorted(found) == items != found
  assert found != choose.random(items, none, seed=4).tolist()
  for function in (choose.near_tie, choose.disagreement):
    assert function(items, none, seed=3).tolist() == found
  same = choose.near_tie(items, np.ones((1, 50, 4)), seed=3).tolist()
  assert sorted(same) == items != same


def pair(x, y):
  """The features of two responses that differ by (x, y)."""
  return [[1.0, 2.0], [1.0 + x, 2.0 + y]]


def test_d_optimal_by_hand():
  """The information of an item of two is that of their difference: 1 and 1 in the first direction,
  .64 in the second. The prior is (1 + 1 + .64) / 3 / 2 = .44. Item 0 adds log(1 + 1 / .44); then
  item 1 adds log(1 + 1 / 1.44) = .53, but item 2 log(1 + .64 / .44) = .90."""
  x = np.array([pair(1, 0), pair(1, 0), pair(0, 0.8)])
  choice = lambda **more: choose.d_optimal('abc', None, features=x, **more).tolist()
  none = np.zeros((0, 2, 2))
  assert choice(labels=3, earlier=none) == [0, 2, 1]
  assert choice(labels=1, earlier=none) == [0, 1, 2]
  # What was labelled before knows the second direction: 4 there, and log(1 + .64 / 4.44) = .13.
  assert choice(labels=3, earlier=np.array([pair(0, 2)])) == [0, 1, 2]
  # With a strong prior directions do not matter, and 2 x .64 / K of an item counts.
  assert choice(labels=3, earlier=none, prior=1e6) == [0, 1, 2]


def test_d_optimal_is_greedy_over_all_pairs_of_an_item():
  rng = np.random.default_rng(0)
  x, earlier = rng.normal(size=(12, 4, 3)), rng.normal(size=(2, 4, 3))
  x[::2, 3] = NAN  # of three responses

  def information(item):
    rows = item[~np.isnan(item[:, 0])]
    pairs = [np.outer(a - b, a - b) for i, a in enumerate(rows) for b in rows[:i]]
    return np.mean(pairs, axis=0)

  every = [information(item) for item in x]
  known = sum(map(information, earlier)) + np.trace(sum(every)) / 12 / 3 * np.eye(3)
  expected = []
  for _ in range(12):
    left = [i for i in range(12) if i not in expected]
    best = max(left, key=lambda i: np.linalg.slogdet(known + every[i])[1])
    known = known + every[best]
    expected.append(best)
  order = choose.d_optimal(range(12), None, labels=12, features=x, earlier=earlier)
  assert order.tolist() == expected


@pytest.mark.parametrize(
  'order,message',
  [
    ([0, 0, 1], 'no order of the 3 items'),
    ([0, 3], 'no order of the 3 items'),
    ([-1, 0], 'no order of the 3 items'),
    ([0.0, 1.0], 'no order of the 3 items'),
    (None, 'no order of the 3 items'),
    ([2], 'returned 1 of 3 items, but 2'),
  ],
)
def test_an_order_must_be_one(order, message):
  with pytest.raises(ValueError, match=message):
    choose.check(order, 3, 2, 'x:y')
  assert choose.check([2, 0], 3, 2, 'x:y').tolist() == [2, 0]


# ---- who labels it


def items_of(count):
  """Items whose responses j have the utility -j to every labeler, apart from the noise."""
  return [
    dict(
      prompt=f'prompt {i}',
      responses=[f'response {i}/{j}' for j in range(4)],
      policies=['a', 'b', 'a', 'b'],
      round=2,
      number=count - i,
      use_case='chat',
      features=[[0, j, 0, 0, 0, 0] for j in (1, 0, 2, 2)],
    )
    for i in range(count)
  ]


@pytest.fixture
def engine(tmp_path):
  made = schema.connect(str(tmp_path / 'labels.db'))
  yield made
  made.dispose()


def test_the_sandboxs_labelers_take_items_in_turn():
  labelers = sandbox.Labelers(0, train=3, noise=1e-9)
  rows = collect.by_sandbox(items_of(6), 5, labelers, 0)
  assert [row['labeler_id'] for row in rows] == [f'labeler-{i}' for i in (0, 1, 2, 0, 1)]
  assert rows[0] == dict(
    prompt='prompt 0',
    responses=[f'response 0/{j}' for j in range(4)],
    ranks=[1, 0, 2, 2],  # the last two look the same to them
    policies=['a', 'b', 'a', 'b'],
    round=2,
    labeler_id='labeler-0',
    use_case='chat',
  )


def test_a_rank_does_not_depend_on_what_else_is_labelled():
  """So that two choices differ in what they choose and in nothing else."""
  labelers, items = sandbox.Labelers(0, train=1, noise=5.0), items_of(40)
  rows = collect.by_sandbox(items, 40, labelers, 0)
  assert collect.by_sandbox(items[::-1], 40, labelers, 0) == rows[::-1]
  assert collect.by_sandbox(items, 40, labelers, 1) != rows
  assert len({tuple(row['ranks']) for row in rows}) > 4


def test_clients_over_http_make_the_same_rankings(engine, monkeypatch):
  """Also when they are stopped in the middle."""
  labelers, items = sandbox.Labelers(0, train=3), items_of(8)
  submit, count = client.Labeler.submit, []

  def stops(self, *args, **options):
    count.append(1)
    if len(count) == 4:
      raise KeyboardInterrupt
    return submit(self, *args, **options)

  monkeypatch.setattr(client.Labeler, 'submit', stops)
  with pytest.raises(KeyboardInterrupt):
    collect.by_clients(engine, 'round 2', items, 7, labelers, 0)
  rows = collect.by_clients(engine, 'round 2', items, 7, labelers, 0)
  assert json.dumps(rows) == json.dumps(collect.by_sandbox(items, 7, labelers, 0))
  assert len(count) == 8  # Nobody answered twice.
  with schema.reading(engine) as connection:
    assert collect._open(connection, 1) <= 1  # Item 8 may be with a labeler.


def answer(engine, task, person, ranks, status='done'):
  """A person is given an item and answers it; returns its prompt."""
  with schema.writing(engine) as connection:
    item = assignment.next_item(connection, task, person)
    if status == 'skipped':
      submissions.skip(connection, item, person, 'unclear')
    elif status == 'done':
      payload = dict(ratings=None, ranks=ranks, all_bad=False)
      submissions.submit(connection, item, person, payload)
    return connection.execute(
      sa.select(schema.items.c.prompt).where(schema.items.c.id == item)
    ).scalar()


def test_people_label_what_is_first_and_hardly_more(engine):
  """All sampled items were open to labelers, who ranked 93 where 48 were wanted."""
  people = labeling.people(
    engine, ann='labeler', bob='labeler', eve=('labeler', 'heldout'), cleo='labeler'
  )
  items = items_of(6)
  collecting = lambda: collect.by_people(engine, 'round 1', items, 3)
  with pytest.raises(collect.Missing, match="0 of the 3 rankings of 'round 1' .* 3 are missing"):
    collecting()
  assert answer(engine, 1, people['ann'], [1, 2, 3, 3]) == 'prompt 0'
  assert answer(engine, 1, people['bob'], None, 'skipped') == 'prompt 1'
  assert answer(engine, 1, people['bob'], None, 'skipped') == 'prompt 2'
  with schema.writing(engine) as connection:
    assert assignment.next_item(connection, 1, people['bob']) is None
  with pytest.raises(collect.Missing, match='1 of the 3 .* 2 are missing'):
    collecting()  # Two were skipped, so that the next two stand in for them.
  assert answer(engine, 1, people['bob'], [4, 3, 2, 1]) == 'prompt 3'
  assert answer(engine, 1, people['ann'], [1, 1, 1, 1]) == 'prompt 1'
  assert answer(engine, 1, people['cleo'], None, 'is given it') == 'prompt 2'
  rows = collecting()
  assert [(row['prompt'], row['labeler_id'], row['ranks']) for row in rows] == [
    ('prompt 0', 'ann', [0, 1, 2, 2]),
    ('prompt 1', 'ann', [0, 0, 0, 0]),
    ('prompt 3', 'bob', [3, 2, 1, 0]),
  ]
  assert rows[0]['policies'] == ['a', 'b', 'a', 'b'] and rows[0]['round'] == 2
  # What somebody works on stays, and the rest is taken out.
  with schema.reading(engine) as connection:
    hidden = sa.select(schema.items.c.prompt).where(schema.items.c.hidden.is_not(None))
    assert connection.execute(hidden).scalars().all() == ['prompt 4']
    assert connection.execute(sa.select(sa.func.count(schema.items.c.id))).scalar() == 5
  assert collecting() == rows


def test_held_out_labelers_do_not_train(engine):
  people = labeling.people(engine, eve=('labeler', 'heldout'))
  with pytest.raises(collect.Missing):
    collect.by_people(engine, 'round 1', items_of(3), 2)
  with schema.writing(engine) as connection:  # A researcher opens the task to everybody.
    catalog.edit_task(connection, 1, 1, pool='all')
  answer(engine, 1, people['eve'], [1, 2, 3, 4])
  with pytest.raises(collect.Missing, match='0 of the 2'):
    collect.by_people(engine, 'round 1', items_of(3), 2)


def test_items_of_another_run_and_too_few_items_are_errors(engine):
  with pytest.raises(collect.Missing):
    collect.by_people(engine, 'round 1', items_of(3), 2)
  with pytest.raises(ValueError, match="has a task 'round 1' with other items .* rounds.task"):
    collect.by_people(engine, 'round 1', items_of(3)[1:], 2)
  with schema.writing(engine) as connection:
    for number in (1, 2):
      catalog.hide(connection, number, 'pii')
  with pytest.raises(ValueError, match='0 of 2 rankings, and only 1 items'):
    collect.by_people(engine, 'round 1', items_of(3), 2)


# ---- a round's items


def run_of(config, tmp_path, text=None):
  base = files.absolute(config.rounds.base or tmp_path / 'base')
  one = jax.devices()[:1]
  setup = make_setup(rounds.of_base(config), base, devices=one)
  return rounds_items.Run(config, tmp_path, base, setup, 'fail')


def test_the_policies_of_each_round(tmp_path):
  run = run_of(get_config(), tmp_path)
  names = lambda number: [(p.name, round(p.share, 3)) for p in rounds_items.mixture(run, number)]
  sft = [('sft', 0.4), ('sft, temperature 1.5', 0.1)]
  assert names(1) == sft
  assert names(2) == [*sft, ('round 1', 0.4)]
  assert names(4) == [*sft, ('round 3', 0.4), ('round 1', 0.05), ('round 2', 0.05)]
  specs = [p.spec for p in rounds_items.mixture(run, 2)]
  assert specs[0] == f'{tmp_path}/base/sft/final' == run.policy(0)
  assert specs[2] == f'{tmp_path}/round-1/ppo_ptx/final'


def test_the_stages_of_a_round_start_from_the_base_and_learn_from_all_rounds(tmp_path):
  assert rounds.stages_before(config_of_rounds.get_config()) == ['pretrain', 'sft']
  run = run_of(get_config(), tmp_path)
  c = rounds.of_round(run, 2)
  assert train.resolve(c) == ['rm', 'ppo_ptx']
  assert c.data.comparisons == (
    f'jsonl:{tmp_path}/round-1/comparisons.jsonl;jsonl:{tmp_path}/round-2/comparisons.jsonl'
  )
  sft = f'{tmp_path}/base/sft/final'
  assert c.stages.rm.init.to_dict() == dict(reward=sft)
  assert c.stages.ppo_ptx.init.to_dict() == dict(
    policy=sft, ref=sft, value='stage:rm', reward='stage:rm'
  )
  assert c.stages.rm.prompts is None and c.data.heldout.share == 0
  assert train.resolve(rounds.of_round(run, 2, [2, 3])) == ['rm_2', 'rm_3']


def test_every_round_has_prompts_of_its_own(tmp_path):
  c = get_config()
  c.rounds.prompts = 300
  run = run_of(c, tmp_path)
  one, two = ([r['prompt'] for r in rounds_items.prompts(run, i)] for i in (1, 2))
  assert len(one) == len(two) == 300
  assert sum(a == b for a, b in zip(one, two, strict=True)) < 20
  path = tmp_path / 'prompts.jsonl'
  path.write_text(''.join(json.dumps(dict(prompt=f'the owl {i}')) + '\n' for i in range(25)))
  c.data.prompts, c.data.heldout.share, c.rounds.prompts = f'jsonl:{path}', 0.0, 10
  run = run_of(c, tmp_path)
  parts = [[r['prompt'] for r in rounds_items.prompts(run, i)] for i in (1, 2, 3, 4)]
  assert list(map(len, parts)) == [10, 10, 5, 0]
  assert len({p for part in parts for p in part}) == 25


def last_first(items, scores):
  """A function of a user that needs nothing else."""
  assert scores.shape == (0, 30, 4)
  return range(len(items))[::-1]


def test_a_users_function_and_the_places_of_held_out_items(tmp_path):
  c = get_config()
  c.rounds.choose = dict(fn='tests.test_rounds:last_first')
  run, items = run_of(c, tmp_path), items_of(30)
  assert rounds_items.ordered(run, 1, items, []) == items[::-1]
  extra = [dict(one, held_out=True) for one in items_of(4)]
  made = rounds_items.ordered(run, 1, [*extra, *items], [])
  assert [one for one in made if 'held_out' not in one] == items[::-1]
  places = [i for i, one in enumerate(made) if 'held_out' in one]
  assert len(places) == 4 and places[-1] < 14 and places != [0, 1, 2, 3] != [10, 11, 12, 13]


@pytest.mark.parametrize('of_sandbox', [False, True])
def test_a_design_counts_only_rankings_that_a_reward_model_is_trained_on(
  of_sandbox, tmp_path, monkeypatch
):
  """d_optimal is told the features of earlier rankings. Outside of the sandbox, those of held-out
  prompts are not among them, because no stage is trained on them."""
  c = get_config()
  c.rounds.choose = dict(fn='alignjax.label.choose:d_optimal')
  c.data.heldout.share = 0.5
  if not of_sandbox:
    c.data.prompts = 'jsonl:prompts.jsonl'
  run, items = run_of(c, tmp_path), items_of(12)
  ranked = [dict(prompt=f'old {i}', responses=['a', 'b'], ranks=[0, 1]) for i in range(20)]
  run.comparisons(1).parent.mkdir()
  run.comparisons(1).write_text(''.join(json.dumps(row) + '\n' for row in ranked))
  told = []

  def last_layers(run, number, items, earlier):
    told.extend(row['prompt'] for row in earlier)
    rng = np.random.default_rng(0)
    return rng.normal(size=(len(items), 4, 3)), rng.normal(size=(len(earlier), 4, 3))

  monkeypatch.setattr(rounds_items, 'last_layers', last_layers)
  rounds_items.ordered(run, 2, items, [])
  rule = lambda row: hygiene.held_out(row['prompt'], 0.5, c.data.heldout.seed)
  trained_on = [row['prompt'] for row in ranked if of_sandbox or not rule(row)]
  assert told == trained_on and (len(told) == 20 if of_sandbox else 0 < len(told) < 20)
  assert rounds.of_round(run, 2).data.heldout.share == (0.0 if of_sandbox else 0.5)


def test_responses_that_read_the_same_are_one():
  rows = [dict(prompt='p'), dict(prompt='q'), dict(prompt='p')]
  draws = [(0, 0), (0, 1), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
  said = {j: (text, text != 'c') for j, text in enumerate(['a', 'a', 'c', 'a', 'a', 'c', 'a'])}
  made = rounds_items.distinct(rows, ['one', 'two'], draws, said)
  # Of the second prompt both are the same, and the third is the first once more.
  assert made == [(rows[0], {'a': (True, 'one'), 'c': (False, 'two')})]


def test_the_gap_is_in_deviations_of_round_0():
  """The proxy rises from 0 (deviation 2) to 3: 1.5; gold from 1 (deviation 1) to 2: 1."""
  first, names = np.array([[2.0, -2.0]] * 4), list('abcd')
  figure = rounds_report.gap(first * 0 + 3, first, first * 0 + 2, first / 2 + 1, names)
  assert figure['mean'] == pytest.approx(0.5) and figure['n'] == 4
  assert figure['ci95'] == pytest.approx([0.5, 0.5])


def test_which_reward_model_is_measured_on_which_policy(tmp_path, monkeypatch):
  """Before and after: on the policy that the round's items came from."""
  run = run_of(get_config(), tmp_path)
  names = list('abcdef')
  samples = lambda run, i: rounds_report.Samples(names, f'samples {i}', np.full((6, 2), i))
  monkeypatch.setattr(rounds_report, 'sampled', samples)
  monkeypatch.setattr(rounds_report.sources, 'read', lambda *_: [0] * 7)
  scores = {(2, 'samples 2'): 5.0, (2, 'samples 0'): 1.0}
  spread = np.array([[1.0, -1.0]] * 6)
  monkeypatch.setattr(rounds_report, 'scores', lambda run, i, x: scores[i, x] + spread)
  gold = lambda run, found, pool: spread + 1 + 2.0 * int(found.comparisons[-1])
  monkeypatch.setattr(rounds_report, '_gold', gold)
  measured = lambda run, name, model, found: {f'accuracy_{name}': (model, found)}
  monkeypatch.setattr(rounds_report, '_accuracy', measured)
  found = rounds_report._measured(run, 2)
  assert {k: v for k, v in found.items() if k.startswith('accuracy')} == dict(
    accuracy_before=(1, 'samples 1'),
    accuracy_after=(2, 'samples 1'),
    accuracy_first=(2, 'samples 0'),
    accuracy_own=(2, 'samples 2'),
  )
  assert found['labels'] == 7 and found['kl']['mean'] == 2.0
  assert found['gold']['mean'] == 5.0 and found['gold_gain']['mean'] == 4.0
  assert found['proxy_gain']['mean'] == 4.0 and found['gap']['mean'] == 0.0


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'labels': ()}, 'rounds.labels=.* must be a tuple of whole numbers'),
    ({'labels': (5, 0)}, 'rounds.labels=.* one for each round'),
    ({'prompts': 9}, '9 are fewer than the 10 rankings'),
    ({'responses': (4, 10)}, 'from 2 to 9'),
    ({'responses': (4, 6)}, 'up to 6 responses, more than the 5 .* k_buckets'),
    ({'labelers': 'robots'}, 'one of sandbox, clients, people'),
    ({'choose': dict(fn='alignjax.label.choose:rando')}, 'did you mean random'),
    ({'choose': dict(fn='alignjax.label.choose:random', prior=1)}, "no coefficients.*not 'prior'"),
    ({'policies': (dict(init='newest', temperature=1.0, share=1.0),)}, 'one above 0'),
  ],
)
def test_wrong_entries_are_found_before_any_stage_runs(changes, message, tmp_path):
  c = get_config()
  with c.unlocked(), c.ignore_type():
    c.rounds.update(changes)
    if 'choose' in changes:
      c.rounds.choose = changes['choose']
  with pytest.raises(ValueError, match=message):
    rounds.main(c, tmp_path)
  assert not (tmp_path / 'base').exists()


def test_a_config_without_rounds_is_an_error(tmp_path):
  c = get_config()
  del c.rounds
  with pytest.raises(ValueError, match='no entry `rounds`. Use --config=rounds'):
    rounds.main(c, tmp_path)


# ---- a run


@pytest.fixture(scope='module')
def patch():
  with pytest.MonkeyPatch.context() as m:
    one = jax.devices()[:1]
    m.setattr(jax, 'devices', lambda *_: one)  # as on a laptop
    yield m


@pytest.fixture(scope='module')
def finished(patch, tmp_path_factory):
  """(WORKDIR of a whole run, rounds.json)."""
  workdir = tmp_path_factory.mktemp('rounds')
  return workdir, rounds.main(get_config(), workdir)


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_of_two_rounds(finished):
  workdir, result = finished
  assert json.loads((workdir / 'rounds.json').read_text()) == result
  one, two = result['rounds']
  assert [r['labels_so_far'] for r in (one, two)] == [10, 20]
  assert 'accuracy_before' not in one and one['accuracy_after'] == one['accuracy_first']
  for name in ('accuracy_before', 'accuracy_after', 'accuracy_own', 'gold', 'gap', 'kl'):
    low, high = two[name]['ci95']
    assert low <= two[name]['mean'] <= high
  text = (workdir / 'rounds.md').read_text()
  assert '| round | labels so far | accuracy before |' in text and '\n| 2 | 20 | ' in text
  assert (workdir / 'rounds.png').stat().st_size > 5000
  rows = lines(workdir / 'round-2' / 'comparisons.jsonl')
  assert len(rows) == 10 and {row['round'] for row in rows} == {2}
  assert 'round 1' in {name for row in rows for name in row['policies']}
  assert {
    name for row in lines(workdir / 'round-1' / 'comparisons.jsonl') for name in row['policies']
  } <= {'sft', 'sft, temperature 1.5'}
  assert all(2 <= len(row['responses']) == len(set(row['responses'])) <= 5 for row in rows)


@pytest.mark.slow
def test_the_second_round_is_chosen_by_two_reward_models_of_the_first(finished):
  """By hand: scores of the items under both models, and the variance of their differences."""
  workdir, _ = finished
  c = get_config()
  run = run_of(c, workdir)
  assert checkpoint.is_finished(workdir / 'round-1' / 'rm_2' / 'final')
  assert not (workdir / 'round-2' / 'rm_2').exists()  # Nothing is chosen after the last round.
  items = rounds_items.candidates(run, 2)
  template, length = run.setup.text.template, run.config.data.response_length
  pairs = [template.row(item['prompt'], text) for item in items for text in item['responses']]
  score, scores = rounds_items.make_scorer(run), []
  for name in ('rm', 'rm_2'):
    folder = f'{workdir}/round-1/{name}/final'
    params = rounds_items.initial_params(run.setup, folder, 'scalar', 0)
    scores.append(score(params, [prompt + response[:length] for prompt, response in pairs]))
  ends = np.cumsum([len(item['responses']) for item in items])[:-1]
  spread = [
    np.var(own - own.mean(1, keepdims=True), axis=0).mean()
    for own in np.split(np.array(scores), ends, axis=1)
  ]
  assert np.all(np.diff(spread) <= 1e-5) and spread[0] > 2 * spread[-1]


@pytest.mark.long
def test_a_run_that_was_stopped_ends_with_the_same_results(finished, tmp_path, monkeypatch):
  """After each step that a round has. The stages themselves are tests/test_train.py's."""
  workdir, result = finished
  c = get_config()
  c.rounds.base = str(workdir / 'base')
  calls, stopped = [], []

  def stopping(module, name, call, after=False):
    """Ends the run before or after a call of a function, counted over all attempts."""
    function = getattr(module, name)

    def counted(*args, **options):
      calls.append(name)
      now = calls.count(name) == call
      made = None if now and not after else function(*args, **options)
      if now:
        stopped.append(name)
        raise KeyboardInterrupt
      return made

    monkeypatch.setattr(module, name, counted)

  # In the first round when its items are there, in the second when they are, and at its end.
  stopping(collect, 'by_sandbox', 1)
  stopping(rounds_items, 'candidates', 3, after=True)
  stopping(rounds_report, 'measure', 3)
  for _ in range(3):
    with pytest.raises(KeyboardInterrupt):
      rounds.main(c, tmp_path)
  assert stopped == ['by_sandbox', 'candidates', 'measure']
  assert rounds.main(c, tmp_path) == result
  for number in (1, 2):
    one, other = (folder / f'round-{number}' for folder in (workdir, tmp_path))
    assert (one / 'comparisons.jsonl').read_bytes() == (other / 'comparisons.jsonl').read_bytes()
    for stage in ('rm', 'ppo_ptx'):
      assert checkpoint.weights(one / stage / 'final') == checkpoint.weights(
        other / stage / 'final'
      )


@pytest.mark.slow
def test_other_entries_are_refused_and_a_further_round_is_not(finished):
  workdir, _ = finished
  c = get_config()
  c.rounds.prompts = 21
  with pytest.raises(
    saved_config.Mismatch, match='candidates.json .*: rounds.prompts. Use another'
  ):
    rounds.main(c, workdir)
  c = get_config()
  c.rounds.labels = (10, 10, 5)
  run = run_of(c, workdir)
  for number in (1, 2):
    assert len(rounds_items.candidates(run, number)) > 10


@pytest.mark.slow
def test_clients_of_the_server_write_the_same_file(finished, tmp_path):
  """So the reward model that learns from it is the same too."""
  workdir, _ = finished
  c = get_config()
  c.rounds.base, c.rounds.labelers = str(workdir / 'base'), 'clients'
  run = run_of(c, tmp_path)
  rounds.label(run, 1)
  path = workdir / 'round-1' / 'comparisons.jsonl'
  assert run.comparisons(1).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_samples_and_their_kl(finished):
  workdir, _ = finished
  c = get_config()
  run = run_of(c, workdir)
  assert not rounds_report.sampled(run, 0).kl.any()
  found = rounds_report.sampled(run, 1)
  assert found.kl.shape == (6, 2) and len(found.names) == 6
  prompt, response = found.comparisons.prompts[3], found.comparisons.responses[3][1]
  tokens = np.array([prompt + response])
  both = [
    run.setup.nets.logprobs(
      rounds_items.initial_params(run.setup, run.policy(i), 'lm', 0), tokens, tokens >= 0
    )[0][0, len(prompt) :].sum()
    for i in (1, 0)
  ]
  fakes.close(found.kl[3, 1], both[0] - both[1], atol=1e-4)
  judged = sandbox.judge(
    run.setup.text.world,
    rounds_items.records(run.setup, 'prompts', 6, 'test')[3]['meta'],
    *run.setup.text.template.decode_response(response),
  )
  gold = run.setup.text.labelers.features([judged])
  np.testing.assert_array_equal(found.comparisons.features[3][1], gold[0])


@pytest.mark.slow
def test_d_optimal_is_given_the_features_of_what_was_labelled(finished, tmp_path):
  workdir, _ = finished
  run = run_of(get_config(), workdir)
  items = rounds_items.candidates(run, 2)
  earlier = lines(run.comparisons(1))
  x, known = rounds_items.last_layers(run, 2, items, earlier)
  most = max(len(row['responses']) for row in [*items, *earlier])
  assert x.shape == (len(items), most, 32) and known.shape == (10, most, 32)
  count = len(earlier[0]['responses'])
  rows = rounds_items.rows_of(run.setup, earlier[:1])
  params = rounds_items.initial_params(run.setup, run.reward_model(1), 'scalar', 0)
  head = params['final']['score']
  expected = rounds_items.make_scorer(run)(params, rows)
  fakes.close(known[0, :count] @ np.asarray(head['kernel'])[:, 0] + head['bias'][0], expected)
  assert np.isnan(known[0, count:]).all()


@pytest.mark.slow
def test_people_are_waited_for(finished, tmp_path):
  """The command says how many rankings are missing and ends with 75; with the answers the round
  goes on."""
  workdir, _ = finished
  flags = [f'--config.rounds.base={workdir}/base', '--config.rounds.labelers=people']
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      "import sys; sys.argv[0] = 'alignjax'; from alignjax.commands import command, rounds; "
      'command.start(rounds.main, sys.argv[1:])',
      f'--config={__file__}',
      f'--workdir={tmp_path}',
      *flags,
    ],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
    env=environment(),
  )
  assert done.returncode == 75, done.stdout + done.stderr
  assert (
    "0 of the 10 rankings of 'round 1' are there, 10 are missing. `alignjax label serve "
    f'--database={tmp_path}/labels.db` shows the items to labelers; when they have ranked them, '
    'the same command goes on.\n'
  ) in done.stdout
  c = get_config()
  c.rounds.base, c.rounds.labelers = str(workdir / 'base'), 'people'
  run = run_of(c, tmp_path)
  engine = schema.connect(f'{tmp_path}/labels.db')
  ann = labeling.people(engine, ann='labeler')['ann']
  with contextlib.closing(engine.raw_connection()) as raw:
    assert raw.cursor().execute('select count(*) from items').fetchone()[0] == 10
  items = rounds_items.candidates(run, 1)
  for i in range(10):
    ranks = list(range(1, len(items[i]['responses']) + 1))
    assert answer(engine, 1, ann, ranks) == items[i]['prompt']
  engine.dispose()
  rounds.label(run, 1)
  rows = lines(run.comparisons(1))
  assert [row['prompt'] for row in rows] == [item['prompt'] for item in items[:10]]
  assert rows[0]['ranks'] == list(range(len(rows[0]['ranks']))) and rows[0]['labeler_id'] == 'ann'


def environment():
  return os.environ | {
    'XLA_FLAGS': '',
    'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
  }


@pytest.mark.long
def test_rounds_on_real_data_have_held_out_items(patch, tmp_path):
  """A checkpoint and a file of prompts: people also rank samples of the newest policy on held-out
  prompts, which the reward model is measured on and not trained on."""
  c = smollm2_135m.get_config('tiny')
  c.checkpoint = f'hf:{CHAT}'
  path = tmp_path / 'prompts.jsonl'
  path.write_text(''.join(json.dumps(dict(prompt=f'say {i}')) + '\n' for i in range(60)))
  with c.unlocked(), c.ignore_type():
    c.model.max_length, c.data.template = 256, 'plain'
    c.data.prompts, c.data.mapping.prompts = f'jsonl:{path}', None
    c.data.heldout.share = 0.3
    for stage, role in (('rm', 'reward'), ('ppo_ptx', 'policy'), ('ppo_ptx', 'ref')):
      c.stages[stage].init[role] = f'hf:{CHAT}'
    c.rounds = config_of_rounds.entry(
      labels=(6,),
      prompts=20,
      responses=(2, 3),
      labelers='people',
      evaluation_prompts=4,
      evaluation_samples=2,
      policies=(dict(init=f'hf:{CHAT}', temperature=1.0, share=1.0),),
    )
  run = run_of(c, tmp_path)
  assert rounds.stages_before(c) == []
  items = rounds_items.candidates(run, 1)
  held_out = lambda row: hygiene.held_out(row['prompt'], 0.3, c.data.heldout.seed)
  extra = [item for item in items if item.get('held_out')]
  assert 2 <= len(extra) <= 4 and all(map(held_out, extra))
  assert not any(held_out(item) for item in items if not item.get('held_out'))
  with pytest.raises(collect.Missing, match=f'0 of the {6 + len(extra)} rankings'):
    rounds.label(run, 1)
  engine = schema.connect(f'{tmp_path}/labels.db')
  ann = labeling.people(engine, ann='labeler')['ann']
  for item in items[: 6 + len(extra)]:
    answer(engine, 1, ann, list(range(1, len(item['responses']) + 1)))
  engine.dispose()
  rounds.label(run, 1)
  measured = rounds_report._held_out(run, lines(run.comparisons(1)))
  assert len(measured.prompts) == len(extra) and measured.ranks[0][:2] == [0, 1]


# ---- experiments/measure_rounds.py

ARMS = (
  ('random', 1),
  ('random', 2),
  ('disagreement', 2),
  ('near_tie', 2),
  ('d_optimal', 1),
  ('d_optimal', 2),
)


@pytest.fixture(scope='module')
def measuring():
  with pytest.MonkeyPatch.context() as m:
    m.syspath_prepend(str(ROOT / 'experiments'))
    yield importlib.import_module('measure_rounds')


def test_the_runs_of_a_measurement_have_the_same_labels_and_prompts(measuring, tmp_path):
  c = config_of_rounds.get_config()
  options = types.SimpleNamespace(labels=2000, ensemble=3)
  assert measuring.arms(['random', 'near_tie']) == [('random', 1), ('random', 2), ('near_tie', 2)]
  one, two = (measuring.changed(c, 7, 'random', n, options, tmp_path).rounds for n in (1, 2))
  assert (one.labels, one.prompts) == ((2000,), 6000)
  assert (two.labels, two.prompts) == ((1000, 1000), 3000)
  made = measuring.changed(c, 7, 'disagreement', 2, options, tmp_path)
  assert (made.seed, made.world.seed, made.rounds.ensemble) == (7, 7, 3)


def test_differences_are_paired_by_seed(measuring):
  def rounds_of(*golds):
    figures = lambda gold: {key: dict(mean=gold) for key in measuring.FIGURES}
    return [figures(gold) | dict(labels_so_far=10 * i) for i, gold in enumerate(golds, 1)]

  found = {
    seed: {
      'random-1': rounds_of(seed),
      'random-2': rounds_of(9.0, seed + 1.0 + 0.1 * (seed % 2)),
      'near_tie-2': rounds_of(9.0, seed + 1.0 - 2 * (seed % 2)),
    }
    for seed in range(4)
  }
  last = {row['name']: row for row in measuring.means(found) if row['labels'] == 20}
  assert last['random-2']['gold']['mean'] == pytest.approx(1.5 + 1.05)
  rows = {row['what']: row['gold'] for row in measuring.differences(found)}
  assert list(rows) == ['random: two rounds less one', 'two rounds: near_tie less random']
  assert rows['random: two rounds less one']['mean'] == pytest.approx(1.05)
  assert rows['two rounds: near_tie less random']['mean'] == pytest.approx(-1.05)
  text = measuring.markdown(
    dict(
      labels=20,
      seeds=[0, 1, 2, 3],
      runs=measuring.means(found),
      differences=measuring.differences(found),
    )
  )
  assert '- random: two rounds less one: accuracy on the samples of round 0 better, ' in text
  assert (
    '- two rounds: near_tie less random: accuracy on the samples of round 0 not told apart' in text
  )


def close(found, kept):
  """Whether two trees are the same but for the last bits of their numbers, which differ from
  processor to processor."""
  if isinstance(found, dict):
    return found.keys() == kept.keys() and all(close(found[key], kept[key]) for key in found)
  if isinstance(found, (list, tuple)):
    return len(found) == len(kept) and all(map(close, found, kept))
  return found == (pytest.approx(kept, rel=1e-9) if isinstance(found, float) else kept)


def test_the_documented_rounds_are_those_that_were_measured(measuring):
  """The table in docs/labeling.md, from measured.json, from the rounds.json of every run."""
  folder = ROOT / 'experiments' / 'results' / 'rounds'
  result = json.loads((folder / 'measured.json').read_bytes())
  found = {}
  for seed in result['seeds']:
    paths = {f'{c}-{n}': folder / f'seed-{seed}/{c}-{n}/rounds.json' for c, n in ARMS}
    found[seed] = {name: json.loads(p.read_bytes())['rounds'] for name, p in paths.items()}
    for name in ('disagreement-1', 'near_tie-1'):  # There is no reward model in the first round.
      found[seed][name] = found[seed]['random-1']
  assert len(found) == 5 and close(measuring.means(found), result['runs'])
  assert close(measuring.differences(found), result['differences'])
  assert measuring.markdown(result) == (folder / 'measured.md').read_text()
  page = (ROOT / 'docs' / 'labeling.md').read_text()
  last = {row['name']: row for row in result['runs']}
  for choice, count in ARMS:
    row = last[f'{choice}-{count}']
    figures = (('gold', 2), ('accuracy_own', 2), ('kl', 1))
    cells = [stats.show(row[key], digits=digits) for key, digits in figures]
    words = {1: 'one round', 2: 'two rounds'}[count]
    assert f'| {choice}, {words} | {" | ".join(cells)} |' in page
  differences = {row['what']: row for row in result['differences']}
  for what, key in (
    ('random: two rounds less one', 'gold'),
    ('two rounds: disagreement less random', 'gold'),
    ('two rounds: disagreement less random', 'accuracy_own'),
  ):
    assert stats.show(differences[what][key], digits=2) in page
  outside = [stats.apart(row[key]) for row in differences.values() for key in measuring.COMPARED]
  assert len(outside) == 24 and sum(map(abs, outside)) == 2
