"""What was made in Label Studio and Argilla, read as items and as training data. The files have the
form of files that Label Studio 1.23 and Argilla 2.8 exported."""

import json
import subprocess
import sys

import pytest

from alignjax.data import sources
from alignjax.label import argilla, label_studio

TOOLS = pytest.mark.parametrize('tool', [label_studio, argilla])
CHAT = [
  dict(role='system', content='Be brief.'),
  dict(role='user', content='Grüß Gott 👋\nWho are you?'),
]


def rating(likert, *flags):
  return dict(likert=likert, flags=list(flags))


def ls_task(data, *results, **annotation):
  """A task as Label Studio exports it."""
  made = [
    dict(value=value, id=f'Og4qYVAZU{n}', from_name=name, to_name=to, type=kind, origin='manual')
    for n, (name, to, kind, value) in enumerate(results)
  ]
  more = dict(id=1, completed_by=3, was_cancelled=False, ground_truth=False, lead_time=8.1)
  return dict(
    id=9,
    annotations=[dict(result=made) | more | annotation],
    data=data,
    meta={},
    predictions=[],
    drafts=[],
    project=4,
  )


ITEMS = [
  dict(id='llm_1', title='LLM 1', body='first'),
  dict(id='llm_2', title='LLM 2', body='second'),
  dict(id='llm_3', title='LLM 3', body='third'),
]
WHY = dict(prompt='Why?', items=ITEMS)
FOX = dict(prompt='Fox?', answer2='sleeps', answer1='jumps')


def ranker(value, name='rank'):
  return name, 'answers', 'ranker', dict(ranker=value)


def test_the_rankers_of_label_studio():
  task = ls_task(WHY, ranker(dict(rank=['llm_1', 'llm_3', 'llm_2'])))
  assert label_studio.comparisons(task) == [
    dict(prompt='Why?', responses=['first', 'second', 'third'], ranks=[0, 2, 1], labeler_id=3)
  ]
  buckets = {'_': [], 'rank_1': ['llm_1', 'llm_3'], 'rank_2': [], 'rank_3': ['llm_2'], 'rank_4': []}
  (record,) = label_studio.comparisons(
    ls_task(WHY, ranker(buckets), completed_by=dict(id=3, email='a@example.org'))
  )
  assert record['ranks'] == [0, 1, 0] and record['labeler_id'] == 'a@example.org'
  # The form of earlier versions.
  (record,) = label_studio.comparisons(ls_task(WHY, ranker(['llm_2', 'llm_1', 'llm_3'])))
  assert record['ranks'] == [1, 0, 2]


def test_what_is_no_ranking_in_label_studio():
  """A ranking that nobody began, one that is not complete, and a cancelled one are no answers."""
  untouched = {'_': ['llm_1', 'llm_2', 'llm_3'], 'rank_1': [], 'rank_2': []}
  partly = {'_': ['llm_3'], 'rank_1': ['llm_1'], 'rank_2': ['llm_2']}
  for value in (untouched, partly):
    assert label_studio.comparisons(ls_task(WHY, ranker(value))) == []
  whole = ranker(dict(rank=['llm_1', 'llm_2', 'llm_3']))
  assert label_studio.comparisons(ls_task(WHY, whole, was_cancelled=True)) == []
  assert label_studio.comparisons(ls_task(WHY) | dict(annotations=[])) == []
  named = ranker(dict(relevant=['llm_1', 'llm_2'], biased=['llm_3']))
  with pytest.raises(ValueError, match='relevant, biased are not ranks; call them rank_1'):
    label_studio.comparisons(ls_task(WHY, named))


@pytest.mark.parametrize(('selected', 'ranks'), [('left', [0, 1]), ('right', [1, 0])])
def test_the_pairs_of_label_studio(selected, ranks):
  """The template of pairs: 'left' is answer1, whatever the order of the fields in the file."""
  choice = ('comparison', 'comparison', 'pairwise', dict(selected=selected))
  assert label_studio.comparisons(ls_task(FOX, choice)) == [
    dict(prompt='Fox?', responses=['jumps', 'sleeps'], ranks=ranks, labeler_id=3)
  ]


