"""compiler/hlo.py by hand-written programs and really compiled ones; compile.py's answers and its
errors."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax import sampling, sharding
from alignjax.commands import estimate as command
from alignjax.commands import estimate_page
from alignjax.compiler import chips, cost, hlo, liveness, operations
from alignjax.configs import base
from alignjax.setup.objects import make_setup
from alignjax.stages import abstract, ppo_ptx
from tests import fakes

ROOT = pathlib.Path(__file__).resolve().parent.parent

PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[16,4]{1,0})) -> (s32[], f32[16,4]) {
  %p = (s32[], f32[16,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[16,4]{1,0} get-tuple-element(%p), index=1
  %r = f32[16,4]{1,0} all-reduce(%x), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add, \
metadata={op_name="jit(s)/decode/while/sum"}
  ROOT %t = (s32[], f32[16,4]{1,0}) tuple(%next, %r)
}

%inner_condition (q: (s32[], f32[16,4])) -> pred[] {
  %q = (s32[], f32[16,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %eight = s32[] constant(8)
  ROOT %lt = pred[] compare(%j, %eight), direction=LT
}

%fused_next (f: s32[]) -> s32[] {
  %f = s32[] parameter(0)
  %by = s32[] constant(8)
  ROOT %plus = s32[] add(%f, %by)
}

%outer_body (p.1: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {
  %p.1 = (s32[], f32[16,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %next.1 = s32[] fusion(%i.1), kind=kLoop, calls=%fused_next
  %x.1 = f32[16,4]{1,0} get-tuple-element(%p.1), index=1
  %zero = s32[] constant(0)
  %start = (s32[], f32[16,4]{1,0}) tuple(%zero, %x.1)
  %w = (s32[], f32[16,4]{1,0}) while(%start), condition=%inner_condition, body=%inner_body
  %y = f32[16,4]{1,0} get-tuple-element(%w), index=1
  ROOT %t.1 = (s32[], f32[16,4]{1,0}) tuple(%next.1, %y)
}

%fused_stop (g: s32[], d: pred[]) -> pred[] {
  %g = s32[] parameter(0)
  %d = pred[] parameter(1)
  %end = s32[] constant(24)
  %lt.1 = pred[] compare(%g, %end), direction=LT
  ROOT %and = pred[] and(%lt.1, %d)
}

%outer_condition (q.1: (s32[], f32[16,4])) -> pred[] {
  %q.1 = (s32[], f32[16,4]{1,0}) parameter(0)
  %j.1 = s32[] get-tuple-element(%q.1), index=0
  %true = pred[] constant(true)
  ROOT %both = pred[] fusion(%j.1, %true), kind=kLoop, calls=%fused_stop
}

%product (l: bf16[16,8], m: bf16[5,8,4]) -> f32[16,4] {
  %l = bf16[16,8]{1,0} parameter(0)
  %m = bf16[5,8,4]{2,1,0} parameter(1)
  %z = s32[] constant(0)
  %s = bf16[1,8,4]{2,1,0} dynamic-slice(%m, %z, %z, %z), dynamic_slice_sizes={1,8,4}
  %k = bf16[8,4]{1,0} bitcast(%s)
  ROOT %dot = f32[16,4]{1,0} dot(%l, %k), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
metadata={op_name="jit(s)/update/dot"}
}

ENTRY %main (a.1: bf16[2,8], b.1: bf16[5,8,4]) -> f32[16,4] {
  %a.1 = bf16[2,8]{1,0} parameter(0)
  %b.1 = bf16[5,8,4]{2,1,0:T(8,128)S(0)} parameter(1)
  %g.1 = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%a.1), replica_groups=[1,8]<=[8], \
metadata={op_name="jit(s)/update/g"}
  %g.2 = bf16[16,8]{1,0} all-gather-done(%g.1)
  %c = f32[16,4]{1,0} fusion(%g.2, %b.1), kind=kOutput, calls=%product, \
metadata={op_name="jit(s)/update/dot"}
  %zero.1 = s32[] constant(0)
  %start.1 = (s32[], f32[16,4]{1,0}) tuple(%zero.1, %c)
  %w.1 = (s32[], f32[16,4]) while(%start.1), condition=%outer_condition, body=%outer_body, \
metadata={op_name="jit(s)/decode/while"}
  ROOT %out = f32[16,4]{1,0} get-tuple-element(%w.1), index=1
}
"""


