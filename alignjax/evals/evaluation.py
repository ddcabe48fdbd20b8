"""Evaluates models on tasks: measures every (model, task) that has no stored result yet and writes
the table. alignjax/commands/evaluate.py and the end of a run call it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from alignjax.evals import registry, table
from alignjax.inference import loading
from alignjax.runtime import files, metrics


def evaluate(
  models: Mapping[str, str],
  tasks: Sequence[str],
  out: str | files.Folder,
  *,
  data: Mapping[str, str] | None = None,
  options: Mapping[str, Mapping[str, Any]] | None = None,
  baseline: str | None = None,
  limit: int | None = None,
  seed: int = 0,
  template: str | None = None,
  mesh: Mapping[str, int] | None = None,
  dtype: str = 'float32',
) -> list[dict[str, Any]]:
  """Evaluates models on tasks and writes OUT/table.md, OUT/table.json and, if there are several
  models, OUT/table.png.

  With several processes, all of them must call it; the first one writes the files.

  Args:
    models: {name: folder of a finished stage, or 'hf:FOLDER_OR_HUB_NAME'}. One model is in memory
      at a time.
    tasks: the tasks, as registry.find_tasks takes them.
    out: the folder to write to.
    data: {task: file or folder of its data}; the other tasks read the Hugging Face hub.
    options: {task: its own keyword arguments}.
    baseline: the name of the model that differences are taken to. None means the first model.
    limit: the number of items of each task. None means all of them.
    seed: the seed by which items are drawn.
    template: the prompt template. None means the one that each model was trained with.
    mesh: arguments of sharding.make_mesh for every model. None means one device, or, if there are
      several devices, all of them as data-parallel replicas.
    dtype: the dtype that all models compute in.

  Returns:
    The rows of the table (table.assemble).
  """
  out, data, options = files.folder(out), data or {}, options or {}
  baseline = baseline or next(iter(models))
  functions = registry.find_tasks(tasks)
  heads = {name: getattr(task, 'head', 'lm') for name, task in functions.items()}
  if len(set(heads.values())) > 1:
    scalar = [name for name, head in heads.items() if head == 'scalar']
    raise ValueError(
      f'--tasks: {", ".join(scalar)} measure{"s" * (len(scalar) == 1)} reward models, the others '
      'policies: give two commands.'
    )
  head = next(iter(heads.values()))
  if mesh is None and len(jax.devices()) > 1:
    mesh = {'data': len(jax.devices())}
  measured: dict[str, dict[str, list[table.Cell]]] = {name: {} for name in functions}
  for model_name, spec in models.items():
    model = loading.load(spec, head, template, mesh, dtype)
    facts = loading.facts(model)
    for name, task in functions.items():
      began = time.perf_counter()
      measured[name][model_name], before = registry.run_task(
        name,
        task,
        model,
        facts,
        out,
        data=data.get(name),
        limit=limit,
        seed=seed,
        options=options.get(name),
      )
      if jax.process_index() == 0:
        took = f'{time.perf_counter() - began:.0f} s'
        print(
          f'{model_name}: {name} ' + (f'measured before, in {out}/cells' if before else took),
          flush=True,
        )
    del model
  rows = table.assemble(measured, baseline)
  if jax.process_index() == 0:
    result = dict(
      models=dict(models), baseline=baseline, limit=limit, seed=seed, dtype=dtype, rows=rows
    )
    _write(result, out)
  return rows


def _write(result: Mapping[str, Any], out: files.Folder) -> None:
  """Writes the files of `evaluate` and prints the table. result: the contents of table.json."""
  models, baseline, rows = list(result['models']), result['baseline'], result['rows']
  files.write(out / 'table.json', json.dumps(result, indent=2))
  picture = '\n![differences](table.png)\n' if len(models) > 1 else ''
  files.write(out / 'table.md', table.markdown(rows, models, baseline) + picture)
  if len(models) > 1:
    table.plot(rows, models, baseline, out / 'table.png')
  elif (out / 'table.png').exists():
    (out / 'table.png').unlink()  # An earlier call with more models wrote it.

  def short(f):
    return '' if not f or f['mean'] is None else f'{f["mean"]:.3f}'

  metrics.print_table(
    f'{out}/table.md',
    ('task', 'metric', 'prompt', *models),
    [
      (r['task'], r['metric'], r['prompt'], *(short(r['models'].get(m)) for m in models))
      for r in rows
    ],
  )
