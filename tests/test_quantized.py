"""Frozen kernels in 8 and 4 bits: the codes against an independent loop, and networks and stages
that read them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.commands import export
from alignjax.models import lora, quantized, transformer
from alignjax.runtime import checkpoint
from alignjax.setup import adapters
from alignjax.setup.objects import make_setup
from alignjax.setup.weights import initial_params
from tests.fakes import close
from tests.test_lora import CHAT, GPT2, KEY, LLAMA, finish, noisy, pipeline, rows, shapes

# The values of NF4 as the paper prints them (Dettmers et al. 2023, appendix E).
PRINTED = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023
1.0"""
SMALL = dict(d_model=16, num_heads=4)


def test_the_values_of_nf4_are_those_of_the_paper():
  close(quantized.NF4, np.array(PRINTED.split(), np.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize('kind', quantized.KINDS)
@pytest.mark.parametrize('shape,block', [((2, 128, 3), 64), ((24, 5), 8), ((2, 3, 4, 6), 4)])
def test_codes_against_a_loop(kind, shape, block):
  rng = np.random.default_rng(7)
  kernel = rng.standard_normal(shape).astype(np.float32)
  kernel[..., :block, 0] = 0.0  # a block of zeros
  made = quantized.encode(jnp.asarray(kernel), kind)
  half = 2 if kind == 'nf4' else 1
  assert made['codes'].shape == (*shape[:-2], shape[-2] // half, shape[-1])
  assert made['codes'].dtype == (jnp.uint8 if kind == 'nf4' else jnp.int8)
  assert made['absmax'].shape == (*shape[:-2], shape[-2] // block, shape[-1])
  read = np.asarray(quantized.decode(made['codes'], made['absmax']))
  assert read.shape == shape and (read[..., :block, 0] == 0).all()
  values = [float(v) for v in PRINTED.split()]
  for index in np.ndindex(*shape[:-2], shape[-2] // block, shape[-1]):
    *lead, n, output = index
    cells = [(*lead, n * block + i, output) for i in range(block)]
    largest = max(abs(float(kernel[c])) for c in cells)
    for c in cells:
      x = float(kernel[c])
      if kind == 'int8':
        wanted = round(127 * x / largest) / 127 * largest if largest else 0.0
      else:
        wanted = largest * min(values, key=lambda v: abs(v * largest - x))  # noqa: B023
      assert math.isclose(read[c], wanted, rel_tol=1e-5, abs_tol=1e-6), (c, x)


@pytest.mark.parametrize('kind', quantized.KINDS)
@pytest.mark.parametrize('cfg', [LLAMA, GPT2], ids=['llama', 'gpt2'])
def test_networks_read_codes_as_the_kernels_that_they_stand_for(cfg, kind):
  """Scoring, gradients of adapters, prefill and step."""
  cfg = dataclasses.replace(cfg, **SMALL)
  ours = lora.LoRA(rank=2, alpha=3.0, targets=('query', 'down'))
  params = jax.tree.map(jnp.asarray, noisy(shapes(cfg), 0.5, 1))
  kept = jax.jit(quantized.quantize, static_argnums=1)(params, kind)
  read = jax.jit(lora.merge)(kept)  # without adapters: the kernels of the codes
  assert jax.tree.structure(read) == jax.tree.structure(params)
  apart = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), read['layers'], params['layers'])
  assert all(
    (x > 0.001) == ('kernel' in jax.tree_util.keystr(path))
    for path, x in jax.tree_util.tree_leaves_with_path(apart)
  )
  own = noisy(jax.eval_shape(lambda: lora.init(ours, params, KEY)))
  nets = transformer.make_networks(cfg)
  tokens, mask = rows()

  @jax.jit
  def measured(base, own):
    reading = lora.networks(nets, {'shared': base}, ours.scale)
    loss = lambda own: jnp.sum(reading.logprobs(own, tokens, mask)[0] * jnp.cos(tokens))
    weights = reading.decoder.prepare(own)
    first, cache = nets.decoder.prefill(weights, tokens, mask)
    step = nets.decoder.step(weights, tokens[:, 0], cache.with_slots(1))[0]
    return jax.value_and_grad(loss)(own), first, step

  found, wanted = measured(kept, own), measured(read, own)
  jax.tree.map(lambda x, y: close(x, y, rtol=1e-4, atol=2e-5), found, wanted)


def test_the_compiled_gradient_keeps_no_kernels():
  """Under automatic differentiation the kernels of all layers would be kept for the backward pass,
  and the codes would save nothing."""
  ours = lora.LoRA(rank=2)
  tokens, mask = rows()

  def temporary(layers, kind):
    cfg = dataclasses.replace(LLAMA, d_model=64, num_heads=4, num_layers=layers)
    whole, nets = shapes(cfg), transformer.make_networks(cfg)
    base = jax.eval_shape(lambda p: quantized.quantize(p, kind) if kind else p, whole)
    own = jax.eval_shape(lambda: lora.init(ours, whole, KEY))

    def loss(own, base):
      reading = lora.networks(nets, {'shared': base}, ours.scale)
      return reading.logprobs(own, tokens, mask)[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(own, base).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  grown, plain = (temporary(9, kind) - temporary(5, kind) for kind in ('nf4', None))
  kernels = 4 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 256)  # bytes of one layer
  assert grown - plain < 4 * kernels / 10


@pytest.mark.parametrize(
  'entry,message',
  [
    (dict(rank=2, quantization='int4'), "x.quantization='int4' must be None or one of int8, nf4"),
    (dict(rank=0, quantization='nf4'), "x.quantization='nf4' needs adapters"),
  ],
)
def test_declarations_that_cannot_be(entry, message):
  with pytest.raises(ValueError, match=message):
    lora.declared(entry, 'x')


def test_a_kernel_that_has_no_blocks_is_refused_before_anything_runs(tmp_path):
  with pytest.raises(ValueError, match=r"lora.quantization='nf4': a kernel \(2, 6, 3\) cannot be"):
    quantized.encode(jnp.zeros((2, 6, 3)), 'nf4')
  setup = make_setup(pipeline(tmp_path, quantization='nf4'), tmp_path / 'run', jax.devices()[:1])
  setup = setup._replace(policy_model=dataclasses.replace(setup.policy_model, head_dim=2))
  with pytest.raises(ValueError, match="stages.sft.lora.quantization='nf4': a kernel"):
    adapters.check(setup, 'sft', dict(policy='lm'))


def test_sft_on_a_base_of_four_bits(tmp_path, capsys):
  """Adapters are trained on the kernels of the codes, and are added to these when they are read."""
  config = pipeline(tmp_path, quantization='nf4')
  setup = make_setup(config, tmp_path / 'run', jax.devices()[:1])
  losses = [float(m['sft/loss']) for m in finish(setup, 'sft', (0, 0, 0))]
  assert losses[2] < losses[1] < losses[0]
  final = setup.workdir / 'sft' / 'final'
  assert checkpoint.load_info(final)['lora']['quantization'] == 'nf4'
  parts = adapters.load(setup, 'sft', dict(policy='lm'), {}, len)
  up = parts.frozen['base']['lm']['layers']['mlp']['up']
  assert set(up) == {'codes', 'absmax'} and up['codes'].dtype == jnp.uint8
  own = checkpoint.load_params(final, parts.params['policy'])
  nets = adapters.networks(setup, 'sft', parts.frozen)
  tokens, mask = rows()
  logprobs = nets.logprobs(own, tokens, mask)[0]
  whole = initial_params(setup, 'stage:sft', 'lm', 0)
  close(setup.nets.logprobs(whole, tokens, mask)[0], logprobs, atol=1e-5)
  base = initial_params(setup, f'hf:{CHAT}', 'lm', 0)
  changed = jax.tree.map(
    lambda x, y: bool((np.asarray(x) != np.asarray(y)).any()), whole['layers'], base['layers']
  )
  export.main(['--model', str(setup.workdir / 'sft'), '--out', str(tmp_path / 'out'), '--adapters'])
  assert f'they were trained on {CHAT} in nf4' in capsys.readouterr().out
  assert changed['attention']['out']['kernel'] and not changed['norm_1']['scale']
  # A stage without quantization, or with another, starts from the merged weights.
  config.stages.sft.init.policy = f'{setup.workdir}/sft/final'
  config.stages.sft.lora.quantization = None
  again = make_setup(config, tmp_path / 'again', jax.devices()[:1])
  parts = adapters.load(again, 'sft', dict(policy='lm'), {}, len)
  assert parts.info['policy']['lora']['base'].endswith('run/sft/final')
  close(
    parts.frozen['base']['lm']['layers']['mlp']['up']['kernel'],
    whole['layers']['mlp']['up']['kernel'],
  )


@pytest.mark.long
def test_ppo_on_a_base_of_four_bits(tmp_path):
  """Policy and reference are the same function at first, in bfloat16 too."""
  config = pipeline(tmp_path, 'bfloat16', quantization='nf4')
  setup = make_setup(config, tmp_path / 'run', jax.devices()[:1])
  for name in ('sft', 'rm'):
    finish(setup, name)
  first, second = finish(setup, 'ppo_ptx')
  # The reward model was trained on codes and stays on them; one that was trained whole is read as
  # it was, and the reference is the policy's base under whatever name.
  roles = dict(policy='lm', value='scalar'), dict(ref='lm', reward='scalar')
  config.stages.ppo_ptx.init.ref = str(setup.workdir / 'sft' / 'final')
  again = make_setup(config, setup.workdir, jax.devices()[:1])
  frozen = adapters.load(again, 'ppo_ptx', *roles, len).frozen
  assert lora.is_adapters(frozen['ref']) and lora.is_adapters(frozen['reward'])
  config.stages.ppo_ptx.lora.rank = 1  # so that everything starts from merged weights
  again = make_setup(config, setup.workdir, jax.devices()[:1])
  frozen = adapters.load(again, 'ppo_ptx', *roles, len).frozen
  assert lora.is_adapters(frozen['ref']) and not lora.is_adapters(frozen['reward'])
  assert 'kernel' in frozen['reward']['layers']['mlp']['up']
  assert first['ppo/ratio_max_dev'] == second['ppo/ratio_max_dev'] == 0.0
  assert first['objective/kl'] == 0.0 != second['objective/kl']


@pytest.mark.long
def test_a_mesh_trains_the_same_adapters(tmp_path):
  config = pipeline(tmp_path, quantization='nf4')
  losses = []
  for place, devices, mesh in (('one', 1, {}), ('eight', 8, dict(fsdp=2, tensor=2))):
    config.mesh.update(mesh)
    setup = make_setup(config, tmp_path / place, jax.devices()[:devices])
    losses.append([m['sft/loss'] for m in finish(setup, 'sft', (0, 1, 0))])
  base = adapters.load(setup, 'sft', dict(policy='lm'), {}, len).frozen['base']['lm']
  assert tuple(base['layers']['mlp']['up']['codes'].sharding.spec) == (
    None,
    ('fsdp', 'sequence'),
    'tensor',
  )
  close(losses[0], losses[1], rtol=1e-4)