def test_a_program_written_by_hand():
  module = hlo.parse(PROGRAM)
  assert module.entry == 'main' and len(module.computations) == 9
  mesh = dict(data=1, fsdp=4, tensor=2)
  phases, sent = cost.analyse(module, mesh, chips.CHIPS['v5e'])
  gather, reduce = sorted(sent, key=lambda s: s.kind)
  assert (gather.kind, gather.phase, gather.axes, gather.times, gather.in_loop) == (
    'all-gather',
    'update',
    'fsdp+tensor',
    1,
    False,
  )
  assert gather.bytes == 2 * 8 * 2 * 7  # the seven other pieces of 2 x 8 bfloat16
  # 3 turns of the outer loop (24 by 8), 8 of the inner; two ways of 3/4 of 16 x 4 float32, in
  # groups 0 2 4 6 and 1 3 5 7: fsdp
  assert (reduce.kind, reduce.phase, reduce.axes, reduce.times, reduce.in_loop) == (
    'all-reduce',
    'decode',
    'fsdp',
    24,
    True,
  )
  assert reduce.bytes == 24 * 2 * 3 * 16 * 4 * 4 // 4
  assert phases['update'].flops == 2 * 16 * 4 * 8 and phases['decode'].flops == 0
  # of the stack one slice is read
  assert phases['update'].traffic == 16 * 8 * 2 + 8 * 4 * 2 + 16 * 4 * 4
  assert (phases['update'].wire, phases['decode'].wire) == (gather.bytes, reduce.bytes)
  # the product goes through the loops into the result's place, so the gathered rows alone are
  # extra, until they are read
  assert cost.largest_arrays(module) == [('bf16[16,8]', 1, 256, 'update', 'update/g')]


@pytest.mark.parametrize(
  'text,group,count',
  [
    ('replica_groups={{0,1},{2,3}}', (0, 1), 2),
    ('replica_groups=[2,2]<=[4]', (0, 1), 2),
    ('replica_groups=[2,2]<=[2,2]T(1,0)', (0, 2), 2),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}", (0, 4), 4),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5), 2),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, x", (0, 2, 4, 6), 2),
    ('source_target_pairs={{3,0},{0,3}}', (3, 0), 2),
  ],
)
def test_replica_groups(text, group, count):
  assert operations.replica_group(f', channel_id=1, {text}') == (group, count)


def test_convolutions_count_what_falls_on_the_input():
  """TPU programs write batched products as convolutions. Counted here tap by tap."""
  site = lambda window, labels, left, right, out: hlo.Site(
    hlo.Instruction(
      'c',
      'convolution',
      (hlo.Shape('f32', out),),
      ('l', 'r'),
      f', window={{{window}}}, dim_labels={labels}',
      '%l, %r',
    ),
    {
      n: hlo.Instruction(n, 'parameter', (hlo.Shape('f32', s),), (), '', '0')
      for n, s in (('l', left), ('r', right))
    },
    1,
    '',
    False,
    (),
  )
  assert operations.flops(site('', 'bf_io->bf', (16, 8), (8, 4), (16, 4))) == 2 * 16 * 8 * 4
  # a batch of 3 products [16,8] x [8,4]: the window has size 3, and each output lands on one tap of
  # the dilated input
  batched = site(
    'size=3 stride=2 pad=0_0 lhs_dilate=3', '0bf_0io->0bf', (3, 16, 8), (3, 8, 4), (3, 16, 4)
  )
  assert operations.flops(batched) == 3 * 2 * 16 * 8 * 4
  # a 3-tap filter over 5 positions, padded by one on both sides: 5 * 3 - 2 taps
  assert (
    operations.flops(site('size=3 pad=1_1', 'b0f_0io->b0f', (1, 5, 2), (3, 2, 7), (1, 5, 7)))
    == 2 * 13 * 2 * 7
  )


