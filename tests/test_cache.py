"""Encoded records in memory and on a disk: the same rows, whole or made again."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys

import conftest
import jax
import numpy as np
import pytest

from alignjax import train
from alignjax.configs import pythia_1b_hh
from alignjax.data import batches, cache, encode, fields, mappings, sources
from alignjax.runtime import fingerprints, textfiles
from alignjax.setup import encoded, encoders, inputs
from alignjax.setup import records as lists
from alignjax.setup.objects import make_setup
from alignjax.stages import pretrain, rm, sft

CHAT = pathlib.Path(__file__).parent / 'golden' / 'chat'
RANDOM = np.random.default_rng(5)
KINDS = ('demonstrations', 'comparisons', 'prompts')
WHERE = ('memory', 'disk')


def word(most):
  return ''.join(RANDOM.choice(list('abcdefg'), RANDOM.integers(1, most)).tolist())


def write(path, records):
  path.write_text('\n'.join(map(json.dumps, records)) + '\n')
  return f'jsonl:{path}'


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  """A recipe on 300 records of each kind, some of them too long, some of them ties."""
  folder = tmp_path_factory.mktemp('records')
  c = pythia_1b_hh.get_config()
  c.checkpoint, c.data.template, c.data.too_long = f'hf:{CHAT}', 'plain', 'drop'
  c.model.update(dtype='float32', remat='none', max_length=64)
  c.data.update(prompt_length=24, response_length=12, row_length=16)
  c.data.heldout.share = 0.1
  names = [f'{i} {word(26)}' for i in range(300)]
  made = dict(
    pretrain=[dict(text=' ' if i % 50 == 7 else word(30)) for i in range(300)],
    demonstrations=[dict(prompt=name, response=word(14)) for name in names],
    comparisons=[
      dict(
        prompt=name,
        responses=[word(14) for _ in range(2 + i % 3)],
        ranks=RANDOM.integers(0, 3, 2 + i % 3).tolist(),
        response='no field of a comparison',
      )
      for i, name in enumerate(names)
    ],
    prompts=[dict(prompt=name) for name in names],
  )
  for kind, rows in made.items():
    c.data[kind], c.data.mapping[kind] = write(folder / f'{kind}.jsonl', rows), None
  s = c.stages
  s.sft.update(demonstrations=200, documents=300, batch_size=8, pretrain_mix=0.25)
  s.rm.update(prompts=250, evaluation_prompts=10, bias_demonstrations=20, responses_per_batch=32)
  s.rm.k_buckets, s.rm.row_lengths, s.rm.init.reward = (3, 4), (30,), c.checkpoint
  s.pretrain = dict(
    s.sft.to_dict(), build='alignjax.stages.pretrain:build', init=dict(policy=c.checkpoint)
  )
  return c


@pytest.fixture
def setup(config, tmp_path, request, monkeypatch):
  """A setup whose sources are read in several blocks, and kept in memory or on the disk."""
  c = config.copy_and_resolve_references()
  c.data_cache = str(tmp_path / 'cache')
  monkeypatch.setattr(textfiles, 'PIECE', 1500)
  if getattr(request, 'param', 'disk') == 'disk':
    monkeypatch.setattr(cache, 'SMALL', 2000)
  monkeypatch.setattr(encoders, 'parts', here)
  return make_setup(c, tmp_path / 'run', jax.devices()[:1])


def here(task, blocks):
  """encoders.parts without other processes, each of which takes seconds to start."""
  template = encoders.texts.of_config(encoders.ml_collections.ConfigDict(task.config)).template
  encode_block = encoders.encoder(task, template)
  return ((block, encode_block(block)) for block in blocks)


def on_disk(setup):
  return sorted(p.parent.name for p in encoded.folder(setup).glob('*/rows.json'))


def responses(record):
  return record.get('responses') or ([record['response']] if 'response' in record else [])


@pytest.mark.parametrize('setup', WHERE, indirect=True)
@pytest.mark.parametrize('too_long', ['drop', 'truncate'])
@pytest.mark.parametrize('count', [None, 100])
def test_rows_by_index_are_those_of_lists(setup, too_long, count, capsys):
  """Records as lists, of which each is encoded when it is needed, are the reference."""
  setup.config.data.too_long = too_long
  for kind in KINDS:
    found = lists.records(setup, kind, count)
    said = {
      'demonstrations': lambda r: [r['response']],
      'comparisons': lambda r: r['responses'],
      'prompts': lambda r: [],
    }[kind]
    expected = lists.encoded(setup, kind, found, said)
    note = capsys.readouterr().out
    made = encoded.chosen(setup, kind, count)
    assert capsys.readouterr().out == note != '', kind
    assert list(made) == expected.rows and 20 < len(made) < len(found) + (too_long == 'truncate')
    assert [made.record(i)['prompt'] for i in range(len(made))] == [
      found[i]['prompt'] for i in expected.index
    ]
    sizes = made.sizes()
    assert sizes.longest.tolist() == [
      len(p) + max(map(len, answers), default=0) for p, answers in expected.rows
    ]
    if kind == 'comparisons':
      ranks = [
        fields.dense_ranks([found[i]['ranks'][j] for j in kept])
        for i, kept in zip(expected.index, expected.kept, strict=True)
      ]
      assert [made.ranks(i) for i in range(len(made))] == ranks
      assert sizes.tied.tolist() == [len(set(own)) < 2 for own in ranks] and sizes.tied.any()
      assert sizes.stay.tolist() == [len(answers) for _, answers in expected.rows]
  assert len(on_disk(setup)) in (0, 3) and bool(on_disk(setup)) == (cache.SMALL == 2000)


@pytest.mark.parametrize('setup', WHERE, indirect=True)
@pytest.mark.parametrize('pack', [False, True])
def test_rows_of_text_are_those_of_lists(setup, pack):
  setup.config.data.pack = pack
  for count in (None, 120):
    template = setup.text.template
    texts = [r['text'] for r in lists.records(setup, 'pretrain', count) if r['text'].strip()]
    tokens = list(map(template.document, texts))
    expected = (
      conftest.packed([(t, [1.0] * len(t)) for t in tokens], 16, template.pad)
      if pack
      else encode.full_rows(np.resize(np.concatenate(tokens), (len(sum(tokens, [])) // 16, 16)))
    )
    number, to_rows = encoded.documents(setup, count)
    made = to_rows(np.arange(number), None)
    order = np.random.default_rng(0).permutation(made.count)
    jax.tree.map(np.testing.assert_array_equal, made.take(order), batches.take(expected, order))
    assert made.count == len(expected.tokens) > 50


@pytest.mark.parametrize('setup', WHERE, indirect=True)
def test_what_is_wrong_is_the_same_error(setup, tmp_path):
  setup.config.data.too_long = 'error'
  for kind in KINDS:
    found = lists.records(setup, kind, None)
    with pytest.raises(ValueError) as expected:
      lists.encoded(setup, kind, found, responses if kind != 'prompts' else lambda r: [])
    with pytest.raises(ValueError) as error:
      encoded.chosen(setup, kind, None)
    assert str(error.value) == str(expected.value) and 'jsonl, line ' in str(error.value)
  rows = [dict(prompt=f'{i}', response='a') for i in range(300)]
  setup.config.data.demonstrations = write(tmp_path / 'bad.jsonl', [*rows, dict(prompt=3)])
  with pytest.raises(ValueError, match='bad.jsonl, line 301.*field'):
    encoded.chosen(setup, 'demonstrations', None)
  assert not list(tmp_path.glob('cache/*/*.partial'))


def test_other_processes_encode_the_same_and_name_the_line(setup, monkeypatch, tmp_path):
  rows = [dict(prompt=f'{i}', responses=[word(9), word(9)], ranks=[i % 2, 1]) for i in range(150)]
  source = write(tmp_path / 'bad.jsonl', [*rows, dict(prompt=3)])
  setup.config.data.comparisons = source
  task = encoders.Task(
    dict(data=setup.config.data.to_dict(), world=setup.config.world.to_dict()), 'comparisons'
  )
  blocks = list(sources.blocks(source, 'comparisons'))
  expected = [part for _, part in here(task, blocks[:-1])]
  monkeypatch.undo()
  monkeypatch.setattr(encoders, 'MOST', 2)
  made = encoders.parts(task, iter(blocks))
  for wanted in expected:
    block, part = next(made)
    assert block.share < 1 and part.keys() == wanted.keys()
    for name in part:
      np.testing.assert_array_equal(part[name], wanted[name])
  with pytest.raises(ValueError, match='bad.jsonl, line 151.*field'):
    next(made)
  assert len(expected) > 3


def test_batches_are_a_function_of_the_step(setup, monkeypatch):
  """From memory, from a cache that is made, and from one that was there, as after a restart, which
  begins at any step."""

  def made(steps):
    again = make_setup(setup.config, setup.workdir, jax.devices()[:1])
    stages = dict(sft=sft, rm=rm, pretrain=pretrain)
    return {
      name: [jax.tree.map(np.asarray, stage.build(again, name).batch(i)) for i in steps]
      for name, stage in stages.items()
    }

  cold = made([0, 1, 2, 3])
  assert len(on_disk(setup)) == 3
  monkeypatch.setattr(encoders, 'parts', None)
  monkeypatch.setattr(encoders.rows, 'part', None)
  warm = made([3])
  monkeypatch.undo()
  setup.config.data_cache = '/proc/no/such/folder'
  held = made([0, 1, 2, 3])
  jax.tree.map(np.testing.assert_array_equal, cold, held)
  jax.tree.map(np.testing.assert_array_equal, warm, {n: [b[3]] for n, b in held.items()})


def test_the_order_is_that_of_numpy_from_any_step():
  """Two epochs and a half of 7 rows, in batches of 3 and of 10, in any order of the steps."""
  whole = [np.random.default_rng([4, 2, epoch]).permutation(7) for epoch in range(9)]
  for size in (3, 10):
    stream = np.concatenate(whole)
    order = batches.ordered(7, size, (4, 2))
    for step in (5, 0, 2, 1, 5, 3, 2):
      assert order(step).tolist() == stream[step * size :][:size].tolist()
  many = np.random.default_rng([1, 0]).permutation(100_003)
  assert (batches.ordered(100_003, 100_003, (1,))(0) == many).all()


def bucketed_by_lists(kinds, size, seed):
  """batches.bucketed with a list for each shape."""
  rng = np.random.default_rng(list(seed))
  rows = {kind: [] for kind in sorted(set(kinds))}
  for i in rng.permutation(len(kinds)).tolist():
    rows[kinds[i]].append(i)
  out = []
  for kind, own in rows.items():
    full = len(own) // size * size
    out += [(kind, own[i : i + size]) for i in range(0, full, size)]
    larger = [k for k in rows if k > kind and all(a >= b for a, b in zip(k, kind, strict=True))]
    if larger:
      rows[larger[0]] += own[full:]
    elif own[full:]:
      out.append((kind, own[full:]))
  return [out[i] for i in rng.permutation(len(out))]


@pytest.mark.parametrize('seed', range(4))
def test_buckets_are_those_of_lists(seed):
  rng = np.random.default_rng(seed)
  kinds = [tuple(k) for k in rng.choice([2, 5, 9], (rng.integers(1, 90), 2)).tolist()]
  made = batches.bucketed(kinds, 4, (seed, 1))
  assert [(k, r.tolist()) for k, r in made] == bucketed_by_lists(kinds, 4, (seed, 1))


# ---- what decides a key


def test_what_decides_the_rows_is_in_the_key(setup, tmp_path):
  def keys():
    again = make_setup(setup.config, setup.workdir, jax.devices()[:1])
    return {kind: encoded.key_of(again, kind, {}, '') for kind in ('pretrain', *KINDS)}

  c, seen = setup.config, [keys()]
  assert len(set(seen[0].values())) == 4

  def changed(*kinds):
    now = keys()
    assert {kind for kind in now if now[kind] != seen[-1][kind]} == set(kinds)
    assert not {now[kind] for kind in kinds} & {key for old in seen for key in old.values()}
    seen.append(now)

  c.seed, c.data.too_long, c.data.prompt_length, c.data.heldout.share = 9, 'error', 30, 0.5
  c.stages.sft.update(batch_size=4, demonstrations=7)
  changed()  # What a stage takes of the rows is decided at each start.
  path = pathlib.Path(c.data.prompts.removeprefix('jsonl:'))
  shutil.copy(path, tmp_path / 'prompts.jsonl')
  c.data.prompts = f'jsonl:{tmp_path}/prompts.jsonl'
  changed('prompts')
  text = (tmp_path / 'prompts.jsonl').read_text()
  (tmp_path / 'prompts.jsonl').write_text(text.replace('a', 'b', 1))
  changed('prompts')
  c.data.mapping.prompts = 'prompt=prompt'
  changed('prompts')
  c.data.template = 'dialogue'
  changed('pretrain', *KINDS)
  c.data.heldout.seed = 1
  changed('pretrain', *KINDS)
  shutil.copytree(CHAT, tmp_path / 'checkpoint')
  c.data.tokenizer = f'hf:{tmp_path}/checkpoint'
  changed('pretrain', *KINDS)
  spec = json.loads((tmp_path / 'checkpoint' / 'tokenizer.json').read_text())
  spec['added_tokens'][0]['lstrip'] = not spec['added_tokens'][0]['lstrip']
  (tmp_path / 'checkpoint' / 'tokenizer.json').write_text(json.dumps(spec))
  changed('pretrain', *KINDS)


def test_a_users_mapping_is_in_the_key(setup, tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  source = 'def change(raw):\n  return [dict(prompt=raw["prompt"] + "{}")]\n'
  (tmp_path / 'a_users_mapping.py').write_text(source.format('x'))
  setup.config.data.mapping.prompts = 'a_users_mapping:change'
  before = encoded.key_of(setup, 'prompts', {}, '')
  (tmp_path / 'a_users_mapping.py').write_text(source.format('yy'))
  assert encoded.key_of(setup, 'prompts', {}, '') != before
  assert mappings.find('a_users_mapping:change', 'here') is not None


def test_a_source_that_changes_while_it_is_read_is_not_kept(setup, monkeypatch):
  keys = iter(['before', 'after'])
  monkeypatch.setattr(encoded, 'key_of', lambda *_: next(keys))
  with pytest.raises(inputs.ChangedInput, match='data.prompts=.* changed while it was read'):
    encoded.chosen(setup, 'prompts', None)
  assert not on_disk(setup)


# ---- files that are not whole


@pytest.mark.parametrize('name', ['tokens', 'piece_ends', 'row_ends', 'texts', 'held', 'ranks'])
def test_a_flipped_byte_is_noticed_and_named_and_made_again(setup, name, capsys):
  expected = list(encoded.chosen(setup, 'comparisons', None))
  (path,) = encoded.folder(setup).glob(f'*/{name}')
  raw = bytearray(path.read_bytes())
  raw[17] ^= 4
  path.write_bytes(raw)
  with pytest.raises(cache.Damaged, match=f'{path} is damaged .* the next start makes again'):
    made = encoded.chosen(setup, 'comparisons', None)
    made.record(0), made.ranks(0), list(made)
  assert not on_disk(setup)
  again = encoded.chosen(setup, 'comparisons', None)
  assert list(again) == expected and again.record(0) and len(on_disk(setup)) == 1


@pytest.mark.parametrize('name', ['tokens', 'held', 'rows.json'])
@pytest.mark.parametrize('how', ['cut', 'removed', 'its sums', 'empty'])
def test_what_is_not_whole_is_made_again(setup, name, how, capsys):
  expected = list(encoded.chosen(setup, 'prompts', None))
  (path,) = encoded.folder(setup).glob(f'*/{name}')
  raw = path.read_bytes()
  if how == 'removed':
    path.unlink()
  else:
    changed = {'cut': raw[:-1], 'its sums': raw[:-3] + b'?' + raw[-2:], 'empty': b''}[how]
    path.write_bytes(changed)
  capsys.readouterr()
  assert list(encoded.chosen(setup, 'prompts', None)) == expected
  said = capsys.readouterr().err
  assert (
    'the records are encoded again' in said
    and path.name in said
    or ((name, how) == ('rows.json', 'removed'))
  )
  assert path.read_bytes() == raw and len(on_disk(setup)) == 1


def test_a_full_disk_names_the_file_and_the_entry(setup, monkeypatch):
  key = encoded.key_of(setup, 'prompts', {}, '')
  folder = encoded.folder(setup) / key
  folder.mkdir(parents=True)
  (folder / 'tokens.partial').symlink_to('/dev/full')
  words = f'No space left on device.*data_cache=FOLDER.*{folder}/tokens.partial'
  with pytest.raises(OSError, match=words):
    encoded.chosen(setup, 'prompts', None)
  assert not on_disk(setup) and not list(folder.glob('*.partial'))
  assert len(encoded.chosen(setup, 'prompts', None)) > 100


def test_a_folder_that_cannot_be_made_names_the_entry(setup):
  setup.config.data_cache = '/proc/no'
  with pytest.raises(OSError, match='data_cache=FOLDER'):
    encoded.chosen(setup, 'prompts', None)
  setup.config.data_cache = 'gs://a/b'
  with pytest.raises(ValueError, match="data_cache='gs://a/b' must be a folder on a disk"):
    encoded.chosen(setup, 'prompts', None)


# ---- several processes

MAKER = """
import pathlib
import sys
from alignjax.data import cache

