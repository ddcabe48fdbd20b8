"""The stages on small files, with every number by hand: which rows a batch has, how many steps
there are, what the result says of itself."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.configs import smollm2_135m
from alignjax.setup.objects import make_setup, seed_of
from alignjax.stages import ppo_ptx, pretrain, rm, sft
from tests.fakes import close

CHAT = pathlib.Path(__file__).parent / 'golden' / 'chat'
EOS, PAD = 256, 259
SEED, LENGTH = 3, 10
letters = lambda word: [ord(c) - ord('!') for c in word]


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return f'jsonl:{path}'


@pytest.fixture
def config(tmp_path):
  """The golden checkpoint, which reads a character as a token, on 11 demonstrations, 7 comparisons
  of three responses, and 5 texts."""
  c = smollm2_135m.get_config('tiny')
  c.checkpoint, c.seed = f'hf:{CHAT}', SEED
  c.data.update(
    template='plain',
    pack=False,
    prompt_length=6,
    response_length=LENGTH - 6,
    row_length=8,
    pretrain=write(tmp_path / 't.jsonl', [dict(text=chr(ord('a') + i) * 9) for i in range(5)]),
    demonstrations=write(
      tmp_path / 'd.jsonl', [dict(prompt=f'say{i}', response='y' * (i % 3 + 1)) for i in range(11)]
    ),
    comparisons=write(
      tmp_path / 'c.jsonl',
      [
        dict(prompt=f'ask{i}', responses=['a', 'b', 'c'], ranks=[i % 2, 2, 1 - i % 2])
        for i in range(7)
      ],
    ),
  )
  c.data.mapping.update(demonstrations=None, comparisons=None)
  c.data.heldout.share = 0.0
  return c


def order(count, *seed):
  """Two epochs of the rows of a stage."""
  return np.concatenate([np.random.default_rng([*seed, e]).permutation(count) for e in (0, 1)])


def text_rows(length):
  """The texts one after the other, cut into full rows."""
  stream = [t for i in range(5) for t in (EOS, *letters(chr(ord('a') + i) * 9))]
  return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


def check_plan(plan, stage, rows, length):
  """What a stage compiles without data and weights is what it runs, on rows of these shapes."""
  describe = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
  assert describe(plan.arguments) == describe((stage.state, stage.batch(0), {}))
  ((kind, (work,)),) = plan.work.items()
  assert kind == work.kind == 'update' and work.rows * work.times == rows and work.length == length


def test_pretraining(config, tmp_path):
  config.stages.pretrain = config.stages.sft.copy_and_resolve_references()
  with config.ignore_type():
    config.stages.pretrain.update(batch_size=4, epochs=1.5)
  setup = make_setup(config, tmp_path, jax.devices()[:1])
  stage = pretrain.build(setup, 'pretrain')
  check_plan(pretrain.abstract_step(setup, 'pretrain'), stage, 4, 8)
  rows = text_rows(8)
  wanted = order(len(rows), SEED, seed_of('pretrain'))
  assert len(rows) == 6 and stage.num_steps == math.ceil(1.5 * 6 / 4)
  for i in range(stage.num_steps):
    batch = stage.batch(i)
    assert batch.tokens.tolist() == [rows[n] for n in wanted[4 * i : 4 * i + 4]]
    assert batch.weights.tolist() == [[0.0] + [1.0] * 7] * 4
  params, info = stage.finish(stage.state)
  assert params is stage.state.params['policy'] and info == {'head': 'lm', 'rows': 6}


def demonstration(i):
  prompt, response = letters(f'say{i}'), [*letters('y' * (i % 3 + 1)), EOS]
  missing = LENGTH - len(prompt) - len(response)
  return (
    prompt + response + [PAD] * missing,
    [0.0] + [0.5] * (len(prompt) - 1) + [1.0] * len(response) + [0.0] * missing,
  )


def test_fine_tuning_on_demonstrations_and_text(config, tmp_path):
  """A quarter of the loss, and two of eight rows, are text."""
  with config.ignore_type():
    config.stages.sft.update(pretrain_mix=0.25, prompt_weight=0.5, epochs=1.8, demonstrations=None)
  setup = make_setup(config, tmp_path, jax.devices()[:1])
  stage = sft.build(setup, 'sft')
  check_plan(sft.abstract_step(setup, 'sft'), stage, 8, LENGTH)
  texts = text_rows(LENGTH)
  own = order(11, SEED, seed_of('sft'))
  theirs = order(len(texts), SEED, seed_of('sft'), 1, 0)
  assert stage.num_steps == math.ceil(1.8 * 11 / 6) == 4
  for i in (0, 1, 2):
    batch = stage.batch(i)
    demos = [demonstration(n) for n in own[6 * i : 6 * i + 6]]
    assert batch.tokens.tolist() == [d[0] for d in demos] + [
      texts[n] for n in theirs[2 * i : 2 * i + 2]
    ]
    assert batch.weights.tolist() == [d[1] for d in demos] + [[0.0] + [1.0] * 9] * 2
    assert batch.source.tolist() == [0] * 6 + [1] * 2
    assert batch.mix == (('demonstrations', 0.75), ('pretrain', 0.25))
  params, info = stage.finish(stage.state)
  assert params is stage.state.params['policy']
  assert info == {'head': 'lm', 'demonstrations': 11}


def test_fine_tuning_on_packed_demonstrations(config, tmp_path):
  """Several in a row of 16; each is whole and keeps its weights."""
  config.data.update(pack=True, prompt_length=12)
  config.stages.sft.update(pretrain_mix=0.0, prompt_weight=0.5, batch_size=1, demonstrations=None)
  stage = sft.build(make_setup(config, tmp_path, jax.devices()[:1]), 'sft')
  found = []
  for i in range(stage.num_steps):
    batch = stage.batch(i)
    tokens, mask, weights = (np.asarray(x)[0] for x in (batch.tokens, batch.mask, batch.weights))
    for number in range(1, mask.max() + 1):
      found.append((tokens[mask == number].tolist(), weights[mask == number].tolist()))
  wanted = []
  for i in range(11):
    tokens, weights = demonstration(i)
    size = LENGTH - tokens.count(PAD)
    wanted.append((tokens[:size], weights[:size]))
  assert sorted(found) == sorted(wanted) and stage.num_steps < 11


def test_a_reward_model(config, tmp_path):
  """Its bias makes the demonstrations' score 0 on average."""
  config.stages.rm.update(
    prompts=None, bias_demonstrations=4, responses_per_batch=6, k_buckets=(3,), row_lengths=()
  )
  config.stages.rm.init.reward = f'hf:{CHAT}'
  setup = make_setup(config, tmp_path, jax.devices()[:1])
  stage = rm.build(setup, 'rm')
  check_plan(rm.abstract_step(setup, 'rm'), stage, 6, LENGTH)
  assert stage.num_steps == 4, 'two prompts of three responses an update, seven prompts'
  seen = []
  for i in range(4):
    batch = stage.batch(i)
    assert batch.tokens.shape == (2, 3, LENGTH)
    fields = (batch.tokens, batch.mask, batch.ranks, batch.weights)
    for row, mask, ranks, weight in zip(*(f.tolist() for f in fields), strict=True):
      if weight:
        number = row[0][3] - ord('0') + ord('!')
        seen.append(number)
        for tokens, live, letter in zip(row, mask, 'abc', strict=True):
          right = [*letters(f'ask{number}'), *letters(letter), EOS]
          assert tokens == right + [PAD] * (LENGTH - 6) and live == [True] * 6 + [False] * 4
        assert ranks == [number % 2, 2, 1 - number % 2]
  assert sorted(seen) == list(range(7))
  params, info = stage.finish(stage.state)
  demos = [demonstration(i)[0] for i in range(11)]
  chosen = rm.read_data(setup, 'rm')[3]
  assert len(chosen) == 4 and all(d + [PAD] * (LENGTH - len(d)) in demos for d in chosen)

  def scores(params):
    tokens = jnp.array([d + [PAD] * (LENGTH - len(d)) for d in chosen])
    mask = np.arange(LENGTH) < np.array([[len(d)] for d in chosen])
    values = jax.jit(setup.nets.scalar)(params, tokens, mask)
    return np.array([v[len(d) - 1] for v, d in zip(np.asarray(values), chosen, strict=True)])

  before = scores(stage.state.params['reward'])
  close(scores(params), before - before.mean(), rtol=1e-4, atol=1e-5)
  close(info.pop('bias'), -before.mean(), rtol=1e-4, atol=1e-5)
  assert info == {'head': 'scalar', 'prompts': 7, 'pairs': 7 * 3}


