"""The table of evaluations: what is kept, how figures and differences come about, what the command
refuses."""

import dataclasses
import json
import pathlib
import re
import shutil
import sys
import types

import jax
import numpy as np
import pytest

from alignjax.commands import evaluate
from alignjax.evals import evaluation, registry, table
from alignjax.evals.table import Cell
from alignjax.inference import loading
from alignjax.runtime import fingerprints

CHAT = pathlib.Path(__file__).parent / 'golden' / 'chat'
CALLS: list[dict] = []


def letters(model, *, data, limit, seed, keep, add: float = 0.0):
  """A task: a number an item, from the model's weights."""
  CALLS.append(dict(data=data, limit=limit, seed=seed, add=add))
  (keep / 'seen').write_text('x')
  value = float(np.asarray(model.params['final']['norm']['scale']).sum())
  items = [f'item {i}' for i in range(limit or 4)]
  return [
    Cell('accuracy', 'zero-shot', [value + add + i for i in range(len(items))], items),
    Cell(
      'BLEU',
      '',
      [[i, i + 1] for i in range(len(items))],
      items,
      clusters=['a', 'a', 'b', 'b'][: len(items)],
      aggregate='test_table:total',
      better='',
    ),
  ]


def vowels(model, *, data, limit, seed, keep):
  """A task without options."""
  return [Cell('accuracy', 'zero-shot', [1.0, 0.0], ['a', 'b'])]


def total(values):
  return float(sum(b - a for a, b in values))


def model(scale: float):
  return types.SimpleNamespace(params={'final': {'norm': {'scale': np.full(3, scale, np.float32)}}})


@pytest.fixture(autouse=True)
def importable(monkeypatch):
  monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))
  monkeypatch.setitem(sys.modules, 'test_table', sys.modules[__name__])
  CALLS.clear()


def test_what_is_the_same_is_measured_once(tmp_path):
  """By weights, data contents, limit, seed and options; not by the name of a path."""
  file, copy, other = (tmp_path / n for n in ('a.txt', 'b.txt', 'c.txt'))
  file.write_text('data')
  copy.write_text('data')
  other.write_text('other data')
  run = lambda params=1.0, facts=None, **kw: registry.run_task(
    'test_table:letters',
    letters,
    model(params),
    {'weights': params, **(facts or {})},
    tmp_path / 'out',
    **(dict(data=str(file)) | kw),
  )[1]
  assert [run(), run(), run(data=str(copy))] == [False, True, True] and len(CALLS) == 1
  for change in (
    dict(params=2.0),
    dict(data=str(other)),
    dict(limit=3),
    dict(seed=1),
    dict(options={'add': 1.0}),
    dict(facts={'template': [[1, 2], 3]}),
    dict(facts={'dtype': 'bfloat16'}),
  ):
    assert (run(**change), run(**change)) == (False, True), change
  with pytest.raises(FileNotFoundError, match='--data: test_table:letters=.*no such file'):
    run(data=str(tmp_path / 'none'))
  with pytest.raises(ValueError, match='test_table:letters.plus: the task .* takes add'):
    run(options={'plus': 1})


def test_a_task_that_fails_leaves_no_result_and_keeps_what_it_kept(tmp_path):
  def fails(model, *, data, limit, seed, keep):
    assert (keep / 'seen').exists() == bool(CALLS)
    CALLS.append({})
    (keep / 'seen').write_text('x')
    if len(CALLS) == 1:
      raise ValueError('the judge is gone')
    return [Cell('m', '', [1.0], ['a'])]

  run = lambda: registry.run_task('fails', fails, model(1.0), {}, tmp_path)
  with pytest.raises(ValueError, match='the judge is gone'):
    run()
  assert run() == ([Cell('m', '', [1.0], ['a'])], False) and run()[1]


