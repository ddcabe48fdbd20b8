"""Runs lm-evaluation-harness on a model of ours: implements its language-model interface with our
compiled functions, without torch.

    from lm_eval import simple_evaluate

    model = harness.language_model(loading.load('runs/.../ppo_ptx'))
    results = simple_evaluate(model=model, tasks=['truthfulqa_mc1'])

lm_eval_plugin.py registers the interface as `--model alignjax`.

The harness's own TemplateLM splits tokens between context and continuation, and long inputs are cut
on the left as in its `hf` backend, so that scores are comparable. Rows are grouped by length, so
that a few compiled shapes serve any number of them, and are divided over the model's mesh if it has
one (loading.load(..., mesh=...)).
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alignjax.inference import bulk, completions
from alignjax.inference.loading import Model
from alignjax.runtime import journal, metrics


def language_model(model: Model, keep: pathlib.Path | None = None, **options: Any) -> Any:
  """Returns the harness's LM object for a loading.Model.

  Texts begin as documents do for this model (templates.Template.text). The harness's `hf` backend
  leaves this to the tokenizer; the tokens are the same, for a stage and for the checkpoint that is
  exported from it. If the context is empty, and at the start of a rolling log-likelihood, the start
  of the document is given and not scored, whereas `hf` scores a BOS after itself there. Names of
  control tokens in a text are read as text, except in the output of apply_chat_template, which is
  read as `hf` reads it. Generation arguments are read as in `hf` (`sampling`), but only those of
  the task count: `hf` adds those of the checkpoint's generation_config.json, and the default top_k
  of transformers to what is sampled.

  The attribute `cut` of the LM object counts the requests that were longer than the model's context
  and lost their left part.

  Args:
    model: the model to evaluate.
    keep: a JSON-lines file to which every answer is appended as it arrives, and which is read
      before anything is computed, so that an interrupted evaluation resumes. It belongs to one
      model (loading.facts), because requests are identified by their text alone.
    **options: the options of `scorer`.
  """
  try:
    from lm_eval.api.model import TemplateLM
  except ModuleNotFoundError:
    raise ValueError(
      "the evaluation harness is not installed: pip install 'alignjax[eval]'."
    ) from None
  score = completions.scorer(model, **options)
  known = {row['request']: row['answer'] for row in journal.read(keep)} if keep else {}

  def add(key, answer):
    known[key] = answer
    if keep:
      journal.append(keep, [dict(request=key, answer=answer)])

  class LanguageModel(TemplateLM):
    tokenizer_name = model.source or ''
    cut = 0
    rendered = False  # Whether the requests hold rendered chat templates.

    @property
    def eot_token_id(self):
      return model.template.end

    @property
    def prefix_token_id(self):
      return model.template.start[-1]

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
      whole = add_special_tokens is not False
      if self.rendered:
        return _encode_rendered(model, string, whole)
      return model.template.text(string) if whole else model.template.bare(string)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
      keys = [_key('loglikelihood', context, continued) for _, context, continued in requests]
      # A repeated request is scored once.
      new = {k: (c, t) for k, (_, c, t) in zip(keys, requests, strict=True) if k not in known}
      self.cut += sum(len(c) + len(t) > model.cfg.max_length + 1 for _, c, t in requests)
      names = list(new)
      with metrics.Progress(len(names), name='scored', active=not disable_tqdm) as progress:
        done = _counted(progress, lambda i, result: add(names[i], list(result)))
        score(list(new.values()), done)
      return [tuple(known[k]) for k in keys]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      keys = [_key('rolling', *request.args) for request in requests]
      texts = {
        key: request.args[0]
        for key, request in zip(keys, requests, strict=True)
        if key not in known
      }
      cut = {
        key: _windows(self.tok_encode(text, add_special_tokens=False), model)
        for key, text in texts.items()
      }
      scores = iter(score([w for windows in cut.values() for w in windows]))
      for key, windows in cut.items():
        add(key, sum(next(scores)[0] for _ in windows))
      return [known[key] for key in keys]

    def generate_until(self, requests, disable_tqdm=False):
      # A task may request several samples of a prompt.
      numbers = bulk.occurrences(json.dumps(request.args) for request in requests)
      keys, groups = [], {}  # {how to sample: {key: (prompt, number)}}
      for request, number in zip(requests, numbers, strict=True):
        how = sampling(request.args[1])
        key = _key('generate', request.args[0], how, number if how.temperature else 0)
        keys.append(key)
        prompt = self.tok_encode(request.args[0])
        self.cut += len(prompt) > model.cfg.max_length - how.max_tokens
        if key not in known:
          groups.setdefault(how, {})[key] = prompt, number
      count = sum(map(len, groups.values()))
      with metrics.Progress(count, name='written', active=not disable_tqdm) as progress:
        written = _counted(progress, add)
        for how, prompts in groups.items():
          names = list(prompts)
          rows, which = zip(*prompts.values(), strict=True)
          completions.continuations(
            model,
            list(rows),
            **how._asdict(),
            numbers=which,
            done=lambda i, text, names=names: written(names[i], text),
          )
      return [known[k] for k in keys]

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
      self.rendered = True
      return model.tokenizer.apply_chat_template(
        chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
      )

  return LanguageModel()


def _key(*request: Any) -> str:
  """Returns the name of a request's answer in the file of kept answers."""
  return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:24]


