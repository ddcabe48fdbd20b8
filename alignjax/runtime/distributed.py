"""Several processes as one run: they meet, compare what they are about to run, and start
jax.distributed.

    with distributed.joined(facts(config.to_dict()), timeout=300):
      train.main(config, workdir)

JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say which
process this is. Where they are not set, jax detects it on TPU slices, Slurm and Open MPI.

jax.distributed alone aborts when a process does not come, without saying which, and compares
nothing, so that a different version or config hangs in the first collective. The processes
therefore meet first, by plain sockets on the coordinator's port, which jax's service then takes
over.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import selectors
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

import alignjax
from alignjax.runtime import files
from alignjax.sharding import sync

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
HEARTBEAT_SECONDS = 40  # without a heartbeat of one process, after which jax ends the others
SHUTDOWN_SECONDS = 60  # that a process that leaves waits for the others to leave too
FOLDER_SECONDS = 10  # until a network folder shows what another host wrote
DIFFERENCES = 20  # the most that are listed


class Place(NamedTuple):
  """Where a process stands among the others.

  Attributes:
    address: 'host:port' of process 0, the same on all.
    process: the number of this process, from 0 to count - 1.
    count: the number of processes.
  """

  address: str
  count: int
  process: int


@contextlib.contextmanager
def joined(facts: Mapping[str, str], timeout: float) -> Iterator[Place]:
  """Meets the other processes and starts jax.distributed; inside, an error of this process ends it
  at once.

  Without that, an error would hang: at its exit jax waits for the others, and they wait for it in a
  collective. Ended at once, it sends no more signs of life, and jax ends the others after
  HEARTBEAT_SECONDS (a coordinator's end they see immediately).

  Args:
    facts: what must be the same on all processes; see `facts`.
    timeout: seconds to wait for the others.

  Raises:
    ValueError: the place is not known, or processes differ; on every process, naming them and what
      differs.
    TimeoutError: processes did not come; on every one that did, naming them.
  """
  here = place(timeout)
  meet(here, facts, timeout)
  # The collectives of CPU devices; other kinds of devices have their own.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(
    here.address,
    here.count,
    here.process,
    initialization_timeout=int(max(timeout, 60)),
    heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    shutdown_timeout_seconds=SHUTDOWN_SECONDS,
  )
  try:
    yield here
    # as long as it takes; jax's own wait at the end has a time-out, for where a process left alone
    sync('end')
  except BaseException as error:
    if here.count > 1 and not _agreed(error):
      _end(error, wait=here.process == 0)
    raise


def _agreed(error: BaseException) -> bool:
  """Whether all processes leave together: by SystemExit with a number, which is 0, or that of a run
  which has saved and stopped."""
  return isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int))


def _end(error: BaseException, wait: bool) -> None:
  if isinstance(error, SystemExit):
    print(error.code, file=sys.stderr)
  else:
    traceback.print_exception(error)
  sys.stdout.flush()
  sys.stderr.flush()
  # the coordinator's end aborts the others at once: a second for those that fail alike to say so
  time.sleep(wait)
  os._exit(1)


def check_shared(folder: files.Folder) -> None:
  """Raises ValueError on every process where `folder` is not one folder for all, because each host
  would write to its own disk. All processes have to call it."""
  if jax.process_count() == 1:
    return
  mark = folder / '.shared'
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text('')
  sync('mark')
  end = time.monotonic() + FOLDER_SECONDS
  while not (found := mark.exists()) and time.monotonic() < end:
    time.sleep(0.5)
  seen = multihost_utils.process_allgather(np.array(found)).ravel()
  if jax.process_index() == 0:
    mark.unlink()
  if not seen.all():
    raise ValueError(
      f'{folder} is another folder on {_ranges(set(np.flatnonzero(~seen).tolist()))}: what process '
      '0 wrote is not there. Use a --workdir that all hosts share, or gs://BUCKET/...'
    )


def place(timeout: float) -> Place:
  """Where this process stands, from the environment's VARIABLES, or as jax detects it."""
  address, *numbers = (os.environ.get(name) or None for name in VARIABLES)
  try:
    count, process = (None if number is None else int(number) for number in numbers)
  except ValueError:
    raise ValueError(
      f'JAX_NUM_PROCESSES={numbers[0]!r} and JAX_PROCESS_ID={numbers[1]!r} must be whole numbers.'
    ) from None
  if None in (address, count, process):
    # jax.distributed.initialize asks this, which has no public name.
    from jax._src.clusters import ClusterEnv

    address, count, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
      address, count, process, None, None, int(timeout)
    )
  if address is None or count is None or process is None:
    found = zip(VARIABLES, (address, count, process), strict=True)
    unknown = [name for name, value in found if value is None]
    raise ValueError(
      f'--distributed: jax detects no cluster here; not set: {", ".join(unknown)}. Set all three '
      f'of {", ".join(VARIABLES)} on every process, or start them with a script of launch/.'
    )
  if not address.rpartition(':')[0] or not address.rpartition(':')[2].isdigit():
    raise ValueError(f'JAX_COORDINATOR_ADDRESS={address!r} must be HOST:PORT, that of process 0.')
  if not 0 <= process < count:
    raise ValueError(
      f'JAX_PROCESS_ID={process} is not one of the {count} processes of JAX_NUM_PROCESSES, 0 to '
      f'{count - 1}.'
    )
  return Place(address, count, process)


