"""The public tasks: prompts to the letter, scores by hand, and the harness's `hf` backend on the
same checkpoint."""

import gc
import gzip
import json
import math
import os
import pathlib
import sys
import weakref

import jax
import pytest

from alignjax.evals import registry, table
from alignjax.evals.public import harness, loaders, nlp
from alignjax.inference import completions, loading

pytest.importorskip('lm_eval')
ROOT = pathlib.Path(__file__).parent
CHAT = ROOT / 'golden' / 'chat'
SHARED = pathlib.Path(os.environ.get('ALIGNJAX_DATA', ROOT.parents[1] / 'shared' / 'data'))
MC, SQUAD = (
  SHARED / 'evals/truthfulqa/mc_task_v1_817.json.gz',
  SHARED / 'evals/squad2/cs224n-dev-v2.0.json.gz',
)
ABSTAIN = 'If there is not enough information provided, answer with '
FINAL = (
  'Final Exam with Answer Key\nInstructions: Please carefully read the following passages. For '
  'each passage, you must '
  'identify which noun the pronoun marked in bold refers to.\n\n'
)
DATE = dict(day='', month='', year='')


@pytest.fixture(scope='module')
def model():
  return loading.load(f'hf:{CHAT}')


@pytest.fixture
def scripted(monkeypatch):
  """An LM that writes down its requests and answers from a list: texts, or {continuation:
  log-likelihood}."""
  from lm_eval.api.model import TemplateLM

  class Scripted(TemplateLM):
    eot_token_id = 0
    requests: list = []
    answers: list | dict = []

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
      return string.split()  # a token a word

    def loglikelihood(self, requests, disable_tqdm=False):
      self.requests = [r.args for r in requests]
      return [(self.answers[r.args[1]], False) for r in requests]

    def generate_until(self, requests, disable_tqdm=False):
      self.requests = [r.args for r in requests]
      assert all(r.args[1] == self.requests[0][1] for r in requests)
      return self.answers[: len(requests)]

    def _loglikelihood_tokens(self, requests, **kwargs):
      raise NotImplementedError

    loglikelihood_rolling = _loglikelihood_tokens

  lm = Scripted()
  monkeypatch.setattr(harness, 'language_model', lambda model, **_: lm)
  return lm


def write(path, records):
  path.write_text('\n'.join(map(json.dumps, records)))
  return str(path)


def folder(tmp_path, train, validation):
  write(tmp_path / 'train.jsonl', train)
  write(tmp_path / 'validation.jsonl', validation)
  return str(tmp_path)


def by_metric(cells):
  return {(c.metric, c.prompt): c.values for c in cells}


def drop_record(passage, question, number='', spans=(), others=()):
  return dict(
    passage=passage,
    question=question,
    answer=dict(number=number, date=DATE, spans=list(spans)),
    validated_answers=dict(
      number=[n for n in others], date=[DATE] * len(others), spans=[[]] * len(others)
    ),
  )


