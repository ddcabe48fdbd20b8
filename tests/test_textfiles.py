"""People's text files, read one way everywhere: lines, encodings, compression, strict JSON; errors
name file, line and field."""

import gzip
import json
import pathlib
import sys

import numpy as np
import pytest

from alignjax.commands import generate, preference
from alignjax.data import fields, mappings, sources
from alignjax.evals import items
from alignjax.evals.preference import judgments, responses
from alignjax.evals.public import loaders
from alignjax.evals.reward import labelers
from alignjax.inference import loading
from alignjax.runtime import files, journal, metrics, textfiles

ODD = 'a\u2028b\u2029c\x85d\x0ce\x0bf\x1cg\x1dh\rj'  # what str.splitlines takes for ends of lines


@pytest.mark.parametrize(
  'text,expected',
  [
    ('', []),
    ('a', ['a']),
    ('a\n', ['a']),
    ('a\r\nb\r\n', ['a', 'b']),
    ('a\n\n', ['a', '']),
    ('\n', ['']),
    (f'{ODD}\nb', [ODD, 'b']),
  ],
)
def test_lines_end_at_newline_only(text, expected):
  assert textfiles.lines(text) == expected


@pytest.mark.parametrize('name', ['x', 'x.jsonl', 'x.gz'])
@pytest.mark.parametrize('mark', [b'', b'\xef\xbb\xbf'])
@pytest.mark.parametrize('pack', [bytes, gzip.compress])
def test_the_content_says_what_a_file_is(tmp_path, name, mark, pack):
  (tmp_path / name).write_bytes(pack(mark + f'ä{ODD}\n'.encode()))
  assert textfiles.read(tmp_path / name) == f'ä{ODD}\n'


@pytest.mark.parametrize(
  'raw,words',
  [
    ('häl'.encode('utf-16'), 'f: UTF-16, not text in UTF-8'),
    ('hal'.encode('utf-16-be'), 'UTF-16 or binary'),
    ('hal'.encode('utf-32'), 'UTF-32'),
    (b'PK\x03\x04...', 'a zip archive'),
    (b'PAR1..', 'Parquet'),
    (b'(\xb5/\xfd..', 'zstd'),
    ('eins\nzwei\ndr\xe4i\n'.encode('latin-1'), r'f: not UTF-8 \(byte 12\) in line 3'),
    (b'\xef\xbb\xbfab\n\xff', r'not UTF-8 \(byte 6\) in line 2'),
    (gzip.compress(b'abc' * 99, mtime=0)[:25], 'f: not a whole gzip file'),
    (gzip.compress(b'\xff', mtime=0), r'not UTF-8 \(byte 0\)'),
  ],
)
def test_what_is_no_text_is_named(tmp_path, raw, words):
  (tmp_path / 'f').write_bytes(raw)
  with pytest.raises(ValueError, match=words):
    textfiles.read(tmp_path / 'f')


def test_what_is_no_file_is_named(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match='data.prompts: /nowhere/x: no such file'):
    textfiles.read('/nowhere/x', 'data.prompts: ')
  for name, words in (
    (str(tmp_path), 'is a folder; name the file in it'),
    ('x' * 300, 'cannot be read .File name too long'),
    ('a\0b', 'is no name of a file'),
    ('~nobody-of-this-name/x', 'nobody-of-this-name/x'),
  ):
    with pytest.raises(ValueError, match=words):
      textfiles.read(name)
  monkeypatch.setattr(
    pathlib.Path,
    'open',
    lambda self, mode: (_ for _ in ()).throw(PermissionError(13, 'Permission denied')),
  )
  with pytest.raises(ValueError, match='f cannot be read .Permission denied'):
    textfiles.read(tmp_path / 'f')


