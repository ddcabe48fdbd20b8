"""The laboratory: the loop over seeds, and the studies that are included."""

import argparse
import json
import pathlib
import re
import signal
import sys
import types

import jax
import numpy as np
import pytest
from scipy import special

from alignjax import sandbox, studies
from alignjax.commands import study as command
from alignjax.evals import calibration
from alignjax.runtime import journal
from alignjax.studies import calibration as calibration_study
from alignjax.studies import leaderboard, methods, study

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def one_device(monkeypatch):
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *_: one)


def make(calls, seen=None):
  """A study of two parts that notes its calls and stops in a part for which `seen` says so."""

  def run(trial, part):
    if seen and (trial.seed, part) in seen:
      raise KeyboardInterrupt
    calls.append((trial.seed, part, trial.workdir.name))
    return [dict(method=part, score=trial.seed + len(part) * trial.options.scale)]

  def table(rows):
    figures = study.over_seeds(rows, 'method', ['score'])
    return ''.join(
      f'{name} {f["score"]["mean"]} {study.seeds_of(rows)}\n' for name, f in figures.items()
    )

  return types.SimpleNamespace(
    __name__='mylab.toy',
    parts=lambda options: options.methods,
    protocol=lambda trial, part: dict(scale=trial.options.scale, tiny=trial.tiny),
    run=run,
    table=table,
    plot=lambda rows, path: path.write_text(f'{len(rows)} rows'),
  )


def options(*methods, scale=1.0):
  return argparse.Namespace(methods=methods, scale=scale)


def test_a_study_goes_on_and_takes_further_seeds_and_parts(tmp_path):
  calls = []
  with pytest.raises(KeyboardInterrupt):
    study.run_study(make(calls, [(2, 'abc')]), tmp_path, [1, 2], True, options('a', 'abc'))
  assert calls == [(1, 'a', 'seed-1'), (1, 'abc', 'seed-1'), (2, 'a', 'seed-2')]
  assert (tmp_path / 'toy/table.md').read_text() == 'a 2.0 seed 1\nabc 4.0 seed 1\n'
  calls.clear()
  rows = study.run_study(make(calls), tmp_path, [1, 2], True, options('a', 'abc'))
  assert calls == [(2, 'abc', 'seed-2')]
  assert rows == [
    dict(method=name, score=seed + len(name), seed=seed) for seed in (1, 2) for name in ('a', 'abc')
  ]
  calls.clear()
  study.run_study(make(calls), tmp_path, [3], True, options('a', 'ab'))
  assert [call[:2] for call in calls] == [(3, 'a'), (3, 'ab')]
  folder = tmp_path / 'toy'
  assert (folder / 'table.md').read_text() == (
    'a 3.0 seeds 1, 2, 3\nabc 4.5 seeds 1, 2, 3\nab 5.0 seeds 1, 2, 3\n'
  )
  assert (folder / 'plot.png').read_text() == '6 rows'
  assert len(study.read_rows(folder / 'rows.jsonl')) == 6
  facts = json.loads((folder / 'facts.json').read_bytes())
  assert [(one['seed'], one['part']) for one in facts['facts']][-2:] == [(3, 'a'), (3, 'ab')]
  assert {'seconds', 'machine', 'command', 'commit'} == facts['facts'][0]['facts'].keys()
  assert facts['protocols']['ab'] == dict(scale=1.0, tiny=True)


def test_rows_of_another_protocol_and_damaged_rows_are_refused(tmp_path):
  calls = []
  study.run_study(make(calls), tmp_path, [1], True, options('a'))
  with pytest.raises(ValueError, match='seed-1/a.json has rows of another protocol: scale differs'):
    study.run_study(make(calls), tmp_path, [2], True, options('a', scale=2.0))
  assert len(calls) == 1
  path = tmp_path / 'toy/seed-1/a.json'
  path.write_text(path.read_text().replace('"score": 2.0', '"score": 3.0'))
  with pytest.raises(ValueError, match='a.json is damaged'):
    study.run_study(make(calls), tmp_path, [1], True, options('a'))
  with pytest.raises(ValueError, match='damaged'):
    journal.read_whole(path)