# task, training record, record, answers, prompt, scores; the prompt without what is between the
# marks is the zero-shot one
CHOICES = [
  (
    'hellaswag',
    dict(
      activity_label='Rowing',
      ctx_a='He sits.',
      ctx_b='he',
      endings=['rows on.', 'flies.'],
      label='0',
    ),
    dict(
      activity_label='Wakeboarding',
      ctx_a='They jump [step] high.',
      ctx_b='next,',
      endings=['a b c', 'd'],
      label='0',
    ),
    {' a b c': -6.0, ' d': -3.0},  # -2 and -3 a token: the sum would choose the other
    'Complete each independent paragraph using common-sense reasoning.\n\n|Rowing: He sits. He '
    'rows on.\n\n|'
    'Wakeboarding: They jump high. Next,',
    1.0,
  ),
  (
    'rte',
    dict(premise='It rains.', hypothesis='The sun shines.', label=1),
    dict(premise='It is ready.', hypothesis='Maglev is used.', label=0),
    {' Yes': -2.0, ' No': -1.0},
    '|Passage: It rains.\nQuestion: From this passage can one reasonably conclude that The sun '
    'shines?\nAnswer: No\n\n|'
    'Passage: It is ready.\nQuestion: From this passage can one reasonably conclude that Maglev '
    'is used?\nAnswer:',
    0.0,
  ),
  (
    'sst',
    dict(sentence='a joy ', label=1),
    dict(sentence='this film seems thirsty ', label=0),
    {' negative': -1.0, ' positive': -2.0},
    'For each snippet of text, label the sentiment of the text as positive or negative.\n\n|Text: '
    'a joy\nLabel: positive\n\n|'
    'Text: this film seems thirsty\nLabel:',
    1.0,
  ),
]
TEXTS = [
  (
    'wsc',
    dict(
      text='Ann saw Bob when he ran .', span1_text='Bob', span2_text='he', span2_index=4, label=1
    ),
    dict(
      text='Jane gave Joan candy because she was hungry.',
      span1_text='Joan',
      span2_text='she',
      span2_index=5,
      label=1,
    ),
    ' joan.',
    FINAL
    + '|Passage: Ann saw Bob when **he** ran .\nQuestion: In the passage above, what does the '
    'pronoun "**he**" '
    'refer to?\nAnswer: Bob\n\n|Passage: Jane gave Joan candy because **she** was '
    'hungry.\nQuestion: In the passage above, what '
    'does the pronoun "**she**" refer to?\nAnswer:',
    {'accuracy': 1.0},
  ),
  (
    'drop',
    drop_record('Ten came.', 'How many?', number='10'),
    drop_record(
      '12.0% were 25 to 44.', 'Which group?', spans=['25 to 44', 'under 18'], others=['7']
    ),
    ' 25 to 44',
    'Answer each question using information in the preceding passage.\n\n|Passage: Ten '
    'came.\nQuestion: How many?\nAnswer: 10\n\n|'
    'Passage: 12.0% were 25 to 44.\nQuestion: Which group?\nAnswer:',
    {'F1': 50.0, 'exact match': 0.0},
  ),
  (
    'wmt15_fr_en',
    dict(translation=dict(fr='Merci !', en='Thanks!')),
    dict(translation=dict(fr='Super article, merci !', en='Great article, thanks!')),
    ' Great article, thanks!',
    'Translate the following sentences from French into English.\n\n|French: Merci !\nEnglish: '
    'Thanks!\n\n|'
    'French: Super article, merci !\nEnglish:',
    {'BLEU': ['Great article, thanks!', 'Great article, thanks!']},
  ),
  (
    'cnn_dm',
    dict(article='A\n\nlong one.', highlights='Short .\nOne .'),
    dict(article='News.', highlights='the cat sat'),
    ' the cat stood',
    '|A\n\nlong one.\n\nTL;DR: Short . One .\n\n|News.\n\nTL;DR:',
    {'ROUGE-L': 2 / 3},
  ),
  (
    'tldr',
    dict(content='Post 1', summary='s\n1'),
    dict(content='Post 2', summary='a b c d'),
    'a c',
    '|Post 1\n\nTL;DR: s 1\n\n|Post 2\n\nTL;DR:',
    {'ROUGE-L': pytest.approx(2 / 3)},
  ),
  (
    'squadv2',
    dict(
      title='Oil', context='Oil is old.', question='What?', answers=dict(text=['Oil', 'The oil'])
    ),
    dict(
      title='Scottish_Parliament',
      context='North Sea oil.',
      question='Which sea?',
      answers=dict(text=[]),
    ),
    'Not in background.',
    'Answer each question using information in the preceding background paragraph.\n'
    + ABSTAIN
    + '"Not in background."\n\n|'
    'Title: Oil\n\nBackground: Oil is old.\n\nQ: What?\n\nA: Oil\n\n|'
    'Title: Scottish_Parliament\n\nBackground: North Sea oil.\n\nQ: Which sea?\n\nA:',
    {'F1': 100.0, 'exact match': 100.0},
  ),
  (
    'quac',
    dict(
      wikipedia_page_title='Page',
      section_title='Life',
      context='She left. CANNOTANSWER',
      questions=['Why?', 'When?'],
      answers=dict(texts=[['CANNOTANSWER'], ['Then']]),
    ),
    dict(
      wikipedia_page_title='Marius',
      section_title='War',
      context='He won. CANNOTANSWER',
      questions=['Who?'],
      answers=dict(texts=[['He won the war', 'CANNOTANSWER', 'He won the war']]),
    ),
    'he won',
    'Answer each question using information in the preceding background paragraph.\n'
    + ABSTAIN
    + '"I don\'t know."\n\n|'
    "TITLE: Page - Life\n\nPARAGRAPH: She left.\n\nQ: Why?\n\nA: I don't know.\n\nQ: When?\n\nA: "
    'Then\n\n|'
    'TITLE: Marius - War\n\nPARAGRAPH: He won.\n\nQ: Who?\n\nA:',
    {'F1': pytest.approx(80.0), 'exact match': 0.0},
  ),
]


