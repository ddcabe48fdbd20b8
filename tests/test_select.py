"""Model selection: the choice and its reason by hand; a tiny run that keeps candidates and chooses
one."""

import types

import jax
import numpy as np
import pytest

from alignjax import plugins, train
from alignjax.configs import selected
from alignjax.evals.reward import selection
from alignjax.inference import loading
from alignjax.runtime import checkpoint
from alignjax.setup.objects import make_setup
from alignjax.stages import loop
from alignjax.stages import selection as stage


def test_the_choice_by_hand():
  scores = {
    'a': np.array([0.0, 1.0, 2.0]),
    'b': np.array([1.0, 2.0, 3.0]),
    'c': np.array([1.0, 4.0, 0.9]),
  }
  found = selection.choose(scores, {name: {'kl': s * 2} for name, s in scores.items()})
  assert found['chosen'] == 'b'
  # on every prompt
  assert found['candidates']['a']['behind'] == {
    'mean': 1.0,
    'ci95': [1.0, 1.0],
    'n': 3,
    'kind': 'mean',
  }
  assert (
    found['candidates']['c']['behind']['mean'] == pytest.approx(0.1 / 3)
    and 'behind' not in found['candidates']['b']
  )
  assert found['candidates']['a']['kl']['mean'] == 2.0
  assert found['why'].startswith(
    'b has the highest mean score, 2.000, of 3 candidates on 3 prompts; c follows 0.033'
  )
  assert found['why'].endswith('The prompts do not tell it from c.')
  text = selection.markdown({'chosen_stage': dict(by='x:y', selection=found)})
  assert '| **b** | 2.000 [' in text and 'chosen_stage, by x:y: b has' in text


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('order', [('a', 'b'), ('b', 'a')])
def test_a_score_that_is_no_number_is_an_error_that_names_the_candidate(bad, order):
  scores = {'a': np.array([bad, 1.0]), 'b': np.array([2.0, 2.0])}
  with pytest.raises(ValueError, match='the candidate a has 1 of 2 scores'):
    selection.choose({k: scores[k] for k in order}, {'a': {}, 'b': {}})


def test_what_one_may_choose_by():
  measured = {'reward': np.array([1.0, 2.0]), 'kl': np.array([10.0, 30.0])}
  by = plugins.bind(dict(fn='alignjax.evals.reward.selection:reward_less_kl', kl_coef=0.1), 'by')
  np.testing.assert_allclose(by(measured), [0.0, -1.0])
  np.testing.assert_array_equal(selection.reward(measured), [1.0, 2.0])
  with pytest.raises(ValueError, match='selection by gold needs'):
    selection.gold(measured)
  with pytest.raises(ValueError, match='kl_coef'):
    plugins.bind(dict(fn='alignjax.evals.reward.selection:reward_less_kl'), 'by')


@pytest.mark.parametrize(
  'steps,count,expected',
  [(100, 4, [25, 50, 75]), (10, None, []), (10, 1, []), (2, 5, [1]), (7, 3, [2, 5])],
)
def test_candidates_are_evenly_spaced(steps, count, expected):
  assert loop.candidate_steps(steps, count) == expected


def tiny():
  c = selected.get_config('tiny')
  s = c.stages
  s.sft.update(
    init=dict(policy='random'), demonstrations=32, epochs=2, keep_candidates=2, pretrain_mix=0.0
  )
  s.sft_selected.init.reward = 'random'  # a judge like any other
  s.sft_selected.prompts.count = s.sft_selected.rows = 16
  c.stages_to_run = ('sft_selected',)
  c.report.policies = {}
  return c


