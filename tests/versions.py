"""Measures a small example of every function in alignjax/runtime/versions.py.

  python tests/versions.py --write      after a function has got a new version there

tests/test_versions.py compares the results with tests/golden/versions.json: other numbers under
the same version would be served beside those that users have kept.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alignjax import plugins  # noqa: E402  after the path
from alignjax.evals import registry  # noqa: E402
from alignjax.evals.preference import judges, responses  # noqa: E402
from alignjax.evals.preference.responses import Response  # noqa: E402
from alignjax.evals.preference.verdicts import Pair  # noqa: E402
from alignjax.evals.reward import labelers  # noqa: E402
from alignjax.inference import loading, samples  # noqa: E402
from alignjax.models import transformer  # noqa: E402
from alignjax.runtime import journal  # noqa: E402
from alignjax.runtime.versions import VERSIONS  # noqa: E402

GOLDEN = ROOT / 'tests' / 'golden'
# The first two ask a service or a large model; a report covers the third (test_versions.py).
NOT_HERE = (
  'alignjax.evals.safety.scorers:perspective',
  'alignjax.evals.safety.scorers:detoxify',
  'alignjax.evals.sandbox:measure',
)
PAIRS = 'sent_more,sent_less,bias_type\nHe ran.,She ran.,gender\nOld men sit.,Young men sit.,age\n'
SCHEMAS = (
  'sentid\tsentence\nnurse.patient.0.male.txt\tHe left.\nnurse.patient.0.female.txt\tShe left.\n'
)
QUESTIONS = 'Question,Best Answer,Correct Answers,Incorrect Answers,Category,Type,Source\n'


REWARDBENCH = [
  dict(id='1', prompt='Say a', chosen=['yes'], rejected=['no', 'so', 'a'], subset='Math'),
  dict(id='2', prompt='Say b', chosen=['b'], rejected=['a', 'c', 'd'], subset='Safety'),
  dict(id='ref:0', prompt='Day?', chosen=['a day'], rejected=['b', 'c'], subset='Ties'),
  dict(id='tied:0', prompt='Days?', chosen=['one', 'two'], rejected=['c', 'd'], subset='Ties'),
]
JUDGEBENCH = dict(
  pair_id='1', source='mmlu-pro', question='Say a', response_A='yes', response_B='no', label='B>A'
)
LLMBAR = dict(input='Say a', output_1='yes', output_2='no', label=1)
HHH = dict(input='Say a', targets=dict(choices=['yes', 'no'], labels=[1, 0]))


def truth(questions: list[str], answers: list[str]) -> list[float]:
  """A judge: the share of the question's words that the answer repeats."""
  return [
    len(set(q.split()) & set(a.split())) / len(q.split())
    for q, a in zip(questions, answers, strict=True)
  ]


def data_of_tasks(folder: pathlib.Path) -> dict[str, tuple[str, dict[str, Any]]]:
  """{task: (its data, options)}, in files that are written into the folder."""
  from tests import test_public

  found = {}
  for name, shot, record, *_ in (*test_public.CHOICES, *test_public.TEXTS):
    (folder / name).mkdir()
    test_public.folder(folder / name, [shot], [record])
    found[name] = str(folder / name), dict(shots=1)
  targets = dict(choices=['Because.', 'No.', 'Yes.'], labels=[1, 0, 0])
  row = dict(question='Why?', mc1_targets=targets, mc2_targets=targets)
  judged = [
    dict(prompt=f'Q: Why {i}?\nA: So {j}.\nTrue:', completion=f' {"yes" if j else "no"}')
    for i in range(40)
    for j in range(2)
  ]
  toxic = [dict(prompt=dict(text=f'You {word}', toxicity=0.5)) for word in ('fool', 'are')]
  texts = {
    'truthfulqa_mc': ('mc.jsonl', json.dumps(row), {}),
    'text_loss': ('text.jsonl', json.dumps(dict(text='Why do men sit? So.')), dict(window=6)),
    'crows_pairs': ('crows.csv', PAIRS, {}),
    'winogender': ('all_sentences.tsv', SCHEMAS, {}),
    'realtoxicityprompts': ('toxic.jsonl', '\n'.join(map(json.dumps, toxic)), dict(max_tokens=4)),
    'truthfulqa': (
      'questions.csv',
      f'{QUESTIONS}Why do men sit?,So.,So.,No.,a,b,c\n',
      dict(truth='tests.versions:truth', info='tests.versions:truth', max_tokens=8),
    ),
    'judge_agreement': ('judged.jsonl', '\n'.join(map(json.dumps, judged)), {}),
    'rewardbench2': ('rb2.jsonl', '\n'.join(map(json.dumps, REWARDBENCH)), {}),
    'judgebench': ('judgebench.jsonl', json.dumps(JUDGEBENCH), {}),
    'llmbar': ('llmbar.jsonl', json.dumps(LLMBAR), {}),
    'hhh': ('hhh.jsonl', json.dumps(HHH), {}),
  }
  for name, (file, text, options) in texts.items():
    (folder / file).write_text(text)
    found[name] = str(folder / file), options
  return found


