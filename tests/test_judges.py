"""Judges: the reward model's scores one at a time, the sandbox's probabilities, and a language
model behind a fake endpoint."""

import http.server
import json
import re
import socket
import sys
import threading
import time

import jax
import numpy as np
import pytest

from alignjax import sandbox
from alignjax.evals.preference import judges, openai_judge
from alignjax.evals.preference.openai_judge import Endpoint
from alignjax.evals.preference.responses import Response
from alignjax.evals.preference.verdicts import Pair
from alignjax.inference import loading
from alignjax.models import transformer
from alignjax.runtime import retries
from tests.test_preference import CHAT


def pair(number, a, b, prompt='Say it.', **more):
  return Pair(
    dict(prompt=prompt, prompt_id=f'q{number}', **more), 'x', 'y', Response(a), Response(b)
  )


def test_reward_model_scores_are_those_of_one_row_at_a_time(tmp_path):
  lm = loading.load(f'hf:{CHAT}', 'lm', 'chat')
  model = lm._replace(
    head='scalar', params=transformer.with_scalar_head(lm.cfg, lm.params, jax.random.key(0))
  )
  scalar = jax.jit(model.nets.scalar)
  pairs = [
    pair(1, 'yes', 'no, never'),
    pair(2, 'the same', 'the same'),
    pair(3, 'cut', 'cut')._replace(response_b=Response('cut', ended=False)),
    pair(4, 'long ' * 200, 'short'),
  ]

  def score(prompt, text, ended):
    tokens = model.template.prompt(prompt) + model.template.response(text)
    tokens = tokens if ended else tokens[:-1]
    row = np.array([tokens + [0] * (128 - len(tokens))], np.int32)
    return float(scalar(model.params, row, np.arange(128)[None] < len(tokens))[0, len(tokens) - 1])

  got = judges.reward_model(pairs, model, 'w', tmp_path, 'rm', rows=2)
  for p, v in list(zip(pairs, got.verdicts, strict=True))[:3]:
    a, b = (score('Say it.', r.text, r.ended) for r in (p.response_a, p.response_b))
    assert v.p == (0.5 if a == b else float(a > b))
  # the end token makes a difference
  assert got.verdicts[1].p == 0.5 and got.verdicts[2].p in (0.0, 1.0)
  assert got.verdicts[3].p is None and 'exceed its 512 tokens' in got.notes[0]
  (kept,) = tmp_path.glob('*.jsonl')
  lines = kept.read_text().splitlines()
  np.testing.assert_allclose(
    sorted(json.loads(x)['score'] for x in lines),
    sorted(
      score('Say it.', *r)
      for r in [
        ('yes', True),
        ('no, never', True),
        ('the same', True),
        ('cut', True),
        ('cut', False),
        ('short', True),
      ]
    ),
    rtol=1e-4,
  )
  assert (
    judges.reward_model(pairs, model, 'w', tmp_path, 'rm') == got
    and kept.read_text().splitlines() == lines
  )


def test_sandbox_probabilities_are_those_of_its_labelers():
  world, labelers = sandbox.World(3), sandbox.Labelers(3)
  records = sandbox.demonstrations(world, 30, 'test', fallible=False)
  pairs = [
    Pair(
      r | dict(prompt_id=str(i)),
      'good',
      'bad',
      Response(r['response']),
      Response('the the', ended=i % 2 == 0),
    )
    for i, r in enumerate(records)
  ]
  out = judges.sandbox(pairs, dict(seed=3))
  by_judge = {}
  for v in out.verdicts:
    by_judge.setdefault(v.judge, []).append(v.p)
  for judge, ids in (
    ('sandbox, training labelers', labelers.train),
    ('sandbox, held-out labelers', labelers.heldout),
  ):
    for i, (r, p) in enumerate(zip(records, by_judge[judge], strict=True)):
      good = labelers.features([sandbox.judge(world, r['meta'], r['response'], True)])
      bad = labelers.features([sandbox.judge(world, r['meta'], 'the the', i % 2 == 0)])
      assert p == pytest.approx(labelers.preference(good, bad, ids).mean()) and p > 0.5
  flags = {
    policy: np.mean([r.flags['fails_instruction'] for r in out.ratings if r.policy == policy])
    for policy in ('good', 'bad')
  }
  assert flags['good'] == 0 and flags['bad'] > 0.9
  with pytest.raises(ValueError, match='no `meta`'):
    judges.sandbox([pair(1, 'a', 'b')], dict(seed=3))


def test_a_judge_of_ones_own_is_checked(tmp_path):
  pairs = [pair(1, 'a', 'b'), pair(2, 'c', 'd')]
  assert [
    v.p for v in judges.own(pairs, lambda ps, *, keep: [0.25, None], tmp_path / 'k', 'm:f').verdicts
  ] == [0.25, None]
  for wrong, words in (
    ([0.5], 'returned 1 probabilities for 2'),
    ([0.5, 2], 'not a probability'),
    ([float('nan'), 1], 'not a probability'),
    ([10**400, 1], 'not a probability'),
  ):
    with pytest.raises(ValueError, match=words):
      judges.own(pairs, lambda ps, *, keep, out=wrong: out, tmp_path / 'k', 'm:f')


