"""The functions that the files in task_files/ call: they map records to questions and outputs to
scores, and choose few-shot examples.

The harness loads this module through its `!function` tags, and the module imports the harness.
Every document has an `item`, which is its name, and a `cluster`. Documents of one cluster (the
questions of a passage) are not independent (evals/stats.py) and are never few-shot examples for
each other.
"""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
from lm_eval.api.samplers import ContextSampler
from lm_eval.tasks.drop.utils import get_answers, get_metrics
from lm_eval.tasks.hellaswag.utils import preprocess
from lm_eval.tasks.qasper.metrics import f1_abstractive, normalize_answer

Rows = Iterable[Mapping[str, Any]]
# The phrase that the instructions of each task name for "no answer".
NO_ANSWER = {'squadv2': 'Not in background.', 'quac': "I don't know."}
AGREEMENT = 0.4  # QuAC's scorer leaves out questions whose references agree less than this.


class OtherClusters(ContextSampler):
  """Draws few-shot examples at random for each question. If questions and examples come from the
  same split, no example is from the question's own cluster. The harness says so by `eval_doc`, the
  question: it is None where the examples have a split of their own, whose clusters are others."""

  def sample(self, n, eval_doc=None, df=None, **kwargs):
    docs = self.df
    own = None if eval_doc is None else eval_doc['cluster']
    if not hasattr(self, 'sizes'):
      self.sizes = collections.Counter(doc['cluster'] for doc in docs)
    if len(docs) - self.sizes[own] < n:
      raise ValueError(
        f'{n} few-shot examples are asked for, but there are {len(docs) - self.sizes[own]} '
        f'besides the passage of '
        'the question; give more data, a folder with train.jsonl and validation.jsonl, or '
        'shots=zero-shot.'
      )
    picked: dict[int, Any] = {}
    while len(picked) < n:
      i = self.rnd.randrange(len(docs))
      if docs[i]['cluster'] != own:
        picked.setdefault(i, docs[i])
    return list(picked.values())


def _documents(docs: Iterable[dict[str, Any]]) -> datasets.Dataset:
  return datasets.Dataset.from_list(
    [{'item': str(i), 'cluster': str(i), **doc} for i, doc in enumerate(docs)]
  )


def hellaswag(rows: Rows) -> datasets.Dataset:
  """Cleans WikiHow's brackets as the harness does. The second part of the context begins with a
  capital letter, as in the paper."""
  return _documents(
    dict(
      query=preprocess(f'{r["activity_label"]}: {r["ctx_a"]} {r["ctx_b"].capitalize()}'),
      choices=[preprocess(e) for e in r['endings']],
      gold=int(r['label']),
    )
    for r in rows
  )


def rte(rows: Rows) -> datasets.Dataset:
  return _documents(
    dict(
      premise=r['premise'].strip(),
      hypothesis=r['hypothesis'].strip().removesuffix('.'),
      gold=int(r['label']),
    )
    for r in rows
  )


def sst(rows: Rows) -> datasets.Dataset:
  return _documents(dict(sentence=r['sentence'].strip(), gold=int(r['label'])) for r in rows)


def drop(rows: Rows) -> datasets.Dataset:
  """Makes the documents of DROP. Each of the `answers` is a list of spans, and the questions of a
  passage are one cluster."""
  docs = []
  for r in rows:
    answers = [list(answer) for answer in get_answers(r)]
    docs.append(
      dict(
        passage=r['passage'].strip(),
        question=r['question'].strip(),
        answers=answers,
        target=', '.join(answers[0]),
        cluster=r['passage'][:200],
      )
    )
  return _documents(docs)


def drop_shots(rows: Rows) -> datasets.Dataset:
  """Returns one question of each passage."""
  return _documents({doc['passage']: doc for doc in reversed(list(drop(rows)))}.values())


def squadv2(rows: Rows) -> datasets.Dataset:
  """Makes the documents of SQuAD 2.0. `previous` holds the earlier questions of the paragraph with
  their first answers, as in the prompts that the authors released. An article is a cluster."""
  return _conversations(
    (
      (r['title'], r['context']),
      r['title'],
      r['title'],
      r['context'],
      r['question'],
      [t for t in dict.fromkeys(r['answers']['text']) if normalize_answer(t)]
      or [NO_ANSWER['squadv2']],
    )
    for r in rows
  )


def quac(rows: Rows) -> datasets.Dataset:
  """Makes the documents of QuAC, with the earlier turns of the dialogue. The marker CANNOTANSWER
  becomes "I don't know.". A page is a cluster."""

  def target(answer):
    return NO_ANSWER['quac'] if answer == 'CANNOTANSWER' else answer.strip()

  def turns():
    for number, r in enumerate(rows):
      for question, texts in zip(r['questions'], r['answers']['texts'], strict=True):
        yield (
          number,
          r['wikipedia_page_title'],
          f'{r["wikipedia_page_title"]} - {r["section_title"]}',
          r['context'].removesuffix('CANNOTANSWER').strip(),
          question,
          list(map(target, texts)),
        )

  return _conversations(turns())


def _conversations(turns: Iterable[tuple]) -> datasets.Dataset:
  """Makes documents of (group, cluster, title, context, question, targets), each with the earlier
  turns of its group."""
  docs, before, last = [], [], None
  for group, cluster, title, context, question, targets in turns:
    if group != last:
      before, last = [], group
    docs.append(
      dict(
        cluster=cluster,
        title=title,
        context=context,
        question=question.strip(),
        targets=targets,
        target=targets[0],
        previous=list(before),
      )
    )
    before.append(dict(q=question.strip(), a=targets[0]))
  return _documents(docs)


