"""The flags of the subcommands that take a config: --config, --config.ENTRY, and absl's."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from alignjax.commands import configs, overrides


class Found(NamedTuple):
  """The config that the flags name.

  Attributes:
    config: the locked config with the changes of the flags, or None if help is requested.
    name: 'FILE-ARG', without folder and suffix.
    rest: --config=PATH[:ARG] and the arguments that are not entries of the config.
  """

  config: Any
  name: str
  rest: list[str]


def read_config(argv: list[str]) -> Found:
  """Returns the config that --config=NAME[:ARG] names, changed by every --config.ENTRY=VALUE
  (overrides.py).

  configs.find looks up NAME, and ARG is the argument of the file's get_config(ARG). An error in any
  of them is a ValueError of one line. If help is requested, the config is None.
  """
  from absl import flags

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
      if not equals:  # The next word, or True if that is a flag.
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
    raise ValueError(
      '--config=NAME[:ARG] is missing, such as --config=ppo_ptx:tiny. `alignjax configs` lists the '
      'names that are included.'
    )
  name, colon, arg = value.partition(':')
  path = configs.find(name)
  config = overrides.load(str(path), arg if colon else None)
  overrides.apply(config, changes)
  return Found(
    config, path.stem + (f'-{arg}' if arg else ''), [f'--config={path}{colon}{arg}', *rest]
  )


def run_with_flags(run: Callable[[], None], module: str, argv: list[str]) -> None:
  """Parses argv by absl's flags and calls run(). --help shows the docstring and the flags of
  `module`, however the program was started. Without this, absl would show those of the file that
  Python runs."""
  from absl import app, flags

  for flag in flags.FLAGS.get_flags_for_module(module):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  sys.modules['__main__'].__doc__ = sys.modules[module].__doc__
  app.run(lambda _: run(), argv=[sys.argv[0], *argv])