def test_figures_over_seeds_by_hand():
  rows = [
    dict(seed=s, method=m, gold=g)
    for s, m, g in [(1, 'x', 1.0), (1, 'y', 4.0), (2, 'x', 3.0), (2, 'y', 5.0), (3, 'x', None)]
  ]
  found = study.over_seeds(rows, 'method', ['gold', 'other'])
  assert list(found) == ['x', 'y'] and found['x']['gold']['n'] == 2
  assert found['x']['gold']['mean'] == 2.0 and found['x']['other']['mean'] is None
  # Two values, 1 apart from their mean: the standard error is 1, without skewness.
  reach = special.stdtrit(1, 0.975)
  assert np.allclose(found['x']['gold']['ci95'], [2 - reach, 2 + reach])
  cut = study.over_seeds(
    [dict(r, gold=(r['gold'] or 0) / 8) for r in rows[:4]], 'method', ['gold'], ['gold']
  )
  assert cut['x']['gold']['ci95'] == [0.0, 1.0] and cut['x']['gold']['mean'] == 0.25
  difference = study.paired(rows, 'method', 'y', 'x', 'gold')
  assert difference['mean'] == 2.5 and difference['n'] == 2
  assert study.paired(rows, 'method', 'y', 'z', 'gold')['mean'] is None


def test_the_command_lists_studies_and_refuses_what_is_none(capsys, tmp_path):
  command.main([])
  lines = capsys.readouterr().out.split('\n')
  assert [line.split()[0] for line in lines if line] == list(study.studies.NAMES)
  with pytest.raises(ValueError, match="no study 'leaderbord'"):
    command.main(['leaderbord', f'--workdir={tmp_path}'])
  with pytest.raises(ValueError, match='mylab.none: No module'):
    command.main(['mylab.none', f'--workdir={tmp_path}'])
  with pytest.raises(ValueError, match='json.decoder is no study, as it has no function parts'):
    command.main(['json.decoder', f'--workdir={tmp_path}'])
  with pytest.raises(ValueError, match='whole numbers'):
    command.numbers('1,x')
  with pytest.raises(ValueError, match='different'):
    command.numbers('1,1')


def test_the_command_runs_a_study_of_a_fork(capsys, tmp_path, monkeypatch):
  calls = []
  toy = make(calls)
  toy.__doc__ = 'Whether toys play.'
  toy.arguments = lambda parser: (
    parser.add_argument('--methods', type=lambda text: text.split(',')),
    parser.add_argument('--scale', type=float, default=1.0),
  )
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(jax.config.jax_compilation_cache_dir))
  monkeypatch.setattr(signal, 'signal', lambda *_: None)
  monkeypatch.setitem(sys.modules, 'mylab', types.ModuleType('mylab'))
  monkeypatch.setitem(sys.modules, 'mylab.toy', toy)
  divided = []
  monkeypatch.setattr(command, 'divide_cpu', divided.append)
  command.main(['mylab.toy', f'--workdir={tmp_path}', '--methods=a', '--tiny'])
  toy.CPU_DEVICES = None
  assert [call[:2] for call in calls] == [(1, 'a'), (11, 'a')]
  command.main(['mylab.toy', f'--workdir={tmp_path}', '--methods=a', '--tiny', '--seeds=5'])
  assert divided == [2, None]
  out = capsys.readouterr().out
  assert 'a 6.66' in out and ' seeds 1, 5, 11\n' in out and 'seed 5, a (1 of 1): done' in out


# ---- evals/calibration.py


