"""Entropy over pairs: by hand on a model with known probabilities, and against torch on a small
random Llama."""

import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.data.templates import of_words
from alignjax.evals import table
from alignjax.evals.safety import bias, prefixes
from alignjax.inference import completions, loading
from alignjax.models.config import TransformerConfig
from alignjax.types import Networks

CHAT = pathlib.Path(__file__).parent / 'golden' / 'chat'
SHARED = (
  pathlib.Path(
    os.environ.get('ALIGNJAX_DATA', pathlib.Path(__file__).parents[2] / 'shared' / 'data')
  )
  / 'evals'
)
WORDS = ['<sep>', '<other>', 'he', 'she', 'ran', 'far']
# p(next | word): rows and columns as WORDS
# a document begins: he is three times as likely as she
CHAIN = np.array(
  [
    [0.1, 0.2, 0.3, 0.1, 0.2, 0.1],
    [0.2, 0.2, 0.2, 0.2, 0.1, 0.1],  # after a prefix: equal
    [0.1, 0.1, 0.1, 0.1, 0.5, 0.1],  # he ran .5
    [0.1, 0.1, 0.1, 0.1, 0.25, 0.35],  # she ran .25
    [0.2, 0.1, 0.1, 0.1, 0.1, 0.4],  # ran far .4
    [0.5, 0.1, 0.1, 0.1, 0.1, 0.1],
  ]
)


def known(max_length=40):
  """A model of which every probability is known: the next word depends on the last one alone."""
  cfg = TransformerConfig(
    vocab_size=len(WORDS), num_layers=1, d_model=8, num_heads=1, max_length=max_length
  )

  def logits(params, tokens, mask, key=None, positions=None):
    found = jnp.log(jnp.asarray(CHAIN, jnp.float32))[tokens]
    return found if positions is None else jnp.take_along_axis(found, positions[..., None], 1)

  nets = Networks(logits=logits, logprobs=None, scalar=None, decoder=None)
  encode = lambda text: [WORDS.index(w) if w in WORDS else 1 for w in text.split()]
  # a text begins with itself, a document after 0
  template = of_words(encode, None, 0, 0, '')._replace(first=())
  return loading.Model(cfg, nets, {}, 'lm', template, len(WORDS), None, None)


def bits(p):
  return -p * np.log2(p) - (1 - p) * np.log2(1 - p)


def test_entropy_by_hand():
  logs = np.log([[0.5, 0.5], [0.75, 0.25], [0.9, 0.1], [1.0, 1e-300]]) + np.array(
    [[0.0], [-900.0], [5.0], [0.0]]
  )
  np.testing.assert_allclose(bias.entropy(logs), [1, 0.811278124, 0.468995594, 0], atol=1e-8)


def test_whole_sentences_of_known_probability():
  """he ran: .3 x .5; she ran: .1 x .25, so P = .15 / .175; after a prefix .2 x .5 against .2 x .25,
  so P = 2/3."""
  pairs = [('he ran', 'she ran'), ('he ran far', 'she ran'), ('he', 'she')]
  basic = bias.pair_logprobs(known(), pairs, '')
  np.testing.assert_allclose(np.exp(basic), [[0.15, 0.025], [0.06, 0.025], [0.3, 0.1]], rtol=1e-5)
  # total, not by length
  np.testing.assert_allclose(
    bias.entropy(basic), [bits(6 / 7), bits(12 / 17), bits(0.75)], rtol=1e-5
  )
  told = bias.pair_logprobs(known(), pairs, prefixes.PREFIXES['respectful'])
  np.testing.assert_allclose(bias.entropy(told), [bits(2 / 3), bits(0.04 / 0.09), 1], rtol=1e-5)
  with pytest.raises(ValueError, match='14 tokens, but the context of the model is 10'):
    bias.pair_logprobs(known(10), pairs, prefixes.PREFIXES['respectful'])


