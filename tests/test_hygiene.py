"""Prompt hygiene by hand, and prepare.py from a raw file to splits that the sources read again."""

import json

import pytest

from alignjax.commands import prepare
from alignjax.data import hygiene, sources


def rows(*prompts, **more):
  return [{'prompt': p, **more} for p in prompts]


def test_prompts_with_a_long_common_prefix_are_one():
  kept, removed = hygiene.deduplicate(
    rows('Write a poem about cats', 'write  a POEM about dogs', 'Write', 'Write', 'Hi'), 12
  )
  assert [r['prompt'] for r in kept] == ['Write a poem about cats', 'Write', 'Hi'] and len(
    removed
  ) == 2


def test_a_user_has_a_cap_and_the_nameless_none():
  records = rows('a', 'b', 'c', user_id='u') + rows('d', user_id='v') + rows('e', 'f', 'g')
  kept, removed = hygiene.cap_users(records, 2)
  assert [r['prompt'] for r in kept] == ['a', 'b', 'd', 'e', 'f', 'g'] and [
    r['prompt'] for r in removed
  ] == ['c']


@pytest.mark.parametrize('seed', range(3))
def test_users_are_on_one_side_and_the_shares_hold(seed):
  records = [{'prompt': f'{u} {i}', 'user_id': f'u{u}'} for u in range(2000) for i in range(2)]
  splits = hygiene.split(records, dict(train=0.8, valid=0.1, test=0.1), seed)
  users = [{r['user_id'] for r in rs} for rs in splits.values()]
  assert sum(map(len, users)) == 2000 and sum(map(len, splits.values())) == 4000
  assert len(users[0]) == pytest.approx(1600, abs=80) and len(users[1]) == pytest.approx(
    200, abs=60
  )
  assert splits == hygiene.split(records, dict(train=0.8, valid=0.1, test=0.1), seed)
  assert splits != hygiene.split(records, dict(train=0.8, valid=0.1, test=0.1), seed + 1)


@pytest.mark.parametrize(
  'text,kind',
  [
    ('write to anna.b+c@mail.example.org now', 'e-mail'),
    ('call +1 (415) 555-0134', 'phone'),
    ('call 415-555-0134.', 'phone'),
    ('ssn 123-45-6789', 'us ssn'),
    ('card 4111 1111 1111 1111', 'card'),
    ('DE89 3704 0044 0532 0130 00', 'iban'),
    ('host 192.168.10.254', 'ip address'),
    ('pi is 3.141592653589793', None),
    ('3.141592653589793 and .141592653589793', None),
    ('x=-0.141592653589793', None),
    ('a1415926535897937 or 141592653589793f', None),
    ('pay no.4111111111111111', 'card'),
    ('(4111-1111-1111-1111)', 'card'),
    ('5,4111111111111111', 'card'),
    ('3.141592653589793 4111111111111111.', 'card'),
    ('card 4111 1111 1111 1112', None),
    ('in 1999-2000, 3.14159 and 12,000,000', None),
    ('version 1.2.3.4.5', None),
    ('000-12-3456', None),
    ('300.1.2.3', None),
    ('mail me @ home', None),
    ('the 1815 to 1914 period', None),
    ('(212) 736-5000', 'phone'),
    ('212.736.5000', 'phone'),
    ('1-800-356-9377', 'phone'),
    ('+44 20 7946 0958', 'phone'),
    ('020 7946 0958', 'phone'),
    ('+49 (0)30 901820', 'phone'),
    ('tel:+81335708000', 'phone'),
    ('+91 98765 43210', 'phone'),
    ('0033 1 42 68 53 00', 'phone'),
    ('2026-11-28 14:22:33, 11-28-2026, 28/11/2026 or 12.11.2024', None),
    ('ISBN 978-3-16-148410-0, 0-306-40615-2 or 0 306 40615 2', None),
    ('UPC 0-12345-67890-5, ISSN 1234-5679', None),
    ('$1,234,567.89, 1 250 000 euros, 2 147 483 647 people', None),
    ('order 4155550134, id 98712345678901234', None),
    ('299 792 458 m/s, pages 123-456, 2024 2025 2026', None),
    ('1 2 3 4 5 6 7 8 9 10', None),
    ('+99 999 999 999', None),
  ],
)
def test_personal_data_by_pattern(text, kind):
  assert hygiene.pii(text) == kind


