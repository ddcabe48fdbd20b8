"""Best-of-n: the estimator against all subsets, by hand; samples that survive an interruption; the
command on a tiny run."""

import itertools
import json
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.commands import best_of_n as command
from alignjax.evals.reward import best_of_n
from alignjax.inference import loading, samples
from alignjax.types import Networks

CHAT = pathlib.Path(__file__).parent / 'golden' / 'chat'


def test_the_estimator_by_hand():
  scores = np.array([[1.0, 2.0, 3.0]])  # the pairs: max 2, 3, 3
  assert best_of_n.expected(scores, scores, 2) == pytest.approx([8 / 3])
  assert best_of_n.expected(scores, scores, 1) == pytest.approx([2.0])
  assert best_of_n.expected(scores, scores, 3) == pytest.approx([3.0])
  gold = np.array([[5.0, 0.0, -7.0]])  # of the best by score: pairs {1,2} -> 0, the other two -> -7
  assert best_of_n.expected(scores, gold, 2) == pytest.approx([-14 / 3])
  tied = np.array([[1.0, 1.0, 0.0]])  # {1,1}: either; {1,0} twice: the one
  assert best_of_n.expected(tied, np.array([[4.0, 8.0, 100.0]]), 2) == pytest.approx(
    [(6 + 4 + 8) / 3]
  )
  with pytest.raises(ValueError, match='n=4 needs 1 <= n <= 3'):
    best_of_n.expected(scores, scores, 4)


def test_the_estimator_is_the_mean_over_all_subsets():
  rng = np.random.default_rng(0)
  scores, values = rng.normal(size=(4, 9)), rng.normal(size=(4, 9))
  for n in (1, 3, 6):
    brute = [
      np.mean([v[max(s, key=lambda i: row[i])] for s in itertools.combinations(range(9), n)])  # noqa: B023
      for row, v in zip(scores, values, strict=True)
    ]
    np.testing.assert_allclose(best_of_n.expected(scores, values, n), brute, rtol=1e-12)


def test_kl_of_best_of_n():
  assert best_of_n.kl(1) == 0
  assert best_of_n.kl(2) == pytest.approx(0.6931472 - 0.5)
  assert best_of_n.kl(64) == pytest.approx(4.1588831 - 63 / 64)


def test_the_curve_has_paired_changes():
  scores = np.array([[0.0, 1.0], [0.0, 3.0]])
  rows = best_of_n.curve(scores, {'proxy': scores, 'gold': -scores}, [1, 2])
  assert [r['proxy']['mean'] for r in rows] == [1.0, 2.0]  # prompts: .5 and 1.5, then 1 and 3
  assert (
    rows[1]['gold']['mean'] == -2.0
    and rows[1]['gold, change']['mean'] == -1.0
    and 'gold, change' not in rows[0]
  )
  # of -.5 and -1.5
  assert rows[1]['gold, change']['ci95'] == pytest.approx(
    [-1 - 12.7062 / 2, -1 + 12.7062 / 2], abs=1e-3
  )
  assert rows[1]['kl'] == pytest.approx(math.log(2) - 0.5)
  # a prompt that comes twice is one cluster
  twice = best_of_n.curve(scores, {'gold': -scores}, [1, 2], ['same', 'same'])
  assert twice[1]['gold, change']['ci95'] == [None, None]


@pytest.fixture(scope='module')
def model():
  return loading.load(f'hf:{CHAT}', form='chat')


def test_samples_go_on_where_they_stopped(model, tmp_path):
  prompts = ['one', 'another prompt', 'x', 'y', 'z']
  respond = samples.make_responder(model, prompts, count=3, max_tokens=5, rows=6)
  whole = respond(model.params, 0, tmp_path / 'a.jsonl')
  assert [len(t) for t in whole.texts] == [3] * 5
  lines = (tmp_path / 'a.jsonl').read_text().splitlines()
  # killed in the middle of a line and of a chunk
  (tmp_path / 'b.jsonl').write_text('\n'.join(lines[:3]) + '\n' + lines[3][:10])
  assert respond(model.params, 0, tmp_path / 'b.jsonl') == whole
  assert (tmp_path / 'b.jsonl').read_text() == (tmp_path / 'a.jsonl').read_text()
  assert respond(None, 0, tmp_path / 'a.jsonl') == whole  # read, not sampled
  assert respond(model.params, 1, tmp_path / 'c.jsonl') != whole
  with pytest.raises(ValueError, match='context of'):
    samples.make_responder(model, prompts, count=1, max_tokens=model.cfg.max_length)


