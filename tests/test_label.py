"""Items, who gets them, answers, figures and exports of the labeling database."""

import itertools
import json

import numpy as np
import pytest
import scipy.stats
import sqlalchemy as sa

from alignjax import sandbox
from alignjax.data import sources
from alignjax.evals.preference import judgments, statistics
from alignjax.label import (
  accounts,
  answers,
  assignment,
  catalog,
  exchange,
  figures,
  history,
  schema,
  submissions,
)
from tests import labeling
from tests.labeling import take


@pytest.fixture
def engine(tmp_path):
  made = schema.connect(str(tmp_path / 'labels.db'))
  yield made
  made.dispose()


def submit(engine, item, person, ranks=(1, 2, 3, 4), **more):
  payload = dict(ratings=None, ranks=list(ranks), all_bad=False) | more
  labeling.submit(engine, item, person, payload)


def export(engine, what, **options):
  with schema.reading(engine) as connection:
    return exchange.export(connection, what, **options)


# Who gets which item


def test_an_item_goes_to_as_many_labelers_as_its_overlap(engine):
  """A lease counts like an answer, so that no labeler works in vain."""
  people = labeling.people(engine, ann='labeler', bob='labeler', cleo='labeler')
  task = labeling.task(engine, records=labeling.candidates(1), overlap=2)
  first = take(engine, task, people['ann'])
  assert take(engine, task, people['bob']) == first
  assert take(engine, task, people['cleo']) is None
  submit(engine, first, people['ann'])
  assert take(engine, task, people['cleo']) is None
  assert take(engine, task, people['bob']) == first  # Their own unfinished item.


def test_nobody_gets_an_item_twice(engine):
  """Neither after an answer, nor after a skip or a withdrawal; others do get the last two."""
  people = labeling.people(engine, ann='labeler', bob='labeler')
  task = labeling.task(engine, records=labeling.candidates(3))
  items = [take(engine, task, people['ann'])]
  submit(engine, items[0], people['ann'])
  items.append(take(engine, task, people['ann']))
  with schema.writing(engine) as connection:
    submissions.skip(connection, items[1], people['ann'], 'unclear')
  items.append(take(engine, task, people['ann']))
  submit(engine, items[2], people['ann'])
  with schema.writing(engine) as connection:
    submissions.withdraw(connection, items[2], people['ann'])
  assert len(set(items)) == 3
  assert take(engine, task, people['ann']) is None
  for item in items[1:]:
    assert take(engine, task, people['bob']) == item
    submit(engine, item, people['bob'])
  assert take(engine, task, people['bob']) is None


def test_a_lease_ends_and_the_late_answer_is_kept(engine, monkeypatch):
  people = labeling.people(engine, ann='labeler', bob='labeler')
  task = labeling.task(engine, records=labeling.candidates(1))
  item = take(engine, task, people['ann'])
  assert take(engine, task, people['bob']) is None
  start = history.time.time()
  monkeypatch.setattr(history.time, 'time', lambda: start + assignment.LEASE_SECONDS + 1)
  assert take(engine, task, people['bob']) == item
  assert take(engine, task, people['ann']) is None  # It is Bob's now.
  submit(engine, item, people['ann'])
  submit(engine, item, people['bob'])
  assert [r['labeler_id'] for r in export(engine, 'comparisons')] == ['ann', 'bob']


def test_personal_data_hides_an_item_from_everybody(engine):
  people = labeling.people(engine, ann='labeler', bob='labeler', cleo='labeler')
  task = labeling.task(engine, records=labeling.candidates(1), overlap=3)
  item = take(engine, task, people['ann'])
  submit(engine, item, people['ann'])
  assert take(engine, task, people['bob']) == item
  assert take(engine, task, people['cleo']) == item
  with schema.writing(engine) as connection:
    submissions.skip(connection, item, people['bob'], 'pii')
  with pytest.raises(submissions.Gone, match='taken out'):
    submit(engine, item, people['cleo'])
  assert take(engine, task, people['cleo']) is None
  assert export(engine, 'comparisons') == []  # What Ann said is still in the database.
  assert [r['status'] for r in export(engine, 'answers') if 'status' in r] == ['done', 'skipped']


