"""The public NLP tasks of the paper's Table 14, run by lm-evaluation-harness on the task files of
task_files/ (App. D, Figures 18-27).

Each has two variants, 'zero-shot' and 'few-shot' with the paper's number of examples. Answers are
greedy and cut at the first newline. A multiple choice is the option with the highest log-likelihood
per token (the paper's "lowest" is a slip). Prompts are plain text, whatever the model's template
is, as in the paper.

Where the paper leaves a choice, we make it as follows. Few-shot examples are drawn anew for each
question, by the seed: from the training split (on the hub, from records that the seed draws over
the whole split) or, if the data are one file, from the rest of it, but never from the question's
own passage. Prompts that exceed the context lose their left part, as in the harness, and their
number is printed.

The data are a local file, named by --data=TASK=FILE (JSONL with the hub's fields, .gz or not, or a
folder with train.jsonl and validation.jsonl), or the hub's. The head of task_files/TASK.yaml
describes the fields. `lm_eval --include_path alignjax/evals/public/task_files` runs the same files.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from alignjax.evals.public import harness, harness_tasks, loaders
from alignjax.evals.table import Cell
from alignjax.inference.loading import Model

TASKS = pathlib.Path(__file__).parent / 'task_files'
LABEL = (int, str)
QA_TARGETS = {
  f'{name}.{part}': list
  for name in ('mc1_targets', 'mc2_targets')
  for part in ('choices', 'labels')
}


class Score(NamedTuple):
  """A metric that is computed from the logged samples of a task.

  Attributes:
    metric: the name of the metric in the table.
    value: a function of (LM object, logged sample) that returns the value to average.
    aggregate: the `aggregate` of a Cell.
    bounds: the `bounds` of a Cell.
  """

  metric: str
  value: Callable[[Any, Mapping[str, Any]], Any]
  aggregate: str | None = None
  bounds: tuple[float, float] | None = None


def per_token(lm: Any, sample: Mapping[str, Any]) -> float:
  """Returns 1 if the correct choice has the highest log-likelihood per token, else 0."""
  means = []
  for (context, continuation), (logprob, _) in zip(
    sample['arguments'], sample['filtered_resps'], strict=True
  ):
    # The tokens at the border do not depend on the text further to the left.
    tail = context[-200:]
    means.append(logprob / len(lm._encode_pair(tail, continuation)[1]))
  return float(np.argmax(means) == sample['target'])


def logged(name: str, scale: float = 1.0) -> Callable[[Any, Mapping[str, Any]], Any]:
  """Returns a function that reads the value that the task file computed, which is None if the task
  file left the document out (NaN)."""
  return lambda lm, sample: None if math.isnan(sample[name]) else scale * float(sample[name])


def bleu(pairs: list[tuple[str, str]]) -> float:
  """Returns the corpus BLEU of (reference, translation) pairs, from 0 to 100."""
  import sacrebleu

  return sacrebleu.corpus_bleu([p for _, p in pairs], [[r for r, _ in pairs]]).score


ACCURACY = (Score('accuracy', per_token),)
TRUTHFULQA = {
  'truthfulqa_mc1': (Score('MC1', logged('acc')),),
  'truthfulqa_mc2': (Score('MC2', logged('acc'), bounds=(0, 1)),),
}
ROUGE = (Score('ROUGE-L', logged('rougeL'), bounds=(0, 1)),)
F1 = (
  Score('F1', logged('f1', 100), bounds=(0, 100)),
  Score('exact match', logged('exact', 100), bounds=(0, 100)),
)


def hellaswag(model, *, data, limit, seed, keep, shots=None):
  """HellaSwag: which of four endings. Hub Rowan/hellaswag, or JSONL {activity_label, ctx_a, ctx_b,
  endings, label}."""
  fields = dict(activity_label=str, ctx_a=str, ctx_b=str, endings=list, label=LABEL)
  return measure(model, 'hellaswag', fields, ACCURACY, 15, data, limit, seed, keep, shots)


def rte(model, *, data, limit, seed, keep, shots=None):
  """RTE: does the passage entail the sentence. Hub aps/super_glue, or JSONL {premise, hypothesis,
  label: 0 = it does}."""
  fields = dict(premise=str, hypothesis=str, label=LABEL)
  return measure(model, 'rte', fields, ACCURACY, 15, data, limit, seed, keep, shots)


def sst(model, *, data, limit, seed, keep, shots=None):
  """SST-2: sentiment of a snippet. Hub nyu-mll/glue, or JSONL {sentence, label: 1 = positive}."""
  return measure(
    model, 'sst', dict(sentence=str, label=LABEL), ACCURACY, 15, data, limit, seed, keep, shots
  )


def wsc(model, *, data, limit, seed, keep, shots=None):
  """WSC: whom a pronoun means, sampled. Hub aps/super_glue, or JSONL {text, span1_text, span2_text,
  span2_index, label}."""
  fields = dict(text=str, span1_text=str, span2_text=str, span2_index=int, label=LABEL)
  return measure(
    model, 'wsc', fields, (Score('accuracy', logged('acc')),), 15, data, limit, seed, keep, shots
  )


def drop(model, *, data, limit, seed, keep, shots=None):
  """DROP: F1 of answers that need reasoning. Hub EleutherAI/drop, or JSONL {passage, question,
  answer, validated_answers}."""
  fields = {'passage': str, 'question': str}
  for part, many in (('answer', False), ('validated_answers', True)):
    fields |= {
      f'{part}.number': list if many else str,
      f'{part}.date': (list, dict) if many else dict,
      f'{part}.spans': list,
    }
  return measure(model, 'drop', fields, F1, 4, data, limit, seed, keep, shots)


def quac(model, *, data, limit, seed, keep, shots=None):
  """QuAC: F1 of answers in a dialogue. Hub allenai/quac, or JSONL with its fields
  (task_files/quac.yaml)."""
  fields = {
    'wikipedia_page_title': str,
    'section_title': str,
    'context': str,
    'questions': list,
    'answers.texts': list,
  }
  return measure(model, 'quac', fields, F1, 2, data, limit, seed, keep, shots)


def squadv2(model, *, data, limit, seed, keep, shots=None):
  """SQuAD 2.0: F1 of answers. Hub rajpurkar/squad_v2, SQuAD's own JSON, or JSONL {title, context,
  question, answers}."""
  fields = {'title': str, 'context': str, 'question': str, 'answers.text': list}
  return measure(model, 'squadv2', fields, F1, 4, data, limit, seed, keep, shots)


def wmt15_fr_en(model, *, data, limit, seed, keep, shots=None):
  """WMT15 French to English: corpus BLEU. Hub wmt/wmt15, or JSONL {translation: {fr, en}}."""
  fields = {'translation.fr': str, 'translation.en': str}
  scores = (
    Score('BLEU', lambda lm, sample: list(sample['bleu']), 'alignjax.evals.public.nlp:bleu'),
  )
  return measure(model, 'wmt15_fr_en', fields, scores, 15, data, limit, seed, keep, shots)


def cnn_dm(model, *, data, limit, seed, keep, shots='zero-shot'):
  """CNN/DM: ROUGE-L of one-line summaries. Hub abisee/cnn_dailymail, or JSONL {article,
  highlights}. Few-shot only if asked for."""
  return measure(
    model, 'cnn_dm', dict(article=str, highlights=str), ROUGE, 15, data, limit, seed, keep, shots
  )


def tldr(model, *, data, limit, seed, keep, shots='zero-shot'):
  """Reddit TL;DR: ROUGE-L of one-line summaries. Hub webis/tldr-17, or JSONL {content, summary}.
  Few-shot only if asked for."""
  return measure(
    model, 'tldr', dict(content=str, summary=str), ROUGE, 15, data, limit, seed, keep, shots
  )


def truthfulqa_mc(model, *, data, limit, seed, keep):
  """TruthfulQA MC1, MC2, the harness's own tasks. Hub truthfulqa/truthful_qa, the authors'
  mc_task.json, or JSONL of the same."""
  lm = harness.language_model(model, keep=keep / 'answers.jsonl')
  return evaluate(
    lm,
    list(TRUTHFULQA),
    {'question': str, **QA_TARGETS},
    TRUTHFULQA,
    'QA prompt',
    None,
    data,
    limit,
    seed,
    keep,
  )


def measure(
  model: Model,
  name: str,
  fields: Mapping[str, Any],
  scores: tuple[Score, ...],
  few: int,
  data: str | None,
  limit: int | None,
  seed: int,
  keep: pathlib.Path,
  shots: str | int | None,
) -> list[Cell]:
  """Returns the cells of one task file over its variants. `shots` is 'zero-shot', 'few-shot' (the
  paper's number), a number, or None for both variants."""
  variants = {
    None: {'zero-shot': 0, 'few-shot': few},
    'zero-shot': {'zero-shot': 0},
    'few-shot': {'few-shot': few},
  }
  if isinstance(shots, int) and not isinstance(shots, bool) and shots >= 0:
    variants[shots] = {f'{shots}-shot': shots}
  if shots not in variants:
    raise ValueError(
      f"--options={name}.shots={shots}: it must be zero-shot, few-shot (the paper's {few}) or a "
      f'number of examples.'
    )
  lm = harness.language_model(model, keep=keep / 'answers.jsonl')
  return [
    cell
    for prompt, count in variants[shots].items()
    for cell in evaluate(lm, [name], fields, {name: scores}, prompt, count, data, limit, seed, keep)
  ]


def evaluate(
  lm: Any,
  names: list[str],
  fields: Mapping[str, Any],
  scores: Mapping[str, tuple[Score, ...]],
  prompt: str,
  shots: int | None,
  data: str | None,
  limit: int | None,
  seed: int,
  keep: pathlib.Path | None,
) -> list[Cell]:
  """Returns the cells of the tasks `names`, which must have the same documents, by an LM object of
  the harness: ours, or its `hf` for a comparison.

  Args:
    lm: the LM object.
    names: the names of task_files/NAME.yaml, or of the harness's own tasks where we have no file of
      that name.
    fields: the fields of a record (loaders.local).
    scores: {name: the scores to compute}.
    prompt: the `prompt` of the cells.
    shots: the number of few-shot examples. None means the number in the task file.
    data: a local file or folder, or None to read the hub.
    limit: the largest number of documents. The seed draws them from the whole set, and they are the
      same for every model and variant.
    seed: the seed by which documents and examples are drawn.
    keep: a folder for samples-TASK-PROMPT.jsonl, which holds document, prompt and answer of each
      sample for people to read.
  """
  harness_tasks.require()
  tasks = _tasks(names, fields, data, shots, seed)
  samples = harness_tasks.run(lm, tasks, f'{names[0]} {prompt}', limit, seed)
  cells = []
  for name, task in zip(names, tasks, strict=True):
    found = sorted(samples[task.task_name], key=lambda s: s['doc_id'])
    if keep is not None:
      harness_tasks.write_samples(keep, f'{name}-{prompt}', found)
    items = [s['doc'].get('item', str(s['doc_id'])) for s in found]
    clusters = [s['doc'].get('cluster', item) for s, item in zip(found, items, strict=True)]
    for metric, value, aggregate, bounds in scores[name]:
      cells.append(
        Cell(
          metric,
          prompt,
          [value(lm, s) for s in found],
          items,
          clusters if len(set(clusters)) < len(items) else None,
          aggregate=aggregate,
          bounds=bounds,
        )
      )
  return cells


def _tasks(
  names: list[str], fields: Mapping[str, Any], data: str | None, shots: int | None, seed: int
) -> list[Any]:
  """Returns the harness's Task objects on data that were read and checked here."""
  import datasets
  import lm_eval.tasks
  from lm_eval.api.task import ConfigurableTask
  from lm_eval.tasks._yaml_loader import load_yaml

  configs = [
    load_yaml(
      path
      if (path := TASKS / f'{name}.yaml').exists()
      else next(pathlib.Path(lm_eval.tasks.__file__).parent.glob(f'*/{name}.yaml'))
    )
    for name in names
  ]
  task = names[0].replace('_mc1', '_mc')
  records = (
    loaders.local(task, data, fields)
    if data
    else loaders.of_hub(task, configs[0], fields, bool(shots), seed)
  )
  if 'process_docs' not in configs[0]:
    records = {split: datasets.Dataset.from_list(rows) for split, rows in records.items()}
  changes = dict(
    custom_dataset=lambda **_: records,
    validation_split=None,
    test_split='validation',
    training_split=None,
  )
  if shots is not None:
    changes |= dict(
      num_fewshot=shots, fewshot_split='train' if 'train' in records else 'validation'
    )
  tasks = []
  for config in configs:
    config.pop('tag', None)
    tasks.append(ConfigurableTask(config={**config, **changes}))
    tasks[-1].set_fewshot_seed(seed)
  return tasks
