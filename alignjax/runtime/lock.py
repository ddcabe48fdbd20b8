"""One run at a time in a workdir.

    with lock.held(workdir):          # raises Busy where another run holds it
      ...

On a disk the lock is the kernel's (flock on WORKDIR/.lock). It ends with the process that holds it,
also after kill -9 and a power cut. In a bucket, and on a file system without flock, there is a
lease instead: the holder writes the file anew every HEARTBEAT seconds, and a file that has not
changed for LEASE seconds, while the other run watches, belongs to nobody. Clocks therefore need not
agree. The file says who holds the lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator

from alignjax.runtime import files

NAME = '.lock'
HEARTBEAT, LEASE = 10.0, 45.0  # seconds
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Busy(Exception):
  """Another run holds the workdir; the message says which."""


@contextlib.contextmanager
def held(workdir: files.Folder) -> Iterator[None]:
  """Holds the lock of a folder that exists, or raises Busy."""
  path = workdir / NAME
  file = None if files.is_bucket(workdir) else _flock(path)
  if file is None:
    with _lease(path):
      yield
    return
  with file:
    try:
      yield
    finally:
      with contextlib.suppress(OSError):  # while the lock is held, so that it is nobody else's
        path.unlink()


def _flock(path: files.Folder):
  """The open file that carries the lock; None where the file system has no flock."""
  import fcntl

  while True:
    file = path.open('a+b', buffering=0)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      # Otherwise its last holder has just removed it.
      if path.exists() and os.fstat(file.fileno()).st_ino == os.stat(path).st_ino:
        file.truncate(0)
        file.write(_me())
        return file
    except OSError as error:
      file.close()
      if error.errno in NO_FLOCK:
        return None
      if error.errno not in (errno.EAGAIN, errno.EACCES):
        raise
      raise Busy(_busy(path)) from None
    file.close()


@contextlib.contextmanager
def _lease(path: files.Folder) -> Iterator[None]:
  seen, since = _read(path), time.monotonic()
  while seen is not None and not _dead(seen):
    time.sleep(min(1.0, HEARTBEAT / 10))
    if (now := _read(path)) is not None and now != seen:
      raise Busy(_busy(path))
    if now is None or time.monotonic() - since > LEASE:
      break
  mine = [b'']

  def write() -> None:
    mine[0] = _me(beat=time.time())
    path.write_bytes(mine[0])

  write()
  time.sleep(HEARTBEAT / 10)  # Another run that saw the same may have written after us.
  if _read(path) != mine[0]:
    raise Busy(_busy(path))
  over = threading.Event()

  def beat() -> None:
    while not over.wait(HEARTBEAT):
      # Where a bucket cannot be reached for a while, the run's own writes report it.
      with contextlib.suppress(Exception):
        write()

  thread = threading.Thread(target=beat, name='lease', daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()
    with contextlib.suppress(Exception):  # buckets raise many kinds
      path.unlink()


def _me(**more: float) -> bytes:
  who = dict(
    process=os.getpid(),
    host=socket.gethostname(),
    since=time.strftime('%Y-%m-%d %H:%M:%S %Z'),
    boot=_boot(),
    command=shlex.join(sys.argv)[:200],
  )
  return json.dumps(who | more).encode()


def _boot() -> str:
  """A name for this start of this machine and for its process numbers (a container has its own), or
  ''."""
  with (
    contextlib.suppress(OSError),
    open('/proc/sys/kernel/random/boot_id', encoding='ascii') as file,
  ):
    return f'{file.read().strip()} {os.readlink("/proc/self/ns/pid")}'
  return ''


def _read(path: files.Folder) -> bytes | None:
  try:
    return path.read_bytes()
  except OSError:
    return None


def _dead(contents: bytes) -> bool:
  """Whether the contents name a process of this start of this machine that no longer exists."""
  try:
    who = json.loads(contents)
    if not who['boot'] or who['boot'] != _boot() or who['host'] != socket.gethostname():
      return False
    os.kill(int(who['process']), 0)
  except ProcessLookupError:
    return True
  except (ValueError, KeyError, TypeError, OSError):
    return False
  return False


def _busy(path: files.Folder) -> str:
  contents = _read(path) or b''
  try:
    who = json.loads(contents)
    owner = f'process {who["process"]} on {who["host"]} since {who["since"]} ({who["command"]})'
  except (ValueError, KeyError, TypeError):
    owner = 'another process'
  return (
    f'{path.parent} is in use: {owner} runs in it. Wait for its end, stop it, or use another '
    '--workdir; the lock goes with that process.'
  )