def test_figures_and_paired_differences_by_hand():
  base = Cell('accuracy', '', [0, 0, 1, None], ['a', 'b', 'c', 'd'])
  better = Cell('accuracy', '', [1, 1, 1, 1], ['d', 'c', 'b', 'z'])
  assert table.figure(base)['mean'] == pytest.approx(1 / 3) and table.figure(base)['n'] == 3
  found = table.difference(better, base)  # d: not measured; c: 1 - 1; b: 1 - 0; z: no partner
  assert found['mean'] == 0.5 and found['n'] == 2
  bleu = Cell('BLEU', '', [[0, 2], [1, 2]], ['a', 'b'], aggregate='test_table:total')
  assert table.figure(bleu)['mean'] == 3.0
  assert table.difference(bleu, bleu._replace(values=[[0, 1], [1, 2]]))['mean'] == 1.0
  # without one or the other 1 or 2, so the jackknife's error is .5; t with 1 degree of freedom
  assert table.figure(bleu)['ci95'] == pytest.approx([3 - 12.7062 / 2, 3 + 12.7062 / 2], abs=1e-3)
  same = bleu._replace(clusters=['x', 'x'])
  assert table.figure(same)['ci95'] == [None, None]  # one cluster says nothing of others
  assert table.figure(base._replace(values=[], items=[]))['mean'] is None
  assert table.figure(bleu._replace(values=[], items=[]))['mean'] is None


def test_the_interval_of_a_difference_is_paired():
  """Two models that differ by .1 on every item: the difference is certain, whatever the items'
  spread."""
  values = np.random.default_rng(0).normal(0, 10, 200)
  items = [str(i) for i in range(200)]
  found = table.difference(
    Cell('m', '', list(values + 0.1), items), Cell('m', '', list(values), items)
  )
  assert found['ci95'] == pytest.approx([0.1, 0.1])


def test_fingerprints_are_of_the_weights():
  tree = lambda x: {'a': {'b': np.asarray(x, np.float32)}}
  assert fingerprints.of_params(tree([1, 2])) == fingerprints.of_params(tree([1, 2]))
  others = [
    tree([2, 1]),
    tree([[1, 2]]),
    {'a': {'c': np.array([1, 2], np.float32)}},
    {'a': {'b': np.array([1, 2], np.float64)}},
  ]
  assert len({fingerprints.of_params(t) for t in [tree([1, 2]), *others]}) == 5


def variant(folder, **files):
  """A copy of the checkpoint with other files: name=function of the JSON in it."""
  shutil.copytree(CHAT, folder)
  for name, change in files.items():
    path = folder / f'{name}.json'
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
  return folder


def test_the_same_weights_in_another_dtype_template_tokenizer_or_context_are_measured_apart(
  tmp_path,
):
  lower = variant(
    tmp_path / 'lower', tokenizer=lambda t: t | dict(normalizer=dict(type='Lowercase'))
  )
  context = variant(tmp_path / 'context', config=lambda c: c | dict(max_position_embeddings=256))
  theta = variant(
    tmp_path / 'theta',
    config=lambda c: c | dict(rope_parameters=dict(rope_theta=5000.0, rope_type='default')),
  )
  models = [
    (f'hf:{CHAT}', 'plain', 'float32'),
    (f'hf:{CHAT}', 'plain', 'bfloat16'),
    (f'hf:{CHAT}', 'chat', 'float32'),
    (f'hf:{CHAT}', 'Q: {prompt}', 'float32'),
    (f'hf:{lower}', 'plain', 'float32'),
    (f'hf:{context}', 'plain', 'float32'),
    (f'hf:{theta}', 'plain', 'float32'),
  ]
  loaded = [loading.load(name, 'lm', form, dtype=dtype) for name, form, dtype in models]
  facts = [loading.facts(m) for m in loaded]
  assert len({f['weights'] for f in facts}) == 1 and [m.cfg.dtype for m in loaded][:2] == [
    'float32',
    'bfloat16',
  ]
  run = lambda m, f: registry.run_task('test_table:letters', letters, m, f, tmp_path / 'out')[1]
  assert [run(m, f) for m, f in zip(loaded, facts, strict=True)] == [False] * len(models) and len(
    CALLS
  ) == len(models)
  shutil.copytree(CHAT, tmp_path / 'same')
  again = loading.load(f'hf:{tmp_path / "same"}', 'lm', 'plain', dtype='float32')
  # a call leaves its settings in the tokenizer
  again.tokenizer('a b', truncation=True, max_length=3)
  assert loading.facts(again) == facts[0] and run(again, loading.facts(again))
  # A cache in int8 changes what is sampled. Where there is none, the facts are those of a version
  # that did not have it.
  assert 'kv_cache' not in facts[0]['model']
  rounded = again._replace(cfg=dataclasses.replace(again.cfg, kv_cache='int8'))
  assert not run(rounded, loading.facts(rounded))


