"""The report of a finished run.

`build` reports on the sandbox: the paper's findings in miniature, as report.json, report.md and
plots. `tasks` reports on real data, with the table of evals/table.py. A report function of a fork
needs a `check(setup)` in its module.

The measurements of every policy are stored in WORKDIR/report/<policy>.npz, so that an interrupted
report goes on and a second one is quick. Policies appear in the order of the pipeline.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping

import jax
import numpy as np

from alignjax import plots, sandbox
from alignjax.evals import findings, registry
from alignjax.evals import sandbox as evaluation
from alignjax.models import hub
from alignjax.plots import NAMES
from alignjax.report_page import COLUMNS, markdown
from alignjax.runtime import checkpoint, files, fingerprints, metrics
from alignjax.setup.objects import Setup, for_stage
from alignjax.setup.weights import initial_params
from alignjax.sharding import sync

# The entries of config.report that decide what is measured.
MEASURED = ('win_prompts', 'tax_items', 'truth_samples', 'toxicity_prompts', 'loss_documents')


def build(setup: Setup) -> None:
  """Measures every policy of config.report.policies (name -> stage) and writes the report. It needs
  the sandbox."""
  began = time.perf_counter()
  policies = in_order(setup.config.report.policies)
  folder = setup.workdir / 'report'
  folder.mkdir(parents=True, exist_ok=True)
  main_process = jax.process_index() == 0
  if main_process:
    print(f'report: measuring {", ".join(policies)}', flush=True)
  ev = prepare(setup)
  ref = initial_params(setup, 'stage:sft', 'lm', 0)
  arrays = {}
  for name, stage in policies.items():
    own = for_stage(setup, stage)
    prompted = name == 'pretrained_prompted'
    path = folder / f'{name}-{measured_from(own, name, stage)}.npz'
    arrays[name] = _read(path)
    if arrays[name] is not None:
      if main_process:
        print(f'report: {name} was measured before, reused ({path})', flush=True)
      continue
    params = initial_params(own, f'stage:{stage}', 'lm', 0)
    if prompted:
      prefix, scores = evaluation.best_prefix(
        ev, params, sandbox.prompts(setup.text.world, setup.config.report.win_prompts // 2, 'valid')
      )
      measured = evaluation.measure(ev, params, None, prefix)
      measured['prefixes'] = np.array(json.dumps({'best': prefix, 'gold': scores}))
    elif own.policy_model == setup.policy_model:
      measured = evaluation.measure(ev, params, ref)
    else:  # Another architecture has compiled functions of its own and no KL to the reference.
      measured = evaluation.measure(prepare(own), params, None)
    sync(f'{path} measured')
    if main_process:
      _write(path, measured)
    arrays[name] = {k: np.asarray(v) for k, v in measured.items()}
  if main_process:
    _remove_others(folder, policies, setup)
    prefixes = [json.loads(str(a.pop('prefixes'))) for a in arrays.values() if 'prefixes' in a]
    if prefixes:
      files.write(folder / 'prefixes.json', json.dumps(prefixes[0], indent=2))
  if not main_process:
    return
  result = assemble(setup, ev, arrays, time.perf_counter() - began) | {'config': decisive(setup)}
  files.write(setup.workdir / 'report.json', json.dumps(result, indent=2))
  pictures = plots.all_plots(setup.workdir, result)
  files.write(setup.workdir / 'report.md', markdown(result, pictures))
  columns = ['policy', *(COLUMNS[c] for c in list(COLUMNS)[:9])]
  metrics.print_table(
    "the paper's findings in miniature",
    columns,
    [
      [NAMES.get(n, n), *(_short(p.get(c)) for c in list(COLUMNS)[:9])]
      for n, p in result['policies'].items()
    ],
  )
  print(f'report: {setup.workdir / "report.md"}', flush=True)


def measured_from(setup: Setup, name: str, stage: str) -> str:
  """The fingerprint of all that decides a policy's measurements: its weights and those of the
  reference, what they are measured on, and the code."""

  def folder(stage):
    return setup.workdir / stage / 'final'

  c = setup.config
  return fingerprints.of_value(
    [
      name == 'pretrained_prompted',
      checkpoint.weights(folder(stage)),
      checkpoint.weights(folder('sft')),
      str(setup.policy_model),
      c.world.to_dict(),
      c.data.to_dict(),
      {k: c.report[k] for k in MEASURED},
      fingerprints.of_function(evaluation.measure),
    ]
  )


def decisive(setup: Setup) -> dict:
  """The entries of the config that decide the numbers of the report, including the seeds. Reports
  that differ only in others may be averaged."""
  c = setup.config.to_dict()
  left_out = ('log_every', 'save_every', 'keep_candidates')
  stages = {
    name: {k: v for k, v in c['stages'][name].items() if k not in left_out}
    for name in sorted(c['stages'])
    if checkpoint.is_finished(setup.workdir / name / 'final')
  }
  return {k: c[k] for k in ('seed', 'world', 'data', 'model', 'reward_model')} | {
    'stages': stages,
    'report': {k: c['report'][k] for k in ('policies', *MEASURED)},
  }


def tasks(setup: Setup) -> None:
  """The report of a run on real data: it evaluates config.report.tasks on its policies (name ->
  stage, or 'hf:...') and writes WORKDIR/evaluation. Without tasks it does nothing."""
  from alignjax.evals.evaluation import evaluate

  r = setup.config.report
  if r.tasks:

    def place(spec):
      return str(setup.workdir / spec) if spec in setup.config.stages else spec

    order = sorted(in_order(r.policies), key=lambda name: name != r.baseline)
    evaluate(
      {name: place(r.policies[name]) for name in order},
      r.tasks,
      setup.workdir / 'evaluation',
      data=r.data,
      limit=r.limit,
    )


def check(setup: Setup) -> None:
  """Raises ValueError for wrong policies and tasks of the report, before any stage runs."""
  for name, spec in (setup.config.report.policies or {}).items():
    if (
      not isinstance(spec, str) or setup.text.world is not None and spec not in setup.config.stages
    ):
      raise ValueError(
        f'report.policies.{name}={spec!r} must be a stage of the config: '
        f'{", ".join(sorted(setup.config.stages))}.'
      )
  registry.find_tasks(setup.config.report.get('tasks', ()))


def outdated(setup: Setup, stage: str) -> None:
  """Removes the reports of an earlier result of a stage that is made again, so that nobody takes
  them for those of the new one."""
  for path, pages, stages in (
    (setup.workdir / 'report.json', ('report.md',), lambda found: found['config']['stages']),
    (
      setup.workdir / 'evaluation' / 'table.json',
      ('table.md', 'table.png'),
      lambda found: [
        os.path.basename(spec)
        for spec in found['models'].values()
        if not spec.startswith(hub.SCHEMES)
      ],
    ),
  ):
    if not path.exists():
      continue
    try:
      of_it = stage in stages(json.loads(path.read_bytes()))
    except (
      ValueError,
      KeyError,
      TypeError,
      AttributeError,
    ):  # It is damaged, and written anew in the end.
      of_it = True
    if of_it:
      for page in (path, *map(path.with_name, pages)):
        page.unlink(missing_ok=True)
      print(
        f'{stage}: {path} was of an earlier result of this stage and is removed; what was '
        f'measured of other stages is kept',
        flush=True,
      )


def in_order(policies: Mapping[str, str]) -> dict[str, str]:
  """name -> stage in the order of NAMES, and others behind them: a ConfigDict sorts by name."""
  known = list(NAMES)
  return {
    name: policies[name]
    for name in sorted(policies, key=lambda n: known.index(n) if n in NAMES else len(known))
  }


def prepare(setup: Setup) -> evaluation.Evaluation:
  """The protocol of the sandbox's measurements, as config.report has it."""
  return evaluation.prepare(
    setup.nets,
    setup.sharder,
    setup.text.world,
    setup.text.labelers,
    setup.text.template,
    prompt_length=setup.prompt_length,
    response_length=setup.response_length,
    row_length=setup.config.data.row_length,
    **{k: setup.config.report[k] for k in MEASURED},
  )


