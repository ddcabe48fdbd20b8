"""Makes tasks of lm-evaluation-harness tasks of the table: YAML files of your own, and the
harness's own tasks by name.

    --tasks=my_task.yaml,my_tasks/,arc_easy,lambada_openai

In this example, the third and the fourth are the harness's own.

The YAML file decides everything: the data (`dataset_path: json` with `data_files` for local files,
relative to the current folder), prompts, number of examples, metrics and filters. A group is
refused, because its members are rows of the table: name them instead. Every task has the options
shots=N, and chat=true, by which the chat template of the model's tokenizer renders its prompts;
otherwise they are plain text. --data=TASK=FILE replaces the data by a file with the same fields
(.json, .jsonl, .csv, .parquet).
"""

from __future__ import annotations

import functools
import glob
import importlib.util
import json
import logging
import pathlib
import random
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from alignjax.evals.public import harness
from alignjax.evals.table import Cell
from alignjax.inference.loading import Model
from alignjax.runtime import files, fingerprints, textfiles

ENTRY = re.compile(
  r'^["\']?(task|group|class|tag|include)["\']?[ \t]*:(.*(?:\n[ \t]*-.*)*)', re.MULTILINE
)
KINDS = {'json': 'json', 'jsonl': 'json', 'csv': 'csv', 'parquet': 'parquet'}


def require() -> None:
  if importlib.util.find_spec('lm_eval') is None:
    raise ValueError("the evaluation harness is not installed: pip install 'alignjax[eval]'.")
  logging.getLogger('lm_eval').setLevel(logging.ERROR)


def find(name: str) -> dict[str, Callable] | None:
  """Returns {task: its function} for a YAML file, a folder of YAML files, or one of the harness's
  own names. It returns None for any other name."""
  path = pathlib.Path(name).expanduser()
  looks_like_one = path.suffix in ('.yaml', '.yml') or '/' in name
  if not looks_like_one and not path.is_dir():
    return _named(name)
  if not path.exists():
    raise FileNotFoundError(f'--tasks={name}: no such file or folder.')
  require()
  found: dict[str, Callable] = {}
  for file in sorted([*path.rglob('*.yaml'), *path.rglob('*.yml')]) if path.is_dir() else [path]:
    config = _read(file)
    if path.is_dir() and not isinstance(config.get('task'), str):
      continue  # The file is a part that others include, or a group.
    if not isinstance(config.get('task'), str):
      what = (
        'it is a group of tasks; name its members'
        if 'group' in config
        else 'it is not a task, because it has no entry `task`'
      )
      raise ValueError(f'{file}: {what}.')
    if config['task'] in found:
      raise ValueError(
        f'{name}: two files define the task {config["task"]!r}; the second is {file}.'
      )
    found[config['task']] = _task(config['task'], file)
  if not found:
    raise ValueError(f'--tasks={name}: the folder has no YAML file with an entry `task`.')
  return found


def _read(path: pathlib.Path, functions: bool = False) -> dict[str, Any]:
  """Returns the contents of a task file, with those of the files that it includes. The functions of
  !function tags are names, unless `functions` is set."""
  from lm_eval.tasks import _yaml_loader

  try:
    return _yaml_loader.load_yaml(path, resolve_func=functions)
  except ModuleNotFoundError as error:
    raise ValueError(
      f'{path}: its functions need the package {error.name!r}, which is not installed.'
    ) from None
  except (
    _yaml_loader.yaml.YAMLError,
    ValueError,
    OSError,
    ImportError,
    AttributeError,
    SyntaxError,
  ) as error:
    raise ValueError(
      f'{path} is not a task file of the harness ({type(error).__name__}: '
      f'{" ".join(str(error).split())}).'
    ) from None


class Known(NamedTuple):
  """An entry of the harness's index.

  Attributes:
    kind: 'task', 'group', 'tag' or 'class', which is a task written in Python.
    path: the file of the entry.
    members: the members of a tag.
  """

  kind: str
  path: pathlib.Path | None
  members: list[str]


@functools.cache
def index() -> Mapping[str, Known]:
  """Returns the harness's own tasks, groups and tags by name, or nothing if it is not installed.
  Its thousands of files are searched for these entries alone, because the harness takes a quarter
  of a minute to parse them all."""
  spec = importlib.util.find_spec('lm_eval')
  if spec is None:
    return {}
  found: dict[str, Known] = {}
  for path in sorted((pathlib.Path(spec.origin).parent / 'tasks').rglob('*.yaml')):
    entries = _entries(path)
    name = next(iter(entries.get('group') or entries.get('task') or ()), None)
    if name is None:
      continue
    kind = 'group' if 'group' in entries else 'class' if 'class' in entries else 'task'
    found.setdefault(name, Known(kind, path, []))
    for tag in () if kind == 'group' else entries.get('tag', ()):
      found.setdefault(tag, Known('tag', None, [])).members.append(name)
  return found


