"""Lists the configs that are included.

    alignjax configs

Every name can be given as --config=NAME[:ARGUMENT]. The files are in alignjax/configs (in a clone
also under experiments/configs), and their docstrings describe their arguments. A config of your own
is a Python file with a function get_config(), given as --config=PATH[:ARGUMENT].
"""

import ast
import difflib
import pathlib

from alignjax.commands import command

FOLDER = pathlib.Path(__file__).resolve().parent.parent / 'configs'
SCRIPTS = FOLDER.parent.parent / 'experiments'  # This folder exists only in a clone.


def main(argv: list[str]) -> None:
  parser = command.make_parser(__name__)
  parser.parse_args(argv)
  print(command.listing(included()))


def included() -> dict[str, str]:
  """Returns {name: first line of the docstring} of every included config that can be run.

  A file whose get_config has arguments without defaults is not included in the result, because it
  serves other configs.
  """
  return {
    path.stem: command.headline(path)
    for path in sorted(FOLDER.glob('*.py'))
    if _can_be_called(path)
  }


def _can_be_called(path: pathlib.Path) -> bool:
  """Returns whether the file defines a get_config that needs no arguments. The file is not
  imported."""
  for node in ast.parse(path.read_text(encoding='utf-8')).body:
    if isinstance(node, ast.FunctionDef) and node.name == 'get_config':
      by_position = [*node.args.posonlyargs, *node.args.args]
      return len(node.args.defaults) == len(by_position) and None not in node.args.kw_defaults
  return False


def find(name: str) -> pathlib.Path:
  """Returns the file that --config=NAME means.

  NAME is looked up as a path from the current folder, then among the included configs, as NAME,
  NAME.py or configs/NAME.py, and then as a path from experiments/. If it is not found, a ValueError
  names the nearest included configs and all of them.
  """
  short = name.removeprefix('configs/')
  places = (pathlib.Path(name).expanduser(), FOLDER / short, FOLDER / f'{short}.py', SCRIPTS / name)
  for place in places:
    if place.is_file():
      return place
  known = list(included())
  near = difflib.get_close_matches(pathlib.Path(name).stem, known)
  hint = f' Did you mean {" or ".join(near)}?' if near else ''
  raise ValueError(
    f'--config={name}: there is no such file, and no included config has this name.{hint} '
    f'The included configs are {", ".join(known)}.'
  )
