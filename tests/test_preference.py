"""Preference figures against closed forms, direct maximisation and counts by hand; responses that
are kept; the command."""

import gzip
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
import scipy.optimize

from alignjax.commands import preference as command
from alignjax.evals.preference import judgments, length, responses, statistics, verdicts
from alignjax.evals.preference.verdicts import Judged, Rating, Verdict
from alignjax.inference import bulk, loading
from alignjax.runtime import journal

CHAT = pathlib.Path(__file__).parent / 'golden' / 'chat'
SHARED = pathlib.Path(
  os.environ.get('ALIGNJAX_DATA', pathlib.Path(__file__).parents[2] / 'shared' / 'data')
)


def table(rows, policies):
  return statistics.tabulate([Verdict(*row) for row in rows], policies)


def test_strength_of_two_policies_is_the_logit_of_the_win_rate():
  rows = [(f'q{i}', 'a', 'b', p, 'j') for i, p in enumerate([1.0] * 50 + [0.0] * 20 + [0.5] * 10)]
  out = statistics.bradley_terry(table(rows, ['a', 'b']), ['a', 'b'], 'b')
  rate = 55 / 80
  assert out['a']['mean'] == pytest.approx(np.log(rate / (1 - rate)), abs=1e-6)
  assert out['b'] == {'mean': 0.0, 'ci95': [0.0, 0.0], 'n': 80, 'kind': 'statistic'}
  # its interval is the logit of the win rate's, which is normal here
  error = 1.96 * np.sqrt(np.var([1.0] * 50 + [0.0] * 20 + [0.5] * 10) / 80)
  logits = [np.log(x / (1 - x)) for x in (rate - error, rate + error)]
  np.testing.assert_allclose(out['a']['ci95'], logits, atol=0.15)


def test_strengths_are_those_of_direct_maximisation():
  rng = np.random.default_rng(0)
  names, truth = ['a', 'b', 'c', 'd'], np.array([0.0, 0.7, -0.4, 1.2])
  rows, wins = [], np.zeros((4, 4))
  for q in range(150):
    i, j = rng.choice(4, 2, replace=False)
    p = rng.choice([0.5, float(rng.random() < 1 / (1 + np.exp(truth[j] - truth[i])))], p=[0.1, 0.9])
    rows.append((f'q{q}', names[i], names[j], p, 'j'))
    wins[i, j] += p
    wins[j, i] += 1 - p
  loss = lambda x: (wins * np.logaddexp(0, x[None, :] - x[:, None])).sum() + x[0] ** 2
  best = scipy.optimize.minimize(loss, np.zeros(4), tol=1e-12).x
  out = statistics.bradley_terry(table(rows, names), names, 'a')
  np.testing.assert_allclose([out[n]['mean'] for n in names], best - best[0], atol=1e-4)
  assert all(out[n]['ci95'][0] < out[n]['mean'] < out[n]['ci95'][1] for n in 'bcd')
  assert sum(f['n'] for f in out.values()) == 300


def test_where_strengths_have_no_maximum():
  always = [(f'q{i}', 'a', 'b', 1.0, 'j') for i in range(9)]
  apart = [*always, ('q', 'b', 'a', 1.0, 'j'), ('q', 'c', 'd', 0.5, 'j')]
  for rows, names in ((always, 'ab'), (apart, 'abcd')):
    out = statistics.bradley_terry(table(rows, list(names)), list(names), 'a')
    assert all(f['mean'] is None for f in out.values())
  rare = statistics.bradley_terry(
    table([*always, ('q', 'a', 'b', 0.0, 'j')], ['a', 'b']), ['a', 'b'], 'b'
  )
  assert rare['a']['mean'] == pytest.approx(np.log(9)) and rare['a']['ci95'] == [None, None]


def test_win_rates_by_hand_and_their_intervals():
  # the two orders disagree: a half
  rows = [
    ('q1', 'a', 'b', 1.0, 'j', '', 'a'),
    ('q1', 'a', 'b', 0.0, 'j', '', 'b'),
    ('q2', 'b', 'a', 1.0, 'j'),
    ('q2', 'c', 'b', 0.75, 'j'),
    ('q3', 'a', 'b', None, 'j'),
  ]
  out = statistics.win_rates(table(rows, ['a', 'b', 'c']), ['a', 'b', 'c'])
  assert out['a']['b']['mean'] == 0.25 and out['b']['a']['mean'] == 0.75 and out['a']['b']['n'] == 2
  assert (
    out['c']['b']['mean'] == 0.75
    and out['b']['c']['mean'] == 0.25
    and out['a']['c']['mean'] is None
  )
  rng = np.random.default_rng(1)
  wins = (rng.random(400) < 0.6).astype(float)
  one = [(f'q{i}', 'a', 'b', p, 'j', 'x') for i, p in enumerate(wins)]
  three = [(q, a, b, p, j, labeler) for q, a, b, p, j, _ in one for labeler in 'xyz']
  error = 1.96 * np.sqrt(wins.mean() * (1 - wins.mean()) / 400)
  for rows in (one, three):  # labelers who say the same add nothing to what is known
    figure = statistics.win_rates(table(rows, ['a', 'b']), ['a', 'b'])['a']['b']
    np.testing.assert_allclose(
      figure['ci95'], [wins.mean() - error, wins.mean() + error], atol=0.01
    )
    mirror = statistics.win_rates(table(rows, ['b', 'a']), ['b', 'a'])['a']['b']
    np.testing.assert_allclose(mirror['ci95'], figure['ci95'], atol=0.01)
  same = [
    (f'0123456789ab-{i}' if i else '0123456789ab', 'a', 'b', p, 'j')
    for i, p in enumerate([1.0, 0.0, 1.0])
  ]
  one = Judged([Verdict(*row) for row in same])
  columns = statistics.tabulate(one.verdicts, ['a', 'b'], verdicts.clusters(one))
  assert statistics.win_rates(columns, ['a', 'b'])['a']['b']['ci95'] == [None, None], 'one prompt'
  always = statistics.win_rates(
    table([(f'q{i}', 'a', 'b', 1.0, 'j') for i in range(24)], ['a', 'b']), ['a', 'b']
  )
  assert 0.8 < always['a']['b']['ci95'][0] < 0.95 and always['a']['b']['ci95'][1] == 1.0
  assert always['b']['a']['ci95'] == pytest.approx([0.0, 1 - always['a']['b']['ci95'][0]])


