"""Reads data sets of the Hugging Face hub with the datasets library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


def load(
  name: str, config: str | None, split: str, *, where: str, instead: str = '', **options: Any
) -> Any:
  """Returns a split of a data set.

  Args:
    name: 'OWNER/NAME', or a folder that holds a data set.
    config: one of the data set's configurations. None means its only one.
    split: the split, such as 'train' or 'train[:5%]'.
    where: what is read and for what purpose; errors begin with it.
    instead: what the user can do if the data set cannot be read; errors end with it.
    **options: options of datasets.load_dataset, such as revision or streaming.

  Returns:
    A datasets.Dataset. With streaming=True it is an iterable, which must be consumed under
      `reading`, because its records are only then downloaded.

  Raises:
    ValueError: The library is not installed, or the data set cannot be read.
  """
  try:
    import datasets
  except ModuleNotFoundError:
    raise ValueError(
      f'{where} needs the datasets library: pip install datasets{instead}.'
    ) from None
  with reading(where, instead):
    return datasets.load_dataset(name, config, split=split, **options)


@contextlib.contextmanager
def reading(where: str, instead: str = '') -> Iterator[None]:
  """Turns the errors of a library that reads data, and of its downloads, which are of many kinds,
  into a ValueError of one line. The arguments are those of `load`."""
  try:
    yield
  except UnicodeDecodeError as error:
    raise ValueError(f'{where}: a text is not UTF-8 (byte {error.start}){instead}.') from error
  except Exception as error:
    first = str(error).strip().partition('\n')[0][:300]
    raise ValueError(
      f'{where} cannot be read ({type(error).__name__}: {first}){instead}.'
    ) from error