class Fake(http.server.ThreadingHTTPServer):
  """answer: (its number, the request's JSON) -> (status, reply text, None for what is
  not JSON, [] for what is no completion). With `after`
  an error has a Retry-After header."""

  daemon_threads = True

  def __init__(self, answer, after=None):
    self.asked, self.times, self.lock = [], [], threading.Lock()
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with outer.lock:
          outer.asked.append((self.path, self.headers.get('Authorization'), body))
          outer.times.append(time.monotonic())
          number = len(outer.asked)
        status, text = answer(number, body)
        reply = (
          b'<html>'
          if text is None
          else json.dumps(
            {'choices': text and [{'message': {'content': text}}]}
            if status == 200
            else {'error': {'message': text}}
          ).encode()
        )
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(reply)))
        if after and status != 200:
          self.send_header('Retry-After', after)
        self.end_headers()
        self.wfile.write(reply)

      def log_message(self, *args):
        pass

    super().__init__(('127.0.0.1', 0), Handler)

  def __enter__(self):
    threading.Thread(
      target=self.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True
    ).start()
    return self

  def __exit__(self, *args):
    self.shutdown()
    self.server_close()

  def endpoint(self, **more):
    return Endpoint(
      f'http://127.0.0.1:{self.server_port}/v1',
      **(dict(key='secret', model='m/1', wait=0.01) | more),
    )


def shown(body):
  return re.findall(
    r'<response_\d>\n(.*?)\n</response_\d>', body['messages'][1]['content'], re.DOTALL
  )


def by_length(number, body):
  """Prefers the longer response; of 'first ...' it always likes the one shown first; has no opinion
  on 'odd ...'."""
  one, two = shown(body)
  if one.startswith('odd'):
    return 200, 'I cannot say.'
  best = (
    1
    if one.startswith('first')
    else 1
    if len(one) > len(two)
    else 2
    if len(two) > len(one)
    else 'tie'
  )
  return 200, f'Verdict: 2 would be wrong here.\nVerdict: {best}'


PAIRS = [
  pair(1, 'long answer', 'short'),
  pair(2, 'no', 'longer'),
  pair(3, 'first here', 'first too'),
  pair(4, 'odd', 'odd!'),
  pair(5, 'equal', 'equal'),
  pair(6, 'abc', 'xyz', prompt=[{'role': 'user', 'content': 'hello you'}]),
]


def test_both_orders_are_asked_and_averaged(tmp_path):
  with Fake(by_length) as server:
    out = openai_judge.judge(PAIRS, server.endpoint(), tmp_path, 'openai:m', workers=3)
    asked = server.asked
    again = openai_judge.judge(PAIRS, server.endpoint(), tmp_path, 'openai:m')
    # equal texts are a tie unasked; nothing is asked twice
    assert len(server.asked) == len(asked) == 10 and again == out
  assert all(
    path == '/v1/chat/completions'
    and key == 'Bearer secret'
    and body['model'] == 'm/1'
    and body['temperature'] == 0
    for path, key, body in asked
  )
  said = {}
  for v in out.verdicts:
    said.setdefault(v.prompt_id, []).append((v.p, v.shown_first))
  assert said == {
    'q1': [(1.0, 'a'), (1.0, 'b')],
    'q2': [(0.0, 'a'), (0.0, 'b')],
    'q3': [(1.0, 'a'), (0.0, 'b')],
    'q4': [(None, '')],
    'q5': [(0.5, '')],
    'q6': [(0.5, 'a'), (0.5, 'b')],
  }
  assert out.notes == ['openai:m: no verdict could be read for 1 of 6 pairs']
  assert sorted(map(tuple, (shown(b) for _, _, b in asked)))[:2] == [
    ('abc', 'xyz'),
    ('first here', 'first too'),
  ]
  assert any('user: hello you' in b['messages'][1]['content'] for _, _, b in asked)
  text = ''.join(p.read_text() for p in tmp_path.iterdir())
  assert 'secret' not in text and text.count('\n') == 10


def test_what_may_pass_is_tried_again(tmp_path):
  troubles = [(500, 'overloaded'), (429, 'slow down'), (200, None), (200, [])]
  answer = lambda number, body: troubles[number - 1] if number <= 4 else by_length(number, body)
  with Fake(answer) as server:
    out = openai_judge.judge(PAIRS[:1], server.endpoint(), tmp_path, 'openai:m', workers=1)
    assert [v.p for v in out.verdicts] == [1.0, 1.0] and len(server.asked) == 6


