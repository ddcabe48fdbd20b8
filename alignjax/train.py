"""Runs the stages of a config: checks, builds, restores, loops and saves. It knows no algorithm; a
stage (stages/stage.py: Stage) brings that, and stages/loop.py has the loop.

    train.main(config, workdir)

runs config.stages_to_run and, before them, the stages that they start from, each in
WORKDIR/<stage>; finished stages are reused. A run that was stopped at any point goes on from its
last checkpoint and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from alignjax import plugins
from alignjax.runtime import (
  checkpoint,
  failures,
  files,
  lock,
  memory,
  metrics,
  saved_config,
  trace,
  trackers,
)
from alignjax.runtime.interrupt import Interrupt, on_any_process
from alignjax.setup import entries, inputs, template_date
from alignjax.setup.objects import Setup, for_stage, make_setup
from alignjax.setup.records import say
from alignjax.stages.loop import Run, loop
from alignjax.stages.stage import Stage
from alignjax.types import TrainState


def main(
  config: ml_collections.ConfigDict,
  workdir: str | files.Folder,
  traced: str | None = None,
  on_changed_input: str = 'fail',
) -> None:
  """Runs config.stages_to_run with their prerequisites, then the report if config.report names
  policies.

  Args:
    config: the whole config.
    workdir: the folder of the run, local or gs://.
    traced: 'STAGE:FIRST-LAST', the steps to profile (runtime/trace.py).
    on_changed_input: what happens where a stage's folder was made from other data, weights or
      functions than there are now (setup/inputs.py): 'fail', 'keep' or 'restart'.

  Raises:
    lock.Busy: another run holds the workdir.
  """
  entries.check(config)
  with Interrupt(config.grace_seconds) as interrupt:
    with entries.none_lacking():
      template_date.pin(config, workdir)
      trackers.of_config(config)  # an error before anything is read
      setup = make_setup(config, files.folder(workdir))
      if setup.sharder.machine.platform == 'cpu':
        memory.keep_freed_memory()
      order = resolve(config)
      wanted = trace.parse(traced) if traced else None
      trace.check(wanted, order)
      builders = find_builders(setup, order)
      report = plugins.find(config.report.build, 'report.build')
      plugins.find(f'{report.__module__}:check', 'report.build')(setup)
    failures.check_writable(setup.workdir)
    with alone(setup.workdir):
      for name in order:
        check_inputs(setup, name, on_changed_input)
      check_data(setup, {name: builders[name] for name in order if not finished(setup, name)})
      for name in order:
        run_stage(
          for_stage(setup, name)._replace(read={}),
          name,
          builders[name],
          interrupt,
          wanted=wanted,
          on_changed_input=on_changed_input,
          outdated=getattr(sys.modules[report.__module__], 'outdated', None),
        )
      if can_report(setup, order):
        report(setup)


def find_builders(setup: Setup, order: Sequence[str]) -> dict[str, Callable]:
  """The build function of each stage, after the checks of its config."""
  config = setup.config
  for name in order:
    entries.check_stage(config, name)
  builders = {
    name: plugins.find(config.stages[name].build, f'stages.{name}.build') for name in order
  }
  for name, builder in builders.items():
    plugins.find(f'{builder.__module__}:check', f'stages.{name}.build')(setup, name)
  return builders


def can_report(setup: Setup, done: list[str]) -> bool:
  """Whether there are policies to report on, which are all finished and belong together. done: the
  stages of this run."""
  config = setup.config
  if not config.report.policies:
    return False
  policies = [name for name in config.report.policies.values() if name in config.stages]
  return all(finished(setup, name) for name in policies) and belong_together(setup, policies, done)


@contextlib.contextmanager
def alone(workdir: files.Folder) -> Iterator[None]:
  """Holds the lock of the workdir, which process 0 takes for all, and removes the traceback of an
  earlier run."""
  with contextlib.ExitStack() as stack:
    failures.on_first(lambda: stack.enter_context(lock.held(workdir)))
    if jax.process_index() == 0:
      (workdir / failures.TRACEBACK).unlink(missing_ok=True)
    yield


def belong_together(setup: Setup, policies: list[str], done: list[str]) -> bool:
  """Whether every stage behind the policies of the report was made from what is there now; if not,
  the reason is printed. The stages of this run, `done`, were compared before."""
  mixed = False
  try:
    for name in resolve(setup.config, policies) if jax.process_index() == 0 else ():
      if name not in done and finished(setup, name):
        inputs.check(setup.workdir, name, identity(setup.config, name), 'fail', say)
  except (inputs.ChangedInput, saved_config.Mismatch) as error:
    say(f'no report, as its policies do not belong together: {error}')
    mixed = True
  return not on_any_process(mixed)[0]


def check_inputs(setup: Setup, name: str, choice: str) -> None:
  """Compares what a stage was made from with what is there now (inputs.check), on process 0."""
  failures.on_first(
    lambda: inputs.check(setup.workdir, name, identity(setup.config, name), choice, say)
  )


def check_data(setup: Setup, builders: Mapping[str, Callable]) -> None:
  """Reads what the later stages will read, so that a wrong line is reported now and not after the
  hours of another stage.

  The first stage is left out, because it reads its data at once, and so are the sandbox's records,
  which have no wrong lines, and its comparisons, which are sampled from earlier stages. Each stage
  reads its records again when its turn comes, and prints its notes about them then.
  """
  data = setup.config.data
  if {data.pretrain, data.demonstrations, data.comparisons, data.prompts} == {'sandbox:'}:
    return
  for name, builder in list(builders.items())[1:]:
    sampled = data.comparisons == 'sandbox:' and 'policies' in setup.config.stages[name]
    # A stage of a fork may have no such function.
    read = getattr(sys.modules.get(builder.__module__), 'read_data', None)
    if read is not None and not sampled:
      with contextlib.redirect_stdout(io.StringIO()):
        read(for_stage(setup, name)._replace(read={}), name)


def resolve(config: ml_collections.ConfigDict, targets: Sequence[str] | None = None) -> list[str]:
  """The targets, by default config.stages_to_run, and their prerequisites, which come first: the
  stages that a stage names as 'stage:NAME' in its init or policies."""
  order: list[str] = []

  def visit(name: str, path: tuple[str, ...]):
    if name in path:
      raise ValueError(f'stages start from each other in a circle: {" -> ".join((*path, name))}.')
    if name not in config.stages or config.stages[name] is None:
      raise ValueError(f'stage {name!r} is not in config.stages: {sorted(config.stages)}.')
    for spec in _strings(config.stages[name].to_dict()):
      if spec.startswith('stage:'):
        visit(spec.removeprefix('stage:'), (*path, name))
    if name not in order:
      order.append(name)

  for target in config.stages_to_run if targets is None else targets:
    visit(target, ())
  return order


def _strings(tree: Any) -> Iterator[str]:
  """All strings in nested dicts and lists."""
  if isinstance(tree, dict):
    tree = list(tree.values())
  if isinstance(tree, (list, tuple)):
    for item in tree:
      yield from _strings(item)
  elif isinstance(tree, str):
    yield tree


# The entries of an engine that say where and how it is reached, and not what it samples.
WHERE = ('url', 'folder', 'sleep', 'at_once', 'tries', 'wait', 'timeout')


def identity(config: ml_collections.ConfigDict, name: str) -> dict:
  """The entries that decide a stage's result: its own and the shared ones.

  How often it logs and saves does not count, nor which candidates it keeps, nor how its sampling
  loop is cut, nor where an engine is that samples. An entry that version 0.1.0 did not have is left
  out where it asks for what that version did, so that a run of then goes on.
  """
  config = config.to_dict()
  stage = {
    k: v
    for k, v in config['stages'][name].items()
    if k not in ('log_every', 'save_every', 'keep_candidates')
    and not (k in ('packed_rows', 'label_noise') and not v)
    and not (k == 'lora' and not (v or {}).get('rank'))
  }
  if isinstance(stage.get('rollout'), dict):
    engine = stage['rollout'].get('engine')
    stage['rollout'] = {
      k: v for k, v in stage['rollout'].items() if k not in ('segments', 'halvings', 'engine')
    }
    if engine:
      stage['rollout']['engine'] = {k: v for k, v in engine.items() if k not in WHERE}
  return {k: config[k] for k in ('seed', 'world', 'data', 'model', 'reward_model')} | {
    'stages': {name: stage}
  }


def finished(setup: Setup, name: str) -> bool:
  return checkpoint.is_finished(setup.workdir / name / 'final')


def run_stage(
  setup: Setup,
  name: str,
  builder: Callable[[Setup, str], Stage],
  interrupt: Interrupt,
  wanted: trace.Profile | None = None,
  on_changed_input: str = 'fail',
  outdated: Callable[[Setup, str], None] | None = None,
) -> None:
  """Runs one stage from its last checkpoint, or its start, to its end.

  Args:
    setup: of the stage (objects.for_stage).
    name: of the stage.
    builder: builds the stage.
    interrupt: notes signals during the loop.
    wanted: the steps to profile, or None.
    on_changed_input: see main.
    outdated: is called before the stage is made again, to remove reports of its earlier result.
  """
  folder = setup.workdir / name
  main_process = jax.process_index() == 0
  check_inputs(setup, name, on_changed_input)  # again, because its prerequisites are finished now
  with checkpoint.Checkpoints(
    folder / 'checkpoints',
    config=identity(setup.config, name),
    logs=functools.partial(metrics.sums, folder),
  ) as saved:
    if finished(setup, name):
      say(f'{name}: finished before, reused ({folder})')
      return
    # A kill may leave such a folder in a bucket.
    if (folder / 'final').exists() and not files.is_bucket(folder):
      say(f'{name}: {folder / "final"} is damaged, as its info.json is missing: it is made again')
    say(f'{name}: start')
    if outdated is not None and main_process:
      outdated(setup, name)
    began = time.perf_counter()
    stage = builder(setup, name)
    made = record(setup, name)
    first, state = last_state(stage, saved, name)
    built = time.perf_counter()
    tracer = trace.Tracer(wanted, folder, first=first, num_steps=stage.num_steps)
    with (
      metrics.Writer(
        folder,
        start_step=first,
        active=main_process,
        tracker=trackers.of_config(setup.config),
        config=identity(setup.config, name),
      ) as writer,
      metrics.Progress(stage.num_steps, initial=first, name=name, active=main_process) as progress,
      interrupt.held(),
    ):
      run = Run(
        config=setup.config,
        folder=folder,
        made=made,
        saved=saved,
        writer=writer,
        progress=progress,
        interrupt=interrupt,
        tracer=tracer,
      )
      state = loop(stage, state, first, run)
    try:
      interrupt.check()
      params, info = stage.finish(state)
      made = record(setup, name)
    except SystemExit:  # of Interrupt
      saved.save(stage.num_steps, state, wait=True)
      raise
    seconds = _elapsed(folder, time.perf_counter() - began)
    made |= {'logs': inputs.logs(folder)}
    checkpoint.save_params(
      folder / 'final', params, info | {'seconds': seconds, 'steps': stage.num_steps}, made
    )
    say(f'{name}: done in {seconds:.0f} s (data and model {built - began:.0f} s)')


def last_state(stage: Stage, saved: checkpoint.Checkpoints, name: str) -> tuple[int, TrainState]:
  """(step, state) of the last checkpoint or, without one, of the start."""
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), stage.state
  )
  restored = saved.restore(shapes)
  if restored is None:
    return 0, stage.state
  step, state = restored
  say(f'{name}: goes on from step {step} of {stage.num_steps}')
  return step, state


def record(setup: Setup, name: str) -> dict:
  """What the stage was made from, as far as it has read it. Process 0 writes it to
  STAGE/inputs.json; on other processes it is empty."""
  read, made = inputs.of_config(setup.config, name) | setup.read, {}
  failures.on_first(
    lambda: made.update(inputs.record(setup.workdir, name, identity(setup.config, name), read))
  )
  return made


def _elapsed(folder: files.Folder, seconds: float) -> float:
  """The seconds of all attempts at a stage. Those before a restart are read from its metrics."""
  path = folder / 'metrics.jsonl'
  if not path.exists():
    return seconds
  logged = metrics.read(path)
  steps, per_step = logged.get('step'), logged.get('time/step_seconds')
  if steps is None or per_step is None:
    return seconds
  return max(seconds, float(np.nansum(np.diff(steps, prepend=0) * per_step)))