def test_ratings_and_flags_of_label_studio():
  """Ratings count if each response has one. Flags may be choices or a taxonomy."""
  results = [
    ranker(dict(rank=['llm_1', 'llm_2', 'llm_3'])),
    ('likert_0', 'response_0', 'rating', dict(rating=7)),
    ('likert_1', 'response_1', 'rating', dict(rating=2)),
    ('flags_1', 'response_1', 'taxonomy', dict(taxonomy=[['content', 'hallucination']])),
    ('likert_2', 'response_2', 'rating', dict(rating=1)),
    ('flags_2', 'response_2', 'choices', dict(choices=['violent_content', 'sexual_content'])),
  ]
  (record,) = label_studio.comparisons(ls_task(WHY, *results))
  assert record['ratings'] == [
    rating(7),
    rating(2, 'hallucination'),
    rating(1, 'sexual_content', 'violent_content'),
  ]
  (record,) = label_studio.comparisons(ls_task(WHY, *results[:2]))
  assert 'ratings' not in record


def test_demonstrations_of_label_studio():
  """The template of demonstrations calls its only text area 'instruction'. Each text that was
  entered is a response."""
  area = ('instruction', 'prompt', 'textarea', dict(text=['def f():\n  pass', 'f = 1']))
  task = ls_task(dict(prompt=CHAT), area)
  assert label_studio.demonstrations(task) == [
    dict(prompt=CHAT, response='def f():\n  pass', labeler_id=3),
    dict(prompt=CHAT, response='f = 1', labeler_id=3),
  ]
  other = ('use_case', 'prompt', 'textarea', dict(text=['chat']))
  assert label_studio.demonstrations(ls_task(dict(prompt='p'), other)) == []
  queries = ('query', 'prompt', 'textarea', dict(text=['q']))
  with pytest.raises(ValueError, match='1 queries, but 0 answers'):
    label_studio.demonstrations(ls_task(dict(prompt='p'), queries))


def argilla_record(fields, responses, **more):
  """A record as the HTTP API of Argilla has it."""
  return (
    dict(
      id='b0a42111-c91b-4c1b-bda2-d7acad9a5197',
      status='completed',
      fields=fields,
      metadata=None,
      external_id='1',
      responses=[
        dict(id=f'{n}', record_id='b0a42111-c91b-4c1b-bda2-d7acad9a5197')
        | dict(user_id=user, status=status, values={q: dict(value=v) for q, v in values.items()})
        for n, (user, status, values) in enumerate(responses)
      ],
      suggestions=[],
      dataset_id='6a5bcf14-4ffc-420b-bace-ff6b5785687b',
    )
    | more
  )


PAIR = {'instruction': 'Fox?', 'reply-1': 'jumps', 'reply-2': 'sleeps', 'reply-3': None}
USER = '1ca51eef-0d3d-5951-9ae2-8a7f1812751a'


def order(*pairs):
  return [dict(value=value, rank=rank) for value, rank in pairs]


def test_rankings_of_argilla():
  tie = dict(preference=order(('reply-2', 1), ('reply-1', 1)))
  best = dict(best='reply-2', comment='short')
  record = argilla_record(
    PAIR,
    [
      (USER, 'submitted', dict(preference=order(('reply-1', 2), ('reply-2', 1)))),
      (None, 'submitted', tie),  # Argilla forgets the name of a user that was deleted.
      (None, 'submitted', best),
      ('another', 'submitted', best),
      ('draft', 'draft', dict(preference=order(('reply-1', 1)))),
      ('discarded', 'discarded', tie),
      ('partly', 'submitted', dict(preference=order(('reply-1', None), ('reply-2', 1)))),
    ],
  )
  common = dict(prompt='Fox?', responses=['jumps', 'sleeps'])
  expected = [
    common | dict(ranks=[1, 0], labeler_id=USER),
    common | dict(ranks=[0, 0]),
    common | dict(ranks=[1, 0]),
    common | dict(ranks=[1, 0], labeler_id='another'),
  ]
  assert argilla.comparisons(record) == expected
  # A page of the API, and none without answers.
  assert argilla.comparisons(dict(items=[record, record], total=2)) == expected * 2
  assert argilla.comparisons(argilla_record(PAIR, [])) == []