@pytest.mark.slow
def test_a_stage_chooses_and_others_start_from_it(tmp_path):
  c = tiny()
  assert train.resolve(selected.get_config('tiny')) == [
    'pretrain',
    'sft',
    'rm',
    'sft_selected',
    'ppo_ptx',
    'ppo_ptx_selected',
  ]
  train.main(c, tmp_path)
  steps = checkpoint.load_info(tmp_path / 'sft/final')['steps']
  assert [p.name for p in (tmp_path / 'sft/candidates').iterdir()] == [str(steps // 2)]
  info = checkpoint.load_info(tmp_path / 'sft_selected/final')
  found = info['selection']
  assert (
    set(found['candidates']) == {f'sft/{steps // 2}', 'sft/final'}
    and found['chosen'] in found['candidates']
  )
  means = {k: v['score']['mean'] for k, v in found['candidates'].items()}
  assert means[found['chosen']] == max(means.values()) and len(set(means.values())) == 2
  assert (
    set(found['candidates']['sft/final']) >= {'reward', 'gold'}
    and 'kl' not in found['candidates']['sft/final']
  )

  # the chosen weights, by name and from a folder; those of another candidate differ
  setup = make_setup(c, tmp_path)
  chosen, other = (
    tmp_path / 'sft' / ('candidates/' if k != 'sft/final' else '') / k.split('/')[1]
    for k in (found['chosen'], next(k for k in means if k != found['chosen']))
  )
  load = lambda spec: train_params(setup, spec)
  assert checkpoint.same(load('stage:sft_selected'), load(str(chosen)))
  assert not checkpoint.same(load('stage:sft_selected'), load(str(other)))
  assert checkpoint.same(
    loading.load(str(tmp_path / 'sft_selected'), 'lm').params, load(str(chosen))
  )
  candidate = tmp_path / f'sft/candidates/{steps // 2}'
  assert checkpoint.same(loading.load(str(candidate), 'lm').params, load(str(candidate)))

  # what was answered is kept: with one candidate's file gone, the same choice
  kept = sorted((tmp_path / 'sft_selected/responses').iterdir())
  assert len(kept) == 2 and all(len(p.read_text().splitlines()) == 16 for p in kept)
  text = kept[0].read_text()
  kept[0].unlink()
  again = stage.build(setup, 'sft_selected').finish(None)[1]
  assert again['selection'] == found and kept[0].read_text() == text

  with pytest.raises(ValueError, match='keep_candidates=N'):
    c.stages.sft_selected.candidates = (str(tmp_path / 'sft/final'),)
    stage.find_candidates(make_setup(c, tmp_path), 'sft_selected')


def train_params(setup, spec):
  from alignjax.setup.weights import initial_params

  return jax.tree.map(np.asarray, initial_params(setup, spec, 'lm', 0))


def test_a_selection_without_candidates_is_refused_before_anything_runs(tmp_path):
  c = tiny()
  c.stages.sft.keep_candidates = None
  with pytest.raises(ValueError, match='stages.sft.keep_candidates is not set'):
    train.main(c, tmp_path)
  c = tiny()
  c.stages.sft_selected.by = dict(fn='alignjax.evals.reward.selection:rewards')
  with pytest.raises(ValueError, match='did you mean reward'):
    train.main(c, tmp_path)


@pytest.mark.parametrize('candidates', [('stage:sft', 'stage:pretrain'), ('hf:/a/folder',)])
def test_only_a_single_stage_has_to_keep_candidates(tmp_path, candidates):
  """Several candidates are enough to choose from, and a checkpoint has no entries in the config."""
  c = tiny()
  c.stages.sft.keep_candidates = None
  c.stages.sft_selected.candidates = candidates
  stage.check(make_setup(c, tmp_path), 'sft_selected')


def test_kl_is_at_the_temperature_of_the_samples(tmp_path, monkeypatch):
  c = tiny()
  c.stages.sft_selected.update(temperature=0.5)
  c.stages.sft_selected.init.update(ref='random', reward=None)
  setup, asked = make_setup(c, tmp_path), []

  def make_divergence(model, prompts, *, temperature, **_):
    asked.append(temperature)
    return lambda *_: np.full((len(prompts), 1), 2.0)

  gold = {'gold, training labelers': np.zeros((16, 1))}
  monkeypatch.setattr(stage, '_load', lambda *_: {})
  monkeypatch.setattr(stage.checkpoint, 'weights', lambda path: 'x')
  monkeypatch.setattr(stage.samples, 'gold', lambda *_: gold)
  monkeypatch.setattr(stage.samples, 'make_divergence', make_divergence)
  monkeypatch.setattr(stage.samples, 'make_responder', lambda *_, **__: lambda *_: None)
  records = stage._prompts(setup, 'sft_selected')
  found = stage._measure(setup, 'sft_selected', records, {'a': tmp_path})
  assert asked == [0.5] and found['a']['kl'].tolist() == [2.0] * 16


def test_greedy_responses_have_no_kl(tmp_path):
  c = tiny()
  c.stages.sft_selected.update(temperature=0.0)
  stage.check(make_setup(c, tmp_path), 'sft_selected')
  c.stages.sft_selected.init.ref = 'random'
  with pytest.raises(ValueError, match='temperature=0: greedy responses have no KL to .*init.ref='):
    stage.check(make_setup(c, tmp_path), 'sft_selected')


def test_candidates_are_the_whole_ones_of_the_same_training(tmp_path):
  """Not one that was being written, nor one that another training of the stage left."""
  setup = types.SimpleNamespace(workdir=tmp_path, config=tiny())
  setup.config.stages.sft_selected.candidates = ('stage:sft',)
  folder = tmp_path / 'sft'
  for name, origin in (
    ('candidates/10', 'now'),
    ('candidates/9', 'now'),
    ('candidates/8', 'before'),
    ('candidates/7.partial', 'now'),
    ('final', 'now'),
  ):
    checkpoint.save_params(folder / name, {'w': jax.numpy.ones(2)}, {}, dict(origin=origin))
  (folder / 'candidates/6').mkdir()
  found = stage.find_candidates(setup, 'sft_selected')
  assert list(found) == ['sft/9', 'sft/10', 'sft/final'] and found['sft/10'].samefile(
    folder / 'candidates/10'
  )


def test_two_stages_of_one_name_are_told_apart(tmp_path):
  setup = types.SimpleNamespace(workdir=tmp_path / 'here', config=tiny())
  other = tmp_path / 'there' / 'sft'
  setup.config.stages.sft_selected.candidates = ('stage:sft', str(other))
  folders = [tmp_path / 'here' / 'sft' / 'final', other / 'final']
  for folder in folders:
    checkpoint.save_params(folder, {'w': jax.numpy.ones(2)}, {}, dict(origin='one'))
  found = stage.find_candidates(setup, 'sft_selected')
  assert list(found) == ['sft/final', str(other / 'final')] and list(found.values()) == folders
