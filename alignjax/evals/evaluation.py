"""Tasks over models: measures what is not there yet and writes the table.
alignjax/commands/evaluate.py and the end of a run call it."""

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
  """Writes OUT/table.md, table.json and, of several models, table.png; returns the rows
  (table.assemble).

  Args:
    models: name -> finished stage's folder or 'hf:FOLDER_OR_HUB_NAME'; one model is in memory at a
      time.
    tasks: of registry.find_tasks.
    data, options: of each task.
    limit: items of each.
    baseline: the first model, if None.
    template: prompt template; None: as each model was trained.
    mesh: of sharding.make_mesh for every model; None: one device, or all of them, each with rows of
      its own.
    dtype: that all models compute in.

  With several processes all of them call it; the first one writes.
  """
  out, data, options = files.folder(out), data or {}, options or {}
  baseline = baseline or next(iter(models))
  functions = registry.find_tasks(tasks)
  if mesh is None and len(jax.devices()) > 1:
    mesh = {'data': len(jax.devices())}
  measured: dict[str, dict[str, list[table.Cell]]] = {name: {} for name in functions}
  for model_name, spec in models.items():
    model = loading.load(spec, 'lm', template, mesh, dtype)
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
  if jax.process_index():
    return rows
  result = dict(
    models=dict(models), baseline=baseline, limit=limit, seed=seed, dtype=dtype, rows=rows
  )
  files.write(out / 'table.json', json.dumps(result, indent=2))
  files.write(
    out / 'table.md',
    table.markdown(rows, list(models), baseline)
    + ('\n![differences](table.png)\n' if len(models) > 1 else ''),
  )
  if len(models) > 1:
    table.plot(rows, list(models), baseline, out / 'table.png')
  elif (out / 'table.png').exists():
    (out / 'table.png').unlink()  # of an earlier call with more models

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
  return rows
