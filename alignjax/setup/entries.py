"""The entries of the config that every stage and the report rely on: what each may be, checked
before anything runs."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections

from alignjax.runtime import checkpoint
from alignjax.setup.objects import Setup


def whole(least: int, none: bool = False) -> Callable[[Any], bool]:
  """A test for whole numbers from `least` on, and for None where `none`."""

  def is_good(x):
    if x is None:
      return none
    return isinstance(x, int) and not isinstance(x, bool) and x >= least

  return is_good


def _number(good: Callable[[float], bool], none: bool = False) -> Callable[[Any], bool]:
  """A test for numbers that are `good`, and for None where `none`."""

  def is_good(x):
    if x is None:
      return none
    return isinstance(x, (int, float)) and not isinstance(x, bool) and good(x)

  return is_good


Kind = tuple[str, Callable[[Any], bool]]  # what an entry may be, in words and as a test
ONE = 'a whole number, 1 or more', whole(1)
COUNT = 'a whole number, 0 or more, or None', whole(0, none=True)
DICT = 'a dict', lambda x: isinstance(x, (Mapping, ml_collections.ConfigDict))
BIASES = {'agreement', 'refusal', 'miss', 'share'}  # of sandbox.Labelers
_PART = 'a number from 0 to 1', _number(lambda x: 0 <= x <= 1)
SHARED: dict[str, Kind] = {
  **dict.fromkeys(
    (
      'data',
      'mesh',
      'model',
      'sharding',
      'report',
      'stages',
      'world',
      'data.mapping',
      'data.heldout',
    ),
    DICT,
  ),
  **dict.fromkeys(
    (
      'data.prompt_length',
      'data.response_length',
      'data.row_length',
      'mesh.fsdp',
      'mesh.sequence',
      'mesh.tensor',
      'max_bad_updates',
      'model.num_layers',
      'model.d_model',
      'model.num_heads',
      'model.max_length',
    ),
    ONE,
  ),
  'mesh.data': (
    'a whole number, 1 or more, or None (the rest of the devices)',
    whole(1, none=True),
  ),
  'cpu_devices': ('a whole number, 1 or more, or None (as jax decides)', whole(1, none=True)),
  'data.tokenizer': ("text, such as 'hf:FOLDER'", lambda x: isinstance(x, str) and bool(x)),
  **dict.fromkeys(
    ('world.beliefs', 'world.harmful', 'world.labelers.miss', 'world.labelers.share'), _PART
  ),
  **dict.fromkeys(
    ('world.labelers.agreement', 'world.labelers.refusal'), ('a number', _number(lambda x: True))
  ),
  'world.labelers': (
    f'a dict of some of {sorted(BIASES)}',
    lambda x: DICT[1](x) and set(x) <= BIASES,
  ),
  'data.heldout.share': ('a number from 0 on, below 1', _number(lambda x: 0 <= x < 1)),
  'grace_seconds': ('a number, 0 or more', _number(lambda x: x >= 0)),
  'stages_to_run': (
    'a tuple of names of stages',
    lambda x: isinstance(x, (tuple, list)) and all(isinstance(n, str) for n in x),
  ),
  'seed': ('a whole number from 0 on, below 2^32', lambda x: whole(0)(x) and x < 2**32),
}
REPORT: dict[str, Kind] = dict.fromkeys(
  ('win_prompts', 'tax_items', 'truth_samples', 'toxicity_prompts', 'loss_documents'), ONE
)
STAGE: dict[str, Kind] = {
  **dict.fromkeys(
    ('init', 'optimizer', 'kl', 'ptx', 'rollout', 'loss', 'reward', 'advantage', 'lora'), DICT
  ),
  **dict.fromkeys(
    (
      'batch_size',
      'microbatches',
      'minibatches',
      'inner_epochs',
      'log_every',
      'rollout.episodes',
      'rollout.samples_per_prompt',
    ),
    ONE,
  ),
  **dict.fromkeys(
    (
      'save_every',
      'keep_candidates',
      'demonstrations',
      'documents',
      'evaluation_prompts',
      'bias_demonstrations',
      'ptx.documents',
      'rollout.generate_rows',
      'rollout.score_rows',
    ),
    COUNT,
  ),
  # In a selection it is a dict, which the stage checks itself.
  'prompts': (COUNT[0], lambda x: DICT[1](x) or COUNT[1](x)),
  'iterations': ('a whole number, 0 or more', whole(0)),
  'ptx.rows_per_episode': ('a whole number, 0 or more', whole(0)),
  'rollout.segments': ('a whole number, 1 or more, or None', whole(1, none=True)),
  'rollout.halvings': ('a whole number, 0 or more', whole(0)),
  'rollout.temperature': ('a number above 0', _number(lambda x: x > 0)),
  'rollout.missing_end_penalty': ('a number', _number(lambda x: True)),
  'label_noise': ('a number from 0 to 1', _number(lambda x: 0 <= x <= 1)),
  'kl.coef': ('a number, 0 or more', _number(lambda x: x >= 0)),
  'kl.target': ('a number above 0, or None', _number(lambda x: x > 0, none=True)),
  'kl.horizon': ('a number above 0, or None', _number(lambda x: x > 0, none=True)),
  'k_buckets': (
    'a tuple of whole numbers',
    lambda x: isinstance(x, (tuple, list)) and all(map(whole(1), x)),
  ),
  'packed_rows': (
    'a tuple of numbers above 0 and below 1, parts of the rows of a batch',
    lambda x: isinstance(x, (tuple, list)) and all(map(_number(lambda y: 0 < y < 1), x)),
  ),
  'ema_decay': ('a number from 0 on, below 1, or None', _number(lambda x: 0 <= x < 1, none=True)),
}


def check(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError for the first entry of the shared part that has a wrong value. Entries that
  the config does not have are left out."""
  _check(config, SHARED, '')
  if config.report.get('policies'):
    _check(config.report, REPORT, 'report.')


