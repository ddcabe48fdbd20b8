"""Processes that meet, compare, and end together: threads for the meeting, real processes with
jax.distributed for the rest."""

import concurrent.futures
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest

from alignjax.runtime import distributed
from alignjax.runtime.distributed import Place
from tests.processes import address

ROOT = pathlib.Path(__file__).resolve().parent.parent
FACTS = {'jax': '0.10.2', 'config.seed': '0'}


def meet(*processes, count=None, timeout=20):
  """Each (number, facts) meets the others in a thread: what they raise, or None."""
  where = address()

  def one(process):
    number, facts, *own = process
    try:
      return distributed.meet(
        Place(where, own[0] if own else count or len(processes), number), facts, timeout
      )
    except (ValueError, TimeoutError) as error:
      return error

  with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
    return list(pool.map(one, processes))


def test_processes_that_agree_meet():
  assert meet(*((i, FACTS) for i in range(5))) == [None] * 5
  assert distributed.meet(Place('nowhere:1', 1, 0), FACTS, 1) is None  # alone: nobody to wait for


def test_item_27_what_differs_is_named_on_every_process():
  errors = meet(
    (0, FACTS), (1, FACTS | {'jax': '0.12.0'}), (2, FACTS), (3, {'jax': '0.10.2', 'extra': 'x'})
  )
  assert [type(e) for e in errors] == [ValueError] * 4 and len({str(e) for e in errors}) == 1
  assert '\n  jax: 0.10.2 on processes 0, 2-3, 0.12.0 on process 1\n' in str(errors[0])
  assert '\n  config.seed: 0 on processes 0-2, (absent) on process 3\n' in str(errors[0])
  assert '\n  extra: (absent) on processes 0-2, x on process 3\n' in str(errors[0])


def test_a_process_that_does_not_come_is_named(monkeypatch):
  began = time.monotonic()
  (error,) = meet((1, FACTS), count=2, timeout=1)
  assert isinstance(error, TimeoutError) and 'process 0 of 2 did not come' in str(error)
  assert time.monotonic() - began >= 1
  # The clock moves when the one that does come is there, however long that takes.
  now, hear = [0.0], distributed._hear

  def heard(line):
    said = hear(line)
    now[0] += 4
    return said

  monkeypatch.setattr(distributed, '_hear', heard)
  clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)
  monkeypatch.setattr(distributed, 'time', clock)
  errors = meet((0, FACTS), (3, FACTS), count=5, timeout=4)
  assert [type(e) for e in errors] == [TimeoutError] * 2
  assert all('processes 1-2, 4 of 5 did not come within 4 s' in str(e) for e in errors)


def test_wrong_numbers_are_refused():
  errors = meet((0, FACTS), (1, FACTS), (1, FACTS), count=3)
  assert {str(e) for e in errors} == {'two processes were started as number 1 (JAX_PROCESS_ID).'}
  errors = meet((0, FACTS, 2), (2, FACTS, 4))
  assert all('process 2 was started as one of 4, process 0 as one of 2' in str(e) for e in errors)


def test_strangers_and_those_that_come_twice_are_no_matter(monkeypatch):
  """Something else knocks at the port; a process ends while it waits and is started again. Process
  0 finds the end of the first and the connection of the second at once, because it listens to a
  stranger meanwhile."""
  where = address()
  host, port = where.split(':')
  connect, connected = socket.create_connection, threading.Semaphore(0)
  hear, heard = distributed._hear, threading.Semaphore(0)

  def knock(message):
    while True:
      try:
        line = connect((host, int(port)))
      except ConnectionRefusedError:
        assert not first.done(), first.result()
        time.sleep(0.05)
        continue
      line.sendall(message)
      return line

  def counted(*arguments, **more):
    line = connect(*arguments, **more)
    connected.release()
    return line

  def hearing(line):
    heard.release()
    return hear(line)

  monkeypatch.setattr(distributed, '_hear', hearing)
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    first = pool.submit(distributed.meet, Place(where, 3, 0), FACTS, 60)
    hello = json.dumps([1, 3, {'jax': 'of the process that ended'}]).encode() + b'\n'
    for message in (b'GET / HTTP/1.1\r\n', b''):
      knock(message).close()
    ended, stranger = knock(hello), knock(b'')
    assert all(heard.acquire(timeout=60) for _ in range(4))  # it listens to the stranger
    ended.close()
    monkeypatch.setattr(socket, 'create_connection', counted)
    others = [pool.submit(distributed.meet, Place(where, 3, i), FACTS, 60) for i in (1, 2)]
    assert connected.acquire(timeout=60) and connected.acquire(timeout=60)
    stranger.close()
    assert [f.result() for f in (first, *others)] == [None] * 3


def test_the_place_comes_from_the_environment(monkeypatch):
  for name, value in zip(distributed.VARIABLES, ('host:1234', '4', '3'), strict=True):
    monkeypatch.setenv(name, value)
  assert distributed.place(1) == Place('host:1234', 4, 3)
  for name, value, words in (
    ('JAX_PROCESS_ID', '4', 'not one of the 4'),
    ('JAX_PROCESS_ID', 'x', 'whole numbers'),
    ('JAX_COORDINATOR_ADDRESS', 'host', 'HOST:PORT'),
    ('JAX_NUM_PROCESSES', '', 'not set: JAX_NUM_PROCESSES'),
  ):
    with monkeypatch.context() as m, pytest.raises(ValueError, match=words):
      m.setenv(name, value)
      distributed.place(1)