@pytest.mark.parametrize(
  'text,words',
  [
    (
      r'{"prompt": "a", "response": "hello \ud83d"}',
      r"field 'response' holds \\ud83d, half of a surrogate pair, at character 6",
    ),
    (r'{"a": [{"b": "\uDC00"}]}', r"field 'a\[0\].b' holds \\udc00"),
    (r'{"\ud800": 1}', r'half of a surrogate pair'),
    ('{"a": 1, "b": 2, "a": 3}', "field 'a' is there twice"),
    ('{"a": {"x": 1, "x": 1}}', "field 'x' is there twice"),
    ('{"s": [1, NaN]}', r"field 's\[1\]' is nan"),
    ('{"s": {"x": -1' + '0' * 400 + '}}', "field 's.x' has 401 digits, more than"),
    ('{"s": -Infinity}', "field 's' is -inf"),
    ('{"s": 1e999}', "field 's' is inf"),
    ('[' * 100_000, 'nested too deeply'),
    ('{"a": ' + '9' * 5000 + '}', 'too many digits'),
    ('{"a": tru}', 'not JSON .*column 7'),
  ],
)
def test_json_is_read_strictly(text, words):
  with pytest.raises(ValueError, match=f'f, line 3: .*{words}'):
    textfiles.parse(text, 'f, line 3')


def test_whole_pairs_and_escapes_are_text():
  assert textfiles.parse(r'{"a": "\ud83d\ude00 \\ud800 \u2028"}', 'f') == {
    'a': '\U0001f600 \\ud800 \u2028'
  }


ROWS = [
  {'instruction': 'i', 'input': '', 'output': 'r'},
  {'instruction': 'j', 'input': 'x', 'output': ODD},
]


@pytest.mark.parametrize('indent', [None, 0, 4])
@pytest.mark.parametrize('name', ['a.json', 'a.jsonl'])
def test_one_array_over_any_number_of_lines(tmp_path, indent, name):
  (tmp_path / name).write_text('\n ' + json.dumps(ROWS, indent=indent) + '\n\n')
  made = sources.read(f'jsonl:{tmp_path / name}', 'demonstrations', 'alpaca')
  assert made == [dict(prompt='i', response='r'), dict(prompt='j\n\nx', response=ODD)]
  assert items.read(tmp_path / name, ('output',)) == ROWS
  # on some systems names come in capitals
  (tmp_path / name).rename(tmp_path / f'{name.upper()}.GZ')
  assert items.read(tmp_path / f'{name.upper()}.GZ', ('output',)) == ROWS


@pytest.mark.parametrize(
  'text,words',
  [
    (
      '[\n{"prompt": "a"},\n{"prompt": 3}\n]',
      "line 3: field 'prompt' must be str or list, not int",
    ),
    ('[\n{"prompt": "a"},\n{"prompt" 3}\n]', 'line 3: not JSON'),
    ('[\n{"prompt": "a"}\n{"prompt": "b"}]', 'line 3: not JSON'),
    ('[\n{"prompt": "a"},\n', 'not JSON'),
    ('[{"prompt": "a"},', 'line 1: not JSON'),
    ('["a"]\n["b"]', 'line 1: a record must be an object'),
    ('[]', 'no records'),
    ('[\n{"prompt": "a"}] x', 'line 2: something follows the array'),
    ('', 'no records'),
    ('null', 'line 1: a record must be an object'),
    ('[\n' + '[' * 100_000, 'line 2: not JSON .it is nested too deeply'),
  ],
)
def test_what_an_array_lacks_is_named(tmp_path, text, words):
  (tmp_path / 'a.json').write_text(text)
  with pytest.raises(ValueError, match=f'a.json.*{words}'):
    sources.read(f'jsonl:{tmp_path}/a.json', 'prompts')


# every reader: a file whose rows are good, as it must read them; each is also given a bad row, and
# bytes that are not UTF-8


def _argument(path):
  mappings._arguments.cache_clear()
  return [r['text'] for r in mappings._arguments(path).values()]


READERS = {
  'sources': (
    dict(prompt='P'),
    lambda p: [r['prompt'] for r in sources.read(f'jsonl:{p}', 'prompts')],
  ),
  'prompts_file': (dict(prompt='P'), lambda p: generate.read_prompts(str(p))),
  'items': (dict(prompt='P'), lambda p: [r['prompt'] for r in items.read(p, ('prompt',))]),
  'public_data': (
    dict(sentence='P'),
    lambda p: [
      r['sentence'] for r in loaders.local('sst', str(p), {'sentence': str})['validation']
    ],
  ),
  'judgments': (
    dict(prompt='P', a='x', b='y', choice='a'),
    lambda p: [s for s in judgments.read(str(p), judge='j').prompts.values()],
  ),
  'arguments': (dict(topic='t', arg_id=1, text='P'), _argument),
}


