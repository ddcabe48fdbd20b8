"""Writes tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[str]:
  """Returns the lines of a table. A '|' in a cell is escaped."""
  return [_line(head), '|---' * len(head) + '|', *map(_line, rows)]


def _line(cells: Sequence[Any]) -> str:
  return '| ' + ' | '.join(str(cell).replace('|', '\\|') for cell in cells) + ' |'