def test_gold_items_come_at_their_rate_and_to_everybody(engine):
  people = labeling.people(engine, ann='labeler', bob='labeler')
  gold = [
    r | {'ranks': [0, 1, 1, 2], 'prompt': f'gold {i}'}
    for i, r in enumerate(labeling.candidates(40))
  ]
  task = labeling.task(engine, records=gold, gold=True, gold_rate=0.25)
  with schema.writing(engine) as connection:
    catalog.add_items(connection, task, exchange.ranking_items(labeling.candidates(60)))
  seen = {}
  for name in ('ann', 'bob'):
    seen[name] = []
    while len(seen[name]) < 40:
      seen[name].append(take(engine, task, people[name]))
      submit(engine, seen[name][-1], people[name])
  with schema.reading(engine) as connection:
    is_gold = dict(connection.execute(sa.select(schema.items.c.id, schema.items.c.is_gold)).all())
  share = np.mean([is_gold[i] for i in seen['ann'] + seen['bob']])
  assert 0.13 < share < 0.37  # 0.25 plus or minus 2.5 standard errors
  assert not {i for i in seen['ann'] if not is_gold[i]} & set(seen['bob'])  # overlap = 1
  assert {i for i in seen['ann'] if is_gold[i]} & set(seen['bob'])
  assert len(export(engine, 'comparisons')) == sum(
    not is_gold[i] for i in seen['ann'] + seen['bob']
  )


def test_priorities_decide_the_order(engine):
  people = labeling.people(engine, ann='labeler')
  records = [r | {'priority': p} for r, p in zip(labeling.candidates(3), (2, 0.5, 1), strict=True)]
  task = labeling.task(engine, records=records)
  order = []
  for _ in records:
    order.append(take(engine, task, people['ann']))
    submit(engine, order[-1], people['ann'])
  assert order == [2, 3, 1]


def test_the_order_shown_is_uniform_fixed_and_kept(engine):
  """Every response stands at every place equally often, by a chi-squared test of 6,000 orders."""
  orders = np.array([assignment.order_of(i, p, 4) for i in range(200) for p in range(30)])
  for place in range(4):
    counts = np.bincount(orders[:, place], minlength=4)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
  kinds = {tuple(order) for order in orders}
  assert len(kinds) == 24
  assert assignment.order_of(7, 3, 4) == assignment.order_of(7, 3, 4)
  people = labeling.people(engine, ann='labeler')
  task = labeling.task(engine, records=labeling.candidates(1))
  item = take(engine, task, people['ann'])
  submit(engine, item, people['ann'])
  assert export(engine, 'comparisons')[0]['shown'] == assignment.order_of(item, people['ann'], 4)


def test_a_second_import_adds_nothing_twice(engine):
  labeling.task(engine)
  with schema.writing(engine) as connection:
    rows = exchange.ranking_items(labeling.candidates(5))
    assert catalog.add_items(connection, 1, rows) == (2, 3)


# What an answer may be


@pytest.mark.parametrize(
  'form, all_bad, expected',
  [
    (['1', '2', '3'], False, [1, 2, 3]),
    (['3', '1', '3'], False, [2, 1, 2]),  # Without gaps, and with the tie.
    (['2', '2', '2'], False, [1, 1, 1]),
    (['', None, ''], True, None),
    (['2', '1', '1'], True, [2, 1, 1]),
  ],
)
def test_ranks(form, all_bad, expected):
  assert answers.ranks(form, all_bad) == expected


@pytest.mark.parametrize(
  'form, message',
  [
    (['1', None, ''], '2 of 3 responses have no rank'),
    (['1', '2', ''], '1 of 3 responses has no rank'),
    (['0', '1', '2'], 'from 1 to 3'),
    (['4', '1', '2'], 'from 1 to 3'),
    (['x', '1', '2'], 'from 1 to 3'),
  ],
)
def test_ranks_that_are_refused(form, message):
  with pytest.raises(answers.FormError, match=message):
    answers.ranks(form, False)


