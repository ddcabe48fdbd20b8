"""Small edits of Python source, made from its syntax tree: the bugs of a slip of the hand.

Each replaces one expression by another in the text, so that everything else stays as it is. Texts,
annotations and what a `raise` says are left alone.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from typing import NamedTuple


class Mutant(NamedTuple):
  """file: below alignjax/. line: its number. start, end: of the replaced text; before, after: the
  two expressions."""

  file: str
  line: int
  start: int
  end: int
  before: str
  after: str

  def __str__(self) -> str:
    flat = lambda text: ' '.join(text.split())
    return f'{self.file}:{self.line}: `{flat(self.before)}` -> `{flat(self.after)}`'


BINARY = {
  ast.Add: '-',
  ast.Sub: '+',
  ast.Mult: '/',
  ast.Div: '*',
  ast.FloorDiv: '*',
  ast.Mod: '*',
  ast.BitAnd: '|',
  ast.BitOr: '&',
}
COMPARE = {ast.Lt: '<=', ast.LtE: '<', ast.Gt: '>=', ast.GtE: '>', ast.Eq: '!=', ast.NotEq: '=='}
RENAME = {
  'maximum': 'minimum',
  'minimum': 'maximum',
  'max': 'min',
  'min': 'max',
  'argmax': 'argmin',
  'any': 'all',
  'all': 'any',
  'sum': 'mean',
  'mean': 'sum',
  'rsqrt': 'sqrt',
  'exp': 'log',
  'ceil': 'floor',
  'ones_like': 'zeros_like',
}
# f(x, ...) -> x
FIRST = ('stop_gradient', 'clip', 'square', 'checkpoint', 'round', 'sorted', 'abs', 'astype')
SYMMETRIC = {'maximum', 'minimum', 'max', 'min'}


def mutants(file: str, source: str) -> list[Mutant]:
  """All mutants of a file, in order."""
  lines = source.splitlines(keepends=True)
  offset = [0]
  for line in lines:
    offset.append(offset[-1] + len(line.encode()))
  raw = source.encode()
  # ast counts columns in bytes
  at = lambda line, column: len(raw[: offset[line - 1] + column].decode())

  def text(node) -> str:
    return source[at(node.lineno, node.col_offset) : at(node.end_lineno, node.end_col_offset)]

  made = []
  for node in _expressions(ast.parse(source)):
    start, end = at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)
    for after in _changes(node, text):
      made.append(Mutant(file, node.lineno, start, end, source[start:end], after))
  return made


def _expressions(tree: ast.AST) -> Iterator[ast.AST]:
  """The expressions that compute something."""
  for field, value in ast.iter_fields(tree):
    if field in ('annotation', 'returns', 'decorator_list'):
      continue
    for child in value if isinstance(value, list) else [value]:
      if not isinstance(child, ast.AST) or isinstance(
        child, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)
      ):
        continue
      if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
        continue  # a docstring
      if isinstance(child, ast.expr):
        yield child
      yield from _expressions(child)


def _changes(node: ast.AST, text) -> Iterator[str]:
  if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
    yield f'{_side(node.left, text)} {BINARY[type(node.op)]} {_side(node.right, text)}'
  elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
    yield text(node.left)
  elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARE:
    yield f'{text(node.left)} {COMPARE[type(node.ops[0])]} {text(node.comparators[0])}'
  elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert, ast.Not)):
    yield text(node.operand)
  elif isinstance(node, ast.BoolOp):
    word = ' or ' if isinstance(node.op, ast.And) else ' and '
    yield '(' + word.join(text(v) for v in node.values) + ')'
  elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
    yield str(not node.value)
  elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
    yield (
      str(node.value + 1)
      if isinstance(node.value, int)
      else repr(node.value * 2 if node.value else 1.0)
    )
  elif isinstance(node, ast.IfExp):
    yield f'({text(node.body)})'
    yield f'({text(node.orelse)})'
  elif isinstance(node, ast.Call):
    yield from _calls(node, text)


def _side(node: ast.AST, text) -> str:
  return (
    f'({text(node)})'
    if isinstance(node, (ast.BinOp, ast.Compare, ast.BoolOp, ast.IfExp))
    else text(node)
  )


def _calls(node: ast.Call, text) -> Iterator[str]:
  name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', '')
  whole, head = text(node), text(node.func)
  if name in RENAME:
    yield head[: len(head) - len(name)] + RENAME[name] + whole[len(head) :]
  if name == 'where' and len(node.args) == 3:
    yield f'({text(node.args[1])})'
    yield f'({text(node.args[2])})'
  if name in FIRST and node.args and name != 'astype':
    yield f'({text(node.args[0])})'
  if name == 'astype':
    yield head[: -len('.astype')]
  parts = [text(a) for a in node.args]
  for i in range(len(parts) - 1):  # two neighbours that could be each other's
    alike = all(
      isinstance(a, (ast.Name, ast.Attribute, ast.Subscript))
      and not text(a).startswith(('jnp.', 'np.', 'jax.'))
      for a in node.args[i : i + 2]
    )
    if alike and name not in SYMMETRIC and parts[i] != parts[i + 1]:
      swapped = [
        *parts[:i],
        parts[i + 1],
        parts[i],
        *parts[i + 2 :],
        *map(_keyword(text), node.keywords),
      ]
      yield f'{head}({", ".join(swapped)})'


def _keyword(text):
  return lambda k: f'**{text(k.value)}' if k.arg is None else f'{k.arg}={text(k.value)}'


def sample(by_file: dict[str, list[Mutant]], count: int, seed: int) -> list[Mutant]:
  """`count` mutants, as many of each file as its length allows, drawn by the seed."""
  rng = random.Random(seed)
  piles = [rng.sample(pile, len(pile)) for pile in by_file.values()]
  drawn = []
  while len(drawn) < count and any(piles):
    drawn += [pile.pop() for pile in piles if pile]
  return sorted(drawn[:count])
