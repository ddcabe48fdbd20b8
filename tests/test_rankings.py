"""K-way rankings that people hand in: each pair once, by labeler; intervals by prompt; the command
that reads them."""

import itertools
import json

import numpy as np
import pytest

from alignjax.commands import preference as command
from alignjax.evals.preference import judgments, statistics


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def test_a_ranking_is_all_its_pairs(tmp_path):
  rows = [
    dict(prompt_id='q1', ranking=dict(x=0, y=2, z=0, w=7), labeler_id=3),
    dict(prompt='What?', responses=['X', 'Y'], ranks=[1, 0], policies=['x', 'y'], labeler_id='l'),
    dict(prompt_id='q1', ranking=None, labeler_id=4),
    dict(prompt_id=0, ranking=dict(y=5, x=5), responses=dict(y='Y'), prompt='other'),
  ]
  read = judgments.read(write(tmp_path / 'people.jsonl', rows), judge='j')
  one, two = judgments.prompt_id('What?'), '0'
  said = {(v.prompt_id, v.a, v.b, v.labeler): v.p for v in read.verdicts}
  assert (
    said
    == {
      ('q1', 'x', 'y', '3'): 1.0,
      ('q1', 'x', 'z', '3'): 0.5,
      ('q1', 'x', 'w', '3'): 1.0,
      ('q1', 'y', 'z', '3'): 0.0,
      ('q1', 'y', 'w', '3'): 1.0,
      ('q1', 'z', 'w', '3'): 1.0,
      (one, 'x', 'y', 'l'): 0.0,
      (two, 'y', 'x', 'people'): 0.5,
    }
    and len(read.verdicts) == 8
  )
  assert read.texts == {(one, 'x'): 'X', (one, 'y'): 'Y', (two, 'y'): 'Y'}
  assert read.prompts == {one: 'What?', two: 'other'} and read.notes == [
    'j: 1 rows are not judged yet'
  ]


@pytest.mark.parametrize(
  'row,words',
  [
    (dict(ranking=dict(x=0)), 'two policies or more'),
    (dict(ranking=dict(x=0, y=0.5)), 'a whole number'),
    (dict(ranking=dict(x=0, y=True)), 'a whole number'),
    (dict(ranking=['x', 'y']), '"ranking" must be {policy: rank}, not a list'),
    (dict(ranks=[0, 1]), 'needs "policies"'),
    (dict(ranks=[0, 1], policies=['x']), 'needs "policies"'),
    (dict(ranks=[0, 1], policies=['x', 'x']), 'each of them once'),
    (dict(ranks=[0, 1], policies=['x', ['y']]), 'needs "policies"'),
    (dict(ranks=[0, 1], policies=['x', 'y'], responses=['a']), 'in the same order'),
    (dict(ranking=dict(x=0, y=1), responses=dict(z='a')), 'for its policies'),
    (dict(ranking=dict(x=0, y=1), responses=dict(x=3)), '"x" must be text, not a number'),
    (dict(ranking=dict(x=0, z=1)), "the policy 'z' is none of --policies"),
    (dict(prompt_id=None, ranking=dict(x=0, y=1)), '"prompt_id" is missing'),
    (dict(prompt_id=[1], ranking=dict(x=0, y=1)), '"prompt_id" must be text or a whole number'),
    (dict(labeler_id=[1], ranking=dict(x=0, y=1)), '"labeler_id" must be text or a whole number'),
    (dict(a=3, b='x', choice='a'), '"a" must be text'),
    (dict(a='x', b='y', choice='a', response_a=3), '"response_a" must be text'),
    (dict(policy='x', flags=[[]]), 'flags are a list of names'),
    (dict(policy='x', flags=3), 'flags are a list of names'),
    (dict(policy='x', flags='hallucination'), "flags are a list of names, .* not 'hallucination'"),
  ],
)
def test_judgments_that_are_none_are_named(tmp_path, row, words):
  path = write(
    tmp_path / 'j.jsonl', [dict(prompt_id='q', ranking=dict(x=0, y=1)), dict(prompt_id='q') | row]
  )
  with pytest.raises(ValueError, match=f'j.jsonl, line 2: .*{words}'):
    judgments.read(path, judge='j', policies=['x', 'y'], prompts={'q'})


def test_rankings_give_the_figures_of_their_pairs(tmp_path):
  """The command on rankings == on the same judgments pair by pair; intervals are by prompt, so that
  a labeler who ranks K policies adds no certainty about the prompt."""
  rng = np.random.default_rng(0)
  names, rankings, pairs = ['x', 'y', 'z'], [], []
  for q in range(30):
    for labeler in range(2):
      ranks = dict(zip(names, rng.integers(0, 3, 3).tolist(), strict=True))
      rankings.append(dict(prompt_id=q, ranking=ranks, labeler_id=labeler))
      pairs += [
        dict(
          prompt_id=q,
          a=a,
          b=b,
          choice='a' if ranks[a] < ranks[b] else 'b' if ranks[b] < ranks[a] else 'tie',
          labeler_id=labeler,
        )
        for a, b in itertools.combinations(names, 2)
      ]
  found = []
  for name, rows in (('rankings', rankings), ('pairs', pairs)):
    command.main(
      [f'--judge=file:{write(tmp_path / f"{name}.jsonl", rows)}', f'--out={tmp_path / name}']
    )
    (result,) = json.loads((tmp_path / name / 'preference.json').read_text())['judges'].values()
    found.append(result)
  assert found[0] == found[1] and found[0]['win_rate']['x']['y']['n'] == 60
  by_hand = np.mean(
    [
      1.0
      if r['ranking']['x'] < r['ranking']['y']
      else 0.5
      if r['ranking']['x'] == r['ranking']['y']
      else 0.0
      for r in rankings
    ]
  )
  assert found[0]['win_rate']['x']['y']['mean'] == pytest.approx(by_hand)
  table = statistics.tabulate(
    judgments.read(str(tmp_path / 'rankings.jsonl'), judge='j').verdicts, names
  )
  assert (
    len(table.p) == 30 * 2 * 3
    and len(set(zip(table.prompts, table.i, table.j, table.labelers, strict=True))) == 180
  )
