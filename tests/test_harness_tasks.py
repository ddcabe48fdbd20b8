"""Task files of one's own for lm-evaluation-harness, and its own tasks by name, as tasks of the
table."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest

from alignjax.evals import registry, table
from alignjax.evals.public import harness, harness_tasks
from alignjax.inference import loading

pytest.importorskip('lm_eval')
pytestmark = pytest.mark.filterwarnings('ignore')  # of the harness and its data library
CHAT = pathlib.Path(__file__).parent / 'golden' / 'chat'

CHOICE = """
task: my_choice
include: _base.yaml
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
process_docs: !function own.shout
metric_list:
  - metric: acc
  - metric: f1
    aggregation: !function own.share
"""
WRITTEN = """
task: my_words
include: _base.yaml
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list:
  - metric: exact_match
    ignore_case: true
filter_list:
  - name: whole
    filter: [{function: take_first}]
  - name: first-word
    filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]
"""
ROLLING = """
task: my_text
include: _base.yaml
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
BASE = 'dataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\n'
OWN = """
def shout(docs):
  return docs.map(lambda doc: {**doc, 'question': doc['question'].upper()})


def share(pairs):
  return sum(gold == pred for gold, pred in pairs) / len(pairs)
"""
ROWS = [
  dict(question=f'why {i}?', choices=['yes', 'no way', 'maybe'], gold=i % 3) for i in range(6)
]


@pytest.fixture
def folder(tmp_path):
  data = tmp_path / 'data.jsonl'
  data.write_text('\n'.join(map(json.dumps, ROWS)))
  tasks = tmp_path / 'tasks'
  tasks.mkdir()
  for name, text in (
    ('choice', CHOICE),
    ('words', WRITTEN),
    ('text', ROLLING),
    ('_base', BASE % data),
  ):
    (tasks / f'{name}.yaml').write_text(text)
  (tasks / 'own.py').write_text(OWN)
  return tasks


