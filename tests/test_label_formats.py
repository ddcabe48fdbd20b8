"""Items and answers go to Label Studio and Argilla and come back. tests/test_label_tools.py has
what was made there."""

import json
import re
from xml.etree import ElementTree

import pytest
import sqlalchemy as sa

from alignjax.commands import label
from alignjax.label import argilla, assignment, catalog, exchange, label_studio, schema, submissions
from tests import labeling

TOOLS = pytest.mark.parametrize('tool', [label_studio, argilla])
CHAT = [
  dict(role='system', content='Be brief.'),
  dict(role='user', content='Grüß Gott 👋\nWho are you?'),
]
RANKING = [
  dict(
    prompt='naïve “x”\n<b>&amp;',
    responses=['α', 'b\n\nc', ' d ', '🎉'],
    policies=['secret-a', 'secret-b', 'secret-a', 'secret-b'],
    use_case='chat',
    user_id='customer 7',
    round=2,
  ),
  dict(prompt=CHAT, responses=['one', 'two', 'three', 'four']),
]


@pytest.fixture
def engine(tmp_path):
  made = schema.connect(str(tmp_path / 'labels.db'))
  yield made
  made.dispose()


def add(engine, name, kind, rows, **options):
  with schema.writing(engine) as connection:
    number = catalog.add_task(connection, name, kind, pool='all', overlap=2, **options)
    catalog.add_items(connection, number, rows)
  return number


def answer(engine, task, person, *payloads):
  """A person answers the items of a task one after the other."""
  with schema.writing(engine) as connection:
    for payload in payloads:
      item = assignment.next_item(connection, task, person)
      assert item is not None
      submissions.submit(connection, item, person, payload, active=12.5)


def rating(likert, *flags):
  return dict(likert=likert, flags=list(flags))


def ranked(ranks, ratings=None, all_bad=False):
  return dict(ratings=ratings, ranks=ranks, all_bad=all_bad)


def ranking(engine, people):
  task = add(engine, 'rank', 'ranking', exchange.ranking_items(RANKING))
  flagged = [rating(1), rating(7, 'hallucination', 'harmful_advice'), rating(4), rating(4)]
  answer(engine, task, people['ann'], ranked([1, 2, 2, 1], flagged), ranked([4, 3, 2, 1]))
  bad = ranked(None, [rating(1)] * 4, all_bad=True)
  answer(engine, task, people['bob'], bad, ranked([1, 1, 1, 1], all_bad=True))
  return task


def toxicity(engine, people):
  task = add(engine, 'tox', 'toxicity', exchange.ranking_items(RANKING[:1]))
  scales = [
    dict(toxicity=t, relative_toxicity=r, continuity=c)
    for t, r, c in ((0, -1, 7), (1, 0, 1), (2, 1, 4), (0, 0, 2))
  ]
  answer(engine, task, people['ann'], ranked([3, 1, 2, 3], scales))
  return task


def written(prompt, response, use_case='', examples=()):
  return dict(prompt=prompt, response=response, use_case=use_case, examples=list(examples))


def demonstration(engine, people):
  given = [dict(prompt='Add 2 and 2.', use_case='closed QA'), dict(prompt=CHAT)]
  cases = [dict(prompt='an app for cooks')]
  rows = exchange.demonstration_items(given) + exchange.demonstration_items([], 'plain', 1)
  rows += exchange.demonstration_items(cases, 'user_based')
  task = add(engine, 'write', 'demonstration', rows)
  payloads = [
    written(None, '4\n', 'closed QA'),
    written(None, 'A bot.'),
    written('Sing.', 'La 🎵'),
    written('Cook!', 'Eggs', 'generation'),
  ]
  answer(engine, task, people['ann'], *payloads)
  return task


def few_shot(engine, people):
  task = add(engine, 'examples', 'demonstration', exchange.demonstration_items([], 'few_shot', 2))
  examples = [['q1', 'a1'], ['q2', 'a2'], ['q3', 'a3'], ['q4', 'a4']]
  payload = written('Translate.', None, 'rewrite', examples)
  answer(engine, task, people['ann'], payload, payload | dict(examples=examples[:2]))
  return task


def people_of(engine):
  return labeling.people(engine, ann='labeler', bob=('labeler', 'heldout'))


def write(engine, tool, task, pool=None):
  with schema.reading(engine) as connection:
    text, count, lost = tool.write(connection, task, pool)
  assert len(json.loads(text)) == count
  return text, lost


def asked(lost):
  """The arguments of `config` or `settings` in the last sentence."""
  found = re.fullmatch(r".*\('(\w+)', (\d)\)\.", lost[-1])
  assert found
  return found[1], int(found[2])