def test_divergence_and_reward_are_those_of_the_networks(model, tmp_path):
  """Against the log-softmax in float64, one response at a time; and a reward model that counts."""
  prompts = ['ab', 'longer']
  said = samples.make_responder(model, prompts, count=2, max_tokens=6, rows=4)(
    model.params, 3, tmp_path / 'r.jsonl'
  )
  other = jax.tree.map(lambda p: p * 1.1, model.params)
  found = samples.make_divergence(model, prompts, max_tokens=6, rows=3)(other, model.params, said)

  def logprob(params, prompt, tokens, temperature=1.0):
    row = np.array([[*model.template.prompt(prompt), *tokens]], np.int32)
    logits = np.asarray(model.nets.logits(params, row, row >= 0), np.float64)[0] / temperature
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = np.arange(row.shape[1] - len(tokens), row.shape[1])
    return logprobs[at - 1, row[0, at]].sum()

  expected = [
    [logprob(other, p, t) - logprob(model.params, p, t) for t in tokens]
    for p, tokens in zip(prompts, said.tokens, strict=True)
  ]
  assert found.shape == (2, 2)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)

  # At another temperature both are divided by it.
  cold = samples.make_divergence(model, prompts, max_tokens=6, temperature=0.5)
  expected = [
    [logprob(other, p, t, 0.5) - logprob(model.params, p, t, 0.5) for t in tokens]
    for p, tokens in zip(prompts, said.tokens, strict=True)
  ]
  np.testing.assert_allclose(cold(other, model.params, said), expected, rtol=1e-3, atol=1e-4)
  with pytest.raises(ValueError, match='temperature=0 must be above 0'):
    samples.make_divergence(model, prompts, max_tokens=6, temperature=0)

  counting = model._replace(
    nets=model.nets._replace(scalar=lambda params, tokens, mask: mask.cumsum(-1) * 1.0)
  )
  length = lambda p, text, ended: (
    len(model.template.prompt(p)) + len(model.template.response(text)) - (not ended)
  )
  expected = [
    [length(p, t, e) for t, e in zip(ts, es, strict=True)]
    for p, ts, es in zip(prompts, said.texts, said.ended, strict=True)
  ]
  np.testing.assert_array_equal(
    samples.make_rewarder(counting, prompts, rows=4)(None, said), expected
  )


@pytest.mark.parametrize('temperature', [1.0, 0.5, 0.25])
def test_the_kl_of_a_coin_is_that_of_the_distribution_which_is_sampled(temperature):
  """Responses of one token of two, with .6 against .7 at temperature 1. The mean over both tokens,
  weighted by their probability at the temperature, is the divergence in closed form."""
  both = [{'logits': jnp.log(jnp.array(p))} for p in ((0.6, 0.4), (0.7, 0.3))]

  def logits(params, tokens, mask, positions):
    return jnp.broadcast_to(params['logits'], (*positions.shape, 2))

  nets = Networks(logits=logits, logprobs=None, scalar=None, decoder=None)
  coin = types.SimpleNamespace(
    nets=nets, template=types.SimpleNamespace(prompt=lambda text: [0], pad=0)
  )
  said = samples.Responses([['h', 't']], [[[0], [1]]], [[True, True]])
  made = samples.make_divergence(coin, ['toss'], max_tokens=1, temperature=temperature)
  p, q = (np.array(x) ** (1 / temperature) for x in ((0.6, 0.4), (0.7, 0.3)))
  p, q = p / p.sum(), q / q.sum()
  assert made(*both, said)[0] @ p == pytest.approx(p @ np.log(p / q), rel=1e-5)


def test_the_command_measures_kl_at_the_temperature_of_its_samples(tmp_path, monkeypatch):
  asked = []
  model = types.SimpleNamespace(cfg='same', params={})

  def make_divergence(policy, prompts, *, temperature, **_):
    asked.append(temperature)
    return lambda *_: np.zeros((len(prompts), 8))

  monkeypatch.setattr(loading, 'load', lambda *_, **__: model)
  monkeypatch.setattr(loading, 'fingerprint', lambda _: 'x')
  monkeypatch.setattr(samples, 'make_divergence', make_divergence)
  monkeypatch.setattr(
    samples, 'make_responder', lambda *_, count, **__: lambda *_: types.SimpleNamespace(count=count)
  )
  monkeypatch.setattr(
    samples, 'make_rewarder', lambda *_, **__: lambda _, said: np.ones((2, said.count))
  )
  (tmp_path / 'p.jsonl').write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
  command.main(
    [
      '--policy=hf:a',
      '--reward_model=hf:b',
      '--ppo=hf:c',
      '--n=1,2',
      f'--prompts=jsonl:{tmp_path}/p.jsonl',
      '--temperature=0.5',
      f'--out={tmp_path}/out',
    ]
  )
  assert asked == [0.5]
  page = (tmp_path / 'out' / 'best_of_n.md').read_text()
  assert 'KL to the policy above, both at temperature 0.5.' in page


def test_report_and_plot(tmp_path):
  rng = np.random.default_rng(0)
  values = {
    'reward model': rng.normal(size=(20, 8)),
    'gold, training labelers': rng.normal(size=(20, 8)),
  }
  kls = np.abs(rng.normal(size=(20, 4)))
  result = dict(
    policy='p',
    reward_model='r',
    prompts=20,
    samples=8,
    temperature=1.0,
    measures=list(values),
    best_of_n=best_of_n.curve(values['reward model'], values, [1, 2, 4]),
    policies={
      'ppo': best_of_n.policy(kls, {k: v[:, :4] for k, v in values.items()})
      | {'training': {'kl': [0.0, 1.0], 'reward model': [0.0, 0.5]}}
    },
  )
  text = best_of_n.markdown(json.loads(json.dumps(result)))
  assert '| 4 | 0.64 |' in text and f'| ppo | {kls.mean():.3f} [' in text
  best_of_n.plot(result, tmp_path / 'x.png')
  assert (tmp_path / 'x.png').stat().st_size > 5000
