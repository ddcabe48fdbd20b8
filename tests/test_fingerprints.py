"""Fingerprints change with what counts, and with nothing else."""

import functools
import os
import sys

import jax.numpy as jnp
import pytest

from alignjax import plugins
from alignjax.runtime import fingerprints


@pytest.fixture
def lab(tmp_path, monkeypatch):
  """write(name, text) of modules of a user's, and the fingerprint of mylab_rule:rule."""
  monkeypatch.syspath_prepend(str(tmp_path))

  def write(name, text):
    path = tmp_path / f'{name}.py'
    changed = path.stat().st_mtime_ns + 10**9 if path.exists() else None
    path.write_text(text)
    if changed:
      os.utime(path, ns=(changed, changed))
    sys.modules.pop(name, None)

  write('mylab_words', 'WORDS = ["a"]\n')
  write(
    'mylab_rule',
    'def rule(x):\n  """Counts."""\n  from mylab_words import WORDS\n  return x in WORDS\n',
  )
  rule = 'mylab_rule:rule'
  yield write, lambda: fingerprints.of_function(plugins.find(rule, 'reward.function'), rule)
  for name in ('mylab_words', 'mylab_rule'):
    sys.modules.pop(name, None)


def test_a_function_is_known_by_its_source_and_what_it_imports_when_called(lab):
  write, of = lab
  first = of()
  assert first == of()
  write(
    'mylab_rule',
    'def rule(x):\n  """Counts words."""\n  from mylab_words import WORDS  # a list\n\n  return x '
    'in WORDS\n',
  )
  assert of() == first, 'comments, docstrings and layout mean nothing'
  write('mylab_words', 'WORDS = ["b"]\n')
  second = of()
  assert second != first, 'a module that it imports has changed'
  write('mylab_rule', 'def rule(x):\n  from mylab_words import WORDS\n  return x not in WORDS\n')
  assert of() not in (first, second)


@pytest.mark.parametrize('folder', ['site-packages', 'dist-packages'])
def test_packages_of_another_environment_do_not_count(lab, tmp_path, monkeypatch, folder):
  """A virtual environment may also find those of the user or of the system. They are not followed:
  some cannot be imported."""
  write, of = lab
  monkeypatch.syspath_prepend(str(tmp_path / f'lib/{folder}'))
  package = tmp_path / f'lib/{folder}/{folder[:4]}_library'
  package.mkdir(parents=True)
  (package / '__init__.py').write_text(f'import {package.name}.windows.console')
  write('mylab_words', f'WORDS = ["a"]\n\n\ndef more():\n  import {package.name}\n')
  first = of()
  (package / '__init__.py').write_text('changed = True')
  assert of() == first
  (package / '__init__.py').write_text(f'import {package.name}.windows.console')
  (package / 'windows').mkdir()
  (package / 'windows/__init__.py').write_text('assert False')
  assert of() == first


def test_the_module_that_names_a_function_counts_where_it_takes_it_from_elsewhere(lab):
  write, of = lab
  write(
    'mylab_words',
    'def weighed(x, weight):\n  return x * weight\n\n\ndef make(weight):\n  return lambda x: x * '
    'weight\n',
  )
  made = []
  for text in (
    'functools.partial(weighed, weight=0.5)',
    'functools.partial(weighed, weight=0.7)',
    'make(0.5)',
    'make(0.7)',
  ):
    write('mylab_rule', f'import functools\nfrom mylab_words import make, weighed\nrule = {text}\n')
    made.append(of())
    assert of() == made[-1]
  assert len(set(made)) == 4


def test_a_function_of_alignjax_is_known_by_the_modules_of_alignjax_behind_it():
  from alignjax import losses

  assert fingerprints.of_function(losses.sft) != fingerprints.of_function(losses.ppo)
  assert fingerprints.of_function(losses.sft) == fingerprints.of_function(
    functools.partial(losses.sft, nets=None)
  )


def test_files_by_contents(tmp_path):
  (tmp_path / 'a').write_text('1')
  (tmp_path / 'b').write_text('1')
  one = fingerprints.of_files([tmp_path / 'a'])
  assert one == fingerprints.of_files([tmp_path / 'b']) and one != fingerprints.of_files(
    [tmp_path / 'a', tmp_path / 'b']
  )
  assert fingerprints.of_files([tmp_path]) == fingerprints.of_files(
    [tmp_path / 'a', tmp_path / 'b']
  )
  with pytest.raises(FileNotFoundError, match='nothing'):
    fingerprints.of_files([tmp_path / 'nothing'])


def test_weights_by_bits_and_values_by_contents():
  assert fingerprints.of_params({'a': jnp.zeros(3)}) != fingerprints.of_params({'a': -jnp.zeros(3)})
  assert fingerprints.of_params({'a': jnp.zeros(3)}) != fingerprints.of_params({'b': jnp.zeros(3)})
  of = fingerprints.of_value
  assert of({'a': 1, 'b': 2}) == of({'b': 2, 'a': 1}) != of({'a': 2, 'b': 1})
  assert fingerprints.of_value('\ud800')  # text that no file could hold