def test_a_declared_dtype_is_what_the_products_are_computed_in():
  """In float32 whole: by default an accelerator rounds the factors of a float32 product."""
  tokens = np.zeros((1, 4), np.int32)
  for dtype in ('float32', 'bfloat16'):
    m = loading.load(f'hf:{CHAT}', 'lm', dtype=dtype)
    jaxpr = str(jax.make_jaxpr(m.nets.logits)(m.params, tokens, tokens == 0))
    whole = len(re.findall(r'precision=\(Precision.HIGHEST, Precision.HIGHEST\)', jaxpr))
    assert whole == (jaxpr.count('dot_general[') if dtype == 'float32' else 0)
    assert ('bf16' in jaxpr) == (dtype == 'bfloat16')


def test_one_model_has_no_plot_of_differences(tmp_path, monkeypatch):
  monkeypatch.setattr(loading, 'load', lambda *_: model(1.0))
  monkeypatch.setattr(loading, 'facts', lambda m: {})
  (tmp_path / 'table.png').write_text('of an earlier call')
  evaluation.evaluate({'one': 'x'}, ['test_table:letters'], tmp_path)
  assert (
    not (tmp_path / 'table.png').exists() and 'table.png' not in (tmp_path / 'table.md').read_text()
  )


def test_a_task_named_twice_and_one_that_is_not_there():
  with pytest.raises(ValueError, match="the task 'rte' occurs twice"):
    registry.find_tasks(['rte', 'rte'])
  with pytest.raises(ValueError, match="no task 'hellaswig'; did you mean hellaswag"):
    registry.find_tasks(['hellaswig'])


@pytest.mark.slow
def test_the_command_writes_one_table(tmp_path, capsys):
  arguments = [
    f'--models=pretrained=hf:{CHAT},tuned=hf:{CHAT}',
    '--tasks=test_table:letters,test_table:vowels',
    f'--out={tmp_path}',
    '--options=test_table:letters.add=0.5',
    '--limit=3',
  ]
  evaluate.main(arguments)
  assert 'tuned: test_table:letters measured before' in capsys.readouterr().out and len(CALLS) == 1
  made = json.loads((tmp_path / 'table.json').read_text())
  assert CALLS[0] == dict(data=None, limit=3, seed=0, add=0.5) and made['baseline'] == 'pretrained'
  assert made['rows'][0]['models']['tuned']['difference']['mean'] == 0
  assert {r['task'] for r in made['rows']} == {'test_table:letters', 'test_table:vowels'}, (
    'with options or without'
  )
  text = (tmp_path / 'table.md').read_text()
  assert (
    '| test_table:letters | accuracy ↑ | zero-shot |' in text
    and '## Difference to pretrained' in text
  )
  assert (tmp_path / 'table.png').stat().st_size > 3000
  evaluate.main(arguments)
  assert len(CALLS) == 1


@pytest.mark.parametrize(
  'flags,words',
  [
    (['--tasks=winogander'], "no task 'winogander'.*Tasks: "),
    (['--tasks=no_module:f'], 'no module named'),
    (['--tasks=,', '--models=a=hf:x'], '--tasks names no task'),
    (['--tasks=test_table:letters', '--models='], 'names no model'),
    (['--tasks=test_table:letters', '--models=a'], "'a' does not have the form NAME=VALUE"),
    (['--tasks=test_table:letters', '--models=a=hf:x,a=hf:y'], "'a' occurs twice"),
    (['--tasks=test_table:letters', '--models=a=hf:/nowhere'], 'no such folder'),
    (['--tasks=test_table:letters', '--models=a=/nowhere'], 'no finished stage'),
    (
      ['--tasks=test_table:letters', '--models=a=hf:x', '--data=drop=f'],
      "names the task 'drop', which is not among",
    ),
    (
      ['--tasks=test_table:letters', '--models=a=hf:x', '--options=add=1'],
      'does not have the form TASK.OPTION',
    ),
    (['--tasks=test_table:letters', '--models=a=hf:x', '--baseline=b'], 'none of the models a'),
    (['--tasks=test_table:letters', '--models=a=hf:x', '--limit=0'], '1 or more'),
  ],
)
def test_what_the_command_refuses(flags, words):
  with pytest.raises((ValueError, OSError), match=words):
    evaluate.main(flags)