def by_a_loop(confidences, hits, count, low):
  """The expected calibration error, one prediction after the other."""
  sums = {}
  for p, hit in zip(confidences, hits, strict=True):
    place = min(int((p - low) / (1 - low) * count), count - 1)
    n, total, right = sums.get(place, (0, 0.0, 0.0))
    sums[place] = n + 1, total + p, right + hit
  return sum(n * abs(right / n - total / n) for n, total, right in sums.values()) / len(hits)


@pytest.mark.parametrize('low, count', [(0.0, 10), (0.5, 10), (0.0, 7)])
def test_calibration_error_is_that_of_a_loop(low, count):
  rng = np.random.default_rng(count)
  p = low + (1 - low) * rng.random(300)
  hits = (rng.random(300) < p**2).astype(float)
  hits[:5] = 0.5
  assert calibration.error(p, hits, count, low) == pytest.approx(by_a_loop(p, hits, count, low))


def test_calibration_by_hand():
  # Bins of 0.25: 0.1 and 0.2, both wrong; 0.6, right; 1.0, half right.
  p, hits = np.array([0.1, 0.2, 0.6, 1.0]), np.array([0.0, 0.0, 1.0, 0.5])
  assert calibration.bins(p, hits, 4) == [
    dict(bin=0, count=2, confidence=pytest.approx(0.15), accuracy=0.0),
    dict(bin=2, count=1, confidence=0.6, accuracy=1.0),
    dict(bin=3, count=1, confidence=1.0, accuracy=0.5),
  ]
  assert calibration.error(p, hits, 4) == pytest.approx((2 * 0.15 + 0.4 + 0.5) / 4)
  assert np.isnan(calibration.error(p[:0], hits[:0]))
  with pytest.raises(ValueError, match='0.1 to 1.0 do not lie within 0.5 and 1'):
    calibration.error(p, hits, 4, 0.5)
  # (0.3^2 + 0.2^2 + 0.1^2) and (0.5^2 + 0 + 0.5^2)
  found = calibration.brier(np.array([[0.7, 0.2, 0.1], [0.5, 0.0, 0.5]]), np.array([0, 2]))
  assert found == pytest.approx((0.09 + 0.04 + 0.01 + 0.5) / 2)
  assert calibration.brier(np.full((1, 4), 0.25), np.array([3])) == pytest.approx(1 - 1 / 4)


def test_the_bins_of_seeds_are_pooled_by_their_counts():
  rows = [
    dict(bin=3, count=1, confidence=0.3, accuracy=0.0),
    dict(bin=3, count=3, confidence=0.4, accuracy=1.0),
    dict(bin=0, count=2, confidence=0.1, accuracy=0.5),
  ]
  low, high = calibration_study.pooled(rows)
  assert low['bin'] == 0 and high['count'] == 4
  assert (high['confidence'], high['accuracy']) == pytest.approx((0.375, 0.75))


def test_choices_have_the_right_answer_once_and_no_item_twice():
  world = sandbox.World(3)
  facts = calibration_study.fact_items(world)
  assert len({prompt for prompt, _ in facts}) == len(facts) == 14 * 3
  for _, choices in facts:
    assert len(set(choices)) == 6
  prompt, choices = facts[0]
  entity = world.entities['test'][0]
  assert prompt == f'what color is the {entity} ?'
  assert choices[0] == f'the {entity} is {world.truth[entity, "color"]} .'
  reading = calibration_study.reading_items(world, 200)
  for (context, choices), item in zip(
    reading, sandbox.reading_comprehension(world, 200), strict=True
  ):
    assert context == item['context'] and choices[0] == item['answer']
    assert len(set(choices)) == 4
  # Who gives and who gets are both in the passage, so that one wrong choice is there at least.
  who = [x for x in reading if x[0].endswith(('who gives ?', 'who gets ?'))]
  assert who and all(x[1][1] in x[0].split() for x in who)


# ---- studies/leaderboard.py


def leaderboard_options(only='', *enter):
  return argparse.Namespace(only=only, enter=list(enter))