def test_the_place_on_slurm_is_what_jax_detects(monkeypatch):
  for name in distributed.VARIABLES:
    monkeypatch.delenv(name, raising=False)
  for name, value in dict(
    JOB_ID='7', STEP_NODELIST='gpu[3-4]', NTASKS='16', PROCID='9', LOCALID='1'
  ).items():
    monkeypatch.setenv(f'SLURM_{name}', value)
  assert distributed.place(1) == Place(f'gpu3:{65535 - 2**12 + 1 + 7}', 16, 9)


def test_facts_are_versions_source_and_config(monkeypatch, tmp_path):
  facts = distributed.facts({'seed': 3, 'data': {'a': (1, 'x'), 'b': {}}})
  assert (
    facts['config.seed'] == '3'
    and facts['config.data.a'] == "(1, 'x')"
    and facts['config.data.b'] == '{}'
  )
  import jax

  assert facts['jax'] == jax.__version__ and facts['python'] == sys.version.split()[0]
  (tmp_path / 'x.py').write_text('1')
  monkeypatch.setattr(distributed.alignjax, '__file__', str(tmp_path / 'x.py'))
  one = distributed.facts({})['source of alignjax']
  (tmp_path / 'x.py').write_text('2')
  assert len({facts['source of alignjax'], one, distributed.facts({})['source of alignjax']}) == 3


SCRIPT = """
import os, pathlib, signal, sys, time
from alignjax.runtime import distributed
distributed.FOLDER_SECONDS = 1
if sys.argv[1] in ('error', 'killed'):  # elsewhere a busy machine must not look like a dead process
  distributed.HEARTBEAT_SECONDS = 5
import jax
from alignjax.sharding import sync
with distributed.joined({'seed': sys.argv[2]}, 30) as here:
  import jax.numpy as jnp
  from jax.experimental import multihost_utils
  ranks = multihost_utils.process_allgather(jnp.array([here.process])).ravel().tolist()
  # In one write, because gloo writes to the same pipe.
  os.write(1, f'devices {jax.device_count()} {jax.local_device_count()} {ranks}\\n'.encode())
  if here.process == 1:
    if sys.argv[1] == 'killed':
      os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == 'error':
      raise SystemExit('error: mine alone')
  if sys.argv[1] == 'fine':
    distributed.check_shared(pathlib.Path(sys.argv[3]))
  if sys.argv[1] == 'saved':
    try:
      distributed.check_shared(pathlib.Path(sys.argv[3]) / str(here.process))
    except ValueError as error:
      print(error)
    raise SystemExit(75)
  if sys.argv[1] == 'killed':  # the other is busy with something else
    time.sleep(60)
  sync('here')
"""


def two_processes(what, folder='', seeds=(0, 0), timeout=200):
  """(exit status, output) of each, and the seconds that one outlived the other."""
  where, started = address(), []
  for i in range(2):
    env = (
      os.environ
      | dict(zip(distributed.VARIABLES, (where, '2', str(i)), strict=True))
      | {
        'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
        'NPROC': '1',
        'PYTHONPATH': str(ROOT),
      }
    )
    started.append(
      subprocess.Popen(
        [sys.executable, '-c', SCRIPT, what, str(seeds[i]), str(folder)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
      )
    )
  end = lambda p: (p.communicate(timeout=timeout)[0], time.monotonic())
  try:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      outputs, ends = zip(*pool.map(end, started), strict=True)
  finally:
    for p in started:
      p.kill()
  return [(p.returncode, text) for p, text in zip(started, outputs, strict=True)], max(ends) - min(
    ends
  )


def test_two_processes_are_one_run_to_the_end(tmp_path):
  ended, _ = two_processes('fine', tmp_path / 'run')
  for code, text in ended:
    assert code == 0 and 'devices 4 2 [0, 1]' in text, text
  assert list((tmp_path / 'run').iterdir()) == []


def test_processes_that_saved_leave_with_their_status(tmp_path):
  """After they have found that their folders are not the same."""
  ended, seconds = two_processes('saved', tmp_path)
  assert [code for code, _ in ended] == [75, 75] and seconds < 40, ended
  assert all(
    'is another folder on process 1: what process 0 wrote is not there' in text for _, text in ended
  )


def test_another_config_ends_both():
  ended, _ = two_processes('fine', seeds=(0, 5))
  for code, text in ended:
    assert code == 1 and 'seed: 0 on process 0, 5 on process 1' in text and 'devices' not in text


@pytest.mark.slow
@pytest.mark.parametrize('what,code', [('error', 1), ('killed', -signal.SIGKILL)])
def test_one_that_ends_alone_ends_the_other(what, code):
  """With 5 s without a heartbeat where the default has 40. In a collective gloo may see before that
  the connection is gone."""
  ended, seconds = two_processes(what)
  assert ended[1][0] == code and ended[0][0] not in (0, None) and seconds < 40
  seen = ['unhealthy (stopped sending heartbeats)'] + ['Gloo AllGather failed'] * (what == 'error')
  assert any(words in ended[0][1] for words in seen), ended[0][1]
  assert what != 'error' or 'error: mine alone' in ended[1][1]
