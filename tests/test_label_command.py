"""`alignjax label` as a person calls it: the server as a process, the other actions in this one."""

import json
import re
import subprocess
import sys

import pytest
from sqlalchemy import event

from alignjax.commands import label
from alignjax.data import sources
from alignjax.label import catalog, client, exchange, schema
from tests import labeling


def lines(path, records):
  path.write_text(''.join(json.dumps(r) + '\n' for r in records))
  return f'jsonl:{path}'


def call(capsys, tmp_path, *arguments):
  label.main([arguments[0], f'--database={tmp_path}/labels.db', *arguments[1:]])
  return capsys.readouterr().out


def test_from_candidates_to_comparisons(tmp_path):
  """The way of a person: import, serve, join by the printed link, rank, export, see the status."""
  records = labeling.candidates(2, k=3)
  source = lines(tmp_path / 'candidates.jsonl', records)
  rules = tmp_path / 'rules.md'
  rules.write_text('# Rules')
  command = [sys.executable, '-m', 'alignjax', 'label']
  database = f'--database={tmp_path}/labels.db'
  imported = subprocess.run(
    [*command, 'import', database, '--task=first', f'--source={source}', f'--instructions={rules}'],
    capture_output=True,
    text=True,
    check=True,
  )
  assert imported.stdout == 'first: 2 items added\n'
  port = labeling.free_port()
  log = (tmp_path / 'log').open('w')
  with (
    log,
    subprocess.Popen(
      [*command, 'serve', database, f'--port={port}'], stdout=subprocess.PIPE, stderr=log, text=True
    ) as server,
  ):
    try:
      assert server.stdout is not None
      link = server.stdout.readline().split()[-1]
      assert re.fullmatch(rf'http://127\.0\.0\.1:{port}/join/\S{{20,}}', link)
      url = link.partition('/join/')[0]
      labeling.wait_for(url)
      someone = client.Labeler(url)
      someone.join(link, 'me', labeling.PASSWORD)
      number = someone.tasks()['first']
      done = someone.work(number, lambda item: dict(ranks=[1, 2, 2], ratings=[{'likert': 3}] * 3))
      someone.close()
    finally:
      server.terminate()
      code = server.wait()
  assert done == 2
  assert code in (0, -15) and (tmp_path / 'log').read_text() == ''
  out = tmp_path / 'comparisons.jsonl'
  subprocess.run([*command, 'export', database, f'--out={out}'], check=True, capture_output=True)
  assert [sorted(r['ranks']) for r in sources.read(f'jsonl:{out}', 'comparisons')] == [
    [0, 1, 1]
  ] * 2
  status = subprocess.run(
    [*command, 'status', database], check=True, capture_output=True, text=True
  )
  assert status.stdout.startswith('first (ranking, training): 2 answers, 0 left')


def test_an_import_adds_to_a_task_and_changes_its_rules(tmp_path, capsys):
  source = lines(tmp_path / 'a.jsonl', labeling.candidates(2))
  more = lines(tmp_path / 'b.jsonl', labeling.candidates(5))
  call(capsys, tmp_path, 'import', '--task=t', f'--source={source}', '--overlap=2')
  said = call(capsys, tmp_path, 'import', '--task=t', f'--source={more}', '--overlap=3')
  assert said == 't: 3 items added, 2 were there already\n'
  assert '0 answers, 15 left' in call(capsys, tmp_path, 'status')


def test_an_export_has_the_pools_that_it_is_for(tmp_path, capsys):
  """Rankings of held-out labelers, and demonstrations of candidates who may not pass, went into the
  training data."""
  engine = schema.connect(str(tmp_path / 'labels.db'))
  who = dict(ann='labeler', eve=('labeler', 'heldout'), sid=('labeler', 'screening'))
  people = labeling.people(engine, **who)
  ranking = labeling.task(engine, records=labeling.candidates(1), pool='all', overlap=3)
  with schema.writing(engine) as connection:
    kind = 'demonstration'
    writing = catalog.add_task(connection, 'write', kind, pool='all', overlap=3)
    catalog.add_items(connection, writing, exchange.demonstration_items([dict(prompt='p')]))
  for person in people.values():
    item = labeling.take(engine, ranking, person)
    payload = dict(ratings=None, ranks=[1, 2, 3, 4], all_bad=False)
    labeling.submit(engine, item, person, payload)
    item = labeling.take(engine, writing, person)
    labeling.submit(
      engine, item, person, dict(prompt=None, response='r', use_case=None, examples=[])
    )
  engine.dispose()

  def names(what, *pool):
    out = tmp_path / 'out.jsonl'
    label.main(
      ['export', f'--database={tmp_path}/labels.db', f'--what={what}', f'--out={out}', *pool]
    )
    found = [json.loads(row)['labeler_id'] for row in out.read_text().splitlines()]
    return set(found), 'NOTE' in capsys.readouterr().err

  assert names('comparisons') == names('demonstrations') == ({'ann'}, True)
  assert names('judgments') == ({'ann', 'eve'}, True)
  assert names('comparisons', '--pool=all') == ({'ann', 'eve', 'sid'}, False)
  assert names('demonstrations', '--pool=heldout') == ({'eve'}, False)


@pytest.mark.parametrize(
  'arguments',
  [['import', '--task=t', '--source={source}'], ['invite', '--count=400']],
  ids=['import', 'invite'],
)
def test_a_full_disk_ends_an_action_in_one_sentence(tmp_path, monkeypatch, capsys, arguments):
  source = lines(tmp_path / 'a.jsonl', labeling.candidates(500))
  call(capsys, tmp_path, 'import', '--task=first', f'--source={source}')
  connect = schema.connect

  def full(*options):
    engine = connect(*options)
    event.listen(engine, 'checkout', lambda c, *_: c.execute('PRAGMA max_page_count=1').close())
    return engine

  arguments = [a.format(source=source) for a in arguments]
  with (
    monkeypatch.context() as m,
    pytest.raises(OSError, match='labels.db: database or disk is full'),
  ):
    m.setattr(schema, 'connect', full)
    call(capsys, tmp_path, *arguments)
  assert re.findall(r'^(\w+) \(', call(capsys, tmp_path, 'status'), re.M) == ['first']
  call(capsys, tmp_path, *arguments)


