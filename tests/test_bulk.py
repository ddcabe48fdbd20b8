"""Which rows are computed together, and that it does not matter for any of them."""

import jax
import numpy as np
import pytest

from alignjax.inference import batching, bulk, loading
from tests.test_preference import CHAT


@pytest.fixture(scope='module')
def model():
  return loading.load(f'hf:{CHAT}')


def shapes(plan):
  return {(b.length, b.size) for b in plan}


def tokens(plan):
  return sum(b.length * b.size for b in plan)


def test_every_row_is_planned_once_in_a_batch_that_it_fits():
  rng = np.random.default_rng(0)
  for shards in (1, 8):
    for cost in (0, 300, 10**4, 10**9):
      for count in (0, 1, 7, 59, 200):
        lengths = rng.integers(1, 500, count).tolist()
        plan = batching.plan(
          lengths, 500, lambda length: 4000 // length, shards=shards, shape_cost=cost
        )
        assert sorted(i for b in plan for i in b.rows) == list(range(count))
        for b in plan:
          assert len(b.rows) <= b.size <= max(shards, 4000 // b.length) and b.size % shards == 0
          assert max(lengths[i] for i in b.rows) <= b.length <= 500
        assert [b.length for b in plan] == sorted((b.length for b in plan), reverse=True)


def test_few_rows_are_not_padded_to_many_where_rows_are_dear():
  """59 responses of 30 to 400 tokens, 32 a batch at most: 32 rows for each of their 9 padded
  lengths are 54,784 tokens."""
  lengths = [30 + (i * i * 370) // 58**2 for i in range(59)]
  assert len({batching.bucket(n, 512) for n in lengths}) == 9 and sum(lengths) == 9076
  close = batching.plan(lengths, 512, 32, shape_cost=0, batch_cost=10)
  assert tokens(close) < 1.3 * sum(lengths) and len(close) < 30
  some = batching.plan(lengths, 512, 32, shape_cost=600, batch_cost=10)
  assert tokens(some) < 1.7 * sum(lengths) and len(shapes(some)) <= 6
  # padding is cheap: one shape, which others have too
  assert shapes(batching.plan(lengths, 512, 32, shape_cost=10**6)) == {(512, 32)}
  assert shapes(batching.plan(lengths[:3], 512, 32, shape_cost=10**6)) == {(512, 32)}
  # by hand: 2 + 1 rows are 144 tokens and 2 batches; 3 x 1 row one batch more and one shape less
  assert batching.plan([40, 41, 42], 512, 32, batch_cost=10) == [
    batching.Batch([0, 1], 48, 2),
    batching.Batch([2], 48, 1),
  ]
  assert [b.size for b in batching.plan([40, 41, 42], 512, 32, shape_cost=100, batch_cost=10)] == [
    1,
    1,
    1,
  ]
  assert [b.size for b in batching.plan([40, 41, 42], 512, 32, shape_cost=100, batch_cost=50)] == [
    4
  ]


def dear(monkeypatch):
  """As for a model so large that padding costs more than a compilation."""
  monkeypatch.setattr(
    bulk, 'SPEEDS', dict(cpu=bulk.Speed(compile=0.0, flops=3e10, bytes=1e10, step=1e-6))
  )


def test_a_sample_depends_on_its_prompt_and_number_alone(model, monkeypatch):
  """Not on the other prompts, the order, or the batch: each is the same alone and in company; the
  parameters and seed change it."""
  sample = bulk.make_sampler(
    model.nets, None, prompt_length=48, max_tokens=4, stop_ids=(3,), pad=0, rows=8
  )
  prompts = [[5, 6, 7], [8] * 40, [5, 6, 7]]
  whole, ended = sample(model.params, prompts, 1)
  assert len({tuple(r) for r in whole}) == 3 and ended.shape == (3,)
  assert sample(model.params, prompts[::-1], 1, numbers=[1, 0, 0])[0] == whole[::-1]
  assert sample(model.params, prompts, 2)[0] != whole
  dear(monkeypatch)
  assert sample(model.params, prompts[:2], 1)[0] == whole[:2]
  assert sample(model.params, prompts[2:], 1, numbers=[1])[0] == whole[2:]


def test_scores_in_batches_are_those_of_one_row_at_a_time(model, monkeypatch):
  dear(monkeypatch)
  rows = [list(range(3, 3 + n)) for n in (2, 33, 60, 5, 100, 34, 3)]
  seen = []
  nets = model.nets._replace(
    scalar=lambda params, tokens, mask: (
      seen.append(tokens.shape) or (tokens * mask).cumsum(-1) * 1.0
    )
  )
  done = {}
  found = bulk.make_scorer(nets, None, length=128, pad=9, rows=4)(
    model.params, rows, lambda i, x: done.update({i: float(x)})
  )
  np.testing.assert_array_equal(found, [sum(r) for r in rows])
  assert done == dict(enumerate(found.tolist())) and all(
    size * length <= 256 for size, length in seen
  )


def test_likelihoods_of_rows_of_any_length(model, monkeypatch):
  dear(monkeypatch)
  rows = [([4, 5], [6, 7, 8]), ([4] * 50, [9]), ([7], [8] * 70)]
  width = 80
  tokens, mask, weights = (
    np.full((3, width), 2, np.int32),
    np.zeros((3, width), bool),
    np.zeros((3, width), np.float32),
  )
  for i, (a, b) in enumerate(rows):
    tokens[i, : len(a + b)], mask[i, : len(a + b)], weights[i, len(a) : len(a + b)] = a + b, True, 1
  found, _ = bulk.make_likelihood(model.nets, None, 4)(model.params, tokens, mask, weights)
  logits = np.asarray(jax.jit(model.nets.logits)(model.params, tokens, mask), np.float64)
  logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  expected = [
    sum(logprobs[i, t - 1, tokens[i, t]] for t in range(len(a), len(a + b)))
    for i, (a, b) in enumerate(rows)
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_head_is_computed_only_where_a_token_is_weighted(model, monkeypatch):
  """Weights with gaps, of any size, a row with none, and a batch that ends before the last
  weighted position of another."""
  dear(monkeypatch)
  rng = np.random.default_rng(1)
  lengths = np.array([5, 40, 12, 3, 77])
  tokens = rng.integers(3, 200, (5, 80)).astype(np.int32)
  mask = np.arange(80) < lengths[:, None]
  weights = np.zeros(tokens.shape, np.float32)
  weights[0, [1, 4]], weights[1, 10:15], weights[2, 11], weights[4, [2, 40, 76]] = 1, 0.5, 2, 1
  asked = []

  def logits(params, tokens, mask, positions):
    asked.append(positions.shape)
    return model.nets.logits(params, tokens, mask, positions=positions)

  likelihood = bulk.make_likelihood(model.nets._replace(logits=logits), None, lambda w: {8: 2}[w])
  found, greedy = likelihood(model.params, tokens, mask, weights)
  assert set(asked) == {(2, 8), (1, 8)}
  full = np.asarray(model.nets.logits(model.params, tokens, mask), np.float64)
  logprobs = full - np.log(np.exp(full).sum(-1, keepdims=True))
  expected = [
    sum(weights[i, t] * logprobs[i, t - 1, tokens[i, t]] for t in range(1, 80)) for i in range(5)
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  assert found[3] == 0 and greedy.tolist() == [
    all(full[i, t - 1].argmax() == tokens[i, t] for t in np.flatnonzero(weights[i]))
    for i in range(5)
  ]
  likely = tokens.copy()
  likely[1, 10] = full[1, 9].argmax()  # It is greedy where this token alone is weighted.
  weights[1], weights[1, 10] = 0, 1
  assert likelihood(model.params, likely, mask, weights)[1][1]


def test_a_cpu_reads_no_more_tokens_at_once_than_its_caches_hold(model):
  seen = []
  nets = model.nets._replace(
    scalar=lambda params, tokens, mask: seen.append(tokens.shape) or tokens * 1.0
  )
  bulk.make_scorer(nets, None, length=512, pad=9)(model.params, [[3] * 500] * 40 + [[4] * 60] * 99)
  assert seen and all(size * length <= 2048 for size, length in seen)


def test_results_arrive_in_the_order_of_the_batches(model, monkeypatch):
  """One batch is computed while another is collected; each result goes to its own row."""
  dear(monkeypatch)
  order = []
  out = bulk.each(
    lambda params, x: x + 1,
    lambda some, length: (np.array(some),),
    [9, 3, 40, 8, 17],
    model.params,
    most=40,
    rows=1,
    sharder=None,
    done=lambda i, x: order.append((i, int(x))),
  )
  assert order == [(2, 3), (4, 5), (0, 1), (1, 2), (3, 4)]
  assert [int(x) for x in out] == [1, 2, 3, 4, 5]


def test_what_was_computed_before_an_error_is_not_lost(model, monkeypatch):
  dear(monkeypatch)
  seen, calls = [], []

  def run(params, x):
    calls.append(x)
    if len(calls) == 3:
      raise MemoryError('the third batch does not fit')
    return x

  with pytest.raises(MemoryError, match='third batch'):
    bulk.each(
      run,
      lambda some, length: (np.array(some),),
      [40, 20, 9],
      model.params,
      most=40,
      rows=1,
      sharder=None,
      done=lambda i, x: seen.append((i, int(x))),
    )
  assert seen == [(0, 0), (1, 1)]