def test_agreement_by_hand():
  said = {'q1': 'aab', 'q2': 'bbb', 'q3': 'at', 'q4': 'a', 'q5': 'tt', 'q6': 'ba'}
  value = dict(a=1.0, b=0.0, t=0.5)
  rows = [(q, 'A', 'B', value[c], 'j', f'l{n}') for q, cs in said.items() for n, c in enumerate(cs)]
  out = statistics.agreement(table(rows, ['A', 'B']))
  assert (
    out['pairs'] == 5
    and out['pairwise']['n'] == 9
    and out['pairwise']['mean'] == pytest.approx(5 / 9)
  )
  assert out['pairwise_without_ties']['mean'] == pytest.approx(4 / 7)
  # Krippendorff: disagreement within units, each weighted 1 / (m - 1), against that of all values
  # of these units
  units = [cs for cs in said.values() if len(cs) > 1]
  n = sum(map(len, units))
  observed = (
    sum(
      sum(x != y for i, x in enumerate(u) for k, y in enumerate(u) if i != k) / (len(u) - 1)
      for u in units
    )
    / n
  )
  every = ''.join(units)
  expected = sum(x != y for i, x in enumerate(every) for k, y in enumerate(every) if i != k) / (
    n * (n - 1)
  )
  assert out['alpha']['mean'] == pytest.approx(1 - observed / expected)
  assert statistics.agreement(table(rows[:1], ['A', 'B'])) is None
  same = [(q, 'A', 'B', 1.0, 'j', x) for q in ('q1', 'q2') for x in 'xy']
  assert statistics.agreement(table(same, ['A', 'B']))['alpha']['mean'] is None


def test_length_position_and_judges_by_hand():
  rows = [
    ('q1', 'a', 'b', 1.0, 'j'),
    ('q2', 'a', 'b', 0.0, 'j'),
    ('q3', 'b', 'a', 0.75, 'j'),
    ('q4', 'a', 'b', 1.0, 'j'),
  ]
  words = {
    ('q1', 'a'): 9,
    ('q1', 'b'): 4,
    ('q2', 'a'): 7,
    ('q2', 'b'): 6,
    ('q3', 'a'): 2,
    ('q3', 'b'): 5,
    ('q4', 'a'): 3,
    ('q4', 'b'): 3,
  }
  out = length.effect(table(rows, ['a', 'b']), ['a', 'b'], words)
  assert out['longer_wins']['mean'] == pytest.approx((1 + 0 + 0.75) / 3)
  # b shown first is a turned round
  x, y = np.array([5, 1, -3, 0.0]), np.array([0.5, -0.5, -0.25, 0.5])
  assert out['correlation']['mean'] == pytest.approx((x @ y) / np.sqrt((x @ x) * (y @ y)))
  shown = [
    Verdict('q1', 'a', 'b', 1.0, 'j', 'm', 'a'),
    Verdict('q1', 'a', 'b', 0.0, 'j', 'm', 'b'),
    Verdict('q2', 'b', 'a', 1.0, 'j', 'm', 'a'),
    Verdict('q2', 'b', 'a', 1.0, 'j', 'm', 'b'),
  ]
  found = statistics.position_bias(shown)
  assert found['first_wins']['mean'] == 0.75 and found['consistent']['mean'] == 0.5
  # a both times
  turned = [
    Verdict('q3', 'a', 'b', 1.0, 'j', 'm', 'a'),
    Verdict('q3', 'b', 'a', 0.0, 'j', 'm', 'a'),
    # b, then a tie
    Verdict('q4', 'b', 'a', 1.0, 'j', 'm', 'a'),
    Verdict('q4', 'a', 'b', 0.5, 'j', 'm', 'a'),
    # two labelers
    Verdict('q5', 'a', 'b', 1.0, 'j', 'm', 'a'),
    Verdict('q5', 'b', 'a', 0.0, 'j', 'n', 'a'),
  ]
  found = statistics.position_bias(turned)
  assert found['first_wins']['mean'] == pytest.approx((1 + 0 + 1 + 0.5 + 1 + 0) / 6)
  assert found['consistent']['n'] == 2 and found['consistent']['mean'] == 0.5
  assert statistics.position_bias([Verdict(*r) for r in rows]) is None
  other = [('q1', 'a', 'b', 0.9, 'k'), ('q2', 'b', 'a', 0.2, 'k'), ('q3', 'a', 'b', 0.5, 'k')]
  (one,) = statistics.between({'j': table(rows, ['a', 'b']), 'k': table(other, ['a', 'b'])})
  assert one['agreement']['n'] == 2 and one['agreement']['mean'] == 0.5


