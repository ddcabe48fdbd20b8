"""The evaluation harness on our functions: the numbers of its own `hf` backend, and of float64 sums
by hand."""

import pathlib
import types

import numpy as np
import pytest

from alignjax.evals.public import harness
from alignjax.inference import batching, completions, loading

CHAT = pathlib.Path(__file__).parent / 'golden' / 'chat'
TEXTS = [
  ('The cat', ' sat.'),
  ('', 'Hello there'),
  ('Question: why?\nAnswer: ', 'because'),
  ('a' * 60, 'b'),
  ('x ', ' y' * 20),
]


@pytest.fixture(scope='module')
def model():
  return loading.load(f'hf:{CHAT}')


def instances(*args):
  return [types.SimpleNamespace(args=a) for a in args]


@pytest.mark.parametrize(
  'length,most,expected',
  [
    (3, 512, 8),
    (9, 512, 12),
    (13, 512, 16),
    (32, 512, 32),
    (33, 512, 48),
    (49, 512, 64),
    (65, 512, 96),
    (500, 512, 512),
    (500, 500, 500),
    (130, 500, 192),
  ],
)
def test_buckets(length, most, expected):
  assert batching.bucket(length, most) == expected


def test_scores_are_sums_of_log_probabilities(model):
  # two rows at a time
  score = completions.scorer(model, logits_bytes=2 * 4 * 33 * model.cfg.vocab_size)
  rng = np.random.default_rng(0)
  pairs = [
    (rng.integers(0, 256, n).tolist(), rng.integers(0, 256, m).tolist())
    for n, m in zip(rng.integers(1, 40, 9), rng.integers(1, 9, 9), strict=True)
  ]
  for (context, continuation), (value, greedy) in zip(pairs, score(pairs), strict=True):
    row = np.array([[*context, *continuation]], np.int32)
    logits = np.asarray(model.nets.logits(model.params, row, row >= 0), np.float64)[0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = np.arange(len(context) - 1, row.shape[1] - 1)
    assert value == pytest.approx(logprobs[at, row[0, at + 1]].sum(), rel=1e-4)
    assert greedy == bool((logits[at].argmax(-1) == row[0, at + 1]).all())


def test_greedy_is_true_for_what_greedy_decoding_gives(model):
  prompt = model.encode('The cat')
  text = completions.continuations(model, [prompt], max_tokens=6)[0]
  ids = model.encode(text)
  if len(ids) == 6:  # bytes that form no character do not come back
    assert completions.scorer(model)([(prompt, ids)])[0][1]
  assert not completions.scorer(model)([(prompt, [7, 7, 7])])[0][1]


def test_long_inputs_lose_their_left(model):
  score, most = completions.scorer(model), model.cfg.max_length
  long = np.random.default_rng(0).integers(0, 256, most + 50).tolist()
  assert score([(long, [5, 6])])[0][0] == pytest.approx(
    score([(long[-(most - 1) :], [5, 6])])[0][0], rel=1e-5
  )


def test_stop_texts_end_a_continuation(model):
  whole = completions.continuations(
    model, [model.encode('abc'), model.encode('a longer prompt than that ' * 3)], max_tokens=16
  )
  letter = next(c for c in whole[0] if c.isprintable() and c != '\ufffd')
  cut = completions.continuations(model, [model.encode('abc')], max_tokens=16, until=(letter,))[0]
  assert cut == whole[0].split(letter)[0]
  assert set(completions.stop_tokens(model, ['\n'])) >= {model.template.end, model.encode('\n')[0]}
  with pytest.raises(ValueError, match='leaves no room'):
    completions.continuations(model, [[1]], max_tokens=512)


GREEDY = harness.Sampling(('\n',), 256, 0.0)


@pytest.mark.parametrize(
  'asked,expected',
  [
    (dict(do_sample=False, temperature=0.7, top_p=0.5), GREEDY),
    (dict(temperature=0.0), GREEDY),
    (dict(), GREEDY),
    (dict(max_gen_toks=9), GREEDY._replace(max_tokens=9)),
    (dict(max_new_tokens=9, num_beams=1), GREEDY._replace(max_tokens=9)),
    (dict(max_tokens=9, max_completion_tokens=5), GREEDY._replace(max_tokens=9)),
    (dict(max_completion_tokens=5), GREEDY._replace(max_tokens=5)),
    (dict(max_gen_toks=7, max_new_tokens=9), GREEDY._replace(max_tokens=7)),
    (dict(temperature=0.7), GREEDY._replace(temperature=0.7)),
    (
      dict(do_sample=True, temperature=0.2, top_p=0.95, top_k=0),
      GREEDY._replace(temperature=0.2, top_p=0.95),
    ),
    (
      dict(do_sample=True, temperature=1, top_p=1.0, top_k=40),
      GREEDY._replace(temperature=1.0, top_k=40),
    ),
  ],
)
def test_generation_arguments_mean_what_they_mean_to_the_hf_backend(asked, expected):
  pytest.importorskip('lm_eval')
  assert harness.sampling(dict(until=['\n']) | asked) == expected
  assert harness.sampling(dict(until='\n') | asked) == expected
  assert harness.sampling(asked) == expected._replace(until=())


@pytest.mark.parametrize(
  'asked,words',
  [
    (dict(num_beams=10), 'num_beams=10 is not supported'),
    (dict(min_p=0.1), 'min_p=0.1 is not supported'),
    (dict(max_length=99), 'max_length=99 is not supported'),
    (dict(do_sample=True), 'temperature=None must be a number above 0'),
    (dict(do_sample=True, temperature=0.0), 'temperature=0.0 must be'),
    (dict(temperature=0.5, top_p=0), 'top_p=0 must be'),
    (dict(temperature=0.5, top_k=1.5), 'top_k=1.5 must be'),
    (dict(max_gen_toks='many'), 'cannot be read'),
  ],
)
def test_generation_arguments_that_cannot_be_are_named(asked, words):
  pytest.importorskip('lm_eval')
  with pytest.raises(ValueError, match=f'generation_kwargs.*{words}'):
    harness.sampling(asked)


def test_generation_arguments_reach_the_sampler(model, tmp_path):
  """The most likely token alone, by top_k or by top_p, is greedy decoding at any temperature."""
  pytest.importorskip('lm_eval')
  lm = harness.language_model(model, keep=tmp_path / 'answers.jsonl')

  def written(**asked):
    return lm.generate_until(instances(('The cat', dict(asked, max_new_tokens=8))), True)

  greedy = written()
  for asked in (dict(top_k=1), dict(top_p=1e-6)):
    assert written(do_sample=True, temperature=9.0, **asked) == greedy
  assert written(do_sample=False, temperature=9.0) == greedy
  assert written(do_sample=True, temperature=9.0) != greedy
  assert (
    len((tmp_path / 'answers.jsonl').read_text().splitlines()) == 4
  )  # Two are the same request.
  assert len(model.encode(greedy[0])) <= 8


@pytest.mark.parity
@pytest.mark.filterwarnings('ignore')
def test_the_same_numbers_as_the_hf_backend(model):
  pytest.importorskip('accelerate')  # of lm-eval's hf backend, which needs torch too
  pytest.importorskip('lm_eval')
  from lm_eval.models.huggingface import HFLM

  theirs = HFLM(pretrained=str(CHAT), device='cpu', dtype='float32', batch_size=2)
  ours = harness.language_model(model)
  long = ('abc ' * 200, ' tail')
  for a, b in zip(
    ours.loglikelihood(instances(*TEXTS, long), disable_tqdm=True),
    theirs.loglikelihood(instances(*TEXTS, long), disable_tqdm=True),
    strict=True,
  ):
    assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]
  documents = instances(('one document of text',), ('lorem ipsum ' * 100,))
  for a, b in zip(
    ours.loglikelihood_rolling(documents),
    theirs.loglikelihood_rolling(documents, disable_tqdm=True),
    strict=True,
  ):
    assert a == pytest.approx(b, abs=2e-3)
  for how in ({'max_gen_toks': 12}, {'max_new_tokens': 12, 'temperature': 0.7}):
    asked = {'until': ['\n'], 'do_sample': False} | how
    requests = instances(('Q: a?\nA:', asked), ('The quick', asked))
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)