cache.SMALL = 10
calls = 0


def make(large):
  global calls
  for i in range(100):
    calls += 1
    yield dict(tokens=[i, i + 1, i + 2], piece_ends=[1, 2], row_ends=[2])
    if i == 50 and large() and 'stop' in sys.argv:
      print('half', flush=True)
      sys.stdin.readline()


rows = cache.kept(pathlib.Path(sys.argv[1]), 'key', 'the records', make)
same = [rows.pieces(i) == [[i], [i + 1, i + 2]] for i in range(len(rows))]
print(calls, same == [True] * 100)
"""


def maker(folder, *args):
  return subprocess.Popen(
    [sys.executable, '-c', MAKER, str(folder), *args],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def test_one_process_makes_the_rows_and_another_waits(tmp_path):
  first = maker(tmp_path, 'stop')
  assert first.stdout.readline() == 'half\n'
  second = maker(tmp_path)
  assert second.stdout.readline().startswith('the records: waits for the process that encodes it')
  assert not (tmp_path / 'key' / 'rows.json').exists()
  assert first.communicate('\n')[0] == '100 True\n'
  assert second.communicate()[0] == '1 True\n', 'it made one part, which was large'


def test_a_killed_process_leaves_nothing_that_is_read(tmp_path):
  first = maker(tmp_path, 'stop')
  assert first.stdout.readline() == 'half\n'
  second = maker(tmp_path)
  assert 'waits' in second.stdout.readline()
  first.kill()
  first.communicate()
  assert first.returncode == -signal.SIGKILL
  assert second.communicate()[0] == '100 True\n'
  assert sorted(p.name for p in (tmp_path / 'key').iterdir()) == sorted(
    [*cache.COLUMNS, 'rows.json']
  )
  assert maker(tmp_path).communicate()[0] == '0 True\n'
  assert fingerprints.known(tmp_path) == {}


# ---- what a user sees


def test_how_far_it_is_is_shown(setup, monkeypatch, capsys):
  monkeypatch.setattr(encoded, 'EVERY', -1.0)
  encoded.chosen(setup, 'prompts', None)
  lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith('data.prompts: ')]
  assert len(lines) > 3 and '300 records are encoded, 100%' in lines[-1]


def test_where_the_cache_is_decides_no_number(setup):
  before = train.identity(setup.config, 'sft')
  setup.config.data_cache = None
  assert train.identity(setup.config, 'sft') == before