def test_all_rules_in_order_and_counted():
  records = [
    *rows('same same', 'same same', user_id='u'),
    *rows('x ' * 30, user_id='u'),
    *rows('a', 'b', 'c', user_id='w'),
    *rows('mail a@b.org', user_id='z'),
  ]
  splits, log = hygiene.clean(
    records,
    kind='prompts',
    prefix=50,
    per_user=2,
    max_tokens=20,
    length=lambda t: len(t.split()),
    remove_pii=True,
    shares=dict(train=1.0),
    seed=0,
  )
  assert log == [
    ('read', 0, 7),
    ('blank', 0, 7),
    ('over 20 tokens', 1, 6),
    ('same first 50 characters', 1, 5),
    ('over 2 of a user', 1, 4),
    ('personal data in train (e-mail 1)', 1, 3),
  ]
  assert [r['prompt'] for r in splits['train']] == ['same same', 'a', 'b']


def test_personal_data_stays_outside_training():
  splits, _ = hygiene.clean(
    rows('mail a@b.org'),
    kind='prompts',
    prefix=None,
    per_user=None,
    max_tokens=None,
    length=len,
    remove_pii=True,
    shares=dict(test=1.0),
    seed=0,
  )
  assert len(splits['test']) == 1


def test_id_0_is_an_id():
  """Ten prompts of person 0 and ten of nobody: a cap of four, and one side of the split, for person
  0 alone."""
  people = {'zero': {'user_id': 0}, 'nobody': {}, 'empty': {'user_id': ''}}
  records = [{'prompt': f'{name} {i}', **who} for name, who in people.items() for i in range(10)]
  kept, removed = hygiene.cap_users(records, 4)
  assert len(kept) == 24 and {r['user_id'] for r in removed} == {0}
  for seed in range(5):
    sides = hygiene.split(records, dict(train=0.5, valid=0.5), seed)
    count = lambda name, side: sum(r['prompt'].startswith(name) for r in sides[side])  # noqa: B023 used at once
    assert {count('zero', 'train'), count('zero', 'valid')} == {0, 10}
    assert count('nobody', 'train') not in (0, 10) and count('empty', 'train') not in (0, 10)


@pytest.mark.parametrize('seed', range(5))
def test_no_prompt_is_in_two_splits(seed):
  """30 pairs of people who asked one thing in two forms, and somebody nameless who asked it too; 30
  others alone."""
  text = [dict(prompt=f'Ask {i}', response='a', user_id=f'u{i}') for i in range(30)]
  turns = [
    dict(prompt=[dict(role='user', content=f'ask  {i}')], response='b', user_id=f'v{i}')
    for i in range(30)
  ]
  more = [dict(prompt=f'only v{i}', response='c', user_id=f'v{i}') for i in range(30)]
  nameless = [dict(prompt=f'Human: ask {i}', response='d') for i in range(30)]
  alone = [dict(prompt=f'alone {i}', response='e', user_id=i) for i in range(30)]
  records = [*text, *turns, *more, *nameless, *alone]
  sides = hygiene.split(records, dict(train=0.5, valid=0.5), seed)
  for what in (lambda r: hygiene.conversation(r['prompt']), hygiene.user_of):
    assert not {what(r) for r in sides['train']} & {what(r) for r in sides['valid']} - {None}
  assert sum(map(len, sides.values())) == len(records) and 40 < len(sides['train']) < 110
  back = hygiene.split(records[::-1], dict(train=0.5, valid=0.5), seed)
  assert back['train'] == sides['train'][::-1], 'in whatever order they come'


def comparison(prompt, responses, ranks, labeler, **more):
  return dict(prompt=prompt, responses=responses, ranks=ranks, labeler_id=labeler, **more)


def test_a_comparison_is_the_same_only_with_prompt_ranking_and_labeler():
  first = comparison('p', ['a', 'b', 'c'], [0, 1, 1], 0)
  same = [first, comparison('P ', ['c', 'a', 'b'], [5, 2, 5], 0)]
  other = [
    comparison('p', ['a', 'b', 'c'], [0, 1, 1], 1),
    comparison('p', ['a', 'b', 'c'], [1, 0, 1], 0),
    comparison('p', ['a', 'b', 'd'], [0, 1, 1], 0),
    comparison('q', ['a', 'b', 'c'], [0, 1, 1], 0),
  ]
  kept, removed = hygiene.deduplicate([*same, *other], 200, 'comparisons')
  assert kept == [first, *other] and removed == same[1:]