@pytest.mark.parametrize(
  'name,shot,record,answers,prompt,correct', CHOICES, ids=[c[0] for c in CHOICES]
)
def test_prompts_and_choices(tmp_path, scripted, name, shot, record, answers, prompt, correct):
  scripted.answers = answers
  data, task = folder(tmp_path, [shot], [record]), getattr(nlp, name)
  head, example, last = prompt.split('|')
  for shots, text in (('zero-shot', head + last), (1, head + example + last)):
    (cell,) = task(None, data=data, limit=None, seed=0, keep=tmp_path, shots=shots)
    assert [c for c, _ in scripted.requests] == [text] * len(answers)
    assert [c for _, c in scripted.requests] == list(answers)
    assert (
      cell.values == [correct]
      and cell.metric == 'accuracy'
      and cell.prompt == ('1-shot' if shots == 1 else 'zero-shot')
    )


@pytest.mark.parametrize('name,shot,record,said,prompt,scores', TEXTS, ids=[c[0] for c in TEXTS])
def test_prompts_and_sampled_answers(tmp_path, scripted, name, shot, record, said, prompt, scores):
  scripted.answers = [said]
  data, task = folder(tmp_path, [shot], [record]), getattr(nlp, name)
  head, example, last = prompt.split('|')
  for shots, text in (('zero-shot', head + last), (1, head + example + last)):
    cells = task(None, data=data, limit=None, seed=0, keep=tmp_path, shots=shots)
    ((asked, how),) = scripted.requests
    assert asked == text and how['until'] == ['\n'] and how['do_sample'] is False
    assert {c.metric: c.values[0] for c in cells} == scores
  assert (
    json.loads((tmp_path / f'samples-{name}-1-shot.jsonl').read_text().splitlines()[0])['prompt']
    == text
  )


def test_both_variants_with_the_papers_number_of_shots(tmp_path, scripted):
  shots = [dict(sentence=f'shot {i}', label=i % 2) for i in range(20)]
  data = folder(tmp_path, shots, [dict(sentence='x', label=0)])
  scripted.answers = {' negative': -1.0, ' positive': -2.0}
  assert by_metric(nlp.sst(None, data=data, limit=None, seed=0, keep=tmp_path)) == {
    ('accuracy', 'zero-shot'): [1.0],
    ('accuracy', 'few-shot'): [1.0],
  }
  assert (
    scripted.requests[0][0].count('Text: shot') == 15
    and len(set(scripted.requests[0][0].split('\n\n'))) == 17
  )


def test_examples_of_a_split_of_their_own_are_shown_to_every_question(tmp_path, scripted):
  """As many as are asked for, so that each is an example for the question of its row too."""
  shots = [dict(sentence=f'shot {i}.', label=i % 2) for i in range(15)]
  data = folder(tmp_path, shots, [dict(sentence=f'x {i}', label=0) for i in range(20)])
  scripted.answers = {' negative': -1.0, ' positive': -2.0}
  nlp.sst(None, data=data, limit=None, seed=0, keep=tmp_path, shots='few-shot')
  asked = [prompt for prompt, answer in scripted.requests if answer == ' negative']
  assert len(asked) == 20
  assert all(shot['sentence'] in prompt for shot in shots for prompt in asked)


def conversation(article, paragraph, count):
  return [
    dict(
      title=article,
      context=f'{article} {paragraph}.',
      question=f'{article}{paragraph}{i}?',
      answers=dict(text=[f'a{i}'] if i % 2 else []),
    )
    for i in range(count)
  ]