@pytest.fixture
def scripted(monkeypatch):
  """Prefers ' no way'; answers 'Yes sir' to everything; a text's log-likelihood is minus its
  characters."""
  from lm_eval.api.model import LM

  class Scripted(LM):
    asked: list = []

    def loglikelihood(self, requests, disable_tqdm=False):
      self.asked += [r.args for r in requests]
      return [(-1.0 if r.args[1] == ' no way' else -2.0, False) for r in requests]

    def generate_until(self, requests, disable_tqdm=False):
      return ['Yes sir' for _ in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      return [-float(len(r.args[0])) for r in requests]

  lm = Scripted()
  monkeypatch.setattr(harness, 'language_model', lambda model, **_: lm)
  return lm


def test_a_folder_of_task_files(folder, scripted, tmp_path):
  tasks = registry.find_tasks([str(folder)])
  assert list(tasks) == ['my_choice', 'my_text', 'my_words']  # what others include is no task
  run = lambda name, **kw: {
    c.metric: c
    for c in tasks[name](None, **(dict(data=None, limit=None, seed=0, keep=tmp_path) | kw))
  }
  choice = run('my_choice')
  assert choice['acc'].values == [0.0, 1.0, 0.0] * 2 and choice['acc'].items == list('012345')
  assert choice['acc'].prompt == 'zero-shot'
  assert scripted.asked[0] == ('Q: WHY 0?\nA:', ' yes')
  assert table.figure(choice['f1'])['mean'] == pytest.approx(1 / 3) and choice['f1'].values[1] == [
    1.0,
    1.0,
  ]
  words = run('my_words')
  assert (
    words['exact_match, whole'].values == [0.0] * 6
    and words['exact_match, first-word'].values == [1.0, 0.0, 0.0] * 2
  )
  text = run('my_text')
  # 6 characters, 2 words
  assert table.figure(text['word_perplexity'])['mean'] == pytest.approx(math.exp(6 * 6 / (6 * 2)))
  assert (
    table.figure(text['bits_per_byte'])['mean'] == pytest.approx(1 / math.log(2))
    and text['bits_per_byte'].better == 'lower'
  )
  some = run('my_choice', limit=2, seed=1)['acc']
  assert len(some.items) == 2 and some.items == run('my_choice', limit=2, seed=1)['acc'].items
  shots = run('my_choice', shots=2, limit=1)['acc']
  assert shots.prompt == '2-shot' and scripted.asked[-1][0].count('Q: ') == 3
  other = tmp_path / 'other.jsonl'
  other.write_text(json.dumps(ROWS[1]) + '\n')
  assert run('my_choice', data=str(other))['acc'].values == [1.0]


def test_results_are_kept_by_file_included_file_functions_and_data(folder, scripted, tmp_path):
  task = lambda: registry.find_tasks([str(folder / 'choice.yaml')])['my_choice']
  run = lambda: registry.run_task('my_choice', task(), None, {}, tmp_path / 'out')[1]
  assert (run(), run()) == (False, True)
  for path, old, new in (
    (folder / 'choice.yaml', 'A:', 'B:'),
    (folder / '_base.yaml', 'test_split', '\nrepeats: 1\ntest_split'),
    (folder / 'own.py', 'upper', 'lower'),
    (tmp_path / 'data.jsonl', 'maybe', 'perhaps'),
  ):
    path.write_text('# a comment\n' * (path.suffix != '.jsonl') + path.read_text())
    assert run()
    path.write_text(path.read_text().replace(old, new))
    assert (run(), run()) == (False, True), path


@pytest.mark.parametrize(
  'change,words',
  [
    (dict(choice='task: [a'), 'choice.yaml is not a task file of the harness .ParserError'),
    (dict(choice='- a\n'), 'choice.yaml is not a task file'),
    (dict(choice='group: g\ntask: [a, b]\n'), 'choice.yaml: it is a group of tasks'),
    (dict(choice='a: b\n'), 'choice.yaml: it is not a task, because it has no entry `task`'),
    (
      dict(choice=CHOICE.replace('own.shout', 'own.shoot')),
      'choice.yaml is not a task file.*shoot',
    ),
    (
      dict(_base=BASE % '/nowhere/x.jsonl'),
      'my_choice: the task of .*choice.yaml cannot be made .*/nowhere/x.jsonl',
    ),
  ],
)
def test_files_that_are_no_tasks_are_named(folder, scripted, tmp_path, change, words):
  for name, text in change.items():
    (folder / f'{name}.yaml').write_text(text)
  with pytest.raises((ValueError, FileNotFoundError), match=words):
    registry.find_tasks([str(folder / 'choice.yaml')])['my_choice'](
      None, data=None, limit=None, seed=0, keep=tmp_path
    )


def test_generation_arguments_that_cannot_be_are_named_with_their_file(folder, scripted, tmp_path):
  path = folder / 'words.yaml'
  path.write_text(path.read_text().replace('do_sample: false', 'num_beams: 10'))
  with pytest.raises(
    ValueError, match='my_words, in .*words.yaml: .*num_beams=10 is not supported'
  ):
    registry.find_tasks([str(path)])['my_words'](None, data=None, limit=None, seed=0, keep=tmp_path)


def test_other_names(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match='--tasks=nowhere/x.yaml: no such file'):
    registry.find_tasks(['nowhere/x.yaml'])
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match='the folder has no YAML file'):
    registry.find_tasks([str(tmp_path / 'empty')])
  (folder / 'again.yaml').write_text(CHOICE)
  with pytest.raises(ValueError, match="two files define the task 'my_choice'"):
    registry.find_tasks([str(folder)])
  with pytest.raises(ValueError, match='a group of the harness.*arc_challenge,arc_easy'):
    registry.find_tasks(['ai2_arc'])
  with pytest.raises(ValueError, match='a group of the harness.*mmlu_humanities,mmlu_other'):
    registry.find_tasks(['mmlu'])
  with pytest.raises(ValueError, match='has it as a class'):
    registry.find_tasks(['20_newsgroups'])


def test_the_harness_own_tasks_by_name(tmp_path, scripted):
  """arc_easy, on a file of its fields."""
  tasks = registry.find_tasks(['arc_easy', 'lambada_openai'])
  data = tmp_path / 'arc.jsonl'
  data.write_text(
    '\n'.join(
      json.dumps(
        dict(
          id=str(i),
          question='Which?',
          answerKey='BA'[i],
          choices=dict(text=['yes', 'no way'], label=['A', 'B']),
        )
      )
      for i in range(2)
    )
  )
  cells = {
    c.metric: c.values
    for c in tasks['arc_easy'](None, data=str(data), limit=None, seed=0, keep=tmp_path)
  }
  assert cells['acc'] == [1.0, 0.0] and scripted.asked[0] == ('Question: Which?\nAnswer:', ' yes')


