"""Changes a config by flags: --config.ENTRY=VALUE sets any entry to any value that it may have.

  --config.stages.ppo.kl.target=6.0                  also where the entry is None
  --config.stages.sft.demonstrations=None            None for any entry
  --config.stages_to_run="('ppo', 'ppo_ptx')"        a tuple
  --config.stages_to_run=ppo                         a tuple of one item
  --config.stages.ppo.loss="dict(fn='mylab.losses:mine', beta=0.1)"
                                                     a dict replaces the whole present dict
  --config.stages.ppo.loss.beta=0.2                  an argument of a function that the dict names,
                                                     whether the dict lists it or not

A value is a Python literal, or dict(...); text needs no quotes. The value must have the type of the
entry that it replaces: a number for a number (a whole number for a whole number, except for entries
that may be fractions), and text for text.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

# Entries that may be whole numbers or fractions, whichever the config has.
FRACTIONS = ('epochs', 'warmup')
# Dicts with arbitrary entries, which are checked where they are read.
OPEN = ('model', 'reward_model', 'report.policies', 'report.data')


def load(path: str, arg: str | None) -> ml_collections.ConfigDict:
  """Returns the locked config of FILE.py's get_config(), or get_config(ARG). An error in the file
  or in ARG is a ValueError of one line."""
  where = f'--config={path}' + (f':{arg}' if arg is not None else '')
  try:
    spec = importlib.util.spec_from_file_location('experiment_config', path)
    if spec is None or spec.loader is None:
      raise ValueError(f'{where}: a config must be a Python file, NAME.py.')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.get_config() if arg is None else module.get_config(arg)
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from None
  except Exception as error:  # noqa: BLE001 the user's own code
    at = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    line = getattr(error, 'lineno', None) or (at[-1].lineno if at else None)
    raise ValueError(
      f'{where}: {type(error).__name__}: {error}' + (f' ({path}, line {line})' if line else '')
    ) from error
  if not isinstance(made, ml_collections.ConfigDict):
    raise ValueError(f'{where}: get_config() returns {type(made).__name__}, not a ConfigDict.')
  return made.lock()


def apply(config: ml_collections.ConfigDict, changes: Sequence[tuple[str, str]]) -> None:
  """Sets every (entry, text of its value) in the given order. An error is a ValueError that names
  the flag and the nearest entry or the expected type."""
  done: list[str] = []
  for entry, text in changes:
    if late := next((d for d in done if d.startswith(f'{entry}.')), None):
      raise ValueError(
        f'--config.{entry} comes after --config.{late} and would undo it: put it first.'
      )
    keys = [int(n) if n else name for name, n in re.findall(r'([^.\[\]]+)|\[(\d+)\]', entry)]
    if not keys:
      raise ValueError(f'--config.{entry}={text}: an entry must have a name.')
    _change(config, keys, text, f'--config.{entry}={text}', '', config)
    done.append(entry)


def _change(node: Any, keys: list, text: str, flag: str, path: str, config: Any) -> Any:
  """Returns `node` with the value at keys[0], keys[1], ... read from text. Configs and dicts are
  changed in place, and tuples are replaced."""
  key, rest = keys[0], keys[1:]
  here = f'{path}[{key}]' if isinstance(key, int) else f'{path}.{key}'.lstrip('.')
  if isinstance(key, int):
    if not isinstance(node, (tuple, list)) or key >= len(node):
      size = f'has {len(node)} items' if isinstance(node, (tuple, list)) else 'is not a list'
      raise ValueError(f'{flag}: {path} {size}.')
    items = list(node)
    items[key] = (
      _change(items[key], rest, text, flag, here, config)
      if rest
      else _read(text, type(items[key]), items[key], here, flag)
    )
    return type(node)(items)
  if not isinstance(node, (Mapping, ml_collections.ConfigDict)):
    raise ValueError(f'{flag}: {path}={node!r} has no entries of its own.')
  known = key in node
  if not known and not (
    rest == [] and (path in OPEN or path.rpartition('.')[2] == 'model' or 'fn' in node)
  ):
    raise ValueError(f'{flag}: the config has no entry {here}. {_near(config, node, key, path)}')
  current = node[key] if known else None
  if rest:
    value = _change(current, rest, text, flag, here, config)
    if value is current:
      return node
  else:
    kind = (
      node.get_type(key) if known and isinstance(node, ml_collections.ConfigDict) else type(current)
    )
    value = _read(text, kind, current, here, flag)
  if isinstance(node, ml_collections.ConfigDict):
    with node.unlocked(), node.ignore_type():
      node[key] = ml_collections.ConfigDict(value) if isinstance(value, dict) else value
    node.lock()
    return node
  return {**node, key: value}


def _near(config: Any, node: Any, key: str, path: str) -> str:
  """Returns a hint: an entry of this dict with a similar name, or else an entry elsewhere with the
  same name, or else the names of all entries."""
  if near := difflib.get_close_matches(key, list(map(str, node)), 1):
    return f'Did you mean {near[0]!r}?'
  found = [p for p in _paths(config, '') if p.rpartition('.')[2] == key]
  if found:
    return f'Did you mean {" or ".join(found[:3])}?'
  return f'{path or "It"} has {", ".join(sorted(map(str, node))) or "none"}.'


def _paths(node: Any, path: str):
  for key in node if isinstance(node, ml_collections.ConfigDict) else ():
    here = f'{path}.{key}'.lstrip('.')
    yield here
    yield from _paths(node[key], here)


def _read(text: str, kind: type, current: Any, where: str, flag: str) -> Any:
  """Returns the value of `text` with the type of the entry, `kind`, which is NoneType if the type
  is unknown."""
  if text == 'None':
    return None
  any_kind, is_text = kind is type(None), issubclass(kind, str)
  if is_text and not (len(text) > 1 and text[0] == text[-1] and text[0] in '\'"'):
    return text
  if text.lower() in ('true', 'false') and kind is bool:
    text = text.capitalize()
  try:
    value = _literal(ast.parse(text.strip(), mode='eval').body)
  except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
    if any_kind or (issubclass(kind, (tuple, list)) and re.fullmatch(r'[\w.:/~-]+', text)):
      value = text
    else:
      why = (
        f' ({error})' if isinstance(error, ValueError) and 'null bytes' not in str(error) else ''
      )
      raise ValueError(
        f'{flag}: {where} is {_kind(kind, current)}, and this is none{why}.'
      ) from None
  made = _fitted(value, kind, where.rpartition('.')[2])
  if made is _WRONG or (
    isinstance(made, (tuple, list))
    and isinstance(current, (tuple, list))
    and not _items_fit(made, current)
  ):
    raise ValueError(f'{flag}: {where} is {_kind(kind, current)}, not {value!r}.')
  return made


_WRONG = object()


def _fitted(value: Any, kind: type, name: str) -> Any:
  """Returns the value converted to `kind`, or _WRONG."""
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if number and not abs(value) <= sys.float_info.max:  # an integer may be too large for isfinite
    return _WRONG
  if value is None or kind is type(None):
    return value
  if kind is bool:
    return value if isinstance(value, bool) else _WRONG
  if issubclass(kind, (int, float)):
    if not number:
      return _WRONG
    if name in FRACTIONS:
      return value
    return float(value) if kind is float else int(value) if value == int(value) else _WRONG
  if issubclass(kind, (tuple, list)):
    return (
      _WRONG
      if isinstance(value, dict)
      else kind(value if isinstance(value, (tuple, list)) else (value,))
    )
  if issubclass(kind, (Mapping, ml_collections.ConfigDict)):
    return value if isinstance(value, dict) else _WRONG
  return value if isinstance(value, kind) else _WRONG


def _items_fit(made: Sequence, current: Sequence) -> bool:
  """Returns whether the items have types that occur among the present items, if there are any.
  Whole numbers and fractions count as one type."""

  def group(x):
    if isinstance(x, (int, float)) and not isinstance(x, bool):
      return float
    return tuple if isinstance(x, list) else type(x)

  return not current or {group(x) for x in made} <= {group(x) for x in current}


def _kind(kind: type, current: Any) -> str:
  words = {
    bool: 'True or False',
    int: 'a whole number',
    float: 'a number',
    str: 'text',
    tuple: 'a tuple',
    list: 'a list',
  }
  plain = next((words[k] for k in words if issubclass(kind, k)), 'a dict')
  return (
    plain
    + (f' such as {current!r}' if isinstance(current, (tuple, list)) and current else '')
    + ' or None'
  )


def _literal(node: ast.AST) -> Any:
  """Returns the value of a Python literal or of dict(key=value, ...)."""
  if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, bool, type(None))):
    return node.value
  if isinstance(node, (ast.Tuple, ast.List)):
    return (
      tuple(map(_literal, node.elts))
      if isinstance(node, ast.Tuple)
      else list(map(_literal, node.elts))
    )
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
    value = _literal(node.operand)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      return -value if isinstance(node.op, ast.USub) else value
  if isinstance(node, ast.Dict) and all(
    isinstance(k, ast.Constant) and isinstance(k.value, str) for k in node.keys
  ):
    return {k.value: _literal(v) for k, v in zip(node.keys, node.values, strict=True)}
  if (
    isinstance(node, ast.Call)
    and isinstance(node.func, ast.Name)
    and node.func.id == 'dict'
    and not node.args
    and (all(k.arg for k in node.keywords))
  ):
    return {k.arg: _literal(k.value) for k in node.keywords}
  raise ValueError('a value is a literal, or dict(name=value, ...)')