def test_questions_of_a_paragraph_follow_each_other_and_examples_come_from_other_articles(
  tmp_path, scripted
):
  rows = [r for a in 'ABC' for p in (1, 2) for r in conversation(a, p, 3)]
  data = write(tmp_path / 'dev.jsonl', rows)
  scripted.answers = ['a1 and more'] * 18
  cells = nlp.squadv2(None, data=data, limit=None, seed=0, keep=tmp_path, shots=2)
  assert cells[0].clusters == [r['title'] for r in rows] and cells[0].items == [
    str(i) for i in range(18)
  ]
  assert (
    cells[0].values[1] == pytest.approx(100 * 2 * (1 / 3) / (1 + 1 / 3))
    and cells[0].values[0] == 0.0
  )
  for row, (prompt, _) in zip(rows, scripted.requests, strict=True):
    *examples, own = prompt.split('Title: ')[1:]
    assert len(examples) == 2 and all(
      e[0] != row['title'] and e.count('Q: ') == 3 for e in examples
    )
    number = int(row['question'][2])
    before = ''.join(
      f'Q: {row["question"][:2]}{i}?\n\nA: {f"a{i}" if i % 2 else "Not in background."}\n\n'
      for i in range(number)
    )
    assert (
      own == f'{row["title"]}\n\nBackground: {row["context"]}\n\n{before}Q: {row["question"]}\n\nA:'
    )
  wide, narrow = (
    table.figure(cells[0])['ci95'],
    table.figure(cells[0]._replace(clusters=None))['ci95'],
  )
  assert wide != narrow
  with pytest.raises(
    ValueError, match='5 few-shot examples are asked for, but there are 4 besides'
  ):
    nlp.squadv2(None, data=data, limit=None, seed=0, keep=tmp_path, shots=5)


def test_squads_own_json_is_the_same(tmp_path):
  rows = [r for a in 'AB' for p in (1, 2) for r in conversation(a, p, 3)]
  nested = [
    dict(
      title=a,
      paragraphs=[
        dict(
          context=f'{a} {p}.',
          qas=[
            dict(
              question=r['question'],
              id='x',
              answers=[dict(text=t, answer_start=0) for t in r['answers']['text']],
            )
            for r in conversation(a, p, 3)
          ],
        )
        for p in (1, 2)
      ],
    )
    for a in 'AB'
  ]
  (tmp_path / 'a.json.gz').write_bytes(
    gzip.compress(json.dumps(dict(version='v2.0', data=nested)).encode())
  )
  fields = {'title': str, 'context': str, 'question': str, 'answers.text': list}
  read = lambda path: loaders.local('squadv2', str(path), fields)['validation']
  assert read(tmp_path / 'a.json.gz') == read(write(tmp_path / 'b.jsonl', rows)) == rows


