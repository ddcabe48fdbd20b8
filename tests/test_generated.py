"""People's files and flags by generation: each is read as the documentation says, or is an error in
one line that names it."""

import gzip
import json
import os
import pathlib
import sys

import pytest
from generated import as_lines, examples, good_message, messages, number, rows, text, value, whole
from hypothesis import given
from hypothesis import strategies as st

from alignjax.commands import command, generate
from alignjax.data import fields, mappings, sources
from alignjax.evals import items
from alignjax.evals.preference import judgments, verdicts
from alignjax.evals.preference.judgment_rows import FLAGS
from alignjax.evals.preference.responses import Response
from alignjax.evals.public import loaders
from alignjax.runtime import journal, metrics, textfiles

ERRORS = (ValueError, FileNotFoundError)  # what commands tell in one line


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('generated')


def read(call, *names):
  """What it returns, or None where it raises an error in words that names one of these."""
  try:
    return call()
  except ERRORS as error:
    said = str(error)
    assert any(name in said for name in names), (said, names)
    assert len(said.strip()) > 10 and not isinstance(error, (json.JSONDecodeError, UnicodeError)), (
      repr(error)
    )
    return None


answer = st.one_of(
  text,
  st.fixed_dictionaries({'role': st.just('assistant'), 'content': text}),
  st.lists(good_message, max_size=2),
)
prompt = st.one_of(text, messages)
KINDS = {
  'prompts': dict(prompt=prompt, user_id=st.one_of(text, number), use_case=text),
  'demonstrations': dict(prompt=prompt, response=answer, user_id=text),
  'comparisons': dict(
    prompt=prompt,
    responses=st.lists(answer, max_size=4),
    ranks=st.lists(number, max_size=4),
    chosen=answer,
    rejected=answer,
    labeler_id=st.one_of(text, number),
  ),
  'pretrain': dict(text=text, kind=text),
}


def is_record(record, kind):
  """Whether it is what the top of data/sources.py says that a record is."""
  turns = lambda p: (
    isinstance(p, list)
    and len(p) > 0
    and all(
      isinstance(m, dict)
      and m['role'] in ('system', 'user', 'assistant')
      and isinstance(m['content'], str)
      for m in p
    )
  )
  name = lambda x: x is None or isinstance(x, str) or type(x) is int
  if kind == 'pretrain':
    return isinstance(record['text'], str)
  if not (isinstance(record['prompt'], str) or turns(record['prompt'])):
    return False
  if not all(name(record.get(k)) for k in ('user_id', 'labeler_id')):
    return False
  if kind == 'demonstrations':
    return isinstance(record['response'], str)
  if kind == 'comparisons':
    ranks = record['ranks']
    return (
      len(record['responses']) == len(ranks) >= 2
      and all(isinstance(r, str) for r in record['responses'])
      and all(type(r) is int and 0 <= r < 2**31 for r in ranks)
    )
  return True


@pytest.mark.parametrize('kind', KINDS)
@examples
@given(data=st.data(), ascii_only=st.booleans(), pack=st.booleans(), array=st.booleans())
def test_records(folder, kind, data, ascii_only, pack, array):
  found = data.draw(st.lists(rows(KINDS[kind]), min_size=1, max_size=3))
  raw = json.dumps(found, indent=1).encode() if array else as_lines(found, ascii_only)
  path = folder / 'records'
  path.write_bytes(gzip.compress(raw) if pack else raw)
  made = read(lambda: sources.read(f'jsonl:{path}', kind), str(path))
  if made is not None:
    assert (
      len(made) == len(found)
      and all(map(whole, found))
      and all(is_record(record, kind) for record in made)
    )
    for ours, theirs in zip(made, found, strict=True):
      assert {k: v for k, v in ours.items() if k not in ('response', 'responses', 'ranks')} == {
        k: v
        for k, v in theirs.items()
        if k not in ('response', 'responses', 'ranks') and (k in ours)
      }


