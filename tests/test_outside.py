"""Responses of an engine outside of the compiled program: a server that answers as vLLM's does."""

import functools
import shutil

import jax
import numpy as np
import pytest

from alignjax import train
from alignjax.configs import smollm2_135m
from alignjax.inference import loading
from alignjax.models.config import TransformerConfig
from alignjax.runtime import checkpoint, failures, files, lock, metrics
from alignjax.setup.objects import make_setup
from alignjax.stages import outside, ppo_ptx
from tests.fake_vllm import Server
from tests.test_lora import pipeline
from tests.test_preference import CHAT

ORDER = ['/collective_rpc', '/v1/completions']
ASLEEP = ['/wake_up?tags=weights', '/collective_rpc', '/wake_up?tags=kv_cache',
          '/v1/completions', '/sleep?level=2']  # fmt: skip


def config(folder, url='http://127.0.0.1:9', **lora):
  """PPO-ptx of the golden checkpoint, whose responses come from a server."""
  c = pipeline(folder, **(dict(rank=0) | lora))
  c.stages_to_run = ('ppo_ptx',)
  c.stages.ppo_ptx.init = dict.fromkeys(('policy', 'value', 'ref', 'reward'), f'hf:{CHAT}')
  c.stages.ppo_ptx.rollout.update(episodes=8, segments=None)
  c.stages.ppo_ptx.update(minibatches=2, iterations=3, save_every=100, log_every=1)
  c.stages.ppo_ptx.rollout.engine = dict(
    fn='alignjax.inference.vllm:complete', url=url, folder=str(folder / 'weights'), wait=0.01
  )
  return c


def setup_of(c, folder, devices=1):
  return make_setup(c, folder / 'run', jax.devices()[:devices])


def server(setup):
  return Server(CHAT, prompt_length=setup.prompt_length, cfg=setup.policy_model)


def steps(setup, count=2):
  """The metrics and rollouts of some iterations, and the last state."""
  stage = ppo_ptx.build(setup, 'ppo_ptx')
  state, seen = stage.state, []
  for i in range(count):
    state, measured, rollout = stage.step(state, stage.batch(i))
    assert not stage.failures, stage.failures
    seen.append(jax.device_get((measured, rollout)))
  return seen, jax.device_get(state)


@pytest.mark.slow
@pytest.mark.parametrize(
  'how',
  [
    dict(samples=2),
    pytest.param(dict(sleep=True, rank=2, quantization='nf4'), marks=pytest.mark.long),
  ],
)
def test_the_engine_samples_the_present_policy(tmp_path, how):
  """Over two iterations: what it answers is what is trained on, its log-probabilities are those of
  the weights of that iteration, whole or merged with adapters, and the ratio is exactly 1."""
  samples = how.get('samples', 1)
  c = config(tmp_path, **{k: v for k, v in how.items() if k in ('rank', 'quantization')})
  c.stages.ppo_ptx.rollout.samples_per_prompt = samples
  c.stages.ppo_ptx.rollout.engine.sleep = how.get('sleep', False)
  with server(setup_of(c, tmp_path)) as running:
    c.stages.ppo_ptx.rollout.engine.url = running.url
    seen, _ = steps(setup_of(c, tmp_path))
    before = running.read(running.checkpoint)
  assert running.asked == (ASLEEP if how.get('sleep') else ORDER) * 2
  assert len(running.salts) == 2, 'a prompt is read again with the new weights'
  assert len(running.answers) == 16 and len({seed for _, seed in running.answers}) == 16
  for measured, rollout in seen:
    assert measured['ppo/ratio_max_dev'] == 0
    assert measured['rollout/sampler_gap_max'] < 2e-5
    assert measured['time/engine_seconds'] > 0
    rows = zip(rollout.prompts, rollout.prompt_mask, rollout.responses, rollout.mask, strict=True)
    answered = {(prompt, tuple(tokens)) for (prompt, _), (tokens, _) in running.answers.items()}
    for prompt, prompt_mask, response, mask in rows:
      assert (tuple(prompt[prompt_mask]), tuple(response[mask])) in answered
    assert len({tuple(p) for p in rollout.prompts}) <= 8 // samples
  moved = [float(abs(a - b).max()) for a, b in zip(
    jax.tree.leaves(before), jax.tree.leaves(running.weights), strict=True)]  # fmt: skip
  assert max(moved) > 1e-3, 'the weights of the second iteration are others'