def test_ratings():
  assert answers.rating('ranking', {'likert': '7'}, ['moral_judgment', 'hallucination']) == {
    'likert': 7,
    'flags': ['hallucination', 'moral_judgment'],
  }
  scales = {'toxicity': '0', 'relative_toxicity': '-1', 'continuity': '7'}
  assert answers.rating('toxicity', scales, []) == {k: int(v) for k, v in scales.items()}
  for form, flags, message in (
    ({}, [], 'no answer yet'),
    ({'likert': '8'}, [], 'from 1 to 7'),
    ({'likert': '0'}, [], 'from 1 to 7'),
    ({'likert': '4'}, ['rude'], 'no flag'),
  ):
    with pytest.raises(answers.FormError, match=message):
      answers.rating('ranking', form, flags)
  with pytest.raises(answers.FormError, match='from -1 to 1'):
    answers.rating('toxicity', scales | {'relative_toxicity': '2'}, [])


def test_demonstrations_become_records(engine):
  """Of three examples each becomes a record with the two others as its context (paper 3.2)."""
  people = labeling.people(engine, ann='labeler')
  with schema.writing(engine) as connection:
    task = catalog.add_task(connection, 'write', 'demonstration')
    rows = exchange.demonstration_items([{'prompt': 'Given.', 'use_case': 'chat'}])
    rows += exchange.demonstration_items([], 'few_shot', 1)
    rows += exchange.demonstration_items([{'prompt': 'a shop'}], 'user_based')
    catalog.add_items(connection, task, rows)
  given = dict(response='An answer.', use_case='')
  few = dict(prompt='Translate.', query_1='un', answer_1='one', query_2='deux', answer_2='two')
  few |= dict(query_3='', query_7='trois', answer_7='three')
  based = dict(prompt='Sell a hat.', response='Buy it!', use_case='generation')
  for form in (given, few, based):
    item = take(engine, task, people['ann'])
    with schema.writing(engine) as connection:
      row = connection.execute(sa.select(schema.items).where(schema.items.c.id == item)).one()
      submissions.submit(
        connection, item, people['ann'], answers.demonstration(row._asdict(), form)
      )
  made = export(engine, 'demonstrations')
  assert [(r['prompt'], r['response']) for r in made] == [
    ('Given.', 'An answer.'),
    ('Translate.\n\ndeux\ntwo\n\ntrois\nthree\n\nun', 'one'),
    ('Translate.\n\nun\none\n\ntrois\nthree\n\ndeux', 'two'),
    ('Translate.\n\nun\none\n\ndeux\ntwo\n\ntrois', 'three'),
    ('Sell a hat.', 'Buy it!'),
  ]
  assert made[0]['use_case'] == 'chat' and made[-1]['use_case'] == 'generation'
  with pytest.raises(answers.FormError, match='two queries'):
    answers.demonstration(
      row._asdict() | {'extra': {'style': 'few_shot'}},
      dict(few, query_2='', answer_2='', query_7='', answer_7=''),
    )
  with pytest.raises(answers.FormError, match='“Response” is empty'):
    answers.demonstration(row._asdict(), dict(based, response=' '))


def test_an_example_has_a_query_and_an_answer():
  item = dict(prompt=None, use_case=None, extra=dict(style='few_shot'))
  few = dict(prompt='Translate.', query_1='un', answer_1='one', query_2='deux', answer_2='two')
  for more, message in (
    (dict(query_3='trois', answer_3=' '), '“Answer 3” is empty'),
    (dict(query_3=' ', answer_3='three'), '“Query 3” is empty'),
    (dict(answer_3='three'), '“Query 3” is empty'),
  ):
    with pytest.raises(answers.FormError, match=message):
      answers.demonstration(item, few | more)
  made = answers.demonstration(item, few | dict(query_3='', answer_3=' '))
  assert made['examples'] == [['un', 'one'], ['deux', 'two']]


# Amending