def client_record(fields, **responses):
  """A record as the Python client of Argilla exports it."""
  return dict(
    id='1',
    fields=fields,
    metadata={},
    suggestions={'preference': dict(value=['reply-1', 'reply-2'], score=None, agent='m')},
    responses={q: [dict(value=v, user_id=USER) for v in values] for q, values in responses.items()},
    vectors={},
    status='completed',
    _server_id='b0a42111-c91b-4c1b-bda2-d7acad9a5197',
  )


def test_a_ranking_without_ranks_is_refused():
  """Argilla's Python client leaves the ranks out; the order of its list is that of the options."""
  record = client_record(PAIR, preference=[['reply-1', 'reply-2']])
  with pytest.raises(ValueError, match='has no ranks.*fetch the records by the HTTP API'):
    argilla.comparisons(record)


def test_demonstrations_of_argilla():
  record = client_record(dict(prompt=CHAT), response=['A bot.'], use_case=['chat'])
  expected = dict(prompt=CHAT, response='A bot.', labeler_id=USER)
  assert argilla.demonstrations(record) == [expected | dict(use_case='chat')]
  assert argilla.demonstrations(client_record(dict(prompt=CHAT), text=['A bot.'])) == [expected]
  assert argilla.demonstrations(client_record(dict(prompt='p'), use_case=['a'], note=['b'])) == []
  assert argilla.demonstrations(client_record(dict(prompt=CHAT), answer_1=['A bot.'])) == [expected]


@pytest.mark.parametrize('there,lacks', [('query', 'answer'), ('answer', 'query')])
def test_an_example_of_argilla_has_a_query_and_an_answer(there, lacks):
  examples = dict(query_1=['un'], answer_1=['one'], query_2=['deux'], answer_2=['two'])
  alone = {f'{there}_3': ['trois']}
  with pytest.raises(ValueError, match=f'{there}_3 is answered, but {lacks}_3 is not'):
    argilla.demonstrations(client_record(dict(prompt='p'), new_prompt=['T.'], **examples, **alone))


def test_it_is_training_data(tmp_path):
  """c.data reads the files by the mappings, and an error names file and line."""
  good = ls_task(WHY, ranker(dict(rank=['llm_1', 'llm_3', 'llm_2'])))
  bad = ls_task(WHY) | dict(annotations=None)
  path = tmp_path / 'export.json'
  mapping = 'alignjax.label.label_studio:comparisons'
  path.write_text(json.dumps([good, good]))
  assert [r['ranks'] for r in sources.read(f'jsonl:{path}', 'comparisons', mapping)] == [
    [0, 2, 1]
  ] * 2
  path.write_text(json.dumps([good, bad], indent=1))
  with pytest.raises(ValueError, match=r"export.json, line \d+: .*'annotations' must be a list"):
    sources.read(f'jsonl:{path}', 'comparisons', mapping)
  path.write_text(json.dumps(client_record(dict(prompt='p'), response=['r'])))
  (record,) = sources.read(
    f'jsonl:{path}', 'demonstrations', 'alignjax.label.argilla:demonstrations'
  )
  assert record == dict(prompt='p', response='r', labeler_id=USER)


