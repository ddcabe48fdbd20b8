"""Checkpoints of a run in progress and the final weights of a finished stage, written by orbax.

    with Checkpoints(folder, config=identity) as saved:
      restored = saved.restore(abstract_state)          # (step, state) or None
      saved.save(step, state)                           # asynchronous

A checkpoint becomes visible by a rename once it is whole, so a process that is killed during a save
leaves the previous one. With its arrays it holds their checksums (runtime/checksums.py), which a
restore compares, because orbax does not notice every flipped bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from alignjax.models import lora
from alignjax.models.axes import path_name
from alignjax.runtime import checksums, files, fingerprints, saved_config
from alignjax.sharding import sync


def _beside_a_running_loop(function: Callable) -> Callable:
  """`function` in a thread of its own where this one runs an event loop, as in a notebook. Orbax
  starts a loop, and nests it only with a package that changes asyncio for the whole process."""

  @functools.wraps(function)
  def call(*args, **kwargs):
    try:
      asyncio.get_running_loop()
    except RuntimeError:
      return function(*args, **kwargs)
    with futures.ThreadPoolExecutor(1) as thread:
      return thread.submit(contextvars.copy_context().run, function, *args, **kwargs).result()

  return call


class Checkpoints:
  """The newest checkpoints of one run, under `directory`, with the config that made them beside
  them.

  Args:
    directory: a folder, which is created if it is missing.
    config: the entries that decide the run's result, as JSON values. If they differ from those of
      the folder, saved_config.Mismatch is raised.
    keep: how many checkpoints stay.
    logs: step -> {name: fingerprint} of the logs that lie beside the checkpoints (metrics.sums).
      They are saved with each checkpoint, and a restore warns of every name whose fingerprint has
      changed.
  """

  @_beside_a_running_loop
  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    config: Mapping[str, Any],
    keep: int = 2,
    logs: Callable[[int], Mapping[str, str]] | None = None,
  ):
    self.directory = files.absolute(directory)
    self._logs = logs if logs is not None and jax.process_index() == 0 else lambda step: {}
    saved_config.check(self.directory / 'config.json', config)
    steps = self.directory / 'steps'
    for path in steps.iterdir() if jax.process_index() == 0 and steps.exists() else ():
      # A killed save left it. Orbax's own removal would go on after an error of the run.
      if path.is_dir() and ocp.utils.is_tmp_checkpoint(path):
        files.remove(path)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=True, enable_async_checkpointing=True
    )
    self._manager = ocp.CheckpointManager(steps, options=options)
    self._saving: int | None = None

  def __enter__(self) -> Checkpoints:
    return self

  @_beside_a_running_loop
  def __exit__(self, kind, *_) -> None:
    try:
      self.wait()
    except OSError:
      if kind is None:  # Otherwise the first error is the one to show.
        raise
    finally:
      self._manager.close()

  @_beside_a_running_loop
  def latest_step(self) -> int | None:
    """The step of the newest checkpoint, or None."""
    return self._manager.latest_step()

  @_beside_a_running_loop
  def wait(self) -> None:
    """Returns when the last save is on disk. Raises OSError where it failed."""
    with self._explained():
      self._manager.wait_until_finished()

  @_beside_a_running_loop
  def save(self, step: int, state: Any, wait: bool = False) -> None:
    """Starts to write `state`; wait=True returns when it is on disk. Raises OSError where this
    save, or the previous one, failed."""
    leaves = _savable(state)
    self.wait()
    if step == self.latest_step():
      return  # A state is a function of its step, so that this one is on disk already.
    self._saving = step
    with self._explained():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(leaves),
          sums=ocp.args.JsonSave(checksums.describe(leaves)),
          logs=ocp.args.JsonSave(dict(self._logs(step))),
        ),
      )
    if wait:
      self.wait()

  @contextlib.contextmanager
  def _explained(self):
    try:
      yield
    except Exception as error:  # noqa: BLE001 orbax and tensorstore raise many kinds where a file cannot be written
      raise OSError(
        f'checkpoint {self._saving} could not be written to {self.directory} '
        f'({_first_line(error)}). Make room there '
        'or mend it; the same command goes on from the checkpoint before.'
      ) from error

  @_beside_a_running_loop
  def restore(self, abstract_state: Any) -> tuple[int, Any] | None:
    """The newest readable checkpoint as (step, state), or None where there is none.

    A damaged checkpoint is reported and moved to DIRECTORY/damaged, and the previous one is used.

    Args:
      abstract_state: a tree of jax.ShapeDtypeStruct with the shardings of the result.

    Raises:
      ValueError: the checkpoint is of another architecture, with the first leaves that differ; or
        none can be read.
    """
    wanted = _savable(abstract_state)
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        beside = self._manager.restore(
          step, args=ocp.args.Composite(sums=ocp.args.JsonRestore(), logs=ocp.args.JsonRestore())
        )
        sums = beside['sums']
        _check_arrays({k: (tuple(shape), dtype) for k, (shape, dtype, _) in sums.items()}, wanted)
        leaves = self._manager.restore(
          step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        )['state']
        _check_sums(leaves, sums)
      except _Mismatch as error:
        raise ValueError(
          f'{self.directory}: checkpoint {step} is of another model: {error}. Use another '
          '--workdir, or delete the folder.'
        ) from None
      except Exception as error:  # noqa: BLE001 orbax raises many kinds for a damaged file
        self._set_aside(step, error)
        continue
      self._compare_logs(step, beside['logs'])
      return step, _like(abstract_state, leaves)
    if steps:
      raise ValueError(
        f'{self.directory}: none of the checkpoints {steps} can be read; they are in '
        f'{self.directory / "damaged"}. The same command starts this stage again.'
      )
    return None

  def _compare_logs(self, step: int, logs: Mapping[str, str]) -> None:
    now = self._logs(step)
    if wrong := [
      self.directory.parent / name for name, was in logs.items() if now and now.get(name) != was
    ]:
      print(logs_changed(wrong, f'up to step {step}'), flush=True)

  def _set_aside(self, step: int, error: Exception) -> None:
    print(
      f'WARNING: checkpoint {self.directory}/steps/{step} is damaged ({type(error).__name__}: '
      f'{_first_line(error)}); moved to {self.directory}/damaged, trying the one before.',
      flush=True,
    )
    if jax.process_index() == 0:
      to = self.directory / 'damaged' / str(step)
      files.remove(to)
      to.parent.mkdir(exist_ok=True)
      files.move(self.directory / 'steps' / str(step), to)
    self._manager.reload()


def logs_changed(paths: Iterable[os.PathLike], when: str) -> str:
  """A warning that logs are no longer what was written."""
  return (
    f'WARNING: {" and ".join(map(str, paths))}: damaged or changed {when}; what is drawn from '
    'there may be wrong, the weights are not touched.'
  )


def _check_arrays(
  found: Mapping[str, tuple], wanted: Mapping[str, Any], place: str = 'in the checkpoint'
) -> None:
  """Compares shapes and dtypes. An array that is read as another dtype would not have the bits that
  its checksum was computed of."""
  wanted = {k: (tuple(v.shape), str(v.dtype)) for k, v in wanted.items()}

  def show(arrays, k):
    return '{1} {0}'.format(*arrays[k]) if k in arrays else 'absent'

  wrong = [
    f'{k}: {show(found, k)} {place}, {show(wanted, k)} in the model'
    for k in sorted(found.keys() | wanted.keys())
    if found.get(k) != wanted.get(k)
  ]
  if wrong:
    raise _Mismatch(
      '; '.join(wrong[:3]) + (f' and {len(wrong) - 3} more' if len(wrong) > 3 else '')
    )


def _check_sums(leaves: Mapping[str, jax.Array], sums: Mapping[str, list]) -> None:
  if wrong := checksums.different(leaves, sums):
    raise Damaged(
      f'checksums differ in {", ".join(wrong[:3])}'
      + (f' and {len(wrong) - 3} more' if len(wrong) > 3 else '')
    )


def _first_line(error: Exception) -> str:
  """The part of an error to show; of tensorstore's long errors, what the operating system
  reported."""
  said = re.search(r': ([^:\[]+) \[os_error_code', str(error))
  return said[1] if said else next(iter(str(error).splitlines()), '')[:200]


class Damaged(ValueError):
  """What was read is not what was written."""


class _Mismatch(Exception):
  pass


def _savable(tree: Any) -> dict[str, Any]:
  """The leaves by path. What is saved thus does not depend on container types, and a message can
  name a leaf."""
  return {
    path_name(path).replace('/', '.'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _like(tree: Any, leaves: Mapping[str, Any]) -> Any:
  return jax.tree_util.tree_map_with_path(
    lambda path, _: leaves[path_name(path).replace('/', '.')], tree
  )


@_beside_a_running_loop
def save_params(
  directory: str | os.PathLike,
  params: Any,
  info: Mapping[str, Any],
  made: Mapping[str, Any] | None = None,
) -> None:
  """Writes the final weights and what the stage reports, whole or not at all.

  Args:
    directory: the folder to write.
    params: the weights.
    info: what the stage reports, as JSON values.
    made: what the weights were made from (inputs.record). info.json holds it under 'made', with the
      fingerprint of the weights.

  Raises:
    OSError: the disk is full or read-only.
    ValueError: the weights are adapters, and info does not say what they belong to.
  """
  directory = files.absolute(directory)
  leaves = _savable(params)
  if 'lora' not in info and any(name.endswith(lora.LEAVES) for name in leaves):
    raise ValueError(
      f'{directory}: the weights are adapters, and nothing could load them, because info has no '
      "entry 'lora': the stage's finish has to return its info with Parts.info of the role "
      '(setup/adapters.py).'
    )
  # info.json is written last and makes the folder whole. On a disk the folder gets its name then;
  # in a bucket that would copy it.
  partial = (
    directory if files.is_bucket(directory) else directory.with_name(directory.name + '.partial')
  )
  try:
    if jax.process_index() == 0:
      files.remove(partial)
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(partial / 'params', leaves)
    sums = checksums.describe(leaves)
    if jax.process_index() == 0:
      (partial / 'sums.json').write_text(json.dumps(sums))
      (partial / 'info.json').write_text(
        _with_made(info, {**(made or {}), 'weights': fingerprints.of_value(sums)})
      )
      if partial != directory:
        files.remove(directory)  # A result without its info.json may exist.
        files.move(partial, directory)
  except Exception as error:  # noqa: BLE001 as in Checkpoints
    raise OSError(
      f'{directory} could not be written ({_first_line(error)}). Make room there or mend it; the '
      'same command goes on from the last checkpoint.'
    ) from error
  sync(str(directory))


@_beside_a_running_loop
def load_params(directory: str | os.PathLike, abstract_params: Any) -> Any:
  """The weights of save_params on the shardings of abstract_params.

  Raises:
    ValueError: the weights are of another model; the message names the leaves.
    Damaged: the folder is damaged.
  """
  directory = files.absolute(directory)
  wanted = _savable(abstract_params)
  if is_finished(directory):
    weights(directory)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      saved = checkpointer.metadata(directory / 'params')
      saved = getattr(saved, 'item_metadata', saved)
      _check_arrays(
        {k: (tuple(v.shape), str(v.dtype)) for k, v in getattr(saved, 'tree', saved).items()},
        wanted,
        'on disk',
      )
      leaves = checkpointer.restore(directory / 'params', wanted)
    _check_sums(leaves, json.loads((directory / 'sums.json').read_text()))
  except _Mismatch as error:
    raise ValueError(
      f'{directory}: weights of another model: {error}. Does model or reward_model of the '
      'config differ from the run that wrote them?'
    ) from None
  except Exception as error:  # noqa: BLE001 orbax raises many kinds for a damaged file
    raise Damaged(
      f'{directory} is damaged ({type(error).__name__}: {_first_line(error)}). Delete it, and the '
      'run that wrote it makes it again from its last checkpoint.'
    ) from error
  return _like(abstract_params, leaves)


def load_info(directory: str | os.PathLike) -> dict[str, Any]:
  """What a stage reports (save_params). Raises Damaged where the file is not what was written."""
  path = files.folder(directory) / 'info.json'
  try:
    info = json.loads(path.read_bytes())
    made = dict(info.get('made', {}))
    if made and made.pop('checksum', None) != fingerprints.of_value(info | {'made': made}):
      raise ValueError('its checksum differs')
  except (ValueError, AttributeError, TypeError, OSError) as error:
    raise Damaged(
      f'{path} is damaged ({error}). Delete {path.parent}, and the run that wrote it makes it '
      'again from its last checkpoint.'
    ) from None
  return info | ({'made': made} if made else {})


def save_made(directory: str | os.PathLike, made: Mapping[str, Any]) -> None:
  """Replaces 'made' in the info.json of a finished stage."""
  info = load_info(directory)
  files.write(
    files.folder(directory) / 'info.json',
    _with_made(info, {**made, 'weights': info['made']['weights']}),
  )


def _with_made(info: Mapping[str, Any], made: Mapping[str, Any]) -> str:
  whole = json.loads(json.dumps({**info, 'made': dict(made)}))
  whole['made']['checksum'] = fingerprints.of_value(whole)
  return json.dumps(whole, indent=2)


def weights(directory: str | os.PathLike) -> str:
  """The fingerprint of final weights, from their checksums. It is the same on every mesh. Raises
  Damaged where sums.json is not what was written."""
  directory = files.folder(directory)
  info, path = load_info(directory), directory / 'sums.json'
  advice = f'Delete {directory}, and the run that wrote it makes it again from its last checkpoint.'
  try:
    found = fingerprints.of_value(json.loads(path.read_bytes()))
  except (ValueError, OSError) as error:
    raise Damaged(f'{path} is damaged or missing ({error}). {advice}') from None
  if 'made' in info and info['made']['weights'] != found:
    raise Damaged(f'{path} is damaged: it is not what info.json says. {advice}')
  return found


def is_finished(directory: str | os.PathLike) -> bool:
  """Whether a folder holds final weights."""
  return (files.folder(directory) / 'info.json').exists()


def same(a: Any, b: Any) -> bool:
  """Whether two trees of arrays are equal bit for bit."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