def cleaned(kind, records, **changes):
  settings = (
    dict(
      prefix=200,
      per_user=200,
      max_tokens=1000,
      length=lambda t: len(t.split()),
      remove_pii=True,
      shares=dict(train=1.0),
      seed=0,
    )
    | changes
  )
  splits, log = hygiene.clean(records, kind=kind, **settings)
  return splits['train'], {rule: removed for rule, removed, _ in log}


def test_each_kind_has_its_rules():
  """60 comparisons of 10 prompts by 6 labelers stay, as do 20 books that begin with one licence and
  hold an address, and two answers to one prompt."""
  votes = [
    comparison(f'p{i}', ['a', 'b'], [0, 1], w, user_id=0) for i in range(10) for w in range(6)
  ]
  assert cleaned('comparisons', votes, per_user=10)[0] == votes
  assert len(cleaned('comparisons', votes, per_user=4)[0]) == 4 * 6
  books = [{'text': f'Licence, write to a@b.org. {"word " * 2000}{i}'} for i in range(20)]
  kept, log = cleaned('pretrain', [*books, books[3], {'text': ' \n'}], per_user=1)
  assert kept == books and log == {'read': 0, 'blank': 1, 'same text': 1}
  two = [
    dict(prompt='p', response='a'),
    dict(prompt='p', response='b'),
    dict(prompt='p', response='A '),
  ]
  assert cleaned('demonstrations', two)[0] == two[:2]
  mail = [
    dict(prompt='p', response='to a@b.org'),
    comparison('p', ['a', 'call +1 (415) 555-0134'], [0, 1], 'w'),
  ]
  assert cleaned('demonstrations', mail[:1])[0] == cleaned('comparisons', mail[1:])[0] == []
  blank = [*rows('', ' \n', 'x'), dict(prompt=[dict(role='user', content=' ')])]
  assert [r['prompt'] for r in cleaned('prompts', blank)[0]] == ['x']


def test_a_conversation_is_what_is_said_first():
  forms = [
    'Hello  there',
    'hello THERE',
    '\n\nHuman: Hello there\n\nAssistant:',
    'Human: Hello there',
    '\n\nHuman: Hello there\n\nAssistant: Hi\n\nHuman: Bye\n\nAssistant:',
    [dict(role='user', content='Hello there')],
    [
      dict(role='system', content='s'),
      dict(role='user', content='Hello there'),
      dict(role='assistant', content='Hi'),
      dict(role='user', content='Bye'),
    ],
  ]
  assert {hygiene.conversation(f) for f in forms} == {'hello there'}
  held = [hygiene.held_out(f'prompt {i}', 0.1, 0) for i in range(5000)]
  assert sum(held) == pytest.approx(500, abs=70) and held != [
    hygiene.held_out(f'prompt {i}', 0.1, 1) for i in range(5000)
  ]
  more = [hygiene.held_out(f'prompt {i}', 0.3, 0) for i in range(5000)]
  assert all(b or not a for a, b in zip(held, more, strict=True)), (
    'a larger share holds out the same prompts and more'
  )


def test_an_empty_split_is_said(tmp_path, capsys):
  (tmp_path / 'raw.jsonl').write_text(
    ''.join(json.dumps(r) + '\n' for r in rows('a', 'b', user_id=0))
  )
  prepare.main(
    [
      f'--source=jsonl:{tmp_path}/raw.jsonl',
      '--kind=prompts',
      f'--out={tmp_path}/o',
      '--shares=train=0.5,valid=0.5',
    ]
  )
  out = capsys.readouterr().out
  assert (
    out.count('WARNING: the split ') == 1 and ' is empty: none of the 2 remaining records' in out
  )
  assert {'train: 2 records, 1 users', 'valid: 2 records, 1 users'} & set(out.splitlines())
  for shares in ('train=0.5,train=0.5', '=1', 'a/b=1'):
    with pytest.raises(ValueError, match='each split must have a name of its own'):
      prepare.main(
        [
          f'--source=jsonl:{tmp_path}/raw.jsonl',
          '--kind=prompts',
          f'--out={tmp_path}/o',
          f'--shares={shares}',
        ]
      )
  for flag in ('--prefix=0', '--per_user=-1', '--max_tokens=0'):
    with pytest.raises(SystemExit, match='2'):
      prepare.main(
        [f'--source=jsonl:{tmp_path}/raw.jsonl', '--kind=prompts', f'--out={tmp_path}/o', flag]
      )
    assert "is neither a number from 1 on nor 'none'" in capsys.readouterr().err
  for shares in ('train=-1,valid=2', 'train=0', 'train=nan'):
    with pytest.raises(ValueError, match='a share must be a number from 0 on'):
      prepare.main(
        [
          f'--source=jsonl:{tmp_path}/raw.jsonl',
          '--kind=prompts',
          f'--out={tmp_path}/o',
          f'--shares={shares}',
        ]
      )


