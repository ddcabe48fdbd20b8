"""W&B, Trackio and MLflow as trackers; runtime/trackers.py says what a tracker is. A package is
imported when its tracker starts."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from alignjax.runtime import files


class _Wandb:
  def __init__(self, run: Any):
    self._run, self.id = run, run.id

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def finish(self, status: str) -> None:
    if status == 'stopped':
      self._run.mark_preempting()
    self._run.finish(exit_code=0 if status == 'finished' else 1)


def start_wandb(
  project: str, folder: files.Folder, config: dict[str, Any], run: str | None
) -> _Wandb:
  """W&B's own variables hold: WANDB_MODE, WANDB_ENTITY, WANDB_DIR, ... Its files go to the stage's
  folder unless WANDB_DIR says otherwise, and to ./wandb where that folder is a bucket. With
  WANDB_MODE=offline, a resumed run writes a second folder of the same id, which `wandb sync
  --append` adds to the first one.

  Raises:
    ValueError: nobody is logged in. W&B would ask in the terminal, and the answer would be waited
      for while training goes on.
  """
  import wandb

  if wandb.setup().settings.mode in (None, 'online', 'run') and not wandb.login(
    prompt=False, verify=False
  ):
    raise ValueError('nobody is logged in to W&B.')
  place = None if files.is_bucket(folder) or os.environ.get('WANDB_DIR') else str(folder)
  return _Wandb(
    wandb.init(
      project=project,
      name=f'{folder.parent.name}/{folder.name}',
      group=folder.parent.name,
      job_type=folder.name,
      id=run,
      resume='allow',
      config=config,
      dir=place,
      reinit='create_new',
      settings=wandb.Settings(console='off'),  # the command's output stays as it is
    )
  )


class _Trackio:
  def __init__(self, run: Any):
    self._run, self.id = run, run.name

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def finish(self, status: str) -> None:
    self._run.finish()


def start_trackio(
  project: str, folder: files.Folder, config: dict[str, Any], run: str | None
) -> _Trackio:
  """A local store, or what TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names. Trackio finds a run by its
  name, which therefore ends with random digits."""
  import trackio

  return _Trackio(
    trackio.init(
      project=project,
      name=run or f'{folder.parent.name}/{folder.name}-{secrets.token_hex(3)}',
      group=folder.parent.name,
      config=config,
      resume='allow',
      embed=False,
    )
  )


class _MLflow:
  def __init__(self, client: Any, run: str):
    self._client, self.id = client, run

  def log(self, step: int, values: Mapping[str, float]) -> None:
    from mlflow.entities import Metric
    from mlflow.utils.time import get_current_time_millis

    now = get_current_time_millis()
    self._client.log_batch(self.id, [Metric(k, v, now, step) for k, v in values.items()])

  def finish(self, status: str) -> None:
    ends = {'finished': 'FINISHED', 'stopped': 'KILLED', 'failed': 'FAILED'}
    self._client.set_terminated(self.id, ends[status])


def start_mlflow(
  project: str, folder: files.Folder, config: dict[str, Any], run: str | None
) -> _MLflow:
  """The server or the store that MLFLOW_TRACKING_URI names, MLflow's local default without it. The
  entries of the config become parameters, their values cut at MLflow's limit of length."""
  from mlflow import MlflowClient
  from mlflow.entities import Param
  from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

  client = MlflowClient()
  if run is not None:
    client.update_run(run, 'RUNNING')
    return _MLflow(client, run)
  found = client.get_experiment_by_name(project)
  experiment = found.experiment_id if found else client.create_experiment(project)
  made = client.create_run(
    experiment,
    tags={'workdir': folder.parent.name, 'stage': folder.name},
    run_name=f'{folder.parent.name}/{folder.name}',
  ).info.run_id
  params = [Param(k, str(v)[:MAX_PARAM_VAL_LENGTH]) for k, v in _leaves(config, '')]
  for i in range(0, len(params), MAX_PARAMS_TAGS_PER_BATCH):
    client.log_batch(made, params=params[i : i + MAX_PARAMS_TAGS_PER_BATCH])
  return _MLflow(client, made)


def _leaves(tree: Any, path: str) -> Iterable[tuple[str, Any]]:
  """(path, value) of every entry that is no dict, paths like 'stages.sft.batch_size'."""
  if not isinstance(tree, Mapping):
    yield path, tree
    return
  for key, child in tree.items():
    yield from _leaves(child, f'{path}.{key}'.lstrip('.'))


STARTS = {'wandb': start_wandb, 'trackio': start_trackio, 'mlflow': start_mlflow}
