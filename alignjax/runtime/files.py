"""Folders on a disk or in a bucket, gs://BUCKET/..., under one interface: that of pathlib, which
etils.epath gives to buckets.

Buckets differ: an object appears whole when its writing ends and so needs no second name, nothing
can be appended to it, and renaming a folder copies it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, TypeGuard

from etils import epath

Folder = pathlib.Path | epath.Path


def folder(name: str | os.PathLike) -> Folder:
  """The path with a name, where ~ and ~NAME stand for home folders. Raises ValueError for what
  cannot be a path, with what is missing."""
  scheme, found, _ = os.fspath(name).partition('://')
  if '\0' in os.fspath(name):
    raise ValueError(f'{name!r}: a name holds no zero byte.')
  if not found:
    try:
      return pathlib.Path(name).expanduser()
    except RuntimeError:
      raise ValueError(f'{name}: no user of that name has a home folder here.') from None
  if scheme != 'gs':
    raise ValueError(f'{name}: a folder is a local one or gs://BUCKET/...')
  if importlib.util.find_spec('gcsfs') is None:
    raise ValueError(f"{name}: buckets need the package gcsfs: pip install -e '.[gcs]'.")
  return epath.Path(name)


def absolute(name: str | os.PathLike) -> Folder:
  """The same as `folder`, but from the root where it is on a disk."""
  path = folder(name)
  return path if is_bucket(path) else path.absolute()


def is_bucket(path: Folder) -> TypeGuard[epath.Path]:
  """Whether a path is in a bucket."""
  return '://' in os.fspath(path)


def write(path: Folder, contents: str | bytes) -> None:
  """Writes a file, whole or not at all. An OSError names it."""
  contents = contents.encode() if isinstance(contents, str) else contents
  if is_bucket(path):
    path.write_bytes(contents)
    return
  temporary = path.with_name(f'{path.name}.partial')
  with _named(path):
    try:
      temporary.write_bytes(contents)
      os.replace(temporary, path)
    except OSError:
      temporary.unlink(missing_ok=True)
      raise


def append(path: Folder, text: str) -> None:
  """Adds lines to a file, which is created if it is missing. One in a bucket is written anew."""
  if is_bucket(path):
    path.write_text((path.read_text() if path.exists() else '') + text)
    return
  with _named(path), path.open('a', encoding='utf-8') as file:
    file.write(text)


@contextlib.contextmanager
def _named(path: Folder) -> Iterator[None]:
  """An OSError names the file, as those of a full disk do not by themselves."""
  try:
    yield
  except OSError as error:
    error.filename = os.fspath(path)
    raise


def remove(path: Folder) -> None:
  """Removes a folder and its contents, if it exists."""
  if is_bucket(path):
    path.rmtree(missing_ok=True)
  else:
    shutil.rmtree(path, ignore_errors=True)


def move(path: Folder, to: Folder) -> None:
  """Gives a folder another name, which no other folder has."""
  if is_bucket(path):
    path.rename(to)
  else:
    os.replace(path, to)


def save_figure(figure: Any, path: Folder) -> None:
  """Writes a matplotlib figure as PNG."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=110)
  path.write_bytes(buffer.getvalue())
