"""Functions by name: every mistake is an error that says what to do, before any compilation."""

import pytest

from alignjax import plugins


@pytest.mark.parametrize(
  'spec,words',
  [
    (dict(), "needs an entry fn='module:function'"),
    (dict(fn='alignjax.losses.sft'), "the form 'module:function'"),
    (dict(fn='alignjax.nowhere:sft'), "no module named 'alignjax.nowhere'"),
    (dict(fn='alignjax.losses:ppo_pxt', ptx_coef=1.0), 'did you mean ppo_ptx'),
    (dict(fn='alignjax.losses:ppo_ptx', ptx_coeff=1.0), "Did you mean 'ptx_coef'"),
    (dict(fn='alignjax.losses:ppo_ptx', clip_eps=0.2), 'needs ptx_coef'),
    (dict(fn='alignjax.losses:sft', beta=0.2), 'takes no coefficients'),
  ],
)
def test_mistakes(spec, words):
  with pytest.raises(ValueError, match=words) as error:
    plugins.bind(spec, 'stages.ppo.loss', given=('nets',))
  assert 'stages.ppo.loss' in str(error.value)


def test_coefficients_arrive():
  bound = plugins.bind(
    dict(fn='alignjax.losses:ppo_ptx', ptx_coef=27.8, vf_coef=0.1), 'loss', given=('nets',)
  )
  assert bound.keywords == dict(ptx_coef=27.8, vf_coef=0.1)
  assert plugins.keywords('alignjax.ops:gae') == ['gamma', 'lam']


def test_facts_arrive_where_they_are_asked_for_and_nowhere_else():
  facts = dict(samples_per_prompt=4, temperature=0.7)
  bound = plugins.bind(
    dict(fn='alignjax.losses:ppo', clip_eps=0.1), 'loss', given=('nets',), facts=facts
  )
  assert bound.keywords == dict(clip_eps=0.1, temperature=0.7)
  with pytest.raises(
    ValueError,
    match=r"loss.temperature: the stage passes 'temperature' itself, 0.7 here.*Remove this entry",
  ):
    plugins.bind(
      dict(fn='alignjax.losses:ppo', temperature=0.7), 'loss', given=('nets',), facts=facts
    )
  with pytest.raises(ValueError, match="loss.nets: the stage passes 'nets' itself"):
    plugins.bind(dict(fn='alignjax.losses:ppo', nets=1), 'loss', given=('nets',))
  with pytest.raises(ValueError, match="needs an entry fn='module:function'; it has none"):
    plugins.bind(None, 'loss')