def assemble(setup: Setup, ev, arrays: dict, seconds: float) -> dict:
  """The contents of report.json."""
  policies = {name: evaluation.summarize(ev, a, arrays['sft']) for name, a in arrays.items()}
  infos = {
    p.parent.parent.name: checkpoint.load_info(p.parent)
    for p in sorted(setup.workdir.glob('*/final/info.json'))
  }
  rm = {
    k: v for k, v in infos.get('rm', {}).items() if k not in ('head', 'seconds', 'steps', 'made')
  }
  prefixes = setup.workdir / 'report' / 'prefixes.json'
  versions = {
    p: importlib.metadata.version(p) for p in ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
  }
  return {
    'policies': policies,
    'findings': findings.findings(
      arrays, ev.labelers, *(evaluation.clusters(ev)[k] for k in ('prompts', 'truth'))
    ),
    'samples': samples(ev.prompts, arrays),
    'reward_model': rm,
    'selection': {name: info for name, info in infos.items() if 'selection' in info},
    'prompted_baseline': json.loads(prefixes.read_text()) if prefixes.exists() else None,
    'seconds': {name: round(info['seconds'], 1) for name, info in infos.items()}
    | {'report': round(seconds, 1)},
    'seed': setup.config.seed,
    'made_by': made_by(setup),
    'versions': versions | {'python': platform.python_version()},
  }


