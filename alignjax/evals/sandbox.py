"""The sandbox's evaluation of a policy: the measurements of the paper's tables, with the gold answer known.

`measure` returns arrays, one number an item, and `summarize` turns them into figures with intervals; the win rate needs
the arrays of two policies on the same prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from alignjax import sandbox
from alignjax.data import encode
from alignjax.data.templates import Template
from alignjax.evals import bulk
from alignjax.evals.stats import interval
from alignjax.types import Networks, Params

PREFIX_TOKENS = 24  # room for the prompts of the prompted baseline


class Evaluation(NamedTuple):
  """Compiled functions and the items to measure on: the same for every policy of a report."""
  world: Any
  labelers: Any
  template: Template
  sample: Callable
  likelihood: Callable
  logprobs: Callable
  prompts: list[dict]
  truth: list[dict]
  truth_train: list[dict]
  toxicity: list[dict]
  reading: tuple
  translation: tuple
  documents: dict[str, tuple]


def prepare(nets: Networks, sharder: Any, world: Any, labelers: Any, template: Template, *, prompt_length: int,
            response_length: int, row_length: int, win_prompts: int, tax_items: int, truth_samples: int,
            toxicity_prompts: int, loss_documents: int) -> Evaluation:
  """Items of the test split, encoded, and the functions that measure on them.

  Args:
    win_prompts, toxicity_prompts: prompts. tax_items: items of each tax task. truth_samples: answers to each
      misconceived fact. loss_documents: held-out documents of the mixed corpus.
  """
  room = prompt_length + PREFIX_TOKENS
  sample = bulk.make_sampler(nets, sharder, prompt_length=room, max_tokens=response_length, stop_ids=(template.end,),
                             pad=template.pad)
  likelihood = bulk.make_likelihood(nets, sharder)
  truth = sandbox.truthfulness_prompts(world, 'test') * truth_samples
  truth_train = sandbox.truthfulness_prompts(world, 'train') * truth_samples
  tasks = [_items(task(world, tax_items), template, row_length)
           for task in (sandbox.reading_comprehension, sandbox.translation)]
  documents: dict[str, tuple] = {}
  texts = sandbox.documents(world, loss_documents, 'test')
  longest = max(len(d['text'].split()) for d in texts) + 2
  for kind in sandbox.SHARES:
    rows = [sandbox.encode(d['text']) for d in texts if d['kind'] == kind]
    documents[kind] = _rows([([template.end], r + [template.end]) for r in rows], longest, template.pad)
  return Evaluation(world, labelers, template, sample, likelihood,
                    bulk.make_response_logprobs(nets, sharder, length=room + response_length, pad=template.pad),
                    sandbox.prompts(world, win_prompts, 'test'), truth, truth_train,
                    sandbox.toxicity_prompts(world, toxicity_prompts), tasks[0], tasks[1], documents)


def _items(items: list[dict], template: Template, length: int) -> tuple:
  return _rows([([template.end, *sandbox.encode(i['context'])], sandbox.encode(i['answer'])) for i in items], length,
               template.pad)


def _rows(pairs: list[tuple[list[int], list[int]]], length: int, pad: int) -> tuple:
  """(tokens, mask, weights): weight 1 on the second part of each pair."""
  tokens, mask = encode.right_pad([a + b for a, b in pairs], length, pad)
  weights = np.zeros(tokens.shape, np.float32)
  for i, (a, b) in enumerate(pairs):
    weights[i, len(a):len(a) + len(b)] = 1.0
  return tokens, mask, weights


def respond(ev: Evaluation, params: Params, records: list[dict], seed: int, prefix: str = '') -> tuple[list, list, list]:
  """Sampled responses at temperature 1: (query tokens, response tokens, judgments)."""
  queries = [ev.template.prompt(f"{prefix} {r['prompt']}".lstrip()) for r in records]
  responses, _ = ev.sample(params, queries, seed)
  judged = []
  for record, tokens in zip(records, responses, strict=True):
    ended = tokens[-1] == ev.template.end
    text = sandbox.decode(tokens[:-1] if ended else tokens)
    judged.append(sandbox.judge(ev.world, record['meta'], text, ended))
  return queries, responses, judged


def measure(ev: Evaluation, params: Params, ref: Params | None, prefix: str = '', seed: int = 1) -> dict[str, np.ndarray]:
  """All measurements of one policy, as arrays.

  ref: the reference, for the KL of the sampled responses; None leaves it out. prefix: text put before every prompt; then
  the tax tasks and losses, which have no prompt, are left out.
  """
  queries, responses, judged = respond(ev, params, ev.prompts, seed, prefix)
  features = ev.labelers.features(judged)
  _, _, truth = respond(ev, params, ev.truth, seed + 1, prefix)
  _, _, truth_train = respond(ev, params, ev.truth_train, seed + 2, prefix)
  _, _, toxic = respond(ev, params, ev.toxicity, seed + 3, prefix)
  out = {
      'features': features,
      'follow': np.array([j.follow for j in judged]),
      'words': np.array([j.words for j in judged], float),
      'toxic': np.array([j.toxic for j in judged], float),
      'toxic_rude_context': np.array([j.toxic for j in toxic], float),
      'truthful': np.array([j.truthful for j in truth], float),
      'truthful_train_entities': np.array([j.truthful for j in truth_train], float),
  }
  if ref is not None:
    out['kl'] = ev.logprobs(params, queries, responses) - ev.logprobs(ref, queries, responses)
  if not prefix:
    out['reading_comprehension'] = ev.likelihood(params, *ev.reading)[1].astype(float)
    out['translation'] = ev.likelihood(params, *ev.translation)[1].astype(float)
    for kind, rows in ev.documents.items():
      out[f'nll_{kind}'] = -ev.likelihood(params, *rows)[0]
      out[f'tokens_{kind}'] = rows[2].sum(-1)
  return out


def best_prefix(ev: Evaluation, params: Params, prompts: list[dict], seed: int = 7) -> tuple[str, dict[str, float]]:
  """The prefix that the training labelers like best on `prompts` (validation), as the paper chose its prompts by the RM;
  and the gold score of each."""
  scores = {}
  for prefix in sandbox.baseline_prefixes(ev.world):
    _, _, judged = respond(ev, params, prompts, seed, prefix)
    scores[prefix] = float(ev.labelers.gold(ev.labelers.features(judged), ev.labelers.train).mean())
  return max(scores, key=scores.get), scores


def summarize(ev: Evaluation, policy: dict[str, np.ndarray], baseline: dict[str, np.ndarray]) -> dict[str, dict]:
  """Figures {'mean', 'ci95', 'n'} of one policy's arrays; win rates against `baseline` (SFT).

  Units: win rates, truthful, toxic, tasks: share of items; truthful resampled by fact. gold: mean utility; kl: nats a
  response; pretraining_loss: nats a token, resampled by document.
  """
  out = {}
  for name, ids in (('train', ev.labelers.train), ('heldout', ev.labelers.heldout)):
    out[f'win_rate_{name}_labelers'] = interval(
        ev.labelers.preference(policy['features'], baseline['features'], ids).mean(-1))
    out[f'gold_{name}_labelers'] = interval(ev.labelers.gold(policy['features'], ids))
  fact = lambda records: [f'{r["meta"]["entity"]}/{r["meta"]["attribute"]}' for r in records]
  out['truthful'] = interval(policy['truthful'], fact(ev.truth))
  out['truthful_train_entities'] = interval(policy['truthful_train_entities'], fact(ev.truth_train))
  for name in ('toxic', 'toxic_rude_context', 'follow', 'words', 'reading_comprehension', 'translation', 'kl'):
    if name in policy:
      out[name] = interval(policy[name])
  kinds = [k.removeprefix('nll_') for k in policy if k.startswith('nll_')]
  if kinds:
    for kind in kinds:
      out[f'pretraining_loss_{kind}'] = ratio(policy[f'nll_{kind}'], policy[f'tokens_{kind}'])
    out['pretraining_loss'] = ratio(np.concatenate([policy[f'nll_{k}'] for k in kinds]),
                                    np.concatenate([policy[f'tokens_{k}'] for k in kinds]))
  return out


def ratio(total: np.ndarray, count: np.ndarray, resamples: int = 2000) -> dict[str, Any]:
  """sum(total) / sum(count) with an interval by resampling items: a loss a token over whole documents."""
  if len(total) == 0:
    return {'mean': None, 'ci95': [None, None], 'n': 0}
  draws = np.random.default_rng(0).multinomial(len(total), np.full(len(total), 1 / len(total)), size=resamples)
  low, high = np.percentile((draws @ total) / (draws @ count), [2.5, 97.5])
  return {'mean': float(total.sum() / count.sum()), 'ci95': [float(low), float(high)], 'n': int(count.sum())}