def of_lengths(data):
  """Returns (verdicts, words) of (words of the policy 'new', of 'old', P(new wins)), every second
  one with the policies turned round."""
  verdicts, words = [], {}
  for k, (new, old, p) in enumerate(data):
    words |= {(f'q{k}', 'new'): new, (f'q{k}', 'old'): old}
    verdicts.append(
      (f'q{k}', 'new', 'old', p, 'j') if k % 2 else (f'q{k}', 'old', 'new', 1 - p, 'j')
    )
  return verdicts, words


def controlled(verdicts, words, names=('old', 'new')):
  return length.controlled_win_rates(table(verdicts, names), names, 'old', words)


def test_length_controlled_win_rate_by_hand():
  # Ten responses are longer by 4 words and win .8, ten are shorter by 4 and win .5. A line in
  # tanh(d / 4) = +-tanh(1) meets both logits, log(4) and 0: theta is log(4) / 2, the rate 2/3.
  data = [(9, 5, 1.0)] * 8 + [(9, 5, 0.0)] * 2 + [(5, 9, 1.0)] * 4 + [(5, 9, 0.5)] * 2
  data += [(5, 9, 0.0)] * 4
  verdicts, words = of_lengths(data)
  found = controlled(verdicts, words)
  assert list(found) == ['new'] and found['new']['n'] == 20
  assert found['new']['mean'] == pytest.approx(2 / 3)
  assert found['new']['ci95'][0] < 2 / 3 < found['new']['ci95'][1]
  # The names' order does not matter, and a response of unknown length is left out.
  assert controlled(verdicts, words, ('new', 'old'))['new']['mean'] == pytest.approx(2 / 3)
  more = [*verdicts, ('q', 'new', 'old', 1.0, 'j')]
  assert controlled(more, words)['new'] == found['new']


@pytest.mark.parametrize('seed', range(3))
def test_length_controlled_win_rate_is_a_logistic_regression(seed):
  rng = np.random.default_rng(seed)
  data = rng.integers(1, 60, (80, 2)).tolist()
  data = [(a, b, float(rng.random() < 1 / (1 + np.exp(0.4 - 0.03 * (a - b))))) for a, b in data]
  verdicts, words = of_lengths(data)
  d = np.array([a - b for a, b, _ in data], float)
  wins = np.array([p for *_, p in data])
  x = np.tanh(d / np.sqrt(((d - d.mean()) ** 2).mean()))

  def loss(at):
    p = 1 / (1 + np.exp(-(at[0] + at[1] * x)))
    return -(wins * np.log(p) + (1 - wins) * np.log(1 - p)).sum()

  theta = scipy.optimize.minimize(loss, [0, 0], method='Nelder-Mead', options={'xatol': 1e-9}).x[0]
  figure = controlled(verdicts, words)['new']
  assert figure['mean'] == pytest.approx(1 / (1 + np.exp(-theta)), abs=1e-6)


@pytest.mark.parametrize(
  ('data', 'mean'),
  [
    # Equal lengths leave the win rate as it is.
    ([(5, 5, 1.0), (5, 5, 1.0), (7, 7, 0.0), (3, 3, 0.5)], 0.625),
    # Always won; or length tells the verdicts apart: the likelihood has no maximum.
    ([(9, 5, 1.0), (4, 6, 1.0), (7, 3, 1.0)], None),
    ([(9, 5, 1.0), (4, 6, 0.0), (7, 3, 1.0), (1, 9, 0.0)], None),
    ([], None),
  ],
)
def test_length_controlled_win_rate_at_the_edges(data, mean):
  figure = controlled(*of_lengths(data))['new']
  assert figure['mean'] == (mean if mean is None else pytest.approx(mean))


def test_ratings_are_averaged_by_policy():
  judged = Judged(
    [],
    [
      Rating('q1', 'a', 'j', 'x', 6.0, {'hallucination': True}),
      Rating('q1', 'a', 'j', 'y', 3.0, {}),
      Rating('q2', 'a', 'j', 'x', None, {'hallucination': False}),
      Rating('q1', 'b', 'j', 'x', 7.0, {}),
    ],
  )
  out = statistics.rated(judged, ['a', 'b'])['j']
  assert (
    out['a']['likert']['mean'] == 4.5
    and out['a']['hallucination']['mean'] == 0.5
    and out['b']['likert']['mean'] == 7
  )
  assert 'hallucination' not in out['b']


