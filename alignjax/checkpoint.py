"""Checkpoints of a run in progress, and the final weights of a finished stage. Orbax does the writing.

    with Checkpoints(folder, config=identity) as saved:
      restored = saved.restore(abstract_state)          # (step, state) or None
      saved.save(step, state)                           # asynchronous

A checkpoint becomes visible by a rename once it is whole, so a process that is killed during a save leaves the one before.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from alignjax.models.axes import path_name
from alignjax.sharding import sync


class ConfigMismatch(ValueError):
  """The folder was written with another config."""


class Checkpoints:
  """The newest checkpoints of one run, under `directory`, with the config that made them beside them.

  Args:
    directory: a folder, made if missing.
    config: what decides the run's result, as JSON values. Another one than the folder's raises ConfigMismatch.
    keep: how many checkpoints stay.
  """

  def __init__(self, directory: str | os.PathLike, *, config: Mapping[str, Any], keep: int = 2):
    self.directory = pathlib.Path(directory).absolute()
    _check_config(self.directory / 'config.json', config)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
    self._manager = ocp.CheckpointManager(self.directory / 'steps', options=options,
                                          item_handlers=ocp.StandardCheckpointHandler())

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    self._manager.wait_until_finished()
    self._manager.close()

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: Any, wait: bool = False) -> None:
    """Starts to write `state`; wait=True returns when it is on disk."""
    self._manager.save(step, args=ocp.args.StandardSave(_savable(state)))
    if wait:
      self._manager.wait_until_finished()

  def restore(self, abstract_state: Any) -> tuple[int, Any] | None:
    """The newest readable checkpoint, on the shardings of abstract_state (a tree of jax.ShapeDtypeStruct); None without one.

    A damaged checkpoint is named and the one before it used. One of another architecture raises ValueError with the
    first leaves that differ.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        self._check_shapes(step, abstract_state)
        leaves = self._manager.restore(step, args=ocp.args.StandardRestore(_savable(abstract_state)))
      except _Mismatch as error:
        raise ValueError(f'{self.directory}: checkpoint {step} is of another model: {error}. Use another --workdir, or '
                         'delete the folder.') from None
      except Exception as error:  # noqa: BLE001 orbax raises many kinds for a damaged file
        print(f'WARNING: checkpoint {self.directory}/steps/{step} is damaged ({type(error).__name__}: '
              f'{str(error).splitlines()[0][:200] if str(error) else ""}); trying the one before.', flush=True)
        self._manager.delete(step)
        continue
      return step, _like(abstract_state, leaves)
    if steps:
      raise ValueError(f'{self.directory}: none of the checkpoints {steps} can be read; delete the folder to start again.')
    return None

  def _check_shapes(self, step: int, abstract_state: Any) -> None:
    saved = self._manager.item_metadata(step)
    found = {k: tuple(v.shape) for k, v in (saved.tree if hasattr(saved, 'tree') else saved).items()}
    wanted = {k: tuple(v.shape) for k, v in _savable(abstract_state).items()}
    wrong = [f'{k}: {found.get(k, "absent")} in the checkpoint, {wanted.get(k, "absent")} in the model'
             for k in sorted(found.keys() | wanted.keys()) if found.get(k) != wanted.get(k)]
    if wrong:
      raise _Mismatch('; '.join(wrong[:3]) + (f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''))


class _Mismatch(Exception):
  pass


def _savable(tree: Any) -> dict[str, Any]:
  """The leaves by path: what is saved does not depend on container types, and a message can name a leaf."""
  return {path_name(path).replace('/', '.'): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _like(tree: Any, leaves: Mapping[str, Any]) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path).replace('/', '.')], tree)


def save_params(directory: str | os.PathLike, params: Any, info: Mapping[str, Any]) -> None:
  """Writes the final weights and what the stage reports, whole or not at all."""
  directory = pathlib.Path(directory).absolute()
  partial = directory.with_name(directory.name + '.partial')
  if jax.process_index() == 0 and partial.exists():
    shutil.rmtree(partial)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(partial / 'params', _savable(params))
  if jax.process_index() == 0:
    (partial / 'info.json').write_text(json.dumps(info, indent=2))
    os.replace(partial, directory)
  sync(str(directory))


def load_params(directory: str | os.PathLike, abstract_params: Any) -> Any:
  """Weights of save_params onto the shardings of abstract_params. Errors name the folder and the leaves that differ."""
  directory = pathlib.Path(directory).absolute()
  with ocp.StandardCheckpointer() as checkpointer:
    saved = checkpointer.metadata(directory / 'params')
    saved = getattr(saved, 'item_metadata', saved)
    found = {k: tuple(v.shape) for k, v in (saved.tree if hasattr(saved, 'tree') else saved).items()}
    wanted = {k: tuple(v.shape) for k, v in _savable(abstract_params).items()}
    wrong = [f'{k}: {found.get(k, "absent")} on disk, {wanted.get(k, "absent")} in the model'
             for k in sorted(found.keys() | wanted.keys()) if found.get(k) != wanted.get(k)]
    if wrong:
      raise ValueError(f'{directory}: weights of another model: {"; ".join(wrong[:3])}. Does model or reward_model of the '
                       'config differ from the run that wrote them?')
    return _like(abstract_params, checkpointer.restore(directory / 'params', _savable(abstract_params)))


def load_info(directory: str | os.PathLike) -> dict[str, Any]:
  return json.loads((pathlib.Path(directory) / 'info.json').read_text())


def is_finished(directory: str | os.PathLike) -> bool:
  return (pathlib.Path(directory) / 'info.json').exists()


def _check_config(path: pathlib.Path, config: Mapping[str, Any]) -> None:
  config = json.loads(json.dumps(config))
  if not path.exists():
    if jax.process_index() == 0:
      path.parent.mkdir(parents=True, exist_ok=True)
      temporary = path.with_suffix('.tmp')
      temporary.write_text(json.dumps(config, indent=2))
      os.replace(temporary, path)
    return
  old, new = _flat(json.loads(path.read_text())), _flat(config)
  absent = '(absent)'
  wrong = [f'  {k}: {old.get(k, absent)!r} -> {new.get(k, absent)!r}' for k in sorted(old.keys() | new.keys())
           if old.get(k, absent) != new.get(k, absent)]
  if wrong:
    raise ConfigMismatch(f'{path.parent} was written with another config:\n' + '\n'.join(wrong[:20]) +
                         '\nUse another --workdir, set the old values, or delete the folder.')


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  if isinstance(tree, dict):
    return {k: v for name, child in tree.items() for k, v in _flat(child, f'{prefix}{name}.').items()}
  return {prefix.rstrip('.'): tree}


def same(a: Any, b: Any) -> bool:
  """Whether two trees of arrays are equal bit for bit."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