@examples
@given(
  raw=st.one_of(
    st.binary(max_size=40),
    text.map(lambda t: t.encode('utf-16', 'surrogatepass')),
    text.map(lambda t: t.encode('utf-8', 'surrogatepass')),
    st.binary(max_size=20).map(gzip.compress),
    st.binary(min_size=9, max_size=40).map(lambda b: gzip.compress(b)[:-5]),
  ),
  name=st.sampled_from(['x.jsonl', 'x.json', 'x.csv', 'x.tsv', 'x.txt', 'x.jsonl.gz', 'x.csv.gz']),
)
def test_bytes(folder, raw, name):
  path = folder / name
  path.write_bytes(raw)
  made = read(lambda: textfiles.read(path), str(path))
  if made is not None:
    plain = gzip.decompress(raw) if raw[:2] == b'\x1f\x8b' else raw
    assert made == plain.removeprefix(b'\xef\xbb\xbf').decode()
    pieces = [piece.removesuffix('\r') for piece in made.split('\n')]
    assert textfiles.lines(made) == (pieces if pieces[-1] else pieces[:-1])
  for call in (
    lambda: sources.read(f'jsonl:{path}', 'prompts'),
    lambda: items.read(path, ('prompt',)),
    lambda: loaders.local('sst', str(path), {'sentence': str}),
    lambda: judgments.read(str(path), judge='j'),
    lambda: generate.read_prompts(str(path)),
    lambda: mappings._arguments.__wrapped__(path),
    lambda: metrics.read(path),
    lambda: journal.read(path),
  ):
    read(call, str(path))
    path.write_bytes(raw)  # kept.read cuts off a torn line


@examples
@given(
  cells=st.lists(st.lists(text, max_size=3), max_size=4), name=st.sampled_from(['t.csv', 't.tsv'])
)
def test_tables(folder, cells, name):
  path = folder / name
  path.write_bytes(
    '\n'.join(
      (',' if name == 't.csv' else '\t').join(row) for row in [['prompt', 'x'], *cells]
    ).encode('utf-8', 'surrogatepass')
  )
  made = read(lambda: items.read(path, ('prompt',)), str(path))
  assert made is None or all(
    isinstance(row['prompt'], str) and set(row) <= {'prompt', 'x'} for row in made
  )


names = st.lists(
  st.sampled_from(
    [
      'a',
      'data',
      '.jsonl',
      ';',
      '; ',
      ':',
      '/',
      '//',
      '*',
      '[',
      ']',
      '~',
      '..',
      '.',
      '\\',
      ' ',
      '\0',
      'é',
      '\ud800',
      'train',
      ':train',
      ':train[:5%]',
      '+',
      's3://',
      'jsonl:',
      'hf:',
      'x' * 260,
      '\n',
    ]
  ),
  max_size=6,
).map(''.join)


@examples
@given(
  form=st.sampled_from(['jsonl:', 'text:', 'tfds:', 'hf:', 'sandbox:', '', 'csv:']),
  name=names,
  rest=names,
  kind=st.sampled_from(['prompts', 'pretrain']),
)
def test_sources_by_name(folder, form, name, rest, kind):
  """No name makes a reader hang, ask the network for a folder, or end in a traceback; what is read
  is what has the name."""
  import tensorflow_datasets

  class Library:
    @staticmethod
    def load_dataset(path, config, split):
      assert not path.startswith(('/', '~', '.')) or pathlib.Path(path).is_dir()
      raise ConnectionError('offline\nwith a long tale')

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, 'datasets', Library)
    patch.setattr(tensorflow_datasets, 'builder', Library.load_dataset)
    patch.chdir(folder)
    for file in ('a', 'data.jsonl', 'a;data.jsonl'):
      (folder / file).write_text(json.dumps(dict(prompt=file, text=file)))
    source = f'{form}{name}{rest}'
    made = read(lambda: sources.read(source, kind), f'data.{kind}', *source.split(';'), 'a: ')
    if made is not None:
      assert {
        record['text'].partition('"prompt": "')[2].partition('"')[0] or record['text']
        for record in made
      } <= {'a', 'data.jsonl', 'a;data.jsonl', ''} or form == 'text:'