def test_nothing_is_overwritten(engine):
  """Three versions of an answer: the newest one counts, all are in the log."""
  people = labeling.people(engine, ann='labeler')
  task = labeling.task(engine, records=labeling.candidates(1), text='first rules')
  item = take(engine, task, people['ann'])
  submit(engine, item, people['ann'], (1, 2, 3, 4))
  with schema.writing(engine) as connection:
    catalog.edit_task(connection, task, 1, instructions='second rules')
  submit(engine, item, people['ann'], (4, 3, 2, 1))
  with schema.writing(engine) as connection:
    submissions.withdraw(connection, item, people['ann'])
  assert export(engine, 'comparisons') == []
  rows = [r for r in export(engine, 'answers') if 'status' in r]
  assert [(r['version'], r['status'], r['current'], r['payload'].get('ranks')) for r in rows] == [
    (1, 'done', False, [1, 2, 3, 4]),
    (2, 'done', False, [4, 3, 2, 1]),
    (3, 'withdrawn', True, None),
  ]
  assert [r['instructions_version'] for r in rows] == [1, 2, 2]
  with schema.reading(engine) as connection:
    texts = connection.execute(sa.select(schema.instructions.c.markdown)).scalars().all()
  assert texts == ['first rules', 'second rules']
  with schema.writing(engine) as connection, pytest.raises(submissions.Gone):
    submissions.withdraw(connection, item, people['ann'])


def test_two_editors_of_a_task(engine):
  task = labeling.task(engine)
  with schema.writing(engine) as connection:
    catalog.edit_task(connection, task, 1, overlap=3)
  with schema.writing(engine) as connection, pytest.raises(catalog.Conflict, match='Somebody else'):
    catalog.edit_task(connection, task, 1, overlap=5)
  with schema.reading(engine) as connection:
    assert connection.execute(sa.select(schema.tasks.c.overlap)).scalar() == 3


# Figures


def ranked(engine, task, ranks):
  """{labeler: [ranks of each item, in the order of the items]} as answers."""
  people = labeling.people(engine, **dict.fromkeys(ranks, 'labeler'))
  for name, each in ranks.items():
    for one in each:
      submit(engine, take(engine, task, people[name]), people[name], one)
  return people


def test_agreement_by_hand(engine):
  """Of three responses there are three pairs: the labelers say the same on 3, 1 and 1 of them."""
  records = labeling.candidates(3, k=3)
  task = labeling.task(engine, records=records, overlap=2)
  people = ranked(
    engine,
    task,
    {'ann': [(1, 2, 3), (1, 2, 3), (1, 1, 2)], 'bob': [(1, 2, 3), (3, 1, 2), (1, 2, 3)]},
  )
  with schema.reading(engine) as connection:
    made = figures.of_task(connection, connection.execute(sa.select(schema.tasks)).one())
  # Item 2: 1 < 2 is reversed, 1 < 3 is reversed, 2 < 3 agrees. Item 3: a tie and an order differ
  # on the first pair; the two others agree.
  assert made['agreement']['pairs'] == 9
  assert made['agreement']['pairwise']['mean'] == pytest.approx(6 / 9)
  assert made['agreement']['pairwise_without_ties']['mean'] == pytest.approx(6 / 8)
  ann = made['labelers'][0]
  assert ann['name'] == 'ann' and ann['person'] == people['ann']
  assert ann['others']['mean'] == pytest.approx(6 / 9)
  assert ann['ties'] == pytest.approx(1 / 9)
  assert made['done'] == 6 and made['left'] == 0


def test_alpha_does_not_depend_on_the_order_in_which_responses_are_stored(engine):
  """Two labelers agree on 41 of 60 items of two responses, whose better one is stored first; alpha
  is that of a fair order, 1 - (19 / 60) / (1 / 2), up to the chance of the order."""
  task = labeling.task(engine, records=labeling.candidates(60, k=2), overlap=2)
  ranked(
    engine,
    task,
    {'ann': [(1, 2)] * 60, 'bob': [(1, 2) if i % 3 or i > 56 else (2, 1) for i in range(60)]},
  )
  with schema.reading(engine) as connection:
    made = figures.agreement(figures.read(connection, task))
  assert made['pairwise']['mean'] == pytest.approx(41 / 60)
  assert made['alpha']['mean'] == pytest.approx(1 - 19 / 30, abs=0.06)