CUBLAS = """HloModule jit_f, is_scheduled=true

ENTRY %main (a: bf16[3,16,8], b: bf16[3,8,4]) -> bf16[3,16,4] {
  %a = bf16[3,16,8]{2,1,0} parameter(0)
  %b = bf16[3,8,4]{2,1,0} parameter(1)
  %gemm = (bf16[3,16,4]{2,1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/update/dot_general"}, backend_config={"operation_queue_id":"0","gemm_backend_config":{"alpha_real":1,"alpha_imag":0,"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]},"epilogue":"DEFAULT"}}
  ROOT %out = bf16[3,16,4]{2,1,0} get-tuple-element(%gemm), index=0
}
"""  # noqa: E501


def test_products_by_cublas_are_counted():
  phases, _ = cost.analyse(hlo.parse(CUBLAS), dict(data=1, fsdp=1, tensor=1), chips.CHIPS['v5e'])
  assert phases['update'].flops == 2 * 3 * 16 * 8 * 4


SPLASH = """HloModule jit_f, is_scheduled=true

ENTRY %main (b: s8[1,4,4], q: bf16[2,8,2048,128], k: bf16[2,4,2048,128]) -> bf16[2,8,2048,128] {
  %b = s8[1,4,4]{2,1,0} parameter(0)
  %q = bf16[2,8,2048,128]{3,2,1,0} parameter(1)
  %k = bf16[2,4,2048,128]{3,2,1,0} parameter(2)
  %splash_mha_fwd_segmented_residuals.1 = (f32[2,512,128]{2,1,0}, bf16[2,8,2048,128]{3,2,1,0}) custom-call(%b, %b, %q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/update/pallas_call"}
  ROOT %out = bf16[2,8,2048,128]{3,2,1,0} get-tuple-element(%splash_mha_fwd_segmented_residuals.1), index=1
}
"""  # noqa: E501


def test_operations_of_the_splash_kernel():
  """Ten of the sixteen blocks of 512 queries and 512 keys are not above the diagonal, and the text
  of the kernel's attributes goes over several lines."""
  phases, _ = cost.analyse(hlo.parse(SPLASH), dict(data=1, fsdp=1, tensor=1), chips.CHIPS['v5e'])
  assert phases['update'].flops == 2 * 2 * (2 * 8 * 128) * 10 * 512 * 512
  # Of the last 2,048 of 8,192 tokens, the 48 blocks of the keys before them count too.
  longer = SPLASH.replace('[2,4,2048,128]', '[2,4,8192,128]')
  phases, _ = cost.analyse(hlo.parse(longer), dict(data=1, fsdp=1, tensor=1), chips.CHIPS['v5e'])
  assert phases['update'].flops == 2 * 2 * (2 * 8 * 128) * 58 * 512 * 512


@pytest.mark.parametrize(
  'target,mask,products',
  [
    ('fmhaSoftmax', 'CAUSAL', 1),
    ('fmhaScaleBiasSoftmax', 'CAUSAL', 1),
    ('fmhaSoftmaxBackward', 'CAUSAL', 2.5),
    ('fmhaSoftmax', 'NO_MASK', 2),
  ],
)
def test_operations_of_cudnn(target, mask, products):
  """Two products of all pairs in the forward pass and five in the backward pass; half of the pairs
  where it is causal."""
  program = f"""HloModule jit_f, is_scheduled=true

ENTRY %main (q: bf16[3,64,8,16], k: bf16[3,64,4,16]) -> bf16[3,64,8,16] {{
  %q = bf16[3,64,8,16]{{3,2,1,0}} parameter(0)
  %k = bf16[3,64,4,16]{{3,2,1,0}} parameter(1)
  %c = (bf16[3,64,8,16]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), custom_call_target="__cudnn${target}", backend_config={{"cudnn_fmha_backend_config":{{"mask_type":"{mask}"}}}}, metadata={{op_name="jit(f)/update/a"}}
  ROOT %out = bf16[3,64,8,16]{{3,2,1,0}} get-tuple-element(%c), index=0
}}
"""  # noqa: E501
  phases, _ = cost.analyse(hlo.parse(program), dict(data=1, fsdp=1, tensor=1), chips.CHIPS['v5e'])
  assert phases['update'].flops == products * 2 * 3 * 8 * 64 * 64 * 16