@functools.cache
def _entries(path: pathlib.Path) -> dict[str, list[str]]:
  """Returns the words of the entries that name a task file, including those of the files that it
  includes."""
  found = {}
  if not path.is_file():
    return found
  for key, value in ENTRY.findall(path.read_text(encoding='utf-8', errors='replace')):
    found[key] = re.findall(
      r'[^\s\[\],"\']+', re.sub(r'#.*|!function|^[ \t]*-', '', value, flags=re.MULTILINE)
    )
  inherited = {}
  for other in found.pop('include', ()):
    inherited |= _entries(path.parent / other)
  return {**inherited, **found}


def _named(name: str) -> dict[str, Callable] | None:
  known = index().get(name)
  if known is None:
    return None
  require()
  if known.kind == 'task':
    return {name: _task(name, known.path)}
  if known.kind == 'class':
    raise ValueError(
      f'--tasks={name}: the harness has it as a class, not as a task file; such tasks are not '
      f'measured here.'
    )
  members = (
    known.members
    if known.kind == 'tag'
    else [
      part if isinstance(part, str) else str(part.get('task') or part.get('group'))
      for part in _read(known.path).get('task') or []
    ]
  )
  raise ValueError(
    f'--tasks={name}: it is a group of the harness, not a task. Name its members: '
    f'{",".join(sorted(members))}'
  )


def _task(name: str, path: pathlib.Path) -> Callable:
  """Returns the function of a task for the table. Its attribute `protocol` holds everything besides
  this code that determines the task's results."""
  config = _read(path)
  text = json.dumps(config, sort_keys=True, default=str).replace(str(path.resolve().parent), '')
  functions = sorted({fingerprints.of_function(f) for f in _functions(_read(path, functions=True))})
  task = functools.partial(measure, name, path)
  task.protocol = dict(
    file=fingerprints.of_value(text), functions=functions, files=_local_files(config)
  )
  return task


def _functions(value: Any) -> list[Callable]:
  if isinstance(value, Mapping):
    return [f for part in value.values() for f in _functions(part)]
  if isinstance(value, (list, tuple)):
    return [f for part in value for f in _functions(part)]
  return [value] if callable(value) else []


def _local_files(config: Mapping[str, Any]) -> str | None:
  """Returns the fingerprint of the local files that the data come from, or None if there are
  none."""
  given = config.get('dataset_kwargs') or {}
  named = [config.get('dataset_path'), given.get('data_dir'), given.get('data_files')]

  def flat(x):
    if isinstance(x, Mapping):
      x = list(x.values())
    if isinstance(x, (list, tuple)):
      return [path for part in x for path in flat(part)]
    return [x] if isinstance(x, str) else []

  base = (
    pathlib.Path(given['data_dir']) if isinstance(given.get('data_dir'), str) else pathlib.Path()
  )
  found = sorted(
    {
      file
      for name in flat(named)
      for place in (name, str(base / name))
      for file in glob.glob(place)
    }
  )
  return fingerprints.of_files(found) if found else None


def measure(
  name: str,
  path: pathlib.Path,
  model: Model,
  *,
  data: str | None,
  limit: int | None,
  seed: int,
  keep: pathlib.Path,
  shots: int | None = None,
  chat: bool = False,
) -> list[Cell]:
  """Returns the cells of one task file, one for each metric and filter.

  Args:
    name: the name of the task.
    path: the task file.
    model: the model to evaluate.
    data: a file that replaces the data of the task file, or None.
    limit: the largest number of documents. None means all of them.
    seed: the seed by which documents are drawn.
    keep: the folder of answers and samples.
    shots: the number of examples before each question. None means the number in the file.
    chat: whether the chat template of the model's tokenizer renders the prompts.
  """
  if shots is not None and (isinstance(shots, bool) or not isinstance(shots, int) or shots < 0):
    raise ValueError(f'--options={name}.shots={shots}: it must be a number of examples.')
  if not isinstance(chat, bool):
    raise ValueError(f'--options={name}.chat={chat}: it must be true or false.')
  if chat and not getattr(model.tokenizer, 'chat_template', None):
    raise ValueError(
      f'--options={name}.chat=true: the tokenizer of this model has no chat template. Leave the '
      f'option out, or evaluate a model that was trained with one.'
    )
  task = _load(name, path, data, shots, seed)
  lm = harness.language_model(model, keep=keep / 'answers.jsonl')
  samples = run(lm, [task], name, limit, seed, chat)[task.task_name]
  better, aggregations = task.higher_is_better(), task.aggregation()
  count = task.config.num_fewshot or 0
  prompt = (f'{count}-shot' if count else 'zero-shot') + (', chat' if chat else '')
  cells = []
  for filtered in dict.fromkeys(s['filter'] for s in samples):
    found = sorted((s for s in samples if s['filter'] == filtered), key=lambda s: s['doc_id'])
    write_samples(keep, f'{name}-{prompt}' + ('' if filtered == 'none' else f'-{filtered}'), found)
    for metric in dict.fromkeys(m for s in found for m in s['metrics']):
      values = [_plain(s.get(metric)) for s in found]
      label = metric if filtered == 'none' else f'{metric}, {filtered}'
      cells.append(
        Cell(
          label,
          prompt,
          values,
          [str(s['doc_id']) for s in found],
          better={True: 'higher', False: 'lower'}.get(better.get(metric), ''),
          aggregate=_aggregate(path, metric, aggregations.get(metric), values),
        )
      )
  return cells