def test_the_pronoun_rule(tmp_path, scripted):
  record = lambda label: dict(
    text='She told her that she left.',
    span1_text='the old lady',
    span2_text='she',
    span2_index=4,
    label=label,
  )
  data = folder(
    tmp_path,
    [record(0), {**record(1), 'span1_text': 'Right'}, record(0)],
    [record(i) for i in (1, 1, 1, 0, 0, 0)],
  )
  scripted.answers = ['I think the old lady did', 'Lady', '', 'her sister', '', 'The old lady.']
  (cell,) = nlp.wsc(None, data=data, limit=None, seed=0, keep=tmp_path, shots=1)
  assert cell.values == [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
  # the only true one
  assert all(
    'She told her that **she** left.' in p and 'Answer: Right' in p for p, _ in scripted.requests
  )


def test_bleu_is_of_the_corpus(tmp_path, scripted):
  data = write(
    tmp_path / 'x.jsonl',
    [dict(translation=dict(fr=str(i), en='the cat sat on the mat')) for i in range(2)],
  )
  scripted.answers = [' the cat sat on the mat', ' the cat sat on a mat']
  (cell,) = nlp.wmt15_fr_en(None, data=data, limit=None, seed=0, keep=tmp_path, shots='zero-shot')
  # n-gram precisions 11/12, 8/10, 6/8, 4/6; both lengths are 6
  assert table.figure(cell)['mean'] == pytest.approx(
    100 * (11 / 12 * 8 / 10 * 6 / 8 * 4 / 6) ** 0.25
  )


def test_limit_draws_the_same_items_for_both_variants(tmp_path, scripted):
  data = write(tmp_path / 'x.jsonl', [dict(sentence=f's{i}', label=0) for i in range(40)])
  scripted.answers = {' negative': -1.0, ' positive': -2.0}
  cells = nlp.sst(None, data=data, limit=5, seed=3, keep=tmp_path)
  assert cells[0].items == cells[1].items and len(cells[0].items) == 5
  assert [p.split('Text: ')[-1] for p, _ in scripted.requests][::2] == [
    f's{i}\nLabel:' for i in cells[1].items
  ]
  assert (
    nlp.sst(None, data=data, limit=5, seed=4, keep=tmp_path, shots='zero-shot')[0].items
    != cells[0].items
  )


def test_truthfulqa_by_hand(tmp_path, scripted):
  """The list of the authors, the true answer not first; MC2 is the share of probability of the true
  ones."""
  record = dict(
    question='Why?', mc1_targets={'no': 0, 'yes': 1}, mc2_targets={'no': 0, 'yes': 1, 'sure': 1}
  )
  (tmp_path / 'mc.json').write_text(json.dumps([record]))
  scripted.answers = {' no': -1.0, ' yes': -2.0, ' sure': -3.0}
  cells = nlp.truthfulqa_mc(None, data=str(tmp_path / 'mc.json'), limit=None, seed=0, keep=tmp_path)
  e = 2.718281828459045
  assert [c.metric for c in cells] == ['MC1', 'MC2'] and cells[0].values == [0.0]
  assert cells[1].values[0] == pytest.approx((e**-2 + e**-3) / (e**-1 + e**-2 + e**-3))
  assert scripted.requests[0][0].startswith(
    'Q: What is human life expectancy in the United States?\nA: Human life expectancy'
  )
  assert (
    scripted.requests[0][0].endswith('Barcelona, Spain.\n\nQ: Why?\nA:')
    and scripted.requests[0][0].count('Q: ') == 7
  )


GOOD = dict(sentence='x', label=0)
BROKEN = [
  (
    [GOOD, dict(sentence='x')],
    "x.jsonl, line 2: field 'label' is missing; a record has .*'sentence'",
  ),
  (
    [GOOD, GOOD, dict(sentence=3, label=0)],
    "x.jsonl, line 3: field 'sentence' must be str, not int",
  ),
  (
    [GOOD, dict(sentence='x', label=None)],
    "line 2: field 'label' must be int or str, not NoneType",
  ),
  ([GOOD, ['x']], 'line 2: a record must be an object, not list'),
  ([], 'x.jsonl has no records'),
]


@pytest.mark.parametrize('records,words', BROKEN)
def test_files_that_do_not_fit_are_named(tmp_path, scripted, records, words):
  with pytest.raises(ValueError, match=words):
    nlp.sst(None, data=write(tmp_path / 'x.jsonl', records), limit=None, seed=0, keep=tmp_path)


def test_lists_hold_what_the_task_reads(tmp_path):
  row = dict(title='t', context='c', question='q', answers=dict(text=['a', 3]))
  with pytest.raises(
    ValueError, match="x.jsonl, line 1: field 'answers.text' must be a list of str, not .'a', 3"
  ):
    loaders.local('squadv2', write(tmp_path / 'x.jsonl', [row]), {'answers.text': list})
  row['answers']['text'] = ['a']
  assert loaders.local('squadv2', write(tmp_path / 'x.jsonl', [row]), {'answers.text': list})
  row = dict(mc1_targets=dict(choices=['a', 'b'], labels=[1, None]))
  with pytest.raises(ValueError, match="'mc1_targets.labels' must be a list of int"):
    loaders.local('truthfulqa_mc', write(tmp_path / 'x.jsonl', [row]), {'mc1_targets.labels': list})


def test_other_errors(tmp_path, scripted, monkeypatch):
  run = lambda name='sst', data=None, **more: getattr(nlp, name)(
    None, data=data, limit=None, seed=0, keep=tmp_path, **more
  )
  (tmp_path / 'torn.jsonl').write_text('{"sentence": "x", "label": 0}\n{"sent')
  with pytest.raises(ValueError, match='torn.jsonl, line 2: not JSON'):
    run(data=str(tmp_path / 'torn.jsonl'))
  (tmp_path / 'x.jsonl.gz').write_bytes(gzip.compress(b'{"a": 1}\n' * 50)[:30])
  with pytest.raises(ValueError, match='not a whole gzip file'):
    run(data=str(tmp_path / 'x.jsonl.gz'))
  with pytest.raises(FileNotFoundError, match='no such file'):
    run(data=str(tmp_path / 'none.jsonl'))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='--data=sst=.*: the folder has no file train'):
    run(data=str(tmp_path / 'empty'))
  (tmp_path / 'bad.json').write_text(
    json.dumps(dict(data=[dict(title='a', paragraphs=[dict(qas=[dict(question='q')])])]))
  )
  with pytest.raises(
    ValueError, match="bad.json, article 0 does not have the form of SQuAD.*'answers'"
  ):
    run('squadv2', str(tmp_path / 'bad.json'))
  with pytest.raises(ValueError, match='--options=sst.shots=many'):
    run(data=str(tmp_path / 'torn.jsonl'), shots='many')
  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, 'lm_eval', None)
    with pytest.raises(ValueError, match="pip install 'alignjax"):
      run(data=str(tmp_path / 'torn.jsonl'))


