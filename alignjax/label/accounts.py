"""People and their sessions: invitations, passwords, logins.

A person joins by an invitation link and chooses a name and a password. Passwords are kept as argon2
hashes, invitations as SHA-256 sums. A session is a signed cookie; it ends when the person's epoch
changes, which a new password, a logout and a deactivation do.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from typing import Any

import argon2
import itsdangerous
import sqlalchemy as sa

from alignjax.label import answers as forms
from alignjax.label import history, schema
from alignjax.label.schema import attempts, invites, people, settings

ROLES = ('labeler', 'researcher', 'admin')
INVITE_SECONDS = 14 * 24 * 3600
SESSION_SECONDS = 14 * 24 * 3600
SHORTEST_PASSWORD = 10
# Failed logins within WINDOW seconds, after which further ones are refused.
WINDOW, PER_NAME, PER_ADDRESS = 900, 10, 50

_hasher = argon2.PasswordHasher()
# A comparison takes 64 MiB and a core for a moment: many at once must not stop the server.
_comparing = threading.BoundedSemaphore(2)
# A login with an unknown name takes as long as one with a wrong password.
_nobody = _hasher.hash(secrets.token_hex())


class Refused(ValueError):
  """A login, an invitation or a name is not accepted. The message is for the person."""


class TooMany(Refused):
  """There were too many failed logins."""


def secret(connection: sa.Connection) -> str:
  """Returns the key that signs cookies and tokens, and makes it at first."""
  schema.wait_for(connection, 'secret')
  found = connection.execute(
    sa.select(settings.c.value).where(settings.c.name == 'secret')
  ).scalar()
  if found is None:
    found = secrets.token_hex(32)
    connection.execute(settings.insert().values(name='secret', value=found))
  return found


def _digest(token: str) -> str:
  return hashlib.sha256(token.encode()).hexdigest()


def invite(
  connection: sa.Connection,
  role: str = 'labeler',
  pool: str = 'training',
  person: int | None = None,
  seconds: float = INVITE_SECONDS,
) -> str:
  """Makes an invitation for one person and returns its token, which is kept nowhere.

  Args:
    connection: of a writing transaction.
    role: 'labeler', 'researcher' or 'admin'.
    pool: the pool of a labeler, 'training', 'heldout' or 'screening'.
    person: who invites.
    seconds: after which it ends.
  """
  if role not in ROLES:
    raise ValueError(f'role={role!r} is none of {", ".join(ROLES)}.')
  if pool not in forms.POOLS:
    raise ValueError(f'pool={pool!r} is none of {", ".join(forms.POOLS)}.')
  token = secrets.token_urlsafe(24)
  at = history.log(connection, 'invited', person, role=role, pool=pool)
  connection.execute(
    invites.insert().values(digest=_digest(token), role=role, pool=pool, expires=at + seconds)
  )
  return token


def invitation(connection: sa.Connection, token: str) -> Any:
  """Returns the row of an invitation that can be used, or raises Refused."""
  found = connection.execute(
    sa.select(invites).where(invites.c.digest == _digest(token)).with_for_update()
  ).first()
  if found is None or found.person_id is not None or found.expires <= history.now(connection):
    raise Refused(
      'This invitation is not valid: it was used, or it has ended. Ask for another one.'
    )
  return found


def join(connection: sa.Connection, token: str, name: str, password: str) -> int:
  """Makes the account of an invited person and returns its number."""
  found = invitation(connection, token)
  number = add_person(connection, name, password, found.role, found.pool)
  connection.execute(invites.update().where(invites.c.id == found.id).values(person_id=number))
  return number


def add_person(
  connection: sa.Connection, name: str, password: str, role: str, pool: str = 'training'
) -> int:
  """Makes an account and returns its number."""
  name = name.strip()
  if not re.fullmatch(r'[\w][\w .@-]{0,79}', name):
    raise Refused('A name has 1 to 80 letters, digits, spaces and . _ - @.')
  check_password(password)
  hashed = _hasher.hash(password)  # It takes a tenth of a second, in which nobody need wait.
  schema.wait_for(connection, 'people')
  if connection.execute(
    sa.select(people.c.id).where(sa.func.lower(people.c.name) == name.lower())
  ).first():
    raise Refused('This name is taken. Choose another one.')
  at = history.log(connection, 'joined', name=name, role=role, pool=pool)
  return history.add(
    connection,
    people,
    name=name,
    role=role,
    pool=pool,
    password=hashed,
    epoch=1,
    active=True,
    created=at,
  )


def check_password(password: str) -> None:
  if not SHORTEST_PASSWORD <= len(password) <= 200:
    raise Refused(f'A password has {SHORTEST_PASSWORD} characters or more.')


def login(engine: sa.Engine, name: str, password: str, address: str) -> Any:
  """Returns the row of the person with this name and password. The password is compared outside of
  any writing transaction, because that takes long on purpose.

  Raises:
    TooMany: if there were too many failed logins with this name or from this address. The password
      is not looked at then.
    Refused: if there is no active person with this name and password.
  """
  name, address = name.strip().lower()[:100], address[:100]
  with schema.reading(engine) as connection:
    at = history.now(connection)
    recent = sa.select(sa.func.count()).where(attempts.c.at > at - WINDOW)
    for column, value, most in (
      (attempts.c.name, name, PER_NAME),
      (attempts.c.address, address, PER_ADDRESS),
    ):
      if connection.execute(recent.where(column == value)).scalar_one() >= most:
        raise TooMany(f'There were too many failed logins. Try again in {WINDOW // 60} minutes.')
    found = connection.execute(
      sa.select(people).where(sa.func.lower(people.c.name) == name)
    ).first()
  try:
    with _comparing:
      _hasher.verify(found.password if found else _nobody, password)
  except argon2.exceptions.VerificationError:
    found = None
  with schema.writing(engine) as connection:
    if found is not None and found.active:
      history.log(connection, 'login', found.id)
      return found
    connection.execute(attempts.insert().values(name=name, address=address, at=at))
  raise Refused('The name or the password is wrong.')


def change_person(connection: sa.Connection, number: int, by: int | None, **changes: Any) -> None:
  """Changes 'role', 'pool' or 'active' of a person and ends their sessions.

  Raises:
    Refused: if no active admin would be left.
  """
  if (
    changes.get('role', 'admin') not in ROLES or changes.get('pool', 'training') not in forms.POOLS
  ):
    raise ValueError(f'there is no such role or pool: {changes}.')
  admins = sa.select(people.c.id).where(people.c.role == 'admin', people.c.active)
  # On PostgreSQL two admins who change each other at once wait here for each other.
  connection.execute(admins.order_by(people.c.id).with_for_update()).all()
  connection.execute(
    people.update().where(people.c.id == number).values(epoch=people.c.epoch + 1, **changes)
  )
  if by is not None and connection.execute(admins).first() is None:
    raise Refused('The last admin must stay an active admin.')
  history.log(connection, 'person changed', by, person=number, **changes)


def set_password(connection: sa.Connection, number: int, password: str) -> None:
  """Sets a password and ends all sessions of the person."""
  check_password(password)
  connection.execute(
    people.update()
    .where(people.c.id == number)
    .values(password=_hasher.hash(password), epoch=people.c.epoch + 1)
  )
  history.log(connection, 'password changed', number)


def end_sessions(connection: sa.Connection, number: int) -> None:
  connection.execute(people.update().where(people.c.id == number).values(epoch=people.c.epoch + 1))


class Sessions:
  """Signs and reads session cookies and the tokens of forms.

  A cookie holds the person, their epoch, the time and a random name, and a form's token is signed
  for that name: a form of another session, or of none, is refused.
  """

  def __init__(self, key: str):
    self._cookies = itsdangerous.URLSafeSerializer(key, 'alignjax label session')
    self._forms = itsdangerous.URLSafeSerializer(key, 'alignjax label form')

  def begin(self, at: float, person: Any = None) -> dict[str, Any]:
    """Returns a new session, of a person or, for the login page, of nobody."""
    session: dict[str, Any] = {'name': secrets.token_urlsafe(12), 'at': at}
    return session | ({'person': person.id, 'epoch': person.epoch} if person is not None else {})

  def write(self, session: dict[str, Any]) -> str:
    return str(self._cookies.dumps(session))

  def read(self, cookie: str, at: float) -> dict[str, Any] | None:
    """Returns the session of a cookie, or None for one that is not ours or has ended."""
    try:
      session = self._cookies.loads(cookie)
    except itsdangerous.BadData:
      return None
    return session if session['at'] > at - SESSION_SECONDS else None

  def token(self, session: dict[str, Any]) -> str:
    return str(self._forms.dumps(session['name']))

  def check(self, session: dict[str, Any], token: str) -> bool:
    try:
      return self._forms.loads(token) == session['name']
    except itsdangerous.BadData:
      return False
