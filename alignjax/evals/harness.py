"""lm-evaluation-harness over a model of ours: its language-model interface on our compiled functions, without torch.

    from lm_eval import simple_evaluate
    results = simple_evaluate(model=harness.language_model(finished.load('runs/.../ppo_ptx')), tasks=['truthfulqa_mc1'])

Tokens are split between context and continuation by the harness's own TemplateLM, and long inputs are cut on the left as its
`hf` backend cuts them, so that scores can be compared. Rows are grouped by length, a few compiled shapes for any number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from alignjax.data import encode
from alignjax.evals import bulk
from alignjax.sampling import generate


def buckets(length: int, most: int, smallest: int = 32) -> int:
  """The padded length of a row: a power of two, or half between two, of at most `most`."""
  size = smallest
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return min(size, most)


def scorer(model: Any, logits_bytes: int = 2**28) -> Callable[[list[tuple[list[int], list[int]]]], list[tuple[float, bool]]]:
  """-> score([(context, continuation)]) -> [(log-likelihood in nats, whether greedy decoding gives it)], token lists.

  logits_bytes: of the float32 logits that exist at once; decides how many rows go together.
  """
  cfg = model.cfg
  compiled: dict[int, Callable] = {}

  def score(pairs):
    out: list = [None] * len(pairs)
    rows: dict[int, list[tuple[int, list[int], int]]] = {}
    for i, (context, continuation) in enumerate(pairs):
      whole = [*context, *continuation][-(cfg.max_length + 1):]  # the left is cut; the last token is only predicted
      count = min(len(continuation), len(whole) - 1)
      rows.setdefault(buckets(len(whole) - 1, cfg.max_length) + 1, []).append((i, whole, count))
    for length in sorted(rows, reverse=True):
      chosen = rows[length]
      size = max(1, min(64, logits_bytes // (4 * length * cfg.vocab_size)))
      run = compiled.setdefault(length, bulk.make_likelihood(model.nets, lambda x: x, rows=size))
      tokens, mask = encode.right_pad([whole for _, whole, _ in chosen], length, model.template.pad)
      weights = np.zeros(tokens.shape, np.float32)
      for row, (_, whole, count) in enumerate(chosen):
        weights[row, len(whole) - count:len(whole)] = 1.0
      logprobs, greedy = run(model.params, tokens, mask, weights)
      for (i, _, _), logprob, hit in zip(chosen, logprobs, greedy, strict=True):
        out[i] = (float(logprob), bool(hit))
    return out

  return score


def stop_tokens(model: Any, until: Iterable[str]) -> tuple[int, ...]:
  """The model's end token and every token whose text holds one of the stop texts: none of them is sampled past."""
  until = [u for u in until if u]
  ends = {model.template.end, model.template.separator}
  if until:
    ends |= {i for i in range(model.vocabulary) if any(u in model.decode([i]) for u in until)}
  return tuple(sorted(ends))


def continuations(model: Any, prompts: list[list[int]], *, max_tokens: int, until: tuple[str, ...] = (), temperature: float = 0.0,
                  seed: int = 0, rows: int = 16) -> list[str]:
  """Text that follows each prompt (token lists; cut on the left), up to the first of the stop texts."""
  stops = stop_tokens(model, until)
  room = model.cfg.max_length - max_tokens
  if room < 1:
    raise ValueError(f'max_tokens={max_tokens} leaves no room for a prompt in a context of {model.cfg.max_length}.')
  prompts = [p[-room:] for p in prompts]
  out: list[str] = [''] * len(prompts)
  groups: dict[int, list[int]] = {}
  for i, prompt in enumerate(prompts):
    groups.setdefault(buckets(len(prompt), room), []).append(i)
  for length, chosen in sorted(groups.items()):
    sample = _sampler(model, max_tokens, stops, temperature)
    for start in range(0, len(chosen), rows):
      some = chosen[start:start + rows]
      padded = encode.left_pad([prompts[i] for i in some] + [prompts[some[0]]] * (rows - len(some)), length, model.template.pad)
      key = jax.random.fold_in(jax.random.key(seed), some[0])
      made = jax.tree.map(np.asarray, sample(model.params, *padded, key))
      for i, row, live in zip(some, made.responses, made.mask, strict=False):
        said = row[live].tolist()
        said = said[:-1] if said and said[-1] in (model.template.end, model.template.separator) else said
        text = model.decode(said)
        for stop in until:
          text = text.split(stop)[0] if stop else text
        out[i] = text
  return out


def _sampler(model: Any, max_tokens: int, stops: tuple[int, ...], temperature: float) -> Callable:
  key = (id(model.nets), max_tokens, stops, temperature)
  if key not in _SAMPLERS:
    _SAMPLERS[key] = jax.jit(lambda params, tokens, mask, key: generate(
        model.nets.decoder, params, tokens, mask, key, max_tokens=max_tokens, stop_ids=stops, temperature=temperature))
  return _SAMPLERS[key]


_SAMPLERS: dict = {}


def language_model(model: Any, **options: Any) -> Any:
  """The harness's LM object of a finished.Model. options: of `scorer`."""
  try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
  except ModuleNotFoundError:
    raise ValueError("the evaluation harness is not installed: pip install 'alignjax[eval]'.") from None
  score = scorer(model, **options)

  class LanguageModel(TemplateLM):
    tokenizer_name = model.source or ''

    @property
    def eot_token_id(self):
      return model.template.separator

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
      return model.encode(string)

    def _loglikelihood_tokens(self, requests, **kwargs):
      return score([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      totals = []
      for request in requests:
        windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, model.cfg.max_length, 1)
        totals.append(sum(value for value, _ in score([make_disjoint_window(w) for w in windows])))
      return totals

    def generate_until(self, requests, disable_tqdm=False):
      texts: list[str] = [''] * len(requests)
      groups: dict[tuple, list[int]] = {}
      for i, request in enumerate(requests):
        asked = request.args[1]
        until = asked.get('until') or []
        until = (until,) if isinstance(until, str) else tuple(until)
        sampled = asked.get('do_sample', False) or asked.get('temperature', 0) > 0
        temperature = float(asked.get('temperature', 1.0)) if sampled else 0.0
        groups.setdefault((until, int(asked.get('max_gen_toks', 256)), temperature), []).append(i)
      for (until, most, temperature), chosen in groups.items():
        made = continuations(model, [self.tok_encode(requests[i].args[0]) for i in chosen], max_tokens=most, until=until,
                             temperature=temperature)
        for i, text in zip(chosen, made, strict=True):
          texts[i] = text
      return texts

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
      return model.tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt)

  return LanguageModel()