@examples
@given(
  name=st.one_of(
    text,
    st.lists(
      st.sampled_from(
        [
          'prompt',
          'response',
          '=',
          '=',
          ',',
          ' ',
          'q',
          'from_scores',
          ':',
          'os',
          'module',
          ';',
          'find',
          'apply',
          '_pair',
          '.',
          'hh_rlhf',
        ]
      ),
      max_size=7,
    ).map(''.join),
  ),
  raw=st.dictionaries(
    st.sampled_from(['prompt', 'q', 'response', 'responses', 'scores', 'chosen']), value, max_size=4
  ),
)
def test_mappings_by_name(name, raw):
  change = read(lambda: mappings.find(name, 'data.mapping.prompts'), 'data.mapping.prompts')
  if change is not None and 'os' not in name:
    made = read(lambda: sources.convert(raw, 'prompts', 'f, line 1', change), 'f, line 1')
    assert made is None or all(is_record(record, 'prompts') for record in made)


PUBLISHED = sorted(
  k
  for k in vars(mappings)
  if k not in ('find', 'rename', 'apply')
  and not k.startswith('_')
  and getattr(vars(mappings)[k], '__module__', '') == mappings.__name__
  and callable(vars(mappings)[k])
)
FIELDS = (
  'prompt',
  'chosen',
  'rejected',
  'responses',
  'scores',
  'info',
  'summaries',
  'choice',
  'worker',
  'history',
  'human_ref_A',
  'human_ref_B',
  'labels',
  'instruction',
  'completions',
  'question',
  'preference',
  'input',
  'response1',
  'response2',
  'annotator1',
  'annotator2',
  'annotator3',
  'output',
  'context',
  'response',
  'category',
  'instances',
  'name',
  'completion',
  'turns',
  'title',
  'stance',
  'text',
  'subreddit',
  'post',
  'summary',
  'prediction 1',
)


@examples
@given(
  name=st.sampled_from(PUBLISHED),
  raw=st.dictionaries(st.sampled_from(FIELDS), st.one_of(value, text, messages), max_size=6),
  kind=st.sampled_from(sorted(KINDS)),
)
def test_published_mappings(folder, name, raw, kind):
  change = mappings.find(name, 'mapping')
  change = (lambda raw: mappings.ukp_convarg(raw, folder)) if name == 'ukp_convarg' else change
  made = read(lambda: sources.convert(raw, kind, 'f, line 1', change), 'f, line 1')
  assert made is None or all(is_record(record, kind) for record in made)


policy = st.one_of(st.sampled_from(['x', 'y', 'z']), text)
flags = st.one_of(
  st.lists(st.sampled_from(sorted(FLAGS)), max_size=2),
  st.dictionaries(text, st.booleans(), max_size=2),
)
JUDGMENT = dict(
  prompt_id=st.one_of(text, number),
  prompt=prompt,
  a=policy,
  b=policy,
  labeler_id=st.one_of(text, number),
  choice=st.one_of(st.sampled_from(['a', 'b', 'tie', 1, 2]), number),
  response_a=text,
  policy=policy,
  likert=number,
  flags=flags,
  ranking=st.dictionaries(policy, number, max_size=4),
  ranks=st.lists(number, max_size=3),
  policies=st.lists(policy, max_size=3),
  item=number,
  likert_1=number,
  responses=st.one_of(st.lists(text, max_size=3), st.dictionaries(policy, text, max_size=3)),
)
ALONE = [
  ('a', 'b', 'choice', 'prompt_id', 'labeler_id', 'response_a', 'prompt'),
  ('policy', 'prompt_id', 'likert', 'flags'),
  ('ranking', 'prompt_id', 'responses', 'labeler_id'),
  ('ranks', 'policies', 'responses', 'prompt'),
  ('item', 'choice', 'likert_1'),
  tuple(JUDGMENT),
]
KEY = {'0': {'prompt_id': 'q', '1': 'x', '2': 'y'}, '1': {'prompt_id': 'q', '1': 'y', '2': 'z'}}


@examples
@given(data=st.data(), key=st.one_of(value, st.just(KEY)))
def test_judgments(folder, data, key):
  row = st.sampled_from(ALONE).flatmap(lambda some: rows({k: JUDGMENT[k] for k in some}))
  found = data.draw(st.lists(row, min_size=1, max_size=3))
  path = folder / 'sheet.jsonl'
  path.write_bytes(as_lines(found, True))
  (folder / 'sheet.key.json').write_text(json.dumps(key))
  made = read(lambda: judgments.read(str(path), judge='j'), str(path), 'sheet.key.json')
  if made is not None:
    assert all(map(whole, found)) and made.verdicts
    for v in made.verdicts:
      assert (
        isinstance(v.prompt_id, str)
        and isinstance(v.a, str)
        and isinstance(v.b, str)
        and v.a != v.b
        and 0 <= v.p <= 1
      )
      assert isinstance(v.labeler, str) and v.labeler
    assert all(isinstance(t, str) for t in made.texts.values())
    assert all(r.likert is None or 1 <= r.likert <= 7 for r in made.ratings)


