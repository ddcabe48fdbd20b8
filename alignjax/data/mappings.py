"""Maps the records that people publish to our records (fields.py: FIELDS). There is one function
per data set, which c.data.mapping.KIND names as one of

  a name of this file         'hh_rlhf', 'ultrafeedback', ...
  'module:function'           a function of a fork: it takes a raw record and returns a list of our
                              records, which is empty if the raw one cannot be used
  'ours=theirs,ours=theirs'   fields that only have other names: 'prompt=question,response=answer'
  'NAME,ours=theirs,...'      a function, after the fields got the names that it reads:
                              'from_scores,prompt=question,responses=answers,scores=ratings' turns
                              scores into ranks

A function gets the raw record (a dict) and, if it has an argument `beside`, the folder of the
record's file.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import itertools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from alignjax.data import fields
from alignjax.runtime import textfiles

Records = list[dict[str, Any]]
TURN = '\n\nAssistant:'


def find(name: str | None, where: str) -> Callable[..., Records] | None:
  """Returns the mapping that a config entry names, or None if the entry is None."""
  if not name:
    return None
  renames = [part.strip() for part in name.split(',')]
  head = renames.pop(0) if '=' not in renames[0] else None
  pairs = [part.partition('=') for part in renames]
  names = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
  if (
    not all('=' in part for part in renames)
    or not all([*names, *names.values()])
    or len(names) < len(renames)
  ):
    raise ValueError(
      f"{where}={name!r}: fields are renamed by 'ours=theirs,ours=theirs', each of ours once."
    )
  if head is None:
    return functools.partial(rename, names=names)
  if ':' in head:
    from alignjax import plugins

    function = plugins.find(head, where)
  else:
    known = sorted(
      k
      for k, v in globals().items()
      if inspect.isfunction(v)
      and v.__module__ == __name__
      and not k.startswith('_')
      and k not in ('find', 'rename', 'apply')
    )
    if head not in known:
      raise ValueError(
        f"{where}={name!r} is none of {', '.join(known)}, nor 'module:function', nor "
        f"'ours=theirs,...'."
      )
    function = getattr(importlib.import_module(__name__), head)
  if not names:
    return function

  def renamed(raw, **more):
    return function(rename(raw, names=names)[0], **more)

  return functools.update_wrapper(renamed, function)


def apply(
  change: Callable[..., Records] | None, raw: dict, where: str, flag: str = 'the mapping'
) -> Records:
  """Returns our records of a raw record. Any error in a mapping becomes an error that names the
  place, the mapping and the fields."""
  if change is None:
    return [raw]
  function = getattr(change, 'func', change)
  name = 'ours=theirs' if function is rename else getattr(function, '__name__', str(function))
  try:
    made = change(raw)
  except Exception as error:  # noqa: BLE001 a function of a fork's may raise anything
    known = any(len(ours) > 1 and ours.keys() <= raw.keys() for ours in fields.FIELDS.values())
    hint = ' These are already the fields of our records: leave the mapping out.' if known else ''
    raise ValueError(
      f'{where}: {flag} {name!r} does not fit this record, which has {sorted(raw)} '
      f'({type(error).__name__}: {error}).{hint}'
    ) from error
  if not isinstance(made, list) or not all(isinstance(record, dict) for record in made):
    raise ValueError(
      f'{where}: {flag} {name!r} must return a list of records, each of them a dict; it returned '
      f'{type(made).__name__}'
      + (
        f' of {", ".join(sorted({type(r).__name__ for r in made}))}.'
        if isinstance(made, list)
        else '.'
      )
    )
  return made


def rename(raw: dict, *, names: dict[str, str]) -> Records:
  return [{ours: raw[theirs] for ours, theirs in names.items()}]


def _pair(prompt: Any, better: str, worse: str, tie: bool = False, **more: Any) -> dict[str, Any]:
  return dict(prompt=prompt, responses=[better, worse], ranks=[0, 0 if tie else 1], **more)


def _instruction(instruction: str, context: str) -> str:
  return f'{instruction}\n\n{context}' if context and context.strip() else instruction


# comparisons


def hh_rlhf(raw: dict) -> Records:
  """Maps Anthropic/hh-rlhf: {"chosen", "rejected"}, which are whole dialogues. The prompt is
  everything before the last answer. The few pairs that differ before the last answer are left out.
  The mapping is made for data.template='dialogue'."""
  chosen, rejected = raw['chosen'].rpartition(TURN), raw['rejected'].rpartition(TURN)
  if chosen[0] != rejected[0] or not chosen[1]:
    return []
  return [_pair(chosen[0] + TURN, chosen[2], rejected[2])]


def summarize_from_feedback(raw: dict) -> Records:
  """Maps the comparisons of openai/summarize_from_feedback: {"info", "summaries": [2], "choice",
  "worker"}, where info describes a Reddit post or a CNN/DM article."""
  texts = [s['text'] for s in raw['summaries']]
  best = int(raw['choice'])
  labeler: dict[str, Any] = {}
  if raw.get('worker') is not None:
    labeler = dict(labeler_id=str(raw['worker']))
  return [_pair(_post(raw['info']), texts[best], texts[1 - best], **labeler)]


def shp(raw: dict) -> Records:
  """Maps stanfordnlp/SHP: {"history", "human_ref_A", "human_ref_B", "labels", "domain"}, where
  labels is 1 if A is better."""
  a, b = raw['human_ref_A'], raw['human_ref_B']
  better, worse = {1: (a, b), 0: (b, a)}[int(raw['labels'])]
  return [_pair(raw['history'], better, worse)]


def from_scores(raw: dict) -> Records:
  """Maps any data set with scores: {"prompt", "responses", "scores"}, with one number per response.
  A higher score is better, and equal scores are a tie. The other fields are kept."""
  rest = {k: v for k, v in raw.items() if k != 'scores'}
  if len(raw['scores']) != len(raw['responses']):
    raise ValueError(f'{len(raw["responses"])} responses, but {len(raw["scores"])} scores')
  for score in raw['scores']:
    number = isinstance(score, (int, float)) and not isinstance(score, bool)
    if not number or not abs(score) <= sys.float_info.max:
      raise ValueError(f'a score must be a number, not {score!r}')
  return [rest | dict(ranks=_ranks(raw['scores']))]


def _ranks(scores: Sequence[float]) -> list[int]:
  """Returns the ranks: 0 for the highest score, then 1, and so on. Equal scores have equal
  ranks."""
  if not all(abs(score) <= sys.float_info.max for score in scores):
    raise ValueError(f'a score must be a finite number; got {list(scores)}')
  return fields.dense_ranks(-score for score in scores)


def ultrafeedback(raw: dict) -> Records:
  """Maps openbmb/UltraFeedback: {"instruction", "completions": [{"response", "overall_score"}]},
  with K = 4 responses that are ranked by score."""
  scores = [float(c['overall_score']) for c in raw['completions']]
  if len(scores) < 2:
    return []
  return [
    dict(
      prompt=raw['instruction'],
      responses=[c['response'] for c in raw['completions']],
      ranks=_ranks(scores),
    )
  ]


def ultrafeedback_binarized(raw: dict) -> Records:
  """Maps HuggingFaceH4/ultrafeedback_binarized: {"chosen": messages, "rejected": messages}. The
  prompt is a list of messages."""
  if raw['chosen'][:-1] != raw['rejected'][:-1]:
    return []
  return [
    _pair(list(raw['chosen'][:-1]), raw['chosen'][-1]['content'], raw['rejected'][-1]['content'])
  ]


def oasst(raw: dict) -> Records:
  """Maps OpenAssistant's trees, {"prompt": {"text", "role", "replies": [...]}}, to one record for
  every prompt with ranked answers. The prompt is a list of messages."""
  out: Records = []

  def walk(node: dict, messages: list[dict]):
    role = 'user' if node['role'] == 'prompter' else 'assistant'
    messages = [*messages, {'role': role, 'content': node['text']}]
    replies = node.get('replies') or []
    ranked = [r for r in replies if r.get('rank') is not None]
    if role == 'user' and len(ranked) > 1:
      out.append(
        dict(
          prompt=messages,
          responses=[r['text'] for r in ranked],
          ranks=[int(r['rank']) for r in ranked],
        )
      )
    for reply in replies:
      walk(reply, messages)

  walk(raw['prompt'], [])
  return out


def finegrained_rlhf(raw: dict) -> Records:
  """Maps allenai/FineGrainedRLHF: {"question", "passages", "prediction 1".."4", "preference": six
  pairs}, with K = 4 responses. The ranks are by the number of pairs won, where a tie counts one
  half."""
  wins = [0.0] * 4
  for (i, j), label in zip(itertools.combinations(range(4), 2), raw['preference'], strict=True):
    wins[i] += {1: 1.0, 0: 0.5, 2: 0.0}[label]
    wins[j] += {1: 0.0, 0: 0.5, 2: 1.0}[label]
  return [
    dict(
      prompt=raw['question'],
      responses=[raw[f'prediction {i}'] for i in (1, 2, 3, 4)],
      ranks=_ranks(wins),
    )
  ]


def pandalm(raw: dict) -> Records:
  """Maps WeOpenML/PandaLM's test set to one record for each of its three annotators, whose choice
  is 1, 2, or 0 for a tie."""
  # Some answers are booleans.
  prompt, a, b = (
    _instruction(raw['instruction'], raw['input']),
    str(raw['response1']),
    str(raw['response2']),
  )
  made = {
    1: lambda **kw: _pair(prompt, a, b, **kw),
    2: lambda **kw: _pair(prompt, b, a, **kw),
    0: lambda **kw: _pair(prompt, a, b, tie=True, **kw),
  }
  return [made[int(raw[f'annotator{n}'])](labeler_id=f'annotator{n}') for n in (1, 2, 3)]


def ukp_convarg(raw: dict, beside: pathlib.Path) -> Records:
  """Maps UKPLab/acl2016-convincing-arguments, a file judgments.jsonl.gz with arguments.jsonl.gz
  beside it, to one record per vote."""
  arguments = _arguments(beside / 'arguments.jsonl.gz')
  a, b = (arguments[raw['topic'], raw[k]] for k in ('arg1', 'arg2'))
  prompt = _argue(a)
  out = []
  for worker, vote in raw['votes']:
    first, second = (b, a) if vote == 'a2' else (a, b)
    out.append(_pair(prompt, first['text'], second['text'], tie=vote == 'equal', labeler_id=worker))
  return out


def _argue(argument: dict) -> str:
  return f'{argument["title"]}: write a convincing argument for "{argument["stance"]}".'


@functools.cache
def _arguments(path: pathlib.Path) -> dict:
  found = {}
  for where, row in textfiles.Records(textfiles.read(path), path):
    if not isinstance(row, dict) or not all(
      isinstance(row.get(k), (str, int)) for k in ('topic', 'arg_id', 'text')
    ):
      raise ValueError(f'{where}: an argument must have topic, arg_id and text.')
    found[row['topic'], row['arg_id']] = row
  return found


# demonstrations


def hh_rlhf_demonstrations(raw: dict) -> Records:
  """Returns the chosen answers of Anthropic/hh-rlhf as demonstrations."""
  before, turn, answer = raw['chosen'].rpartition(TURN)
  return [dict(prompt=before + TURN, response=answer)] if turn else []


def tldr(raw: dict) -> Records:
  """Maps openai/summarize_from_feedback's Reddit posts, in the filtered set of demonstrations:
  {"title", "subreddit", "post", "summary"}."""
  return [dict(prompt=_post(raw), response=raw['summary'])]


def _post(info: dict) -> str:
  """Returns the query for a Reddit post (Stiennon et al. 2020), or for a news article in the same
  form. Fields that are null are left out."""
  if info.get('article') is not None:
    fields = {'TITLE': info.get('title'), 'ARTICLE': info['article']}
  elif info['post'] is not None:
    fields = {
      'SUBREDDIT': info['subreddit'] and f'r/{info["subreddit"]}',
      'TITLE': info['title'],
      'POST': info['post'],
    }
  else:
    raise ValueError("neither 'post' nor 'article' has a text")
  return '\n'.join([*(f'{name}: {text}' for name, text in fields.items() if text), 'TL;DR:'])


def ukp_convarg_demonstrations(raw: dict) -> Records:
  """Maps the arguments.jsonl.gz of UKPLab/acl2016-convincing-arguments, where each argument is an
  answer to the prompt of its side."""
  return [dict(prompt=_argue(raw), response=raw['text'])]


def dolly(raw: dict) -> Records:
  """Maps databricks-dolly-15k: {"instruction", "context", "response", "category"}."""
  return [
    dict(
      prompt=_instruction(raw['instruction'], raw.get('context', '')),
      response=raw['response'],
      use_case=raw.get('category') or '',
    )
  ]


def dolly_hhrlhf(raw: dict) -> Records:
  """Maps mosaicml/dolly_hhrlhf: {"prompt", "response"}. Each prompt has Alpaca's "### Instruction:"
  form, which is removed."""
  instruction = raw['prompt'].partition('### Instruction:\n')[2].rpartition('\n\n### Response:')[0]
  return [dict(prompt=instruction, response=raw['response'])] if instruction else []


def alpaca(raw: dict) -> Records:
  """Maps Stanford Alpaca: {"instruction", "input", "output"}."""
  return [
    dict(prompt=_instruction(raw['instruction'], raw.get('input', '')), response=raw['output'])
  ]


def self_instruct(raw: dict) -> Records:
  """Maps the seed tasks of yizhongw/self-instruct: {"instruction", "instances": [{"input",
  "output"}]}."""
  return [
    dict(
      prompt=_instruction(raw['instruction'], i['input']),
      response=i['output'],
      use_case=raw['name'],
    )
    for i in raw['instances']
  ]


def truthfulqa_judge(raw: dict) -> Records:
  """Maps sylinrl/TruthfulQA's finetune_truth and finetune_info: {"prompt": "Q: ...\\nA:
  ...\\nTrue:", "completion": " yes" or " no"}. It returns nine questions in ten;
  truthfulqa_judge_heldout returns the others. The hash of a question decides, so that it is on the
  same side in every file. The mapping is made for data.template='plain'."""
  return [] if _heldout(raw['prompt']) else [dict(prompt=raw['prompt'], response=raw['completion'])]


def truthfulqa_judge_heldout(raw: dict) -> Records:
  """Returns the tenth of the questions that no judge is trained on, on which
  evals/safety/truthfulness.py measures the agreement."""
  return [dict(prompt=raw['prompt'], response=raw['completion'])] if _heldout(raw['prompt']) else []


def _heldout(prompt: str) -> bool:
  question = prompt.partition('\nA: ')[0].strip().lower()
  return hashlib.sha256(question.encode()).digest()[0] < 26  # of 256


# prompts


def fastchat_questions(raw: dict) -> Records:
  """Maps lm-sys/FastChat's question files (MT-bench, Vicuna bench): {"turns": [...], "category"}.
  The prompt is the first turn."""
  return [dict(prompt=raw['turns'][0], use_case=raw['category'])]


def comparisons_prompts(raw: dict) -> Records:
  """Returns the prompts of our own records that have one, such as demonstrations and
  comparisons."""
  return [{k: v for k, v in raw.items() if k in ('prompt', 'user_id', 'use_case')}]