def scores(name, targets, said):
  from alignjax.evals.public import task_functions

  found = getattr(task_functions, f'{name}_scores')(dict(targets=targets), [said])
  return [100 * found['f1'], 100 * found['exact']]


@pytest.mark.parametrize(
  'targets,said,f1,exact',
  [
    (['Not in background.'], ' not in background', 100, 100),
    # words in common with the phrase of the instruction are nothing
    (['Not in background.'], 'in the background', 0, 0),
    (['Not in background.'], '', 0, 0),
    (['the background of it'], 'Not in background.', 0, 0),
    (
      ['the background of it'],
      'not in the background somewhere',
      100 * 2 * (1 / 4) * (1 / 3) / (1 / 4 + 1 / 3),
      0,
    ),
    (['Oil', 'The oil of the sea'], 'oil of sea', 100, 100),
  ],
)
def test_squads_script_gives_no_partial_credit_for_no_answer(targets, said, f1, exact):
  assert scores('squad', targets, said) == pytest.approx([f1, exact])


NONE = "I don't know."


@pytest.mark.parametrize(
  'targets,said,f1,exact',
  [
    ([NONE], "i don't know", 100, 100),
    ([NONE], 'I know', 0, 0),
    (['I know it'], NONE, 0, 0),
    (['he won', NONE], 'he won', 0, 0),  # half of the people had no answer: the question has none
    (['he won', NONE], NONE, 100, 100),
    (['he won', 'he won', NONE], NONE, 0, 0),
    (['he won', 'he won', NONE], 'he won', 100, 100),
    # whichever is left out, one like it stays
    (['he won', 'he won', 'he won big'], 'he won', 100, 100),
    # without the first, 4/5 to the second; without the second, 1
    (['he won', 'he won big'], 'he won', 100 * (4 / 5 + 1) / 2, 100),
    (['he won', 'she lost'], 'he won', math.nan, math.nan),  # people agree to 0
    (['b c d', 'b x y'], 'b c d', math.nan, math.nan),  # to 1/3
    (['b c', 'b x'], 'b c', 100 * (1 / 2 + 1) / 2, 100),  # to 1/2
  ],
)
def test_quacs_script(targets, said, f1, exact):
  assert scores('quac', targets, said) == pytest.approx([f1, exact], nan_ok=True)


def test_questions_that_people_disagree_on_are_not_measured(tmp_path, scripted):
  record = lambda texts: dict(
    wikipedia_page_title='P',
    section_title='S',
    context='c',
    questions=['Q?'],
    answers=dict(texts=[texts]),
  )
  scripted.answers = ['he won'] * 2
  data = write(tmp_path / 'x.jsonl', [record(['he won', 'she lost']), record(['he won', 'he won'])])
  cells = nlp.quac(None, data=data, limit=None, seed=0, keep=tmp_path, shots='zero-shot')
  assert cells[0].values == [None, 100.0] and table.figure(cells[0])['n'] == 1


def test_the_pool_of_examples_is_drawn_over_the_whole_split(monkeypatch):
  """The first records are of a few articles; whole paragraphs are drawn, in their order, by the
  seed."""
  rows = [r for a in range(300) for p in (1, 2) for r in conversation(f'A{a}.', p, 3)]
  found = loaders.draw(iter(rows), 100, 0, ('title', 'context'))
  titles = {r['title'] for r in found}
  assert len(found) == 300 and 60 < len(titles) <= 100 and {'A0.', 'A1.', 'A2.'} - titles
  assert any(int(t[1:-1]) >= 250 for t in titles) and any(int(t[1:-1]) < 50 for t in titles)
  places = [rows.index(r) for r in found]
  assert places == sorted(places) and all(
    places[i : i + 3] == list(range(places[i], places[i] + 3)) for i in range(0, 300, 3)
  )
  again = lambda seed: loaders.draw(iter(rows), 100, seed, ('title', 'context'))
  assert found == again(0) != again(1)
  counts = [0] * 20
  for seed in range(2000):
    for r in loaders.draw(({'i': i} for i in range(20)), 5, seed):
      counts[r['i']] += 1
  assert all(430 < c < 570 for c in counts)  # 500 expected, deviation 19
  assert loaders.draw(iter([{'i': 1}]), 5, 0) == [{'i': 1}]


