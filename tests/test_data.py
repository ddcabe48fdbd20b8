"""Records in, rows out, in an order that depends on nothing but the seed and the step."""

import gzip
import json
import operator
import types

import conftest
import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses, ops
from alignjax.data import batches, cache, encode, sources, text
from alignjax.data import rows as encoded_rows
from alignjax.types import TokenBatch


def test_item_3_demonstrations_weigh_the_response_and_its_end():
  # pad == end
  batch = encode.demonstrations([([9, 5, 6, 8], [7, 1]), ([9, 4, 8], [3, 2, 1])], 7, pad=1)
  assert batch.tokens.tolist() == [[9, 5, 6, 8, 7, 1, 1], [9, 4, 8, 3, 2, 1, 1]]
  assert batch.weights.tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 0]]
  assert batch.mask.sum(1).tolist() == [6, 6]
  with_prompt = encode.demonstrations([([9, 5, 6, 8], [7, 1])], 7, 1, prompt_weight=0.5)
  assert with_prompt.weights.tolist() == [[0, 0.5, 0.5, 0.5, 1, 1, 0]]


def test_documents_fill_rows():
  found = documents(['23', '456'], 1)
  rows = text.rows_of(found, np.arange(2), 3, 0, False)
  batch = rows.take(np.arange(rows.count))
  assert (
    batch.tokens.tolist() == [[1, 2, 3], [1, 4, 5]] and batch.weights.tolist() == [[0, 1, 1]] * 2
  )
  with pytest.raises(ValueError, match='row_length=9'):
    text.rows_of(found, np.arange(1), 9, 0, False)


def test_comparisons_keep_absent_ones_apart():
  batch = encode.comparisons(
    [[9, 5, 8], [9, 6, 8]], [[[7, 1], [2]], [[3], [4], [2, 2]]], [[1, 0], [0, 0, 2]], 6, 3, pad=1
  )
  assert batch.ranks.tolist() == [[1, 0, -1], [0, 0, 2]]
  assert batch.tokens[0, 0].tolist() == [9, 5, 8, 7, 1, 1] and batch.mask[0, 0].sum() == 5
  assert not batch.mask[0, 2].any()
  with pytest.raises(ValueError, match='comparison 0 has 2 responses'):
    encode.comparisons([[5]], [[[7], [2]]], [[1, 0]], 6, 1, 1)


def test_preferences_are_comparisons_that_know_their_responses():
  arguments = ([[9, 5, 8], [9]], [[[7, 1], [2]], [[3, 3], [4]]], [[1, 0], [0, 1]], 6, 3, 0)
  batch, plain = encode.preferences(*arguments), encode.comparisons(*arguments)
  for name in ('tokens', 'mask', 'ranks', 'weights'):
    np.testing.assert_array_equal(getattr(batch, name), getattr(plain, name))
  assert batch.response_mask.astype(int).tolist() == [
    [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0], [0] * 6],
    [[0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0] * 6],
  ]


def test_too_long_is_an_error():
  with pytest.raises(ValueError, match='prompt 1 has 5 tokens.*data.prompt_length'):
    encode.left_pad([[1], [1] * 5], 4, 0)
  tokens, mask = encode.left_pad([[5], [6, 7]], 3, 0)
  assert tokens.tolist() == [[0, 0, 5], [0, 6, 7]] and mask.sum(1).tolist() == [1, 2]


