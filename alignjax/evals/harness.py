"""lm-evaluation-harness over a model of ours: its language-model interface on our compiled functions, without torch.

    from lm_eval import simple_evaluate
    results = simple_evaluate(model=harness.language_model(finished.load('runs/.../ppo_ptx')), tasks=['truthfulqa_mc1'])

Tokens are split between context and continuation by the harness's own TemplateLM, and long inputs are cut on the left as its
`hf` backend cuts them, so that scores can be compared. Rows are grouped by length, a few compiled shapes for any number of
them, and lie over the model's mesh where it has one (finished.load(..., mesh=...)).
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from alignjax import metrics
from alignjax.data import encode
from alignjax.evals import bulk, kept
from alignjax.sampling import generate
from alignjax.sharding import fetch


def buckets(length: int, most: int, smallest: int = 32) -> int:
  """The padded length of a row: a power of two, or half between two, of at most `most`."""
  size = smallest
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return min(size, most)


def rows_of(model: Any, wanted: int, most: int) -> int:
  """Rows that are computed together for `wanted` of them: a power of two of at most `most` on each of the mesh's shards, so
  that a few rows do not cost as much as many, and many have one shape."""
  shards = model.sharder.batch_shards if model.sharder else 1
  each = -(-wanted // shards)
  return shards * max(1, min(most, 1 << (each - 1).bit_length()))


def scorer(model: Any, logits_bytes: int = 2**28) -> Callable[..., list[tuple[float, bool]]]:
  """-> score([(context, continuation)], done=None) -> [(log-likelihood in nats, whether greedy decoding gives it)], token lists.

  logits_bytes: of the float32 logits that exist at once on a device; decides how many rows go together.
  done(i, result), where given, is called as results come, which is not in the order of the pairs.
  An empty context is the start of a document, which is not scored.
  """
  cfg = model.cfg
  put = model.sharder.spread if model.sharder else _as_it_is

  def score(pairs, done=None):
    out: list = [None] * len(pairs)
    rows: dict[int, list[tuple[int, list[int], int]]] = {}
    for i, (context, continuation) in enumerate(pairs):
      whole = [*(context or model.template.start), *continuation]
      whole = whole[-(cfg.max_length + 1):]  # the left is cut; the last token is only predicted
      count = min(len(continuation), len(whole) - 1)
      rows.setdefault(buckets(len(whole) - 1, cfg.max_length) + 1, []).append((i, whole, count))
    for length in sorted(rows, reverse=True):
      chosen = rows[length]
      size = rows_of(model, len(chosen), min(64, logits_bytes // (4 * length * cfg.vocab_size)))
      run = _likelihood(model.nets, put, size)
      for start in range(0, len(chosen), size):
        some = chosen[start:start + size]
        tokens, mask = encode.right_pad([whole for _, whole, _ in some], length, model.template.pad)
        weights = np.zeros(tokens.shape, np.float32)
        for row, (_, whole, count) in enumerate(some):
          weights[row, len(whole) - count:len(whole)] = 1.0
        logprobs, greedy = run(model.params, tokens, mask, weights)
        for (i, _, _), logprob, hit in zip(some, logprobs, greedy, strict=True):
          out[i] = (float(logprob), bool(hit))
          if done:
            done(i, out[i])
    return out

  return score


def _as_it_is(rows: Any) -> Any:
  return rows


@functools.lru_cache(maxsize=64)
def _likelihood(nets: Any, put: Callable, rows: int) -> Callable:
  """Kept by the network's functions, not by the model: no parameters stay alive with it."""
  return bulk.make_likelihood(nets, put, rows)


def stop_tokens(model: Any, until: Iterable[str]) -> tuple[int, ...]:
  """The model's end tokens and every token whose text holds one of the stop texts: none of them is sampled past."""
  until = [u for u in until if u]
  ends = {*model.template.ends}
  if until:
    ends |= {i for i in range(model.vocabulary) if any(u in model.decode([i]) for u in until)}
  return tuple(sorted(ends))


