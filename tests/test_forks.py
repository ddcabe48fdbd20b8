"""A fork's losses, advantages and rewards, named by 'module:function' as in a config: offline
losses as stages, RLOO/GRPO, and what is said of a function that does not do what its stage needs.
"""

import functools
import json
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses, ops, optim, plugins, rollout, train
from alignjax.commands import config_flags
from alignjax.configs import base, dpo
from alignjax.runtime import checkpoint, metrics
from alignjax.setup.objects import make_setup
from alignjax.setup.weights import initial_params
from alignjax.stages import ppo_ptx, ppo_ptx_plan, preference
from alignjax.stages.ppo_ptx import iteration
from alignjax.types import PreferenceBatch, TrainState
from examples import reward_on_the_host
from tests.fakes import comparison_batch, model, ppo_batch, prompts

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHAT = ROOT / 'tests' / 'golden' / 'chat'


def by_hand(logits, batch, per_pair):
  """The mean over prompts of the mean over ranked pairs of per_pair(log-ratio of the winner, of the
  loser), from the float64 logits of policy and reference."""
  total = []
  for b, ranks in enumerate(batch.ranks):
    ratio = {}
    for j in np.flatnonzero(ranks >= 0):
      ratio[j] = 0.0
      for t in np.flatnonzero(batch.response_mask[b, j]):
        for sign, x in zip((1, -1), logits, strict=True):
          row = x[b, j, t - 1]
          ratio[j] += sign * (row[batch.tokens[b, j, t]] - np.log(np.exp(row).sum()))
    total.append(
      np.mean([per_pair(ratio[i], ratio[j]) for i in ratio for j in ratio if ranks[i] < ranks[j]])
    )
  return np.mean(total)


def test_dpo_and_ipo_by_hand():
  """K from 2 to 9 with ties; responses begin at token 1, 2 or 3."""
  _, nets, policy, _ = model()
  ref = model(seed=3)[2]
  made = comparison_batch(0)
  first = np.random.default_rng(0).integers(1, 4, (4, 1, 1))
  batch = PreferenceBatch(
    made.tokens,
    made.mask,
    made.ranks,
    made.weights,
    response_mask=jnp.asarray(np.asarray(made.mask) & (np.arange(7)[None, None] >= first)),
  )
  batch = batch.replace(
    ref_logprobs=jax.jit(lambda b: losses.response_logprobs(ref, b, nets=nets))(batch)
  )
  flat = [x.reshape(4 * 9, 7) for x in (batch.tokens, batch.mask)]
  logits = [
    np.asarray(jax.jit(nets.logits)(p, *flat), np.float64).reshape(4, 9, 7, -1)
    for p in (policy, ref)
  ]
  expect = lambda per_pair: by_hand(logits, jax.tree.map(np.asarray, batch), per_pair)

  ready = batch.normalized()
  fork = plugins.bind(dict(fn='examples.fork_losses:ipo', beta=0.3), 'loss', given=('nets',))
  (loss, measured), (ipo, _) = jax.jit(
    lambda p: [
      f({'policy': p}, ready, None, nets=nets)
      for f in (functools.partial(losses.dpo, beta=0.3), fork)
    ]
  )(policy)
  assert loss == pytest.approx(
    expect(lambda won, lost: np.log1p(np.exp(-0.3 * (won - lost)))), rel=1e-4
  )
  assert measured['dpo/loss'] == pytest.approx(float(loss))
  assert measured['dpo/accuracy'] == pytest.approx(expect(lambda won, lost: won > lost))
  assert measured['dpo/margin'] == pytest.approx(
    expect(lambda won, lost: 0.3 * (won - lost)), rel=1e-3, abs=1e-4
  )
  assert ipo == pytest.approx(expect(lambda won, lost: (won - lost - 1 / 0.6) ** 2), rel=1e-4)


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return f'jsonl:{path}'


def offline(folder, **changes):
  """configs/dpo.py on a file of 24 rankings in which the answers of one letter win, from random
  weights."""
  rng = np.random.default_rng(0)
  c = dpo.get_config('tiny')
  worse = lambda i: ['b' * int(n) for n in rng.integers(1, 4, 1 + i % 2)]
  rows = [
    dict(prompt=f'q{i}', responses=['aaa', *worse(i)], ranks=[0, 1, 1][: 2 + i % 2])
    for i in range(24)
  ]
  c.data.update(
    tokenizer=f'hf:{CHAT}',
    template='plain',
    comparisons=write(folder / 'c.jsonl', rows),
    prompt_length=4,
    response_length=6,
    row_length=12,
  )
  c.data.heldout.share = 0.0
  c.model.update(num_layers=1, d_model=32, num_heads=2, max_length=32)
  c.stages.dpo.update(
    init=dict(policy='random', ref='random'),
    prompts=None,
    policies=(),
    k_buckets=(3,),
    row_lengths=(),
    responses_per_batch=12,
    epochs=3,
    log_every=1,
  )
  c.stages.dpo.optimizer.policy.lr = 1e-2
  c.update_from_flattened_dict(changes)
  return c


