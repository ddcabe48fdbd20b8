"""The suite's own rules."""

import pathlib
import types

import conftest


def chosen(monkeypatch, day, names):
  """The names that a day leaves of tests f[0], f[1], ... of which two are to run, and of g."""
  out = []
  config = types.SimpleNamespace(
    hook=types.SimpleNamespace(pytest_deselected=lambda items: out.extend(items))
  )

  monkeypatch.setattr(conftest, 'SAMPLE', day)
  items = [Item(name) for name in names]
  conftest.pytest_collection_modifyitems(config, items)
  left = [one.nodeid for one in items]
  assert sorted(left + [one.nodeid for one in out]) == sorted(names)
  return left


class Item:
  """What the rules read of a test."""

  path = pathlib.Path('test_x.py')

  def __init__(self, name):
    self.nodeid, self.originalname = name, name.partition('[')[0]

  def get_closest_marker(self, _):
    return types.SimpleNamespace(args=(2,)) if self.originalname == 'f' else None


def test_a_day_samples_parameters_and_leaves_no_test_out(monkeypatch):
  names = [f'f[{i}]' for i in range(6)] + ['g[0]', 'g[1]']
  days = [chosen(monkeypatch, str(day), names) for day in range(40)]
  assert days[0] == chosen(monkeypatch, '0', names)
  for left in days:
    assert left[-2:] == ['g[0]', 'g[1]'] and len(left) == 4 and left == sorted(left)
  assert {name for left in days for name in left} == set(names)
  assert chosen(monkeypatch, 'all', names) == names
  assert chosen(monkeypatch, '0', ['f[3]', 'g[0]']) == ['f[3]', 'g[0]']  # as with pytest -k


def test_files_that_the_suite_names_exist():
  """A file that is renamed would lose its place in these lists."""
  names = {path.stem for path in pathlib.Path(__file__).parent.glob('test_*.py')}
  assert conftest.COMPILED_QUICKLY <= names
  assert {name.removesuffix('.py') for name in conftest.LONG_FILES} <= names
