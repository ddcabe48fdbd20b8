"""The console command `alignjax`: it calls the subcommand that its first argument names."""

import difflib
import importlib
import pathlib
import sys

import alignjax
from alignjax.commands import command
from alignjax.runtime import memory

SUBCOMMANDS = (
  'run',
  'configs',
  'generate',
  'export',
  'prepare',
  'evaluate',
  'preference',
  'best_of_n',
  'heldout_labelers',
  'summarize',
  'estimate',
  'label',
  'rounds',
  'study',
)
# The output of these is their only result, so they end quietly when its reader goes.
END_WITH_READER = ('configs', 'generate', 'summarize')
# These compute with jax, so that large pages of memory can make them faster.
ON_DEVICES = (
  'run',
  'generate',
  'evaluate',
  'preference',
  'best_of_n',
  'heldout_labelers',
  'rounds',
  'study',
)


def main(name: str | None = None) -> None:
  """The entry point of a program. It may start the process anew (memory.restart_with_large_pages).

  Args:
    name: the subcommand whose arguments are in sys.argv; None takes the first of them as its name.
  """
  argv = sys.argv[1:]
  if name is None:
    name, *argv = argv or ['--help']
  if name in ON_DEVICES:
    memory.restart_with_large_pages()
  start(name, argv)


def start(name: str, argv: list[str]) -> None:
  """Runs the subcommand `name` as a program (command.start)."""

  def call(argv: list[str]) -> None:
    if name in ('--help', '-h'):
      print(help_text())
    elif name == '--version':
      print(alignjax.__version__)
    elif name in SUBCOMMANDS:
      importlib.import_module(f'alignjax.commands.{name}').main(argv)
    else:
      near = difflib.get_close_matches(name, SUBCOMMANDS, 1)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise ValueError(
        f'alignjax has no subcommand {name!r}.{hint} `alignjax --help` lists the subcommands.'
      )

  command.start(call, argv, ends_with_reader=name in END_WITH_READER)


def help_text() -> str:
  """Returns the output of `alignjax --help`. The subcommands are not imported, so that it appears
  at once."""
  folder = pathlib.Path(__file__).parent
  lines = {name: command.headline(folder / f'{name}.py') for name in SUBCOMMANDS}
  return '\n'.join(
    [
      'usage: alignjax SUBCOMMAND [ARGUMENTS]',
      '',
      alignjax.__doc__,
      '',
      command.listing(lines),
      '',
      '`alignjax SUBCOMMAND --help` describes a subcommand.',
    ]
  )