@pytest.fixture(scope='module')
def one_device():
  with pytest.MonkeyPatch.context() as m:
    one = jax.devices()[:1]
    m.setattr(jax, 'devices', lambda *_: one)
    yield


def test_dpo_is_a_stage(one_device, tmp_path):
  train.main(offline(tmp_path), tmp_path / 'run')
  log = metrics.read(tmp_path / 'run' / 'dpo' / 'metrics.jsonl')
  assert log['dpo/loss'][0] == pytest.approx(np.log(2), abs=1e-6) and log['dpo/margin'][0] == 0, (
    'policy == reference at the start'
  )
  assert (
    len(log['step']) == 3 * 24 // 4
    and log['dpo/accuracy'][-3:].min() == 1
    and log['dpo/loss'][-1] < 0.6
  )
  setup = make_setup(offline(tmp_path), tmp_path / 'run')
  assert checkpoint.load_info(tmp_path / 'run/dpo/final')['prompts'] == 24
  before, after = (
    initial_params(setup, 'random', 'lm', 0),
    initial_params(setup, 'stage:dpo', 'lm', 0),
  )
  assert not checkpoint.same(before, after)


@pytest.mark.sampled
@pytest.mark.parametrize('loss', ['ipo', 'simpo', 'kto'])
def test_a_forks_offline_loss_is_a_function_and_a_config(one_device, loss, tmp_path):
  c = offline(tmp_path)
  c.stages.dpo.loss = dict(fn=f'examples.fork_losses:{loss}', beta=0.5)
  if loss == 'simpo':
    c.stages.dpo.init.ref = None
  c.stages.dpo.microbatches = 2
  setup = make_setup(c.lock(), tmp_path)
  preference.check(setup, 'dpo')
  stage = preference.build(setup, 'dpo')
  state, values = stage.state, []
  for i in range(stage.num_steps):
    state, measured, _ = stage.step(state, stage.batch(i))
    values.append(float(measured[f'{loss}/loss']))
  assert np.mean(values[-3:]) < np.mean(values[:3])
  if loss != 'simpo':  # policy == reference at the start: (1 / (2 beta))^2, and 1 - sigmoid(0)
    assert values[0] == pytest.approx({'ipo': 1.0, 'kto': 0.5}[loss], abs=1e-6)


def test_a_loss_that_needs_the_reference_says_so(one_device, tmp_path):
  c = offline(tmp_path)
  c.stages.dpo.init.ref = None
  with pytest.raises(
    ValueError, match=r'stages.dpo.loss: alignjax.losses:dpo .*init.ref must name its weights'
  ):
    preference.check(make_setup(c, tmp_path), 'dpo')


def new_state(params, lr):
  tx = optim.make({name: optim.adam(steps=100, lr=lr, clip_norm=1.0) for name in params})
  return TrainState(
    step=jnp.int32(0), params=params, opt_state=tx.init(params), extra={'kl_coef': jnp.float32(0.0)}
  ), tx


@pytest.mark.slow
def test_rloo_with_a_rule_for_a_reward_trains():
  _, nets, policy, scalar = model()
  state, tx = new_state({'policy': policy, 'value': scalar}, 2e-2)
  step = jax.jit(
    functools.partial(
      iteration,
      key=jax.random.key(0),
      nets=nets,
      tx=tx,
      whiten=False,
      minibatches=1,
      inner_epochs=1,
      microbatches=1,
      live_rows=None,
      ema_decay=None,
      kl_target=None,
      kl_horizon=None,
      loss_fn=plugins.bind(
        dict(fn='alignjax.losses:policy_gradient', clip_eps=0.2), 'loss', given=('nets',)
      ),
      advantage_fn=plugins.bind(
        dict(fn='alignjax.ops:leave_one_out'), 'advantage', facts=dict(samples_per_prompt=4)
      ),
      rollout_fn=functools.partial(
        rollout.collect,
        max_tokens=6,
        stop_ids=(),
        samples_per_prompt=4,
        reward_fn=plugins.bind(
          dict(fn='examples.fork_losses:many_sevens'), 'reward', given=('nets', 'frozen')
        ),
      ),
    )
  )
  frozen = {'ref': policy, 'reward': scalar}
  scores = []
  for i in range(40):
    state, found, _ = step(state, frozen, (*prompts(i, rows=16), None))
    scores.append(float(found['objective/scores']))
  assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.3
  assert 'ppo/ratio_max_dev' not in found, "no metric is asked of a fork's loss"


