"""The parts that all subcommands share: output that cannot stop a command, errors in one line, and
lists of names."""

from __future__ import annotations

import argparse
import ast
import errno
import io
import locale
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

DTYPES = ('float32', 'bfloat16', 'float16')  # The choices of --dtype.
# The errors of a write whose reader or terminal no longer exists.
GONE = (errno.EPIPE, errno.EIO, errno.ESHUTDOWN)


PATIENCE = 'xla_cpu_collective_call_terminate_timeout_seconds'
PATIENT_SECONDS = 24 * 3600


def let_devices_wait() -> None:
  """Lets the devices that a CPU is divided into wait for each other, unless XLA_FLAGS say how long.

  By itself XLA ends a process in which one of them comes a minute later to a collective than
  another, as behind a reward function on the host that is tried again, or on a computer that has
  other work.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  if PATIENCE not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} --{PATIENCE}={PATIENT_SECONDS}'.strip()


def start(
  main: Callable[[list[str]], Any], argv: list[str], ends_with_reader: bool = False
) -> None:
  """Runs main(argv) as a program.

  Output never stops the program. A character that the output's encoding lacks is written as an
  escape. Output is dropped if its reader has closed the pipe (`| head -1`) or if its descriptor is
  closed (`>&-`). Files are read and written as UTF-8 in every locale: Python restarts in its UTF-8
  mode if it did not start in it. Every OSError and ValueError ends in one line.

  Args:
    main: the function to run.
    argv: its arguments.
    ends_with_reader: whether the command ends quietly when its reader closes the pipe, because its
      output is its only result.
  """
  let_devices_wait()
  # The next file that is opened would get the number of a closed descriptor, and then the output.
  for fd in (0, 1, 2):
    try:
      os.fstat(fd)
    except OSError:
      nowhere = os.open(os.devnull, os.O_RDWR)  # The lowest free number.
      if nowhere != fd:
        os.dup2(nowhere, fd)
        os.close(nowhere)
      os.set_inheritable(fd, True)
  sys.stdin, sys.stdout, sys.stderr = (
    stream or open(fd, mode, encoding='utf-8', closefd=False)
    for fd, stream, mode in ((0, sys.stdin, 'r'), (1, sys.stdout, 'w'), (2, sys.stderr, 'w'))
  )
  if (
    locale.getpreferredencoding(False).lower().replace('-', '') != 'utf8'
    and not sys.flags.utf8_mode
  ):
    shown = (
      {'PYTHONIOENCODING': sys.stdout.encoding} if 'PYTHONIOENCODING' not in os.environ else {}
    )
    os.execve(
      sys.executable, [sys.executable, '-X', 'utf8', *sys.orig_argv[1:]], os.environ | shown
    )
  # The advice that PyTorch is absent is not needed, because only the tokenizers are used here.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  sys.stdout, sys.stderr = (
    _output(stream, fd, ends_with_reader) for stream, fd in ((sys.stdout, 1), (sys.stderr, 2))
  )
  try:
    main(argv)
  except (ValueError, OSError) as error:
    if os.environ.get('ALIGNJAX_TRACEBACK'):
      traceback.print_exc()
    raise SystemExit(f'error: {in_words(error)}') from None


def in_words(error: BaseException) -> str:
  """Returns the message of an error for a person. For an error of the operating system it is the
  description and the file, and for an unexpected kind of error it begins with the name of the
  kind."""
  if isinstance(error, OSError) and error.strerror:
    return f'{error.filename}: {error.strerror}.' if error.filename else f'{error.strerror}.'
  expected = isinstance(error, (ValueError, OSError, FloatingPointError, RuntimeError)) and str(
    error
  )
  return str(error) if expected else f'{type(error).__name__}: {error}'


def _output(stream: Any, fd: int, ends: bool) -> Any:
  """Returns the text stream, written through _Pipe. A stream that is not a plain file descriptor is
  returned as it is."""
  if not isinstance(stream, io.TextIOWrapper):
    return stream
  try:
    if stream.fileno() != fd:
      return stream
  except (OSError, ValueError):
    return stream
  stream.flush()
  raw = _Pipe(fd, ends)
  return io.TextIOWrapper(
    io.BufferedWriter(raw),
    encoding=stream.encoding,
    errors='backslashreplace',
    line_buffering=raw.isatty() or fd == 2,
  )


class _Pipe(io.FileIO):
  """A file descriptor that accepts all output. Once its reader has closed the pipe, the output is
  dropped."""

  def __init__(self, fd: int, ends: bool):
    super().__init__(fd, 'w', closefd=False)
    self._ends = ends

  def write(self, data) -> int | None:
    try:
      return super().write(data)
    except OSError as error:
      if error.errno not in GONE:
        raise
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self.fileno())
      os.close(nowhere)
      if self._ends:
        raise SystemExit(0) from None
      return len(data)


def make_parser(module: str) -> argparse.ArgumentParser:
  """Returns a parser of the arguments of the subcommand `module`. Its help shows the module's
  docstring and names the program as it was called."""
  program = pathlib.Path(sys.argv[0]).name
  return argparse.ArgumentParser(
    prog=program if program.endswith('.py') else f'{program} {module.rpartition(".")[2]}',
    description=sys.modules[module].__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )


def headline(path: pathlib.Path) -> str:
  """Returns the first line of a Python file's docstring, without importing the file."""
  return (ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or '').partition('\n')[0]


def listing(lines: Mapping[str, str]) -> str:
  """Returns names and their descriptions in two columns."""
  width = max(map(len, lines), default=0)
  return '\n'.join(f'  {name.ljust(width)}  {text}' for name, text in lines.items())


def pairs(text: str, flag: str) -> dict[str, str]:
  """Parses 'a=x,b=y' to {'a': 'x', 'b': 'y'}."""
  out = {}
  for part in filter(None, (text or '').split(',')):
    name, equals, value = part.partition('=')
    if not equals or not name or not value:
      raise ValueError(f'{flag}={text}: {part!r} does not have the form NAME=VALUE.')
    if name in out:
      raise ValueError(f'{flag}={text}: {name!r} occurs twice.')
    out[name] = value
  return out
