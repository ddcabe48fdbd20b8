"""Devices that share the tokens of a row (mesh.sequence) agree with one device, at every stage; no
device holds whole logits or whole attention weights; wrong choices are refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses, optim, sampling, sharding, steps
from alignjax.compiler import cost, hlo
from alignjax.configs import ppo_ptx
from alignjax.models import attention, lora, sequence, transformer
from alignjax.setup import entries, weights
from alignjax.setup.objects import make_setup
from alignjax.stages import ppo_ptx_plan as plan
from alignjax.types import PreferenceBatch, TokenBatch, TrainState
from tests.fakes import close, comparison_batch, config, model, prompts
from tests.test_sharding import on

RULES = sharding.RULES


def sharded(family, mesh, rules=RULES, **changes):
  """(sharder, networks) on a mesh of (data, fsdp, tensor, sequence)."""
  devices = jax.devices()[: int(np.prod(mesh))]
  sharder = sharding.Sharder(sharding.make_mesh(*mesh, devices=devices), rules)
  placed = sharder.constrain, sharder.for_decoding, sharder.machine
  return sharder, transformer.make_networks(config(family, **changes), *placed)


def rows(kind, seed, count=4, length=16):
  """Tokens and a mask: pads on the left, on the right, or packed documents with pads behind."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(2, length + 1, count)[:, None]
  column = np.arange(length)[None]
  if kind == 'packed':
    starts = rng.random((count, length)) < 0.25
    mask = np.where(column < lengths, 1 + starts.cumsum(1), 0).astype(np.int32)
  else:
    mask = column >= length - lengths if kind == 'left' else column < lengths
  tokens = rng.integers(0, 50, (count, length)).astype(np.int32)
  return jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(rng.normal(size=(count, length)))


def read(nets, params, scalar, tokens, mask, weights, temperature=0.7):
  """Log-probabilities, entropies, values and logits of live tokens, and the gradients of both
  heads."""
  live = mask > 0

  def on_lm(params):
    found = nets.logprobs(params, tokens, mask, temperature=temperature)
    found = [jnp.where(live, x, 0.0) for x in found]
    return sum(jnp.sum(weights * x) for x in found), found

  def on_scalar(params):
    found = jnp.where(live, nets.scalar(params, tokens, mask), 0.0)
    return jnp.sum(weights * found), found

  logits = jnp.where(live[..., None], nets.logits(params, tokens, mask), 0.0)
  return (
    jax.value_and_grad(on_lm, has_aux=True)(params),
    jax.value_and_grad(on_scalar, has_aux=True)(scalar),
    logits,
  )


MESHES = [(1, 1, 1, 2), (2, 1, 1, 4), (1, 2, 2, 2)]


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('kind', ['left', 'right', 'packed'])
@pytest.mark.parametrize('family', ['gpt2', 'llama', 'gemma', 'neox'])
def test_networks_and_their_gradients_are_those_of_one_device(family, kind, mesh):
  """Also for lengths that do not divide, and with chunks of queries and of logits."""
  changes = dict(logits_chunk=20, attention_chunk=3, remat='full') if kind == 'left' else {}
  batch = rows(kind, 1, length=15 if kind == 'right' else 16)
  _, nets, params, scalar = model(family)
  one = jax.jit(functools.partial(read, nets))(params, scalar, *batch)
  sharder, nets = sharded(family, mesh, **changes)
  placed = [jax.device_put(x, sharder.params(x)) for x in (params, scalar)]
  many = jax.jit(functools.partial(read, nets))(*placed, *sharder.put(batch))
  jax.tree.map(functools.partial(close, rtol=2e-4, atol=2e-5), many, one)


def packed_text(seed, count=4, length=16):
  tokens, mask, weights = rows('packed', seed, count, length)
  weights = jnp.where((mask > 0) & (jnp.arange(length) > 0)[None], jnp.abs(weights), 0.0)
  return TokenBatch(tokens, mask, weights)