sayable = text.filter(whole)


@examples
@given(
  said=st.lists(st.tuples(sayable, sayable), min_size=1, max_size=4),
  chosen=st.sampled_from([1, 2, 'tie']),
  seed=st.integers(0, 9),
)
def test_sheets_come_back(folder, said, chosen, seed):
  for name in ('s.jsonl', 's.key.json'):
    (folder / name).unlink(missing_ok=True)
  pairs = [
    verdicts.Pair(dict(prompt=f'{a}{b}', prompt_id=f'q{i}'), 'x', 'y', Response(a), Response(b))
    for i, (a, b) in enumerate(said)
  ]
  judgments.export(pairs, folder / 's.jsonl', seed)
  filled = [
    json.loads(line) | dict(choice=chosen)
    for line in (folder / 's.jsonl').read_text().split('\n')[:-1]
  ]
  (folder / 's.jsonl').write_bytes(as_lines(filled, False))
  back = judgments.read(str(folder / 's.jsonl'), judge='j')
  assert back.texts == {
    (f'q{i}', n): t for i, both in enumerate(said) for n, t in zip('xy', both, strict=True)
  }
  key = json.loads((folder / 's.key.json').read_text()).values()
  p = {1: 1.0, 2: 0.0, 'tie': 0.5}[chosen]
  assert {(v.prompt_id, v.a): v.p for v in back.verdicts} == {
    (k['prompt_id'], k['1']): p for k in key
  }


@examples
@given(
  lines=st.lists(st.one_of(text, messages.map(json.dumps)), max_size=4),
  end=st.sampled_from(['\n', '\r\n']),
)
def test_prompts_files(folder, lines, end):
  path = folder / 'p.txt'
  path.write_bytes(end.join(lines).encode('utf-8', 'surrogatepass'))
  made = read(lambda: generate.read_prompts(str(path)), str(path))
  if made is not None:
    expected = [line for line in end.join(lines).removeprefix('\ufeff').split('\n')]
    assert len(made) == sum(bool(line.strip()) for line in expected) and all(
      is_record(dict(prompt=p), 'prompts') for p in made
    )


@examples
@given(
  flag=st.one_of(
    text,
    st.lists(st.sampled_from(['a', '=', ',', 'b', 'hf:x', ' ', '/y', ':']), max_size=8).map(
      ''.join
    ),
  )
)
def test_pairs_of_flags(flag):
  made = read(lambda: command.pairs(flag, '--models'), '--models')
  assert made is None or ','.join(f'{k}={v}' for k, v in made.items()) == ','.join(
    filter(None, flag.split(','))
  )


@pytest.fixture(scope='module')
def tokenizer():
  from alignjax.setup.texts import load_tokenizer

  return load_tokenizer(str(pathlib.Path(__file__).parent / 'golden' / 'chat'))


@pytest.mark.parametrize('form', ['chat', 'plain', 'dialogue', 'Q: {prompt}'])
@examples
@given(record=st.fixed_dictionaries({'prompt': prompt, 'response': answer}))
def test_conversations(tokenizer, form, record):
  """Roles in any order, empty contents, a system turn in the middle: tokens of the vocabulary, or
  an error."""
  from alignjax.data import templates

  template = templates.make(tokenizer, form)
  checked = (
    read(lambda: fields.check(record, 'demonstrations', 'f, line 1'), 'f, line 1')
    if whole(record)
    else None
  )
  if checked is not None:
    asked = read(lambda: template.prompt(checked['prompt']), 'template')
    said = template.response(checked['response'])
    assert said[-1] == template.end and all(
      0 <= t < len(tokenizer) for t in [*(asked or ()), *said]
    )


def test_the_environment_decides_how_many():
  assert examples.max_examples == (
    int(os.environ['ALIGNJAX_EXAMPLES']) if 'ALIGNJAX_EXAMPLES' in os.environ else 25
  )
