"""The tasks of the evaluation table: found by name, and measured once for each (model, task,
protocol).

A task is a function

    task(model, *, data, limit, seed, keep, **options) -> list[Cell]

of a loading.Model, named in TASKS, a fork's as 'module:function', or one of the evaluation harness
(public/harness_tasks.py).

Args of a task: data: its file or folder, or None for the hub. limit: items at most, or None. keep:
  a folder for what took long to compute and must survive an interruption (continuations,
  judgments); it belongs to this model
    and protocol alone.
  options: keyword arguments of its own.
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
from alignjax.evals.public import harness_tasks
from alignjax.evals.table import Cell
from alignjax.inference.loading import Model
from alignjax.runtime import files, fingerprints, journal

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
  'winogender': 'alignjax.evals.safety.bias:winogender',
  'crows_pairs': 'alignjax.evals.safety.bias:crows_pairs',
  'realtoxicityprompts': 'alignjax.evals.safety.toxicity:realtoxicityprompts',
  'truthfulqa': 'alignjax.evals.safety.truthfulness:truthfulqa',
  'judge_agreement': 'alignjax.evals.safety.truthfulness:judge_agreement',
}


TASK_FILES = pathlib.Path(__file__).parent / 'public' / 'task_files'


# that compute scores
PACKAGES = ('lm_eval', 'sacrebleu', 'rouge_score', 'alt-profanity-check', 'detoxify')


def find_tasks(names: Sequence[str]) -> dict[str, Callable]:
  """{task: its function} of names of TASKS, 'module:function', task files and folders of the
  evaluation harness, and its own names (harness_tasks.py). An unknown name is an error with the
  nearest ones."""
  found: dict[str, Callable] = {}
  for name in names:
    for task, function in _find(name).items():
      if task in found:
        raise ValueError(f'--tasks={",".join(names)}: the task {task!r} is there twice.')
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
  """What decides a task's result besides the model, as JSON values: of files, models and functions
  the contents, not the names."""
  if data and not pathlib.Path(data).expanduser().exists():
    raise FileNotFoundError(f'--data: {name}={data}: no such file or folder.')
  takes = inspect.signature(task).parameters
  options = {
    k: p.default for k, p in takes.items() if k not in GIVEN and p.default is not p.empty
  } | dict(options)
  file = TASK_FILES / f'{name}.yaml'
  function = getattr(task, 'func', task)  # of a partial
  return dict(
    task=f'{function.__module__}:{getattr(function, "__name__", task)}',
    name=name,
    code=fingerprints.of_function(task, TASKS.get(name, name)),
    file=fingerprints.of_files([file]) if TASKS.get(name) and file.exists() else None,
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
  """Of the packages that compute scores, as far as they are installed."""
  out = {}
  for package in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      out[package] = importlib.metadata.version(package)
  return out


def _contents(value: Any) -> str | None:
  """The fingerprint of what an option names: a function's source, a model's or any other file; None
  where it names neither."""
  if not isinstance(value, str) or not value:
    return None
  # text that is no path or function; a function without source
  with contextlib.suppress(OSError, ValueError, TypeError):
    path = pathlib.Path(value.removeprefix('hf:')).expanduser()
    if (path / 'final').is_dir():  # a finished stage
      return fingerprints.of_files([path / 'final', path / 'checkpoints' / 'config.json'])
    if path.exists():
      return fingerprints.of_files([path])
    if re.fullmatch(r'[\w.]+:\w+', value) and not value.startswith('hf:'):
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
  """(cells, whether they were there already). Writes OUT/cells/NAME-KEY.json, whole or not at all,
  on the first process.

  facts: of the model, loading.facts. With the protocol they are KEY, so that nothing is served for
  a model or a task that differs in anything that changes a number.
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
