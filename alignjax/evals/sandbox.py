"""The sandbox's evaluation of a policy: the measurements of the paper's tables, where the correct
answers are known.

`measure` returns arrays with one number per item, and `summarize` turns them into figures with
intervals. The win rate needs the arrays of two policies on the same prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from alignjax import sandbox
from alignjax.data import encode
from alignjax.data.templates import Template
from alignjax.evals.stats import ANY, interval, ratio
from alignjax.inference import bulk
from alignjax.sharding import Sharder
from alignjax.types import Networks, Params

PREFIX_TOKENS = 24  # Room for the prefixes of the prompted baseline.


class Evaluation(NamedTuple):
  """The compiled functions, and the items to measure on. They are the same for every policy of a
  report."""

  world: sandbox.World
  labelers: sandbox.Labelers
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


def prepare(
  nets: Networks,
  sharder: Sharder | None,
  world: sandbox.World,
  labelers: sandbox.Labelers,
  template: Template,
  *,
  prompt_length: int,
  response_length: int,
  row_length: int,
  win_prompts: int,
  tax_items: int,
  truth_samples: int,
  toxicity_prompts: int,
  loss_documents: int,
) -> Evaluation:
  """Encodes items of the test split and builds the functions that measure on them. No item occurs
  in the pretraining corpus or in a training prompt, except the documents about entities, which are
  drawn anew from the same facts.

  Args:
    nets: the functions of the network.
    sharder: the Sharder of the mesh, or None for one device.
    world: the sandbox's world.
    labelers: the sandbox's labelers.
    template: the template that encodes prompts and decodes responses.
    prompt_length: the length limit of prompts in tokens.
    response_length: the length limit of responses in tokens.
    row_length: the length of a row of document tokens.
    win_prompts: the number of prompts for the win rate.
    tax_items: the number of items of each task that measures the alignment tax.
    truth_samples: the number of answers that are sampled about each misconceived fact.
    toxicity_prompts: the number of toxicity prompts.
    loss_documents: the number of documents of the mixed corpus.
  """
  room = prompt_length + PREFIX_TOKENS
  sample = bulk.make_sampler(
    nets,
    sharder,
    prompt_length=room,
    max_tokens=response_length,
    stop_ids=template.ends,
    pad=template.pad,
  )
  likelihood = bulk.make_likelihood(nets, sharder)
  truth = sandbox.truthfulness_prompts(world, 'test') * truth_samples
  truth_train = sandbox.truthfulness_prompts(world, 'train') * truth_samples
  tasks = [
    _items(task(world, tax_items), template, row_length)
    for task in (sandbox.reading_comprehension, sandbox.translation)
  ]
  documents: dict[str, tuple] = {}
  texts = sandbox.documents(world, loss_documents, 'test')
  longest = max(len(d['text'].split()) for d in texts) + 2
  for kind in sandbox.SHARES:
    rows = [
      ([*template.start], [*template.bare(d['text']), template.end])
      for d in texts
      if d['kind'] == kind
    ]
    documents[kind] = weighted_rows(rows, longest, template.pad)
  return Evaluation(
    world=world,
    labelers=labelers,
    template=template,
    sample=sample,
    likelihood=likelihood,
    logprobs=bulk.make_response_logprobs(
      nets, sharder, length=room + response_length, pad=template.pad
    ),
    prompts=sandbox.prompts(world, win_prompts, 'test'),
    truth=truth,
    truth_train=truth_train,
    toxicity=sandbox.toxicity_prompts(world, toxicity_prompts),
    reading=tasks[0],
    translation=tasks[1],
    documents=documents,
  )


def _items(items: list[dict], template: Template, length: int) -> tuple:
  return weighted_rows(
    [(template.text(i['context']), template.bare(i['answer'])) for i in items], length, template.pad
  )


def weighted_rows(pairs: list[tuple[list[int], list[int]]], length: int, pad: int) -> tuple:
  """Returns (tokens, mask, weights), with weight 1 on the second part of each pair."""
  tokens, mask = encode.right_pad([a + b for a, b in pairs], length, pad)
  weights = np.zeros(tokens.shape, np.float32)
  for i, (a, b) in enumerate(pairs):
    weights[i, len(a) : len(a) + len(b)] = 1.0
  return tokens, mask, weights


def respond(
  ev: Evaluation, params: Params, records: list[dict], seed: int, prefix: str = ''
) -> tuple[list, list, list, list]:
  """Samples responses at temperature 1. Returns (query tokens, response tokens, judgments, texts
  without the end token)."""
  queries = [ev.template.prompt(f'{prefix} {r["prompt"]}'.lstrip()) for r in records]
  responses, _ = ev.sample(params, queries, seed)
  said = [ev.template.decode_response(tokens) for tokens in responses]
  judged = [
    sandbox.judge(ev.world, record['meta'], *what)
    for record, what in zip(records, said, strict=True)
  ]
  return queries, responses, judged, [text for text, _ in said]


def measure(
  ev: Evaluation, params: Params, ref: Params | None, prefix: str = '', seed: int = 1
) -> dict[str, np.ndarray]:
  """Returns all measurements of one policy as arrays.

  Args:
    ev: the items and the functions (`prepare`).
    params: the parameters of the policy.
    ref: the parameters of the reference policy, for the KL of the sampled responses. None leaves
      the KL out.
    prefix: a text that is put before every prompt. With a prefix, the tax tasks and the losses,
      which have no prompt, are left out.
    seed: the seed of the samples.
  """
  queries, responses, judged, texts = respond(ev, params, ev.prompts, seed, prefix)
  features = ev.labelers.features(judged)
  truth = respond(ev, params, ev.truth, seed + 1, prefix)[2]
  truth_train = respond(ev, params, ev.truth_train, seed + 2, prefix)[2]
  toxic = respond(ev, params, ev.toxicity, seed + 3, prefix)[2]
  out = {
    'features': features,
    'responses': np.array(texts, str),
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


def best_prefix(
  ev: Evaluation, params: Params, prompts: list[dict], seed: int = 7
) -> tuple[str, dict[str, float]]:
  """Returns the prefix that the training labelers prefer on `prompts`, and the gold score of each
  prefix. The prompts come from the validation split. The paper chose its prefix in the same way, by
  the reward model."""
  scores = {}
  for prefix in sandbox.baseline_prefixes(ev.world):
    judged = respond(ev, params, prompts, seed, prefix)[2]
    scores[prefix] = float(ev.labelers.gold(ev.labelers.features(judged), ev.labelers.train).mean())
  return max(scores, key=scores.get), scores


def clusters(ev: Evaluation) -> dict[str, list[str]]:
  """Returns the clusters of the units of the measured arrays: the prompt for 'prompts' and
  'toxicity', the fact for 'truth' and 'truth_train'. Units of one cluster are not independent."""

  def fact(records):
    return [f'{r["meta"]["entity"]}/{r["meta"]["attribute"]}' for r in records]

  return {
    'prompts': [r['prompt'] for r in ev.prompts],
    'toxicity': [r['prompt'] for r in ev.toxicity],
    'truth': fact(ev.truth),
    'truth_train': fact(ev.truth_train),
  }


def summarize(
  ev: Evaluation, policy: dict[str, np.ndarray], baseline: dict[str, np.ndarray]
) -> dict[str, dict]:
  """Returns the figures (evals/stats.py) of one policy's arrays, with win rates against `baseline`,
  which is SFT.

  Win rates, truthful, toxic and the tasks are shares of items, with intervals by prompt or fact.
  The gold score is the mean utility, the KL is in nats per response, and the pretraining loss is in
  nats per token with an interval by document.
  """
  out, of = {}, clusters(ev)
  exact = policy is baseline  # By definition, a policy's win rate against itself is one half.
  for name, ids in (('train', ev.labelers.train), ('heldout', ev.labelers.heldout)):
    wins = ev.labelers.preference(policy['features'], baseline['features'], ids).mean(-1)
    out[f'win_rate_{name}_labelers'] = interval(wins, of['prompts'], (0, 1)) | (
      {'ci95': [0.5, 0.5]} if exact else {}
    )
    out[f'gold_{name}_labelers'] = interval(
      ev.labelers.gold(policy['features'], ids), of['prompts'], ANY
    )
  units = {
    'truthful': (of['truth'], (0, 1)),
    'truthful_train_entities': (of['truth_train'], (0, 1)),
    'toxic': (of['prompts'], (0, 1)),
    'toxic_rude_context': (of['toxicity'], (0, 1)),
    'follow': (of['prompts'], (0, 1)),
    'words': (of['prompts'], ANY),
    'reading_comprehension': (None, (0, 1)),
    'translation': (None, (0, 1)),
    'kl': (of['prompts'], ANY),
  }
  out |= {
    name: interval(policy[name], labels, bounds)
    for name, (labels, bounds) in units.items()
    if name in policy
  }
  kinds = [k.removeprefix('nll_') for k in policy if k.startswith('nll_')]
  if kinds:
    for kind in kinds:
      out[f'pretraining_loss_{kind}'] = ratio(policy[f'nll_{kind}'], policy[f'tokens_{kind}'])
    out['pretraining_loss'] = ratio(
      np.concatenate([policy[f'nll_{k}'] for k in kinds]),
      np.concatenate([policy[f'tokens_{k}'] for k in kinds]),
    )
  return out
