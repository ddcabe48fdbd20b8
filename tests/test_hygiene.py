"""Prompt hygiene by hand, and prepare.py from a raw file to splits that the sources read again."""

import json

import pytest

from alignjax.data import hygiene, sources
from experiments import prepare


def rows(*prompts, **more):
  return [{'prompt': p, **more} for p in prompts]


def test_prompts_with_a_long_common_prefix_are_one():
  kept, removed = hygiene.deduplicate(rows('Write a poem about cats', 'write  a POEM about dogs', 'Write', 'Write', 'Hi'), 12)
  assert [r['prompt'] for r in kept] == ['Write a poem about cats', 'Write', 'Hi'] and len(removed) == 2


def test_a_user_has_a_cap_and_the_nameless_none():
  records = rows('a', 'b', 'c', user_id='u') + rows('d', user_id='v') + rows('e', 'f', 'g')
  kept, removed = hygiene.cap_users(records, 2)
  assert [r['prompt'] for r in kept] == ['a', 'b', 'd', 'e', 'f', 'g'] and [r['prompt'] for r in removed] == ['c']


@pytest.mark.parametrize('seed', range(3))
def test_users_are_on_one_side_and_the_shares_hold(seed):
  records = [{'prompt': f'{u} {i}', 'user_id': f'u{u}'} for u in range(2000) for i in range(2)]
  splits = hygiene.split(records, dict(train=0.8, valid=0.1, test=0.1), seed)
  users = [{r['user_id'] for r in rs} for rs in splits.values()]
  assert sum(map(len, users)) == 2000 and sum(map(len, splits.values())) == 4000
  assert len(users[0]) == pytest.approx(1600, abs=80) and len(users[1]) == pytest.approx(200, abs=60)
  assert splits == hygiene.split(records, dict(train=0.8, valid=0.1, test=0.1), seed)
  assert splits != hygiene.split(records, dict(train=0.8, valid=0.1, test=0.1), seed + 1)


@pytest.mark.parametrize('text,kind', [
    ('write to anna.b+c@mail.example.org now', 'e-mail'), ('call +1 (415) 555-0134', 'phone'), ('call 415-555-0134.', 'phone'),
    ('ssn 123-45-6789', 'us ssn'), ('card 4111 1111 1111 1111', 'card'), ('DE89 3704 0044 0532 0130 00', 'iban'),
    ('host 192.168.10.254', 'ip address'),
    ('card 4111 1111 1111 1112', None), ('in 1999-2000, 3.14159 and 12,000,000', None), ('version 1.2.3.4.5', None),
    ('000-12-3456', None), ('300.1.2.3', None), ('mail me @ home', None), ('the 1815 to 1914 period', None),
])
def test_personal_data_by_pattern(text, kind):
  assert hygiene.pii(text) == kind


def test_all_rules_in_order_and_counted():
  records = [*rows('same same', 'same same', user_id='u'), *rows('x ' * 30, user_id='u'), *rows('a', 'b', 'c', user_id='w'),
             *rows('mail a@b.org', user_id='z')]
  splits, log = hygiene.clean(records, prefix=50, per_user=2, max_tokens=20, length=lambda t: len(t.split()), remove_pii=True,
                              shares=dict(train=1.0), seed=0)
  assert log == [('read', 0, 7), ('over 20 tokens', 1, 6), ('same first 50 characters', 1, 5), ('over 2 of a user', 1, 4),
                 ('personal data in train (e-mail 1)', 1, 3)]
  assert [r['prompt'] for r in splits['train']] == ['same same', 'a', 'b']


def test_personal_data_stays_outside_training():
  splits, _ = hygiene.clean(rows('mail a@b.org'), prefix=None, per_user=None, max_tokens=None, length=len, remove_pii=True,
                            shares=dict(test=1.0), seed=0)
  assert len(splits['test']) == 1


KINDS = {
    'prompts': [{'prompt': f'p{i}', 'user_id': f'u{i}'} for i in range(30)] + [
        {'prompt': [{'role': 'user', 'content': 'hi'}], 'user_id': 'm'}],
    'demonstrations': [{'prompt': f'p{i}', 'response': 'ü', 'use_case': 'qa'} for i in range(30)],
    'comparisons': [{'prompt': f'p{i}', 'responses': ['a', '', 'c'], 'ranks': [1, 0, 0], 'labeler_id': 'w'} for i in range(30)],
    'pretrain': [{'text': f't{i}', 'kind': 'book'} for i in range(30)],
}


@pytest.mark.parametrize('form', ['jsonl', 'tfds'])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.filterwarnings('ignore')
def test_prepare_writes_what_sources_read(kind, form, tmp_path, capsys):
  (tmp_path / 'raw.jsonl').write_text('\n'.join(map(json.dumps, KINDS[kind])))
  prepare.main([f'--source=jsonl:{tmp_path}/raw.jsonl', f'--kind={kind}', f'--out={tmp_path}/out', f'--format={form}', '--shards=2',
                '--shares=train=0.6,test=0.4'])
  lines = capsys.readouterr().out.splitlines()
  names = [line for line in lines if line.startswith(f'{form}:')]
  assert [n.partition(':')[0] for n in names] == [form] * 2
  back = [r for name in names for r in sources.read(name, kind)]
  key = lambda r: json.dumps(r, sort_keys=True)
  assert sorted(back, key=key) == sorted(KINDS[kind], key=key)
  if form == 'tfds':
    assert len(list((tmp_path / 'out').rglob('*train.array_record*-of-00002'))) == 2


def test_prepare_says_what_is_wrong(tmp_path):
  with pytest.raises(SystemExit, match="error: --shares=train has not the form"):
    prepare.main(['--source=jsonl:x', '--kind=prompts', f'--out={tmp_path}', '--shares=train'])
  with pytest.raises(SystemExit, match='no such file'):
    prepare.main(['--source=jsonl:/nowhere.jsonl', '--kind=prompts', f'--out={tmp_path}/o'])
  assert not (tmp_path / 'o').exists()
