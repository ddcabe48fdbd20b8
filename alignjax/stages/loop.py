"""The loop of a stage: step, log, keep candidates, save checkpoints, stop where something ends the
run. It knows no algorithm."""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from alignjax.compiler import flops
from alignjax.runtime import checkpoint, failures, files, metrics, trace
from alignjax.runtime.interrupt import Interrupt, on_any_process
from alignjax.setup.records import say
from alignjax.stages.stage import Stage
from alignjax.types import TrainState


class Run(NamedTuple):
  """What surrounds the loop of a stage.

  Attributes:
    config: the whole config; the stage has its entries under the name of the folder.
    folder: the folder of the stage.
    made: what the stage was made from (record).
    saved: the checkpoints.
    writer, progress: where metrics and samples go.
    interrupt: notes signals.
    tracer: profiles some of the steps.
  """

  config: ml_collections.ConfigDict
  folder: files.Folder
  made: dict
  saved: checkpoint.Checkpoints
  writer: metrics.Writer
  progress: metrics.Progress
  interrupt: Interrupt
  tracer: trace.Tracer


def loop(stage: Stage, state: TrainState, first: int, run: Run) -> TrainState:
  """Does the steps from `first` to stage.num_steps and returns the last state. A checkpoint is
  saved every `save_every` steps, and when something ends the run."""
  cfg = run.config.stages[run.folder.name]
  candidates = candidate_steps(stage.num_steps, cfg.get('keep_candidates'))
  last_time, last_step = time.perf_counter(), first
  batch = stage.batch(first) if first < stage.num_steps else None
  skipped = np.asarray(state.skipped)
  for i in range(first, stage.num_steps):
    done = i + 1
    with run.tracer.step(done):
      state, measured, seen = stage.step(state, batch)
      # The next batch is read while the device works; state.skipped waits for the device.
      following = stage.batch(done) if done < stage.num_steps else None
      before, skipped = skipped, np.asarray(state.skipped)
    asked, failed = on_any_process(run.interrupt.asked is not None, bool(stage.failures))
    if failed:
      failures.stop_for_failed_host(run.saved, i, first, state, before, stage.failures)
    if skipped[0] and not before[0]:
      say(
        f'{run.folder.name}: step {done}: an update was skipped, its loss or gradient was not '
        f'finite; optim/skipped counts them'
      )
    if skipped[1] >= run.config.max_bad_updates:
      failures.stop_for_bad_updates(
        run.saved, run.folder, done, state, batch, seen, jax.device_get(measured)
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
      seconds = (now - last_time) / (done - last_step)
      values |= {'optim/skipped': float(skipped[0]), 'time/step_seconds': seconds}
      values |= flops.metrics(flops.mean(map(stage.work, range(last_step, done))), seconds)
      last_time, last_step = now, done
      log(run, done, stage.num_steps, values, samples)
    else:
      run.progress.update(done)
    if done in candidates:
      keep_candidate(stage, state, done, run.folder, run.made)
    if asked:
      signal = run.interrupt.asked or 'a signal to another process'
      failures.stop_for_signal(run.saved, done, state, signal)
    if cfg.save_every and done % cfg.save_every == 0 and done < stage.num_steps:
      run.saved.save(done, state)
    batch = following
  return state


def log(run: Run, done: int, num_steps: int, values: dict[str, float], samples: list) -> None:
  """Writes and shows the metrics of a step; samples only at every tenth logged step and the
  last."""
  run.writer.write(done, values)
  run.progress.update(done, values)
  every = run.config.stages[run.folder.name].log_every * 10
  if samples and (done % every == 0 or done == num_steps):
    run.writer.samples(done, samples[:8])
    run.progress.table(f'step {done}', ('prompt', 'response', 'score', 'gold'), samples[:4])


def candidate_steps(num_steps: int, count: int | None) -> list[int]:
  """The steps after which a candidate is kept: `count` of them, evenly spaced, without the last,
  which is the result of the stage."""
  if not count:
    return []
  return sorted({round(num_steps * i / count) for i in range(1, count)} - {0, num_steps})


def keep_candidate(
  stage: Stage, state: TrainState, step: int, folder: files.Folder, made: dict
) -> None:
  """Writes FOLDER/candidates/STEP, which is what the stage would have ended with here;
  stages/selection.py chooses among the candidates."""
  path = folder / 'candidates' / str(step)
  there = (
    jax.process_index() == 0
    and checkpoint.is_finished(path)
    and (checkpoint.load_info(path).get('made', {}).get('origin') == made['origin'])
  )
  if on_any_process(there)[0]:
    return  # A run that was stopped repeats some steps.
  params, info = stage.finish(state)
  checkpoint.save_params(path, params, info | {'steps': step}, made)