def test_pandalm_agreement_and_order(tmp_path):
  path = SHARED / 'comparisons' / 'pandalm' / 'testset.jsonl.gz'
  if not path.exists():
    pytest.skip(f'no {path}: set ALIGNJAX_DATA')
  command.main(
    [f'--judge=file:{path}', '--judge_mapping=pandalm', f'--out={tmp_path}', '--baseline=opt-7b']
  )
  found = json.loads((tmp_path / 'preference.json').read_text())['judges'][f'file:{path}']
  rows = [json.loads(line) for line in gzip.open(path, 'rt')]
  choices = [[r[f'annotator{n}'] for n in (1, 2, 3)] for r in rows]
  same = np.mean([[a == b, a == c, b == c] for a, b, c in choices])
  assert found['agreement']['pairwise']['mean'] == pytest.approx(same) and round(same, 3) == 0.920
  # alpha of three on every unit: from the counts alone
  counts = np.array([[c.count(v) for v in (0, 1, 2)] for c in choices])
  totals = counts.sum(0)
  expected = 1 - (totals * (totals - 1)).sum() / (totals.sum() * (totals.sum() - 1))
  # order of policies differs
  assert found['agreement']['alpha']['mean'] == pytest.approx(1 - (1 - same) / expected, abs=2e-3)
  names = sorted({n for r in rows for n in r['cmp_key'].split('_')})
  wins = np.zeros((5, 5))
  for r, cs in zip(rows, choices, strict=True):
    i, j = map(names.index, r['cmp_key'].split('_'))
    for c in cs:
      wins[i, j] += {1: 1, 2: 0, 0: 0.5}[c]
      wins[j, i] += {1: 0, 2: 1, 0: 0.5}[c]
  best = scipy.optimize.minimize(
    lambda x: (wins * np.logaddexp(0, x[None] - x[:, None])).sum() + x[0] ** 2,
    np.zeros(5),
    tol=1e-12,
  ).x
  strengths = {n: f['mean'] for n, f in found['bradley_terry'].items()}
  np.testing.assert_allclose(
    [strengths[n] for n in names], best - best[names.index('opt-7b')], atol=1e-4
  )
  assert max(strengths, key=strengths.get) == 'llama-7b' and strengths['opt-7b'] == 0
  rate = found['win_rate']['llama-7b']['opt-7b']['mean']
  i, j = names.index('llama-7b'), names.index('opt-7b')
  assert rate == pytest.approx(wins[i, j] / (wins[i, j] + wins[j, i]))
  assert (
    '![win rates' in (tmp_path / 'preference.md').read_text()
    and (tmp_path / 'preference.png').stat().st_size > 5000
  )


@pytest.fixture(scope='module')
def model():
  return loading.load(f'hf:{CHAT}', 'lm', 'chat')


def records(*texts):
  return [dict(prompt=t, prompt_id=responses.prompt_id(t)) for t in texts]


def test_responses_are_kept_and_an_interrupted_call_goes_on(model, tmp_path, monkeypatch, capsys):
  asked = records(*(f'prompt {i}' for i in range(5)), 'long ' * 200)
  options = dict(temperature=1.0, max_tokens=4, rows=2)
  whole = responses.respond(model, 'w', asked, tmp_path / 'whole', **options)
  assert [r.text is None for r in whole] == [False] * 5 + [True]  # the context is 512 tokens
  assert (
    all(1 <= r.tokens <= 4 and (r.ended or r.tokens == 4) for r in whole[:5])
    and len({r.text for r in whole[:5]}) > 1
  )
  real = journal.append

  def stopping(path, rows):
    if path.exists() and len(path.read_text().splitlines()) == 2:
      raise KeyboardInterrupt
    real(path, rows)

  monkeypatch.setattr(journal, 'append', stopping)
  with pytest.raises(KeyboardInterrupt):
    responses.respond(model, 'w', asked, tmp_path / 'cut', **options)
  monkeypatch.setattr(journal, 'append', real)
  (file,) = (tmp_path / 'cut').glob('*.jsonl')
  file.write_bytes(file.read_bytes() + b'{"prompt_id": "torn')
  capsys.readouterr()
  assert responses.respond(model, 'w', asked, tmp_path / 'cut', **options) == whole
  assert '2 responses were already in' in capsys.readouterr().out
  monkeypatch.setattr(
    bulk,
    'each',
    lambda run, make, lengths, *_, **__: [] if not lengths else pytest.fail('sampled again'),
  )
  assert responses.respond(model, 'w', asked, tmp_path / 'cut', **options) == whole
  # of other prompts the same ones
  assert responses.respond(model, 'w', asked[2:4], tmp_path / 'cut', **options) == whole[2:4]
  with pytest.raises(ValueError, match='leaves no room'):
    responses.respond(model, 'w', asked, tmp_path, max_tokens=512)


