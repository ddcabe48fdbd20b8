"""The log of what happened, and the time."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa

from alignjax.label.schema import events


def now(connection: sa.Connection) -> float:
  """Returns the time. It never goes back: where the clock was set back, it is that of the newest
  event, so that leases still end and the order of answers is that of their times."""
  newest = connection.execute(sa.select(sa.func.max(events.c.at))).scalar()
  return max(time.time(), newest or 0.0)


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
  connection.execute(
    events.insert().values(at=at, kind=what, person_id=person, item_id=item, details=details)
  )
  return at


def add(connection: sa.Connection, table: sa.Table, **values: Any) -> int:
  """Inserts a row and returns its number."""
  key = connection.execute(table.insert().values(**values)).inserted_primary_key
  assert key is not None
  return key[0]
