"""Tasks over models: measures what is not there yet and writes the table. experiments/evaluate.py and the end of a run call it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from alignjax import files, fingerprints, metrics
from alignjax.evals import table
from alignjax.stages import finished


def evaluate(models: Mapping[str, str], tasks: Sequence[str], out: str | files.Folder, *, data: Mapping[str, str] | None = None,
             options: Mapping[str, Mapping[str, Any]] | None = None, baseline: str | None = None, limit: int | None = None,
             seed: int = 0, template: str | None = None, mesh: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
  """Writes OUT/table.md, table.json and table.png; returns the rows (table.assemble).

  Args:
    models: name -> finished stage's folder or 'hf:FOLDER_OR_HUB_NAME'; one model is in memory at a time.
    tasks: names of table.TASKS or 'module:function'.
    data, options: of each task. limit: items of each. baseline: the first model, if None.
    template: prompt template; None: as each model was trained.
    mesh: of sharding.make_mesh for every model; None: one device, or all of them, each with rows of its own.

  With several processes all of them call it; the first one writes.
  """
  out, data, options = files.folder(out), data or {}, options or {}
  baseline = baseline or next(iter(models))
  if mesh is None and len(jax.devices()) > 1:
    mesh = {'data': len(jax.devices())}
  measured: dict[str, dict[str, list[table.Cell]]] = {name: {} for name in tasks}
  for model_name, spec in models.items():
    model = finished.load(spec, 'lm', template, mesh)
    weights = fingerprints.of_params(model.params)
    for name in tasks:
      began = time.perf_counter()
      measured[name][model_name], before = table.run_task(
          name, model, weights, out, data=data.get(name), limit=limit, seed=seed, options=options.get(name),
          template=template or '')
      if jax.process_index() == 0:
        print(f'{model_name}: {name} ' + ('measured before' if before else f'{time.perf_counter() - began:.0f} s'), flush=True)
    del model
  rows = table.assemble(measured, baseline)
  if jax.process_index():
    return rows
  result = dict(models=dict(models), baseline=baseline, limit=limit, seed=seed, rows=rows)
  (out / 'table.json').write_text(json.dumps(result, indent=2))
  (out / 'table.md').write_text(table.markdown(rows, list(models), baseline) + '\n![differences](table.png)\n')
  table.plot(rows, list(models), baseline, out / 'table.png')
  short = lambda f: '' if not f or f['mean'] is None else f'{f["mean"]:.3f}'
  metrics.print_table(f'{out}/table.md', ('task', 'metric', 'prompt', *models),
                      [(r['task'], r['metric'], r['prompt'], *(short(r['models'].get(m)) for m in models)) for r in rows])
  return rows
