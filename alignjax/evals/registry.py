"""The registry of evaluation tasks: finds them by name and measures each (model, task, protocol)
once.

A task is a function

    task(model, *, data, limit, seed, keep, **options) -> list[Cell]

of a loading.Model. It is named in TASKS, or as 'module:function' if it belongs to a fork, or it is
a task of the evaluation harness (public/harness_tasks.py). Its arguments are

    model    the loading.Model to evaluate
    data     the file or folder of its data, or None to read the hub
    limit    the largest number of items, or None for all of them
    seed     the seed by which items are drawn
    keep     a folder for results that take long to compute and must survive an interruption, such
             as continuations and judgments; the folder belongs to this model and protocol alone
    options  keyword arguments of the task's own

A task that measures reward models has the attribute head='scalar'.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import inspect
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from alignjax import plugins
from alignjax.evals import earlier
from alignjax.evals.public import harness_tasks
from alignjax.evals.table import Cell
from alignjax.inference.loading import Model
from alignjax.models import hub
from alignjax.runtime import files, fingerprints, journal
from alignjax.setup.weights import read_for

TASKS: dict[str, str] = {
  'hellaswag': 'alignjax.evals.public.nlp:hellaswag',
  'rte': 'alignjax.evals.public.nlp:rte',
  'sst': 'alignjax.evals.public.nlp:sst',
  'wsc': 'alignjax.evals.public.nlp:wsc',
  'drop': 'alignjax.evals.public.nlp:drop',
  'quac': 'alignjax.evals.public.nlp:quac',
  'squadv2': 'alignjax.evals.public.nlp:squadv2',
  'wmt15_fr_en': 'alignjax.evals.public.nlp:wmt15_fr_en',
  'cnn_dm': 'alignjax.evals.public.nlp:cnn_dm',
  'tldr': 'alignjax.evals.public.nlp:tldr',
  'truthfulqa_mc': 'alignjax.evals.public.nlp:truthfulqa_mc',
  'text_loss': 'alignjax.evals.public.text:text_loss',
  'winogender': 'alignjax.evals.safety.bias:winogender',
  'crows_pairs': 'alignjax.evals.safety.bias:crows_pairs',
  'realtoxicityprompts': 'alignjax.evals.safety.toxicity:realtoxicityprompts',
  'truthfulqa': 'alignjax.evals.safety.truthfulness:truthfulqa',
  'judge_agreement': 'alignjax.evals.safety.truthfulness:judge_agreement',
  'rewardbench2': 'alignjax.evals.reward.benchmarks:rewardbench2',
  'judgebench': 'alignjax.evals.reward.benchmarks:judgebench',
  'llmbar': 'alignjax.evals.reward.benchmarks:llmbar',
  'hhh': 'alignjax.evals.reward.benchmarks:hhh',
}


# Packages that compute scores.
PACKAGES = ('lm_eval', 'sacrebleu', 'rouge_score', 'alt-profanity-check', 'detoxify')


def find_tasks(names: Sequence[str]) -> dict[str, Callable]:
  """Returns {task: its function} for the given names. A name is an entry of TASKS,
  'module:function', a task file or a folder of task files of the evaluation harness, or one of the
  harness's own tasks (harness_tasks.py). An unknown name is an error that offers the nearest
  names."""
  found: dict[str, Callable] = {}
  for name in names:
    for task, function in _find(name).items():
      if task in found:
        raise ValueError(f'--tasks={",".join(names)}: the task {task!r} occurs twice.')
      found[task] = function
  return found


def _find(name: str) -> dict[str, Callable]:
  if name in TASKS or ':' in name:
    return {name: plugins.find(TASKS.get(name, name), f'--tasks={name}')}
  found = harness_tasks.find(name)
  if found is None:
    near = difflib.get_close_matches(name, {**TASKS, **harness_tasks.index()}, 3)
    raise ValueError(
      f'there is no task {name!r}'
      + (f'; did you mean {" or ".join(near)}?' if near else '.')
      + f' Tasks: {", ".join(TASKS)}; a task of your own: module:function, or FILE.yaml or a '
      f'folder of such files for '
      'the evaluation harness; or a task of the harness by its name.'
    )
  return found


def protocol(
  name: str,
  task: Callable,
  data: str | None,
  limit: int | None,
  seed: int,
  options: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns everything except the model that determines a task's result, as JSON values. Files,
  models and functions are represented by their contents, not by their names."""
  if data and not pathlib.Path(data).expanduser().exists():
    raise FileNotFoundError(f'--data: {name}={data}: no such file or folder.')
  takes = inspect.signature(task).parameters
  defaults = {k: p.default for k, p in takes.items() if k not in GIVEN and p.default is not p.empty}
  options = plugins.current_names(defaults | dict(options))
  function = getattr(task, 'func', task)  # A functools.partial has `func`.
  own = f'{function.__module__}:{getattr(function, "__name__", function)}'
  return dict(
    task=name if name in TASKS else own,
    name=name,
    code=fingerprints.of_function(task, TASKS.get(name, name)),
    of_task=getattr(task, 'protocol', None),
    packages=_versions(),
    data=data and fingerprints.of_files([data]),
    limit=limit,
    seed=seed,
    options=options,
    named={k: found for k, v in options.items() if (found := _contents(v)) is not None},
  )


