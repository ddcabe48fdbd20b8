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
import pathlib
from collections.abc import Callable
from typing import Any

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
  read as `hf` reads it.

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
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
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

  def key_of(*request):
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:24]

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
      if self.rendered:
        tokens = model.tokenizer.encode(string, add_special_tokens=False, verbose=False)
        first = model.template.first
        return (
          tokens
          if add_special_tokens is False or tuple(tokens[: len(first)]) == first
          else [*first, *tokens]
        )
      return (
        model.template.bare(string) if add_special_tokens is False else model.template.text(string)
      )

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
      keys = [
        key_of('loglikelihood', context, continuation) for _, context, continuation in requests
      ]
      # A repeated request is scored once.
      new = {k: (c, t) for k, (_, c, t) in zip(keys, requests, strict=True) if k not in known}
      self.cut += sum(len(c) + len(t) > model.cfg.max_length + 1 for _, c, t in requests)
      names = list(new)
      with metrics.Progress(len(names), name='scored', active=not disable_tqdm) as progress:
        done = _counted(progress, lambda i, result: add(names[i], list(result)))
        score(list(new.values()), done)
      return [tuple(known[k]) for k in keys]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      keys = [key_of('rolling', *request.args) for request in requests]
      new = {
        key: request.args[0]
        for key, request in zip(keys, requests, strict=True)
        if key not in known
      }
      cut = {
        key: [
          make_disjoint_window(w)
          for w in get_rolling_token_windows(
            self.tok_encode(text, add_special_tokens=False),
            self.prefix_token_id,
            model.cfg.max_length,
            1,
          )
        ]
        for key, text in new.items()
      }
      scores = iter(score([w for windows in cut.values() for w in windows]))
      for key, windows in cut.items():
        add(key, sum(next(scores)[0] for _ in windows))
      return [known[key] for key in keys]

    def generate_until(self, requests, disable_tqdm=False):
      # A task may request several samples of a prompt.
      numbers = bulk.occurrences(json.dumps(request.args) for request in requests)
      keys = [
        key_of('generate', *request.args, number if _temperature(request.args[1]) else 0)
        for request, number in zip(requests, numbers, strict=True)
      ]
      groups: dict[tuple, dict[str, tuple[list[int], int]]] = {}
      for key, request, number in zip(keys, requests, numbers, strict=True):
        asked = request.args[1]
        until = asked.get('until') or []
        until = (until,) if isinstance(until, str) else tuple(until)
        prompt, most = self.tok_encode(request.args[0]), int(asked.get('max_gen_toks', 256))
        self.cut += len(prompt) > model.cfg.max_length - most
        if key not in known:
          groups.setdefault((until, most, _temperature(asked)), {})[key] = prompt, number
      with metrics.Progress(
        sum(map(len, groups.values())), name='written', active=not disable_tqdm
      ) as progress:
        count = _counted(progress, lambda key, text: add(key, text))
        for (until, most, temperature), prompts in groups.items():
          names = list(prompts)
          rows, which = zip(*prompts.values(), strict=True)
          completions.continuations(
            model,
            list(rows),
            max_tokens=most,
            until=until,
            temperature=temperature,
            numbers=which,
            done=lambda i, text, names=names: count(names[i], text),
          )
      return [known[k] for k in keys]

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
      self.rendered = True
      return model.tokenizer.apply_chat_template(
        chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
      )

  return LanguageModel()


def _temperature(asked: dict[str, Any]) -> float:
  """Returns the temperature of a request's generation_kwargs, where 0 means greedy decoding."""
  sampled = asked.get('do_sample', False) or asked.get('temperature', 0) > 0
  return float(asked.get('temperature', 1.0)) if sampled else 0.0


def _counted(progress: metrics.Progress, then: Callable) -> Callable:
  """Returns a callback that calls `then` and advances the progress line by one."""
  count = 0

  def done(which, value):
    nonlocal count
    count += 1
    then(which, value)
    progress.update(count, {'evals/answers': count})

  return done