def check_stage(config: ml_collections.ConfigDict, name: str) -> None:
  """The same for the entries of a stage. What only its build function reads is checked there, and
  the stages of a fork have entries of their own."""
  _check(config.stages, {name: DICT}, 'stages.')
  if not str(config.stages[name].get('build')).startswith('alignjax.'):
    return
  _check(config.stages[name], STAGE, f'stages.{name}.')
  for entry, spec in (config.stages[name].get('init') or {}).items():
    if spec is None and entry == 'ref':
      continue  # A loss may have no reference.
    if not is_weights(spec):
      raise ValueError(
        f"stages.{name}.init.{entry}={spec!r} must be 'random', 'stage:NAME', "
        "'hf:FOLDER_OR_HUB_NAME', 'peft:FOLDER_OR_HUB_NAME' or the folder of a finished stage's "
        'weights, WORKDIR/STAGE/final.'
      )


def is_weights(spec: Any) -> bool:
  """Whether an entry may name weights (setup/weights.py: initial_params)."""
  return isinstance(spec, str) and (
    spec == 'random' or spec.startswith(('stage:', 'hf:', 'peft:')) or checkpoint.is_finished(spec)
  )


@contextlib.contextmanager
def none_lacking() -> Iterator[None]:
  """Raises ValueError where code inside reads an entry that the config lacks, for example because a
  flag has replaced a dict by a shorter one."""
  try:
    yield
  except AttributeError as error:
    if isinstance(getattr(error, 'obj', None), ml_collections.ConfigDict) or re.fullmatch(
      r"['\"]+\w+['\"]+", str(error)
    ):
      lacking = str(error).strip('\'"')
      raise ValueError(
        f'the config lacks the entry {lacking!r}: a dict that takes the place of another one has '
        f'all of its entries.'
      ) from error
    raise


def _check(node: Any, table: Mapping[str, tuple[str, Callable[[Any], bool]]], where: str) -> None:
  for path, (words, good) in table.items():
    for value in _values(node, path.split('.')):
      if not good(value):
        raise ValueError(f'{where}{path}={value!r} must be {words}.')


def _values(node: Any, keys: list[str]) -> Iterator[Any]:
  """The value at a path, if there is one."""
  for key in keys:
    if not DICT[1](node) or key not in node:
      return
    node = node[key]
  yield node


def check_divides(size: int, parts: int, what: str) -> None:
  """Raises ValueError where `size` does not divide by `parts`. what: names the two."""
  if parts < 1 or size % parts:
    raise ValueError(f'{what}: {size} does not divide by {parts}.')


def check_epochs(epochs: Any, where: str, whole: bool = False) -> None:
  """Raises ValueError where `epochs` is no number of epochs. 0 makes no step, so that the result of
  the stage is what it starts from. whole: whether it must be whole."""
  if (
    isinstance(epochs, bool)
    or not isinstance(epochs, (int, float))
    or not 0 <= epochs < math.inf
    or (whole and epochs % 1)
  ):
    raise ValueError(
      f'{where}.epochs={epochs!r} must be a {"whole " if whole else ""}number, 0 or more.'
    )


def check_counts(setup: Setup, where: str, kind: str, least: int = 1, **counts: Any) -> None:
  """Raises ValueError for entries of a stage that are no numbers of records of data.<kind>. None
  means all of them, which only a source with an end has."""
  endless = setup.config.data[kind] == 'sandbox:'
  none = (
    f"; None, all of them, has no meaning with data.{kind}='sandbox:', which makes as many "
    f'as it is asked for'
  )
  for entry, count in counts.items():
    if not whole(least, none=not endless)(count):
      more = none if endless else ', or None for all'
      raise ValueError(f'{where}.{entry}={count!r} must be a whole number, {least} or more{more}.')
