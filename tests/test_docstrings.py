"""Docstrings document what is there: every name that one documents is an argument of the function,
or a field of the class."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / 'alignjax').rglob('*.py'))
SECTIONS = 'Args|Attributes|Returns|Yields|Raises|Example|Examples|Note|Source'
# 'name: text', 'one, other: text', 'call(argument), if any: text' or '*more: text'
ENTRY = re.compile(r'\*{0,2}([a-z]\w*(?:\([^)]*\))?(?:, \*{0,2}[a-z]\w*(?:\([^)]*\))?)*): ')


def documented(docstring):
  """The names that a docstring documents: at the beginning of an entry of its Args or Attributes
  section, and of a paragraph of its own."""
  found, section, indent, begins, listed = [], None, None, False, False
  for line in docstring.split('\n')[1:]:
    text, depth = line.strip(), len(line) - len(line.lstrip())
    heading = re.fullmatch(rf'({SECTIONS}):(.*)', text)
    if heading:
      section, text, indent = heading[1], heading[2].strip(), None
      running = bool(text)  # entries follow each other in a line
    elif not text:
      section, begins, listed = None, True, False
      continue
    elif indent is None:
      indent = depth
    if section is None:
      begins = begins and (listed or bool(ENTRY.match(text)))
      listed = begins
      parts = re.split(r'(?<=[.;]) ', text) if begins else []
    elif section not in ('Args', 'Attributes'):
      parts = []
    elif running:
      parts = re.split(r'(?<=[.;]) ', text)
    else:
      parts = [text] if depth == indent else []
    for entry in filter(None, map(ENTRY.match, parts)):
      found += [re.match(r'\w+', name)[0] for name in re.findall(r'\w+(?:\([^)]*\))?', entry[1])]
  return found


def arguments(function):
  """The names of a function's arguments and of those of the functions that it defines, which it may
  return."""
  found = set()
  for node in ast.walk(function):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
      a = node.args
      every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
      found |= {argument.arg for argument in every}
  return found


def members(cls):
  """The names of a class's fields, methods and arguments."""
  found = set()
  for node in cls.body:
    if isinstance(node, ast.AnnAssign):
      found.add(node.target.id)
    elif isinstance(node, ast.Assign):
      found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    elif isinstance(node, ast.FunctionDef):
      found.add(node.name)
      found |= arguments(node)
      found |= {
        target.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Assign)
        for target in inner.targets
        if isinstance(target, ast.Attribute)
      }
  return found


def wrong(source):
  """'object: name' of each name that a docstring of the source documents and that is not there."""
  out = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
      known = members(node) if isinstance(node, ast.ClassDef) else arguments(node)
      text = ast.get_docstring(node) or ''
      if text.startswith('->'):  # of what a function returns, with its arguments and results
        known = known | {*re.findall(r'\w+', text.partition('\n\n')[0])}
      names = documented(text)
      out += [f'{node.name}: {name}' for name in names if name not in known]
  return out


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_docstrings_document_what_is_there(path):
  assert wrong(path.read_text()) == []


def test_what_is_not_there_is_found():
  source = '''
def one(a, *, b):
  """Says, in its first
  lines: nothing.

  Args:
    a: is there; more: is not looked for here.
      deeper: belongs to a.
    c, b: one of the two is not.
  Returns: a number
    d: of the result.
  """
  return lambda e: e

def two(a):
  """-> f(b) -> (c, d).

  b: is said above. e: is not. d: a result

  f: said. g: not.
  """

def three(a):
  """Old form.

  Args: a: is there. b: is not; c: neither.
  """

class Four:
  """Fields.

  Attributes:
    a: a field.
    b: none.
    c: set later.
  """
  a: int
  def __init__(self):
    self.c = 1
'''
  assert wrong(source) == [*('one: c', 'two: e', 'two: g', 'three: b', 'three: c'), 'Four: b']