def _encode_rendered(model: Model, text: str, whole: bool) -> list[int]:
  """Returns the tokens of a text that a chat template has rendered, where names of control tokens
  are control tokens. whole: the text begins as documents do, unless it does so by itself."""
  tokens = model.tokenizer.encode(text, add_special_tokens=False, verbose=False)
  first = model.template.first
  return [*first, *tokens] if whole and tuple(tokens[: len(first)]) != first else tokens


def _windows(tokens: list[int], model: Model) -> list[tuple[list[int], list[int]]]:
  """Cuts a text into (context, continuation) pairs that fit the model, in which each token is
  scored once."""
  from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

  start, most = model.template.start[-1], model.cfg.max_length
  return [make_disjoint_window(w) for w in get_rolling_token_windows(tokens, start, most, 1)]


class Sampling(NamedTuple):
  """How a continuation is sampled, as completions.continuations takes it. A temperature of 0 is
  greedy decoding."""

  until: tuple[str, ...]
  max_tokens: int
  temperature: float
  top_k: int | None = None
  top_p: float | None = None


READ = ('until', 'max_gen_toks', 'do_sample', 'temperature', 'top_k', 'top_p')
# Arguments of transformers that change nothing at these values.
WITHOUT_EFFECT: dict[str, Any] = dict(num_beams=1, num_return_sequences=1, repetition_penalty=1)


def sampling(asked: Mapping[str, Any]) -> Sampling:
  """Reads the generation_kwargs of a request as the harness's `hf` backend does.

  normalize_gen_kwargs of the harness says what counts: a continuation is sampled only if do_sample
  or a temperature without do_sample says so, and max_new_tokens, max_tokens and
  max_completion_tokens are other names of max_gen_toks.

  Raises:
    ValueError: An argument is unknown here, or has a value that cannot be. The message names it.
  """
  from lm_eval.models.utils import normalize_gen_kwargs

  try:
    found: dict[str, Any] = {**normalize_gen_kwargs(dict(asked))}
  except (TypeError, ValueError) as error:
    raise ValueError(f'generation_kwargs={dict(asked)} cannot be read ({error}).') from None
  for name, value in found.items():
    if name not in READ and (name not in WITHOUT_EFFECT or value != WITHOUT_EFFECT[name]):
      raise ValueError(
        f'generation_kwargs: {name}={value!r} is not supported here; there are '
        f'{", ".join(READ)}. Leave it out, or use the backend `hf`.'
      )
  until = [text for text in found['until'] if text]
  how = Sampling(tuple(until), found['max_gen_toks'], 0.0)
  if not found['do_sample']:
    return how
  temperature, top_k, top_p = (found.get(k) for k in ('temperature', 'top_k', 'top_p'))
  for name, value, good, words in (
    ('temperature', temperature, _number(temperature) and temperature > 0, 'a number above 0'),
    (
      'top_k',
      top_k,
      top_k is None or _number(top_k) and top_k == int(top_k) >= 0,
      'a whole number, 0 or more',
    ),
    ('top_p', top_p, top_p is None or _number(top_p) and 0 < top_p <= 1, 'from above 0 to 1'),
  ):
    if not good:
      raise ValueError(f'generation_kwargs: with do_sample, {name}={value!r} must be {words}.')
  return how._replace(
    temperature=float(temperature),
    top_k=int(top_k) if top_k else None,  # As in transformers, 0 keeps all tokens.
    top_p=float(top_p) if top_p is not None and top_p < 1 else None,
  )


def _number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _counted(progress: metrics.Progress, then: Callable) -> Callable:
  """Returns a callback that calls `then` and advances the progress line by one."""
  count = 0

  def done(which, value):
    nonlocal count
    count += 1
    then(which, value)
    progress.update(count, {'evals/answers': count})

  return done