def test_rows_have_names_of_their_own():
  assert leaderboard.parts(leaderboard_options()) == list(leaderboard.STAGES)
  assert leaderboard.parts(leaderboard_options('mine,sft', 'a.b:mine')) == ['sft', 'mine']
  with pytest.raises(ValueError, match='--enter=a:ppo: each row needs a name of its own'):
    leaderboard.parts(leaderboard_options('', 'a:ppo'))
  with pytest.raises(ValueError, match='--only=pop is none of sft'):
    leaderboard.parts(leaderboard_options('pop'))


def test_the_protocol_holds_what_decides_a_row_and_no_seed(tmp_path):
  def of(part, seed=1, tiny=True):
    trial = study.Trial(seed, tmp_path, tiny, leaderboard_options())
    return leaderboard.protocol(trial, part)

  assert of('dpo') == of('dpo', seed=2) != of('dpo', tiny=False)
  assert set(of('dpo')['stages']) == {'pretrain', 'sft', 'rm', 'dpo'}
  assert set(of('sft')['stages']) == {'pretrain', 'sft', 'rm'}
  assert of('best_of_16')['best_of'] == 16 and of('best_of_16') != of('sft')
  ensemble = of('ppo_ptx_ensemble', tiny=False)['stages']
  assert sum(ensemble[f'rm_{i}']['prompts'] for i in (1, 2, 3)) == ensemble['rm']['prompts']


def test_the_best_of_samples_is_that_of_the_reward_model(monkeypatch):
  """Samples are [seed // 1000, prompt]; the reward model scores 5 sequences by hand."""
  setup = types.SimpleNamespace(
    nets=None,
    sharder=None,
    length=8,
    text=types.SimpleNamespace(template=types.SimpleNamespace(pad=0)),
  )
  scores = {(7, 1): 0.5, (7, 2): 2.0, (7, 3): 1.0, (8, 1): 3.0, (8, 2): -1.0, (8, 3): 4.0}
  monkeypatch.setattr(methods, 'BEST_OF', 3)
  monkeypatch.setattr(
    methods.bulk,
    'make_scorer',
    lambda *_, **__: lambda params, rows: np.array([scores[tuple(row[:2])] for row in rows]),
  )

  def sample(params, prompts, seed):
    number = seed // 1000
    return [[number] * number for _ in prompts], np.array([number == 2] * len(prompts))

  best, tokens = methods.best_sampler(setup, sample, None)
  responses, ended = best(None, [[7], [8]], 3)
  assert responses == [[2, 2], [3, 3, 3]] and ended.tolist() == [True, False]
  assert tokens == [2 * (1 + 2 + 3)]