def scanned(x, w):
  with jax.named_scope('decode'):
    layer = lambda x, w: (
      jax.lax.with_sharding_constraint(jnp.tanh(x @ w), NamedSharding(mesh(), P('fsdp'))),
      None,
    )
    return jax.lax.scan(layer, x, w)[0]


@functools.cache
def mesh():
  return sharding.make_mesh(1, 8, 1)


def test_a_program_really_compiled():
  """Five layers whose weights are split over eight devices: each is gathered once a turn of the
  loop."""
  put = lambda shape, *spec: jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(mesh(), P(*spec))
  )
  compiled = jax.jit(scanned).lower(put((16, 64), 'fsdp'), put((5, 64, 64), None, 'fsdp')).compile()
  module = hlo.parse(compiled.as_text())
  phases, sent = cost.analyse(module, dict(mesh().shape), None)
  assert phases['decode'].flops == 5 * 2 * (16 // 8) * 64 * 64
  assert sum(s.bytes for s in sent) == 5 * 64 * 64 * 4 * 7 // 8 and {s.axes for s in sent} == {
    'fsdp'
  }


@pytest.mark.sampled
@pytest.mark.parametrize(
  'how', [{}, dict(segments=3), dict(segments=2, halvings=1), dict(segments=2, prompts_at_once=4)]
)
def test_the_tokens_of_decoding_are_counted_once(how):
  """In segments as without them: a segment goes on where the one before has ended. A batch that is
  halved after its last token counts once, for 4 tokens of half of the rows."""
  cfg, nets, params, _ = fakes.model('llama')
  run = jax.jit(
    lambda p, *x: sampling.generate(
      nets.decoder, p, *x, jax.random.key(0), max_tokens=24, stop_ids=(3,), chunk=4, **how
    )
  )
  compiled = run.lower(params, *fakes.prompts(0, rows=8)).compile()
  phases, _ = cost.analyse(hlo.parse(compiled.as_text()), dict(data=1, fsdp=1, tensor=1), None)
  layer = 2 * cfg.d_model * (2 * (cfg.num_heads + cfg.kv_heads) * cfg.head_width)
  layer += 3 * 2 * cfg.d_model * cfg.mlp_width
  products = 8 * 24 * (cfg.num_layers * layer + 2 * cfg.d_model * cfg.vocab_size)
  assert products < phases['decode'].flops < 1.3 * products  # the rest is attention


@functools.cache
def tiny(fsdp=8):
  from alignjax.configs import base

  config = base.get_config('tiny')
  config.mesh.fsdp = fsdp
  return config


@pytest.mark.slow
def test_a_stage_compiled_for_eight_devices(tmp_path):
  result = command.compile_stage(tiny(), 'ppo_ptx', jax.devices(), None)
  assert result['fits'] and result['memory']['temporaries'] > 0
  # jax 0.12 leaves `prepare` nameless
  assert set(result['phases']) >= {'prefill', 'decode', 'score', 'reward', 'update'}
  # no parameter is gathered for each token: the loop exchanges whether all rows are done, and no
  # more
  inside = [s for s in result['collectives'] if s['phase'] == 'decode' and s['in_loop']]
  assert max((s['bytes'] / s['times'] for s in inside), default=0) <= 64, inside
  assert result['needed']['decode'][1] == 0
  text = estimate_page.describe('tiny', result)
  assert 'peak' in text and '| decode |' in text and 'Decode loop' in text
  row = estimate_page.summary({'tiny': json.loads(json.dumps(result))})
  assert '| tiny | 1 x 8 x 1 x 1 |' in row


@pytest.mark.parametrize('stage', ['pretrain', 'sft', 'rm'])
def test_the_steps_of_the_other_stages(stage):
  made = abstract.setup(tiny(), jax.devices())
  module = __import__('importlib').import_module(tiny().stages[stage].build.split(':')[0])
  plan = module.abstract_step(made, stage)
  state, metrics, _ = jax.eval_shape(plan.step, *plan.arguments)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(state) == shapes(plan.arguments[0]) and metrics
  assert set(plan.work) == {'update'}