def facts(config: Mapping[str, Any]) -> dict[str, str]:
  """What must be the same on all processes, by name: versions, a hash of the package's source, and
  every entry of the config."""
  root, source = pathlib.Path(alignjax.__file__).parent, hashlib.sha256()
  for path in sorted(root.rglob('*.py')):
    source.update(path.relative_to(root).as_posix().encode() + b'\0' + path.read_bytes())
  return {
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in PACKAGES},
    'alignjax': alignjax.__version__,
    'source of alignjax': source.hexdigest()[:12],
    **_flat(config, 'config'),
  }


def _flat(tree: Any, name: str) -> dict[str, str]:
  if isinstance(tree, Mapping) and tree:
    return {k: v for key, child in tree.items() for k, v in _flat(child, f'{name}.{key}').items()}
  return {name: repr(tree)}


def meet(here: Place, facts: Mapping[str, str], timeout: float) -> None:
  """Waits until all processes have come and agree on their facts. Errors are the same on all of
  them (see `joined`)."""
  if here.count > 1:
    missing, message = (
      _receive(here, facts, timeout) if here.process == 0 else _announce(here, facts, timeout)
    )
    if message:
      raise (TimeoutError if missing else ValueError)(message)


def _receive(here: Place, facts: Mapping[str, str], timeout: float) -> tuple[bool, str]:
  """Process 0 receives the facts of the others and answers them with what is missing or wrong, or
  ''."""
  deadline = time.monotonic() + timeout
  came, lines, wrong = {0: dict(facts)}, {}, ''
  with _listen(here) as server, selectors.DefaultSelector() as ready:
    ready.register(server, selectors.EVENT_READ)
    while len(came) < here.count and not wrong and (left := deadline - time.monotonic()) > 0:
      # Ends before beginnings: a process may have ended while it waited and come again.
      for key, _ in sorted(ready.select(left), key=lambda found: found[0].fileobj is server):
        if key.fileobj is not server:
          ready.unregister(key.fileobj)
          lines[key.data].close()
          del lines[key.data], came[key.data]
          continue
        line, _ = server.accept()
        try:
          process, count, theirs = _hear(line)
        except (OSError, ValueError):  # Something else has connected to this port.
          line.close()
          continue
        if count != here.count:
          wrong = (
            f'process {process} was started as one of {count}, process 0 as one of '
            f'{here.count} (JAX_NUM_PROCESSES).'
          )
        elif process in came:
          wrong = f'two processes were started as number {process} (JAX_PROCESS_ID).'
        if wrong:
          lines[-1] = line
          break
        lines[process], came[process] = line, theirs
        ready.register(line, selectors.EVENT_READ, process)
    missing = not wrong and len(came) < here.count
    if missing:
      absent = _ranges(set(range(here.count)) - set(came))
      wrong = (
        f'{absent} of {here.count} did not come within {timeout:.0f} s ({here.address}). Look at '
        'what they printed; a longer wait: --distributed_timeout=SECONDS.'
      )
    wrong = wrong or differences(came)
    for line in lines.values():
      # A process may have ended meanwhile; jax's own start then times out.
      with contextlib.suppress(OSError), line:
        line.sendall(json.dumps([missing, wrong]).encode() + b'\n')
  return missing, wrong


