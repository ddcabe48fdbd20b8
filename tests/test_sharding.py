"""One device and eight agree; wrong layouts are refused before anything is compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses, ops, optim, packing, rewards, rollout, sampling, sharding
from alignjax.compiler import cost, hlo
from alignjax.configs import ppo_ptx
from alignjax.inference import loading
from alignjax.models import axes, transformer
from alignjax.setup.objects import make_setup
from alignjax.stages.ppo_ptx import iteration
from alignjax.stages.stage import compile_step
from alignjax.types import TrainState
from tests.fakes import close, config, model, prompts, token_batch

RULES = sharding.RULES


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip of a TPU slice, as jax's layout of a mesh reads it."""

  id: int
  coords: tuple[int, int, int]
  device_kind: str = 'TPU v6 lite'
  platform: str = 'tpu'
  process_index: int = 0
  core_on_chip: int = 0
  slice_index: int = 0


def test_a_mesh_axis_may_take_a_part_of_an_axis_of_a_slice():
  """16 x 4 over the 8 x 8 chips of v6e: the four that share a layer's heads are neighbours."""
  chips = [Chip(i, (i % 8, i // 8, 0)) for i in range(64)]
  mesh = sharding.make_mesh(fsdp=16, tensor=4, devices=chips)
  assert dict(mesh.shape) == dict(data=1, fsdp=16, sequence=1, tensor=4)
  assert sorted(d.id for d in mesh.devices.flat) == list(range(64))
  for group in mesh.devices.reshape(16, 4):
    places = np.array([d.coords for d in group])
    assert np.abs(np.diff(places, axis=0)).sum(1).max() == 1
  with pytest.raises(ValueError, match='mesh.tensor=3 .*does not divide the 64 devices'):
    sharding.make_mesh(tensor=3, devices=chips)


def one_iteration(mesh_shape, lr=1e-2, packed=False, family='llama'):
  """One whole PPO-ptx iteration on a mesh of a given shape: (state, metrics, rollout) as numpy.

  packed: whether the live tokens of eight rows are read as four rows where they fit.
  """
  cfg, _, policy, scalar = model(family)
  devices = jax.devices()[: int(np.prod(mesh_shape))]
  sharder = sharding.Sharder(sharding.make_mesh(*mesh_shape, devices=devices))
  placed = sharder.constrain, sharder.for_decoding, sharder.machine
  nets = transformer.make_networks(cfg, *placed)
  tx = optim.make({n: optim.adam(steps=4, lr=lr, clip_norm=1.0) for n in ('policy', 'value')})

  def build(params):
    return TrainState(
      step=jnp.int32(0),
      params=params,
      opt_state=tx.init(params),
      extra={'kl_coef': jnp.float32(0.1)},
    )

  params = {'policy': policy, 'value': scalar}
  shapes = jax.eval_shape(build, params)
  state = jax.jit(build, out_shardings=sharder.state(shapes, shapes.params))(params)
  frozen = {
    'ref': jax.device_put(policy, sharder.params(policy)),
    'reward': jax.device_put(scalar, sharder.params(scalar)),
  }
  live_rows = functools.partial(packing.on_live_rows, fractions=(0.5,), shards=sharder.batch_shards)
  live_rows = live_rows if packed else None
  step = compile_step(
    functools.partial(
      iteration,
      key=jax.random.key(7),
      nets=nets,
      tx=tx,
      whiten=True,
      minibatches=2,
      inner_epochs=1,
      microbatches=1,
      live_rows=live_rows,
      ema_decay=None,
      kl_target=None,
      kl_horizon=None,
      advantage_fn=ops.gae,
      loss_fn=functools.partial(losses.ppo_ptx, ptx_coef=2.0),
      rollout_fn=functools.partial(
        rollout.collect,
        reward_fn=functools.partial(rewards.model_reward, live_rows=live_rows),
        max_tokens=6,
        stop_ids=range(3, 30),
        score_rows=8,
        live_rows=live_rows,
      ),
    ),
    state,
  )
  batch = sharder.put((*prompts(0, rows=16), token_batch(0, rows=16)))
  before = step._cache_size()
  state, metrics, ro = step(state, frozen, batch)
  first = jax.tree.map(np.asarray, (state.params, metrics, ro))
  state, metrics, later = step(state, frozen, batch)
  assert step._cache_size() == before + 1, 'the second iteration compiled again'
  return first, state, (jax.tree.map(np.asarray, later), metrics)


@functools.cache
def on(mesh_shape, lr=1e-2, packed=False, family='llama'):
  return one_iteration(mesh_shape, lr, packed, family)


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize('packed, family', [(False, 'llama'), (True, 'llama'), (True, 'gemma')])
def test_item_11_one_device_equals_eight(packed, family):
  (params, metrics, ro), *_ = on((1, 1, 1), family=family)
  (params8, metrics8, ro8), state, _ = on((2, 2, 2), packed=packed, family=family)
  if packed:  # in at least one half the live tokens of eight rows fit into four
    halves = np.split(np.asarray(ro.sequences()[1]), 2)
    assert min(int(packing.arrange(jnp.asarray(half)).rows) for half in halves) <= 4
    assert float(metrics8['ppo/ratio_max_dev']) == 0.0
  assert (ro.responses == ro8.responses).all() and (ro.mask == ro8.mask).all()
  close(ro8.logprobs, ro.logprobs, rtol=1e-4, atol=1e-4)
  for name in metrics:
    close(metrics8[name], metrics[name], rtol=2e-3, atol=1e-4)
  jax.tree.map(functools.partial(close, rtol=1e-2, atol=2e-3), params8, params)
  query = state.params['policy']['layers']['attention']['query']['kernel']
  # fsdp and tensor, replicated over data
  assert query.addressable_shards[0].data.size * 4 == query.size
  moment = jax.tree.leaves(state.opt_state)  # born with the parameters' shardings
  assert any(
    getattr(m, 'shape', None) == query.shape and m.sharding == query.sharding for m in moment
  )


@pytest.mark.slow
def test_item_14_successive_iterations_draw_afresh():
  """The same prompts and, at learning rate 0, the same policy: the noise alone must differ."""
  (_, _, before), _, (after, _) = on((1, 1, 1), lr=0.0)
  assert (before.responses != after.responses).any()


def test_item_8_the_iteration_logs_a_ratio_of_exactly_1():
  (_, metrics, _), _, (_, later) = on((1, 1, 1))
  assert float(metrics['ppo/ratio_max_dev']) == float(later['ppo/ratio_max_dev']) == 0.0


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize('once', [True, False])
def test_item_24_no_weight_is_gathered_inside_the_decoding_loop(once):
  """Nor is anything else but whether all rows are done; without for_decoding, the weights are,
  which the check must see."""
  cfg = config('llama')
  sharder = sharding.Sharder(sharding.make_mesh(2, 4, 1))
  nets = transformer.make_networks(
    cfg, sharder.constrain, *([sharder.for_decoding] if once else [])
  )
  params = jax.device_put(model('llama')[2], sharder.params(model('llama')[2]))
  run = jax.jit(
    lambda p, *x: sampling.generate(
      nets.decoder, p, *x, max_tokens=8, stop_ids=(3,), chunk=2, segments=2, halvings=1, shards=8
    )
  )
  text = run.lower(params, *sharder.put(prompts(0, rows=16)), jax.random.key(0)).compile().as_text()
  _, sent = cost.analyse(hlo.parse(text), dict(sharder.mesh.shape), None)
  largest = max((s.bytes / s.times for s in sent if s.phase == 'decode' and s.in_loop), default=0)
  assert (largest <= 64) == once
  assert any(s.kind == 'all-gather' and not s.in_loop for s in sent)


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize('samples', [1, 2])
def test_halves_and_segments_draw_the_same_on_eight_devices(samples):
  cfg, nets, params, _ = model('llama')
  sharder = sharding.Sharder(sharding.make_mesh(2, 2, 2))
  eight = transformer.make_networks(cfg, sharder.constrain, sharder.for_decoding)

  def run(nets, params, batch, **how):
    return jax.jit(
      lambda p, *x: sampling.generate(
        nets.decoder,
        p,
        *x,
        jax.random.key(0),
        max_tokens=8,
        stop_ids=tuple(range(0, 50, 5)),
        samples_per_prompt=samples,
        chunk=2,
        **how,
      )
    )(params, *batch)

  one = run(nets, params, prompts(0, rows=16))
  placed = jax.device_put(params, sharder.params(params))
  out = run(
    eight,
    placed,
    sharder.put(prompts(0, rows=16)),
    halvings=2,
    segments=2,
    shards=sharder.batch_shards,
  )
  assert (np.asarray(one.mask).sum(1) <= 4).sum() > len(one.mask) / 2
  assert (np.asarray(out.responses) == np.asarray(one.responses)).all()
  assert (np.asarray(out.mask) == np.asarray(one.mask)).all()
  close(out.logprobs, one.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  'shape,words', [((3, 1, 1), 'is 3, but there are 8'), ((None, 3, 1), 'does not divide')]
)
def test_a_mesh_that_does_not_fit_is_refused(shape, words):
  with pytest.raises(ValueError, match=words):
    sharding.make_mesh(*shape)


def test_the_64_bit_mode_is_refused_before_any_work(tmp_path):
  """As of a shell that sets JAX_ENABLE_X64: the weights are not damaged, whatever is loaded."""
  with jax.enable_x64(True):
    for work in (
      sharding.make_mesh,
      lambda: loading.load('hf:tests/golden/chat'),
      lambda: make_setup(ppo_ptx.get_config('tiny'), tmp_path),
    ):
      with pytest.raises(ValueError, match='Unset JAX_ENABLE_X64'):
        work()


def test_every_logical_axis_is_known():
  """Those that the networks really ask for, of activations and of parameters; a rule for each of
  them is taken."""
  asked = set()

  def note(x, *names):
    asked.update(names)
    return x

  for family in ('llama', 'gpt2'):
    cfg, _, policy, _ = model(family)
    nets = transformer.make_networks(cfg, note)
    weights = jax.eval_shape(nets.decoder.prepare, policy)
    jax.eval_shape(nets.decoder.prefill, weights, *prompts(0))
    for names in jax.tree.leaves(axes.logical_axes(policy), is_leaf=lambda x: type(x) is tuple):
      asked.update(names)
  known = {'batch', 'embed', 'heads', 'kv_heads', 'layers', 'mlp', 'table', 'vocab'}
  known |= {'rows', 'sequence', 'tokens'}
  assert asked - {None} == known == {*axes.logical_names()}
  sharding.Sharder(sharding.make_mesh(2, 2, 2), dict.fromkeys(known))


def test_an_unknown_axis_ends_a_run_before_it_begins(tmp_path):
  c = ppo_ptx.get_config('tiny')
  c.sharding.sequense = 'tensor'
  with pytest.raises(ValueError, match="sharding.sequense='tensor'.*did you mean 'sequence'"):
    make_setup(c, tmp_path)


def test_wrong_rules_are_refused():
  mesh = sharding.make_mesh(2, 2, 2)
  with pytest.raises(ValueError, match="names 'model'"):
    sharding.Sharder(mesh, {'heads': 'model'})
  with pytest.raises(ValueError, match="sharding.head='tensor'.*'head'; did you mean 'heads'"):
    sharding.Sharder(mesh, {'head': 'tensor'})
  with pytest.raises(ValueError, match='twice'):
    sharding.Sharder(mesh, {'embed': 'fsdp', 'mlp': 'fsdp'}).sharding('embed', 'mlp')
  with pytest.raises(ValueError, match='no axes'):
    sharding.Sharder(mesh).params({'policy': {'mystery': jnp.zeros(3)}})
  with pytest.raises(ValueError, match='m: its 1 kv_heads do not divide over the 2 devices'):
    sharding.Sharder(mesh, RULES).check_heads(config('llama', num_kv_heads=1), 'm')
  sharding.Sharder(mesh, RULES).check_heads(config('llama'))
  odd = jax.eval_shape(lambda: transformer.init(config('llama', d_ff=3), jax.random.key(0)))
  with pytest.raises(ValueError, match='mlp.*does not divide'):
    sharding.Sharder(mesh, RULES).params(odd)