def test_seeds_share_the_program_of_an_iteration(tmp_path):
  def program(seed):
    c = base.get_config('tiny')
    c.seed = seed
    plan = ppo_ptx.abstract_step(make_setup(c, tmp_path), 'ppo')
    return plan.step.lower(*plan.arguments).as_text()

  assert program(1) == program(2)


def test_what_the_mathematics_needs():
  """A model of two layers, by hand: bytes of weights and activations on a mesh of 2 x 2 x 2."""
  from alignjax.configs import base

  config = base.get_config('tiny')
  config.mesh.update(data=2, fsdp=2, tensor=2)
  config.model.update(
    num_layers=2, d_model=32, num_heads=4, vocab_size=100, max_length=96, dtype='bfloat16'
  )
  made = abstract.setup(config, jax.devices())
  matrices = 2 * (4 * 32 * 32 + 8 * 32 * 32)  # of both layers
  work = lambda kind, **kw: abstract.Work(
    kind, made.policy_model, 'lm', **(dict(rows=8, length=10) | kw)
  )
  seen = 4 * 2 * 32 * 5 * 80
  assert abstract.model_flops(work('forward')) == 2 * 80 * (matrices + 32 * 100) + seen
  assert abstract.model_flops(work('update', times=3)) == 9 * abstract.model_flops(work('forward'))
  # the other half, over fsdp, of what tensor splits in two, in bfloat16
  half = 2 * (matrices + 32 * 100) / 2 / 2
  assert abstract.wire_bytes(made, work('gather')) == half
  # two a layer, there and back, half of it comes from the other device
  sums = 2 * 2 * 2 * 0.5 * 8 * 10 * 32 * 2 / 4
  assert abstract.wire_bytes(made, work('decode')) == sums
  assert abstract.wire_bytes(made, work('forward')) == half + sums
  # Two devices share the tokens of each row and, with two of fsdp, the weights: 3/4 of all of them
  # come from others; and of keys and values, 2 x 32 numbers of each token and layer, half.
  config.mesh.update(data=2, fsdp=2, tensor=1, sequence=2)
  shared = abstract.setup(config, jax.devices())
  most = 2 * (matrices + 32 * 100) * 3 / 4
  keys = 2 * 80 * 2 * 32 * 2 / 4 / 2
  assert abstract.wire_bytes(shared, work('gather')) == most
  assert abstract.wire_bytes(shared, work('decode')) == 0
  assert abstract.wire_bytes(shared, work('forward')) == most + keys
  # What four devices have summed is summed over data, and norms and biases over all eight.
  copied = 2 * 2 * (matrices + 32 * 100) / 4 / 2 + 2 * 2 * (5 * 64 + 2 * (128 + 32 + 32)) * 7 / 8
  assert abstract.wire_bytes(shared, work('update')) == 3 * most + copied + 2 * keys
  # Adapters alone: the gradient of a matrix is neither computed nor sent.
  once = 4 * 80 * (matrices + 32 * 100) + 3 * seen
  assert abstract.model_flops(work('update', adapters=True)) == once
  assert abstract.wire_bytes(made, work('update', adapters=True)) == 2 * half + 2 * sums


@pytest.mark.parametrize(
  'topology,words',
  [
    ('v5q:4x4', "no chip 'v5q'.*Did you mean 'v5p'"),
    ('v5e', 'form CHIP:SHAPE'),
    ('v5e:4by4', 'form CHIP:SHAPE'),
  ],
)
def test_unknown_topologies(topology, words):
  with pytest.raises(ValueError, match=words):
    chips.of_topology(topology)


def test_chips_of_devices():
  peak = lambda kind: chips.CHIPS[chips.of_device(kind)].flops
  assert chips.of_device('TPU v5 lite') == 'v5e'
  assert (peak('NVIDIA H100 80GB HBM3'), peak('NVIDIA H100 PCIe'), peak('NVIDIA H100 NVL')) == (
    989e12,
    756e12,
    835e12,
  )
  assert (peak('NVIDIA H200'), peak('NVIDIA H200 NVL'), peak('NVIDIA A100-SXM4-40GB')) == (
    989e12,
    835e12,
    312e12,
  )
  bandwidth = lambda kind: chips.CHIPS[chips.of_device(kind)].bandwidth
  assert (bandwidth('NVIDIA A100-SXM4-80GB'), bandwidth('NVIDIA A100 80GB PCIe')) == (
    2039e9,
    1935e9,
  )
  assert all(name in chips.CHIPS for name in chips.KINDS.values())
  for unknown in (
    'cpu',
    'NVIDIA GH200 480GB',
    'NVIDIA H100 80GB HBM3 MIG 1g.10gb',
    'NVIDIA A100X',
    'NVIDIA H20',
  ):
    assert chips.of_device(unknown) is None, unknown