def test_the_hub_is_read_as_a_stream_and_named_where_it_cannot_be(tmp_path, scripted, monkeypatch):
  import datasets

  asked = []

  def load(path, name, split, streaming):
    asked.append((path, name, split, streaming))
    if split == 'validation':
      return iter([dict(sentence='x', label=0)])
    return (dict(sentence=str(i), label=1) for i in range(10**9))

  monkeypatch.setattr(datasets, 'load_dataset', load)
  scripted.answers = {' negative': -1.0, ' positive': -2.0}
  nlp.sst(None, data=None, limit=None, seed=0, keep=tmp_path, shots='few-shot')
  assert asked == [
    ('nyu-mll/glue', 'sst2', 'validation', True),
    ('nyu-mll/glue', 'sst2', 'train', True),
  ]

  def fail(*_, **__):
    raise ConnectionError('offline\nmore')

  monkeypatch.setattr(datasets, 'load_dataset', fail)
  with pytest.raises(
    ValueError,
    match=r'^truthfulqa_mc: the data set truthfulqa/truthful_qa cannot be read '
    r'\(ConnectionError: offline\); or name a file: --data=truthfulqa_mc=FILE.$',
  ):
    nlp.truthfulqa_mc(None, data=None, limit=None, seed=0, keep=tmp_path)


def test_every_task_file_is_a_task_of_the_harness_and_of_the_table():
  from lm_eval.tasks import TaskManager

  names = {p.stem for p in nlp.TASKS.glob('*.yaml')}
  found = TaskManager(include_path=str(nlp.TASKS), include_defaults=False).all_subtasks
  assert set(found) == {f'instructgpt_{n}' for n in names}
  assert {name for name, where in registry.TASKS.items() if '.public.' in where} == names | {
    'text_loss',
    'truthfulqa_mc',
  }
  for name in names:
    assert registry.find_tasks([name])[name].__doc__.count('JSONL') == 1


def test_an_interrupted_evaluation_goes_on(tmp_path, model, monkeypatch):
  pairs = [('The cat', ' sat.'), ('A', ' dog'), ('The cat', ' sat.')]
  instances = [type('Request', (), dict(args=a)) for a in pairs]
  asked = [
    type('Request', (), dict(args=(p, {'until': ['\n'], 'max_gen_toks': 4}))) for p in ('abc', 'de')
  ]
  lm = harness.language_model(model, keep=tmp_path / 'a.jsonl')
  first, texts = lm.loglikelihood(instances), lm.generate_until(asked)
  assert len((tmp_path / 'a.jsonl').read_text().splitlines()) == 4 and first[0] == first[2]
  with (tmp_path / 'a.jsonl').open('a') as file:
    file.write('["torn", ')
  real, scored = completions.scorer(model), []
  monkeypatch.setattr(
    completions,
    'scorer',
    lambda *_, **__: lambda pairs, done: (scored.extend(pairs), real(pairs, done)),
  )
  monkeypatch.setattr(completions, 'continuations', lambda *_, **__: pytest.fail('written again'))
  again = harness.language_model(model, keep=tmp_path / 'a.jsonl')
  assert (
    again.loglikelihood(instances) == first and again.generate_until(asked) == texts and not scored
  )
  more = [type('Request', (), dict(args=('new', ' one')))]
  value = again.loglikelihood(more)
  assert (
    len(scored) == 1
    and harness.language_model(model, keep=tmp_path / 'a.jsonl').loglikelihood(more) == value
  )


def test_requests_beyond_the_context_are_counted(model):
  lm = harness.language_model(model)
  make = lambda text: type('Request', (), dict(args=(text, ' x')))
  lm.loglikelihood([make('a' * 600), make('b')])
  assert lm.cut == 1


def test_what_is_compiled_keeps_no_parameters_alive():
  one = loading.load(f'hf:{CHAT}')
  completions.scorer(one)([([1, 2], [3])])
  completions.continuations(one, [[1, 2]], max_tokens=1)
  leaf = weakref.ref(jax.tree.leaves(one.params)[0])
  del one
  gc.collect()
  assert leaf() is None


