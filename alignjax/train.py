"""The loop: build, restore, step, log, save. Knows no algorithm; a stage (stages/setup.py: Stage) brings that.

    train.main(config, workdir)

runs config.stages_to_run and, before them, the stages that they start from, each in WORKDIR/<stage>; finished ones are
reused. A run that was stopped at any point goes on from its last checkpoint and ends with the same bits.
"""

from __future__ import annotations

import json
import pathlib
import signal
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from alignjax import checkpoint, metrics, plugins
from alignjax.stages.setup import Setup, for_stage, make_setup


def main(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> None:
  """Runs config.stages_to_run with their prerequisites, then the report if config.report names one."""
  setup = make_setup(config, pathlib.Path(workdir))
  order = resolve(config)
  builders = {name: plugins.find(config.stages[name].build, f'stages.{name}.build') for name in order}
  for name, builder in builders.items():
    plugins.find(f'{builder.__module__}:check', f'stages.{name}.build')(setup, name)
  report = plugins.find(config.report.build, 'report.build')
  plugins.find(f'{report.__module__}:check', 'report.build')(setup)
  for name in order:
    run_stage(for_stage(setup, name), name, builders[name])
  if config.report.policies and all(finished(setup, n) for n in config.report.policies.values() if n in config.stages):
    report(setup)


def resolve(config: ml_collections.ConfigDict) -> list[str]:
  """Stages to run, prerequisites first: those that a stage's init or policies name as 'stage:NAME'."""
  order: list[str] = []

  def visit(name: str, path: tuple[str, ...]):
    if name in path:
      raise ValueError(f'stages start from each other in a circle: {" -> ".join((*path, name))}.')
    if name not in config.stages:
      raise ValueError(f'stage {name!r} is not in config.stages: {sorted(config.stages)}.')
    for spec in _strings(config.stages[name].to_dict()):
      if spec.startswith('stage:'):
        visit(spec.removeprefix('stage:'), (*path, name))
    if name not in order:
      order.append(name)

  for target in config.stages_to_run:
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
  """What decides a stage's result: its own config and the shared parts. How often it logs and saves does not, nor which
  candidates it keeps."""
  config = config.to_dict()
  stage = {k: v for k, v in config['stages'][name].items() if k not in ('log_every', 'save_every', 'keep_candidates')}
  return {k: config[k] for k in ('seed', 'world', 'data', 'model', 'reward_model')} | {'stages': {name: stage}}


def finished(setup: Setup, name: str) -> bool:
  return checkpoint.is_finished(setup.workdir / name / 'final')


def run_stage(setup: Setup, name: str, builder) -> None:
  """One stage from its last checkpoint, or its start, to its end."""
  folder = setup.workdir / name
  cfg = setup.config.stages[name]
  main_process = jax.process_index() == 0
  with checkpoint.Checkpoints(folder / 'checkpoints', config=identity(setup.config, name)) as saved:
    if finished(setup, name):
      say(f'{name}: finished before, reused ({folder})')
      return
    say(f'{name}: start')
    began = time.perf_counter()
    stage = builder(setup, name)
    state, first = stage.state, 0
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored = saved.restore(abstract)
    if restored is not None:
      first, state = restored
      say(f'{name}: goes on from step {first} of {stage.num_steps}')
    built = time.perf_counter()
    with (metrics.Writer(folder, start_step=first, active=main_process) as writer,
          metrics.Progress(stage.num_steps, initial=first, name=name, active=main_process) as progress,
          Interrupt() as interrupt):
      state = loop(stage, state, first, cfg, saved, writer, progress, interrupt, folder)
    params, info = stage.finish(state)
    seconds = _elapsed(folder, time.perf_counter() - began)
    checkpoint.save_params(folder / 'final', params, info | {'seconds': seconds, 'steps': stage.num_steps})
    say(f'{name}: done in {seconds:.0f} s (data and model {built - began:.0f} s)')


def loop(stage, state, first: int, cfg, saved, writer, progress, interrupt, folder: pathlib.Path):
  """Steps first..num_steps. A checkpoint every save_every steps and when interrupted."""
  candidates = candidate_steps(stage.num_steps, cfg.get('keep_candidates'))
  last_time, last_step = time.perf_counter(), first
  for i in range(first, stage.num_steps):
    state, measured, seen = stage.step(state, stage.batch(i))
    done = i + 1
    if done % cfg.log_every == 0 or done == stage.num_steps:
      values = {k: float(v) for k, v in jax.device_get(measured).items()}
      metrics.check_finite(values, done)
      samples: list = []
      if stage.observe is not None:
        more, samples = stage.observe(i, state, seen)
        values |= more
      now = time.perf_counter()
      values['time/step_seconds'] = (now - last_time) / (done - last_step)
      values['time/tokens_per_second'] = stage.tokens_per_step / values['time/step_seconds']
      last_time, last_step = now, done
      writer.write(done, values)
      progress.update(done, values)
      if samples and (done % (cfg.log_every * 10) == 0 or done == stage.num_steps):
        _keep_samples(folder / 'samples.jsonl', done, samples[:8])
        progress.table(f'step {done}', ('prompt', 'response', 'score', 'gold'), samples[:4])
    else:
      progress.update(done)
    if done in candidates:
      keep_candidate(stage, state, done, folder)
    if cfg.save_every and done % cfg.save_every == 0 and done < stage.num_steps or interrupt.asked:
      saved.save(done, state, wait=interrupt.asked)
      if interrupt.asked:
        say(f'stopped by {interrupt.asked} at step {done}; the same command goes on from there')
        raise SystemExit(Interrupt.EXIT_CODE)
  return state


def candidate_steps(num_steps: int, count: int | None) -> list[int]:
  """The steps before the last after which one of `count` evenly spaced candidates is kept; the last one is the stage's result."""
  return sorted({round(num_steps * i / count) for i in range(1, count)} - {0, num_steps}) if count else []


def keep_candidate(stage, state, step: int, folder: pathlib.Path) -> None:
  """Writes FOLDER/candidates/STEP: what the stage would have ended with here, for stages/selection.py to choose from."""
  path = folder / 'candidates' / str(step)
  if not checkpoint.is_finished(path):  # there already where a run that was stopped repeats steps
    params, info = stage.finish(state)
    checkpoint.save_params(path, params, info | {'steps': step})


class Interrupt:
  """Notes SIGTERM and Ctrl-C, so that the loop saves after the current step and exits with EXIT_CODE."""

  EXIT_CODE = 75  # EX_TEMPFAIL: run the same command again

  def __init__(self):
    self.asked: str | None = None

  def __enter__(self):
    def note(number, frame):
      if self.asked:
        raise KeyboardInterrupt
      self.asked = signal.Signals(number).name

    try:
      self._before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: whoever runs us handles signals
      self._before = {}
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)


def _keep_samples(path: pathlib.Path, step: int, rows: list) -> None:
  if jax.process_index():
    return
  with path.open('a') as file:
    for row in rows:
      file.write(json.dumps({'step': step, 'prompt': row[0], 'response': row[1], 'score': row[2], 'gold': row[3]}) + '\n')


def _elapsed(folder: pathlib.Path, seconds: float) -> float:
  """Seconds of all attempts at a stage, as far as its metrics tell: those before a restart are read from there."""
  path = folder / 'metrics.jsonl'
  if not path.exists():
    return seconds
  logged = metrics.read(path)
  steps, per_step = logged.get('step'), logged.get('time/step_seconds')
  if steps is None or per_step is None:
    return seconds
  return max(seconds, float(np.nansum(np.diff(steps, prepend=0) * per_step)))


def say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)