@pytest.mark.parametrize('count,size', [(10, 3), (7, 7), (5, 8), (64, 16)])
def test_item_23_the_order_is_a_function_of_seed_and_step(count, size):
  stream = np.concatenate([batches.ordered(count, size, (0, 1))(step) for step in range(30)])
  for epoch in range(len(stream) // count):  # every row once an epoch, across batch borders too
    assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
  assert (batches.ordered(count, size, (0, 1))(3) == stream[3 * size : 4 * size]).all()
  if count > 8:
    assert (stream[:count] != stream[count : 2 * count]).any()
    assert (
      batches.ordered(count, size, (0, 1))(0) != batches.ordered(count, size, (1, 1))(0)
    ).any()


@pytest.mark.parametrize('seed', range(3))
def test_buckets_hold_every_row_once_in_batches_of_one_size(seed):
  """5, 3, 1 and 2 rows of four shapes, in fours: what is left over moves to a shape with room for
  it; one batch alone is short."""
  kinds = [(2, 8)] * 5 + [(2, 16)] * 3 + [(4, 8)] + [(4, 16)] * 2
  made = batches.bucketed(kinds, 4, (seed,))
  assert sorted(np.concatenate([rows for _, rows in made])) == list(range(11))
  assert sorted(len(rows) for _, rows in made) == [3, 4, 4]
  for shape, rows in made:
    assert all(kinds[i][0] <= shape[0] and kinds[i][1] <= shape[1] for i in rows)
    assert len(rows) == 4 or shape == (4, 16)
  apart = batches.bucketed([(2, 16), (4, 8)], 4, (seed,))  # neither has room for the other
  assert sorted((shape, rows.tolist()) for shape, rows in apart) == [((2, 16), [0]), ((4, 8), [1])]


def test_a_short_batch_is_filled_with_weight_0():
  filled = batches.fill(encode.comparisons([[5]], [[[7], [2]]], [[1, 0]], 6, 2, 1), 3)
  assert filled.weights.tolist() == [1, 0, 0] and filled.tokens.shape == (3, 2, 6)
  with pytest.raises(ValueError, match='no rows'):
    batches.ordered(0, 1, (0,))


def test_a_draw_is_by_the_seed_and_keeps_the_order():
  """Of a sorted file the first 10 of 100 would all be of its first tenth."""
  drawn = [batches.draw(range(100), 10, (seed,)) for seed in range(20)]
  assert all(d == sorted(set(d)) and len(d) == 10 for d in drawn) and drawn[0] == batches.draw(
    range(100), 10, (0,)
  )
  assert np.mean(drawn) == pytest.approx(49.5, abs=6) and len({tuple(d) for d in drawn}) == 20
  assert batches.draw('abc', 5, (0,)) == batches.draw('abc', None, (0,)) == ['a', 'b', 'c']


GOOD = {
  'demonstrations': {'prompt': 'a', 'response': 'b'},
  'comparisons': {'prompt': 'a', 'responses': ['b', 'c'], 'ranks': [0, 1]},
  'prompts': {'prompt': 'a', 'user_id': 'u'},
  'pretrain': {'text': 'a', 'kind': 'book'},
}


@pytest.mark.parametrize('kind', GOOD)
@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz'])
def test_records_are_read(tmp_path, kind, suffix):
  path = tmp_path / f'x{suffix}'
  text = json.dumps(GOOD[kind]) + '\n\n' + json.dumps(GOOD[kind]) + '\n'
  path.write_bytes(gzip.compress(text.encode()) if suffix.endswith('gz') else text.encode())
  assert sources.read(f'jsonl:{path}', kind) == [GOOD[kind]] * 2
  places = [sources.place(r, 'x') for r in sources.read(f'jsonl:{path}', kind)]
  assert places == [f'{path}, line 1', f'{path}, line 3'] and sources.place({}, 'x') == 'x'


@pytest.mark.parametrize(
  'kind,line,words',
  [
    ('prompts', '{"prompt": "a"', 'line 2: not JSON'),
    ('prompts', '["a"]', 'line 2: a record must be an object'),
    ('demonstrations', '{"prompt": "a"}', "line 2: field 'response' is missing"),
    (
      'demonstrations',
      '{"prompt": 3, "response": "b"}',
      "field 'prompt' must be str or list, not int",
    ),
    ('comparisons', '{"prompt": "a", "responses": ["b"], "ranks": [0]}', 'at least two'),
    (
      'comparisons',
      '{"prompt": "a", "responses": ["b", "c"], "ranks": [0]}',
      '2 responses, but 1 ranks',
    ),
    ('comparisons', '{"prompt": "a", "responses": ["b", 3], "ranks": [0, 1]}', 'must be a string'),
    (
      'comparisons',
      '{"prompt": "a", "responses": ["b", "c"], "ranks": [0, -1]}',
      'integers from 0',
    ),
    (
      'comparisons',
      '{"prompt": "a", "responses": ["b", "c"], "ranks": [0, 0.5]}',
      'integers from 0',
    ),
  ],
)
def test_broken_lines_are_named(tmp_path, kind, line, words):
  path = tmp_path / 'data.jsonl'
  path.write_text(json.dumps(GOOD[kind]) + '\n' + line + '\n')
  with pytest.raises(ValueError, match=words) as error:
    sources.read(f'jsonl:{path}', kind)
  assert 'data.jsonl' in str(error.value)


def test_no_file_and_no_records(tmp_path):
  with pytest.raises(FileNotFoundError, match='no such file'):
    sources.read(f'jsonl:{tmp_path}/x.jsonl', 'prompts')
  (tmp_path / 'three.jsonl').write_text('{"prompt": "a"}\n{"prompt": "b"}\nbroken')
  assert [
    r['prompt'] for r in sources.read(f'jsonl:{tmp_path}/three.jsonl', 'prompts', most=2)
  ] == ['a', 'b']
  (tmp_path / 'empty.jsonl').write_text('\n')
  with pytest.raises(ValueError, match='no records'):
    sources.read(f'jsonl:{tmp_path}/empty.jsonl', 'prompts')


def test_a_pattern_names_files_and_a_file_of_that_name_is_itself(tmp_path):
  for name in ('a.txt', 'ab.txt', 'b*.txt', 'bc.txt'):
    (tmp_path / name).write_text(f'text of {name}')
  (tmp_path / 'ac.txt').mkdir()
  read = lambda name: [r['text'] for r in sources.read(f'text:{tmp_path}/{name}', 'pretrain')]
  assert read('a*.txt') == ['text of a.txt', 'text of ab.txt']
  assert read('b*.txt') == ['text of b*.txt']


def test_a_row_of_other_peoples_tfds_data_is_left_as_it_is(monkeypatch):
  """An empty text stands for an absent entry in rows that prepare.py stored, and only there."""
  import tensorflow_datasets as tfds

  rows = [{'prompt': b'a', 'user_id': b''}]
  features = tfds.features.FeaturesDict({k: tfds.features.Text() for k in rows[0]})
  builder = types.SimpleNamespace(
    download_and_prepare=lambda: None,
    as_data_source=lambda split: rows,
    info=types.SimpleNamespace(features=features),
  )
  monkeypatch.setattr(tfds, 'builder', lambda name, file_format: builder)
  assert sources.read('tfds:theirs:train', 'prompts') == [{'prompt': 'a', 'user_id': ''}]


@pytest.mark.parametrize(
  'documents,rows,expected',
  [(100, 64, 1), (512, 64, 2), (40_000, 256, 64), (10**6, 6, 2), (10**6, 7, 1)],
)
def test_documents_are_dealt_to_a_power_of_two(documents, rows, expected):
  assert text.shards(documents, rows) == expected


def documents(texts, first):
  """Texts of digits as encoded records."""
  template = types.SimpleNamespace(document=lambda t: [first, *map(int, t)])
  return cache.in_memory(
    encoded_rows.part([[dict(text=t)] for t in texts], 'pretrain', template, 0)
  )


@pytest.mark.parametrize('pack', [False, True])
@pytest.mark.parametrize('count,processes', [(2048, 2), (2048, 4), (600, 2)])
def test_a_process_reads_its_share_of_the_text_and_the_batch_is_the_same(pack, count, processes):
  """Processes 0..P-1 together give the batch of one process, and no document is read by two of
  them. A shard has one position of the batch, or four."""
  size, read = 8, []
  found = documents([str(1000 + i) for i in range(count)], 10)

  def to_rows(numbers):
    read.extend(numbers.tolist())
    return text.rows_of(found, numbers, 13, 0, pack)

  make = lambda: text.mix(count, size, to_rows, (3, 1))
  whole, positions = make(), np.arange(size)
  expected = [whole(step, positions) for step in range(30)]
  assert sorted(read) == list(range(count))
  seen = []
  for own in np.split(positions, processes):
    read.clear()
    part = make()
    for step in (0, 1, 29):
      mine = jax.tree.map(operator.itemgetter(own), expected[step])
      jax.tree.map(np.testing.assert_array_equal, part(step, own), mine)
    seen += read
  assert sorted(seen) == list(range(count))


def test_text_rows_come_once_an_epoch_and_blank_documents_never():
  found = documents([' ' if i == 2 else str(i) * 3 for i in range(6)], 9)
  batch = text.mix(6, 1, lambda numbers: text.rows_of(found, numbers, 4, 0, False), (0,))
  epochs = [[batch(5 * e + i, np.arange(1)).tokens.tolist()[0] for i in range(5)] for e in range(3)]
  assert (
    all(sorted(e) == [[9, i, i, i] for i in (0, 1, 3, 4, 5)] for e in epochs)
    and epochs[0] != epochs[1]
  )


def test_packing_by_hand():
  batch = conftest.packed(
    [([5, 6, 7], [0, 1, 1]), ([8, 9], [1, 1]), ([4], [1]), ([1, 2, 3, 4, 5, 6, 7], [1] * 7)],
    6,
    pad=0,
  )
  assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 4], [1, 2, 3, 4, 5, 6], [7, 0, 0, 0, 0, 0]]
  assert batch.mask.tolist() == [[1, 1, 1, 2, 2, 3], [1] * 6, [1, 0, 0, 0, 0, 0]]
  assert batch.weights.tolist() == [[0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 1, 1], [0] * 6]
  assert ops.positions(jnp.asarray(batch.mask)).tolist() == [
    [0, 1, 2, 0, 1, 0],
    [0, 1, 2, 3, 4, 5],
    [0] * 6,
  ]
  with pytest.raises(ValueError, match='nothing to pack'):
    conftest.packed([], 6, 0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('family', ['gpt2', 'llama', 'neox'])
def test_packed_equals_unpacked_in_loss_and_gradients(family, seed):
  _, nets, params, _ = fakes.model(family)
  rng = np.random.default_rng(seed)
  rows = [
    (rng.integers(1, fakes.VOCAB, n).tolist(), rng.uniform(0, 1, n).tolist())
    for n in rng.integers(1, 12, 12)
  ]
  packed = conftest.packed(rows, 24, 0)
  tokens, mask = encode.right_pad([r for r, _ in rows], 12, 0)
  weights = np.zeros(tokens.shape, np.float32)
  for i, (_, w) in enumerate(rows):
    weights[i, 1 : len(w)] = w[1:]
  assert len(packed.tokens) < len(rows) and packed.mask.max() > 1
  plain = TokenBatch(tokens, mask, weights)

  def loss(batch):
    batch = jax.tree.map(jnp.asarray, batch).normalized()
    return jax.value_and_grad(lambda p: losses.sft({'policy': p}, batch, None, nets=nets)[0])(
      params
    )

  (a, da), (b, db) = jax.jit(loss)(plain), jax.jit(loss)(packed)
  fakes.close(a, b)
  jax.tree.map(lambda x, y: fakes.close(x, y, rtol=1e-4, atol=1e-5), da, db)