def preferences(seed):
  made = comparison_batch(seed, k=3)
  begins = np.random.default_rng(seed).integers(1, 4, (4, 1, 1))
  return PreferenceBatch(
    made.tokens,
    made.mask,
    made.ranks,
    made.weights,
    response_mask=made.mask & (jnp.arange(7)[None, None] >= begins),
    ref_logprobs=jnp.zeros(made.tokens.shape),
  )


# stage: (the loss, the network that it trains, its batch)
STAGES = {
  'sft': (losses.sft, 'policy', packed_text),
  'rm': (losses.reward_ranking, 'reward', functools.partial(comparison_batch, k=3)),
  'dpo': (losses.dpo, 'policy', preferences),
  'lora': (losses.sft, 'policy', packed_text),
}


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('stage', STAGES)
def test_two_updates_of_a_stage_are_those_of_one_device(stage, mesh):
  """Packed rows of fine-tuning, with and without adapters, and rows of odd length of the reward
  model and of DPO; grouped heads and a window."""
  loss, name, make = STAGES[stage]
  _, _, policy, scalar = model('gemma')
  whole = scalar if name == 'reward' else policy

  def run(mesh):
    sharder, nets = sharded('gemma', mesh, remat='full', dropout=0.2 if stage == 'sft' else 0.0)
    params = whole
    if stage == 'lora':
      ours = lora.LoRA(rank=2, alpha=3.0)
      params = jax.jit(lora.init, static_argnums=0)(ours, whole, jax.random.key(0))
      shared = jax.device_put(whole, sharder.params(whole))
      nets = lora.networks(nets, {'shared': shared}, ours.scale)
    tx = optim.make({name: optim.adam(steps=4, lr=1e-2, clip_norm=1.0)})
    build = lambda params: TrainState(jnp.int32(0), params, tx.init(params))
    shapes = jax.eval_shape(build, {name: params})
    state = jax.jit(build, out_shardings=sharder.state(shapes, shapes.params))({name: params})
    key = jax.random.key(3) if stage == 'sft' else None
    step = functools.partial(
      steps.update,
      loss_fn=loss,
      nets=nets,
      tx=tx,
      microbatches=2 if sharder.batch_shards < 4 else 1,
    )
    step, losses = jax.jit(step), []
    for seed in (1, 2):
      state, metrics = step(state, sharder.put(make(seed)), key)
      losses.append(metrics)
    return jax.tree.map(np.asarray, (state.params, losses))

  jax.tree.map(functools.partial(close, rtol=1e-3, atol=1e-4), run(mesh), run((1, 1, 1, 1)))


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize(
  'packed, family, mesh', [(False, 'llama', (2, 1, 1, 4)), (True, 'gemma', (1, 2, 2, 2))]
)
def test_an_iteration_of_ppo_ptx_is_that_of_one_device(packed, family, mesh):
  (params, metrics, ro), *_ = on((1, 1, 1), family=family)
  (params8, metrics8, ro8), *_ = on(mesh, packed=packed, family=family)
  assert (ro.responses == ro8.responses).all() and (ro.mask == ro8.mask).all()
  assert float(metrics8['ppo/ratio_max_dev']) == 0.0
  close(ro8.logprobs, ro.logprobs, rtol=1e-4, atol=1e-4)
  for name in metrics:
    close(metrics8[name], metrics[name], rtol=2e-3, atol=1e-4)
  jax.tree.map(functools.partial(close, rtol=1e-2, atol=2e-3), params8, params)


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('family', ['llama', 'gemma'])
@pytest.mark.parametrize('samples', [1, 2])
def test_sampled_tokens_are_those_of_one_device(samples, family, mesh):
  """Prompts of odd length, also where the devices do not share the rows (sharding.rows)."""
  _, nets, params, _ = model(family)
  batch = prompts(0, rows=16, length=9)

  def run(nets, params, batch, **how):
    options = dict(max_tokens=8, stop_ids=tuple(range(0, 50, 5)), samples_per_prompt=samples)
    return jax.jit(
      lambda p, *x: sampling.generate(nets.decoder, p, *x, jax.random.key(0), **options, **how)
    )(params, *batch)

  one = run(nets, params, batch)
  for rules in (RULES, RULES | {'rows': ('data', 'fsdp')}):
    sharder, nets = sharded(family, mesh, rules)
    placed = jax.device_put(params, sharder.params(params))
    how = dict(halvings=1, segments=2, chunk=2, shards=sharder.row_shards)
    out = run(nets, placed, sharder.put(batch), **how)
    assert (np.asarray(out.responses) == np.asarray(one.responses)).all()
    assert (np.asarray(out.ended) == np.asarray(one.ended)).all()
    close(out.logprobs, one.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_no_device_has_whole_logits_or_attention_weights():
  """Of rows of 64 tokens that four devices share and 80 words, each has [B,16,80] and, for two
  heads of each group, [B,G,2*16,64], forwards and backwards."""
  changes = dict(vocab_size=80, max_length=64)
  sharder, nets = sharded('llama', (1, 2, 1, 4), **changes)
  params = transformer.init(config('llama', **changes), jax.random.key(0))
  params = jax.device_put(params, sharder.params(params))
  tokens, mask, _ = rows('packed', 0, length=64)
  loss = lambda p, *x: jnp.sum(nets.logprobs(p, *x)[0])
  program = jax.jit(jax.grad(loss)).lower(params, *sharder.put((tokens, mask))).compile()
  found = set(re.findall(r'\w\d+\[([\d,]+)\]', program.as_text()))
  shapes = [tuple(map(int, dims.split(','))) for dims in found]
  assert (2, 16, 80) in shapes and (2, 2, 32, 64) in shapes
  assert not [s for s in shapes if 64 in s and 80 in s or s.count(64) > 1]


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize('samples', [1, 2])
def test_devices_that_share_tokens_sample_different_rows(samples):
  """Each of eight decodes two prompts, and nothing is sent in the loop."""
  sharder, nets = sharded('llama', (1, 2, 1, 4))
  params = jax.device_put(model('llama')[2], sharder.params(model('llama')[2]))
  run = jax.jit(
    lambda p, *x: sampling.generate(
      nets.decoder, p, *x, max_tokens=4, stop_ids=(3,), chunk=2, samples_per_prompt=samples
    )
  )
  text = run.lower(params, *sharder.put(prompts(0, rows=16)), jax.random.key(0)).compile().as_text()
  loops = [line for line in text.splitlines() if ' while(' in line and ',50]' in line]
  assert loops and all(f'f32[{2 * samples},50]' in line for line in loops)
  rows = {size for line in loops for size in re.findall(r'f32\[(\d+),2,\d+,8\]', line)}
  assert rows == {'2', str(2 * samples)}, 'keys and values of prompts, and of responses'
  _, sent = cost.analyse(hlo.parse(text), dict(sharder.mesh.shape), None)
  assert not [s for s in sent if s.phase == 'decode' and s.in_loop and s.bytes > 64 * s.times]
  assert any(s.kind == 'all-to-all' and s.axes == 'sequence' for s in sent)


def of_cudnn(q, k, v, mask, **options):
  """What devices that share tokens pass to cuDNN, by XLA."""
  return attention.cudnn(q, k, v, mask.astype(jnp.int32), implementation='xla', **options)


KERNELS = {
  'reference': attention.reference,
  'chunks': functools.partial(attention.reference, chunk=3),
  'cudnn': of_cudnn,
  'splash': functools.partial(attention.splash, interpret=True),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('kind', ['left', 'right', 'packed'])
@pytest.mark.parametrize('window', [None, 1, 5])
@pytest.mark.parametrize('mesh', [(2, 1, 2, 2), (2, 1, 1, 4)])
def test_every_kernel_on_a_part_of_the_queries_is_the_reference_on_all(kernel, kind, window, mesh):
  """Outputs and gradients; grouped heads, two of which a device has."""
  sharder = sharding.Sharder(sharding.make_mesh(*mesh))
  rng = np.random.default_rng(5)
  q, k, v, direction = (
    jnp.asarray(rng.normal(size=(4, 20, heads, 8)), jnp.float32) for heads in (4, 2, 2, 4)
  )
  mask = rows(kind, 6, length=20)[1]
  attend = sequence.of_own_queries(functools.partial(KERNELS[kernel], window=window))
  attend = sharder.per_device(attend, attention.AXES, attention.AXES[0])

  def run(attend):
    out, back = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
    return out, back(direction)

  expected = jax.jit(lambda: run(functools.partial(attention.reference, window=window)))()
  jax.tree.map(
    functools.partial(close, rtol=1e-4, atol=1e-5), jax.jit(lambda: run(attend))(), expected
  )


def test_lengthened_rows():
  x = jnp.arange(1, 6)[None]
  assert sequence.lengthened(x, 4).tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
  assert sequence.lengthened(x, 4, left=True).tolist() == [[0, 0, 0, 1, 2, 3, 4, 5]]
  assert sequence.lengthened(x, 5) is x


@pytest.mark.parametrize(
  'rules,words',
  [
    ({'sequence': 'tensor'}, "sharding.sequence='tensor' does not go with mesh.sequence=2"),
    ({'sequence': None}, 'sharding.sequence=None does not go with mesh.sequence=2'),
    ({'tokens': None}, "set sharding.tokens='sequence', or mesh.sequence=1"),
    ({'batch': ('data', 'sequence')}, "sharding.batch=.'data', 'sequence'. divides over"),
    ({'heads': 'sequence', 'kv_heads': 'sequence'}, "sharding.heads='sequence' divides over"),
    ({'kv_heads': None}, "heads='tensor' and sharding.kv_heads=None have to be the same"),
    ({'tokns': 'sequence'}, "sharding.tokns='sequence'.*did you mean 'tokens'"),
  ],
)
def test_rules_that_do_not_go_with_shared_tokens_are_refused(rules, words):
  with pytest.raises(ValueError, match=words):
    sharding.Sharder(sharding.make_mesh(2, 1, 2, 2), RULES | rules)
  if words.startswith('sharding.sequence'):
    sharding.Sharder(sharding.make_mesh(2, 2, 2), RULES | rules)


@pytest.mark.parametrize(
  'changes,words',
  [
    ({'mesh.sequence': 3}, 'mesh.fsdp=1 x mesh.tensor=1 x mesh.sequence=3 does not divide the 8'),
    ({'mesh.data': 4, 'mesh.sequence': 4}, 'x mesh.sequence=4 is 16, but there are 8'),
    ({'mesh.sequence': 2, 'sharding.sequence': 'tensor'}, 'does not go with mesh.sequence=2'),
    (
      {'mesh.sequence': 2, 'mesh.fsdp': 4, 'model.d_model': 36, 'model.num_heads': 2},
      "'table' axis of 36 does not divide over the 8 devices of mesh axis .'fsdp', 'sequence'",
    ),
    (
      {'mesh.sequence': 8, 'stages.ppo_ptx.rollout.episodes': 4},
      'the prompts of a step are 4, which 8 devices do not share equally.*mesh.sequence=8',
    ),
    (
      {'mesh.sequence': 8, 'stages.ppo_ptx.rollout.generate_rows': 4},
      'prompts of rollout.generate_rows are 4, which 8 devices.*sharding.rows=.*data',
    ),
  ],
)
def test_entries_that_do_not_fit_are_refused_before_anything_runs(changes, words, tmp_path):
  c = ppo_ptx.get_config('tiny')
  for entry, value in changes.items():
    *path, last = entry.split('.')
    functools.reduce(lambda node, name: node[name], path, c)[last] = value
  with pytest.raises(ValueError, match=words):
    plan.check_entries(made := make_setup(c, tmp_path), 'ppo_ptx')
    weights.param_shapes(made.policy_model, 'lm', made.sharder)


def test_an_entry_that_is_no_number_is_refused():
  c = ppo_ptx.get_config('tiny')
  c.mesh = dict(c.mesh, sequence=0)
  with pytest.raises(ValueError, match='mesh.sequence=0 must be a whole number, 1 or more'):
    entries.check(c)
