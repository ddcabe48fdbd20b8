"""The import rules of the package, and the size of its files."""

import ast
import configparser
import importlib.metadata
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent / 'alignjax'
FILES = sorted(ROOT.rglob('*.py'))


def imports(path):
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {a.name for a in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {node.module, *(f'{node.module}.{a.name}' for a in node.names)}
  return found


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_layers(path):
  name, found = path.relative_to(ROOT).as_posix(), imports(path)
  has = lambda module: any(f == module or f.startswith(f'{module}.') for f in found)
  text = path.read_text()
  assert path.name != 'utils.py'
  assert len(text.splitlines()) < 330, 'one concept a file: split it'
  assert has('flax.linen') <= name.startswith('models/')
  assert ('jax.jit(' in text or '@jax.jit' in text) <= (name.startswith(('stages/', 'evals/')) or name == 'runtime/checksums.py')
  assert has('ml_collections') <= (name.startswith('stages/') or name in ('train.py', 'report.py'))
  assert not (name.startswith('sandbox/') and has('jax'))
  assert not has('tensorflow') and not has('torch')
  if name in ('ops.py', 'losses.py', 'sampling.py', 'rollout.py', 'steps.py', 'types.py', 'optim.py'):
    for upper in ('models', 'data', 'stages', 'evals', 'train', 'sandbox'):
      assert not has(f'alignjax.{upper}'), f'{name} must not import {upper}'


def test_every_import_is_a_declared_dependency():
  """A fresh environment has what setup.cfg names; what is optional is an extra, or says how to install it."""
  setup = configparser.ConfigParser()
  setup.read(ROOT.parent / 'setup.cfg')
  text = setup['options']['install_requires'] + setup['options.extras_require']['eval']
  normal = lambda name: re.sub('[-_.]+', '-', name).lower()
  declared = {normal(re.match(r'[\w.-]+', line).group()) for line in text.split('\n') if line.strip()}
  owners = importlib.metadata.packages_distributions()
  optional = {'datasets', 'detoxify', 'wandb', 'torch'}
  files = [*FILES, *(ROOT.parent / 'experiments').rglob('*.py')]
  for module in sorted({name.split('.')[0] for path in files for name in imports(path)}):
    if module not in {*sys.stdlib_module_names, 'alignjax', 'experiments', 'lm_eval', *optional}:
      assert {normal(d) for d in owners[module]} & declared, f'{module} is imported, but not in setup.cfg'


def test_every_pitfall_has_a_test_and_every_document_that_is_named_exists():
  """docs/pitfalls.md says that the tests of its items carry their numbers."""
  root = ROOT.parent
  tests = ''.join(path.read_text() for path in (root / 'tests').glob('test_*.py'))
  held = {int(n) for names in re.findall(r'def test_item_(\d+(?:_and_\d+)*)', tests) for n in names.split('_and_')}
  assert held == {int(n) for n in re.findall(r'^\*\*(\d+)\.', (root / 'docs/pitfalls.md').read_text(), re.M)}
  folders = [(root / name).rglob('*') for name in ('alignjax', 'experiments', 'tests', 'launch', 'docs')]
  texts = [root / 'README.md', *(p for found in folders for p in found if p.suffix in ('.py', '.md', '.sh'))]
  named = {found for path in texts for found in re.findall(r'docs/[\w-]+\.md', path.read_text())}
  assert named and all((root / name).is_file() for name in named)
