"""Finds the files of a checkpoint, in a folder or on the Hugging Face hub, and verifies that an
export is what was written."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re

SUMS = 'SHA256SUMS'
HUB_SECONDS = 10  # the time limit of an answer of the hub


def folder_of(name: str | os.PathLike) -> pathlib.Path:
  """The local folder of a checkpoint: a path, or a name on the hub, which is downloaded without
  pickles and code.

  Raises:
    FileNotFoundError: there is no such folder, and the hub has no such model.
  """
  text = str(name)
  try:
    path = pathlib.Path(text).expanduser()
  except RuntimeError as error:  # ~ of nobody
    raise FileNotFoundError(f'hf:{text}: no such folder ({error}).') from None
  if not text.strip():
    raise FileNotFoundError("hf: names no checkpoint; write 'hf:FOLDER_OR_HUB_NAME'.")
  if path.is_dir():
    return path
  if os.path.lexists(path):
    raise FileNotFoundError(
      f'hf:{text}: {path} is a file; name the folder that holds config.json and model.safetensors.'
    )
  model = text.rstrip('/')
  if not re.fullmatch(r'\w[\w.-]*(/\w[\w.-]*)?', model):
    raise FileNotFoundError(f'hf:{text}: no such folder ({path.absolute()}).')
  from huggingface_hub import HfApi, snapshot_download

  revision = cause = None
  try:
    # The download itself would wait for an answer without a time limit.
    revision = HfApi().model_info(model, timeout=HUB_SECONDS).sha
  except Exception as error:  # noqa: BLE001 no way to the hub: what was downloaded before will do
    cause = error
  try:
    return pathlib.Path(
      snapshot_download(
        model,
        revision=revision,
        local_files_only=cause is not None,
        allow_patterns=['*.safetensors', '*.json', '*.model', '*.txt', '*.jinja'],
        ignore_patterns=['original/*', 'consolidated*'],
      )
    )
  except Exception as error:  # noqa: BLE001 the hub's errors are many; the message says what failed
    cause = cause or error
    raise FileNotFoundError(
      f'hf:{text}: there is no folder {path.absolute()}, and no model {model!r} is to be had from '
      f'the hub ({type(cause).__name__}: {(str(cause).splitlines() or [""])[0]}).'
    ) from cause


def verify(folder: pathlib.Path, weights: bool) -> None:
  """Compares the files of an export with its SHA256SUMS, where there is one.

  Args:
    folder: the export.
    weights: whether to compare the files with tensors, or all others.

  Raises:
    ValueError: a file differs, or SHA256SUMS is damaged; the message names it.
    FileNotFoundError: a file is missing.
  """
  sums = folder / SUMS
  if not sums.is_file():
    return
  for number, line in enumerate(sums.read_text(encoding='utf-8', errors='replace').splitlines(), 1):
    if not (found := re.fullmatch(r'([0-9a-f]{64})  ([^/]+)', line)):
      raise ValueError(
        f'{sums}, line {number}: not a SHA-256 and a file name. Restore the file, or delete it to '
        f'go on unchecked.'
      )
    path = folder / found[2]
    if path.name.endswith('.safetensors') != weights:
      continue
    if not path.is_file():
      raise FileNotFoundError(f'{path}: named in {SUMS}, but not there.')
    with path.open('rb') as file:
      if hashlib.file_digest(file, 'sha256').hexdigest() != found[1]:
        raise ValueError(
          f'{path}: not what was exported, by {SUMS}. If the change is meant, delete {SUMS}; else '
          f'export again.'
        )