def records_of(tool, text, what):
  return [record for raw in json.loads(text) for record in getattr(tool, what)(raw)]


def in_order(records):
  return sorted(records, key=lambda record: json.dumps(record, sort_keys=True))


# Both ways


@TOOLS
@pytest.mark.parametrize('make', [ranking, toxicity, demonstration, few_shot])
def test_items_and_answers_come_back(engine, tmp_path, capsys, tool, make):
  """What is written has the same items, and the same records but for the order shown."""
  task = make(engine, people_of(engine))
  text, _ = write(engine, tool, task)
  path = tmp_path / 'tool.json'
  path.write_text(text)
  kind = 'demonstration' if make in (demonstration, few_shot) else make.__name__
  rows = tool.read(str(path), kind)
  assert f'{path} has ' in capsys.readouterr().err
  with schema.reading(engine) as connection:
    stored = connection.execute(
      sa.select(schema.items).where(schema.items.c.task_id == task).order_by(schema.items.c.id)
    ).all()
    what = 'demonstrations' if kind == 'demonstration' else 'comparisons'
    expected = exchange.export(connection, what, task, 'all')
  keys = [
    catalog.key_of(row['prompt'], [r['text'] for r in row['responses']], row['extra'])
    for row in rows
  ]
  assert keys == [item.key for item in stored]
  for row, item in zip(rows, stored, strict=True):
    assert row['prompt'] == item.prompt and row['extra'] == item.extra
    assert row['responses'] == item.responses and row['use_case'] == item.use_case
  assert len(expected) == dict(ranking=4, toxicity=1, demonstration=4, few_shot=6)[make.__name__]
  for record in expected:
    record.pop('shown', None)
  assert in_order(records_of(tool, text, what)) == in_order(expected)


@TOOLS
def test_a_record_by_hand(engine, tool):
  text, _ = write(engine, tool, ranking(engine, people_of(engine)))
  first = records_of(tool, text, 'comparisons')[0]
  assert first == dict(
    prompt='naïve “x”\n<b>&amp;',
    responses=['α', 'b\n\nc', ' d ', '🎉'],
    ranks=[0, 1, 1, 0],
    policies=['secret-a', 'secret-b', 'secret-a', 'secret-b'],
    ratings=[rating(1), rating(7, 'hallucination', 'harmful_advice'), rating(4), rating(4)],
    labeler_id='ann',
    pool='training',
    user_id='customer 7',
    round=2,
    use_case='chat',
    item=1,
  )


@TOOLS
def test_by_the_command_and_back(tmp_path, capsys, tool):
  """Items go to a tool and into another database, and what is lost is said; its answers do not."""
  engine = schema.connect(str(tmp_path / 'first.db'))
  ranking(engine, people_of(engine))
  engine.dispose()
  name = tool.__name__.rpartition('.')[2]
  common = [f'--format={name}', '--task=rank']
  first, second, out = (f'{tmp_path}/{n}' for n in ('first.db', 'second.db', 'tool.json'))
  label.main(['export', f'--database={first}', f'--out={out}', *common])
  said = capsys.readouterr()
  assert said.out == f'{out}: 2 records\n'
  assert 'NOTE: Left out: 4 orders in which responses were shown' in said.err
  for expected in ('rank: 2 items added\n', 'rank: 0 items added, 2 were there already\n'):
    label.main(['import', f'--database={second}', f'--source={out}', *common])
    said = capsys.readouterr()
    assert said.out == expected
    assert said.err == (
      f'NOTE: {out} has 4 answers, which do not become answers of people here. The mappings '
      f'{tool.__name__}:comparisons and {tool.__name__}:demonstrations make training data of '
      f'them.\n'
    )
  engines = [schema.connect(path) for path in (first, second)]
  columns = [schema.items.c[n] for n in ('key', 'prompt', 'responses', 'extra', 'use_case')]
  found = []
  for engine in engines:
    with schema.reading(engine) as connection:
      found.append(connection.execute(sa.select(*columns)).all())
    engine.dispose()
  assert found[0] == found[1] and len(found[0]) == 2


@TOOLS
def test_a_pool(engine, tool):
  """All items are written, with the answers of the labelers of a pool."""
  text, _ = write(engine, tool, ranking(engine, people_of(engine)), 'heldout')
  found = records_of(tool, text, 'comparisons')
  assert len(json.loads(text)) == 2
  assert [(r['labeler_id'], r['ranks'], r.get('all_bad')) for r in found] == [
    ('bob', [0, 0, 0, 0], True),
    ('bob', [0, 0, 0, 0], True),
  ]