SENTENCES = '\n'.join(
  [
    'sentid\tsentence',
    *(
      f'{job}.{who}.{n}.{gender}.txt\t{word} ran'
      for job in ('nurse', 'baker')
      for who in ('guest', 'someone')
      for n in (0, 1)
      for gender, word in (('male', 'he'), ('female', 'she'), ('neutral', '"they'))
    ),
    '',
  ]
)


def test_the_tasks(tmp_path):
  (tmp_path / 'w.tsv').write_text(SENTENCES)
  cells = bias.winogender(known(), data=str(tmp_path / 'w.tsv'), limit=None, seed=0, keep=tmp_path)
  assert [(c.metric, c.prompt, len(c.values), c.better) for c in cells] == [
    ('entropy (bits)', p, 4, '') for p in ('basic', 'respectful', 'biased')
  ]
  assert cells[0].items == ['nurse.guest.0', 'nurse.guest.1', 'baker.guest.0', 'baker.guest.1']
  assert table.figure(cells[0])['mean'] == pytest.approx(bits(6 / 7), rel=1e-5)
  assert table.figure(cells[2])['mean'] == pytest.approx(bits(2 / 3), rel=1e-5)
  (tmp_path / 'c.csv').write_text(
    ',sent_more,sent_less,stereo_antistereo,bias_type\n'
    '0,"he ran",she ran,stereo,gender\n1,he,she,stereo,age\n2,far,far,antistereo,gender\n'
  )
  cells = bias.crows_pairs(known(), data=str(tmp_path / 'c.csv'), limit=None, seed=0, keep=tmp_path)
  assert [c.metric for c in cells[:3]] == [
    'entropy (bits)',
    'entropy (bits), age',
    'entropy (bits), gender',
  ] and len(cells) == 9
  np.testing.assert_allclose(cells[0].values, [bits(6 / 7), bits(0.75), 1], rtol=1e-5)
  np.testing.assert_allclose(cells[2].values, [bits(6 / 7), 1], rtol=1e-5)
  assert cells[2].items == ['0', '2']
  two = [
    bias.crows_pairs(known(n), data=str(tmp_path / 'c.csv'), limit=2, seed=5, keep=tmp_path)[
      0
    ].items
    for n in (40, 30)
  ]
  assert two[0] == two[1] and len(two[0]) == 2


@pytest.mark.filterwarnings('ignore')  # of the data library
def test_pairs_of_the_hub_are_those_of_the_file(tmp_path, monkeypatch):
  """The hub stores the kind of bias as the number of a class."""
  datasets = pytest.importorskip('datasets')
  kinds = ['race-color', 'gender', 'age']
  rows = [
    dict(sent_more='he ran', sent_less='she ran', bias_type=1),
    dict(sent_more='he', sent_less='she', bias_type=2),
    dict(sent_more='far', sent_less='far', bias_type=1),
  ]
  text = dict.fromkeys(('sent_more', 'sent_less'), datasets.Value('string'))
  hub = datasets.Dataset.from_list(
    rows, datasets.Features({**text, 'bias_type': datasets.ClassLabel(names=kinds)})
  )
  monkeypatch.setattr(datasets, 'load_dataset', lambda *_, **__: hub)
  (tmp_path / 'c.csv').write_text(
    'sent_more,sent_less,bias_type\n'
    + ''.join(f'{r["sent_more"]},{r["sent_less"]},{kinds[r["bias_type"]]}\n' for r in rows)
  )
  common = dict(limit=None, seed=0, keep=tmp_path)
  found = bias.crows_pairs(known(), data=None, **common)
  assert found == bias.crows_pairs(known(), data=str(tmp_path / 'c.csv'), **common)
  assert [c.metric for c in found[:3]] == [
    'entropy (bits)',
    'entropy (bits), age',
    'entropy (bits), gender',
  ]


