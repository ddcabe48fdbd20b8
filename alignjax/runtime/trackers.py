"""Experiment trackers: W&B, Trackio, MLflow, or one of a user's own.

config.tracker names the tracker: 'none', 'wandb', 'trackio', 'mlflow', or a user's own function as
'module:function'. config.tracker_project is the project (in MLflow: the experiment) that the runs
belong to.

Every stage is one run of the tracker, named WORKDIR/STAGE and grouped by WORKDIR; in W&B the stage
is the job type. Stages are separate runs because each counts its steps from 1, has its own config,
and may be trained again alone. A chart can therefore show the SFT stages of two work directories
over each other, and a filter such as `config.stages.sft.batch_size` finds them. In one run for all
stages the steps would overlap, and W&B, which accepts steps in increasing order only, would drop
most of them.

A tracker is a function

    start(project: str, folder: files.Folder, config: dict, run: str | None) -> run

It receives the project, the stage's folder WORKDIR/STAGE, the config entries that decide the
stage's result (train.identity), and the id of the run to resume, or None for a new run. The object
that it returns has

    id: str                        the id by which `start` finds this run again
    log(step: int, values: dict)   receives finite numbers by name, in increasing order of steps
    finish(status: str)            receives 'finished', 'stopped' (the same command goes on) or
                                   'failed'

All of them are called on process 0, in a thread of their own. The first exception is printed, and
none ends the run.
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

KEPT = 'tracker.json'  # The file in the stage's folder.
# The seconds to wait, at the end, for metrics that have not been sent yet.
PATIENCE = {'finished': 30.0, 'failed': 30.0, 'stopped': 5.0}
HELP = {
  'wandb': 'Log in by `wandb login`, or set WANDB_MODE=offline and call `wandb sync` later.',
  'trackio': 'Without TRACKIO_SPACE_ID and TRACKIO_SERVER_URL, Trackio needs no network.',
  'mlflow': 'MLFLOW_TRACKING_URI names the server or the local store.',
}


class Tracker(NamedTuple):
  """The tracker that the config names.

  Attributes:
    name: the entry `tracker` of the config.
    project: the entry `tracker_project`.
    start: the function that starts or resumes a run.
  """

  name: str
  project: str
  start: Callable


def of_config(config: Any) -> Tracker | None:
  """Returns the tracker that the config names, or None for 'none'.

  Raises:
    ValueError: the name is not known, or its package is not installed.
  """
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

  For each tracker and project, FOLDER/tracker.json keeps the id of the run and the last step that
  was sent to it. A resumed stage goes on in that run. Rows that the run has are not sent again;
  rows that it lacks, because the tracker failed or the config did not name it yet, are sent first.

  Args:
    tracker: the tracker to send to.
    folder: the folder of the stage.
    config: the entries that the tracker shows.
    rows: the metrics of earlier starts of the stage, in the order of their steps. Each has 'step'
      and numbers by name, with None for a number that was not finite.
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
    if self._thread.is_alive():  # It has ended if the tracker could not start.
      self._rows.put(row)

  def close(self, status: str) -> None:
    """Waits for the metrics that have not been sent yet, for a limited time. status: see `finish`
    above."""
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
    """Prints the first error of the tracker."""
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
  """Returns the contents of FOLDER/tracker.json. They are empty if the file is missing or cannot be
  read, and then a new run starts."""
  try:
    found = json.loads((folder / KEPT).read_bytes())
    return {key: dict(run=value['run'], sent=int(value['sent'])) for key, value in found.items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return {}


def _finite(row: Mapping[str, Any]) -> dict[str, float]:
  return {k: v for k, v in row.items() if k != 'step' and v is not None and math.isfinite(v)}