def _listen(here: Place) -> socket.socket:
  host, _, port = (
    os.environ.get('JAX_COORDINATOR_BIND_ADDRESS') or f':{here.address.rpartition(":")[2]}'
  ).rpartition(':')
  host = host.strip('[]')
  both = host in ('', '::') and socket.has_dualstack_ipv6()
  try:
    return socket.create_server(
      (host, int(port)),
      family=socket.AF_INET6 if both or ':' in host else socket.AF_INET,
      dualstack_ipv6=both,
      backlog=here.count,
    )
  except OSError as error:
    raise ValueError(
      f'process 0 cannot listen on port {port} ({error.strerror}): is there another run, or '
      'another process with JAX_PROCESS_ID=0, on this machine?'
    ) from None


def _hear(line: socket.socket) -> tuple[int, int, dict[str, str]]:
  line.settimeout(5)
  process, count, theirs = json.loads(line.makefile('rb').readline())
  return int(process), int(count), dict(theirs)


def _announce(here: Place, facts: Mapping[str, str], timeout: float) -> tuple[bool, str]:
  """The other processes send their facts to process 0 and receive its answer."""
  host, _, port = here.address.rpartition(':')
  deadline, problem = time.monotonic() + timeout, ''
  while time.monotonic() < deadline:
    try:
      with socket.create_connection((host.strip('[]'), int(port)), timeout=5) as line:
        line.sendall(json.dumps([here.process, here.count, dict(facts)]).encode() + b'\n')
        # Process 0 answers within its own time limit, which may have begun just now.
        line.settimeout(timeout + 10)
        missing, wrong = json.loads(line.makefile('rb').readline())
        return bool(missing), str(wrong)
    except (
      OSError,
      ValueError,
    ) as error:  # not there yet, or it ended, or a service of an earlier run that still ends
      problem = str(error)
    time.sleep(0.3)
  return True, (
    f'process 0 of {here.count} did not come to {here.address} within {timeout:.0f} s (process '
    f'{here.process}: '
    f'{problem}). Look at what it printed; is the address reachable from here, the port open?'
  )


def differences(facts: Mapping[int, Mapping[str, str]]) -> str:
  """What is not the same on all processes, or ''. facts: by the number of the process."""
  found = []
  for name in dict.fromkeys(name for theirs in facts.values() for name in theirs):
    values: dict[str, set[int]] = {}
    for process, theirs in facts.items():
      values.setdefault(theirs.get(name, '(absent)'), set()).add(process)
    if len(values) > 1:
      by_size = sorted(values.items(), key=lambda item: (-len(item[1]), min(item[1])))
      found.append(
        f'  {name}: ' + ', '.join(f'{value} on {_ranges(where)}' for value, where in by_size)
      )
  if not found:
    return ''
  rest = [f'  and {len(found) - DIFFERENCES} more'] if len(found) > DIFFERENCES else []
  return '\n'.join(
    [
      'the processes differ:',
      *found[:DIFFERENCES],
      *rest,
      'Start all of them from one installation and with one command.',
    ]
  )


def _ranges(numbers: set[int]) -> str:
  """{0, 2, 3, 4} -> 'processes 0, 2-4'."""
  runs: list[list[int]] = []
  for n in sorted(numbers):
    if runs and n == runs[-1][1] + 1:
      runs[-1][1] = n
    else:
      runs.append([n, n])
  text = ', '.join(str(a) if a == b else f'{a}-{b}' for a, b in runs)
  return f'process{"es" if len(numbers) > 1 else ""} {text}'
