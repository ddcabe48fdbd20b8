"""What all commands share: output that cannot stop them, errors in one line, and configs with their
flags.

if __name__ == '__main__':
  command.start(main, sys.argv[1:])
"""

from __future__ import annotations

import errno
import io
import locale
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
# what a write says when the reader or the terminal is no longer there
GONE = (errno.EPIPE, errno.EIO, errno.ESHUTDOWN)


def start(
  main: Callable[[list[str]], Any], argv: list[str], ends_with_reader: bool = False
) -> None:
  """Runs main(argv) as a command.

  Output goes on where it cannot be shown: a character that the output's encoding lacks is written
  as an escape, and what a reader who has gone (`| head -1`) does not take is dropped, as is what a
  closed descriptor (`>&-`) would get. Files are read and written as UTF-8 whatever the locale says:
  Python starts again in its UTF-8 mode where it did not start in it. Every OSError and ValueError
  ends in one line.

  Args:
    ends_with_reader: the command's output is its only result, so it ends quietly when the reader
      goes.
  """
  # one that is closed would be given to the next file that is opened, and that would get the output
  for fd in (0, 1, 2):
    try:
      os.fstat(fd)
    except OSError:
      nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
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
  # that PyTorch is absent: its tokenizers alone are used here
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
  """An error's message for a person: of an operating system's error its words and its file, of an
  unexpected kind its name too."""
  if isinstance(error, OSError) and error.strerror:
    return f'{error.filename}: {error.strerror}.' if error.filename else f'{error.strerror}.'
  expected = isinstance(error, (ValueError, OSError, FloatingPointError, RuntimeError)) and str(
    error
  )
  return str(error) if expected else f'{type(error).__name__}: {error}'


def _output(stream: Any, fd: int, ends: bool) -> Any:
  """The text stream, written through _Pipe; one that is no plain file descriptor stays as it is."""
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
  """A file descriptor that takes everything: once its reader has gone, it leads nowhere."""

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


class Found(NamedTuple):
  """config: locked, with the flags' changes. name: 'FILE-ARG' without folder and suffix. rest:
  --config=PATH[:ARG] and the arguments that are no entries of the config."""

  config: Any
  name: str
  rest: list[str]


def read_config(argv: list[str]) -> Found:
  """The config that --config=FILE[:ARG] names, changed by every --config.ENTRY=VALUE
  (experiments/overrides.py).

  FILE is looked up in the working directory, then beside the commands. ARG goes to its
  get_config(ARG). Bad ones are a SystemExit with one line. Where help is asked for, config is None.
  """
  from absl import flags

  from experiments import overrides

  argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
  value, changes, rest, words = None, [], [], list(argv)
  while words:
    word = words.pop(0)
    name, equals, given = word.lstrip('-').partition('=')
    if word == '--':
      rest, words = [*rest, word, *words], []
    elif word.startswith('-') and name == 'config':
      value = given if equals or not words else words.pop(0)
    elif word.startswith('-') and name.startswith(('config.', 'noconfig.')):
      entry = name.partition('.')[2]
      if not equals:  # the next word, or True where that is the next flag
        given = words.pop(0) if words and not re.match(r'-+[^-\d.]', words[0]) else 'True'
      changes.append((entry, 'False' if name.startswith('no') else given))
    else:
      rest.append(word)
  if value is None:
    if {word.lstrip('-').partition('=')[0] for word in rest} & {
      'help',
      'helpfull',
      'helpshort',
      'helpxml',
      'h',
      '?',
    }:
      return Found(None, '', rest)
    raise SystemExit(
      'error: --config=FILE.py[:ARG] is missing, such as --config=configs/ppo_ptx.py:tiny; --help '
      'says more.'
    )
  path, colon, arg = find_config(value).partition(':')
  try:
    config = overrides.load(path, arg if colon else None)
    overrides.apply(config, changes)
  except ValueError as error:
    raise SystemExit(f'error: {error}') from None
  return Found(
    config,
    pathlib.Path(path).stem + (f'-{arg}' if arg else ''),
    [f'--config={path}{colon}{arg}', *rest],
  )


def find_config(value: str) -> str:
  """FILE[:ARG] looked up in the working directory, then beside the commands."""
  path, colon, arg = value.partition(':')
  for place in (pathlib.Path(path).expanduser(), HERE / path):
    if place.is_file():
      return f'{place}{colon}{arg}'
  known = sorted(p.relative_to(HERE).as_posix() for p in (HERE / 'configs').glob('*.py'))
  raise SystemExit(
    f'--config={value}: no such file, here or beside {HERE.name}/run.py. There are: '
    f'{", ".join(known)}'
  )
