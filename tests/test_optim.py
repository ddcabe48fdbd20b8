"""Optimizers by hand-computed numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import optim
from alignjax.models import transformer
from tests.fakes import close, config


def run(tx, grads, start=0.0):
  params = {'x': jnp.full((2, 2), start, jnp.float32)}
  state, out = tx.init(params), []
  for g in grads:
    updates, state = tx.update({'x': jnp.full((2, 2), g, jnp.float32)}, state, params)
    params = {'x': params['x'] + updates['x']}
    out.append(float(params['x'][0, 0]))
  return out


@pytest.mark.parametrize('form', ['torch', 'tensorflow'])
def test_item_17_both_forms_of_epsilon(form):
  b1, b2, eps, lr, grads = 0.9, 0.95, 1e-2, 0.1, [0.01, -0.02, 0.03]
  m = v = x = 0.0
  expected = []
  for t, g in enumerate(grads, 1):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    if form == 'torch':
      x -= lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    else:
      x -= lr * np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
    expected.append(x)
  close(
    run(optim.adam(steps=3, lr=lr, b1=b1, b2=b2, eps=eps, eps_form=form), grads),
    expected,
    rtol=1e-4,
  )


def test_item_17_the_tensorflow_form_is_gentler_early_on():
  first = {
    form: abs(run(optim.adam(steps=1, lr=0.1, eps=1e-2, eps_form=form), [0.01])[0])
    for form in ('torch', 'tensorflow')
  }
  assert first['tensorflow'] < 0.5 * first['torch']


def test_schedules_by_hand():
  rate = optim.make_schedule(
    steps=100, lr=1.0, schedule='cosine', warmup=0, warmup_from=0.0, final=0.1
  )
  close([rate(0), rate(50), rate(100)], [1.0, 0.55, 0.1])
  rate = optim.make_schedule(
    steps=100, lr=2.0, schedule='constant', warmup=10, warmup_from=0.1, final=0.1
  )
  close([rate(0), rate(5), rate(10), rate(99)], [0.2, 1.1, 2.0, 2.0])
  rate = optim.make_schedule(
    steps=100, lr=1.0, schedule='cosine', warmup=0.2, warmup_from=0.0, final=0.0
  )
  close([rate(0), rate(10), rate(20), rate(60), rate(100)], [0, 0.5, 1.0, 0.5, 0.0], atol=1e-6)
  rate = optim.make_schedule(
    steps=10, lr=1.0, schedule='constant', warmup=0.99, warmup_from=0.0, final=0.0
  )
  # a share of the run leaves its last update at the peak
  close([rate(0), rate(3), rate(9)], [0, 1 / 3, 1])


def test_policy_and_value_have_their_own():
  tx = optim.make({'policy': optim.adam(steps=1, lr=0.1), 'value': optim.adam(steps=1, lr=0.3)})
  params = {'policy': {'x': jnp.zeros(2)}, 'value': {'x': jnp.zeros(2)}}
  updates, _ = tx.update({k: {'x': jnp.ones(2)} for k in params}, tx.init(params), params)
  close(updates['policy']['x'], [-0.1, -0.1], rtol=1e-3)
  close(updates['value']['x'], [-0.3, -0.3], rtol=1e-3)


def test_decay_is_of_matrices_and_clipping_of_the_whole_entry():
  tx = optim.adam(steps=1, lr=1.0, weight_decay=0.5)
  params = {'w': jnp.ones((2, 2)), 'b': jnp.ones(2)}
  updates, _ = tx.update({'w': jnp.zeros((2, 2)), 'b': jnp.zeros(2)}, tx.init(params), params)
  close(updates['w'], -0.5 * np.ones((2, 2)))
  close(updates['b'], np.zeros(2))
  clipped = optim.adam(steps=1, lr=1.0, b1=0.0, b2=0.0, eps=1.0, clip_norm=1.0)
  updates, _ = clipped.update(
    {'w': 3 * jnp.ones((1, 1)), 'b': 4 * jnp.ones(1)}, clipped.init(params), params
  )
  close(updates['w'][0, 0], -0.6 / 1.6)
  close(updates['b'][0], -0.8 / 1.8)


@pytest.mark.parametrize('head', ['lm', 'scalar'])
@pytest.mark.parametrize('family', ['gpt2', 'llama', 'neox'])
def test_decay_leaves_stacked_norms_and_biases_alone(family, head):
  """A real tree, whose layers are stacked: a norm's scale is [L,D] and a bias of the projections
  [L,NH]."""
  shapes = jax.eval_shape(
    lambda: transformer.init(config(family, qk_norm=family == 'llama'), jax.random.key(0), head)
  )
  params = {'policy': jax.tree.map(lambda x: jnp.ones(x.shape), shapes)}
  tx = optim.make({'policy': optim.adam(steps=1, lr=1.0, weight_decay=0.5)})
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  left, found = {'tokens', 'positions', 'kernel'}, set()
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    found.add(path[-1].key)
    close(update, np.full(update.shape, -0.5 if path[-1].key in left else 0.0))
  assert found >= {'tokens', 'kernel', 'scale'} and ('bias' in found or head == 'lm')


def test_decay_of_a_parameter_of_a_fork_goes_by_the_shape_in_a_layer():
  arrays = {
    'layers': {'gain': jnp.ones((2, 3)), 'mix': jnp.ones((2, 3, 3)), 'bias': jnp.ones((2, 4, 3))},
    'gain': jnp.ones(3),
  }
  assert optim.decays(arrays) == {
    'layers': {'gain': False, 'mix': True, 'bias': False},
    'gain': False,
  }


@pytest.mark.parametrize(
  'wrong,words',
  [
    (dict(schedule='linear'), 'linear'),
    (dict(eps_form='keras'), 'keras'),
    (dict(warmup=5), 'only 3'),
  ],
)
def test_wrong_choices_are_refused(wrong, words):
  with pytest.raises(ValueError, match=words):
    optim.adam(steps=3, lr=1.0, **wrong)


@pytest.mark.parametrize('largest', [0.0, -1.0, float('nan')])
def test_a_norm_that_cannot_be_clipped_to_is_refused(largest):
  with pytest.raises(ValueError, match='clip_norm=.* must be above 0, or None'):
    optim.adam(steps=1, lr=1.0, clip_norm=largest)