def test_prompts_have_names_and_are_drawn_by_the_seed(tmp_path):
  path = tmp_path / 'p.jsonl'
  path.write_text(
    '\n'.join(json.dumps(dict(prompt=f'p{i % 9}')) for i in range(10))
    + '\n{"prompt": "x", "prompt_id": 7}'
  )
  found = responses.prompts(f'jsonl:{path}', None, None, 0)
  names = [r['prompt_id'] for r in found]
  assert len(set(names)) == 11 and names[9] == f'{names[0]}-2' and names[10] == '7'
  some = [r['prompt_id'] for r in responses.prompts(f'jsonl:{path}', None, 4, 0)]
  assert len(some) == 4 and set(some) < set(names)
  assert some == [r['prompt_id'] for r in responses.prompts(f'jsonl:{path}', None, 4, 0)]
  path.write_text(
    '\n'.join(
      json.dumps(dict(prompt=p, prompt_id=i))
      for p, i in zip('abcd', ['a', 'a', 'a-2', 0], strict=True)
    )
  )
  assert [r['prompt_id'] for r in responses.prompts(f'jsonl:{path}', None, None, 0)] == [
    'a',
    'a-3',
    'a-2',
    '0',
  ]
  for bad in (False, 1.5, ['q']):
    path.write_text(
      json.dumps(dict(prompt='p')) + '\n' + json.dumps(dict(prompt='p', prompt_id=bad))
    )
    with pytest.raises(
      ValueError, match="p.jsonl, line 2: field 'prompt_id' must be text or a whole number"
    ):
      responses.prompts(f'jsonl:{path}', None, None, 0)


@pytest.fixture(scope='module')
def setting(tmp_path_factory):
  """Flags for two policies, of different weights, and three prompts."""
  from safetensors.numpy import load_file, save_file

  folder = tmp_path_factory.mktemp('policies')
  shutil.copytree(CHAT, folder / 'other')
  tensors = load_file(CHAT / 'model.safetensors')
  rng = np.random.default_rng(0)
  save_file(
    {k: v + 0.5 * rng.standard_normal(v.shape).astype(v.dtype) for k, v in tensors.items()},
    folder / 'other' / 'model.safetensors',
    metadata={'format': 'pt'},
  )
  (folder / 'p.jsonl').write_text(
    '\n'.join(json.dumps(dict(prompt=f'say {x}')) for x in ('one', 'two', 'three'))
  )
  return [
    f'--policies=base=hf:{CHAT},other=hf:{folder / "other"}',
    f'--prompts=jsonl:{folder / "p.jsonl"}',
    '--max_tokens=6',
    '--template=chat',
  ]


def longest(pairs, *, keep):
  """A judge of one's own: more characters win."""
  assert keep.is_dir()
  return [float(len(p.response_a.text) > len(p.response_b.text)) for p in pairs]


def test_sheets_are_blind_and_come_back(setting, tmp_path, monkeypatch):
  sheet, out = tmp_path / 'sheet.jsonl', tmp_path / 'out'
  command.main(
    [*setting, f'--export={sheet}', '--judge=tests.test_preference:longest', f'--out={out}']
  )
  rows = [json.loads(line) for line in sheet.read_text().splitlines()]
  assert len(rows) == 3 and 'base' not in sheet.read_text() and 'other' not in sheet.read_text()
  key = json.loads((tmp_path / 'sheet.key.json').read_text())
  with pytest.raises(ValueError, match='is there already'):
    command.main([*setting, f'--export={sheet}', f'--out={out}'])
  for row in rows[:2]:  # one person judges two of the three by length, and rates them
    a_longer = len(row['response_1']) > len(row['response_2'])
    row |= dict(
      choice=1 if a_longer else 2, likert_1=6, likert_2=2, flags_1=['hallucination'], flags_2=[]
    )
  sheet.write_text('\n'.join(map(json.dumps, rows)))
  from tests.test_judges import Fake

  monkeypatch.delenv('OPENAI_API_KEY', raising=False)
  # without a key, as a local server; it likes the first place
  with Fake(lambda number, body: (200, 'Verdict: 1')) as server:
    command.main(
      [
        *setting,
        f'--judge=file:{sheet}',
        '--judge=tests.test_preference:longest',
        '--judge=openai:m',
        f'--judge_url={server.endpoint().url}',
        f'--out={out}',
      ]
    )
    assert len(server.asked) == 6 and server.asked[0][1] is None
  result = json.loads((out / 'preference.json').read_text())
  people, machine = result['judges'][f'file:{sheet}'], result['judges']['openai:m']
  low, high = machine['win_rate']['other']['base'].pop('ci95')
  # three ties
  assert (
    machine['win_rate']['other']['base'] == {'mean': 0.5, 'n': 3, 'kind': 'share'}
    and low < 0.25
    and high > 0.75
  )
  assert (
    machine['position']['first_wins']['mean'] == 1.0
    and machine['position']['consistent']['mean'] == 0.0
  )
  assert (
    people['verdicts'] == 2
    and people['labelers'] == ['sheet']
    and people['position']['first_wins']['n'] == 2
  )
  by_hand = np.mean([key[str(r['item'])][str(r['choice'])] == 'other' for r in rows[:2]])
  assert people['win_rate']['other']['base']['mean'] == pytest.approx(by_hand)
  first = [key[str(r['item'])]['1'] for r in rows[:2]]
  if 'base' in first:
    assert result['ratings'][f'file:{sheet}']['base']['likert']['mean'] == (
      6.0 if first == ['base'] * 2 else 4.0
    )
  assert [r['agreement']['n'] for r in result['between_judges']] == [2, 0, 0]
  assert (
    result['between_judges'][0]['agreement']['mean'] == 1.0
    and '1 rows are not judged yet' in result['notes'][0]
  )
  assert (out / 'preference.md').read_text().count('## Judge: ') == 3
  rows[0]['response_1'] += ' and more'
  sheet.write_text('\n'.join(map(json.dumps, rows)))
  with pytest.raises(ValueError, match='of another response'):
    command.main([*setting, f'--judge=file:{sheet}', f'--out={out}'])