def test_the_table_is_sorted_and_pairs_by_seed(tmp_path):
  keys = [*leaderboard.MEASURED, *leaderboard.SPENT]
  rows = [
    dict(method=name, seed=seed) | {key: gold + 0.25 * seed * (name == 'mine') for key in keys}
    for seed in (1, 2)
    for name, gold in (('sft', 0.0), ('ppo_ptx', 1.0), ('mine', 2.0))
  ]
  text = leaderboard.table(rows)
  lines = [line.split(' | ') for line in text.split('\n') if line.startswith('| ')]
  assert [line[0] for line in lines[1:4]] == ['| mine', '| PPO-ptx', '| SFT']
  assert lines[1][3].startswith('2.38 [') and lines[3][3] == '0.00 [0.00, 0.00]'
  # 2.25 - 1 and 2.5 - 1: a mean of 1.375 over two seeds.
  assert lines[5][0] == '| mine' and lines[5][2].startswith('1.38 [')
  assert lines[6][:2] == ['| SFT', '-1.00 [-1.00, -1.00]']
  leaderboard.plot(rows, tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').read_bytes()[:4] == b'\x89PNG'


FORK = '''
import jax.numpy as jnp


def loss(params, batch, key, *, nets, temperature=1.0):
  """REINFORCE, without a ratio and without a value network."""
  tokens, mask = batch.rollout.sequences()
  logprobs, _ = nets.logprobs(params['policy'], tokens, mask, temperature=temperature)
  logprobs = logprobs[:, batch.rollout.prompts.shape[1] :]
  loss = -jnp.sum(batch.weights * jnp.where(batch.rollout.mask, batch.advantages * logprobs, 0.0))
  return loss, {'ppo/loss/policy': loss}


def reinforce(c):
  c.stages.mine = c.stages.ppo.copy_and_resolve_references()
  c.stages.mine.loss = dict(fn='mylab_entry:loss')
  c.stages.mine.iterations = 4
  return 'mine'


def nothing(c):
  return 'none'
'''


@pytest.mark.slow
def test_a_fork_enters_the_leaderboard_and_calibration_shares_its_runs(
  one_device, tmp_path, monkeypatch, capsys
):
  (tmp_path / 'mylab_entry.py').write_text(FORK)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.setattr(methods, 'BEST_OF', 2)
  monkeypatch.setattr(methods, 'ROUNDS', 2)
  workdir, enter = tmp_path / 'lab', 'mylab_entry:reinforce'
  options = leaderboard_options('sft,best_of_16,expert_iteration,reinforce', enter)
  rows = study.run_study(leaderboard, workdir, [1], True, options)
  found = {row['method']: row for row in rows}
  assert list(found) == ['sft', 'best_of_16', 'expert_iteration', 'reinforce']
  assert found['sft']['win_rate_train_labelers'] == 0.5 and found['sft']['kl'] == 0
  assert {found['sft'][key] for key in leaderboard.SPENT} == {0}
  assert found['best_of_16']['kl'] == pytest.approx(np.log(2) - 0.5)
  # The best sample by the reward model is measured, and the weights are those of SFT.
  assert found['best_of_16']['pretraining_loss'] == found['sft']['pretraining_loss']
  assert found['best_of_16']['gold_train_labelers'] != found['sft']['gold_train_labelers']
  for name in ('best_of_16', 'expert_iteration', 'reinforce'):
    assert found[name]['rankings'] == 256
  assert 4 * 32 <= found['reinforce']['sampled_tokens'] <= 4 * 32 * 20
  log = [json.loads(s) for s in (workdir / 'seed-1/mine/metrics.jsonl').read_text().splitlines()]
  tokens = sum(32 * one['rollout/length'] for one in log)
  assert found['reinforce']['sampled_tokens'] == pytest.approx(tokens, abs=1)
  comparisons = json.loads((workdir / 'seed-1/rm/comparisons.json').read_bytes())['comparisons']
  ranked = [
    responses
    for responses, ranks in zip(comparisons['responses'], comparisons['ranks'], strict=True)
    if len(set(ranks)) > 1
  ]
  read = sum(len(r) for responses in ranked for r in responses)
  assert found['best_of_16']['update_tokens'] == read
  assert found['reinforce']['update_tokens'] == pytest.approx(read + tokens, abs=1)
  chosen = [
    json.loads(line)
    for number in (1, 2)
    for line in (workdir / f'seed-1/expert-{number}/chosen.jsonl').read_text().splitlines()
  ]
  kept = sum(len(row['response'].split()) + 1 for row in chosen)
  assert found['expert_iteration']['update_tokens'] == read + 3 * kept
  assert found['expert_iteration']['kl'] != 0

  # A changed function of the fork is another protocol.
  (tmp_path / 'mylab_entry.py').write_text(FORK.replace('loss = -jnp', 'loss = -2.0 * jnp'))
  with pytest.raises(ValueError, match='another protocol: functions.mine: stages.mine.loss.fn'):
    study.run_study(leaderboard, workdir, [1], True, options)
  with pytest.raises(ValueError, match="the name of the stage of the config.*not 'none'"):
    leaderboard.protocol(
      study.Trial(1, workdir, True, leaderboard_options('', 'mylab_entry:nothing')), 'nothing'
    )

  capsys.readouterr()
  monkeypatch.setattr(calibration_study, 'POLICIES', {'pretrained': 'pretrain', 'sft': 'sft'})
  rows = study.run_study(calibration_study, workdir, [1], True, options)
  said = capsys.readouterr().out
  assert 'sft: finished before, reused' in said and 'rm: finished before, reused' in said
  figures = {(row['policy'], row['task']): row for row in rows if row['kind'] == 'figures'}
  assert list(figures) == [
    *((name, task) for name in ('pretrained', 'sft') for task in ('reading', 'facts')),
    ('train_labelers', 'preference'),
    ('heldout_labelers', 'preference'),
  ]
  for (name, task), row in figures.items():
    bins = [r for r in rows if (r['policy'], r['task']) == (name, task) and r['kind'] == 'bin']
    assert sum(one['count'] for one in bins) == row['n']
    assert sum(one['count'] * one['accuracy'] for one in bins) == pytest.approx(
      row['n'] * row['accuracy']
    )
    assert 0 <= row['ece'] <= 1 and 0 <= row['brier'] <= 2
  info = json.loads((workdir / 'seed-1/rm/final/info.json').read_bytes())
  assert figures['heldout_labelers', 'preference']['accuracy'] == pytest.approx(
    info['accuracy_heldout_labelers']['mean']
  )
  assert figures['train_labelers', 'preference']['ece'] == pytest.approx(
    info['calibration_error_train_labelers']
  )
  assert figures['sft', 'reading']['n'] == 128 and figures['sft', 'facts']['n'] == 42
  assert (workdir / 'calibration/plot.png').exists()


# ---- what is published

RESULTS = ROOT / 'experiments' / 'results' / 'studies'
NUMBER = re.compile(r'-?\d[\d,]*(?:\.\d+)?')


def same_table(made, kept):
  """Whether two tables differ in no word, and in no number by more than one of its last digit:
  rounded means of floats may differ between processors."""
  if NUMBER.sub('#', made) != NUMBER.sub('#', kept):
    return False
  for a, b in zip(NUMBER.findall(made), NUMBER.findall(kept), strict=True):
    digits = len(b.partition('.')[2])
    if len(a.partition('.')[2]) != digits:
      return False
    if abs(float(a.replace(',', '')) - float(b.replace(',', ''))) > 1.01 * 10.0**-digits:
      return False
  return True


def test_tables_are_compared_but_for_their_last_digit():
  kept = '| PPO | 0.71 [-0.70, 1,234.00] |'
  assert same_table(kept, kept)
  assert same_table(kept.replace('0.71', '0.72'), kept)
  for wrong in ('| PPO | 0.73 [-0.70, 1,234.00] |', kept.replace('PPO', 'DPO'), kept + ' 3'):
    assert not same_table(wrong, kept)
  assert not same_table(kept.replace('-0.70', '0.70'), kept)
  assert not same_table(kept.replace('0.71', '0.713'), kept)


@pytest.mark.parametrize('name', studies.NAMES)
def test_the_published_table_is_that_of_the_published_rows(name):
  """The table of a study stands in docs/ between `<!-- table: NAME -->` and `<!-- end -->`, and is
  there if and only if its rows are."""
  pages = [(ROOT / 'docs' / f'{page}.md').read_text() for page in ('studies', 'leaderboard')]
  found = re.findall(rf'<!-- table: {name} -->\n(.*?)<!-- end -->', '\n'.join(pages), re.S)
  path = RESULTS / name / 'rows.jsonl'
  assert len(found) == path.exists()
  if found:
    rows = study.read_rows(path)
    assert {row['seed'] for row in rows} <= {*study.SEEDS}
    assert same_table(study.find(name).table(rows).strip(), found[0].strip())