def test_what_is_done_and_left(engine):
  """Of six items with two labelers each, one is taken out; one answer, one skip, one lease."""
  people = labeling.people(engine, ann='labeler', bob='labeler')
  task = labeling.task(engine, records=labeling.candidates(6), overlap=2)
  submit(engine, take(engine, task, people['ann']), people['ann'])
  with schema.writing(engine) as connection:
    skipped = assignment.next_item(connection, task, people['ann'])
    submissions.skip(connection, skipped, people['ann'], 'unclear')
    catalog.hide(connection, 6, 'researcher')
  take(engine, task, people['bob'])
  with schema.reading(engine) as connection:
    made = figures.of_task(connection, connection.execute(sa.select(schema.tasks)).one())
  names = ('items', 'hidden', 'done', 'left', 'held', 'skipped')
  assert [made[name] for name in names] == [6, 1, 1, 9, 1, 1]


def test_position_bias_and_alarms(engine, monkeypatch):
  """One labeler always ranks in the order shown, and in a tenth of the time."""
  records = labeling.candidates(20)
  task = labeling.task(engine, records=records, overlap=3)
  people = labeling.people(engine, ann='labeler', bob='labeler', cleo='labeler')
  clock = [history.time.time()]
  monkeypatch.setattr(history.time, 'time', lambda: clock[0])
  for name, seconds in (('ann', 60), ('bob', 60), ('cleo', 6)):
    for _ in records:
      item = take(engine, task, people[name])
      clock[0] += seconds
      ranks = [1, 2, 3, 4]
      if name == 'cleo':
        for rank, response in enumerate(assignment.order_of(item, people[name], 4), 1):
          ranks[response] = rank
      submit(engine, item, people[name], ranks)
  with schema.reading(engine) as connection:
    made = figures.of_task(connection, connection.execute(sa.select(schema.tasks)).one())
  ann, _, cleo = made['labelers']
  assert cleo['position']['first_wins']['mean'] == 1.0
  followed = cleo['same_order']['the order shown']
  assert (followed['share'], followed['chance']) == (1.0, pytest.approx(1 / 24))
  assert abs(ann['position']['first_wins']['mean'] - 0.5) < 0.2
  assert ann['alarms'] == []
  assert [text.split('(')[0].strip() for text in cleo['alarms']] == [
    'much faster than the others',
    '100% of the rankings follow the order shown',
  ]
  assert (ann['seconds'], cleo['seconds'], made['seconds']) == (60, 6, 60)


def test_the_chance_of_following_the_order_shown_by_hand():
  """Over all orders in which the responses of a ranking can be shown, with and without ties."""
  for ranks in ([1, 2], [1, 2, 3], [1, 2, 2], [1, 2, 3, 4], [1, 1, 2, 3], [1, 2, 2, 2]):
    shown = [list(order) for order in itertools.permutations(ranks)]
    forward = np.mean([one == sorted(one) for one in shown])
    either = np.mean([one in (sorted(one), sorted(one)[::-1]) for one in shown])
    made = figures.same_order([ranks])
    assert made['the order shown']['chance'] == pytest.approx(forward)
    assert made['the reverse of the order shown']['chance'] == pytest.approx(forward)
    assert made['the order shown or its reverse']['chance'] == pytest.approx(either)
  made = figures.same_order([[1, 2]] * 9 + [[2, 1], [1, 1]])  # 10 rankings, one of them turned
  assert made['the order shown']['share'] == 0.9
  assert made['the order shown']['p'] == pytest.approx((10 + 1) / 2**10)
  assert made['the order shown or its reverse'] == dict(share=1.0, chance=1.0, p=1.0)
  two = figures.same_order([[1, 2], [1, 2, 3]])  # Both follow it: 1/2 times 1/6.
  assert two['the order shown']['p'] == pytest.approx(1 / 12)
  assert figures.same_order([[1, 1, 1]]) == {}


