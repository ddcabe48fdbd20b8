"""The loss of held-out text, which is what the alignment tax costs a language model as such."""

from __future__ import annotations

import pathlib

import numpy as np

from alignjax.data import sources
from alignjax.evals import items
from alignjax.evals.table import Cell
from alignjax.inference import bulk
from alignjax.inference.loading import Model
from alignjax.runtime import metrics


def text_loss(
  model: Model,
  *,
  data: str | None,
  limit: int | None,
  seed: int,
  keep: pathlib.Path,
  window: int = 128,
) -> list[Cell]:
  """Loss of held-out text in nats per token. Hub Salesforce/wikitext, wikitext-103-raw-v1, its test
  split; a text file (.txt), which is one document, or JSONL of {"text"}; both also as .gz.

  Every document begins as the model's template begins one and is cut into rows of `window`
  predicted tokens, which do not see each other. The loss is the sum over all rows by the number of
  their tokens. Losses compare models of one tokenizer alone.

  Args:
    limit: the number of rows, drawn by the seed.
    window: the tokens of a row that are predicted; at most the model's context less one.
  """
  del keep
  if not 1 <= window < model.cfg.max_length:
    raise ValueError(
      f'--options: text_loss.window={window} must be from 1 to {model.cfg.max_length - 1}, the '
      'context of the model less one.'
    )
  source = 'hf:Salesforce/wikitext/wikitext-103-raw-v1:test'
  if data:
    source = f'{"text" if ".txt" in pathlib.Path(data).suffixes else "jsonl"}:{data}'
  rows: list[list[int]] = []
  documents: list[str] = []
  for number, record in enumerate(sources.read(source, 'pretrain'), 1):
    tokens = model.template.document(record['text'])
    for start in range(0, len(tokens) - 1, window):
      rows.append(tokens[start : start + window + 1])
      documents.append(f'document {number}')
  chosen = items.draw(len(rows), min(len(rows), limit or len(rows)), seed)
  lengths = np.array([len(rows[i]) for i in chosen])
  tokens = np.full((len(chosen), window + 1), model.template.pad, np.int32)
  for row, i in zip(tokens, chosen, strict=True):
    row[: len(rows[i])] = rows[i]
  mask = np.arange(window + 1) < lengths[:, None]
  weights = np.where(mask, 1.0, 0.0).astype(np.float32)
  weights[:, 0] = 0.0
  likelihood = bulk.make_likelihood(model.nets, model.sharder, rows=16)
  done = 0
  with metrics.Progress(len(chosen), name='text') as progress:

    def count(i, value):
      nonlocal done
      done += 1
      progress.update(done, {'rows/done': done})

    logprobs, _ = likelihood(model.params, tokens, mask, weights, count)
  return [
    Cell(
      'loss per token (nats)',
      '',
      [[-float(p), int(n) - 1] for p, n in zip(logprobs, lengths, strict=True)],
      [f'row {i}' for i in chosen],
      [documents[i] for i in chosen],
      better='lower',
      aggregate='alignjax.evals.public.text:per_token',
    )
  ]


def per_token(values: list[list[float]]) -> float:
  """Returns the sum of totals over the sum of counts, of [[total, count]]."""
  totals, counts = np.sum(values, axis=0)
  return float(totals / counts)