def test_a_server_says_how_long_to_wait(tmp_path):
  answer = lambda number, body: (429, 'slow down') if number == 1 else by_length(number, body)
  with Fake(answer, after='0.5') as server:
    openai_judge.judge(PAIRS[:1], server.endpoint(), tmp_path, 'openai:m', workers=1)
    first, second, _ = server.times
    assert second - first >= 0.5


def test_a_key_is_neither_needed_nor_shown(tmp_path, monkeypatch):
  """A server that repeats the key in its error; one that asks for none, with a key of OpenAI's in
  the environment, which is not for it."""
  monkeypatch.setenv('OPENAI_API_KEY', 'not-for-this-server')
  with Fake(lambda number, body: (403, 'no such key: secret')) as server:
    with pytest.raises(ValueError, match='HTTP 403.*no such key: KEY') as error:
      openai_judge.judge(PAIRS, server.endpoint(), tmp_path, 'openai:m')
    assert 'secret' not in str(error.value)
  with Fake(by_length) as server:
    openai_judge.judge(PAIRS[:1], server.endpoint(key=None), tmp_path, 'openai:m')
    assert [key for _, key, _ in server.asked] == [None, None]


def test_the_client_is_an_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'openai', None)
  with Fake(by_length) as server:
    with pytest.raises(ValueError, match=r"pip install 'alignjax\[eval\]'"):
      openai_judge.judge(PAIRS, server.endpoint(), tmp_path, 'openai:m')


def test_waits_between_tries_double_and_follow_the_server():
  waits, left = [], [retries.Passing('busy')] * 3 + [retries.Passing('busy', after=20.0)]

  def request():
    if left:
      raise left.pop(0)
    return 'done'

  assert retries.tried(request, tries=5, wait=1.0, sleep=waits.append) == 'done'
  assert [0.8 <= w / base <= 1.2 for w, base in zip(waits, (1, 2, 4), strict=False)] == [True] * 3
  assert waits[3] == 20.0
  left[:] = [retries.Passing('first', after=9999.0), retries.Passing('second')]
  with pytest.raises(retries.Passing, match='second'):
    retries.tried(request, tries=2, wait=1.0, sleep=waits.append)
  assert waits[4:] == [60.0]  # a minute at most


@pytest.mark.parametrize(
  'code,after,kind,seconds',
  [
    (429, '3', retries.Passing, 3.0),
    (503, '0.5', retries.Passing, 0.5),
    (408, None, retries.Passing, 0.0),
    (500, 'Wed, 21 Oct 2026 07:28:00 GMT', retries.Passing, 0.0),
    (404, '3', retries.Refused, None),
  ],
)
def test_which_answers_may_pass(code, after, kind, seconds):
  found = retries.failure(code, 'x' * 1000, after)
  assert type(found) is kind and str(found) == f'HTTP {code}: {"x" * 300}'
  assert getattr(found, 'after', None) == seconds


def test_a_failure_half_way_loses_nothing(tmp_path):
  broken = True
  answer = lambda number, body: (
    (401, 'wrong key') if broken and number > 4 else by_length(number, body)
  )
  with Fake(answer) as server:
    with pytest.raises(
      ValueError, match='HTTP 401.*wrong key.*Is the key right.*4 answers are kept'
    ) as error:
      openai_judge.judge(PAIRS, server.endpoint(), tmp_path / 'a', 'openai:m', workers=1)
    assert 'secret' not in str(error.value)
    broken, before = False, len(server.asked)
    (kept,) = (tmp_path / 'a').iterdir()
    kept.write_bytes(kept.read_bytes() + b'{"question": "torn')
    resumed = openai_judge.judge(PAIRS, server.endpoint(), tmp_path / 'a', 'openai:m', workers=1)
    assert len(server.asked) - before == 6
    assert resumed == openai_judge.judge(PAIRS, server.endpoint(), tmp_path / 'b', 'openai:m')


def test_an_endpoint_that_is_not_there(tmp_path):
  with socket.socket() as holder:  # has the port, so that nobody else gets it, and does not listen
    holder.bind(('127.0.0.1', 0))
    gone = Endpoint(
      f'http://127.0.0.1:{holder.getsockname()[1]}/v1', key='x', model='m/1', wait=0.01, tries=2
    )
    with pytest.raises(
      ValueError, match=r'cannot be used after 2 tries: ConnectError.*refused.*0 answers are kept'
    ):
      openai_judge.judge(PAIRS, gone, tmp_path, 'openai:m')


@pytest.mark.parametrize(
  'answer,verdict',
  [
    ('Verdict: 1', 1),
    ('reasons\n**Verdict:** 2.', 2),
    ('verdict: TIE', 'tie'),
    ('2', 2),
    ('Verdict: 12', None),
    ('', None),
    ('Response 1 is better', None),
    ('Verdict: 1? No.\nVerdict: tie', 'tie'),
  ],
)
def test_verdicts_are_read(answer, verdict):
  assert openai_judge.verdict_of(answer) == verdict