@pytest.mark.parametrize('k', [2, 3, 4])
@pytest.mark.parametrize('tied', [False, True])
def test_who_follows_the_order_shown_is_pointed_out_and_a_random_labeler_is_not(k, tied):
  rng = np.random.default_rng(k)
  ranks = [1, *range(1, k)] if tied and k > 2 else list(range(1, k + 1))

  def told(rankings):
    made = dict(done=len(rankings), seconds=60.0, gold=dict(n=0))
    return figures.alarms(made | dict(same_order=figures.same_order(rankings)), 60.0)

  false_alarms = sum(
    told([rng.permutation(ranks).tolist() for _ in range(int(rng.integers(8, 60)))]) != []
    for _ in range(400)
  )
  assert false_alarms <= 2
  assert told([ranks] * 16) == ['100% of the rankings follow the order shown']
  assert told([ranks[::-1]] * 16) == ['100% of the rankings follow the reverse of the order shown']
  mostly = [ranks] * 30 + [rng.permutation(ranks).tolist() for _ in range(10)]
  assert told(mostly)[0].endswith('follow the order shown')
  if k > 2:  # Sometimes from the top, sometimes from the bottom.
    assert told([ranks, ranks[::-1]] * 16) == [
      '100% of the rankings follow the order shown or its reverse'
    ]


def test_gold_agreement_and_its_alarm(engine):
  gold = [r | {'ranks': [0, 1, 2, 3]} for r in labeling.candidates(12)]
  task = labeling.task(engine, records=gold, gold=True, gold_rate=0.5)
  ranked(engine, task, {'ann': [(1, 2, 3, 4)] * 12, 'bob': [(4, 3, 2, 1)] * 12})
  with schema.reading(engine) as connection:
    made = figures.of_task(connection, connection.execute(sa.select(schema.tasks)).one())
  assert [p['gold']['mean'] for p in made['labelers']] == [1.0, 0.0]
  assert made['labelers'][1]['alarms'] == ['agrees with known answers in 0% only']


def test_screening(engine):
  """The paper's cut-offs: 75% agreement on rankings and on sensitive responses, 6 of 7."""
  people = labeling.people(
    engine, good=('labeler', 'screening'), bad=('labeler', 'screening'), rita='researcher'
  )
  gold = [
    r
    | {
      'ranks': [0, 1, 2, 3],
      'ratings': [{'likert': 4, 'flags': []}] * 3 + [{'likert': 1, 'flags': ['violent_content']}],
    }
    for r in labeling.candidates(2)
  ]
  task = labeling.task(engine, 'screen', records=gold, gold=True, pool='screening')
  with schema.writing(engine) as connection:
    writing = catalog.add_task(connection, 'write', 'demonstration', pool='screening')
    catalog.add_items(connection, writing, exchange.demonstration_items([{'prompt': 'Say hello.'}]))
  for name, ranks, flags in (('good', (1, 2, 4, 3), ['harmful_advice']), ('bad', (4, 3, 2, 1), [])):
    for _ in gold:
      ratings = [{'likert': 4, 'flags': []}] * 3 + [{'likert': 1, 'flags': flags}]
      submit(engine, take(engine, task, people[name]), people[name], ranks, ratings=ratings)
    item = take(engine, writing, people[name])
    with schema.writing(engine) as connection:
      text = dict(prompt=None, response='Hello.', use_case=None, examples=[])
      submissions.submit(connection, item, people[name], text)
  with schema.reading(engine) as connection:
    good, bad = figures.screening(connection)
  assert good['ranking']['mean'] == pytest.approx(5 / 6) and good['flags']['mean'] == 1.0
  assert bad['ranking']['mean'] == 0.0 and bad['flags']['mean'] == pytest.approx(3 / 4)
  assert (good['passes'], bad['passes']) == (None, False)  # Demonstrations are not scored yet.
  with schema.writing(engine) as connection:
    for row in export(engine, 'answers'):
      if row.get('task') == 'write':
        history.add(
          connection, schema.reviews, answer_id=row['id'], person_id=people['rita'], score=6, at=0.0
        )
  with schema.reading(engine) as connection:
    assert [row['passes'] for row in figures.screening(connection)] == [True, False]


# Exports


