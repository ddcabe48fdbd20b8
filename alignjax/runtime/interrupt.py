"""SIGTERM and Ctrl-C. A run in its loop saves after the present step, and otherwise ends at once;
in both cases it exits with EXIT_CODE within the grace time. Nothing is lost, because whatever is
written becomes visible whole or not at all."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading

import jax
import numpy as np

EXIT_CODE = 75  # EX_TEMPFAIL: run the same command again


class Interrupt:
  """Handles SIGTERM and SIGINT from __enter__ to __exit__.

  Outside of `held()` a signal raises SystemExit(EXIT_CODE) in the main thread. Inside, it is noted
  in `asked`, and the holder ends the run. Python runs handlers only between two of its
  instructions, so a main thread in a compilation, a long step or a slow disk would miss the
  deadline. A thread that the signal wakes directly therefore ends the process when `grace` seconds
  have passed. A second Ctrl-C ends it at once.

  Args:
    grace: seconds from the signal to the end of the process.
  """

  def __init__(self, grace: float):
    self.grace = grace
    self.asked: str | None = None
    self._held = False
    self._over = threading.Event()

  def __enter__(self) -> Interrupt:
    self._before: dict = {}
    if threading.current_thread() is not threading.main_thread():
      return self  # The main thread handles signals.
    self._wake, written = socket.socketpair()
    written.setblocking(False)
    self._written, self._fd = (
      written,
      signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False),
    )
    self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
    threading.Thread(target=self._watch, name='grace', daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    if self.asked and jax.process_count() > 1:
      return  # jax waits for the other processes at its exit, so the deadline still holds.
    self._over.set()
    if self._before:
      signal.set_wakeup_fd(self._fd)
      for number, handler in self._before.items():
        signal.signal(number, handler)
      self._written.close()  # ends the thread

  @contextlib.contextmanager
  def held(self):
    """A context in which a signal is only noted."""
    self._held = True
    try:
      yield
    finally:
      self._held = False

  def check(self) -> None:
    """Raises SystemExit where a signal was noted and nobody has acted on it yet."""
    if self.asked:
      raise SystemExit(EXIT_CODE)

  def _note(self, number: int, frame) -> None:
    if self.asked:
      if number == signal.SIGINT:
        raise KeyboardInterrupt
      return
    self.asked = signal.Signals(number).name
    if not self._held:
      print(f'stopped by {self.asked}; the same command goes on from here', flush=True)
      raise SystemExit(EXIT_CODE)

  def _watch(self) -> None:
    with self._wake:
      while woken := self._wake.recv(1):
        if woken[0] in (signal.SIGTERM, signal.SIGINT) and not self._over.wait(self.grace):
          with contextlib.suppress(OSError):  # Nobody may read the output any more.
            os.write(
              1,
              f'stopped by {signal.Signals(woken[0]).name} after grace_seconds={self.grace:g} in '
              f'the middle of a step; '
              'the same command goes on from the last checkpoint\n'.encode(),
            )
          os._exit(EXIT_CODE)


def on_any_process(*flags: bool) -> list[bool]:
  """Whether each flag is set on any process. All processes thus act on it after the same step."""
  if jax.process_count() == 1:
    return list(flags)
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(np.array(flags)).any(0).tolist()