@pytest.mark.parametrize('name', READERS)
def test_every_reader_reads_and_refuses_alike(tmp_path, monkeypatch, name):
  row, read = READERS[name]
  text = json.dumps(row, ensure_ascii=False).replace(
    'P', json.dumps(ODD, ensure_ascii=False)[1:-1].replace('"', '')
  )
  path = tmp_path / 'data.jsonl'
  path.write_bytes(gzip.compress(b'\xef\xbb\xbf' + text.encode() + b'\r\n\r\n'))
  assert read(path) == [ODD]
  monkeypatch.setenv('HOME', str(tmp_path))
  assert read(type('Tilde', (str,), {})('~/data.jsonl')) == [ODD]
  for bad, words in (
    (text.replace('a\u2028', '\\ud800 '), 'data.jsonl, line 2: .*half of a surrogate pair'),
    ('{"a": 1, "a": 2}', "data.jsonl, line 2: field 'a' is there twice"),
    ('{', 'data.jsonl, line 2: not JSON'),
    ('{"a": NaN}', "data.jsonl, line 2: field 'a' is nan"),
  ):
    path.write_text(f'{text}\n{bad}\n', encoding='utf-8')
    with pytest.raises(ValueError, match=words):
      read(path)
  path.write_bytes(text.encode('utf-16'))
  with pytest.raises(ValueError, match='data.jsonl: UTF-16'):
    read(path)


def test_prompts_of_text_and_messages(tmp_path):
  turn = [{'role': 'user', 'content': 'hi'}]
  (tmp_path / 'p.txt').write_bytes(
    b'\xef\xbb\xbf' + f'{ODD}\r\n\n \nsecond\n{json.dumps(turn)}'.encode()
  )
  assert generate.read_prompts(str(tmp_path / 'p.txt')) == [ODD, 'second', turn]
  for line, words in (
    ('[{"role": "user", "content"}]', 'p.txt, line 2: not JSON'),
    ('[{"role": "user"}]', 'p.txt, line 2: .*messages'),
  ):
    (tmp_path / 'p.txt').write_text(f'a\n{line}\n')
    with pytest.raises(ValueError, match=words):
      generate.read_prompts(str(tmp_path / 'p.txt'))
  (tmp_path / 'a; jsonl:b.json').write_text(json.dumps([dict(prompt=turn)]))
  assert generate.read_prompts(f'{tmp_path}/a; jsonl:b.json') == [turn]
  (tmp_path / 'P.JSONL').write_text('{"prompt": "p"}')
  assert generate.read_prompts(f'{tmp_path}/P.JSONL') == ['p']


# sources


def test_names_of_sources_with_semicolons(tmp_path):
  for name in ('a;b.jsonl', 'c; d.jsonl', 'e;jsonl:f.jsonl'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(dict(prompt=name)))
  read = lambda *names: [
    r['prompt'] for r in sources.read('; '.join(f'jsonl:{tmp_path}/{n}' for n in names), 'prompts')
  ]
  assert read('a;b.jsonl', 'c; d.jsonl') == ['a;b.jsonl', 'c; d.jsonl']
  assert read('e\\;jsonl:f.jsonl', 'a;b.jsonl') == ['e;jsonl:f.jsonl', 'a;b.jsonl']
  with pytest.raises(FileNotFoundError, match='a;g.jsonl: no such file'):
    read('a;g.jsonl')


ANSWER = {'role': 'assistant', 'content': 'yes'}
ASKED = [{'role': 'system', 'content': 's'}, {'role': 'user', 'content': 'q'}]


@pytest.mark.parametrize('said', ['yes', ANSWER, [ANSWER], [*ASKED, ANSWER]])
def test_responses_in_messages(said):
  made = fields.check(dict(prompt=ASKED, chosen=said, rejected='no'), 'comparisons', 'f, line 1')
  assert made == dict(prompt=ASKED, responses=['yes', 'no'], ranks=[0, 1])
  assert fields.check(dict(prompt=ASKED, responses=['a', said], ranks=[0, 0]), 'comparisons', 'f')[
    'responses'
  ] == ['a', 'yes']
  assert fields.check(dict(prompt=ASKED, response=said), 'demonstrations', 'f') == dict(
    prompt=ASKED, response='yes'
  )