def continuations(model: Any, prompts: list[list[int]], *, max_tokens: int, until: tuple[str, ...] = (), temperature: float = 0.0,
                  seed: int = 0, rows: int = 16, cache_bytes: int = 2**30,
                  done: Callable[[int, str], None] | None = None) -> list[str]:
  """Text that follows each prompt (token lists; cut on the left), up to the first of the stop texts.

  rows: at most so many together on a device, and no more than have cache_bytes of keys and values (as float32).
  done(i, text), where given, is called as texts come, which is not in the order of the prompts.
  """
  cfg = model.cfg
  stops = stop_tokens(model, until)
  room = cfg.max_length - max_tokens
  if room < 1:
    raise ValueError(f'max_tokens={max_tokens} leaves no room for a prompt in a context of {cfg.max_length}.')
  prompts = [p[-room:] for p in prompts]
  out: list[str] = [''] * len(prompts)
  groups: dict[int, list[int]] = {}
  for i, prompt in enumerate(prompts):
    groups.setdefault(buckets(len(prompt), room), []).append(i)
  sample = _sampler(model.nets, max_tokens, stops, temperature)
  for length, chosen in sorted(groups.items()):
    slot = 8 * cfg.num_layers * cfg.kv_heads * cfg.head_width * (length + max_tokens)
    size = rows_of(model, len(chosen), min(rows, cache_bytes // slot))
    for start in range(0, len(chosen), size):
      some = chosen[start:start + size]
      padded = encode.left_pad([prompts[i] for i in some] + [prompts[some[0]]] * (size - len(some)), length, model.template.pad)
      if model.sharder:
        padded = model.sharder.spread(padded)
      key = jax.random.fold_in(jax.random.key(seed), some[0])
      made = fetch(sample(model.params, *padded, key))
      for i, row, live in zip(some, made.responses, made.mask, strict=False):
        text, _ = model.template.said(row[live])
        for stop in until:
          text = text.split(stop)[0] if stop else text
        out[i] = text
        if done:
          done(i, text)
  return out


@functools.lru_cache(maxsize=32)
def _sampler(nets: Any, max_tokens: int, stops: tuple[int, ...], temperature: float) -> Callable:
  return jax.jit(lambda params, tokens, mask, key: generate(
      nets.decoder, params, tokens, mask, key, max_tokens=max_tokens, stop_ids=stops, temperature=temperature))


def language_model(model: Any, keep: pathlib.Path | None = None, **options: Any) -> Any:
  """The harness's LM object of a finished.Model.

  keep: a JSONL file that every answer is appended to as it comes, and read from before anything is computed, so that an
    interrupted evaluation goes on. For one checkpoint: requests are known by their text alone.
  options: of `scorer`.

  Texts begin as documents do for this model (templates.Template.text), where its `hf` backend lets the tokenizer decide: the same
  tokens, for a stage and for the checkpoint exported from it. With an empty context, and at the start of a rolling
  log-likelihood, the start of the document is given and not scored; `hf` scores a BOS after itself there. Names of control tokens
  in a text are text, except in what apply_chat_template has rendered, which is read as `hf` reads it.

  Its attribute `cut` counts the requests that were longer than the model's context and lost their left part.
  """
  try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
  except ModuleNotFoundError:
    raise ValueError("the evaluation harness is not installed: pip install 'alignjax[eval]'.") from None
  score = scorer(model, **options)
  known = {row['request']: row['answer'] for row in kept.read(keep)} if keep else {}

  def add(key, answer):
    known[key] = answer
    if keep:
      kept.append(keep, [dict(request=key, answer=answer)])

  key_of = lambda *request: hashlib.sha256(json.dumps(request).encode()).hexdigest()[:24]

  class LanguageModel(TemplateLM):
    tokenizer_name = model.source or ''
    cut = 0
    rendered = False  # whether requests hold chat templates as text

    @property
    def eot_token_id(self):
      return model.template.end

    @property
    def prefix_token_id(self):
      return model.template.start[-1]

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
      if self.rendered:
        tokens = model.tokenizer.encode(string, add_special_tokens=False, verbose=False)
        first = model.template.first
        return tokens if add_special_tokens is False or tuple(tokens[:len(first)]) == first else [*first, *tokens]
      return model.template.bare(string) if add_special_tokens is False else model.template.text(string)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
      keys = [key_of('loglikelihood', context, continuation) for _, context, continuation in requests]
      new = {k: (c, t) for k, (_, c, t) in zip(keys, requests, strict=True) if k not in known}  # the same one twice is scored once
      self.cut += sum(len(c) + len(t) > model.cfg.max_length + 1 for _, c, t in requests)
      names = list(new)
      with metrics.Progress(len(names), name='scored', active=not disable_tqdm) as progress:
        done = _counted(progress, lambda i, result: add(names[i], list(result)))
        score(list(new.values()), done)
      return [tuple(known[k]) for k in keys]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      totals = []
      for request in requests:
        tokens = self.tok_encode(request.args[0], add_special_tokens=False)
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, model.cfg.max_length, 1)
        totals.append(sum(value for value, _ in score([make_disjoint_window(w) for w in windows])))
      return totals

    def generate_until(self, requests, disable_tqdm=False):
      keys = [key_of('generate', *request.args) for request in requests]
      groups: dict[tuple, dict[str, list[int]]] = {}
      for key, request in zip(keys, requests, strict=True):
        asked = request.args[1]
        until = asked.get('until') or []
        until = (until,) if isinstance(until, str) else tuple(until)
        sampled = asked.get('do_sample', False) or asked.get('temperature', 0) > 0
        temperature = float(asked.get('temperature', 1.0)) if sampled else 0.0
        prompt, most = self.tok_encode(request.args[0]), int(asked.get('max_gen_toks', 256))
        self.cut += len(prompt) > model.cfg.max_length - most
        if key not in known:
          groups.setdefault((until, most, temperature), {})[key] = prompt
      with metrics.Progress(sum(map(len, groups.values())), name='written', active=not disable_tqdm) as progress:
        count = _counted(progress, lambda key, text: add(key, text))
        for (until, most, temperature), prompts in groups.items():
          names = list(prompts)
          continuations(model, list(prompts.values()), max_tokens=most, until=until, temperature=temperature,
                        done=lambda i, text, names=names: count(names[i], text))
      return [known[k] for k in keys]

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
      self.rendered = True
      return model.tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt)

  return LanguageModel()


def _counted(progress: metrics.Progress, then: Callable) -> Callable:
  """then(...), and one more step of progress."""
  count = 0

  def done(which, value):
    nonlocal count
    count += 1
    then(which, value)
    progress.update(count, {'evals/answers': count})

  return done
