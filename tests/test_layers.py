"""The import rules of the package, and the size of its files."""

import ast
import pathlib

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
  assert ('jax.jit(' in text or '@jax.jit' in text) <= name.startswith(('stages/', 'evals/'))
  assert has('ml_collections') <= (name.startswith('stages/') or name in ('train.py', 'report.py'))
  assert not (name.startswith('sandbox/') and has('jax'))
  assert not has('tensorflow') and not has('torch')
  if name in ('ops.py', 'losses.py', 'sampling.py', 'rollout.py', 'steps.py', 'types.py', 'optim.py'):
    for upper in ('models', 'data', 'stages', 'evals', 'train', 'sandbox'):
      assert not has(f'alignjax.{upper}'), f'{name} must not import {upper}'