@TOOLS
def test_what_is_lost_is_said(engine, tool):
  people = people_of(engine)
  name = {label_studio: 'Label Studio', argilla: 'Argilla'}[tool]
  settings = 'labeling interface is' if tool is label_studio else 'settings of the dataset are'
  function = 'config' if tool is label_studio else 'settings'
  last = f"The {settings} {tool.__name__}.{function}('ranking', 3)."
  rows = exchange.ranking_items(labeling.candidates(6, k=3, sources=('',)))
  task = add(engine, 'bare', 'ranking', rows[:1])
  assert write(engine, tool, task)[1] == [last]

  gold = exchange.ranking_items([dict(prompt='g', responses=['a', 'b'], ranks=[0, 1])], True)
  task = add(engine, 'full', 'ranking', rows + gold, text='# Rules')
  answer(engine, task, people['ann'], *[ranked([1, 2, 3])] * 4)
  with schema.writing(engine) as connection:
    ids = connection.execute(
      sa.select(schema.items.c.id).where(schema.items.c.task_id == task).order_by(schema.items.c.id)
    ).scalars()
    a, b, c, *_ = ids
    submissions.submit(connection, a, people['ann'], ranked([3, 2, 1]))
    submissions.withdraw(connection, b, people['ann'])
    catalog.hide(connection, c, 'pii')
    skipped = assignment.next_item(connection, task, people['bob'])
    assert skipped is not None
    submissions.skip(connection, skipped, people['bob'], 'unclear')
  text, lost = write(engine, tool, task)
  assert lost[:7] == [
    'Left out: 1 items whose answer is known (gold).',
    'Left out: 1 hidden items.',
    'Left out: 1 skips, with their reasons.',
    'Left out: 1 withdrawn answers.',
    'Left out: 2 earlier versions of answers.',
    f'Left out: 2 orders in which responses were shown ({name} has one for all).',
    f'Left out: the instructions and their versions; copy them into {name}.',
  ]
  assert lost[-1] == last
  assert len(json.loads(text)) == 5 and '"g"' not in text
  assert sorted(r['ranks'] for r in records_of(tool, text, 'comparisons')) == [[0, 1, 2], [2, 1, 0]]


@TOOLS
def test_one_file_is_of_one_kind(engine, tool):
  people = people_of(engine)
  with pytest.raises(ValueError, match='there are no items to write'):
    write(engine, tool, None)
  ranking(engine, people)
  assert len(json.loads(write(engine, tool, None)[0])) == 2
  toxicity(engine, people)
  with pytest.raises(
    ValueError, match='of the kinds ranking, toxicity.*name one of them by --task'
  ):
    write(engine, tool, None)


@TOOLS
def test_sources_are_only_in_the_meta_data(engine, tool):
  """Nothing that a labeling page shows names a source, and it is said where they are."""
  text, lost = write(engine, tool, ranking(engine, people_of(engine)))
  found = []
  for raw in json.loads(text):
    meta = raw.pop('meta' if tool is label_studio else 'metadata')
    assert 'secret' not in json.dumps(raw)
    found.append(meta.get('policies'))
  assert found == [['secret-a', 'secret-b', 'secret-a', 'secret-b'], None]
  assert sum('names of the sources' in line for line in lost) == 1


# What the tools demand of a file


@pytest.mark.parametrize('make', [ranking, toxicity, demonstration, few_shot])
def test_the_interface_of_label_studio_has_every_control(engine, make):
  """Each result names a control, an object and a value that the labeling interface has."""
  text, lost = write(engine, label_studio, make(engine, people_of(engine)))
  view = ElementTree.fromstring(label_studio.config(*asked(lost)).replace('{{idx}}', '3'))
  named = {tag.attrib['name']: tag for tag in view.iter() if 'name' in tag.attrib}
  used = set()
  for raw in json.loads(text):
    assert isinstance(raw['data']['prompt'], str)
    for entry in raw['data'].get('items', ()):
      assert entry.keys() == {'id', 'title', 'body'}
    for annotation in raw['annotations']:
      assert annotation['lead_time'] == 12.5
      ids = [result['id'] for result in annotation['result']]
      assert len(set(ids)) == len(ids)
      for result in annotation['result']:
        control = named[re.sub(r'_\d$', '_3', result['from_name'])]
        used.add(control.tag)
        assert control.attrib['toName'] == re.sub(r'_\d$', '_3', result['to_name'])
        assert control.tag.lower() == result['type']
        assert re.fullmatch('prompt|responses|response_[0-3]', result['to_name'])
        (value,) = result['value'].values()
        if control.tag == 'Choices':
          assert value and set(value) <= {choice.attrib['alias'] for choice in control}
        if control.tag == 'Ranker':
          assert set(value) == {'_'} | {bucket.attrib['name'] for bucket in control}
          assert sorted(i for inner in value.values() for i in inner) == [
            entry['id'] for entry in raw['data']['items']
          ]
        if control.tag == 'Rating':
          assert 1 <= value <= int(control.attrib['maxRating']) == 7
        if control.tag == 'TextArea':
          assert len(value) == 1 or 'maxSubmissions' not in control.attrib
  rated = make in (ranking, toxicity)
  assert used == ({'Ranker', 'Choices', 'Rating'} if rated else {'TextArea'})


