"""Where a checkpoint's files are: a folder, or a name on the Hugging Face hub; whether an export is
what was written; and how it gets to the hub."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re

import alignjax

SUMS = 'SHA256SUMS'
HUB_SECONDS = 10  # the time limit of an answer of the hub


def is_hub_name(text: str) -> bool:
  """Whether a text has the form of a model's name on the hub, NAME or USER/NAME. A relative path
  may have this form, too."""
  return re.fullmatch(r'\w[\w.-]*(/\w[\w.-]*)?', text) is not None


SCHEMES = ('hf:', 'peft:')  # of the names of checkpoints and of adapters


def without_scheme(name: str) -> str:
  """FOLDER_OR_HUB_NAME of 'hf:FOLDER_OR_HUB_NAME' or 'peft:FOLDER_OR_HUB_NAME'."""
  return name.removeprefix('hf:').removeprefix('peft:')


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
  if not is_hub_name(model):
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
        allow_patterns=['*.safetensors', '*.json', '*.model', '*.txt', '*.jinja', 'README.md'],
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


def check_push(repository: str) -> None:
  """ValueError, before anything is computed, where `push` could not work: the name is none of the
  hub's, or nobody is logged in."""
  from huggingface_hub import get_token

  if '/' not in repository or not is_hub_name(repository):
    raise ValueError(f'--push={repository}: a repository on the hub is named USER/NAME.')
  if get_token() is None:
    raise ValueError(
      f'--push={repository}: nobody is logged in to the Hugging Face hub. Call `hf auth login`, or '
      'set HF_TOKEN.'
    )


def push(folder: str | os.PathLike, repository: str, private: bool = False) -> str:
  """Uploads an export to the hub, into the repository USER/NAME, which is made if it is not there,
  and returns its address. The token is that of the hub's own login.

  Raises:
    ValueError: the hub refuses or cannot be reached; or `private`, and there is a public repository
      of that name. The message says how to go on without another export.
  """
  from huggingface_hub import HfApi
  from huggingface_hub.errors import HTTPError

  api = HfApi()
  try:
    address = api.create_repo(repository, private=private or None, exist_ok=True)
    if private and not api.model_info(repository).private:
      raise ValueError(f'{address} is there already, and is public')
    api.upload_folder(
      repo_id=repository,
      folder_path=folder,
      commit_message=f'Export of alignjax {alignjax.__version__}',
    )
  except (HTTPError, OSError, ValueError) as error:
    raise ValueError(
      f'--push={repository}: {str(error).strip() or type(error).__name__}. {folder} is written and '
      f'whole; `hf upload {repository} {folder}` uploads it once the cause is mended.'
    ) from error
  return str(address)