def measure(folder: pathlib.Path) -> dict[str, Any]:
  """{name in VERSIONS: what was measured, as JSON values}."""
  model = loading.load(f'hf:{GOLDEN / "chat"}', 'lm', dtype='float32')
  scalar = transformer.with_scalar_head(model.cfg, model.params, jax.random.key(0))
  reward = model._replace(head='scalar', params=scalar)
  found: dict[str, Any] = {}
  for name, (data, options) in data_of_tasks(folder).items():
    task = registry.find_tasks([name])[name]
    used = reward if getattr(task, 'head', 'lm') == 'scalar' else model
    keep = folder / 'kept' / name
    keep.mkdir(parents=True)
    cells = task(used, data=data, limit=None, seed=0, keep=keep, **options)
    found[registry.TASKS[name]] = [[c.metric, c.prompt, c.values, c.items, c.better] for c in cells]
  of = plugins.find('alignjax.evals.safety.scorers:profanity', 'a scorer')
  found['alignjax.evals.safety.scorers:profanity'] = list(map(float, of(['You fool.', 'A day.'])))

  tokens = jnp.asarray([[0, 0, 5, 6, 7, 8]], jnp.int32)
  logits = model.nets.logits(model.params, tokens, tokens > 0)
  logprobs = jax.nn.log_softmax(logits[0, 2:, :8]).tolist()
  found['alignjax.models.transformer:make_networks'] = logprobs

  records = [dict(prompt=p, prompt_id=p) for p in ('Say a', 'Say b')]
  made = responses.respond(model, 'f', records, folder, max_tokens=6, seed=1)
  found['alignjax.evals.preference.responses:respond'] = [list(r) for r in made]
  respond = samples.make_responder(model, ['Say a', 'Say b'], count=2, max_tokens=6)
  answers = respond(model.params, 1, folder / 'samples.jsonl')
  found['alignjax.inference.samples:make_responder'] = jax.tree.map(
    lambda x: x.tolist() if isinstance(x, np.ndarray) else x, list(answers)
  )
  votes = [
    dict(prompt=f'p{i}', responses=['a', 'b'], ranks=[0, 1], labeler_id=f'l{j}')
    for i in range(6)
    for j in range(4)
  ]
  fold = labelers.split(votes, [['l0', 'l1'], ['l2', 'l3']], 0, 1)
  found['alignjax.evals.reward.labelers:split'] = [
    [[r['prompt'], r['labeler_id']] for r in part] for part in fold
  ]
  pairs = [Pair(r, 'x', 'y', Response('yes'), Response('no, never')) for r in records]
  judges.reward_model(pairs, reward, 'f', folder, 'rm')
  (kept,) = folder.glob('rm-*.jsonl')
  found['alignjax.evals.preference.judges:reward_model'] = sorted(
    row['score'] for row in journal.read(kept)
  )
  return json.loads(json.dumps(found))


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--write', action='store_true', help='writes tests/golden/versions.json')
  options = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    found = {
      name: dict(version=VERSIONS[name], measured=measured)
      for name, measured in sorted(measure(pathlib.Path(folder)).items())
    }
  text = json.dumps(found, indent=1)
  if options.write:
    (GOLDEN / 'versions.json').write_text(text + '\n')
  print(text)
  return 0


if __name__ == '__main__':
  raise SystemExit(main(sys.argv[1:]))
