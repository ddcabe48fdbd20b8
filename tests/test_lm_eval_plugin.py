"""lm-evaluation-harness finds our models by name, in its own command and from Python."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

lm_eval = pytest.importorskip('lm_eval', reason="pip install 'alignjax[eval]'")
pytestmark = pytest.mark.filterwarnings('ignore')  # of the harness and its data library

from alignjax.evals.public import harness, lm_eval_plugin  # noqa: E402 needs lm_eval
from alignjax.inference import loading  # noqa: E402

CHAT = pathlib.Path(__file__).parent / 'golden' / 'chat'
ROWS = [
  {'question': 'Is water wet?', 'choices': ['yes', 'no'], 'gold': 0},
  {'question': 'Is fire cold?', 'choices': ['yes', 'no'], 'gold': 1},
  {'question': 'Two and two?', 'choices': ['four', 'five'], 'gold': 0},
]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - metric: acc
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
  """A folder with one task; the harness may not look for anything on a hub."""
  monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
  monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
  (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
  (tmp_path / 'tasks').mkdir()
  (tmp_path / 'tasks' / 'tiny.yaml').write_text(TASK % (tmp_path / 'rows.jsonl'))
  return tmp_path / 'tasks'


def scores(model, form):
  """log p of every choice, row by row, by the scorer itself."""
  template = loading.load(model, form=form).template
  lm = harness.language_model(loading.load(model, form=form))
  found = []
  for row in ROWS:
    context = template.text(f'Q: {row["question"]}\nA:')
    pairs = [(('', ''), context, template.bare(f' {choice}')) for choice in row['choices']]
    found.append([value for value, _ in lm._loglikelihood_tokens(pairs, disable_tqdm=True)])
  return found


def test_the_harness_finds_the_model_by_name(tasks, tmp_path):
  from lm_eval.tasks import TaskManager

  manager = TaskManager(include_path=str(tasks), include_defaults=False)
  keep = tmp_path / 'answers.jsonl'
  results = lm_eval.simple_evaluate(
    model='alignjax',
    model_args=f'pretrained=hf:{CHAT},form=chat,dtype=float32,fsdp=2,keep={keep}',
    tasks=['tiny_choice'],
    task_manager=manager,
    bootstrap_iters=0,
  )
  expected = scores(f'hf:{CHAT}', 'chat')
  right = [
    values.index(max(values)) == row['gold'] for values, row in zip(expected, ROWS, strict=True)
  ]
  assert results['results']['tiny_choice']['acc,none'] == pytest.approx(sum(right) / len(right))
  got = [
    [float(filtered[0]) for filtered in sample['filtered_resps']]
    for sample in sorted(results['samples']['tiny_choice'], key=lambda s: s['doc_id'])
  ]
  for ours, theirs in zip(expected, got, strict=True):
    assert theirs == pytest.approx(ours, abs=1e-4)
  assert len(keep.read_text().splitlines()) == 6


@pytest.mark.slow
def test_its_command_takes_the_model(tasks, tmp_path):
  """As a person calls it, from another folder."""
  argv = ['--model', 'alignjax', '--model_args', f'pretrained=hf:{CHAT}', '--tasks', 'tiny_choice']
  argv += ['--include_path', str(tasks), '--output_path', str(tmp_path / 'out'), '--log_samples']
  root = str(pathlib.Path(__file__).parent.parent)
  done = subprocess.run(
    [sys.executable, '-m', 'alignjax.evals.public.lm_eval_plugin', *argv],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': root},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert (
    f"alignjax ({{'pretrained': 'hf:{CHAT}'}})" in done.stdout and '|tiny_choice|' in done.stdout
  )
  (path,) = (tmp_path / 'out').rglob('results_*.json')
  found = json.loads(path.read_text())
  assert found['config']['model'] == 'alignjax' and 0 <= found['results']['tiny_choice']['acc,none']


@pytest.mark.parametrize(
  'args, words',
  [
    ('pretrained=x,frm=chat', "'frm' is none of pretrained, .* Did you mean 'form'"),
    ('', 'pretrained=WORKDIR/STAGE or pretrained=hf:FOLDER_OR_HUB_NAME is missing'),
  ],
)
def test_wrong_arguments_are_errors_before_the_model_is_read(args, words, monkeypatch):
  monkeypatch.setattr(loading, 'load', None)
  with pytest.raises(ValueError, match=words):
    lm_eval_plugin.Alignjax.create_from_arg_string(args, {'device': 'cuda:0', 'batch_size': 1})


def test_the_commands_errors_are_lines(tmp_path, monkeypatch):
  def evaluate():
    assert sys.argv[1:] == ['--model', 'alignjax']
    lm_eval_plugin.Alignjax.create_from_arg_obj({'pretrained': f'{tmp_path}/none'})

  monkeypatch.setattr('lm_eval.__main__.cli_evaluate', evaluate)
  monkeypatch.setattr(sys, 'argv', ['lm_eval'])
  with pytest.raises(SystemExit, match='error: .*/none holds no finished stage'):
    lm_eval_plugin.main(['--model', 'alignjax'])


def test_every_argument_reaches_the_model(monkeypatch):
  got = []
  monkeypatch.setattr(loading, 'load', lambda *args, **kwargs: got.append((args, kwargs)))
  monkeypatch.setattr(harness, 'language_model', lambda model, keep: keep)
  text = 'pretrained=runs/x/sft,form=dialogue,dtype=bfloat16,data=2,tensor=4,keep=answers.jsonl'
  assert lm_eval_plugin.Alignjax.create_from_arg_string(text) == pathlib.Path('answers.jsonl')
  lm_eval_plugin.Alignjax.create_from_arg_string('pretrained=hf:org/name')
  mesh = dict(data=2, tensor=4)
  assert got == [
    (('runs/x/sft', 'lm'), dict(form='dialogue', mesh=mesh, dtype='bfloat16')),
    (('hf:org/name', 'lm'), dict(form=None, mesh=None, dtype=None)),
  ]
