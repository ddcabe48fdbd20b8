"""The loop: build, restore, step, log, save. Knows no algorithm; a stage (stages/stage.py: Stage)
brings that.

    train.main(config, workdir)

runs config.stages_to_run and, before them, the stages that they start from, each in
WORKDIR/<stage>; finished ones are reused. A run that was stopped at any point goes on from its last
checkpoint and ends with the same bits.
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
from alignjax.compiler import flops
from alignjax.runtime import checkpoint, failures, files, lock, metrics, trace, trackers
from alignjax.runtime.interrupt import Interrupt, anywhere
from alignjax.setup import entries, inputs, template_date
from alignjax.setup.objects import Setup, for_stage, make_setup
from alignjax.setup.records import say


def main(
  config: ml_collections.ConfigDict,
  workdir: str | files.Folder,
  traced: str | None = None,
  on_changed_input: str = 'fail',
) -> None:
  """Runs config.stages_to_run with their prerequisites, then the report if config.report names one.

  Args:
    traced: 'STAGE:FIRST-LAST', steps to profile (alignjax/runtime/trace.py).
    on_changed_input: what happens where a stage's folder was made from other data, weights or
      functions than there are now (alignjax/setup/inputs.py): 'fail', 'keep' or 'restart'.

  Raises:
    lock.Busy: another run holds the workdir.
  """
  entries.check(config)
  with Interrupt(config.grace_seconds) as interrupt:
    with entries.none_lacking():
      template_date.pin(config, workdir)
      trackers.of_config(config)  # an error before anything is read
      setup = make_setup(config, files.folder(workdir))
      order = resolve(config)
      wanted = trace.parse(traced) if traced else None
      trace.check(wanted, order)
      for name in order:
        entries.check_stage(config, name)
      builders = {
        name: plugins.find(config.stages[name].build, f'stages.{name}.build') for name in order
      }
      for name, builder in builders.items():
        plugins.find(f'{builder.__module__}:check', f'stages.{name}.build')(setup, name)
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
          wanted,
          on_changed_input,
          getattr(sys.modules[report.__module__], 'outdated', None),
        )
      policies = (
        [n for n in config.report.policies.values() if n in config.stages]
        if config.report.policies
        else []
      )
      if (
        config.report.policies
        and all(finished(setup, n) for n in policies)
        and belong_together(setup, policies, order)
      ):
        report(setup)


@contextlib.contextmanager
def alone(workdir: files.Folder) -> Iterator[None]:
  """Holds the workdir's lock, which process 0 takes for all; what an earlier run said of its error
  goes."""
  with contextlib.ExitStack() as stack:
    failures.on_first(lambda: stack.enter_context(lock.held(workdir)))
    if jax.process_index() == 0:
      (workdir / failures.TRACEBACK).unlink(missing_ok=True)
    yield


def belong_together(setup: Setup, policies: list[str], done: list[str]) -> bool:
  """Whether no stage behind the report's policies was made from another version of what is there
  now; else the reason is said. The stages of this run, `done`, were compared before."""
  mixed = False
  try:
    for name in resolve(setup.config, policies) if jax.process_index() == 0 else ():
      if name not in done and finished(setup, name):
        inputs.check(setup.workdir, name, identity(setup.config, name), 'fail', say)
  except (inputs.ChangedInput, checkpoint.ConfigMismatch) as error:
    say(f'no report, as its policies do not belong together: {error}')
    mixed = True
  return not anywhere(mixed)[0]


def check_inputs(setup: Setup, name: str, choice: str) -> None:
  failures.on_first(
    lambda: inputs.check(setup.workdir, name, identity(setup.config, name), choice, say)
  )


def check_data(setup: Setup, builders: Mapping[str, Callable]) -> None:
  """Reads what the stages to come will read, so that a line that is wrong is named now and not
  after hours of another stage. The first stage reads its own at once, and the sandbox's data are
  made by earlier stages. Each stage reads its records again when its turn comes, and prints its
  notes about them then."""
  if setup.text.world is not None:
    return
  for name, builder in list(builders.items())[1:]:
    # a fork's stage may have none
    read = getattr(sys.modules.get(builder.__module__), 'read_data', None)
    if read is not None:
      with contextlib.redirect_stdout(io.StringIO()):
        read(for_stage(setup, name)._replace(read={}), name)


def resolve(config: ml_collections.ConfigDict, targets: Sequence[str] | None = None) -> list[str]:
  """The targets, by default the stages to run, prerequisites first: those that a stage's init or
  policies name as 'stage:NAME'."""
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


def _strings(tree: Any):
  if isinstance(tree, dict):
    tree = list(tree.values())
  if isinstance(tree, (list, tuple)):
    for item in tree:
      yield from _strings(item)
  elif isinstance(tree, str):
    yield tree


def identity(config: ml_collections.ConfigDict, name: str) -> dict:
  """What decides a stage's result: its own config and the shared parts. How often it logs and saves
  does not, nor which candidates it keeps, nor the tracker."""
  config = config.to_dict()
  stage = {
    k: v
    for k, v in config['stages'][name].items()
    if k not in ('log_every', 'save_every', 'keep_candidates')
  }
  return {k: config[k] for k in ('seed', 'world', 'data', 'model', 'reward_model')} | {
    'stages': {name: stage}
  }


def finished(setup: Setup, name: str) -> bool:
  return checkpoint.is_finished(setup.workdir / name / 'final')


def run_stage(
  setup: Setup,
  name: str,
  builder,
  interrupt: Interrupt,
  wanted: trace.Profile | None = None,
  on_changed_input: str = 'fail',
  outdated: Callable[[Setup, str], None] | None = None,
) -> None:
  """One stage from its last checkpoint, or its start, to its end. outdated: called with the setup
  and the stage's name before the stage is made again, to remove reports of its earlier result."""
  folder = setup.workdir / name
  main_process = jax.process_index() == 0
  check_inputs(setup, name, on_changed_input)  # again, as its ancestors are finished now
  with checkpoint.Checkpoints(
    folder / 'checkpoints',
    config=identity(setup.config, name),
    logs=functools.partial(metrics.sums, folder),
  ) as saved:
    if finished(setup, name):
      say(f'{name}: finished before, reused ({folder})')
      return
    if (folder / 'final').exists() and not files.is_bucket(folder):  # in a bucket, what a kill left
      say(f'{name}: {folder / "final"} is damaged, as its info.json is missing: it is made again')
    say(f'{name}: start')
    if outdated is not None and main_process:
      outdated(setup, name)
    began = time.perf_counter()
    stage = builder(setup, name)
    made = record(setup, name)
    state, first = stage.state, 0
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    restored = saved.restore(abstract)
    if restored is not None:
      first, state = restored
      say(f'{name}: goes on from step {first} of {stage.num_steps}')
    built = time.perf_counter()
    tracer = trace.Tracer(wanted, folder, first, stage.num_steps)
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
      state = loop(
        stage, state, first, setup.config, saved, writer, progress, interrupt, tracer, folder, made
      )
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