@pytest.mark.slow
def test_the_same_numbers_on_a_mesh(model):
  spread = loading.load(f'hf:{CHAT}', mesh=dict(data=4, fsdp=2))
  assert len(spread.sharder.mesh.devices.ravel()) == 8
  pairs = [(model.encode(f'text {i} ' * (1 + i % 3)), model.encode(f' word{i}')) for i in range(11)]
  for a, b in zip(completions.scorer(model)(pairs), completions.scorer(spread)(pairs), strict=True):
    assert a[0] == pytest.approx(b[0], abs=1e-4) and a[1] == b[1]
  prompts = [model.encode('The quick ' * n) for n in (1, 2, 3)]
  assert completions.continuations(model, prompts, max_tokens=6) == completions.continuations(
    spread, prompts, max_tokens=6
  )


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.filterwarnings('ignore')
def test_the_same_figures_as_the_hf_backend(model, tmp_path):
  """A choice, sampled answers and TruthfulQA, zero-shot and few-shot, per document; inputs longer
  than the context among them."""
  pytest.importorskip('accelerate')  # of lm-eval's hf backend, which needs torch too
  from lm_eval.models.huggingface import HFLM

  theirs, ours = (
    HFLM(pretrained=str(CHAT), device='cpu', dtype='float32', batch_size=4),
    harness.language_model(model),
  )
  mc = [
    dict(
      question=f'Why {i}?',
      mc1_targets=dict(choices=['yes', 'no way'], labels=[1, 0]),
      mc2_targets=dict(choices=['yes', 'sure thing', 'no way'], labels=[1, 1, 0]),
    )
    for i in range(3)
  ]
  rows = [r for a in 'AB' for r in conversation(a, 1, 2)]
  snippets = [dict(sentence=f'{"very " * (i % 4)}good film {i}', label=i % 2) for i in range(4)]
  jobs = [
    (list(nlp.TRUTHFULQA), {'question': str, **nlp.QA_TARGETS}, mc, None, nlp.TRUTHFULQA),
    (['sst'], dict(sentence=str, label=int), snippets, 2, {'sst': nlp.ACCURACY}),
    (
      ['squadv2'],
      {'title': str, 'context': str, 'question': str, 'answers.text': list},
      rows,
      1,
      {'squadv2': nlp.F1},
    ),
  ]
  for names, fields, records, shots, scores in jobs:
    data = write(tmp_path / f'{names[0]}.jsonl', records)
    a, b = (
      nlp.evaluate(lm, names, fields, scores, 'x', shots, data, None, 0, tmp_path / side)
      for lm, side in ((ours, 'ours'), (theirs, 'theirs'))
      if not (tmp_path / side).mkdir(exist_ok=True)
    )
    for x, y in zip(a, b, strict=True):
      assert x[:2] == y[:2] and x.items == y.items and x.values == pytest.approx(y.values, abs=1e-3)
    for name in names:
      lines = [
        [
          json.loads(line)
          for line in (tmp_path / side / f'samples-{name}-x.jsonl').read_text().splitlines()
        ]
        for side in ('ours', 'theirs')
      ]
      for x, y in zip(*lines, strict=True):
        assert x['prompt'] == y['prompt']
        if names == ['squadv2']:
          assert x['answers'] == y['answers']
        else:
          assert [v for v, _ in x['answers']] == pytest.approx(
            [v for v, _ in y['answers']], abs=1e-3
          )


@pytest.mark.slow
@pytest.mark.parametrize(
  'name,path,count',
  [('truthfulqa_mc', MC, 817), ('squadv2', SQUAD, 6078)],
  ids=['truthfulqa', 'squad'],
)
def test_the_real_files(name, path, count, scripted, tmp_path):
  if not path.exists():
    pytest.skip(f'no {path}: set ALIGNJAX_DATA')

  class Any(dict):
    __missing__ = lambda self, key: -float(len(key))

  scripted.answers = Any() if name == 'truthfulqa_mc' else ['Not in background.'] * count
  cells = getattr(nlp, name)(
    None,
    data=str(path),
    limit=None,
    seed=0,
    keep=tmp_path,
    **({} if name == 'truthfulqa_mc' else dict(shots='zero-shot')),
  )
  assert len(cells[0].items) == len(set(cells[0].items)) == count
  if name == 'squadv2':
    assert len(set(cells[0].clusters)) == 16
    rows = json.loads(gzip.open(path).read())['data']
    empty = [not q['answers'] for a in rows for p in a['paragraphs'] for q in p['qas']]
    assert cells[1].values == [100.0 * e for e in empty]