def test_a_missing_compiler_and_an_unknown_stage_are_errors_that_say_what_to_do(monkeypatch):
  monkeypatch.setenv('TPU_LIBRARY_PATH', '/nowhere/libtpu.so')
  with pytest.raises(
    FileNotFoundError,
    match=r"(?s)/nowhere.*pip install .*--target .* 'libtpu==.*export TPU_LIBRARY_PATH=",
  ):
    command.find_libtpu()
  with pytest.raises(ValueError, match='--stage=ppo_pty.*ppo_ptx'):
    command.compile_stage(tiny(), 'ppo_pty', jax.devices(), None)


def test_the_command_ends_with_one_sentence():
  run = [
    sys.executable,
    str(ROOT / 'experiments/estimate.py'),
    '--config=configs/ppo_ptx.py:tiny',
    '--topology=v7:2x2',
  ]
  done = subprocess.run(run, capture_output=True, text=True, check=False)
  assert done.returncode == 1 and done.stderr.startswith(
    "error: --topology=v7:2x2: no chip 'v7'"
  ), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
  not os.environ.get('TPU_LIBRARY_PATH'),
  reason='TPU_LIBRARY_PATH names no libtpu: see experiments/estimate.py',
)
def test_a_step_compiled_for_a_tpu_slice(tmp_path):
  """Tiny SFT for 16 v5e chips, in a process of its own: an interpreter holds one libtpu."""
  run = [
    sys.executable,
    str(ROOT / 'experiments/estimate.py'),
    '--config=configs/ppo_ptx.py:tiny',
    '--topology=v5e:4x4',
    '--stage=sft',
    '--config.mesh.fsdp=16',
    f'--out={tmp_path}',
  ]
  done = subprocess.run(
    run, capture_output=True, text=True, check=False, env=os.environ | {'XLA_FLAGS': ''}
  )
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'ppo_ptx-sft-v5e-4x4.json').read_text())
  assert found['devices'] == 16 and found['capacity'] == 15.75 * 2**30 and 0 < found['peak'] < 2**30
  assert found['phases']['update']['wire'] > 0 and found['seconds'][0] > 0
  assert '| ppo_ptx sft v5e:4x4 |' in (tmp_path / 'table.md').read_text()


def test_attention_and_logits_in_chunks_change_nothing_but_memory():
  from alignjax.models import transformer
  from tests.fakes import close, config, model, token_batch

  cfg, nets, params, _ = model('llama')
  chunked = transformer.make_networks(config('llama', attention_chunk=3, logits_chunk=8))
  batch = token_batch(0)
  loss = lambda nets: (
    lambda p: jnp.sum(nets.logprobs(p, batch.tokens, batch.mask)[0] * batch.weights)
  )
  for one, other in zip(
    *(jax.tree.leaves(jax.jit(jax.value_and_grad(loss(n)))(params)) for n in (nets, chunked)),
    strict=True,
  ):
    close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize('samples', [1, 2])
def test_generation_in_groups_draws_the_same_responses(samples):
  from alignjax.sampling import generate
  from tests.fakes import model, prompts

  _, nets, params, _ = model()
  run = lambda groups: jax.jit(
    lambda p, *x: generate(
      nets.decoder,
      p,
      *x,
      jax.random.key(3),
      max_tokens=8,
      stop_ids=(3, 4),
      samples_per_prompt=samples,
      prompts_at_once=groups,
    )
  )(params, *prompts(0))
  whole, parts = run(None), run(2)
  assert (whole.responses == parts.responses).all() and (whole.mask == parts.mask).all()
  np.testing.assert_allclose(whole.logprobs, parts.logprobs, rtol=1e-4, atol=1e-5)
  assert len(np.unique(np.asarray(whole.responses), axis=0)) > 2