def test_policy_gradient_is_of_the_temperature_of_the_samples():
  """Before the first update the ratio is 1, so the loss is minus the weighted sum of advantages.
  The log-probabilities are those of the float64 logits over the temperature."""
  _, nets, policy, _ = model()
  batch = ppo_batch(0)
  tokens, mask = batch.rollout.sequences()
  logits = np.asarray(jax.jit(nets.logits)(policy, tokens, mask), np.float64)[:, :-1] / 0.5
  logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  logprobs = np.take_along_axis(logits, np.asarray(tokens)[:, 1:, None], -1)[..., 0]
  live = np.asarray(batch.rollout.mask)
  logprobs = np.where(live, logprobs[:, -live.shape[1] :], 0)
  batch = batch.replace(rollout=batch.rollout.replace(logprobs=jnp.asarray(logprobs, jnp.float32)))
  loss = plugins.bind(
    dict(fn='alignjax.losses:policy_gradient'),
    'loss',
    given=('nets',),
    facts=dict(samples_per_prompt=1, temperature=0.5),  # as the stage passes them
  )
  found, _ = jax.jit(lambda p: loss({'policy': p}, batch, None, nets=nets))(policy)
  expected = -np.sum(np.asarray(batch.weights) * np.asarray(batch.advantages))
  assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_grpo_by_a_loop():
  """Advantages of groups of two and three samples, and the loss with its KL term, in float64 and
  one token after the other."""
  rng = np.random.default_rng(3)
  rewards = rng.standard_normal((6, 4)).astype(np.float32)
  mask = np.arange(4) < rng.integers(1, 5, (6, 1))
  for k in (2, 3):
    found, returns = ops.group_relative(
      jnp.asarray(rewards), jnp.asarray(rewards), jnp.asarray(mask), samples_per_prompt=k
    )
    total = [float(r[m].astype(np.float64).sum()) for r, m in zip(rewards, mask, strict=True)]
    for i in range(6):
      own = total[i // k * k : i // k * k + k]
      expected = (total[i] - sum(own) / k) / np.std(own)
      assert np.allclose(found[i], np.where(mask[i], expected, 0), rtol=1e-4)
    assert (np.asarray(returns) == np.asarray(found)).all()
  same, _ = ops.group_relative(
    jnp.ones((2, 1)), jnp.ones((2, 1)), jnp.ones((2, 1), bool), samples_per_prompt=2
  )
  assert same.tolist() == [[0], [0]]

  _, nets, policy, _ = model()
  batch = ppo_batch(0)
  tokens, whole = batch.rollout.sequences()
  logprobs, _ = jax.jit(nets.logprobs)(policy, tokens, whole)
  live = np.asarray(batch.rollout.mask)
  new = np.asarray(logprobs, np.float64)[:, -live.shape[1] :]
  old, ref, advantages, weights = (
    np.asarray(x, np.float64)
    for x in (batch.rollout.logprobs, batch.rollout.ref_logprobs, batch.advantages, batch.weights)
  )
  expected = 0.0
  for at in zip(*np.nonzero(live), strict=True):
    ratio = np.exp(new[at] - old[at])
    term = min(advantages[at] * ratio, advantages[at] * min(max(ratio, 0.9), 1.1))
    k3 = np.exp(ref[at] - new[at]) - 1 - (ref[at] - new[at])
    expected += weights[at] * (0.3 * k3 - term)
  found, metrics = jax.jit(
    lambda p: losses.policy_gradient(
      {'policy': p}, batch, None, nets=nets, clip_eps=0.1, kl_coef=0.3
    )
  )(policy)
  assert found == pytest.approx(expected, rel=1e-4)
  assert metrics['ppo/loss/total'] == found != metrics['ppo/loss/policy']


def checked(tmp_path, **entries):
  c = base.get_config('tiny')
  for name, value in entries.items():
    c.stages.ppo[name] = value
  ppo_ptx.check(make_setup(c, tmp_path), 'ppo')


def test_rloo_takes_the_number_of_samples_from_the_stage(one_device, tmp_path):
  """Four of 32 episodes share a prompt: named once, in rollout."""
  c = base.get_config('tiny')
  c.stages.ppo.advantage = dict(fn='alignjax.ops:leave_one_out')
  setup = make_setup(c, tmp_path)
  with pytest.raises(
    ValueError, match=r'stages.ppo.advantage: .*rollout.samples_per_prompt must be 2 or more'
  ):
    ppo_ptx.check(setup, 'ppo')
  c.stages.ppo.rollout.samples_per_prompt = 4
  ppo_ptx.check(make_setup(c, tmp_path), 'ppo')
  bound = plugins.bind(
    c.stages.ppo.advantage,
    'advantage',
    facts=ppo_ptx_plan.facts(make_setup(c, tmp_path), 'ppo')['advantage'],
  )
  rewards = jnp.asarray([[1.0], [2.0], [3.0], [6.0]])
  assert bound(rewards, rewards, rewards > 0)[0][:, 0].tolist() == pytest.approx(
    [1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3]
  )
  c.stages.ppo.advantage = dict(fn='alignjax.ops:leave_one_out', samples_per_prompt=2)
  with pytest.raises(
    ValueError,
    match=r"stages.ppo.advantage.samples_per_prompt: the stage passes 'samples_per_prompt' "
    r'itself, 4',
  ):
    ppo_ptx.check(make_setup(c, tmp_path), 'ppo')


COMMANDS = re.findall(
  r'^python experiments/run.py (.*)$', (ROOT / 'examples' / 'README.md').read_text(), re.M
)


@pytest.mark.parametrize('line', COMMANDS, ids=lambda line: line.split(':')[-1].split("'")[0])
def test_the_commands_of_the_examples_name_what_their_stage_accepts(one_device, line, tmp_path):
  """All but their training: the config is read and every function is checked on shapes."""
  config, _, rest = config_flags.read_config(shlex.split(line))
  assert {word.partition('=')[0] for word in rest} == {'--config', '--workdir'}
  setup = make_setup(config, tmp_path)
  changed = [name for name in ('dpo', 'ppo') if f'config.stages.{name}.' in line]
  assert changed
  for name in changed:
    dict(dpo=preference, ppo=ppo_ptx)[name].check(setup, name)
    entries = setup.config.stages[name].values()
    used = [entry.to_dict() for entry in entries if 'examples.' in str(entry)]
    assert used and all(callable(plugins.find(s.get('function', s['fn']), '')) for s in used)


def test_a_reward_on_the_host_by_hand():
  """One sentence of 5 words; two sentences; none; one of 12 words. A full stop is a word."""
  long = 'a ' * 11 + '.'
  said = ['the crow is blue .', 'it is . it was .', 'the crow', long]
  assert reward_on_the_host.one_sentence([''] * 4, said) == pytest.approx([1.0, 0.0, 0.0, 0.8])


def no_metrics(params, batch, key, *, nets):
  return jnp.float32(0)


def vector(params, batch, key, *, nets):
  return batch.weights.sum(-1), {}


def whole_number(params, batch, key, *, nets):
  return jnp.int32(1), {}


def a_list(params, batch, key, *, nets):
  return batch.weights.sum(), {'mine/rows': batch.weights.sum(-1)}


def misspelt(params, batch, key, *, nets):
  return batch.weight.sum(), {}


def on_the_host(prompts, prompt_mask, responses, mask, *, nets, frozen):
  return np.asarray(responses).sum(-1)


def counts(prompts, prompt_mask, responses, mask, *, nets, frozen):
  return jnp.sum(mask, -1)


def advantages_alone(rewards, values, mask):
  return rewards


@pytest.mark.parametrize(
  'entry,fn,words',
  [
    ('loss', 'no_metrics', r'must return \(loss, metrics\), .*; it returns float32\[\]'),
    ('loss', 'vector', r'its loss is float32\[32\]'),
    ('loss', 'whole_number', r'its loss is int32\[\]'),
    ('loss', 'a_list', r"its metric 'mine/rows' is float32\[32\]"),
    (
      'loss',
      'misspelt',
      "cannot be traced .*AttributeError: 'PPOBatch' object has no attribute 'weight'",
    ),
    ('reward', 'on_the_host', 'cannot be traced .*TracerArrayConversionError'),
    (
      'reward',
      'counts',
      r'a score of each response, float arrays of shape \(32,\); it returns int32\[32\]',
    ),
    (
      'advantage',
      'advantages_alone',
      r'must return advantages and returns, .*; it returns float32\[32, 20\]',
    ),
  ],
)
def test_what_a_function_returns_is_known_before_any_stage_runs(
  one_device, tmp_path, entry, fn, words
):
  with pytest.raises(ValueError, match=words) as error:
    checked(tmp_path, **{entry: dict(fn=f'tests.test_forks:{fn}')})
  assert f'stages.ppo.{entry}: tests.test_forks:{fn}' in str(error.value)
