"""The log of what happened, and the time."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any, NamedTuple

import sqlalchemy as sa

from alignjax.label.schema import events


class _Reading(NamedTuple):
  """What `now` said last, and the two clocks of this computer at that time."""

  at: float
  wall: float
  ticks: float


_last: weakref.WeakKeyDictionary[sa.Engine, _Reading] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def now(connection: sa.Connection) -> float:
  """Returns the time. It never goes back, and it begins with the newest event in the database:
  where the clock was set back it goes on from where it was, so that leases still end and the order
  of answers is that of their times. It is the clock's time again as soon as that is later."""
  with _lock:
    wall, ticks = time.time(), time.monotonic()
    last = _last.get(connection.engine)
    if last is None:
      newest = connection.execute(sa.select(sa.func.max(events.c.at))).scalar()
      last = _Reading(newest or 0.0, wall, ticks)
    passed = max(min(wall - last.wall, ticks - last.ticks), 0.0)
    at = max(wall, last.at + passed)
    _last[connection.engine] = _Reading(at, wall, ticks)
  return at


def log(
  connection: sa.Connection,
  what: str,
  person: int | None = None,
  item: int | None = None,
  /,
  **details: Any,
) -> float:
  """Adds an event and returns its time."""
  at = now(connection)
  row = dict(at=at, kind=what, person_id=person, item_id=item, details=details)
  connection.execute(events.insert(), row)
  return at


def add(connection: sa.Connection, table: sa.Table, **values: Any) -> int:
  """Inserts a row and returns its number."""
  key = connection.execute(table.insert().values(**values)).inserted_primary_key
  assert key is not None
  return key[0]