def test_the_interface_of_label_studio_starts_unranked():
  """No bucket is the default one, in which all responses would lie before anybody ranks."""
  view = ElementTree.fromstring(label_studio.config('ranking', 3))
  assert [b.attrib for b in view.iter('Bucket')] == [
    {'name': f'rank_{n}', 'title': f'Rank {n}'} for n in (1, 2, 3)
  ]
  scale = ElementTree.fromstring(label_studio.config('toxicity')).find(
    './/Choices[@name="relative_toxicity_{{idx}}"]'
  )
  assert scale is not None
  assert [choice.attrib['alias'] for choice in scale] == ['-1', '0', '1']


def complaints(settings, record):
  """What Argilla's server would refuse in a record: its rules, written down again."""
  questions = {q['name']: q for q in settings['questions']}
  fields = {f['name']: f['required'] for f in settings['fields']}
  found = [f'no field {f}' for f in record['fields'] if f not in fields]
  found += [
    f'{f} is missing' for f, needed in fields.items() if needed and f not in record['fields']
  ]
  users = {one['user_id'] for given in record['responses'].values() for one in given}
  for user in users:
    values = {
      q: one['value']
      for q, given in record['responses'].items()
      for one in given
      if one['user_id'] == user and one['status'] == 'submitted'
    }
    found += [f'{q} is required' for q in questions if questions[q]['required'] and q not in values]
    for name, value in values.items():
      kind = questions[name]['settings']['type']
      options = [o['value'] for o in questions[name]['settings'].get('options', ())]
      if kind == 'ranking':
        good = sorted(v['value'] for v in value) == sorted(options)
        good = good and all(1 <= v['rank'] <= len(options) for v in value)
      elif kind == 'multi_label_selection':
        good = bool(value) and set(value) <= set(options)
      elif kind == 'text':
        good = isinstance(value, str)
      else:
        good = value in options and type(value) is type(options[0])
      found += [] if good else [f'{name}={value}']
  return found


@pytest.mark.parametrize('make', [ranking, toxicity, demonstration, few_shot])
def test_argilla_accepts_every_response(engine, make):
  text, lost = write(engine, argilla, make(engine, people_of(engine)))
  settings = argilla.settings(*asked(lost))
  records = json.loads(text)
  assert [complaint for record in records for complaint in complaints(settings, record)] == []
  assert all(record['responses'] for record in records)
  ratings = [q for q in settings['questions'] if q['settings']['type'] == 'rating']
  assert all(0 <= o['value'] <= 10 for q in ratings for o in q['settings']['options'])
  assert settings['allow_extra_metadata'] and not settings['metadata']
  people = ('ann', 'bob') if make is ranking else ('ann',)
  names = [f'{name} {argilla.user_id(name)}' for name in people]
  assert any(all(name in line for name in names) for line in lost)


def test_argilla_ranks_as_many_responses_every_time(engine):
  """A ranking question of Argilla has the same options in each record; those of which an item has
  no response are last, and are not read."""
  people = people_of(engine)
  rows = exchange.ranking_items([RANKING[1], dict(prompt='p', responses=['a', 'b'])])
  task = add(engine, 'mixed', 'ranking', rows)
  answer(engine, task, people['ann'], ranked([1, 2, 3, 4]), ranked([2, 1]))
  text, lost = write(engine, argilla, task)
  assert any('The items have 2 to 4 responses' in line for line in lost)
  second = json.loads(text)[1]
  assert complaints(argilla.settings('ranking', 4), second) == []
  (one,) = second['responses']['ranking']
  assert [(v['value'], v['rank']) for v in one['value']] == [
    ('response_1', 2),
    ('response_2', 1),
    ('response_3', 3),
    ('response_4', 3),
  ]
  assert [r['ranks'] for r in records_of(argilla, text, 'comparisons')] == [[0, 1, 2, 3], [1, 0]]