def loop(
  stage,
  state,
  first: int,
  config,
  saved,
  writer,
  progress,
  interrupt,
  tracer,
  folder: files.Folder,
  made: dict,
):
  """Steps first..num_steps. A checkpoint every save_every steps and when something ends the run."""
  cfg = config.stages[folder.name]
  candidates = candidate_steps(stage.num_steps, cfg.get('keep_candidates'))
  last_time, last_step = time.perf_counter(), first
  batch = stage.batch(first) if first < stage.num_steps else None
  skipped = np.asarray(state.skipped)
  for i in range(first, stage.num_steps):
    done = i + 1
    with tracer.step(done):
      state, measured, seen = stage.step(state, batch)
      following = stage.batch(done) if done < stage.num_steps else None  # while the device works
      before, skipped = skipped, np.asarray(state.skipped)  # waits for it
    asked, failed = anywhere(interrupt.asked is not None, bool(stage.failures))
    if failed:
      failures.stop_for_failed_host(saved, i, first, state, before, stage.failures)
    if skipped[0] and not before[0]:
      say(
        f'{folder.name}: step {done}: an update was skipped, its loss or gradient was not finite; '
        f'optim/skipped counts them'
      )
    if skipped[1] >= config.max_bad_updates:
      failures.stop_for_bad_updates(
        saved, folder, done, state, batch, seen, jax.device_get(measured)
      )
    if done % cfg.log_every == 0 or done == stage.num_steps:
      values = {k: float(v) for k, v in jax.device_get(measured).items()}
      if skipped[0] == before[0]:
        metrics.check_finite(values, done)
      samples: list = []
      if stage.observe is not None:
        more, samples = stage.observe(i, state, seen)
        values |= more
      now = time.perf_counter()
      values['optim/skipped'] = float(skipped[0])
      values['time/step_seconds'] = seconds = (now - last_time) / (done - last_step)
      values |= flops.metrics(flops.mean(map(stage.work, range(last_step, done))), seconds)
      last_time, last_step = now, done
      writer.write(done, values)
      progress.update(done, values)
      if samples and (done % (cfg.log_every * 10) == 0 or done == stage.num_steps):
        writer.samples(done, samples[:8])
        progress.table(f'step {done}', ('prompt', 'response', 'score', 'gold'), samples[:4])
    else:
      progress.update(done)
    if done in candidates:
      keep_candidate(stage, state, done, folder, made)
    if asked:
      failures.stop_for_signal(saved, done, state, interrupt.asked or 'a signal to another process')
    if cfg.save_every and done % cfg.save_every == 0 and done < stage.num_steps:
      saved.save(done, state)
    batch = following
  return state


def candidate_steps(num_steps: int, count: int | None) -> list[int]:
  """The steps before the last after which one of `count` evenly spaced candidates is kept; the last
  one is the stage's result."""
  return (
    sorted({round(num_steps * i / count) for i in range(1, count)} - {0, num_steps})
    if count
    else []
  )


def keep_candidate(stage, state, step: int, folder: files.Folder, made: dict) -> None:
  """Writes FOLDER/candidates/STEP: what the stage would have ended with here, for
  stages/selection.py to choose from."""
  path = folder / 'candidates' / str(step)
  there = (
    jax.process_index() == 0
    and checkpoint.is_finished(path)
    and (checkpoint.load_info(path).get('made', {}).get('origin') == made['origin'])
  )
  if anywhere(there)[0]:
    return  # where a run that was stopped repeats steps
  params, info = stage.finish(state)
  checkpoint.save_params(path, params, info | {'steps': step}, made)


def record(setup: Setup, name: str) -> dict:
  """What the stage was made from, as far as it has read it, which process 0 keeps in
  STAGE/inputs.json; empty on the others."""
  read, made = inputs.of_config(setup.config, name) | setup.read, {}
  failures.on_first(
    lambda: made.update(inputs.record(setup.workdir, name, identity(setup.config, name), read))
  )
  return made


def _elapsed(folder: files.Folder, seconds: float) -> float:
  """Seconds of all attempts at a stage, as far as its metrics tell: those before a restart are read
  from there."""
  path = folder / 'metrics.jsonl'
  if not path.exists():
    return seconds
  logged = metrics.read(path)
  steps, per_step = logged.get('step'), logged.get('time/step_seconds')
  if steps is None or per_step is None:
    return seconds
  return max(seconds, float(np.nansum(np.diff(steps, prepend=0) * per_step)))