GIVEN = ('model', 'data', 'limit', 'seed', 'keep')


def _versions() -> dict[str, str]:
  """Returns the versions of the installed packages that compute scores."""
  out = {}
  for package in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      out[package] = importlib.metadata.version(package)
  return out


def _contents(value: Any) -> str | None:
  """Returns the fingerprint of what an option names: the source of a function, a model, or any
  other file. It is None if the option names none of these."""
  if not isinstance(value, str) or not value:
    return None
  # The text is neither a path nor a function, or the function has no source.
  with contextlib.suppress(OSError, ValueError, TypeError):
    path = pathlib.Path(hub.without_scheme(value)).expanduser()
    if (path / 'final').is_dir():  # a finished stage
      return fingerprints.of_files([path / 'final', path / 'checkpoints' / 'config.json'])
    if value.startswith('peft:'):  # the adapters and their base
      return fingerprints.of_files([hub.folder_of(hub.without_scheme(v)) for v in read_for(value)])
    if path.exists():
      return fingerprints.of_files([path])
    if re.fullmatch(r'[\w.]+:\w+', value) and not value.startswith(hub.SCHEMES):
      return fingerprints.of_function(plugins.find(value, '--options'), value)
  return None


def run_task(
  name: str,
  task: Callable,
  model: Model,
  facts: Mapping[str, Any],
  out: files.Folder,
  *,
  data: str | None = None,
  limit: int | None = None,
  seed: int = 0,
  options: Mapping[str, Any] | None = None,
) -> tuple[list[Cell], bool]:
  """Returns (cells, whether they had been measured before). The first process writes
  OUT/cells/NAME-KEY.json atomically.

  KEY is computed from the protocol and `facts`, so that a result is never reused for a model or a
  task that differs in anything that changes a number.

  Args:
    name: the name of the task.
    task: its function.
    model: the model to evaluate.
    facts: the value of loading.facts for the model.
    out: the folder of the evaluation.
    data: the file or folder of the task's data, or None to read the hub.
    limit: the largest number of items. None means all of them.
    seed: the seed by which items are drawn.
    options: the task's own keyword arguments.
  """
  options = dict(options or {})
  takes = inspect.signature(task).parameters
  for key in options:
    if key not in takes or key in GIVEN:
      own = [k for k in takes if k not in GIVEN]
      raise ValueError(
        f'--options: {name}.{key}: the task {name!r} takes {", ".join(own) or "no options"}.'
      )
  described = protocol(name, task, data, limit, seed, options)
  file = f'{re.sub("[^A-Za-z0-9_.-]", ".", name)}-{fingerprints.of_value([described, facts])}'
  if (before := earlier.name_of(name, described, facts)) and (
    (out / 'cells' / f'{before}.json').exists() or (out / 'kept' / before).exists()
  ):
    file = before
  path, keep = out / 'cells' / f'{file}.json', out / 'kept' / file
  found = journal.read_whole(path)
  if found is not None:
    return [Cell(**c) for c in found['cells']], True
  keep.mkdir(parents=True, exist_ok=True)
  if any(keep.iterdir()) and jax.process_index() == 0:
    print(f'{name}: goes on from {keep}', flush=True)
  began = time.perf_counter()
  cells = task(model, data=data, limit=limit, seed=seed, keep=keep, **options)
  journal.write_whole(
    path,
    dict(
      protocol=described,
      model=facts,
      seconds=round(time.perf_counter() - began, 1),
      cells=[c._asdict() for c in cells],
    ),
  )
  return cells, False