def test_exports_are_read_by_the_readers(engine, tmp_path):
  """Comparisons by data/sources.py, judgments by preference.py's reader, unchanged."""
  records = labeling.candidates(2, k=3, sources=('one', 'two', 'three'))
  task = labeling.task(engine, records=records)
  people = labeling.people(engine, ann='labeler')
  ratings = [
    {'likert': 2, 'flags': []},
    {'likert': 5, 'flags': ['hallucination']},
    {'likert': 7, 'flags': []},
  ]
  submit(engine, take(engine, task, people['ann']), people['ann'], (3, 2, 1), ratings=ratings)
  item = take(engine, task, people['ann'])
  with schema.writing(engine) as connection:
    submissions.submit(
      connection, item, people['ann'], dict(ratings=ratings, ranks=None, all_bad=True)
    )
  for what in ('comparisons', 'judgments'):
    rows = export(engine, what)
    (tmp_path / f'{what}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  read = sources.read(f'jsonl:{tmp_path}/comparisons.jsonl', 'comparisons')
  assert [r['ranks'] for r in read] == [[2, 1, 0], [0, 0, 0]]
  assert read[0]['policies'] == ['one', 'two', 'three'] and read[1]['all_bad'] is True
  judged = judgments.read(f'{tmp_path}/judgments.jsonl', judge='people')
  assert [(v.a, v.b, v.p, v.labeler) for v in judged.verdicts] == [
    ('one', 'two', 0.0, 'ann'),
    ('one', 'three', 0.0, 'ann'),
    ('two', 'three', 0.0, 'ann'),
  ]
  assert [r.likert for r in judged.ratings] == [2.0, 5.0, 7.0] * 2
  assert judged.ratings[1].flags['hallucination'] is True


def test_answers_about_gold_items_are_in_no_export_but_that_of_everything(engine):
  known = [r | {'ranks': [0, 1, 2, 3]} for r in labeling.candidates(1)]
  task = labeling.task(engine, records=known, gold=True, gold_rate=0.5)
  people = labeling.people(engine, ann='labeler')
  ratings = [{'likert': 4, 'flags': []}] * 4
  submit(engine, take(engine, task, people['ann']), people['ann'], ratings=ratings)
  assert {what: export(engine, what) for what in exchange.EXPORTS} == {
    'comparisons': [],
    'demonstrations': [],
    'judgments': [],
  }
  (row,) = [row for row in export(engine, 'answers') if 'payload' in row]
  assert row['is_gold'] and row['payload']['ranks'] == [1, 2, 3, 4]


def test_exported_judgments_are_of_their_own_responses(engine, tmp_path):
  """A policy wrote two responses of an item, and there is another item of the same prompt. The
  longer response wins each time."""
  said = (['one two three four', 'short', 'one two'], ['a b c d e', 'a', 'a b c'])
  records = [dict(prompt='p', responses=texts, policies=['A', 'A', 'B']) for texts in said]
  task = labeling.task(engine, records=records)
  people = labeling.people(engine, ann='labeler')
  for _ in records:
    submit(engine, take(engine, task, people['ann']), people['ann'], (1, 3, 2))
  path = tmp_path / 'j.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in export(engine, 'judgments')))
  read = judgments.read(str(path), judge='people')
  found = [(read.texts[v.prompt_id, 'A'], read.texts[v.prompt_id, 'B'], v.p) for v in read.verdicts]
  assert found == [
    (a, texts[2], p) for texts in said for a, p in zip(texts[:2], (1.0, 0.0), strict=True)
  ]
  made = statistics.summarize(read, ['A', 'B'], 'A', read.texts)['judges']['people']
  assert made['length']['longer_wins']['mean'] == 1.0 and made['prompts'] == 1


def test_responses_of_one_policy_are_not_judgments(engine):
  task = labeling.task(engine, records=labeling.candidates(1, k=2, sources=('same',)))
  people = labeling.people(engine, ann='labeler')
  submit(engine, take(engine, task, people['ann']), people['ann'], (1, 2))
  assert export(engine, 'judgments') == []
  assert len(export(engine, 'comparisons')) == 1


@pytest.mark.parametrize(
  'record, message',
  [
    (dict(prompt='p', responses=['a']), 'record 1: 1 responses; an item has 2 to 9'),
    (dict(prompt='p', responses=['a', 'b'], policies=['x']), "'policies' must name"),
  ],
)
def test_items_that_are_refused(record, message):
  with pytest.raises(ValueError, match=message):
    exchange.ranking_items([record])


def test_known_answers_that_are_refused():
  record = dict(prompt='p', responses=['a', 'b'])
  for more, message in (
    ({}, "needs 'ranks'"),
    (dict(ranks=[0]), "'ranks' must be"),
    (dict(ranks=[True, 0]), "'ranks' must be"),
    (dict(ratings=[{}]), "'ratings' must be"),
  ):
    with pytest.raises(ValueError, match=message):
      exchange.ranking_items([record | more], gold=True)


# People


def test_names_and_invitations(engine):
  with schema.writing(engine) as connection:
    token = accounts.invite(connection, 'labeler', 'heldout')
    old = accounts.invite(connection, seconds=-1)
  with schema.writing(engine) as connection:
    number = accounts.join(connection, token, 'Zoë', labeling.PASSWORD)
    row = connection.execute(sa.select(schema.people)).one()
  assert (row.id, row.name, row.role, row.pool) == (number, 'Zoë', 'labeler', 'heldout')
  assert labeling.PASSWORD not in row.password and row.password.startswith('$argon2id$')
  for token_of in (token, old, 'nonsense'):
    with schema.writing(engine) as connection, pytest.raises(accounts.Refused, match='not valid'):
      accounts.join(connection, token_of, 'Other', labeling.PASSWORD)
  with schema.writing(engine) as connection:
    for name, password, message in (
      ('zoË', labeling.PASSWORD, 'taken'),
      ('<b>', labeling.PASSWORD, 'letters'),
      ('', labeling.PASSWORD, 'letters'),
      ('Bob', 'short', '10 characters'),
    ):
      with pytest.raises(accounts.Refused, match=message):
        accounts.add_person(connection, name, password, 'labeler')


# The closing test


def test_the_sandbox_labelers_rank_through_http(engine, tmp_path):
  """Comparisons that the sandbox's labelers make through the server equal those made directly."""
  world, labelers = sandbox.World(3), sandbox.Labelers(3, train=3)
  demonstrations = sandbox.demonstrations(world, 40)
  asked = sandbox.prompts(world, 5, use_case='generation')
  asked = list({p['prompt']: p for p in asked}.values())
  texts = list(dict.fromkeys(d['response'] for d in demonstrations))
  records = [
    dict(prompt=p['prompt'], responses=texts[5 * i : 5 * i + 4 + i % 2])
    for i, p in enumerate(asked)
  ]
  meta = {p['prompt']: p['meta'] for p in asked}

  def rank(labeler, prompt, responses):
    """In the order of the texts, so that the noise does not depend on the order shown."""
    order = np.argsort(responses)
    judged = [sandbox.judge(world, meta[prompt], responses[i], True) for i in order]
    rng = np.random.default_rng([labeler, len(prompt)])
    ranks = np.empty(len(order), int)
    ranks[order] = labelers.rank(labelers.features(judged), labeler, rng)
    return ranks.tolist()

  direct = [
    dict(
      r, ranks=answers.without_gaps(rank(i, r['prompt'], r['responses'])), labeler_id=f'labeler {i}'
    )
    for r in records
    for i in labelers.train.tolist()
  ]
  direct = [r | {'ranks': [x - 1 for x in r['ranks']]} for r in direct]
  task = labeling.task(engine, records=records, overlap=3, ratings=False)
  labeling.people(engine, **{f'labeler {i}': 'labeler' for i in labelers.train.tolist()})
  with labeling.serving(engine) as url:
    for i in labelers.train.tolist():
      someone = labeling.labeler(url, f'labeler {i}')
      count = someone.work(
        task,
        lambda item, i=i: dict(ranks=[x + 1 for x in rank(i, item['prompt'], item['responses'])]),
      )
      assert count == len(records)
  path = tmp_path / 'comparisons.jsonl'
  path.write_text(''.join(json.dumps(r) + '\n' for r in export(engine, 'comparisons')))
  read = sources.read(f'jsonl:{path}', 'comparisons')

  def key(record):
    return record['prompt'], record['labeler_id']

  fields = ('prompt', 'responses', 'ranks', 'labeler_id')
  assert [{f: r[f] for f in fields} for r in sorted(read, key=key)] == sorted(direct, key=key)
  assert any(len(set(r['ranks'])) > 2 for r in direct)
