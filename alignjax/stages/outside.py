"""Responses that an engine outside of the compiled program samples, such as a vLLM server.

    c.stages.ppo_ptx.rollout.engine = dict(fn='alignjax.inference.vllm:complete', url=..., ...)

An engine is a function

    (prompts, *, write_weights, seeds, **coefficients) -> [(tokens, logprobs), ...]

of the tokens of each prompt, a function that writes the policy's weights, and a seed for each
prompt; with several samples of a prompt, it comes as often. It returns the tokens of a response to
each, up to `max_tokens` of them and with the stop token where there was one, and their
log-probabilities under the distribution that it sampled from. Where it has keyword arguments
`max_tokens`, `stop_ids`, `temperature` or `unused_ids` (the ids of the vocabulary that no token
has, which must not be sampled), the stage gives them.

Everything else is as before. The compiled iteration takes the responses where it would have sampled
(rollout.collect), and computes their log-probabilities again, so that the ratio before the first
update is exactly 1, and 'rollout/sampler_gap_max' says how far the engine is from it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from alignjax import plugins
from alignjax.models import export, lora
from alignjax.models.config import TransformerConfig
from alignjax.runtime import lock
from alignjax.sampling import Generation
from alignjax.setup import adapters
from alignjax.setup.objects import Setup, stage_key
from alignjax.setup.weights import freeze
from alignjax.sharding import fetch
from alignjax.types import Params, TrainState

# What does not go with an engine: these entries are of the sampling in the compiled program.
OF_THE_GRAPH = ('generate_rows', 'segments', 'halvings')


def bind(setup: Setup, name: str) -> Callable | None:
  """The engine that a stage's config names with its coefficients bound, or None.

  Raises:
    ValueError: an entry that cannot be, or that would have no effect beside an engine.
  """
  rollout, where = setup.config.stages[name].rollout, f'stages.{name}.rollout'
  spec = rollout.get('engine')
  if spec is None:
    return None
  if set_too := [entry for entry in OF_THE_GRAPH if rollout.get(entry)]:
    raise ValueError(
      f'{where}.{set_too[0]}={rollout[set_too[0]]} is of the sampling in the compiled program and '
      f'has no effect beside {where}.engine: leave it at its default.'
    )
  if not setup.config.model.get('source'):
    raise ValueError(
      f'{where}.engine needs a policy in the layout of a Hugging Face checkpoint, which the engine '
      f"reads; this one has no model.source. Name one (model.source='...'), or leave engine out."
    )
  facts = dict(
    max_tokens=setup.response_length,
    stop_ids=tuple(setup.text.template.ends),
    temperature=rollout.temperature,
    unused_ids=tuple(i for low, high in setup.policy_model.unused_ids for i in range(low, high)),
  )
  return plugins.bind(spec, f'{where}.engine', given=('write_weights', 'seeds'), facts=facts)


def shapes(setup: Setup, name: str) -> Generation:
  """What the compiled program receives from an engine, as shapes on their shardings."""
  rows, length = setup.config.stages[name].rollout.episodes, setup.response_length

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=setup.sharder.batch)

  return Generation(
    array(jnp.int32, length), array(bool, length), array(jnp.float32, length), array(bool)
  )


def sampler(setup: Setup, name: str, failures: list[str]) -> Callable | None:
  """The engine of a stage as a function (state, frozen, batch) -> (Generation, seconds), or None
  where the compiled program samples. All processes call it; process 0 talks to the engine, and the
  others receive the responses. Where it fails, the reason is appended to `failures` there, and
  every process gets None for the Generation."""
  engine = bind(setup, name)
  if engine is None:
    return None
  cfg = setup.config.stages[name]
  rows, samples = cfg.rollout.episodes, cfg.rollout.samples_per_prompt
  key = stage_key(setup, name)

  @jax.jit
  def whole(policy: Params, frozen: Params) -> Params:
    params = adapters.whole(setup, name, 'lm', policy, frozen)
    return freeze(lora.merge(params), setup.policy_model)

  def ask(prompts, mask, weights, step) -> Generation:
    seeds = jax.random.randint(jax.random.fold_in(key, step), (rows,), 0, 2**31 - 1)
    answers = engine(
      [row[live].tolist() for row, live in zip(prompts, mask, strict=True) for _ in range(samples)],
      write_weights=functools.partial(_write, setup, weights),
      seeds=np.asarray(seeds).tolist(),
    )
    ends = setup.text.template.ends
    return packed(answers, rows, setup.response_length, ends, setup.policy_model)

  def sample(state: TrainState, frozen: Params, batch: tuple) -> tuple[Generation | None, float]:
    began = time.perf_counter()
    prompts, mask, weights, step = fetch(
      (*batch[:2], whole(state.params['policy'], frozen), state.step)
    )
    made = None
    if jax.process_index() == 0:
      try:
        made = ask(prompts, mask, weights, int(step))
      except Exception as error:  # noqa: BLE001 a fork's engine may raise anything
        failures.append(
          f'the engine {cfg.rollout.engine.fn} failed: {type(error).__name__}: '
          f'{str(error).rstrip(".")}.'
        )
    made = _from_process_0(made, shapes(setup, name))
    if made is None:
      return None, 0.0
    return setup.sharder.put_full(made), time.perf_counter() - began

  return sample


_held: set[pathlib.Path] = set()  # the folders that this process writes weights to


def _write(setup: Setup, weights: Params, folder: str) -> None:
  """Writes the weights for an engine. No other process may write to the folder from then on."""
  path = pathlib.Path(folder).absolute()
  if path not in _held:
    path.mkdir(parents=True, exist_ok=True)
    lasting = contextlib.ExitStack()
    try:
      lasting.enter_context(lock.held(path))
    except lock.Busy as busy:
      raise ValueError(f'another run writes its weights to {path}: {busy}') from None
    atexit.register(lasting.close)
    _held.add(path)
  source = setup.config.model.source.removeprefix('hf:')
  export.save_weights(path, source, setup.policy_model, weights, setup.policy_model.dtype)


def _from_process_0(made: Generation | None, like: Generation) -> Generation | None:
  """What process 0 has, on every process."""
  if jax.process_count() == 1:
    return made
  empty = Generation(*(np.zeros(x.shape, x.dtype) for x in like))
  there, made = multihost_utils.broadcast_one_to_all((np.int32(made is not None), made or empty))
  return jax.tree.map(np.asarray, made) if there else None


def packed(
  answers: Any, rows: int, length: int, ends: Sequence[int], model: TransformerConfig
) -> Generation:
  """The answers of an engine as numpy arrays of `length` columns.

  Raises:
    ValueError: an answer that this policy could not have sampled. The message says which.
  """
  if not isinstance(answers, Sequence) or len(answers) != rows:
    found = len(answers) if isinstance(answers, Sequence) else type(answers).__name__
    raise ValueError(f'it returned {found} responses to {rows} prompts')
  made = Generation(
    np.zeros((rows, length), np.int32),
    np.zeros((rows, length), bool),
    np.zeros((rows, length), np.float32),
    np.zeros(rows, bool),
  )
  for i, (tokens, logprobs) in enumerate(answers):
    count = len(tokens)
    if problem := _problem(tokens, logprobs, length, ends, model):
      raise ValueError(f'response {i} (counted from 0) {problem}')
    made.responses[i, :count], made.logprobs[i, :count] = tokens, logprobs
    made.mask[i, :count] = True
    made.ended[i] = tokens[-1] in ends
  return made


def _problem(tokens, logprobs, length: int, ends: Sequence[int], model: TransformerConfig) -> str:
  """What is wrong with a response, or ''."""
  count = len(tokens)
  if not 0 < count <= length:
    return f'has {count} tokens; 1 to {length} were asked for'
  if len(logprobs) != count:
    return f'has {len(logprobs)} log-probabilities of {count} tokens'
  if not np.isfinite(np.asarray(logprobs, np.float64)).all():
    return 'has a log-probability that is not finite'
  none = [(-math.inf, 0), *model.unused_ids, (model.vocab_size, math.inf)]
  if wrong := [t for t in tokens if any(low <= t < high for low, high in none)]:
    return f'has the token {wrong[0]}, which the vocabulary does not have'
  if early := [t for t in tokens[:-1] if t in ends]:
    return f'goes on after the stop token {early[0]}'
  if count < length and tokens[-1] not in ends:
    return f'ends after {count} of {length} tokens without a stop token'
  return ''
