"""Evaluates models on tasks, and their differences, with intervals.

    alignjax evaluate \\
      --models=pretrained=hf:FOLDER,sft=runs/mine/sft,ppo_ptx=runs/mine/ppo_ptx \\
      --tasks=winogender,crows_pairs,realtoxicityprompts,truthfulqa_mc \\
      --data=winogender=FILE,crows_pairs=FILE
    alignjax evaluate --models=... --tasks=my_task.yaml,my_tasks/,arc_easy
    alignjax evaluate --tasks=help
    alignjax evaluate --tasks=help:arc

The second command evaluates tasks of lm-evaluation-harness: task files of your own, folders of
them, and the harness's tasks by name. --tasks=help lists the tasks and where their data come from;
help:arc lists the harness's tasks whose names contain "arc".

A model is the folder of a finished stage, WORKDIR/STAGE, 'hf:FOLDER_OR_HUB_NAME', or
'peft:FOLDER_OR_HUB_NAME' for adapters of one. The command writes OUT/table.md, table.json and, for
several models, table.png. All models compute in one dtype (--dtype). Results are stored under
everything that they depend on (weights, dtype, tokenizer, template, data, the source of the task
and of functions of your own). A second call therefore computes only what is new and reports what it
reuses, and an interrupted call resumes.
"""

import argparse
import contextlib
import json

from alignjax.commands import command


def value_of(text: str):
  try:
    return json.loads(text)
  except json.JSONDecodeError:
    return text


def describe(part: str) -> str:
  """Returns the list of our tasks or, given a `part`, of the harness's tasks whose names contain
  it."""
  from alignjax.evals import registry
  from alignjax.evals.public import harness_tasks

  known = harness_tasks.index()
  if part:
    found = [f'{name:40} {known[name].kind}' for name in sorted(known) if part in name]
    return '\n'.join(found) or f'No task of the harness has {part!r} in its name.'
  ours = registry.find_tasks(list(registry.TASKS))
  lines = [
    f'{name:22} {(task.__doc__ or "").strip().splitlines()[0]}' for name, task in ours.items()
  ]
  return '\n'.join(
    [
      *lines,
      '',
      f'A task can also be module:function, FILE.yaml, a folder of such files, or one of the '
      f'{len(known)} names of lm-evaluation-harness; --tasks=help:PART lists those that contain '
      'PART.',
    ]
  )


def arguments(argv: list[str]) -> argparse.Namespace:
  parser = command.make_parser(__name__)
  parser.add_argument('--models', default='', help='NAME=MODEL,NAME=MODEL')
  parser.add_argument(
    '--tasks',
    required=True,
    help='TASK,TASK; `help` lists the tasks and `help:PART` those of the harness',
  )
  parser.add_argument(
    '--data', default='', help='TASK=FILE_OR_FOLDER,... for tasks that do not read the hub'
  )
  parser.add_argument(
    '--options',
    default='',
    help='TASK.OPTION=VALUE,... such as realtoxicityprompts.scorer=mylab.scorers:mine',
  )
  parser.add_argument(
    '--baseline', help='the model that differences are taken to; default: the first'
  )
  parser.add_argument(
    '--limit', type=int, help='the largest number of items per task, drawn by the seed'
  )
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--template',
    help="'plain', 'dialogue' or 'chat'; default: that of the training, or plain for hf:",
  )
  parser.add_argument(
    '--dtype',
    default='float32',
    choices=command.DTYPES,
    help='the dtype that all models compute in',
  )
  parser.add_argument(
    '--mesh', default='', help='data=2,fsdp=4,...; default: data parallelism over all devices'
  )
  parser.add_argument(
    '--distributed',
    action='store_true',
    help='run as one of several processes, as `alignjax run` does',
  )
  parser.add_argument('--out', default='runs/evaluation')
  return parser.parse_args(argv)


def main(argv: list[str]) -> None:
  options = arguments(argv)
  from alignjax.evals import evaluation, registry
  from alignjax.runtime import distributed, failures, files

  if options.tasks.partition(':')[0] == 'help':
    print(describe(options.tasks.partition(':')[2]))
    return
  models, data = command.pairs(options.models, '--models'), command.pairs(options.data, '--data')
  names = [t for t in options.tasks.split(',') if t]
  tasks = registry.find_tasks(names)
  if not names:
    raise ValueError('--tasks names no task; it has the form TASK,TASK.')
  if not models:
    raise ValueError('--models names no model; it has the form NAME=MODEL,NAME=MODEL.')
  own = parse_options(options.options)
  for flag, given in (('--data', data), ('--options', own)):
    for name in given:
      if name not in tasks:
        raise ValueError(
          f'{flag} names the task {name!r}, which is not among --tasks={",".join(tasks)}.'
        )
  baseline = options.baseline or next(iter(models))
  if baseline not in models:
    raise ValueError(f'--baseline={baseline} is none of the models {", ".join(models)}.')
  if options.limit is not None and options.limit < 1:
    raise ValueError('--limit must be 1 or more.')
  mesh = parse_mesh(options.mesh)
  with (
    distributed.joined(distributed.facts(vars(options)), 300)
    if options.distributed
    else contextlib.nullcontext()
  ):
    out = files.folder(options.out)
    failures.check_writable(out, '--out')
    evaluation.evaluate(
      models,
      names,
      out,
      data=data,
      options=own,
      baseline=baseline,
      limit=options.limit,
      seed=options.seed,
      template=options.template,
      mesh=mesh,
      dtype=options.dtype,
    )


def parse_options(text: str) -> dict[str, dict]:
  """Returns {task: {option: value}} of 'TASK.OPTION=VALUE,...'."""
  found: dict[str, dict] = {}
  for key, value in command.pairs(text, '--options').items():
    task, dot, option = key.rpartition('.')
    if not dot:
      raise ValueError(f'--options: {key!r} does not have the form TASK.OPTION.')
    found.setdefault(task, {})[option] = value_of(value)
  return found


def parse_mesh(text: str) -> dict[str, int] | None:
  """Returns {axis: size} of 'data=2,fsdp=4', or None for an empty text."""
  from alignjax.sharding import AXES

  try:
    mesh = {axis: int(size) for axis, size in command.pairs(text, '--mesh').items()}
    if not set(mesh) <= set(AXES):
      raise ValueError
  except ValueError:
    raise ValueError(
      f'--mesh={text} does not have the form data=2,fsdp=4; the axes are {", ".join(AXES)}.'
    ) from None
  return mesh or None