@pytest.mark.parametrize(
  'name,text,words',
  [
    (
      'a.tsv',
      'sentid\tsentence\nnurse.guest.0.male.txt\the ran\n',
      'nurse.guest.0 has only one of them',
    ),
    ('a.tsv', 'sentid\tsentence\nnurse\the ran\n', "'nurse' does not have the form"),
    (
      'a.tsv',
      'sentid\ttext\nnurse\the\n',
      r"a.tsv, line 2 lacks 'sentence'; the row has \['sentid', 'text'\]",
    ),
    ('a.tsv', 'sentid\tsentence\n', 'no rows'),
    ('a.tsv.gz', 'x', 'no rows'),
    ('a.tsv', 'sentid\tsentence\na\tb\tc\n', 'a.tsv, line 2 has 3 cells, but there are 2 columns'),
  ],
)
def test_data_that_are_not_what_they_should_be(tmp_path, name, text, words):
  (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=words):
    bias.winogender(known(), data=str(tmp_path / name), limit=None, seed=0, keep=tmp_path)


def test_first_tokens_of_tokenizers():
  """A tokenizer that begins a text with <s> (id 1) begins it here too, once, before a prefix and
  without one."""
  model = known()
  model = model._replace(
    template=model.template._replace(bare=lambda text: [*map(ord, text)], first=(1,), start=(1,))
  )
  assert prefixes.split(model, '', 'ab') == ([1], [97, 98])
  assert prefixes.split(model, 'x:', 'ab') == ([1, 120, 58], [10, 97, 98])
  assert prefixes.split(known(), '', 'he ran') == ([0], [2, 4])


def test_the_real_pairs():
  if not SHARED.exists():
    pytest.skip(f'no {SHARED}: set ALIGNJAX_DATA')
  from alignjax.evals import items

  pairs = bias.winogender_pairs(items.read(SHARED / 'winogender' / 'all_sentences.tsv'))
  assert len(pairs) == 120
  differ = [
    [(a, b) for a, b in zip(he.split(), she.split(), strict=True) if a != b]
    for he, she in pairs.values()
  ]
  assert {d[0] for d in differ} == {('he', 'she'), ('his', 'her'), ('him', 'her')} and all(
    len(d) == 1 for d in differ
  )
  crows = items.read(
    SHARED / 'crows_pairs' / 'crows_pairs_anonymized.csv.gz',
    ('sent_more', 'sent_less', 'bias_type'),
  )
  assert len(crows) == 1508 and len({row['bias_type'] for row in crows}) == 9


@pytest.mark.parity
@pytest.mark.filterwarnings('ignore')
def test_the_same_entropy_as_torch():
  """transformers in float64, one sentence at a time, the prefix's tokens written out here."""
  torch = pytest.importorskip('torch')
  import transformers

  theirs = transformers.AutoModelForCausalLM.from_pretrained(CHAT, dtype=torch.float64).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(CHAT)
  model = loading.load(f'hf:{CHAT}')
  pairs = [
    ('The cook told him to go.', 'The cook told her to go.'),
    ('Poor people lie.', 'Rich people do lie.'),
    ('He', 'She'),
  ]

  def total(prefix, sentence):
    before = (
      tokenizer(f'{prefix}\n', add_special_tokens=False).input_ids
      if prefix
      else [tokenizer.eos_token_id]
    )
    ids = torch.tensor([before + tokenizer(sentence, add_special_tokens=False).input_ids])
    with torch.no_grad():
      logprobs = theirs(ids).logits[0].log_softmax(-1)
    return sum(float(logprobs[t - 1, ids[0, t]]) for t in range(len(before), ids.shape[1]))

  score = completions.scorer(model)
  for prefix in prefixes.PREFIXES.values():
    expected = []
    for pair in pairs:
      a, b = (total(prefix, s) for s in pair)
      p = 1 / (1 + np.exp(b - a))
      expected.append(-sum(q * np.log2(q) for q in (p, 1 - p) if q > 0))
    np.testing.assert_allclose(
      bias.entropy(bias.pair_logprobs(model, pairs, prefix, score)), expected, atol=1e-4
    )
