"""The entries of a config.json by name and kind, with clear errors for missing and wrong ones."""

from __future__ import annotations

import json
import pathlib
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

REQUIRED = object()
LARGEST = 2**31 - 1


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object from a file in UTF-8. Raises ValueError that names the file, and the line where
  it is no JSON."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except json.JSONDecodeError as error:
    raise ValueError(f'{path}, line {error.lineno}: not JSON ({error.msg}).') from error
  except (UnicodeDecodeError, ValueError, RecursionError) as error:
    raise ValueError(f'{path}: not JSON ({error}).') from error
  except OSError as error:
    raise FileNotFoundError(f'{path}: cannot be read ({error.strerror}).') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path}: a JSON object is expected, not {reprlib.repr(value)}.')
  return value


class Entries(NamedTuple):
  """The entries of a JSON object by name and kind. A missing or wrong one is a ValueError with the
  file and the entry."""

  path: pathlib.Path
  values: Mapping[str, Any]
  inside: str = ''

  def _take(
    self, name: str, default: Any, null: bool, right: Callable[[Any], bool], what: str
  ) -> Any:
    value = self.values.get(name, default)
    if value is REQUIRED:
      raise ValueError(f'{self.path}: the entry {self.inside + name!r} is missing.')
    if value is not default and not (value is None and null) and not right(value):
      raise ValueError(f'{self.path}: {self.inside}{name}={reprlib.repr(value)} is not {what}.')
    return value

  def size(self, name: str, default: Any = REQUIRED, null: bool = False, least: int = 1) -> Any:
    """A whole number from `least` on. null: whether the file may have null."""
    return self._take(
      name,
      default,
      null,
      lambda v: type(v) is int and least <= v <= LARGEST,
      f'a whole number from {least} to {LARGEST}',
    )

  def number(self, name: str, default: Any = REQUIRED, null: bool = False) -> Any:
    """A number above 0. null: whether the file may have null."""
    value = self._take(name, default, null, _is_positive, 'a number above 0')
    return None if value is None else float(value)

  def numbers(self, name: str) -> tuple[float, ...]:
    """A list of numbers above 0."""

    def right(value):
      return isinstance(value, list) and all(map(_is_positive, value))

    return tuple(map(float, self._take(name, REQUIRED, False, right, 'a list of numbers above 0')))

  def flag(self, name: str, default: bool) -> bool:
    return self._take(name, default, False, lambda v: type(v) is bool, 'true or false')

  def only(self, name: str, *allowed: Any) -> None:
    """Refuses every value except for the allowed ones, of which the first is the default of
    transformers."""
    value = self.values.get(name, allowed[0])
    if not any(type(value) is type(a) and value == a for a in allowed):
      raise ValueError(
        f'{self.path}: {self.inside}{name}={reprlib.repr(value)} is not covered for '
        f'{self.values.get("model_type")}; covered: {", ".join(map(reprlib.repr, allowed))}.'
      )


def _is_positive(value: Any) -> bool:
  return type(value) in (int, float) and 0 < value < 1e30
