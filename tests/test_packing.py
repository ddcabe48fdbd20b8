"""Rows that are read as fewer packed ones: the arrangement, equality with the rows as they are, and
which program runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax import losses, ops, packing, rewards, rollout, steps
from alignjax.configs import ppo_ptx as ppo_ptx_config
from alignjax.models import transformer
from alignjax.stages import ppo_ptx, ppo_ptx_plan
from alignjax.types import PPOBatch, TrainState
from tests import fakes
from tests.fakes import FAMILIES, close, model

pack = functools.partial(packing.on_live_rows, fractions=(0.5, 0.75))
halve = functools.partial(packing.on_live_rows, fractions=(0.5,))  # two programs to compile


def ragged(seed, rows=8, length=12, longest=7):
  """Tokens [rows,length] whose live ones begin and end anywhere."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, longest + 1, rows)
  first = rng.integers(0, length - lengths + 1)
  column = np.arange(length)
  mask = (column >= first[:, None]) & (column < (first + lengths)[:, None])
  return jnp.asarray(rng.integers(0, fakes.VOCAB, mask.shape), jnp.int32), jnp.asarray(mask)


def test_first_fit_of_the_longest_first_by_hand():
  """Rows of 2, 4, 1, 3 and 0 tokens in rows of 5: [4, 1], [3, 2]."""
  mask = jnp.asarray(
    [[0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], bool
  )
  made = jax.jit(packing.arrange)(mask)
  assert int(made.rows) == 2
  assert made.index.tolist() == [
    [25, 8, 9, 25, 25],
    [0, 1, 2, 3, 25],
    [25, 25, 25, 25, 4],
    [25, 25, 5, 6, 7],
    [25] * 5,
  ]


arrange = jax.jit(packing.arrange)


@pytest.mark.parametrize('seed', range(20))
def test_every_live_token_has_a_place_of_its_own(seed):
  _, mask = ragged(seed, rows=16, longest=12)
  made = jax.tree.map(np.asarray, arrange(mask))
  used = made.index[np.asarray(mask)]
  assert len(set(used.tolist())) == len(used) and used.max() < made.rows * 12
  # In order, and each row within one packed row.
  for places, live in zip(made.index, np.asarray(mask), strict=True):
    assert (np.diff(places[live]) == 1).all() and len(set(places[live] // 12)) == 1
  assert made.rows >= np.ceil(len(used) / 12)


@pytest.mark.sampled
@pytest.mark.parametrize('family', FAMILIES)
def test_packed_networks_equal_plain_ones_in_outputs_and_gradients(family):
  _, nets, params, scalar = model(family)

  def outputs(nets, params, scalar, tokens, mask):
    follows = mask & (jnp.cumsum(mask, -1) > 1)
    logprobs, entropy = nets.logprobs(params, tokens, mask, temperature=0.7)
    return [
      jnp.where(m, x, 0.0)
      for m, x in (
        (follows, logprobs),
        (follows, entropy),
        (mask, nets.scalar(scalar, tokens, mask)),
      )
    ]

  @jax.jit
  def both(params, scalar, tokens, mask, weights):
    def total(params, scalar, nets):
      out = outputs(nets, params, scalar, tokens, mask)
      return sum(jnp.sum(w * x) for w, x in zip(weights, out, strict=True)), out

    of = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    arrangement = packing.arrange(mask)
    packed = packing.packed(nets, arrangement, 6)
    return of(params, scalar, nets), of(params, scalar, packed), arrangement.rows

  for seed in range(5):
    tokens, mask = ragged(seed)
    weights = np.random.default_rng(seed).normal(0, 1, (3, *mask.shape)).astype(np.float32)
    plain, packed, rows = both(params, scalar, tokens, mask, weights)
    assert rows <= 6
    jax.tree.map(functools.partial(close, rtol=5e-4, atol=5e-5), plain, packed)


def test_what_is_not_live_is_0_and_so_is_the_first_log_probability():
  _, nets, params, scalar = model()
  tokens, mask = ragged(5)
  some = packing.packed(nets, packing.arrange(mask), 8)
  logprobs, entropy = some.logprobs(params, tokens, mask)
  first = np.asarray(jnp.cumsum(mask, -1) == 1) & np.asarray(mask)
  for x in (logprobs, entropy):
    assert (np.asarray(x)[~np.asarray(mask) | first] == 0).all()
    assert (np.asarray(x)[np.asarray(mask) & ~first] != 0).all()
  assert (np.asarray(some.scalar(scalar, tokens, mask))[~np.asarray(mask)] == 0).all()


def test_rows_that_were_not_arranged():
  """Those of another shape, and packed ones, are read as they are. Another mask of the same shape
  gives NaN, because its tokens have no place."""
  _, nets, params, scalar = model()
  tokens, mask = ragged(0)
  some = packing.packed(nets, packing.arrange(mask), 6)
  documents = mask.astype(jnp.int32)
  for t, m in ((tokens[:3], mask[:3]), (tokens, documents)):
    np.testing.assert_array_equal(some.scalar(scalar, t, m), nets.scalar(scalar, t, m))
    np.testing.assert_array_equal(some.logprobs(params, t, m)[0], nets.logprobs(params, t, m)[0])
  other = ragged(1)[1]
  assert np.isnan(some.scalar(scalar, tokens, other)).all()
  follows = np.asarray(other & (jnp.cumsum(other, -1) > 1))
  assert np.isnan(np.asarray(some.logprobs(params, tokens, other)[0])[follows]).all()


@pytest.mark.parametrize('live, rows', [(3, 4), (6, 4), (8, 6), (9, 8), (12, 8)])
def test_the_smallest_program_that_holds_the_live_tokens_runs(live, rows):
  """Eight rows of 12: two of 6 fit into one row, three of 8 would need 24."""
  count = {3: 8, 6: 8, 8: 6, 9: 8, 12: 8}[live]
  mask = (jnp.arange(12) < live)[None] & (jnp.arange(8) < count)[:, None]

  def function(nets):
    nets.scalar(None, jnp.zeros((8, 12), jnp.int32), mask)
    return jnp.int32(seen_rows[-1])

  seen_rows = []

  def scalar(params, tokens, mask):
    seen_rows.append(len(tokens))
    return jnp.zeros(tokens.shape)

  nets = model()[1]._replace(scalar=scalar)
  assert int(jax.jit(lambda: pack(function, nets, mask))()) == rows


def test_scoring_packs_the_rows_of_one_gradient_of_an_update():
  c = ppo_ptx_config.get_config('tiny').stages.ppo  # 32 episodes in 4 minibatches
  assert ppo_ptx_plan.score_rows(c) == 8
  c.microbatches = 2
  assert ppo_ptx_plan.score_rows(c) == 4


def test_row_counts():
  assert packing.row_counts(32, (0.75, 0.5, 0.51)) == [16, 17, 24]
  assert packing.row_counts(32, (0.5, 0.51, 0.9, 0.99), shards=8) == [16, 24]
  assert packing.row_counts(2, (0.1, 0.9)) == [1]
  assert packing.row_counts(32, ()) == []


@pytest.mark.sampled
@pytest.mark.parametrize('family', FAMILIES)
def test_item_8_the_ratio_is_exactly_1_in_packed_rows(family):
  _, nets, params, scalar = model(family)
  _, _, ref, reward = model(family, seed=3)

  def collect(live_rows):
    return jax.jit(
      lambda params, frozen, *x: rollout.collect(
        nets,
        params,
        frozen,
        *x,
        reward_fn=functools.partial(rewards.model_reward, live_rows=live_rows),
        max_tokens=10,
        stop_ids=tuple(range(3, 20)),
        score_rows=4,
        live_rows=live_rows,
      )
    )

  measure = jax.jit(
    lambda p, b: steps.gradients(losses.ppo, p, b, None, nets=nets, live_rows=pack)[1]
  )
  plainly, packing_them, fewer = collect(None), collect(pack), 0
  for seed in range(3):
    arguments = (
      {'policy': params, 'value': scalar},
      {'ref': ref, 'reward': reward},
      *fakes.prompts(seed, rows=8),
      jax.random.key(seed),
    )
    (plain, _), (out, metrics) = plainly(*arguments), packing_them(*arguments)
    assert np.asarray(out.responses == plain.responses).all()
    for name in ('logprobs', 'ref_logprobs', 'values', 'scores'):
      close(getattr(out, name), getattr(plain, name), rtol=5e-4, atol=5e-5)
    zeros = jnp.zeros_like(out.values)
    batch = PPOBatch(out, zeros, zeros, out.mask.astype(jnp.float32))
    for half in (slice(0, 4), slice(4, 8)):
      part = jax.tree.map(lambda x, half=half: x[half], batch)
      fewer += int(arrange(part.row_mask()).rows) < 4
      measured = measure({'policy': params, 'value': scalar}, part)
      assert float(measured['ppo/ratio_max_dev']) == 0.0
    assert float(metrics['rollout/sampler_gap_max']) < 1e-4
  assert fewer >= 3, 'the rollouts are too long for packing to do anything'


def test_gradients_of_ppo_ptx_on_packed_rows():
  """The pretraining rows beside the episodes are read as they are."""
  _, nets, params, scalar = model()
  batch = fakes.ppo_batch(0, rows=8, q=6, r=10)
  loss = functools.partial(losses.ppo_ptx, ptx_coef=0.7)

  def of(live_rows):
    return jax.jit(
      lambda p, b: steps.gradients(loss, p, b, None, nets=nets, microbatches=2, live_rows=live_rows)
    )({'policy': params, 'value': scalar}, batch)

  jax.tree.map(functools.partial(close, rtol=5e-4, atol=5e-5), of(None), of(halve))


def test_gradients_of_the_reward_model_on_packed_rows():
  """Prompts have 2 to 9 responses here; those that are absent are read by nobody."""
  _, nets, _, scalar = model()
  batch = fakes.comparison_batch(0)
  mask = batch.mask & (batch.ranks >= 0)[..., None]
  batch = batch.replace(mask=mask)
  fits = int(packing.arrange(batch.row_mask()).rows)
  assert fits <= 0.75 * 36

  def of(live_rows):
    return jax.jit(
      lambda p, b: steps.gradients(
        losses.reward_ranking, p, b, None, nets=nets, live_rows=live_rows
      )
    )({'reward': scalar}, batch)

  jax.tree.map(functools.partial(close, rtol=5e-4, atol=5e-5), of(None), of(pack))


def test_a_whole_iteration_on_packed_rows():
  """State, metrics and rollout are those of the rows with pads, and the ratio is exactly 1."""
  _, nets, params, scalar = model()
  _, _, ref, reward = model(seed=3)
  tx = optax.sgd(0.1)
  trained = {'policy': params, 'value': scalar}
  state = TrainState(
    step=jnp.int32(0),
    params=trained,
    opt_state=tx.init(trained),
    extra={'kl_coef': jnp.float32(0.1)},
  )

  def run(live_rows):
    return jax.jit(
      lambda state, frozen, batch: ppo_ptx.iteration(
        state,
        frozen,
        batch,
        key=jax.random.key(1),
        nets=nets,
        rollout_fn=functools.partial(
          rollout.collect,
          reward_fn=functools.partial(rewards.model_reward, live_rows=live_rows),
          max_tokens=10,
          stop_ids=tuple(range(3, 20)),
          score_rows=4,
          live_rows=live_rows,
        ),
        advantage_fn=ops.gae,
        whiten=True,
        loss_fn=functools.partial(losses.ppo_ptx, ptx_coef=0.5),
        tx=tx,
        minibatches=2,
        inner_epochs=2,
        microbatches=2,
        live_rows=live_rows,
        ema_decay=None,
        kl_target=None,
        kl_horizon=None,
      )
    )(
      state,
      {'ref': ref, 'reward': reward},
      (*fakes.prompts(0, rows=16), fakes.token_batch(3, rows=8)),
    )

  (a, m, _), (b, n, _) = run(None), run(halve)
  assert float(n['ppo/ratio_max_dev']) == 0.0 == float(m['ppo/ratio_max_dev'])
  assert set(m) == set(n)
  for name in m:
    close(n[name], m[name], rtol=1e-3, atol=1e-4)
  jax.tree.map(functools.partial(close, rtol=1e-3, atol=1e-4), a.params, b.params)


@pytest.mark.sampled
@pytest.mark.parametrize('live_rows', [None, halve])
def test_item_8_the_ratio_is_exactly_1_in_bfloat16(live_rows):
  """Scoring without a gradient and the update with one read the same rows by the same products."""
  _, _, params, scalar = model()
  nets = transformer.make_networks(fakes.config(dtype='bfloat16', remat='dots'))

  @jax.jit
  def deviation(params, *prompts):
    out, _ = rollout.collect(
      nets,
      params,
      {'ref': params['policy'], 'reward': params['value']},
      *prompts,
      reward_fn=rewards.model_reward,
      max_tokens=10,
      stop_ids=tuple(range(3, 20)),
      score_rows=4,
      live_rows=live_rows,
    )
    batch = PPOBatch(out, out.values, out.values, out.mask.astype(jnp.float32))

    def update(total, minibatch):
      grads, metrics, _ = steps.gradients(
        losses.ppo, params, minibatch, None, nets=nets, live_rows=live_rows
      )
      # The gradients are used, or else the program would have no backward pass.
      return total + jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, grads)), metrics

    total, metrics = jax.lax.scan(update, 0.0, steps.split(batch, 2))
    return metrics['ppo/ratio_max_dev'], total

  for seed in range(3):
    found, total = deviation(
      {'policy': params, 'value': scalar}, *fakes.prompts(seed, rows=8), jax.random.key(seed)
    )
    assert found.tolist() == [0.0, 0.0] and float(total) != 0