def _plain(value: Any) -> Any:
  """Returns a JSON value. A number is converted to a float."""
  if isinstance(value, (bool, int, float, np.generic)):
    return (
      float(value) if np.ndim(value) == 0 and not isinstance(value, np.str_) else value.tolist()
    )
  if isinstance(value, np.ndarray):
    return _plain(value.tolist())
  return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _aggregate(
  path: pathlib.Path, metric: str, aggregate: Callable | None, values: list
) -> str | None:
  """Returns the `aggregate` of a Cell: None for a mean, else where the aggregation function is."""
  numbers = all(v is None or isinstance(v, float) for v in values)
  name = getattr(aggregate, '__name__', '')
  if numbers and (aggregate is None or name in ('mean', 'nanmean')):
    return None
  module = getattr(aggregate, '__module__', None)
  if aggregate is None or '<' in getattr(aggregate, '__qualname__', '<'):
    raise ValueError(
      f'{path}: the metric {metric!r} is not a mean of numbers, and its aggregation has no name by '
      f'which it can be '
      'found again; make it a function of a module.'
    )
  return f'{module}:{name}'


def _load(name: str, path: pathlib.Path, data: str | None, shots: int | None, seed: int) -> Any:
  from lm_eval.api.task import ConfigurableTask

  config = _read(path, functions=True)
  for key in ('tag', 'group', 'task_list'):
    config.pop(key, None)
  if not isinstance(config.get('metadata') or {}, dict):
    config['metadata'] = {}
  if data:
    kind = KINDS.get(textfiles.suffix(data))
    if kind is None or not pathlib.Path(data).is_file():
      raise ValueError(
        f'--data={name}={data}: a file of one of the kinds {", ".join(KINDS)} is needed.'
      )
    split = config.get('test_split') or config.get('validation_split') or 'test'
    config |= dict(
      dataset_path=kind,
      dataset_name=None,
      dataset_kwargs=dict(data_files={split: data}),
      training_split=None,
      validation_split=None,
      test_split=split,
      fewshot_split=split,
    )
  if shots is not None:
    config['num_fewshot'] = shots
  try:
    task = ConfigurableTask(config=config)
  except Exception as error:  # noqa: BLE001  the hub, the network, the data library and the file's own functions raise many kinds
    message = ' '.join(str(error).split())[:300]
    raise ValueError(
      f'{name}: the task of {path} cannot be made ({type(error).__name__}: {message}). If its '
      f'data are on the hub and cannot be read, name a file: --data={name}=FILE.'
    ) from None
  if task.OUTPUT_TYPE == 'generate_until':
    try:
      harness.sampling(task.config.generation_kwargs)
    except ValueError as error:
      raise ValueError(f'{name}, in {path}: {error}') from None
  task.set_fewshot_seed(seed)
  return task


def run(
  lm: Any, tasks: list[Any], what: str, limit: int | None, seed: int, chat: bool = False
) -> dict[str, list[dict[str, Any]]]:
  """Returns {name of the task: its logged samples} for tasks that have the same documents, of which
  the seed draws `limit`. chat: whether a chat template renders the prompts."""
  import lm_eval

  count = len(tasks[0].eval_docs)
  drawn = (
    sorted(random.Random(seed).sample(range(count), limit))
    if limit is not None and limit < count
    else None
  )
  before = getattr(lm, 'cut', 0)
  samples = lm_eval.evaluate(
    lm,
    dict(tasks={task.task_name: task for task in tasks}),
    bootstrap_iters=0,
    log_samples=True,
    samples=drawn and {task.task_name: drawn for task in tasks},
    apply_chat_template=chat,
  )['samples']
  if getattr(lm, 'cut', 0) > before:
    print(
      f'{what}: {lm.cut - before} requests were longer than the context and lost their left part',
      flush=True,
    )
  return samples


def write_samples(keep: pathlib.Path, name: str, samples: list[dict[str, Any]]) -> None:
  """Writes KEEP/samples-NAME.jsonl, the document, prompt and answer of each sample, for people to
  read."""
  lines = (
    json.dumps(
      dict(doc=s['doc'], prompt=s['arguments'][0][0], answers=s['filtered_resps']), default=str
    )
    for s in samples
  )
  files.write(keep / f'samples-{re.sub(r"[ /,]+", "_", name)}.jsonl', '\n'.join([*lines, '']))
