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


# Every room may import the rooms above its line, and nothing below or beside it: lazy imports
# count. What stands together on a line are files of one room, which may import each other as long
# as there is no circle.
ROOMS = (
  ('types', 'ops', 'plugins'),
  ('losses', 'optim', 'packing', 'sampling', 'rewards', 'steps'),
  ('rollout',),
  ('models',),
  ('sharding',),
  ('compiler',),
  ('runtime',),
  ('sandbox',),
  ('data',),
  ('setup',),
  ('inference',),
  ('evals.stats', 'evals.calibration', 'evals.items', 'evals.markdown', 'evals.table'),
  ('evals.safety',),
  ('evals.public',),
  ('evals.preference',),
  ('evals.reward',),
  (
    'evals.earlier',
    'evals.registry',
    'evals.evaluation',
    'evals.sandbox',
    'evals.findings',
    'evals.card',
  ),
  ('label',),
  ('stages',),
  ('plots',),
  ('report_page',),
  ('report',),
  ('train',),
  ('rounds', 'rounds_items', 'rounds_report'),
  ('configs',),
  ('studies',),
  ('commands',),
  ('__main__',),
)
# rooms that may not import each other
BESIDE = {'evals.safety', 'evals.public', 'evals.preference', 'evals.reward'}
MODULES = {
  path.relative_to(ROOT.parent)
  .with_suffix('')
  .as_posix()
  .replace('/', '.')
  .removesuffix('.__init__'): path
  for path in FILES
}


def room_of(module):
  """The number of the room that a module stands in, and its name there; None for packages that hold
  rooms."""
  short = module.removeprefix('alignjax.')
  for number, names in enumerate(ROOMS):
    for name in names:
      if short == name or short.startswith(f'{name}.'):
        return number, name
  return None


def edges():
  """(importing module, imported module), both of alignjax; lazy imports count."""
  for module, path in MODULES.items():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        found = {a.name for a in node.names}
      elif isinstance(node, ast.ImportFrom):
        names = {f'{node.module}.{a.name}' for a in node.names}
        found = {name if name in MODULES else node.module for name in names}
      else:
        continue
      yield from ((module, name) for name in sorted(found & MODULES.keys() - {'alignjax'}))


def test_rooms_import_downwards_only():
  for module, found in edges():
    (mine, own), (theirs, other) = room_of(module), room_of(found)
    assert theirs <= mine, f'{module} imports {found}, which stands above it in ROOMS'
    assert own == other or not {own, other} <= BESIDE, (
      f'{module} imports {found}: their rooms stand beside each other'
    )


def test_configs_are_data():
  """They are read without jax, and may not depend on what they configure."""
  for path in (ROOT / 'configs').glob('*.py'):
    found = {name.removeprefix('alignjax.').split('.')[0] for name in imports(path)}
    assert found <= {'configs', 'ml_collections'}, path


def test_every_module_stands_in_a_room_and_every_room_has_modules():
  holding = {'alignjax', 'alignjax.evals'}
  assert {m for m in MODULES if room_of(m) is None} == holding
  assert {room_of(m)[1] for m in MODULES if m not in holding} == {
    name for names in ROOMS for name in names
  }


def test_there_is_no_circle_of_imports():
  below: dict[str, set[str]] = {}
  for module, found in edges():
    below.setdefault(module, set()).add(found)
  done: set[str] = set()

  def visit(module, path):
    assert module not in path, f'a circle: {" -> ".join([*path[path.index(module) :], module])}'
    if module not in done:
      for other in sorted(below.get(module, ())):
        visit(other, [*path, module])
      done.add(module)

  for module in MODULES:
    visit(module, [])


def has(found, module):
  return any(f == module or f.startswith(f'{module}.') for f in found)


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_layers(path):
  name, found, text = path.relative_to(ROOT).as_posix(), imports(path), path.read_text()
  assert path.name not in ('utils.py', 'helpers.py', 'common.py', 'misc.py')
  assert len(text.splitlines()) <= 420, 'one concept a file: split it'
  assert has(found, 'flax.linen') <= name.startswith('models/')
  compiles = 'jax.jit(' in text or '@jax.jit' in text
  assert compiles <= (
    name.startswith(('stages/', 'evals/', 'inference/'))
    or name in ('runtime/checksums.py', 'setup/weights.py', 'setup/adapters.py')
  )
  assert has(found, 'ml_collections') <= (
    name.startswith(('stages/', 'setup/', 'configs/', 'commands/'))
    or name in ('train.py', 'report.py', 'inference/loading.py')
  )
  assert not (name.startswith('sandbox/') and has(found, 'jax'))
  assert not has(found, 'tensorflow') and not has(found, 'torch')


def test_every_import_is_a_declared_dependency():
  """A fresh environment has what setup.cfg names; what is optional is an extra, or says how to
  install it."""
  setup = configparser.ConfigParser()
  setup.read(ROOT.parent / 'setup.cfg')
  extras = setup['options.extras_require']
  normal = lambda name: re.sub('[-_.]+', '-', name).lower()
  owners = importlib.metadata.packages_distributions()
  optional = {'datasets', 'detoxify', 'wandb', 'trackio', 'mlflow', 'torch'}
  for path in FILES:
    text = setup['options']['install_requires'] + extras['eval']
    if 'label' in (path.parent.name, path.stem) or 'migrations' in path.parts:
      text += extras['label'] + extras['label-postgres']
    declared = {
      normal(re.match(r'[\w.-]+', line).group()) for line in text.split('\n') if line.strip()
    }
    for module in {name.split('.')[0] for name in imports(path)}:
      if module not in {*sys.stdlib_module_names, 'alignjax', 'lm_eval', *optional}:
        assert {normal(d) for d in owners[module]} & declared, (
          f'{path}: {module} is imported, but not in setup.cfg'
        )


def test_every_pitfall_has_a_test_and_every_document_that_is_named_exists():
  """docs/pitfalls.md says that the tests of its items carry their numbers."""
  root = ROOT.parent
  tests = ''.join(path.read_text() for path in (root / 'tests').glob('test_*.py'))
  held = {
    int(n)
    for names in re.findall(r'def test_item_(\d+(?:_and_\d+)*)', tests)
    for n in names.split('_and_')
  }
  assert held == {
    int(n) for n in re.findall(r'^\*\*(\d+)\.', (root / 'docs/pitfalls.md').read_text(), re.M)
  }
  folders = [
    (root / name).rglob('*') for name in ('alignjax', 'experiments', 'tests', 'launch', 'docs')
  ]
  texts = [
    root / 'README.md',
    *(p for found in folders for p in found if p.suffix in ('.py', '.md', '.sh')),
  ]
  named = {found for path in texts for found in re.findall(r'docs/[\w-]+\.md', path.read_text())}
  assert named and all((root / name).is_file() for name in named)


def test_every_mutation_finds_its_line():
  """tests/mutations.py quotes a line of the code for each bug that it puts in."""
  from tests.mutations import MUTATIONS

  for number, (_, name, right, wrong, _) in MUTATIONS.items():
    count = (ROOT / name).read_text().count(right)
    assert count == 1, f'mutation {number}: {right!r} stands {count} times in {name}'
    assert wrong != right