def test_training_needs_no_package_of_the_labels():
  """The mappings work where the packages of the extra 'label' are not installed."""
  code = (
    'import sys\n'
    "for name in ('sqlalchemy', 'starlette', 'alembic'):\n"
    '  sys.modules[name] = None\n'
    'from alignjax.label import argilla, label_studio\n'
    "print(argilla.comparisons(dict(fields=dict(prompt='p'))))\n"
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert (done.stdout, done.returncode) == ('[]\n', 0), done.stderr


def test_items_of_others_files(tmp_path, capsys):
  """Tasks and records that nobody labelled, in the forms of the tools' documentation."""
  path = tmp_path / 'tasks.json'
  path.write_text(
    json.dumps([dict(data=WHY), FOX, dict(data=dict(text1='a', text2='b', prompt=CHAT))])
  )
  rows = label_studio.read(str(path), 'ranking')
  assert [(row['prompt'], [r['text'] for r in row['responses']]) for row in rows] == [
    ('Why?', ['first', 'second', 'third']),
    ('Fox?', ['jumps', 'sleeps']),
    (CHAT, ['a', 'b']),
  ]
  assert [r['source'] for r in rows[0]['responses']] == ['', '', '']
  many = {f'response_{n}': str(n) for n in (10, 9, 8, 7, 6, 5, 4, 3, 2)}
  path.write_text(json.dumps(dict(fields=many | dict(prompt='p'), metadata=dict(use_case='chat'))))
  (row,) = argilla.read(str(path), 'ranking')
  assert [r['text'] for r in row['responses']] == list('23456789') + ['10']
  assert row['use_case'] == 'chat' and row['extra'] == {}
  (row,) = argilla.read(str(path), 'demonstration')
  assert (row['prompt'], row['responses']) == ('p', [])
  assert capsys.readouterr().err == ''


PROMPT = dict(prompt='p')


@pytest.mark.parametrize(
  ('tool', 'kind', 'record', 'message'),
  [
    (label_studio, 'ranking', 'text', 'record 2: a record must be an object, not text'),
    (label_studio, 'ranking', dict(data=[1]), "record 2: 'data' must be an object, not a list"),
    (label_studio, 'ranking', dict(data=dict(image='x')), 'record 2: there is no prompt among'),
    (label_studio, 'ranking', dict(data=PROMPT), 'record 2: there are no responses'),
    (label_studio, 'ranking', dict(data=PROMPT | dict(answer1='a')), 'record 2: 1 responses'),
    (
      label_studio,
      'ranking',
      dict(data=PROMPT | dict(items=[dict(id=1, body='a'), dict(id=1, body='b')])),
      r"record 2: 'data.items\[1\]' must have a 'body' and an 'id' of its own",
    ),
    (
      label_studio,
      'ranking',
      dict(data=PROMPT | dict(items=[dict(id=1, body='a'), dict(id=2, body=7)])),
      "record 2: every entry of 'responses' must be a string",
    ),
    (label_studio, 'demonstration', dict(data=dict(prompt=7)), "record 2: field 'prompt' must be"),
    (
      label_studio,
      'demonstration',
      dict(data=PROMPT, meta=dict(extra=[])),
      "record 2: the meta data 'extra' must be an object, not a list",
    ),
    (label_studio, 'demonstration', dict(data=PROMPT, annotations=3), 'record 2 has not the form'),
    (argilla, 'ranking', dict(prompt='flat'), "record 2: 'fields' must be an object, not null"),
    (argilla, 'ranking', dict(fields=PROMPT), 'record 2: there are no responses'),
    (argilla, 'demonstration', dict(fields={}), r'record 2: there is no prompt .*\(none\)'),
    (
      argilla,
      'demonstration',
      dict(fields=PROMPT, responses=dict(q=[{}])),
      'record 2 has not the form',
    ),
    (argilla, 'demonstration', dict(fields=dict(prompt=[{}])), "record 2: 'prompt' as a list"),
  ],
)
def test_bad_records(tmp_path, tool, kind, record, message):
  """An error names the file, the number of the record, and the field."""
  path = tmp_path / 'bad.json'
  good = {
    label_studio: dict(data=PROMPT | dict(answer1='a', answer2='b')),
    argilla: dict(fields=PROMPT | dict(response_1='a', response_2='b')),
  }[tool]
  path.write_text(json.dumps([good, record]))
  with pytest.raises(ValueError, match=f'bad.json, {message}'):
    tool.read(str(path), kind)


@TOOLS
def test_bad_files(tmp_path, tool):
  path = tmp_path / 'bad.json'
  for text, message in (
    ('[]', 'has no records'),
    ('', 'has no records'),
    ('<View/>', 'line 1: not JSON'),
    ('[{"data": {}},\n{"data": ]', 'line 2: not JSON'),
  ):
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
      tool.read(str(path), 'ranking')
  path.write_bytes('[{"prompt": "ä"}]'.encode('latin-1'))
  with pytest.raises(ValueError, match='not UTF-8'):
    tool.read(str(path), 'ranking')
  with pytest.raises(FileNotFoundError, match='nothing.json: no such file'):
    tool.read(str(tmp_path / 'nothing.json'), 'ranking')
