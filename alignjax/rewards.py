"""Rewards: functions of prompts and responses that the config names, c.stages.ppo.reward =
dict(fn='module:name', ...).

    reward(prompts, prompt_mask, responses, mask, *, nets, frozen, **coefficients) -> f32[B]

`model_reward` is the paper's, the trained reward model. `host_reward` calls a Python function of
texts on the host (a rule, a classifier, a service); its calls are retried and timed, and a run that
has to give it up loses nothing:

    c.stages.ppo.reward = dict(fn='alignjax.rewards:host_reward', function='mylab.rewards:rule',
    attempts=3, timeout=60.0)

    def rule(prompts: list[str], responses: list[str]) -> list[float]: ...

The function sees what samples.jsonl shows. A prompt is as its record has it: its text, or its list
of messages, without what the template writes around it. (Of two records whose prompts have the same
tokens, because truncation left them alike, the first.) A response is its text without the end token
that ended it, so "4" is "4"; one that was cut at the limit is all of its text.
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
from alignjax.types import Networks, Params


def model_reward(
  prompts, prompt_mask, responses, mask, *, nets: Networks, frozen: Params, rows: int | None = None
) -> jax.Array:
  """The reward model's scalar at the last live token of prompt + response: f32[B]. The paper's
  reward (section 3.5).

  rows: read at a time; None = all. Changes memory, not results.
  """
  tokens, token_mask = (
    jnp.concatenate([prompts, responses], 1),
    jnp.concatenate([prompt_mask, mask], 1),
  )

  def read(rows):
    return ops.last_live(nets.scalar(frozen['reward'], *rows), rows[1])

  return ops.in_chunks(read, (tokens, token_mask), rows)


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
  """f32[B], what the Python function says of each prompt and response while the device waits.

  A call that raises, takes longer than `timeout` or returns something other than B finite numbers
  is made again, after `pause` seconds, then 2 * pause, and so on. After the last attempt the reason
  goes to `failures` and the scores are NaN: no update of such a step is applied (steps.update), and
  the loop saves the state from before it and ends the run.

  Args:
    function: 'module:name', (prompts, responses: list[str]) -> B floats, as above. A call that ran
      out of time is left behind in its thread, so another may run beside it.
    prompts_by_tokens: token ids of a prompt -> the record's prompt. decode_response: response -> its text, and
      whether it ended (templates.Template).
    failures: of the stage (stages/stage.py: Stage). The stage gives these three.
    attempts: calls at most. timeout, pause: seconds.
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
  """function(*arguments), or TimeoutError after `timeout` seconds; what it raises is raised."""
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
  scores = np.asarray(scores, np.float32)
  if scores.shape != (count,):
    raise ValueError(f'returned shape {scores.shape} for {count} responses')
  if not np.isfinite(scores).all():
    raise ValueError(
      f'returned {scores[~np.isfinite(scores)][0]} for response '
      f'{int(np.flatnonzero(~np.isfinite(scores))[0])}'
    )
  return scores
