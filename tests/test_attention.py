"""Every path of attention agrees with the reference, and a token reads neither pads nor other
documents; backward products run in the dtype of the model."""

import functools
import types

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import ops, sharding
from alignjax.models import attention, products, transformer
from alignjax.models.attention import Machine
from tests.fakes import close, config, model

CPU, GPU, TPU = Machine('cpu'), Machine('gpu', 9.0), Machine('tpu')
ROWS, LENGTH, KINDS = 3, 20, ('left', 'right', 'packed')


def masks(kind, seed):
  """Rows of 20 tokens: padded on the left, on the right, or packed with pads at the end."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, LENGTH, ROWS)[:, None]
  column = np.arange(LENGTH)[None]
  if kind == 'packed':
    starts = rng.random((ROWS, LENGTH)) < 0.2
    return jnp.asarray(np.where(column < lengths, 1 + starts.cumsum(1), 0), jnp.int32)
  return jnp.asarray(column >= LENGTH - lengths if kind == 'left' else column < lengths)


def inputs(seed, heads=4, groups=2, width=8):
  rng = np.random.default_rng(seed)
  make = lambda n: jnp.asarray(rng.normal(0, 1, (ROWS, LENGTH, n, width)), jnp.float32)
  return make(heads), make(groups), make(groups), make(heads)


def by_loops(q, k, v, mask, window=LENGTH, scale=None, cap=None):
  """Attention of each query to the tokens of its document up to itself, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  mask, out, share = np.asarray(mask).astype(int), np.zeros(q.shape), q.shape[2] // k.shape[2]
  for b, t, n in np.ndindex(*q.shape[:3]):
    seen = [s for s in range(max(t + 1 - window, 0), t + 1) if mask[b, s] == mask[b, t] > 0]
    if seen:
      logits = np.array([q[b, t, n] @ k[b, s, n // share] for s in seen])
      logits = logits * (scale or 1 / np.sqrt(q.shape[-1]))
      logits = cap * np.tanh(logits / cap) if cap else logits
      weights = np.exp(logits - logits.max())
      out[b, t, n] = weights / weights.sum() @ v[b, seen, n // share]
  return out


def by_cudnn(q, k, v, mask, **options):
  """What the model does around cuDNN, with the same call of jax.nn by XLA."""
  call = functools.partial(attention.cudnn, implementation='xla', **options)
  if mask.dtype != bool:
    return call(q, k, v, mask)
  order = attention.pads_last(mask)
  out = call(*(attention.moved(x, order.there) for x in (q, k, v, mask)))
  return attention.moved(out, order.back)


PATHS = {
  'reference': attention.reference,
  'chunks': functools.partial(attention.reference, chunk=7),
  'cudnn': by_cudnn,
  'splash': functools.partial(attention.splash, interpret=True),
}


@functools.cache
def with_gradients(path, **options):
  """(output, gradients of q, k and v) of a path."""

  def run(q, k, v, direction, mask):
    out, back = jax.vjp(lambda *x: PATHS[path](*x, mask, **options), q, k, v)
    return out, back(direction)

  return jax.jit(run)


@pytest.mark.sampled(8)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('seed', [0, 1])
def test_every_path_is_the_loop_and_has_the_gradients_of_the_reference(path, kind, seed):
  q, k, v, direction = inputs(seed)
  mask = masks(kind, seed)
  out, grads = with_gradients(path)(q, k, v, direction, mask)
  close(out, by_loops(q, k, v, mask), rtol=1e-4, atol=1e-5)
  assert (np.asarray(out)[np.asarray(mask) == 0] == 0).all()
  expected = with_gradients('reference')(q, k, v, direction, mask)[1]
  for one, other in zip(grads, expected, strict=True):
    close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(8)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('window', [1, 5])
def test_a_window_a_scale_and_a_cap(path, kind, window):
  """Of a chunk with a window, keys before it are cut off; cuDNN has no cap."""
  q, k, v, direction = inputs(7)
  mask = masks(kind, 7)
  options = dict(window=window, scale=0.9, cap=1.5)
  if path == 'cudnn':
    options.pop('cap')
  out, grads = with_gradients(path, **options)(q, k, v, direction, mask)
  close(out, by_loops(q, k, v, mask, **options), rtol=1e-4, atol=1e-5)
  expected = with_gradients('reference', **options)(q, k, v, direction, mask)[1]
  for one, other in zip(grads, expected, strict=True):
    close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('path', PATHS)
def test_what_stands_at_a_pad_changes_nothing(path, kind):
  """Neither an output, nor a gradient, even where the cotangent is not 0 there; and no gradient
  reaches a pad."""
  q, k, v, direction = inputs(5)
  mask = masks(kind, 5)
  dead = (np.asarray(mask) == 0)[..., None, None]
  run = with_gradients(path)
  out, grads = run(q, k, v, direction, mask)
  spoiled = (jnp.where(dead, 7.0, x) for x in (q, k, v, direction))
  again = run(*spoiled, mask)
  jax.tree.map(functools.partial(close, rtol=1e-6, atol=1e-7), again, (out, grads))
  for grad in grads:
    assert (np.asarray(grad) * dead == 0).all()


def test_a_document_in_a_packed_row_is_the_document_alone():
  q, k, v, direction = inputs(6)
  mask = masks('packed', 6)
  for path in PATHS:
    out, grads = with_gradients(path)(q, k, v, direction, mask)
    for number in np.unique(mask[0])[1:]:
      at = np.flatnonzero(np.asarray(mask[0]) == number)
      some = [x[:1, at] for x in (q, k, v, direction)]
      alone, back = jax.vjp(
        lambda *x: attention.reference(*x, jnp.ones((1, len(at)), bool)),  # noqa: B023
        *some[:3],
      )
      close(out[:1, at], alone, rtol=1e-4, atol=1e-5)
      for one, other in zip(grads, back(some[3]), strict=True):
        close(one[:1, at], other, rtol=1e-4, atol=1e-5)


def test_pads_last():
  """By hand, a hole among the tokens too; moving back is the inverse."""
  mask = jnp.array([[0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]], bool)
  order = attention.pads_last(mask)
  assert order.there.tolist() == [[1, 2, 0, 3], [0, 2, 3, 1], [0, 1, 2, 3]]
  x = jnp.arange(12.0).reshape(3, 4)
  assert attention.moved(x, order.there)[1].tolist() == [4, 6, 7, 5]
  assert (attention.moved(attention.moved(x, order.there), order.back) == x).all()
  assert ops.positions(mask)[0].tolist() == [0, 0, 1, 1]


@pytest.mark.sampled
@pytest.mark.parametrize('family,kind', [('gpt2', 'left'), ('llama', 'right'), ('llama', 'packed')])
def test_a_model_that_runs_cudnn_scores_as_the_reference(family, kind, monkeypatch):
  """Log-probabilities, their gradients, scalars, and the cache of a prefill, with pads moved and
  the vocabulary lengthened."""
  monkeypatch.setattr(attention, 'chosen', lambda cfg, machine: names[machine.platform])
  monkeypatch.setattr(attention, 'cudnn', functools.partial(attention.cudnn, implementation='xla'))
  names = {'cpu': 'reference', 'gpu': 'cudnn'}
  _, _, params, scalar = model(family)
  mask = masks(kind, 2)
  tokens = jax.random.randint(jax.random.key(1), mask.shape, 0, 50, jnp.int32)
  live = (mask > 0) & (jnp.arange(LENGTH) > 0)[None]

  def results(machine):
    nets = transformer.make_networks(config(family), machine=machine)

    @jax.jit
    def run(params, scalar):
      score = lambda p: (jnp.where(live, nets.logprobs(p, tokens, mask)[0], 0) ** 2).sum()
      values = jnp.where(mask > 0, nets.scalar(scalar, tokens, mask), 0)
      logprobs = [jnp.where(live, x, 0) for x in nets.logprobs(params, tokens, mask)]
      out = logprobs, values, jax.grad(score)(params)
      if kind != 'left':
        return out
      _, cache = nets.decoder.prefill(nets.decoder.prepare(params), tokens, mask)
      return *out, [jnp.where(mask[:, None, :, None], k, 0) for k, _ in cache.prompt]

    return run(params, scalar)

  jax.tree.map(
    functools.partial(close, rtol=2e-3, atol=1e-4), results(Machine('gpu')), results(CPU)
  )


def test_splash_on_a_mesh_is_the_reference_on_one_device():
  """Rows over four devices and heads over two, forward and backward."""
  sharder = sharding.Sharder(sharding.make_mesh(2, 2, 2))
  assert sharder.machine.platform == 'cpu'
  q, k, v, direction = (jnp.concatenate([x, x[:1]]) for x in inputs(7))
  mask = jnp.concatenate([masks('packed', 7), masks('packed', 8)[:1]])
  split = sharder.per_device(PATHS['splash'], attention.AXES, attention.AXES[0])

  def run(attend):
    out, back = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
    return out, back(direction)

  one, other = jax.jit(lambda: run(split))(), jax.jit(lambda: run(attention.reference))()
  jax.tree.map(functools.partial(close, rtol=1e-4, atol=1e-5), one, other)
  with pytest.raises(ValueError, match='kernel gets 3 rows at a time, which the 4 devices .*micro'):
    split(q[:3], k[:3], v[:3], mask[:3])


@pytest.mark.parametrize(
  'machine,changes,kernel',
  [
    (CPU, dict(dtype='bfloat16'), 'reference'),
    (GPU, dict(dtype='bfloat16'), 'cudnn'),
    (GPU, dict(dtype='float16'), 'cudnn'),
    (GPU, {}, 'reference'),
    (GPU, dict(dtype='bfloat16', attention='reference'), 'reference'),
    (GPU, dict(dtype='bfloat16', head_dim=12), 'reference'),
    (GPU, dict(dtype='bfloat16', head_dim=256), 'cudnn'),
    (Machine('gpu', 8.0), dict(dtype='bfloat16', head_dim=256), 'reference'),
    (Machine('gpu', 7.5), dict(dtype='float16'), 'reference'),
    (TPU, dict(dtype='bfloat16'), 'splash'),
    (TPU, {}, 'reference'),
    (Machine('tpu', grouped=False), dict(dtype='bfloat16', num_kv_heads=2), 'reference'),
    (Machine('tpu', grouped=False), dict(dtype='bfloat16'), 'splash'),
  ],
)
def test_the_kernel_is_chosen_by_platform_dtype_and_width(machine, changes, kernel):
  assert attention.chosen(config(**changes), machine) == kernel


@pytest.mark.parametrize(
  'machine,changes,words',
  [
    (CPU, dict(attention='cudnn', dtype='bfloat16'), 'runs on a GPU, and this mesh is of CPUs'),
    (GPU, dict(attention='splash', dtype='bfloat16'), 'runs on a TPU, and this mesh is of GPUs'),
    (GPU, dict(attention='cudnn'), 'model.dtype is float32'),
    (GPU, dict(attention='cudnn', dtype='bfloat16', head_dim=12), 'multiple of 8, but has 12'),
    (
      Machine('gpu', 7.5),
      dict(attention='cudnn', dtype='float16'),
      '8.0 or more, and this one has 7.5',
    ),
  ],
)
def test_a_kernel_that_cannot_be_used_is_refused_with_the_reason(machine, changes, words):
  with pytest.raises(ValueError, match=words):
    transformer.make_networks(config(**changes), machine=machine)


def test_the_machine_of_a_device():
  """A topology's device need not be attached; a GPU that is not NVIDIA's has another capability."""
  device = lambda **kw: types.SimpleNamespace(**kw)
  found = attention.machine_of(device(platform='gpu', compute_capability='9.0'))
  assert found == Machine('gpu', 9.0)
  amd = attention.machine_of(device(platform='gpu', compute_capability='gfx90a'))
  assert attention.chosen(config(dtype='bfloat16'), amd) == 'reference'
  assert attention.machine_of(device(platform='tpu')) == Machine('tpu')
  assert attention.machine_of(jax.devices('cpu')[0]) == Machine('cpu')


def every(jaxpr):
  """All equations of a program, inner ones too."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from every(inner)


@pytest.mark.parametrize('family', ['gpt2', 'llama'])
def test_a_bfloat16_model_has_no_float32_product_but_the_scalar_head(family):
  cfg = config(family, dtype='bfloat16', remat='full', attention_chunk=8)
  nets = transformer.make_networks(cfg)
  _, _, params, scalar = model(family)
  tokens, mask = jnp.zeros((2, LENGTH), jnp.int32), jnp.ones((2, LENGTH), bool)
  for head, found in (
    (lambda p: nets.logprobs(p, tokens, mask)[0].sum(), set()),
    (lambda p: nets.scalar(p, tokens, mask).sum(), {(32, 1), (1,)}),
  ):
    program = jax.make_jaxpr(jax.grad(head))(scalar if found else params)
    wide = [
      e.invars
      for e in every(program.jaxpr)
      if e.primitive.name == 'dot_general' and any(x.aval.dtype == jnp.float32 for x in e.invars)
    ]
    assert len(wide) == (3 if found else 0)
    assert all(any(1 in x.aval.shape for x in pair) for pair in wide)


def test_gradients_in_bfloat16_are_those_of_float32_to_its_rounding():
  _, nets, params, _ = model('llama')
  half = transformer.make_networks(config('llama', dtype='bfloat16'))
  tokens = jax.random.randint(jax.random.key(0), (4, LENGTH), 0, 50, jnp.int32)
  mask = jnp.ones(tokens.shape, bool)
  grad = lambda nets: jax.jit(jax.grad(lambda p: nets.logprobs(p, tokens, mask)[0].mean()))(params)
  for one, other in zip(jax.tree.leaves(grad(half)), jax.tree.leaves(grad(nets)), strict=True):
    assert one.dtype == jnp.float32
    assert float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other)) < 0.05


def test_the_products_of_to_float32():
  """By hand: the forward result is not rounded, the cotangent is, and each sum is exact before it
  is rounded."""
  dims = (((1,), (0,)), ((), ()))
  a = jnp.asarray([[1.0, 2.0**-8]], jnp.bfloat16)
  b = jnp.ones((2, 3), jnp.bfloat16)
  out, back = jax.vjp(lambda a, b: products.to_float32(a, b, dims), a, b)
  assert out.dtype == jnp.float32 and (out == 1 + 2.0**-8).all()
  left, right = back(jnp.asarray([[1 + 2.0**-9, 1.0, 2.0]], jnp.float32))
  assert left.dtype == right.dtype == jnp.bfloat16
  assert left.tolist() == [[4.0, 4.0]] and right.tolist() == [
    [1.0, 1.0, 2.0],
    [2**-8, 2**-8, 2**-7],
  ]
  plain = lambda a, b: jax.lax.dot_general(a, b, dims)
  rng = np.random.default_rng(0)
  x, y, g = (jnp.asarray(rng.normal(0, 1, s), jnp.float32) for s in ((4, 5), (5, 6), (4, 6)))
  for one, other in zip(
    jax.vjp(lambda a, b: products.to_float32(a, b, dims), x, y)[1](g),
    jax.vjp(plain, x, y)[1](g),
    strict=True,
  ):
    assert (one == other).all()


def stored(remat, family='llama'):
  """The shapes that the layers store for the backward pass, those of one layer first."""
  cfg = config(family, remat=remat, num_layers=3, d_ff=40)
  nets = transformer.make_networks(cfg)
  params = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
  tokens, mask = jnp.zeros((2, 9), jnp.int32), jnp.ones((2, 9), bool)
  program = jax.make_jaxpr(jax.grad(lambda p: nets.scalar(p, tokens, mask).sum()))
  scalar = jax.eval_shape(lambda p: transformer.with_scalar_head(cfg, p, jax.random.key(0)), params)
  forward = next(e for e in every(program(scalar).jaxpr) if e.primitive.name == 'scan')
  return sorted(
    x.aval.shape[1:] for x in forward.outvars[forward.params['num_carry'] :] if x.aval.ndim > 2
  )


def test_what_each_choice_of_remat_stores():
  """x; q, k, v and the heads' outputs; the attention projection and the MLP's two inner arrays."""
  x, q, kv, inner = (2, 9, 32), (2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 40)
  assert stored('full') == [x]
  assert stored('attention') == sorted([x, q, q, kv, kv])
  assert stored('projections') == sorted([x, x, q, q, kv, kv, inner, inner])


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('width', [64, 128])
def test_cudnn_on_a_gpu_is_the_reference_in_bfloat16(kind, width):
  """Outputs and gradients, each to 2% of the reference's norm in float32; bfloat16 has 0.4%."""
  q, k, v, direction = inputs(3, heads=4, groups=2, width=width)
  mask = masks(kind, 3)
  device = jax.devices('gpu')[0]
  machine = attention.machine_of(device)
  half = config(dtype='bfloat16', head_dim=width, num_kv_heads=2)
  assert attention.chosen(half, machine) == 'cudnn'
  kernel = attention.make(half, machine)

  def attend(q, k, v, mask):
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    if mask.dtype != bool:
      return kernel(q, k, v, mask)
    order = attention.pads_last(mask)
    out = kernel(*(attention.moved(x, order.there) for x in (q, k, v, mask)))
    return attention.moved(out, order.back)

  def run(attend):
    out, back = jax.vjp(lambda *x: attend(*x, mask).astype(jnp.float32), q, k, v)
    return out, *back(direction)

  compiled = jax.jit(lambda: run(attend)).lower().compile()
  assert '__cudnn$fmha' in compiled.as_text()
  for one, other in zip(compiled(), jax.jit(lambda: run(attention.reference))(), strict=True):
    assert float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other)) < 0.02


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('packed', [False, True])
def test_a_bfloat16_model_on_a_gpu_scores_as_in_float32(packed):
  """Log-probabilities and gradients of a whole model, remat and chunks included."""
  changes = dict(num_heads=4, num_kv_heads=2, head_dim=64, vocab_size=50)
  cfg = config('llama', **changes)
  params = jax.jit(lambda: transformer.init(cfg, jax.random.key(0)))()
  mask = masks('packed' if packed else 'left', 4)
  tokens = jax.random.randint(jax.random.key(1), mask.shape, 0, 50, jnp.int32)
  live = (mask > 0) & (jnp.arange(LENGTH) > 0)[None]

  def grads(**more):
    nets = transformer.make_networks(config('llama', **changes, **more))
    score = lambda p: jnp.where(live, nets.logprobs(p, tokens, mask)[0], 0).sum()
    return jax.jit(jax.value_and_grad(score))(params)

  exact = grads()
  for remat in ('none', 'full', 'attention', 'projections', 'dots'):
    found = grads(dtype='bfloat16', remat=remat, logits_chunk=16)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
      assert float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other)) < 0.06, remat