@pytest.mark.parametrize(
  'record,words',
  [
    (
      dict(
        prompt='q',
        chosen=[ASKED[1], ANSWER],
        rejected=[{'role': 'user', 'content': 'other'}, ANSWER],
      ),
      'has the roles user, assistant',
    ),
    (dict(prompt='q', chosen=[ANSWER, ANSWER], rejected='no'), 'one message of the assistant'),
    (dict(prompt='q', chosen=[ASKED[1]], rejected='no'), 'one message of the assistant'),
    (dict(prompt='q', chosen=[], rejected='no'), 'must be a string'),
    (
      dict(prompt='q', chosen=[{'role': 'assistant', 'content': None}], rejected='no'),
      'must be a string',
    ),
    (dict(prompt='q', chosen=None, rejected='no'), 'must be a string, or a message .* not null'),
    (
      dict(chosen=[*ASKED, ANSWER], rejected=[*ASKED, ANSWER]),
      'data.mapping.comparisons=ultrafeedback_binarized',
    ),
    (dict(chosen='a', rejected='b'), 'data.mapping.comparisons=hh_rlhf'),
    (
      dict(prompt='q', chosen='a', rejected='b', ranks=[1, 0]),
      "'chosen' and 'rejected' are already a ranking of two",
    ),
    (dict(prompt='q', responses=['a', 'b'], ranks=[0, True]), "'ranks' must be integers"),
    (dict(prompt='q', responses=['a', 'b'], ranks=[0, 2**31]), "'ranks' must be integers"),
    (
      dict(prompt='q', responses=['a', 'b'], ranks=[0, 1], labeler_id=0.5),
      "field 'labeler_id' must be text or a whole number",
    ),
    (
      dict(prompt='q', responses=['a', 'b'], ranks=[0, 1], user_id=False),
      "field 'user_id' must be",
    ),
    (
      dict(prompt='q', responses=['a', 'b'], ranks=[0, 1], use_case=3),
      "field 'use_case' must be text, not a number",
    ),
    (
      dict(prompt=None, responses=['a', 'b'], ranks=[0, 1]),
      r"field 'prompt' must be str or list, not NoneType \(null\)",
    ),
  ],
)
def test_records_that_are_not_comparisons(record, words):
  with pytest.raises(ValueError, match=f'f, line 1: .*{words}'):
    fields.check(record, 'comparisons', 'f, line 1')


class Library:
  """Stands for the datasets library and notes what it is asked for."""

  def __init__(self):
    self.asked = []

  def load_dataset(self, name, config, split):
    self.asked.append((name, config, split))
    return [dict(prompt='q')]


@pytest.mark.parametrize('form', ['hf', 'tfds'])
def test_a_folder_is_that_folder_or_an_error(tmp_path, monkeypatch, form):
  library = Library()
  monkeypatch.setitem(sys.modules, 'datasets', library)
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'some/where/data').mkdir(parents=True)
  for name in (
    f'{tmp_path}/some/data',
    '~/some/data',
    './data',
    '../x',
    'some/where/else',
    f'{tmp_path}/{"x" * 300}',
  ):
    with pytest.raises(
      (FileNotFoundError, ValueError), match='names the folder|there is no folder|cannot be read'
    ):
      sources.read(f'{form}:{name}:train', 'prompts')
  (tmp_path / 'rows.jsonl').write_text('{"prompt": "q"}')
  for name in ('rows.jsonl', f'{tmp_path}/rows.jsonl'):
    with pytest.raises(ValueError, match=f'rows.jsonl is a file, .* is jsonl:{name}'):
      sources.read(f'{form}:{name}:train', 'prompts')
  assert library.asked == []
  assert sources._folder(f'{"x" * 300}/a/b', 'data.prompts') is None, 'a name may be of any length'
  with pytest.raises((FileNotFoundError, ValueError), match='data.pretrain.*has no records'):
    sources.read(f'text:{"x" * 300}*', 'pretrain')
  if form == 'hf':
    for name in (f'{tmp_path}/some/where/data', '~/some/where/data', 'some/where/data', 'some'):
      assert sources.read(f'hf:{name}:train', 'prompts') == [dict(prompt='q')]
    folder = f'{tmp_path}/some/where/data'
    assert library.asked == [(folder, None, 'train')] * 2 + [
      ('some/where/data', None, 'train'),
      ('some', None, 'train'),
    ]


