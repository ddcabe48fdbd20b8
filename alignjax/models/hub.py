"""Where a checkpoint's files are: a folder, or a name on the Hugging Face hub; and whether an
export is what was written."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re

SUMS = 'SHA256SUMS'
HUB_SECONDS = 10  # that the hub has for an answer


def folder_of(name: str | os.PathLike) -> pathlib.Path:
  """The local folder of a checkpoint: a path, or a name on the hub, downloaded without pickles and
  code."""
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
    # the download itself would wait for an answer without end
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
  """Compares the files of an export with its SHA256SUMS, where there is one. ValueError or
  FileNotFoundError names the file.

  weights: those with tensors, or all others.
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
