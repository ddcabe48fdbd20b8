"""The scores by which a model is chosen, and the choice with its reason. A score is a function that
maps the measurements on N prompts, {'reward': f[N], 'kl': f[N], 'gold': f[N]} as far as they exist,
to f[N]. A fork names its own function in the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignjax.evals.markdown import table
from alignjax.evals.stats import ANY, apart, interval, show

Measured = Mapping[str, np.ndarray]


def reward(measured: Measured) -> np.ndarray:
  """Returns the reward model's score (paper C.1)."""
  return _of(measured, 'reward', 'init.reward')


def reward_less_kl(measured: Measured, *, kl_coef: float) -> np.ndarray:
  """Returns the score less kl_coef times log(pi / ref), which PPO maximises (Eq. 2 without its
  pretraining term)."""
  return _of(measured, 'reward', 'init.reward') - kl_coef * _of(measured, 'kl', 'init.ref')


def gold(measured: Measured) -> np.ndarray:
  """Returns the sandbox's true score for its training labelers, which exists only in a world whose
  answers are known."""
  return _of(measured, 'gold', "prompts.source='sandbox:'")


def _of(measured: Measured, name: str, source: str) -> np.ndarray:
  if name not in measured:
    raise ValueError(f'selection by {name} needs {source}.')
  return measured[name]


def choose(
  scores: Mapping[str, np.ndarray],
  measured: Mapping[str, Measured],
  prompts: Sequence[Any] | None = None,
) -> dict[str, Any]:
  """Chooses the candidate with the highest mean score, and the first of equal ones.

  Args:
    scores: {candidate: f64[N]}, on the same prompts.
    measured: {candidate: {name: f[N]}}, further measurements to report beside the scores.
    prompts: one label per row. None means that all prompts differ.

  Returns:
    {'chosen', 'why', 'candidates': {candidate: {'score': figure, name: figure, 'behind': figure of
      chosen - candidate, paired by prompt}}}.

  Raises:
    ValueError: A score is not a finite number. The message names the candidate.
  """
  for name, s in scores.items():
    if wrong := int(np.sum(~np.isfinite(s))):
      raise ValueError(
        f'the candidate {name} has {wrong} of {len(s)} scores that are not finite numbers, so that '
        f'no best candidate can be named. Check its weights, and the function that scores it.'
      )
  means = {name: float(np.mean(s)) for name, s in scores.items()}
  chosen = max(means, key=means.get)
  candidates = {}
  for name, s in scores.items():
    candidates[name] = {
      'score': interval(s, prompts, ANY),
      **{k: interval(v, prompts, ANY) for k, v in measured[name].items()},
    }
    if name != chosen:
      candidates[name]['behind'] = interval(scores[chosen] - s, prompts, ANY)
  others = {name: c['behind'] for name, c in candidates.items() if name != chosen}
  close = [name for name, f in others.items() if apart(f) < 1]
  why = (
    f'{chosen} has the highest mean score, {means[chosen]:.3f}, of {len(scores)} candidates '
    f'on {len(scores[chosen])} prompts'
  )
  if others:
    second = min(others, key=lambda name: others[name]['mean'])
    why += f'; {second} follows {show(others[second])} behind'
  why += f'. The prompts do not tell it from {", ".join(close)}.' if close else '.'
  return dict(chosen=chosen, why=why, candidates=candidates)


def markdown(selections: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns a section of the report from {stage: its info.json with 'selection'}."""
  lines = ['## Selection', '']
  for stage, info in selections.items():
    result = info['selection']
    names = list(dict.fromkeys(k for c in result['candidates'].values() for k in c))
    lines += [
      f'{stage}, by {info["by"]}: {result["why"]}',
      '',
      *table(
        ['candidate', *names],
        [
          [f'**{name}**' if name == result['chosen'] else name, *(show(c.get(k)) for k in names)]
          for name, c in result['candidates'].items()
        ],
      ),
      '',
    ]
  return '\n'.join(lines)