def test_a_mapping_that_errs_names_the_record():
  for change, words in (
    (lambda raw: 1 / 0, 'ZeroDivisionError'),
    (lambda raw: None, 'must return a list of records.*NoneType'),
    (lambda raw: [3], 'it returned list of int'),
    (lambda raw: raw, 'it returned dict'),
  ):
    with pytest.raises(ValueError, match=f"f, line 2: .*'<lambda>'.*{words}"):
      sources.convert(dict(prompt='q'), 'prompts', 'f, line 2', change)
  for name in (
    'prompt',
    'prompt=',
    '=x',
    'prompt=a,prompt=b',
    'prompt=a,b',
    'from_scores,x',
    ',a=b',
    'nothing,a=b',
  ):
    with pytest.raises(ValueError, match='data.mapping.prompts='):
      mappings.find(name, 'data.mapping.prompts')
  with pytest.raises(ValueError, match="'from_scores' does not fit .*3 responses, but 2 scores"):
    sources.convert(
      dict(prompt='q', responses=['a', 'b', 'c'], scores=[1, 2]),
      'comparisons',
      'f',
      mappings.from_scores,
    )
  for score in (True, '4', None, float('nan')):
    with pytest.raises(ValueError, match='a score must be a number'):
      sources.convert(
        dict(prompt='q', responses=['a', 'b'], scores=[1, score]),
        'comparisons',
        'f',
        mappings.from_scores,
      )


# separated values


@pytest.mark.parametrize(
  'text,words',
  [
    ('prompt,x\na,b,c\n', 'line 2 has 3 cells, but there are 2 columns'),
    ('prompt,prompt\na,b\n', 'two columns have the same name'),
    ('prompt,x\n"a,b\nc,d\n', 'line 3 cannot be read as separated values'),
    ('prompt,x\n"a"b,c\n', 'line 2 cannot be read as separated values'),
    ('x\na\n', "line 2 lacks 'prompt'; the row has"),
    ('prompt,x\n', 'no rows'),
    ('', 'no rows'),
  ],
)
def test_tables_that_are_none(tmp_path, text, words):
  (tmp_path / 't.csv').write_text(text)
  with pytest.raises(ValueError, match=f't.csv.*{words}'):
    items.read(tmp_path / 't.csv', ('prompt',))


def test_tables_keep_odd_text(tmp_path):
  odd, long = ODD.replace('\rj', ''), 'x' * 200_000
  (tmp_path / 't.csv').write_bytes(
    f'prompt,n\r\n"{odd}, ""q""\r\nb",1\r\n\r\n{long},2\r\n'.encode()
  )
  assert items.read(tmp_path / 't.csv', ('prompt',)) == [
    dict(prompt=f'{odd}, "q"\nb', n='1'),
    dict(prompt=long, n='2'),
  ]
  (tmp_path / 'n.jsonl').write_text('{"prompt": 3}')
  with pytest.raises(ValueError, match="n.jsonl, line 1: 'prompt' must be text, not a number"):
    items.read(tmp_path / 'n.jsonl', ('prompt',))
  with pytest.raises(ValueError, match="'prompt' must be text or an object, not a number"):
    items.read(tmp_path / 'n.jsonl', {'prompt': (str, dict)})


# numbers, names