def test_both_sides_of_a_sheet_are_drawn(tmp_path):
  said = dict(good=[responses.Response('yes')] * 40, bad=[responses.Response('no')] * 40)
  pairs = verdicts.make_pairs([dict(prompt='p', prompt_id=f'q{i}') for i in range(40)], said)
  judgments.export(pairs, tmp_path / 's.jsonl', seed=1)
  rows = [json.loads(line) for line in (tmp_path / 's.jsonl').read_text().splitlines()]
  assert 10 < sum(r['response_1'] == 'yes' for r in rows) < 30
  ids = [
    json.loads((tmp_path / 's.key.json').read_text())[str(r['item'])]['prompt_id'] for r in rows
  ]
  assert sorted(ids) == sorted(f'q{i}' for i in range(40)) and ids != [f'q{i}' for i in range(40)]
  for row in rows:
    row['choice'] = 1 if row['response_1'] == 'yes' else 2
  (tmp_path / 's.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  back = judgments.read(str(tmp_path / 's.jsonl'), judge='people')
  assert (
    all(v.p == (1.0 if v.a == 'good' else 0.0) and v.shown_first == 'a' for v in back.verdicts)
    and len(back.verdicts) == 40
  )


LONG, SHORT, OTHER = 'one two three four five six', 'bad', 'three words here'


def ranked_by(ann, prompts):
  """Judgments of two different responses of A to one prompt against one of B: the longer one wins
  each time."""
  return [
    dict(a='A', b='B', choice=choice, response_a=text, response_b=OTHER, prompt=p, labeler_id=ann)
    for p in prompts
    for text, choice in ((LONG, 'a'), (SHORT, 'b'))
  ]


def longer(pairs, *, keep):
  """A judge of one's own: more words win."""
  return [float(len(p.response_a.text.split()) > len(p.response_b.text.split())) for p in pairs]


@pytest.mark.parametrize('files', [1, 2])
def test_every_judgment_keeps_its_own_two_texts(files, tmp_path):
  """Within a file, and of two labelers in two files, who judged in another order."""
  rows = ranked_by('ann', [f'P{i}' for i in range(6)])
  (tmp_path / 'f0.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (tmp_path / 'f1.jsonl').write_text(
    '\n'.join(json.dumps(row | dict(labeler_id='bob')) for row in rows[::-1])
  )
  paths = [f'file:{tmp_path}/f{i}.jsonl' for i in range(files)]
  judge = 'tests.test_preference:longer'
  command.main([*(f'--judge={path}' for path in paths), f'--judge={judge}', f'--out={tmp_path}'])
  result = json.loads((tmp_path / 'preference.json').read_text())
  for name in (*paths, judge):
    found = result['judges'][name]
    assert (found['verdicts'], found['prompts']) == (12, 6)
    assert found['length']['longer_wins']['mean'] == 1.0
    # A wins with 3 words more and loses with 2 fewer.
    assert found['length']['correlation']['mean'] == pytest.approx(5 / np.sqrt(26))
    assert found['win_rate']['A']['B']['mean'] == 0.5
  assert all(
    one['agreement']['mean'] == 1.0 and one['agreement']['n'] == 12
    for one in result['between_judges']
  )
  assert len(result['between_judges']) == files + (files == 2)
  # A response of B is one response, although it was judged beside two of A.
  assert (result['words']['A']['mean'], result['words']['A']['n']) == (3.5, 12)
  assert (result['words']['B']['mean'], result['words']['B']['n']) == (3.0, 6)


def test_judgments_of_several_responses_to_a_prompt_are_one_cluster(tmp_path):
  (tmp_path / 'j.jsonl').write_text('\n'.join(map(json.dumps, ranked_by('ann', ['P']))))
  read = judgments.read(str(tmp_path / 'j.jsonl'), judge='j')
  one, two = (v.prompt_id for v in read.verdicts)
  assert one != two and (read.texts[one, 'A'], read.texts[two, 'A']) == (LONG, SHORT)
  assert [(p.response_a.text, p.response_b.text) for p in verdicts.pairs_of(read)] == [
    (LONG, OTHER),
    (SHORT, OTHER),
  ]
  made = statistics.summarize(read, ['A', 'B'], 'A', read.texts)['judges']['j']
  assert made['length']['longer_wins']['ci95'] == [None, None]


def test_labelers_of_the_same_two_responses_are_compared(tmp_path):
  """And not those of different responses of the same policies."""
  rows = [*ranked_by('ann', ['P']), *ranked_by('bob', ['P'])[1:]]
  rows.append(dict(rows[0], labeler_id='eve', choice='b', response_a=f'{LONG}\n'))
  (tmp_path / 'j.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  read = judgments.read(str(tmp_path / 'j.jsonl'), judge='j')
  found = statistics.agreement(statistics.tabulate(read.verdicts, ['A', 'B']))
  # On the long one ann and eve differ; on the short one ann and bob agree.
  assert found['pairs'] == 2 and found['pairwise']['mean'] == 0.5


def test_a_policy_has_one_response_to_a_prompt_of_the_command(tmp_path):
  (tmp_path / 'j.jsonl').write_text('\n'.join(map(json.dumps, ranked_by('ann', ['P']))))
  name = responses.prompt_id('P')
  with pytest.raises(ValueError, match="j.jsonl, line 2: the response of 'A' .* is another one"):
    judgments.read(str(tmp_path / 'j.jsonl'), judge='j', policies=['A', 'B'], prompts={name})


def test_the_same_prompt_is_one_cluster_whatever_its_records_are_called():
  names = [('q7', 'P'), ('q7-2', 'P'), ('0123456789ab-2', 'P'), ('other', 'P'), ('r', 'R')]
  judged = Judged(
    [Verdict(name, 'a', 'b', p, 'j') for (name, _), p in zip(names, (1, 0, 1, 0, 1), strict=True)],
    prompts=dict(names),
  )
  labels = verdicts.clusters(judged)
  assert len({labels[name] for name, _ in names[:4]}) == 1 and labels['r'] != labels['q7']
  # Where the prompt is not known, a name that was made of it says so.
  bare = verdicts.clusters(Judged(judged.verdicts))
  assert bare == {name: name for name, _ in names} | {'0123456789ab-2': '0123456789ab'}


def test_a_repeated_prompt_is_not_two_independent_units(setting, tmp_path):
  """Records with a prompt_id of their own, of which three are the same prompt."""
  path = tmp_path / 'p.jsonl'
  path.write_text(
    '\n'.join(json.dumps(dict(prompt='say one', prompt_id=name)) for name in ('a', 'a', 'b'))
  )
  flags = [*setting, f'--prompts=jsonl:{path}', '--judge=tests.test_preference:longest']
  command.main([*flags, f'--out={tmp_path}/out'])
  result = json.loads((tmp_path / 'out' / 'preference.json').read_text())
  (judge,) = result['judges'].values()
  rate = judge['win_rate']['other']['base']
  assert (rate['n'], rate['ci95']) == (3, [None, None])
  assert (result['words']['base']['n'], result['words']['base']['ci95']) == (3, [None, None])


GOOD = dict(prompt_id='q', a='x', b='y', choice='a')


@pytest.mark.parametrize(
  'row,words',
  [
    (GOOD | dict(choice='c'), ['line 2', 'choice', "'c'"]),
    (GOOD | dict(choice=1.5), ['line 2', 'probability']),
    (GOOD | dict(a='z'), ['line 2', "policy 'z'", 'x, y']),
    (GOOD | dict(prompt_id='r'), ['line 2', "prompt 'r'"]),
    (GOOD | dict(b='x'), ['line 2', 'with itself']),
    (dict(prompt_id='q', a='x'), ['line 2', 'lacks b, choice;']),
    (dict(prompt_id='q', policy='x', likert=8), ['line 2', '1 to 7']),
    (dict(prompt_id='q', policy='x', likert=10**400), ['line 2', 'likert', '401 digits']),
    (dict(prompt_id='q', policy='x', flags=['rude']), ['line 2', 'hallucination', 'rude']),
    (dict(prompt_id='q', policy='x'), ['line 2', 'likert']),
    ([1], ['line 2', 'object']),
    (dict(item=1, choice=1), ['blinded sheet', '--judge_key']),
  ],
)
def test_wrong_judgments_are_named_by_file_and_line(row, words, tmp_path):
  path = tmp_path / 'j.jsonl'
  path.write_text(json.dumps(GOOD) + '\n' + json.dumps(row))
  with pytest.raises((ValueError, FileNotFoundError)) as error:
    judgments.read(str(path), judge='j', policies=['x', 'y'], prompts={'q'})
  assert all(w in str(error.value) for w in ['j.jsonl', *words])


def test_other_judges_see_what_people_judged(tmp_path):
  rows = [
    GOOD | dict(prompt='p', response_a='short', response_b='much longer'),
    dict(prompt_id='r', prompt='p2', a='y', b='x', choice='tie', response_a='1', response_b='22'),
  ]
  (tmp_path / 'j.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  flags = [
    f'--judge=file:{tmp_path}/j.jsonl',
    '--judge=tests.test_preference:longest',
    f'--out={tmp_path}',
  ]
  command.main(flags)
  judges = json.loads((tmp_path / 'preference.json').read_text())['judges']
  # loses with 'short', wins with '22'
  assert judges['tests.test_preference:longest']['win_rate']['x']['y']['mean'] == 0.5
  assert judges[f'file:{tmp_path}/j.jsonl']['win_rate']['x']['y']['mean'] == 0.75
  (tmp_path / 'j.jsonl').write_text(json.dumps(GOOD))
  with pytest.raises(ValueError, match='other judges cannot be asked.*Name --policies'):
    command.main(flags)


def test_several_files_are_several_labelers(tmp_path):
  for name, choice in (('ann', 'a'), ('bob', 'tie'), ('eve', 0.25)):
    (tmp_path / f'{name}.jsonl').write_text(json.dumps(GOOD | dict(choice=choice)))
  read = judgments.read(f'{tmp_path}/*.jsonl', judge='j')
  assert [(v.labeler, v.p) for v in read.verdicts] == [('ann', 1.0), ('bob', 0.5), ('eve', 0.25)]
  with pytest.raises(FileNotFoundError, match='no such files'):
    judgments.read(f'{tmp_path}/*.csv', judge='j')


@pytest.mark.parametrize(
  'flags,words',
  [
    (['--judge=nobody'], 'rm:MODEL, sandbox'),
    (['--judge=rn:runs/x'], "Did you mean 'rm'"),
    ([], '--judge is missing'),
    (['--judge=sandbox'], 'trained in the sandbox'),
    (['--judge=openai:m'], 'OPENAI_API_KEY is not set'),
    (['--judge=openai:m', '--judge_url=http://x', '--judge_key_env=NO_SUCH'], 'NO_SUCH is not set'),
    (['--judge=openai:m', '--judge_url=x'], 'must begin with http'),
    (['--judge=openai:m', '--judge_url=http://x', '--judge_body=[1]'], 'not a JSON object'),
    (['--judge=file:none.jsonl'], 'no such file'),
    (['--judge=sandbox', '--baseline=z'], '--baseline=z'),
    (['--judge=sandbox', '--rows=0'], '--rows must be'),
    (['--judge=sandbox', '--policies=a=hf:x'], 'two policies or more'),
    (['--judge=sandbox', '--prompts='], '--prompts names no'),
    (['--judge=sandbox', '--temperature=-1'], 'negative'),
  ],
)
def test_flags_that_cannot_be(flags, words, setting, monkeypatch, tmp_path):
  monkeypatch.delenv('OPENAI_API_KEY', raising=False)
  with pytest.raises((ValueError, OSError)) as error:
    command.main([*setting, f'--out={tmp_path}', *flags])
  assert words in str(error.value)


@pytest.mark.slow
def test_a_sandbox_run_is_judged_by_its_labelers_and_its_reward_model(tmp_path):
  from alignjax import train
  from alignjax.configs import ppo_ptx

  c = ppo_ptx.get_config('tiny')
  c.mesh.data = 1
  c.stages_to_run = ('rm',)
  c.update_from_flattened_dict(
    {
      'stages.pretrain.documents': 64,
      'stages.sft.documents': 64,
      'stages.rm.prompts': 16,
      'stages.rm.evaluation_prompts': 8,
      'stages.rm.k_buckets': (9,),
      'stages.rm.responses': (4, 4),
    }
  )
  with pytest.MonkeyPatch.context() as m:
    one = jax.devices()[:1]
    m.setattr(jax, 'devices', lambda *_: one)
    train.main(c.lock(), tmp_path / 'run')
    command.main(
      [
        f'--policies=sft={tmp_path}/run/sft,pretrained={tmp_path}/run/pretrain',
        '--prompts=sandbox:',
        '--limit=12',
        '--judge=sandbox',
        f'--judge=rm:{tmp_path}/run/rm',
        f'--out={tmp_path}/out',
      ]
    )
  result = json.loads((tmp_path / 'out' / 'preference.json').read_text())
  assert list(result['judges']) == [
    'sandbox, training labelers',
    'sandbox, held-out labelers',
    f'rm:{tmp_path}/run/rm',
  ]
  assert all(
    j['prompts'] == 12 and 0 <= j['win_rate']['pretrained']['sft']['mean'] <= 1
    for j in result['judges'].values()
  )
  assert set(result['ratings']['sandbox']['sft']) == {'fails_instruction', 'hallucination'}


def test_a_prompt_id_stands_for_one_prompt():
  """Two files that number their own prompts: their responses would be judged under one of them."""

  def judged(prompt, *texts):
    return Judged(
      [Verdict('0', 'a', 'b', 1.0, 'people')],
      texts={('0', p): t for p, t in zip('ab', texts, strict=True)},
      prompts={'0': prompt},
    )

  made = verdicts.empty()
  verdicts.add(made, judged('P', 'one', 'two'), 'first.jsonl, line 1')
  verdicts.add(made, judged('P', 'three', 'four'), 'first.jsonl, line 2')
  with pytest.raises(ValueError, match="second.jsonl, line 1: the prompt_id '0' stands for anoth"):
    verdicts.add(made, judged('Q', 'five', 'six'), 'second.jsonl, line 1')
  assert len(made.verdicts) == 2 and made.prompts == {'0': 'P'}