@pytest.mark.long
def test_eight_devices_ask_for_the_same(tmp_path):
  c = config(tmp_path)
  c.mesh.fsdp = 2
  with server(setup_of(config(tmp_path), tmp_path)) as running:
    c.stages.ppo_ptx.rollout.engine.url = running.url
    many, _ = steps(setup_of(c, tmp_path, 8))
    asked = dict(running.answers)
    c.mesh.fsdp = 1
    one, _ = steps(setup_of(c, tmp_path))
  tokens = lambda answers: {k: tokens for k, (tokens, _) in answers.items()}
  assert len(asked) == 16 and tokens(running.answers) == tokens(asked)
  for (a, _), (b, _) in zip(many, one, strict=True):
    for name in a:
      if not name.startswith('time/'):
        np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_an_engine_that_fails_loses_nothing(tmp_path, capsys):
  """It fails in the second of three iterations. What was done is kept, the same command goes on,
  and ends as a run whose engine did not fail."""

  def run(folder, running):
    c = config(tmp_path)
    c.stages.ppo_ptx.rollout.engine.update(url=running.url, tries=2)
    train.main(c, tmp_path / folder)
    rows = metrics.read(tmp_path / folder / 'ppo_ptx' / 'metrics.jsonl')
    return {k: v for k, v in rows.items() if not k.startswith('time/')}

  with server(setup_of(config(tmp_path), tmp_path)) as running:
    whole = run('whole', running)
    running.asked.clear()
    running.broken = (2,)
    with pytest.raises(failures.StepFailed) as error:
      run('cut', running)
    assert 'step 2: the engine alignjax.inference.vllm:complete failed' in str(error.value)
    assert 'does not answer: HTTP 500' in str(error.value) and 'out of memory' in str(error.value)
    running.broken = ()
    again = run('cut', running)
  assert 'ppo_ptx: goes on from step 1 of 3' in capsys.readouterr().out
  assert again.keys() == whole.keys()
  for name, values in whole.items():
    np.testing.assert_array_equal(again[name], values, err_msg=name)
  final = [tmp_path / f / 'ppo_ptx' / 'final' for f in ('whole', 'cut')]
  assert checkpoint.weights(final[0]) == checkpoint.weights(final[1])


MODEL = TransformerConfig(
  vocab_size=20, max_length=8, unused_ids=((17, 18),), num_layers=1, d_model=8, num_heads=1
)
GOOD = ([4, 2], [-1.0, -0.5])


@pytest.mark.parametrize(
  'answers,words',
  [
    ([GOOD], 'returned 1 responses to 2 prompts'),
    (None, 'returned NoneType responses'),
    ([GOOD, ([], [])], 'response 1 .* has 0 tokens; 1 to 3 were asked for'),
    ([GOOD, ([4] * 4, [0.0] * 4)], 'has 4 tokens'),
    ([GOOD, ([4, 2], [0.0])], 'has 1 log-probabilities of 2 tokens'),
    ([GOOD, ([4, 2], [0.0, float('nan')])], 'not finite'),
    ([GOOD, ([4, 20, 4], [0.0] * 3)], 'the token 20, which the vocabulary does not have'),
    ([GOOD, ([4, 17, 4], [0.0] * 3)], 'the token 17, which'),
    ([([2, 4, 4], [0.0] * 3), GOOD], 'response 0 .* goes on after the stop token 2'),
    ([GOOD, ([4, 5], [0.0] * 2)], 'ends after 2 of 3 tokens without a stop token'),
  ],
)
def test_what_the_policy_could_not_have_sampled_is_refused(answers, words):
  with pytest.raises(ValueError, match=words):
    outside.packed(answers, 2, 3, (2, 3), MODEL)


def test_answers_are_packed():
  made = outside.packed([GOOD, ([4, 5, 6], [-1.0, -2.0, -3.0])], 2, 3, (2, 3), MODEL)
  np.testing.assert_array_equal(made.responses, [[4, 2, 0], [4, 5, 6]])
  np.testing.assert_array_equal(made.mask, [[1, 1, 0], [1, 1, 1]])
  np.testing.assert_array_equal(made.logprobs, [[-1, -0.5, 0], [-1, -2, -3]])
  np.testing.assert_array_equal(made.ended, [True, False])


@pytest.mark.parametrize(
  'change,words',
  [
    (dict(halvings=1), r'rollout.halvings=1 is of the sampling in the compiled program'),
    (dict(engine=dict(fn='alignjax.inference.vllm:complete')), 'engine: .* needs url, folder'),
    (dict(engine=dict(fn='alignjax.inference.vllm:nothing')), "has no function 'nothing'"),
    (
      dict(engine=dict(fn='alignjax.inference.vllm:complete', url='u', folder='f', top_k=3)),
      r'engine.top_k: .* not .top_k',
    ),
    (
      dict(engine=dict(fn='alignjax.inference.vllm:complete', url='u', folder='f', seeds=3)),
      r'engine.seeds: the stage passes',
    ),
  ],
)
def test_entries_that_cannot_be_are_named_before_anything_runs(tmp_path, change, words):
  c = config(tmp_path)
  for entry, value in change.items():
    c.stages.ppo_ptx.rollout[entry] = value  # `update` would leave entries of the engine there
  with pytest.raises(ValueError, match=words):
    ppo_ptx.check(setup_of(c, tmp_path), 'ppo_ptx')