def test_what_is_alive_together():
  """x and y and z of 400 bytes: y and z are alive when z is made, x is read for the last time then;
  u takes z's place in time."""
  line = lambda name, what: (
    f'  %{name} = f32[100]{{0}} {what}, metadata={{op_name="jit(s)/update/{name}"}}'
  )
  text = '\n'.join(
    [
      'ENTRY %main (p: f32[100]) -> f32[100] {',
      '  %p = f32[100]{0} parameter(0)',
      line('x', 'sine(%p)'),
      line('y', 'cosine(%x)'),
      line('z', 'add(%x, %y)'),
      line('u', 'multiply(%z, %y)'),
      '  ROOT %out = f32[100]{0} negate(%u)',
      '}',
    ]
  )
  size, live = liveness.peak(hlo.parse(text))
  assert size == 1200 and {x.op_name[-1] for x in live} == set('xyz')


def test_a_collective_behind_several_fusions_is_one():
  """As TPU programs hide them: a start, a step in a loop further in, an end, all naming the gather
  of one channel. And the sum of which every device keeps a piece, in one fusion, is a
  reduce-scatter."""
  gather = (
    'all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="3"}, '
    'metadata={op_name="jit(s)/update/g"}'
  )
  part = lambda name: [
    f'%{name} (p: f32[2]) -> f32[16] {{',
    '  %p = f32[2]{0} parameter(0)',
    f'  ROOT %g = f32[16]{{0}} {gather}',
    '}',
  ]
  text = '\n'.join(
    [
      *part('start'),
      *part('step'),
      *part('end'),
      '%scatter (i: f32[16]) -> f32[2] {',
      '  %i = f32[16]{0} parameter(0)',
      '  %z = s32[] constant(0)',
      '  %r = f32[16]{0} all-reduce(%i), replica_groups=[1,8]<=[8], to_apply=%add, '
      'metadata={op_name="jit(s)/update/r"}',
      '  ROOT %d = f32[2]{0} dynamic-slice(%r, %z), dynamic_slice_sizes={2}',
      '}',
      '%body (t: (s32[], f32[2])) -> (s32[], f32[2]) {',
      '  %t = (s32[], f32[2]{0}) parameter(0)',
      '  %i = s32[] get-tuple-element(%t), index=0',
      '  %one = s32[] constant(1)',
      '  %next = s32[] add(%i, %one)',
      '  %x = f32[2]{0} get-tuple-element(%t), index=1',
      '  %y = f32[16]{0} fusion(%x), kind=kOutput, calls=%step',
      '  ROOT %u = (s32[], f32[2]{0}) tuple(%next, %x)',
      '}',
      '%condition (t: (s32[], f32[2])) -> pred[] {',
      '  %t = (s32[], f32[2]{0}) parameter(0)',
      '  %i = s32[] get-tuple-element(%t), index=0',
      '  %four = s32[] constant(4)',
      '  ROOT %lt = pred[] compare(%i, %four), direction=LT',
      '}',
      'ENTRY %main (p: f32[2]) -> f32[2] {',
      '  %p = f32[2]{0} parameter(0)',
      '  %zero = s32[] constant(0)',
      '  %a = f32[16]{0} fusion(%p), kind=kCustom, calls=%start',
      '  %t = (s32[], f32[2]{0}) tuple(%zero, %p)',
      '  %w = (s32[], f32[2]{0}) while(%t), condition=%condition, body=%body',
      '  %b = f32[16]{0} fusion(%p), kind=kCustom, calls=%end',
      '  ROOT %c = f32[2]{0} fusion(%b), kind=kCustom, calls=%scatter',
      '}',
    ]
  )
  _, sent = cost.analyse(hlo.parse(text), dict(data=1, fsdp=8, tensor=1), None)
  assert sorted((s.kind, s.times, s.bytes) for s in sent) == [
    ('all-gather', 1, 7 * 8),
    ('reduce-scatter', 1, 64 * 7 // 8),
  ]