def test_samples_of_stages_become_items(tmp_path, capsys):
  """Three stages on two prompts: one item has four different responses, the other prompt one."""
  for stage, rows in dict(
    sft=[(5, 'p', 'a'), (5, 'q', 'x')],
    ppo=[(5, 'p', 'b'), (9, 'p', 'c')],
    ptx=[(9, 'p', 'a'), (9, 'p', 'd')],
  ).items():
    (tmp_path / stage).mkdir()
    lines(
      tmp_path / stage / 'samples.jsonl', [dict(step=s, prompt=p, response=r) for s, p, r in rows]
    )
  files = ','.join(f'{tmp_path}/{stage}/samples.jsonl' for stage in ('sft', 'ppo', 'ptx'))
  said = call(capsys, tmp_path, 'import', '--task=t', '--format=samples', f'--source={files}')
  assert said.splitlines()[-1] == 't: 1 items added' and said.startswith('1 prompts have fewer')
  candidates, _ = exchange.samples(files.split(','))
  found = dict(zip(candidates[0]['responses'], candidates[0]['policies'], strict=True))
  assert found == {'a': 'ptx, step 9', 'b': 'ppo, step 5', 'c': 'ppo, step 9', 'd': 'ptx, step 9'}
  (tmp_path / 'bad.jsonl').write_text('{"prompt": "p"}\n')
  with pytest.raises(ValueError, match='bad.jsonl, line 1: a line of samples.jsonl has'):
    exchange.samples([str(tmp_path / 'bad.jsonl')])


def test_tasks_of_demonstrations(tmp_path, capsys):
  source = lines(tmp_path / 'cases.jsonl', [{'prompt': 'a shop'}, {'prompt': 'a school'}])
  kind = '--kind=demonstration'
  for name, *arguments in (
    ('plain', '--style=plain', '--count=3'),
    ('few', '--style=few_shot', '--count=4'),
    ('cases', '--style=user_based', f'--source={source}'),
    ('given', f'--source={source}'),
  ):
    said = call(capsys, tmp_path, 'import', f'--task={name}', kind, *arguments)
    assert said == f'{name}: {dict(plain=3, few=4).get(name, 2)} items added\n'


def test_invitations_and_screening(tmp_path, capsys):
  source = lines(tmp_path / 'a.jsonl', labeling.candidates(1))
  call(capsys, tmp_path, 'import', '--task=t', f'--source={source}')
  links = call(
    capsys, tmp_path, 'invite', '--pool=screening', '--count=3', '--url=https://labels.example/'
  ).split()
  assert len(set(links)) == 3
  assert all(re.fullmatch(r'https://labels\.example/join/[\w-]{32}', link) for link in links)
  assert "Nobody is in the pool 'screening'" in call(capsys, tmp_path, 'screen')


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['import', '--task=t'], '--source is missing'),
    (['import', '--task=t', '--style=plain', '--count=2'], 'needs --kind=demonstration'),
    (
      ['import', '--task=t', '--kind=demonstration', '--style=plain'],
      'name their number by --count',
    ),
    (['import', '--task=t', '--source=jsonl:nothing.jsonl'], 'nothing.jsonl'),
    (['import', '--task=t', '--source=SHORT'], r'line 2: 1 responses; an item has 2 to 9'),
    (['import', '--task=t', '--source=WRONG'], "line 1: field 'responses' must be list"),
    (['import', '--task=t', '--source=GOOD', '--gold'], "line 1: a known answer needs 'ranks'"),
    (['import', '--task=t', '--source=GOOD', '--overlap=0'], 'overlap=0'),
    (['import', '--task=t', '--source=GOOD', '--gold_rate=1'], 'gold_rate=1'),
    (['import', '--task= ', '--source=GOOD'], '1 to 200 characters'),
    (['import', '--task=made', '--kind=toxicity', '--source=GOOD'], "is of the kind 'ranking'"),
    (['export', '--task=other', '--out=OUT'], "no task 'other'; the tasks are: made"),
    (['invite', '--count=0'], '--count=0'),
  ],
)
def test_bad_calls(tmp_path, capsys, arguments, message):
  good = labeling.candidates(2)
  names = dict(
    GOOD=lines(tmp_path / 'good.jsonl', good),
    SHORT=lines(tmp_path / 'short.jsonl', [good[0], dict(prompt='p', responses=['a'])]),
    WRONG=lines(tmp_path / 'wrong.jsonl', [dict(prompt='p', responses='a')]),
    OUT=str(tmp_path / 'out.jsonl'),
  )
  call(capsys, tmp_path, 'import', '--task=made', f'--source={names["GOOD"]}')
  for name, value in names.items():
    arguments = [a.replace(name, value) for a in arguments]
  with pytest.raises((ValueError, OSError), match=message):
    call(capsys, tmp_path, *arguments)
  assert '0 answers, 2 left' in call(capsys, tmp_path, 'status')  # Nothing was half done.


def test_a_database_that_is_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match='no such file'):
    label.main(['status', f'--database={tmp_path}/other.db'])
  with pytest.raises(ValueError, match='no folder'):
    label.main(['serve', f'--database={tmp_path}/not/there.db'])
  with pytest.raises(ValueError, match='SQLite file, or'):
    label.main(['serve', '--database=mysql://host/name'])
