"""Samples of a vLLM server, as an engine of a PPO stage (stages/outside.py).

    VLLM_SERVER_DEV_MODE=1 vllm serve CHECKPOINT --enable-sleep-mode \\
      --logprobs-mode processed_logprobs
    c.stages.ppo_ptx.rollout.engine = dict(
      fn='alignjax.inference.vllm:complete', url='http://localhost:8000', folder='/dev/shm/policy'
    )

The server starts with the checkpoint that the run starts from. Each iteration writes the policy's
tensors to `folder`, which both programs see, and the server reads them in place, by
`reload_weights(weights_path=folder)`. VLLM_SERVER_DEV_MODE opens the addresses for that, to whoever
reaches the port, so keep it on this machine. Where server and training share a card, `sleep=True`
lets the server give its memory back while the policy is trained.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

from alignjax.runtime import retries


def complete(
  prompts: Sequence[Sequence[int]],
  *,
  write_weights: Callable[[str], None],
  seeds: Sequence[int],
  max_tokens: int,
  stop_ids: Sequence[int],
  temperature: float,
  unused_ids: Sequence[int],
  url: str,
  folder: str,
  sleep: bool = False,
  at_once: int = 256,
  tries: int = 3,
  wait: float = 1.0,
  timeout: float = 600.0,
) -> list[tuple[list[int], list[float]]]:
  """A response to each prompt, sampled with the present weights of the policy.

  Args:
    prompts: the tokens of each prompt.
    write_weights, seeds, max_tokens, stop_ids, temperature, unused_ids: the stage gives them.
    url: of the server, without /v1.
    folder: where the weights are written, best in shared memory.
    sleep: whether the server gives its memory back after sampling, and takes it before.
    at_once: requests in flight.
    tries, wait: of a request (retries.tried).
    timeout: seconds until a request has failed.

  Returns:
    [(tokens, log-probabilities), ...]. They are those of the sampler's distribution with
    --logprobs-mode processed_logprobs; by default vLLM returns those of temperature 1.

  Raises:
    RuntimeError: the server cannot be reached, refuses, or answers something else.
  """
  base = url.rstrip('/')

  def ask(path: str, value: Any = None) -> Any:
    def once():
      if value is None:
        return retries.get(base + path, timeout)
      return retries.post(base + path, value, timeout)

    try:
      return retries.tried(once, tries=tries, wait=wait)
    except retries.Refused as refused:
      advice = '; VLLM_SERVER_DEV_MODE=1 opens this address' * (refused.code in (404, 405))
      raise RuntimeError(f'{base}{path} refuses: {refused}{advice}') from None
    except retries.Passing as problem:
      raise RuntimeError(f'{base}{path} does not answer: {problem}') from None

  name = ask('/v1/models')['data'][0]['id']
  if sleep:
    ask('/wake_up?tags=weights', {})
  write_weights(folder)
  ask('/collective_rpc', dict(method='reload_weights', kwargs=dict(weights_path=folder)))
  if sleep:
    ask('/wake_up?tags=kv_cache', {})
  # What the server has cached of a prompt belongs to other weights.
  salt = uuid.uuid4().hex
  never = {str(i): -100.0 for i in unused_ids}

  def sample(prompt: Sequence[int], seed: int) -> tuple[list[int], list[float]]:
    request = dict(
      model=name,
      prompt=list(prompt),
      seed=seed,
      max_tokens=max_tokens,
      temperature=temperature,
      stop_token_ids=list(stop_ids),
      ignore_eos=True,  # Only stop_ids end a response.
      cache_salt=salt,
      logit_bias=never,
      logprobs=0,  # of the sampled token alone
      return_token_ids=True,
      # The server would take these from the checkpoint's generation_config.json.
      top_p=1.0,
      top_k=-1,
      min_p=0.0,
      repetition_penalty=1.0,
      presence_penalty=0.0,
      frequency_penalty=0.0,
    )
    answer = ask('/v1/completions', request)
    try:
      (choice,) = answer['choices']
      return choice['token_ids'], choice['logprobs']['token_logprobs']
    except (KeyError, TypeError, ValueError):
      raise RuntimeError(
        f'{base}/v1/completions answered without token_ids or logprobs: {str(answer)[:300]}'
      ) from None

  with futures.ThreadPoolExecutor(min(at_once, len(prompts))) as pool:
    made = list(pool.map(sample, prompts, seeds))
  if sleep:
    ask('/sleep?level=2', {})
  return made