def test_what_an_iteration_of_ppo_reads(config, tmp_path):
  """Eight episodes are two of each of four prompts; each episode has two rows of text."""
  config.data.prompts = write(tmp_path / 'p.jsonl', [dict(prompt=f'ask{i}') for i in range(9)])
  config.data.mapping.prompts = None
  cfg = config.stages.ppo_ptx
  cfg.init = {role: f'hf:{CHAT}' for role in cfg.init}
  with config.ignore_type():
    cfg.update(prompts=None)
  cfg.rollout.update(episodes=8, samples_per_prompt=2)
  cfg.ptx.rows_per_episode = 2
  setup = make_setup(config, tmp_path, jax.devices()[:1])
  stage = ppo_ptx.build(setup, 'ppo_ptx')
  own = order(9, SEED, seed_of('ppo_ptx'))
  assert stage.num_steps == 3
  for i in (0, 1, 2):
    tokens, mask, text = stage.batch(i)
    wanted = [letters(f'ask{n}') for n in own[4 * i : 4 * i + 4]]
    assert tokens.tolist() == [[PAD, PAD, *prompt] for prompt in wanted]
    assert mask.tolist() == [[False] * 2 + [True] * 4] * 4
    assert text.tokens.shape == (16, 8)
  assert text.weights.tolist() == [[0.0] + [1.0] * 7] * 16
  plan = ppo_ptx.abstract_step(setup, 'ppo_ptx')
  describe = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
  assert describe(plan.arguments[0]) == describe(stage.state)
  assert describe(plan.arguments[2]) == describe(stage.batch(0))