def test_instructions_are_verified_by_the_harness(tmp_path, scripted):
  """IFEval. The scripted answer, 'Yes sir', is English without a comma and of two words."""
  pytest.importorskip('langdetect')
  rows = [
    ('no_comma', ['punctuation:no_comma'], [{}]),
    (
      'long',
      ['punctuation:no_comma', 'length_constraints:number_words'],
      [{}, dict(num_words=9, relation='at least')],
    ),
    (
      'short',
      ['length_constraints:number_words', 'keywords:existence'],
      [dict(num_words=9, relation='less than'), dict(keywords=['sir'])],
    ),
  ]
  data = tmp_path / 'ifeval.jsonl'
  data.write_text(
    '\n'.join(
      json.dumps(dict(key=i, prompt=prompt, instruction_id_list=ids, kwargs=kwargs))
      for i, (prompt, ids, kwargs) in enumerate(rows)
    )
  )
  task = registry.find_tasks(['ifeval'])['ifeval']
  cells = {c.metric: c for c in task(None, data=str(data), limit=None, seed=0, keep=tmp_path)}
  assert cells['prompt_level_strict_acc'].values == [1.0, 0.0, 1.0]
  assert cells['inst_level_strict_acc'].values == [[True], [True, False], [True, True]]
  # A share of five instructions, and not the mean of the prompts' shares.
  assert table.figure(cells['inst_level_strict_acc'])['mean'] == pytest.approx(4 / 5)
  assert table.figure(cells['prompt_level_loose_acc'])['mean'] == pytest.approx(2 / 3)


def test_a_chat_template_renders_the_prompts(folder, tmp_path):
  model = loading.load(f'hf:{CHAT}')
  task = registry.find_tasks([str(folder / 'words.yaml')])['my_words']
  options: dict = dict(data=None, limit=1, seed=0, keep=tmp_path)
  (cell, _) = task(model, chat=True, **options)
  assert cell.prompt == 'zero-shot, chat'
  (line,) = (tmp_path / 'samples-my_words-zero-shot_chat-whole.jsonl').read_text().splitlines()
  found = json.loads(line)
  turns = [dict(role='user', content=found['doc']['question'])]
  assert found['prompt'] == model.tokenizer.apply_chat_template(
    turns, tokenize=False, add_generation_prompt=True
  )
  with pytest.raises(ValueError, match=r'my_words\.chat=1: it must be true or false'):
    task(model, chat=1, **options)
  bare = model._replace(tokenizer=None)
  with pytest.raises(ValueError, match='my_words.chat=true: the tokenizer of this model has no'):
    task(bare, chat=True, **options)


def test_a_package_that_a_task_needs_is_named(folder, tmp_path):
  (folder / 'own.py').write_text('import no_such_package\n' + OWN)
  with pytest.raises(ValueError, match="choice.yaml: its functions need .*'no_such_package'"):
    registry.find_tasks([str(folder / 'choice.yaml')])


def test_the_names_are_those_that_the_harness_finds():
  """A sample of its files, parsed whole by the harness."""
  from lm_eval.tasks._index import TaskIndex

  known = harness_tasks.index()
  assert len(known) > 10_000
  for name in sorted(n for n, k in known.items() if k.kind in ('task', 'class'))[::400]:
    entry = TaskIndex.entry_from_path(known[name].path)
    assert (entry.name, entry.kind.name) == (
      name,
      {'task': 'TASK', 'class': 'PY_TASK'}[known[name].kind],
    )


def test_perplexity_is_that_of_the_logits(folder, tmp_path):
  """A text through the real interface, against the log-softmax in float64."""
  model = loading.load(f'hf:{CHAT}', dtype='float32')
  cell = {
    c.metric: c
    for c in registry.find_tasks([str(folder / 'text.yaml')])['my_text'](
      model, data=None, limit=2, seed=0, keep=tmp_path
    )
  }['bits_per_byte']
  asked = [ROWS[int(i)]['question'] for i in cell.items]
  total = 0.0
  for text in asked:
    row = np.array([[*model.template.start, *model.encode(text)]], np.int32)
    logits = np.asarray(jax.jit(model.nets.logits)(model.params, row, row >= 0), np.float64)[0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total += sum(logprobs[t, row[0, t + 1]] for t in range(row.shape[1] - 1))
  assert table.figure(cell)['mean'] == pytest.approx(
    -total / sum(len(t.encode()) for t in asked) / math.log(2), rel=1e-4
  )
