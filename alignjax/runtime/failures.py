"""What ends a run in its loop with as little loss as possible: updates that are not finite,
functions on the host that fail, a folder that cannot be written. Every message says what to do
next."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from alignjax.models.axes import path_name
from alignjax.runtime import files
from alignjax.runtime.interrupt import EXIT_CODE, on_any_process
from alignjax.sharding import fetch

TRACEBACK = 'traceback.txt'  # the error that ended the last run, in its workdir


class StepFailed(RuntimeError):
  """A step could not be done. The message says why, and from where the same command goes on."""


def check_writable(folder: files.Folder, flag: str = '--workdir') -> None:
  """Raises OSError, before any work, where a folder cannot be created or written. flag: the flag
  that named it."""
  probe = folder / f'.writable.{jax.process_index()}'
  try:
    if not files.is_bucket(folder):
      folder.mkdir(parents=True, exist_ok=True)
    probe.write_text('')
    probe.unlink()
  except Exception as error:
    # gcsfs and Google's own packages raise many kinds of errors for buckets.
    if not files.is_bucket(folder) and not isinstance(error, OSError):
      raise
    login = ', or see to the credentials (gcloud auth application-default login)' * files.is_bucket(
      folder
    )
    why = getattr(error, 'strerror', None) or error
    raise OSError(f'cannot write to {folder} ({why}); use another {flag}{login}.') from error


def on_first(action: Callable[[], None]) -> None:
  """Runs an action on process 0 while all processes wait. If it raises there, every process ends,
  and the output of process 0 says why."""
  error = None
  if jax.process_index() == 0:
    try:
      action()
    except Exception as e:  # noqa: BLE001 whatever it is, the others must not wait
      error = e
  (failed,) = on_any_process(error is not None)
  if error is not None:
    raise error
  if failed:
    raise SystemExit('error: process 0 ended this run; its output says why.')


def stop_for_bad_updates(
  saved, folder: files.Folder, step: int, state: Any, batch: Any, seen: Any, values: dict
) -> None:
  """Saves the batch and what the step made of it for inspection, saves the state (whose parameters
  are all finite), and raises FloatingPointError."""
  path = folder / 'bad_batch.npz'
  arrays = {
    f'{name}/{path_name(at)}'.rstrip('/'): leaf
    for name, tree in (('batch', batch), ('seen', seen))
    for at, leaf in jax.tree_util.tree_leaves_with_path(fetch(tree))
  }
  if jax.process_index() == 0:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    files.write(path, buffer.getvalue())
  saved.save(step, state, wait=True)
  bad = ', '.join(f'{name}={value}' for name, value in values.items() if not np.isfinite(value))
  raise FloatingPointError(
    f'step {step}: {int(np.asarray(state.skipped)[1])} updates in a row had a loss or gradient '
    f'that was not finite and were skipped ({bad}). The batch is in {path}, the last finite '
    f'parameters in checkpoint {step}. JAX_DEBUG_NANS=1 names the operation; a lower learning rate '
    'or clip_norm (optimizer.*) may help; --config.max_bad_updates lets more pass.'
  )


def stop_for_failed_host(
  saved, step: int, first: int, state: Any, skipped: np.ndarray, why: list[str]
) -> None:
  """Saves the state from before step `step` (0-based) and raises StepFailed. The scores of a
  function on the host that failed are NaN, so that every update of the step was skipped and only
  its counters have moved."""
  if step > first:

    def put(value, like):
      return jax.device_put(np.asarray(value, like.dtype), like.sharding)

    saved.save(
      step,
      state.replace(step=put(step, state.step), skipped=put(skipped, state.skipped)),
      wait=True,
    )
  message = why[0] if why else 'a function on the host of another process failed; see its output.'
  raise StepFailed(
    f'step {step + 1}: {message} Nothing of the {step} steps before is lost: mend it, and the '
    f'same command goes on.'
  )


def stop_for_signal(saved, step: int, state: Any, name: str) -> None:
  """Saves the state and ends the process with EXIT_CODE."""
  saved.save(step, state, wait=True)
  if jax.process_index() == 0:
    print(f'stopped by {name} at step {step}; the same command goes on from there', flush=True)
  raise SystemExit(EXIT_CODE)