def test_samples_are_numbers_and_shown_rounded(tmp_path, capsys):
  rows = [
    ('p', f'{ODD}[/b]', 0.123456789, None),
    ([{'role': 'user', 'content': 'q'}], 'r', float('nan'), -1.5),
  ]
  with metrics.Writer(tmp_path) as writer:
    writer.samples(1, rows)
  with metrics.Writer(tmp_path, start_step=1):
    made = [json.loads(line) for line in (tmp_path / 'samples.jsonl').read_text().split('\n')[:-1]]
  assert made == [
    dict(step=1, prompt='p', response=f'{ODD}[/b]', score=0.123456789, gold=None),
    dict(step=1, prompt=[{'role': 'user', 'content': 'q'}], response='r', score=None, gold=-1.5),
  ]
  metrics.print_table('samples', ('prompt', 'response', 'score', 'gold'), rows)
  out = capsys.readouterr().out.split('\n')
  assert out[2].split()[-1] == '0.12' and out[3].split()[-2:] == ['nan', '-1.50']


def test_text_in_a_terminals_table_is_no_markup(monkeypatch, capsys):
  monkeypatch.setattr('sys.stdout.isatty', lambda: True, raising=False)
  metrics.print_table('samples', ('response',), [('[/b] [red]x',)])
  assert '[/b] [red]x' in capsys.readouterr().out


def test_kept_lines_hold_odd_text_and_damage_is_named(tmp_path):
  journal.append(tmp_path / 'k.jsonl', [{'x': ODD}])
  assert journal.read(tmp_path / 'k.jsonl') == [{'x': ODD}]
  (tmp_path / 'k.jsonl').write_bytes(b'{"x": "\xff"}\n')
  with pytest.raises(ValueError, match='k.jsonl, line 1: the line is damaged'):
    journal.read(tmp_path / 'k.jsonl')


def test_labeler_number_0_is_a_person(tmp_path):
  records = [
    dict(prompt=f'p{i}', responses=['a', 'b'], ranks=[0, 1], labeler_id=who)
    for i in range(4)
    for who in (0, 1, '1', '', None)
  ]
  groups = labelers.groups(records, folds=2, min_votes=4, seed=0)
  assert sorted(groups) == [['0'], ['1']]
  cut = labelers.split(records, groups, groups.index(['0']), 0)
  assert {r['labeler_id'] for r in cut.heldout} == {0} and {r['labeler_id'] for r in cut.train} == {
    1,
    '1',
  }
  path = tmp_path / 'people.jsonl'
  path.write_text(
    '\n'.join(
      json.dumps(dict(prompt_id=0, a='x', b='y', choice='a', labeler_id=who))
      for who in (0, 7, None)
    )
  )
  read = judgments.read(str(path), judge='j')
  assert [v.labeler for v in read.verdicts] == ['0', '7', 'people'] and {
    v.prompt_id for v in read.verdicts
  } == {'0'}


def test_home_is_expanded(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  assert files.folder('~/x') == pathlib.Path('/home/me/x') and files.folder('x/~') == pathlib.Path(
    'x/~'
  )


def test_commands_know_the_home_folder(tmp_path, monkeypatch):
  """A shell leaves `~` as it is after `--flag=`."""
  monkeypatch.setenv('HOME', str(tmp_path))
  saved = dict(data=dict(response_length=7, tokenizer='sandbox:'), world=dict(seed=3))
  (tmp_path / 'run/sft/checkpoints').mkdir(parents=True)
  (tmp_path / 'run/sft/checkpoints/config.json').write_text(json.dumps(saved))
  (tmp_path / 'run/sft/final').mkdir()
  (tmp_path / 'run/sft/final/info.json').write_text(json.dumps(dict(head='lm')))
  assert responses.trained(dict(a='~/run/sft')) == (dict(seed=3), 7)
  (tmp_path / 'text').write_bytes(gzip.compress('\ufeffJudge.'.encode()))
  flags = preference.arguments(['--judge_instructions=~/text'])
  assert preference.instructions(flags) == 'Judge.'
  with pytest.raises(FileNotFoundError, match='no finished stage'):
    loading.load('~/run/rm')


def test_metrics_are_read_without_torn_lines(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text(
    '{"step": 1, "x": 2.0}\n{"step": 2, "x": null}\n3\n{"step": 3, "x"'
  )
  columns = metrics.read(tmp_path / 'metrics.jsonl')
  np.testing.assert_array_equal(columns['x'], [2.0, np.nan])