def _whole_passages(docs: datasets.Dataset) -> datasets.Dataset:
  """Returns the last question of each passage, which has all the others before it."""
  first = [not previous for previous in docs['previous']]
  return docs.select([i for i, begins in enumerate([*first[1:], True]) if begins])


def squadv2_shots(rows: Rows) -> datasets.Dataset:
  return _whole_passages(squadv2(rows))


def quac_shots(rows: Rows) -> datasets.Dataset:
  return _whole_passages(quac(rows))


def wsc(rows: Rows) -> datasets.Dataset:
  """Makes the documents of WSC, in whose `passage` double asterisks surround the pronoun."""
  docs = []
  for i, r in enumerate(rows):
    text, pronoun = r['text'], r['span2_text']
    at = sum(len(word) + 1 for word in text.split(' ')[: r['span2_index']])
    found = [m.start() for m in re.finditer(rf'\b{re.escape(pronoun)}\b', text)]
    if not found:
      raise ValueError(
        f'wsc, record {i}: the pronoun {pronoun!r} is not in the text {text[:60]!r}.'
      )
    start = min(found, key=lambda s: abs(s - at))  # Some indices are off by a word.
    docs.append(
      dict(
        passage=f'{text[:start]}**{pronoun}**{text[start + len(pronoun) :]}',
        pronoun=pronoun,
        target=r['span1_text'],
        label=int(r['label']),
      )
    )
  return _documents(docs)


def wsc_shots(rows: Rows) -> datasets.Dataset:
  """Returns the documents whose noun is what the pronoun refers to, because the answer of an
  example must be correct."""
  docs = wsc(rows)
  return docs.select([i for i, label in enumerate(docs['label']) if label == 1])


def wmt15_fr_en(rows: Rows) -> datasets.Dataset:
  return _documents(
    dict(fr=r['translation']['fr'].strip(), target=r['translation']['en'].strip()) for r in rows
  )


def _one_line(text: str) -> str:
  """Joins the lines of a text. Sampling stops at a newline, so the answer of an example has
  none."""
  return ' '.join(text.split())


def cnn_dm(rows: Rows) -> datasets.Dataset:
  return _documents(
    dict(text=r['article'].strip(), target=_one_line(r['highlights'])) for r in rows
  )


def tldr(rows: Rows) -> datasets.Dataset:
  return _documents(dict(text=r['content'].strip(), target=_one_line(r['summary'])) for r in rows)


def _f1(response: str, target: str, no_answer: str) -> float:
  """Returns SQuAD's and QuAC's F1 of words. If either of the two texts is "no answer", F1 is 1 if
  both are and 0 otherwise, because the words of that phrase are not an answer. An empty text is not
  that phrase and scores 0."""
  abstains = [normalize_answer(text) == normalize_answer(no_answer) for text in (response, target)]
  return float(all(abstains)) if any(abstains) else float(f1_abstractive([response], [target]))


def squad_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
  """Returns F1 and exact match of SQuAD 2.0's script for the closest target. The target of a
  question without an answer is the phrase that the instruction names, so that "Not in background."
  scores 1, as in the released samples."""
  response = results[0].strip()
  return {
    'f1': max(_f1(response, t, NO_ANSWER['squadv2']) for t in doc['targets']),
    'exact': float(any(normalize_answer(response) == normalize_answer(t) for t in doc['targets'])),
  }


def quac_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
  """Returns F1 of QuAC's script, and the exact match to any of the references, which that script
  does not compute.

  If at least half of a question's references are "no answer", it is the only reference; otherwise
  the other references are used. With several references, F1 is the mean, over the references, of F1
  to the closest of the rest, because a person's score is measured against the other people in the
  same way. A question on which the people's own score is below .4 is left out (NaN).
  """
  none = NO_ANSWER['quac']
  answers = [t for t in doc['targets'] if t != none]
  refs = answers if 2 * len(answers) > len(doc['targets']) else [none]
  response = results[0].strip()

  def rest(i):
    return refs[:i] + refs[i + 1 :] or refs

  def nearest(text, others):
    return max(_f1(text, t, none) for t in others)

  if (
    len(refs) > 1
    and sum(nearest(ref, rest(i)) for i, ref in enumerate(refs)) / len(refs) < AGREEMENT
  ):
    return {'f1': float('nan'), 'exact': float('nan')}
  return {
    'f1': sum(nearest(response, rest(i)) for i in range(len(refs))) / len(refs),
    'exact': float(any(normalize_answer(response) == normalize_answer(t) for t in refs)),
  }


def drop_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
  """Returns the scores of the harness's port of DROP's script, for the closest answer."""
  scores = [
    get_metrics([results[0].strip()], answer) for answer in doc['answers'] if answer[0].strip()
  ] or [(0.0, 0.0)]
  return {'f1': float(max(f1 for _, f1 in scores)), 'exact': float(max(em for em, _ in scores))}


def wsc_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
  """Returns the accuracy. The pronoun is taken to refer to the noun if the sampled text contains
  the noun or the noun contains the text."""
  response, noun = results[0].strip().strip('."*\'').lower(), doc['target'].lower()
  return {
    'acc': float((bool(response) and (noun in response or response in noun)) == bool(doc['label']))
  }


def bleu_pair(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, list[str]]:
  """Returns (reference, translation), from which BLEU is computed over the corpus."""
  return {'bleu': [doc['target'], results[0].strip()]}


@functools.cache
def _rouge():
  from rouge_score import rouge_scorer

  return rouge_scorer.RougeScorer(['rougeL'])


def rouge_score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
  """Returns the F-measure of ROUGE-L without stemming."""
  return {'rougeL': _rouge().score(doc['target'], results[0].strip())['rougeL'].fmeasure}