KINDS = {
  'prompts': [{'prompt': f'p{i}', 'user_id': f'u{i}'} for i in range(30)]
  + [{'prompt': [{'role': 'user', 'content': 'hi'}], 'user_id': 'm'}],
  'demonstrations': [{'prompt': f'p{i}', 'response': 'ü', 'use_case': 'qa'} for i in range(30)],
  'comparisons': [
    {
      'prompt': f'p{i // 3}',
      'responses': ['a', '', 'c'],
      'ranks': [1, 0, 0],
      'labeler_id': f'{i % 3}',
    }
    for i in range(30)
  ],
  'pretrain': [{'text': f't{i}', 'kind': 'book'} for i in range(30)],
}


@pytest.mark.parametrize('form', ['jsonl', 'tfds'])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.filterwarnings('ignore')
def test_prepare_writes_what_sources_read(kind, form, tmp_path, capsys):
  (tmp_path / 'raw.jsonl').write_text('\n'.join(map(json.dumps, KINDS[kind])))
  prepare.main(
    [
      f'--source=jsonl:{tmp_path}/raw.jsonl',
      f'--kind={kind}',
      f'--out={tmp_path}/out',
      f'--format={form}',
      '--shards=2',
      '--shares=train=0.6,test=0.4',
    ]
  )
  lines = capsys.readouterr().out.splitlines()
  names = [line for line in lines if line.startswith(f'{form}:')]
  assert [n.partition(':')[0] for n in names] == [form] * 2
  back = [r for name in names for r in sources.read(name, kind)]
  key = lambda r: json.dumps(r, sort_keys=True)
  assert sorted(back, key=key) == sorted(KINDS[kind], key=key)
  if form == 'tfds':
    assert len(list((tmp_path / 'out').rglob('*train.array_record*-of-00002'))) == 2


@pytest.mark.filterwarnings('ignore')
def test_a_damaged_record_of_prepared_data_is_named(tmp_path, capsys):
  """array_record finds out when the record is read, with an error of its own that names no file."""
  (tmp_path / 'raw.jsonl').write_text(
    '\n'.join(json.dumps({'prompt': f'a prompt with the number {i}'}) for i in range(20))
  )
  prepare.main(
    [
      f'--source=jsonl:{tmp_path}/raw.jsonl',
      '--kind=prompts',
      f'--out={tmp_path}/out',
      '--format=tfds',
      '--shares=train=1',
    ]
  )
  (file,) = (tmp_path / 'out').rglob('*train.array_record*')
  raw = bytearray(file.read_bytes())
  raw[len(raw[: 2**16].rstrip(b'\0')) // 2] ^= 0x01  # amid the records, which begin the first block
  file.write_bytes(raw)
  source = capsys.readouterr().out.strip().splitlines()[-1]
  with pytest.raises(ValueError, match=rf'{source}, record \d+ cannot be read \(.*hash mismatch'):
    sources.read(source, 'prompts')


def test_prepare_says_what_is_wrong(tmp_path):
  with pytest.raises(ValueError, match='--shares=train does not have the form'):
    prepare.main(['--source=jsonl:x', '--kind=prompts', f'--out={tmp_path}', '--shares=train'])
  with pytest.raises(FileNotFoundError, match='no such file'):
    prepare.main(['--source=jsonl:/nowhere.jsonl', '--kind=prompts', f'--out={tmp_path}/o'])
  assert not (tmp_path / 'o').exists()
