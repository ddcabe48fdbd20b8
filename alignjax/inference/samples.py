"""Samples the responses of policies and evaluates them: samples that are stored on disk, a reward
model's scores, the sandbox's gold scores, and the divergence from a reference. Each `make_*`
compiles once for any number of parameters of one architecture.

A sharder is that of the mesh, or None for one device.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax import sandbox
from alignjax.data import templates
from alignjax.inference import bulk
from alignjax.inference.loading import Model
from alignjax.runtime import journal, metrics
from alignjax.sharding import Sharder


class Responses(NamedTuple):
  """The responses to prompts, each attribute as [prompt][sample].

  Attributes:
    texts: the texts of the responses.
    tokens: the policy's tokens, including the end token if it was sampled.
    ended: whether the end token was sampled.
  """

  texts: list[list[str]]
  tokens: list[list[list[int]]]
  ended: list[list[bool]]


def make_responder(
  model: Model,
  prompts: Sequence[Any],
  *,
  count: int,
  max_tokens: int,
  temperature: float = 1.0,
  rows: int = 64,
  sharder: Sharder | None = None,
) -> Callable[..., Responses]:
  """Returns a function respond(params, seed, path) -> Responses with `count` responses to each
  prompt.

  A response depends on params, seed, temperature, its prompt and its number alone
  (bulk.make_sampler). The samples of a prompt that occurs twice have different numbers. `path` is a
  JSON-lines file with one line per prompt, which is written as the responses arrive; a second call
  reads the existing lines and continues. The file belongs to these weights, prompts and settings
  alone, so its name must identify them.

  Args:
    model: the policy.
    prompts: texts, or messages if the template is a chat.
    count: the number of responses to each prompt.
    max_tokens: the length limit of a response in tokens.
    temperature: the sampling temperature.
    rows: the largest number of rows in a batch.
    sharder: the Sharder of the mesh, or None for one device.
  """
  queries = templates.each(model.template.prompt, prompts, 'prompts')
  longest = max(map(len, queries))
  if longest + max_tokens > model.cfg.max_length:
    raise ValueError(
      f'the longest prompt has {longest} tokens, which with {max_tokens} tokens of a response is '
      f'more than the context of {model.cfg.max_length}: use fewer tokens, or shorter prompts.'
    )
  sample = bulk.make_sampler(
    model.nets,
    sharder,
    prompt_length=longest,
    max_tokens=max_tokens,
    stop_ids=model.template.ends,
    pad=model.template.pad,
    rows=rows,
  )
  numbers = bulk.occurrences(map(tuple, queries))

  def respond(params, seed: int, path: pathlib.Path) -> Responses:
    lines = {row['prompt']: row for row in journal.read(path)}
    if not lines.keys() <= set(range(len(queries))):
      raise ValueError(f'{path} holds responses to other prompts; remove it to sample them again.')
    missing = [i for i in range(len(queries)) if i not in lines]
    made: dict[int, dict[int, tuple]] = {i: {} for i in missing}
    with metrics.Progress(len(queries), len(lines), 'responses') as progress:

      def done(place, result):
        i, j = missing[place // count], place % count
        made[i][j] = result
        if len(made[i]) == count:
          samples = [made[i][j] for j in range(count)]
          lines[i] = dict(
            prompt=i,
            tokens=[tokens for tokens, _ in samples],
            ended=[ended for _, ended in samples],
          )
          journal.append(path, [lines[i]])
          progress.update(len(lines), {'prompts': len(lines)})

      sample(
        params,
        [queries[i] for i in missing for _ in range(count)],
        seed,
        temperature,
        [numbers[i] * count + j for i in missing for j in range(count)],
        done,
      )
    tokens, ended = ([lines[i][k] for i in range(len(queries))] for k in ('tokens', 'ended'))
    texts = [[model.template.decode_response(t)[0] for t in ts] for ts in tokens]
    return Responses(texts, tokens, ended)

  return respond


def make_rewarder(
  model: Model, prompts: Sequence[Any], *, rows: int = 64, sharder: Sharder | None = None
) -> Callable:
  """Returns a function reward(params, responses) -> f64[prompts, samples], a reward model's scores.

  The texts are read with the reward model's own tokenizer and template, which may differ from the
  policy's. A response that did not end has no end token here either.
  """
  score = bulk.make_scorer(
    model.nets, sharder, length=model.cfg.max_length, pad=model.template.pad, rows=rows
  )

  def reward(params, responses: Responses) -> np.ndarray:
    distinct: dict[tuple, int] = {}
    where = np.array(
      [
        [distinct.setdefault((i, t, e), len(distinct)) for t, e in zip(texts, ended, strict=True)]
        for i, (texts, ended) in enumerate(zip(responses.texts, responses.ended, strict=True))
      ]
    )
    sequences = [
      sum(model.template.row(prompts[i], text, ended), []) for i, text, ended in distinct
    ]
    longest = max(map(len, sequences))
    if longest > model.cfg.max_length:
      raise ValueError(
        f'prompt and response have {longest} tokens, but the context of the reward model is '
        f'{model.cfg.max_length}.'
      )
    return np.asarray(score(params, sequences), np.float64)[where]

  return reward


def make_divergence(
  model: Model,
  prompts: Sequence[Any],
  *,
  max_tokens: int,
  temperature: float = 1.0,
  rows: int = 64,
  sharder: Sharder | None = None,
) -> Callable:
  """Returns a function divergence(params, ref, responses) -> f64[prompts, samples], which is log
  p(response) - log p_ref(response) in nats, where both are at the temperature. Its mean over
  samples that the policy drew at this temperature estimates KL(policy || ref).

  Args:
    model: a policy; its template and networks are those of both.
    prompts: texts, or messages if the template is a chat.
    max_tokens: the length limit of a response in tokens.
    temperature: that of the samples, above 0.
    rows: the largest number of rows in a batch.
    sharder: the Sharder of the mesh, or None for one device.

  Raises:
    ValueError: The temperature is not above 0. Greedy responses have no such divergence.
  """
  if temperature <= 0:
    raise ValueError(
      f'temperature={temperature} must be above 0: greedy responses have no KL to a reference.'
    )
  queries = [model.template.prompt(p) for p in prompts]
  logprobs = bulk.make_response_logprobs(
    model.nets,
    sharder,
    length=max(map(len, queries)) + max_tokens,
    pad=model.template.pad,
    rows=rows,
    temperature=temperature,
  )

  def divergence(params, ref, responses: Responses) -> np.ndarray:
    flat = [t for tokens in responses.tokens for t in tokens]
    asked = [q for q, tokens in zip(queries, responses.tokens, strict=True) for _ in tokens]
    return (logprobs(params, asked, flat) - logprobs(ref, asked, flat)).reshape(len(queries), -1)

  return divergence


def gold(
  world: sandbox.World,
  labelers: sandbox.Labelers,
  records: Sequence[Mapping[str, Any]],
  responses: Responses,
) -> dict[str, np.ndarray]:
  """Returns the sandbox's true scores, f64[prompts, samples]: the mean utility of the training and
  of the held-out labelers."""
  features = labelers.features(
    [
      sandbox.judge(world, r['meta'], t, e)
      for r, texts, ended in zip(records, responses.texts, responses.ended, strict=True)
      for t, e in zip(texts, ended, strict=True)
    ]
  )
  shape = len(records), -1
  return {
    'gold, training labelers': labelers.gold(features, labelers.train).reshape(shape),
    'gold, held-out labelers': labelers.gold(features, labelers.heldout).reshape(shape),
  }