def samples(prompts: list[dict], arrays: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict]:
  """The first test prompt of every use case, with every policy's response."""
  first = {r['use_case']: i for i, r in reversed(list(enumerate(prompts)))}

  def responses(i):
    return {name: str(a['responses'][i]) for name, a in arrays.items()}

  return [
    {'use_case': case, 'prompt': prompts[i]['prompt'], 'responses': responses(i)}
    for case, i in sorted(first.items())
  ]


def made_by(setup: Setup) -> dict:
  """The command, the commit of this source and the whole config."""
  config = json.loads(json.dumps(setup.config.to_dict(), default=str))
  return source() | {'config': config}


def source() -> dict:
  """The command, and the commit of this source where it is a git checkout (followed by '+' where it
  has changes)."""
  root = pathlib.Path(__file__).resolve().parent.parent

  def git(*words):
    return subprocess.run(
      ['git', '-C', str(root), *words], capture_output=True, text=True, timeout=20, check=True
    ).stdout.strip()

  commit = None
  try:
    # Otherwise it is the repository around an environment.
    if pathlib.Path(git('rev-parse', '--show-toplevel')) == root:
      commit = git('rev-parse', '--short=12', 'HEAD') + (
        '+' if git('status', '--porcelain', '--untracked-files=no') else ''
      )
  except (OSError, subprocess.SubprocessError):
    pass
  program = pathlib.Path(sys.argv[0] or '-')
  started = ['alignjax'] if program.name == 'alignjax' else ['python', os.path.relpath(program)]
  return {'command': shlex.join([*started, *sys.argv[1:]]), 'commit': commit}


def _short(figure: dict | None) -> str:
  return '' if not figure or figure['mean'] is None else f'{figure["mean"]:.2f}'


def _read(path: files.Folder) -> dict[str, np.ndarray] | None:
  """What `_write` wrote. None where there is no file, or where it is damaged and has to be measured
  again."""
  if not path.exists():
    return None
  try:
    arrays = dict(np.load(io.BytesIO(path.read_bytes())))
    if str(arrays.pop('checksum')) == fingerprints.of_params(arrays):
      return arrays
  except Exception:  # noqa: BLE001 zipfile and numpy raise many kinds for a damaged file
    pass
  if jax.process_index() == 0:
    print(f'report: {path} is damaged, measured again', flush=True)
  return None


def _write(path: files.Folder, arrays: dict[str, np.ndarray]) -> None:
  arrays = {name: np.asarray(a) for name, a in arrays.items()}
  buffer = io.BytesIO()
  np.savez(buffer, **arrays, checksum=np.array(fingerprints.of_params(arrays)))
  files.write(path, buffer.getvalue())


def _remove_others(folder: files.Folder, policies: dict[str, str], setup: Setup) -> None:
  """Removes the measurements of other weights, of another protocol, and of policies that the report
  no longer has."""
  wanted = {
    f'{name}-{measured_from(for_stage(setup, stage), name, stage)}.npz'
    for name, stage in policies.items()
  }
  for path in folder.glob('*.npz'):
    if path.name not in wanted:
      path.unlink()
