"""Rewards: functions of prompts and responses that the config names as
c.stages.ppo.reward = dict(fn='module:name', ...).

    reward(prompts, prompt_mask, responses, mask, *, nets, frozen, **coefficients) -> f32[B]
                                                                 or (f32[B], metrics)

`model_reward` is the paper's, the trained reward model. `ensemble` combines several. `host_reward`
calls a Python function of
texts on the host (a rule, a classifier, a service). Its calls have a time limit and are repeated,
and a run in which all of them fail loses nothing:

    c.stages.ppo.reward = dict(fn='alignjax.rewards:host_reward', function='mylab.rewards:rule',
                               attempts=3, timeout=60.0)

    def rule(prompts: list[str], responses: list[str]) -> list[float]: ...

The function receives what samples.jsonl shows. A prompt is the text, or the list of messages, of
its record, without what the template writes around it. (Where truncation made the prompts of two
records equal, it is that of the first.) A response is its text without the end token, so "4" is
"4"; one that was cut at the length limit is all of its text.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignjax import ops, plugins
from alignjax.types import Metrics, Networks, Params


def model_reward(
  prompts: jax.Array,
  prompt_mask: jax.Array,
  responses: jax.Array,
  mask: jax.Array,
  *,
  nets: Networks,
  frozen: Params,
  rows: int | None = None,
  live_rows: Callable | None = None,
) -> jax.Array:
  """The paper's reward (section 3.5): the reward model's scalar at the last live token of prompt
  and response, f32[B].

  Args:
    rows: responses that are read at a time; None reads all. It changes memory, not results.
    live_rows: see steps.gradients. The stage gives it.
  """
  tokens, token_mask = (
    jnp.concatenate([prompts, responses], 1),
    jnp.concatenate([prompt_mask, mask], 1),
  )

  def read(rows):
    def on(nets):
      return ops.last_live(nets.scalar(frozen['reward'], *rows), rows[1])

    return on(nets) if live_rows is None else live_rows(on, nets, rows[1])

  return ops.in_chunks(read, (tokens, token_mask), rows)


def ensemble(
  prompts: jax.Array,
  prompt_mask: jax.Array,
  responses: jax.Array,
  mask: jax.Array,
  *,
  nets: Networks,
  frozen: Params,
  combine: str = 'mean',
  uncertainty_coef: float = 0.1,
  rows: int | None = None,
  live_rows: Callable | None = None,
) -> tuple[jax.Array, Metrics]:
  """The scores of several reward models in one, (f32[B], metrics).

  The members are init.reward and every further role of init whose name begins with `reward`, such
  as init.reward_2='stage:rm_2'. The metric 'objective/disagreement' is the standard deviation over
  the members, a mean over responses.

  Args:
    combine: 'mean'; 'min', the worst case; 'uwo', the mean less uncertainty_coef times the variance
      over the members (Coste et al. 2023, section 3.2); or 'module:function' of f32[N,B] -> f32[B].
    uncertainty_coef: of 'uwo'.
    rows, live_rows: see model_reward.
  """
  members = [
    model_reward(
      prompts,
      prompt_mask,
      responses,
      mask,
      nets=nets,
      frozen={'reward': frozen[role]},
      rows=rows,
      live_rows=live_rows,
    )
    for role in sorted(frozen)
    if role.startswith('reward')
  ]
  scores = jnp.stack(members)
  metrics = {'objective/disagreement': jnp.mean(jnp.std(scores, axis=0))}
  if combine == 'mean':
    return jnp.mean(scores, axis=0), metrics
  if combine == 'min':
    return jnp.min(scores, axis=0), metrics
  if combine == 'uwo':
    return jnp.mean(scores, axis=0) - uncertainty_coef * jnp.var(scores, axis=0), metrics
  return plugins.find(combine, 'reward.combine')(scores), metrics


def host_reward(
  prompts: jax.Array,
  prompt_mask: jax.Array,
  responses: jax.Array,
  mask: jax.Array,
  *,
  nets: Networks,
  frozen: Params,
  function: str,
  prompts_by_tokens: Mapping[tuple[int, ...], Any],
  decode_response: Callable[[Sequence[int]], tuple[str, bool]],
  failures: list[str],
  attempts: int = 3,
  timeout: float = 60.0,
  pause: float = 1.0,
) -> jax.Array:
  """A Python function's score of each prompt and response, f32[B]. The device waits for it.

  A call that raises, takes longer than `timeout` or returns something other than B finite numbers
  is repeated after `pause` seconds, then 2 * pause, and so on. After the last attempt the reason is
  appended to `failures` and the scores are NaN. No update of such a step is applied (steps.update);
  the loop saves the state from before the step and ends the run.

  Args:
    function: 'module:name' of (prompts, responses: list[str]) -> B floats. A call that timed out
      goes on in its thread, so another one may run beside it.
    prompts_by_tokens: the tokens of a prompt -> the prompt of the record. The stage gives this and
      the next two.
    decode_response: the tokens of a response -> (text, whether it ended), as in
      templates.Template.decode_response.
    failures: receives the reason of a failure (stages/stage.py: Stage).
    attempts: the most calls.
    timeout: seconds of one call.
    pause: seconds before the second attempt.
  """
  del nets, frozen
  judge = plugins.find(function, 'reward.function')

  def call(prompts, prompt_mask, responses, mask):
    def rows(tokens, live):
      return [row[m].tolist() for row, m in zip(np.asarray(tokens), np.asarray(live), strict=True)]

    texts = (
      [prompts_by_tokens[tuple(row)] for row in rows(prompts, prompt_mask)],
      [decode_response(row)[0] for row in rows(responses, mask)],
    )
    problem = ''
    for attempt in range(attempts):
      if attempt:
        time.sleep(pause * 2 ** (attempt - 1))
      try:
        return checked(within(timeout, judge, *texts), len(texts[0]))
      except Exception as error:  # noqa: BLE001 a fork's function may raise anything
        problem = f'{type(error).__name__}: {error}'
        print(f'WARNING: {function}, attempt {attempt + 1} of {attempts}: {problem}', flush=True)
    failures.append(
      f'the reward function {function} failed {attempts} times, at last with {problem.rstrip(".")}.'
    )
    return np.full(len(texts[0]), np.nan, np.float32)

  shape = jax.ShapeDtypeStruct((prompts.shape[0],), jnp.float32)
  return jax.pure_callback(call, shape, prompts, prompt_mask, responses, mask)


def within(timeout: float, function: Callable, *arguments):
  """function(*arguments), or TimeoutError after `timeout` seconds. What the function raises is
  raised."""
  answer: queue.Queue = queue.Queue()

  def run():
    try:
      answer.put((function(*arguments), None))
    except Exception as error:  # noqa: BLE001 raised again below
      answer.put((None, error))

  threading.Thread(target=run, daemon=True).start()
  try:
    value, error = answer.get(timeout=timeout)
  except queue.Empty:
    raise TimeoutError(f'no answer in {timeout:g} s') from None
  if error is not None:
    raise error
  return value


def checked(scores, count: int) -> np.ndarray:
  """The scores as f32[count]. Raises ValueError where their shape is wrong or one is not finite."""
  scores = np.asarray(scores, np.float32)
  if scores.shape != (count,):
    raise ValueError(f'returned shape {scores.shape} for {count} responses')
  if not np.isfinite(scores).all():
    raise ValueError(
      f'returned {scores[~np.isfinite(scores)][0]} for response '
      f'{int(np.flatnonzero(~np.isfinite(scores))[0])}'
    )
  return scores
