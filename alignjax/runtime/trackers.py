"""Experiment trackers: W&B, Trackio, MLflow, or one of a user's own.

config.tracker names the tracker: 'none', 'wandb', 'trackio', 'mlflow', or the 'module:function' of
a user's. config.tracker_project is the project (in MLflow: the experiment) that the runs belong to.

Every stage is one run of the tracker, named WORKDIR/STAGE and grouped by WORKDIR; in W&B the stage
is the job type. Stages are separate runs because each counts its steps from 1, has its own config,
and may be done again alone: so the SFT stages of two work directories lie over each other in a
chart, and a filter such as `config.stages.sft.batch_size` finds them. With one run for all stages,
their steps would overlap and W&B, which takes steps in increasing order only, would drop most of
them.

A tracker is a function

    start(project: str, folder: files.Folder, config: dict, run: str | None) -> run

of the project, the stage's folder WORKDIR/STAGE, the config entries that decide the stage's result
(train.identity), and the id of the run to go on with, None for a new one. The object that it
returns has

    id: str                        by which `start` finds this run again
    log(step: int, values: dict)   finite numbers by their names, in increasing order of steps
    finish(status: str)            'finished', 'stopped' (the same command goes on) or 'failed'

All of it is called on process 0, in a thread of its own. What it raises is said once and ends
nothing.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import math
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from alignjax import plugins
from alignjax.runtime import files
from alignjax.runtime.tracker_packages import STARTS

KEPT = 'tracker.json'  # in the stage's folder
PATIENCE = {
  'finished': 30.0,
  'failed': 30.0,
  'stopped': 5.0,
}  # seconds for what is still to be sent
HELP = {
  'wandb': 'Log in by `wandb login`, or set WANDB_MODE=offline and call `wandb sync` later.',
  'trackio': 'Without TRACKIO_SPACE_ID and TRACKIO_SERVER_URL, Trackio needs no network.',
  'mlflow': 'MLFLOW_TRACKING_URI names the server or the local store.',
}


class Tracker(NamedTuple):
  """What the config says. name: as there. start: the function."""

  name: str
  project: str
  start: Callable


def of_config(config: Any) -> Tracker | None:
  """The tracker that the config names, None where it names none. ValueError for a name that is not
  known and for a package that is not installed."""
  name, project = config.get('tracker') or 'none', config.get('tracker_project') or 'alignjax'
  if not isinstance(name, str) or not isinstance(project, str):
    raise ValueError(f'tracker={name!r} and tracker_project={project!r} must be text.')
  if name == 'none':
    return None
  if ':' in name:
    start = plugins.find(name, 'tracker')
    try:
      inspect.signature(start).bind(project, 'folder', {}, None)
    except TypeError as error:
      raise ValueError(
        f'tracker={name!r}: the function is called as start(project, folder, config, run), which '
        f'it does not take ({error}).'
      ) from None
    return Tracker(name, project, start)
  if name not in STARTS:
    near = difflib.get_close_matches(name, ['none', *STARTS], 1)
    hint = f'Did you mean {near[0]!r}? ' if near else ''
    raise ValueError(
      f"tracker={name!r} is not known. {hint}It is 'none', {', '.join(map(repr, STARTS))} or the "
      "'module:function' of your own tracker."
    )
  found = importlib.util.find_spec(name)
  if found is None or found.origin is None:  # W&B's folder ./wandb is importable, but no package
    raise ValueError(
      f"tracker={name!r} needs the package {name}: pip install 'alignjax[{name}]', or set "
      "tracker='none'."
    )
  return Tracker(name, project, STARTS[name])


class Sender:
  """Hands rows of metrics to a tracker in a thread, so that training never waits for it.

  FOLDER/tracker.json keeps, for each tracker and project, the id of the run and the last step that
  it was given. A resumed stage goes on in that run: rows that the run has are not sent again, and
  those that it has not, for which the tracker failed or was not yet named, are sent first.

  Args:
    folder: the stage's.
    config: for the tracker to show.
    rows: of an earlier start of the stage, in the order of their steps: each has 'step' and
      numbers by their names, None for what was not finite.
  """

  def __init__(
    self,
    tracker: Tracker,
    folder: files.Folder,
    config: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]] = (),
  ):
    self._tracker, self._folder, self._config = tracker, files.absolute(folder), config
    self._rows: queue.SimpleQueue = queue.SimpleQueue()
    self._complained = False
    for row in rows:
      self._rows.put(row)
    self._thread = threading.Thread(target=self._work, name='tracker', daemon=True)
    self._thread.start()

  def send(self, row: Mapping[str, Any]) -> None:
    if self._thread.is_alive():  # else it could not start
      self._rows.put(row)

  def close(self, status: str) -> None:
    """Waits a little while for what is still to be sent. status: as of a run's `finish`."""
    self._rows.put(status)
    self._thread.join(PATIENCE[status])
    if self._thread.is_alive():
      self._complain(f'it has not taken all metrics within {PATIENCE[status]:g} s')

  def _work(self) -> None:
    try:
      kept = _read(self._folder)
      key = f'{self._tracker.name} {self._tracker.project}'
      old = kept.get(key, {})
      run = self._tracker.start(
        self._tracker.project, self._folder, dict(self._config), old.get('run')
      )
      sent = old.get('sent', 0) if run.id == old.get('run') else 0
      self._keep(kept | {key: dict(run=run.id, sent=sent)})
    except (Exception, SystemExit) as error:  # noqa: BLE001 a tracker may raise anything
      self._complain(error)
      return
    waiting: list[Mapping[str, Any]] = []
    status = None
    while status is None:
      item = self._rows.get()
      if isinstance(item, str):
        status = item
      elif item['step'] > sent:
        waiting.append(item)
      try:
        while waiting:
          run.log(waiting[0]['step'], _finite(waiting[0]))
          sent = waiting.pop(0)['step']
          self._keep(kept | {key: dict(run=run.id, sent=sent)})
      except (Exception, SystemExit) as error:  # noqa: BLE001 it may work again with the next row
        self._complain(error)
    try:
      run.finish(status)
    except (Exception, SystemExit) as error:  # noqa: BLE001
      self._complain(error)

  def _keep(self, runs: Mapping[str, Any]) -> None:
    files.write(self._folder / KEPT, json.dumps(runs))

  def _complain(self, why: BaseException | str) -> None:
    """Says it the first time."""
    if self._complained:
      return
    self._complained = True
    words = why if isinstance(why, str) else f'{type(why).__name__}: {why}'.rstrip(': ')
    print(
      f'{self._folder.name}: the tracker {self._tracker.name} failed: {words.rstrip(".")}. The run '
      f'goes on without it, and metrics.jsonl in {self._folder} has all metrics. '
      f'{HELP.get(self._tracker.name, "Mend the function.")} If this command is started again '
      "before the stage has ended, the tracker gets what it lacks; tracker='none' turns it off.",
      flush=True,
    )


def _read(folder: files.Folder) -> dict[str, dict[str, Any]]:
  """FOLDER/tracker.json; empty where there is none, or none that can be read, which starts a new
  run."""
  try:
    found = json.loads((folder / KEPT).read_bytes())
    return {key: dict(run=value['run'], sent=int(value['sent'])) for key, value in found.items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return {}


def _finite(row: Mapping[str, Any]) -> dict[str, float]:
  return {k: v for k, v in row.items() if k != 'step' and v is not None and math.isfinite(v)}
