"""What the sequence classifiers of transformers need of a reward model: a place for the bias of its
score, and a pad token that no response ends in."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from alignjax.types import Params

BIAS = ('drop', 'keep')
ENTRY = 'alignjax_score_bias'  # of config.json, or of adapter_config.json


def ids(value: Any) -> set[int]:
  """The ids of an entry of config.json that has one, several or none."""
  return {i for i in (value if isinstance(value, list) else [value]) if i is not None}


def fold_bias(params: Params) -> Params | None:
  """The parameters with the bias of the score in that of the last norm, or None where there is
  nothing to fold or the norm has no bias: w.(norm + b) + c = w.(norm + b + c w / |w|^2)."""
  norm, score = params['final']['norm'], params['final']['score']
  bias = float(np.asarray(score['bias'])[0])
  w = np.asarray(score['kernel'])[:, 0].astype(np.float64)
  if not bias or 'bias' not in norm or not np.dot(w, w):
    return None
  norm_bias = np.asarray(norm['bias']) + bias * w / np.dot(w, w)
  norm = {**norm, 'bias': norm_bias.astype(np.float32)}
  return {**params, 'final': {'norm': norm, 'score': score}}


def leave_bias(
  score: Params, config: dict[str, Any], choice: str | None, name: str, file: str
) -> str:
  """Leaves the bias of a score out of a model whose class has no place for it.

  Args:
    score: the head, with its bias.
    config: the entries of `file`; with the choice 'keep' the bias becomes one of them.
    choice: 'drop', 'keep' or None.
    name: the class in transformers.
    file: 'config.json' or 'adapter_config.json'.

  Returns:
    What became of it, in words.

  Raises:
    ValueError: there is a bias and no choice.
  """
  bias = float(np.asarray(score['bias'])[0])
  if not bias:
    return 'none'
  if choice not in BIAS:
    raise ValueError(
      f"the reward model has the bias {bias:.6g}, for which transformers' {name} has no place. "
      '--bias=drop leaves it out, which shifts all scores alike, so that differences and rankings '
      f'stay; --bias=keep writes it to {file} as {ENTRY}, to be added to every logit (alignjax '
      'does so when it loads it).'
    )
  if choice == 'drop':
    return f'{bias:.6g}, left out: add it to a score for that of alignjax'
  config[ENTRY] = bias
  return f'{bias:.6g}, in {file} as {ENTRY}: add it to the logit'


def pad_apart(config: dict[str, Any], tokenizer: Any) -> tuple[Any, str]:
  """Chooses a pad token that no response ends in, because the classifier of transformers scores a
  row at its last token that is not pad_token_id.

  The choices are, in this order: the tokenizer's own; a special token that is reserved or made for
  it; a new token where the model has embeddings to spare; the beginning of text; a new token, for
  which vocab_size grows (with_vocabulary). The tokenizer then pads on the right, where absolute
  positions do not move.

  Returns:
    (tokenizer, the choice in words). `config` is changed.
  """
  ends, vocab = ids(config.get('eos_token_id')), config['vocab_size']
  if tokenizer is None:
    config['pad_token_id'] = (
      None if config.get('pad_token_id') in ends else config.get('pad_token_id')
    )
    return (
      None,
      'of config.json' if config['pad_token_id'] is not None else 'none: one row at a time',
    )
  tokenizer = copy.deepcopy(tokenizer)
  tokenizer.padding_side = 'right'
  ends |= ids(tokenizer.eos_token_id)
  special = {
    i: str(t)
    for i, t in tokenizer.added_tokens_decoder.items()
    if t.special and i not in ends and i < vocab
  }

  def named(*words):
    return [i for i, t in special.items() if any(word in t.lower() for word in words)]

  own = {i for i in ids(tokenizer.pad_token_id) - ends if i < vocab}
  free = [*own, *named('pad'), *named('reserved', 'unused')]
  if not free and len(tokenizer) >= vocab and tokenizer.bos_token_id in special:
    free = [tokenizer.bos_token_id]
  if free:
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(free[0])
    why = '' if own else ', because the tokenizer has none, or one that ends responses'
    words = f'{tokenizer.pad_token} (id {free[0]}){why}'
  else:
    tokenizer.add_special_tokens({'pad_token': '<|alignjax_pad|>'})
    more = max(0, tokenizer.pad_token_id + 1 - vocab)
    rows = f', with {more} more rows of embeddings' if more else ''
    words = f'{tokenizer.pad_token} (id {tokenizer.pad_token_id}), a new token{rows}'
    config['vocab_size'] = vocab + more
  config['pad_token_id'] = tokenizer.pad_token_id
  return tokenizer, words


def with_vocabulary(params: Params, size: int) -> Params:
  """The parameters with a table of `size` embeddings: rows of zeros come after those of the model,
  on the host. Where nothing is missing, the parameters are returned as they are."""
  table = params['embed']['tokens']
  if len(table) == size:
    return params
  tokens = np.zeros((size, *table.shape[1:]), table.dtype)
  tokens[: len(table)] = table
  return {**params, 'embed': {**params['embed'], 'tokens': tokens}}