def test_the_folder_of_the_weights_is_no_checkpoint_and_of_one_run(tmp_path):
  model = loading.load(f'hf:{CHAT}', 'lm', 'chat')
  write = functools.partial(outside._write, setup_of(config(tmp_path), tmp_path), model.params)
  for _ in range(2):
    write(str(tmp_path / 'mine'))
  with pytest.raises(lock.Busy), lock.held(files.folder(tmp_path / 'mine')):
    pass
  (tmp_path / 'theirs').mkdir()
  with lock.held(files.folder(tmp_path / 'theirs')):
    with pytest.raises(ValueError, match='another run writes its weights to .*theirs'):
      write(str(tmp_path / 'theirs'))
  copy = shutil.copytree(CHAT, tmp_path / 'copy')
  before = {p.name: p.read_bytes() for p in copy.glob('*.safetensors')}
  with pytest.raises(ValueError, match='copy is a checkpoint, whose tensors would be replaced'):
    write(str(copy))
  assert before and before == {p.name: p.read_bytes() for p in copy.glob('*.safetensors')}


def test_where_an_engine_is_does_not_decide_the_result(tmp_path):
  def identity(**changes):
    c = config(tmp_path)
    c.stages.ppo_ptx.rollout.engine.update(changes)
    return train.identity(c, 'ppo_ptx')

  assert identity() == identity(url='http://elsewhere:1', folder='f', sleep=True, timeout=1.0)
  assert identity() != identity(top_k=3) and identity() != identity(fn='mylab:sample')


def test_the_sandbox_has_no_engine(tmp_path):
  from alignjax.configs import ppo_ptx as sandbox

  c = sandbox.get_config('tiny')
  c.stages.ppo_ptx.rollout.engine = dict(fn='alignjax.inference.vllm:complete', url='', folder='')
  with pytest.raises(ValueError, match='this one has no model.source'):
    ppo_ptx.check(make_setup(c, tmp_path / 'run', jax.devices()[:1]), 'ppo_ptx')


@pytest.mark.parametrize(
  'change,words',
  [
    (lambda a: dict(choices=[]), 'without token_ids or logprobs'),
    (lambda a: dict(choices=[dict(text='yes')]), 'without token_ids or logprobs'),
    (
      lambda a: dict(choices=[dict(token_ids=[5], logprobs=dict(token_logprobs=[0.0]))]),
      'ends after 1 of 4 tokens without a stop token',
    ),
  ],
)
def test_a_server_that_answers_something_else(tmp_path, change, words):
  c = config(tmp_path)
  setup = setup_of(c, tmp_path)
  with server(setup) as running:
    c.stages.ppo_ptx.rollout.engine.url = running.url
    said: list = []
    setup = setup_of(c, tmp_path)
    sample = outside.sampler(setup, 'ppo_ptx', said)
    stage = ppo_ptx.build(setup, 'ppo_ptx')
    running.change = change
    assert sample(stage.state, {}, stage.batch(0)) == (None, 0.0)
  assert len(said) == 1 and words in said[0], said


def test_no_server_is_one_line(tmp_path):
  said: list = []
  c = config(tmp_path)
  c.stages.ppo_ptx.rollout.engine.tries = 1
  setup = setup_of(c, tmp_path)
  stage = ppo_ptx.build(setup, 'ppo_ptx')
  assert outside.sampler(setup, 'ppo_ptx', said)(stage.state, {}, stage.batch(0))[0] is None
  assert said[0].startswith(
    'the engine alignjax.inference.vllm:complete failed: RuntimeError: '
    'http://127.0.0.1:9/v1/models does not answer:'
  )


def test_the_estimate_has_no_sampling(tmp_path):
  c = config(tmp_path)
  setup = setup_of(c, tmp_path)
  plan, without = ppo_ptx.abstract_step(setup, 'ppo_ptx'), None
  assert set(plan.work) == {'score', 'reward', 'update'}
  text = plan.step.lower(*plan.arguments).as_text()
  c.stages.ppo_ptx.rollout.engine = None
  without = ppo_ptx.abstract_step(setup_of(c, tmp_path), 'ppo_ptx')
  assert {'prepare', 'prefill', 'decode'} < set(without.work)
  assert len(plan.arguments) == len(without.arguments) + 1
  assert text.count('while') < without.step.lower(*without.arguments).as_text().count('while')
  assert smollm2_135m.get_config('tiny').stages.ppo_ptx.rollout.engine is None
