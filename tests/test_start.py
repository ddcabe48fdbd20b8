"""How a document begins: one answer for prompts, rows, evaluations and generation, for a tokenizer
that puts a token before every text and for one that does not."""

import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest

from alignjax import rewards, sandbox, train
from alignjax.configs import smollm2_135m
from alignjax.data import cache, encode, templates, text
from alignjax.data import rows as encoded_rows
from alignjax.evals.public import harness
from alignjax.evals.safety import bias, prefixes
from alignjax.inference import completions, loading, streaming
from alignjax.sampling import generate
from alignjax.setup import objects
from alignjax.setup.texts import load_tokenizer
from alignjax.stages import ppo_ptx

CHAT = pathlib.Path(__file__).parent / 'golden' / 'chat'
EOS, TURN, BOS = 256, 258, 260  # <|endoftext|>, <|im_end|> and, where it is added, <s>
# ids of printable ASCII without the blank, in the order of the alphabet
letters = lambda word: [ord(c) - ord('!') for c in word]


@pytest.fixture(scope='session')
def with_bos(tmp_path_factory):
  """The golden checkpoint with a tokenizer that begins every text with <s>, as Llama's."""
  from tokenizers import AddedToken, Tokenizer, processors

  folder = tmp_path_factory.mktemp('bos') / 'checkpoint'
  shutil.copytree(CHAT, folder)
  tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tokenizer.add_special_tokens([AddedToken('<s>', special=True, normalized=False)])
  tokenizer.post_processor = processors.TemplateProcessing(
    single='<s> $A', pair='<s> $A $B', special_tokens=[('<s>', BOS)]
  )
  tokenizer.save(str(folder / 'tokenizer.json'))
  spec = json.loads((folder / 'tokenizer_config.json').read_text())
  (folder / 'tokenizer_config.json').write_text(json.dumps(spec | dict(bos_token='<s>')))
  return folder


@pytest.fixture(scope='session')
def model(with_bos):
  return loading.load(f'hf:{with_bos}')


def test_the_start_for_each_kind_of_tokenizer(with_bos):
  bos, plain = (templates.make(load_tokenizer(str(f)), 'plain') for f in (with_bos, CHAT))
  assert bos.text('ab') == [BOS, *letters('ab')] and plain.text('ab') == letters('ab')
  assert bos.prompt('ab') == bos.text('ab') and plain.prompt('ab') == plain.text('ab')
  assert bos.text('') == bos.prompt('') == [BOS] and plain.text('') == plain.prompt('') == [EOS]
  assert bos.document('ab') == [BOS, *letters('ab'), EOS] and plain.document('ab') == [
    EOS,
    *letters('ab'),
  ]
  assert bos.row('ab', 'c') == ([BOS, *letters('ab')], [*letters('c'), EOS])
  assert templates.make(load_tokenizer(str(with_bos)), 'dialogue').prompt('a')[0] == BOS
  assert templates.make(load_tokenizer(str(with_bos)), 'Q: {prompt}').prompt('a')[:2] == [
    BOS,
    *letters('Q'),
  ]
  assert bos.prompt('<s>')[0] == BOS and bos.prompt('<s>').count(BOS) == 1, (
    'a name in the text is text, and begins nothing twice'
  )
  words = templates.of_words(
    sandbox.encode, sandbox.decode, sandbox.EOS_ID, sandbox.PAD_ID, sandbox.NEWLINE
  )
  the, end = sandbox.encode('the')[0], sandbox.EOS_ID
  assert words.text('the') == words.document('the') == [end, the] and words.prompt('the')[:2] == [
    end,
    the,
  ]


@pytest.mark.parametrize('pack', [False, True])
def test_rows_of_pretraining_text(with_bos, pack):
  rows = {}
  for folder in (with_bos, CHAT):
    template = templates.make(load_tokenizer(str(folder)), 'plain')
    records = [[dict(text=t)] for t in ('ab', ' ', 'c', 'd')]
    found = cache.in_memory(encoded_rows.part(records, 'pretrain', template, 0))
    made = text.rows_of(found, np.arange(4), 4, template.pad, pack)
    rows[folder] = made.take(np.arange(made.count))
  a, b, c, d = letters('abcd')
  assert rows[with_bos].tokens.tolist()[:2] == [
    [BOS, a, b, EOS],
    [BOS, c, EOS, 259 if pack else BOS],
  ]
  assert rows[CHAT].tokens.tolist() == (
    [[EOS, a, b, 259], [EOS, c, EOS, d]] if pack else [[EOS, a, b, EOS]]
  )
  assert rows[with_bos].weights[0].tolist() == [0, 1, 1, 1]


def test_a_chat_template_that_writes_the_start_writes_it_once(with_bos):
  tokenizer = load_tokenizer(str(with_bos))
  without = templates.make(tokenizer, 'chat')
  assert BOS not in without.prompt('a'), 'what the template renders, as transformers'
  tokenizer.chat_template = '{{ bos_token }}' + tokenizer.chat_template
  template = templates.make(tokenizer, 'chat')
  assert template.prompt('a')[0] == BOS and template.prompt('a').count(BOS) == 1
  assert template.prompt('a') == tokenizer.apply_chat_template(
    [{'role': 'user', 'content': 'a'}], add_generation_prompt=True, tokenize=True, return_dict=False
  )
  assert template.text('a')[0] == BOS and template.first == (BOS,), (
    'plain text is not a conversation'
  )


def instances(*args):
  return [types.SimpleNamespace(args=a) for a in args]


def logprob(model, context, continuation):
  """By an explicit sum in float64."""
  row = np.array([[*context, *continuation]], np.int32)
  logits = np.asarray(jax.jit(model.nets.logits)(model.params, row, row >= 0), np.float64)[0]
  logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  at = np.arange(len(context) - 1, row.shape[1] - 1)
  return logprobs[at, row[0, at + 1]].sum()


def test_the_start_is_a_context_and_is_not_scored(model):
  lm = harness.language_model(model)
  ab, cd = letters('ab'), letters('cd')
  expected = {('', 'ab'): logprob(model, [BOS], ab), ('ab', 'cd'): logprob(model, [BOS, *ab], cd)}
  for (context, continuation), value in expected.items():
    assert lm.loglikelihood(instances((context, continuation)), disable_tqdm=True)[0][
      0
    ] == pytest.approx(value, abs=1e-3)
  assert lm.loglikelihood_rolling(instances(('ab',)))[0] == pytest.approx(
    expected['', 'ab'], abs=1e-3
  )
  assert completions.scorer(model)([([], ab)])[0][0] == pytest.approx(expected['', 'ab'], abs=1e-3)
  assert prefixes.split(model, '', 'ab') == ([BOS], ab)
  assert bias.pair_logprobs(model, [('ab', 'cd')], '')[0, 0] == pytest.approx(
    expected['', 'ab'], abs=1e-3
  )
  prefix, rest = prefixes.split(model, 'Be good:', 'ab')
  assert prefix[0] == BOS and model.decode(rest) == '\nab'


def test_a_rendered_conversation_has_its_control_tokens_in_the_harness(model):
  lm = harness.language_model(model)
  rendered = lm.apply_chat_template([{'role': 'user', 'content': 'a'}])
  assert lm.tok_encode(rendered) == [BOS, *templates.make(model.tokenizer, 'chat').prompt('a')]
  assert lm.tok_encode('<s>' + rendered).count(BOS) == 1
  assert harness.language_model(model).tok_encode('<s>a') == [BOS, *letters('<s>a')]


@pytest.mark.parity
@pytest.mark.filterwarnings('ignore')
def test_a_tokenizer_with_bos_as_the_hf_backend(model, with_bos):
  pytest.importorskip('accelerate')  # of lm-eval's hf backend, which needs torch too
  pytest.importorskip('lm_eval')
  from lm_eval.models.huggingface import HFLM

  theirs, ours = (
    HFLM(pretrained=str(with_bos), device='cpu', dtype='float32', batch_size=2),
    harness.language_model(model),
  )
  requests = instances(('', 'Hello there'), ('The cat', ' sat.'), ('x ', 'y'))
  for a, b in zip(
    ours.loglikelihood(requests, disable_tqdm=True),
    theirs.loglikelihood(requests, disable_tqdm=True),
    strict=True,
  ):
    assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]
  # the one difference: `hf` reads BOS BOS text, and scores the second BOS
  document = model.template.bare('one document')
  a, b = (
    lm.loglikelihood_rolling(instances(('one document',)), disable_tqdm=True)[0]
    for lm in (ours, theirs)
  )
  assert a == pytest.approx(logprob(model, [BOS], document), abs=2e-3)
  assert b == pytest.approx(logprob(model, [BOS], [BOS, *document]), abs=2e-3)


@pytest.mark.slow
def test_the_same_weights_as_folder_and_as_stage_give_equal_figures(model, with_bos, tmp_path):
  """SFT at learning rate 0; with the pretraining mix, whose rows begin with the start too."""
  c = smollm2_135m.get_config('tiny')
  c.checkpoint, c.model.max_length, c.data.template, c.stages_to_run = (
    f'hf:{with_bos}',
    256,
    'plain',
    ('sft',),
  )
  (tmp_path / 'd.jsonl').write_text(json.dumps(dict(prompt='ab', response='c')) + '\n')
  (tmp_path / 't.jsonl').write_text((json.dumps(dict(text='ab ' * 20)) + '\n') * 9)
  c.data.demonstrations, c.data.mapping.demonstrations = f'jsonl:{tmp_path}/d.jsonl', None
  c.data.pretrain = f'jsonl:{tmp_path}/t.jsonl'
  c.data.update(prompt_length=16, response_length=8)
  c.stages.sft.update(batch_size=8, epochs=1)
  c.stages.sft.optimizer.policy.lr = 0.0
  c.report.policies = {}
  one = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as m:
    m.setattr(jax, 'devices', lambda *_: one)
    train.main(c, tmp_path / 'run')
  stage = loading.load(str(tmp_path / 'run' / 'sft'))
  both = [harness.language_model(m) for m in (model, stage)]
  requests = instances(('', 'Hello'), ('apple', ' and river'))
  for a, b in zip(*(lm.loglikelihood(requests, disable_tqdm=True) for lm in both), strict=True):
    assert a == pytest.approx(b, abs=1e-6)
  one, other = (lm.loglikelihood_rolling(instances(('apple and river',)))[0] for lm in both)
  assert one == pytest.approx(other, abs=1e-6)
  np.testing.assert_array_equal(
    *(bias.pair_logprobs(m, [('he ran', 'she ran')], '') for m in (model, stage))
  )
  one, other = (
    ''.join(streaming.stream(m, '', temperature=0, max_tokens=5)) for m in (model, stage)
  )
  assert one == other


# ---- nothing to begin with


def test_sampler_and_scorer_agree_on_an_empty_prompt():
  model = loading.load(f'hf:{CHAT}')
  tokens, mask = encode.left_pad(
    [model.template.prompt(p) for p in ('', 'Say', '')], 8, model.template.pad
  )
  out = jax.jit(
    lambda p: generate(
      model.nets.decoder, p, tokens, mask, jax.random.key(0), max_tokens=5, stop_ids=()
    )
  )(model.params)
  rows, live = np.concatenate([tokens, out.responses], 1), np.concatenate([mask, out.mask], 1)
  scored = jax.jit(lambda p: model.nets.logprobs(p, rows, live)[0])(model.params)[:, 8:]
  np.testing.assert_allclose(out.logprobs, scored, atol=1e-5)


def test_a_prompt_of_no_tokens_is_refused():
  with pytest.raises(ValueError, match='prompt 1 has no tokens'):
    encode.left_pad([[5], []], 4, 0)
  with pytest.raises(ValueError, match='x, record 2: its prompt has no tokens'):
    encode.limit_lengths([([1], [[2]]), ([], [[2]])], 4, 4, 'truncate', 'x')
  c = smollm2_135m.get_config('tiny')
  c.checkpoint = f'hf:{CHAT}'
  for entry in ('prompt_length', 'response_length', 'row_length'):
    with pytest.raises(ValueError, match=f'data.{entry}=0 must be 1 or more'), c.data.unlocked():
      before, c.data[entry] = c.data[entry], 0
      try:
        objects.make_setup(c, 'nowhere', jax.devices()[:1])
      finally:
        c.data[entry] = before


# ---- tokens to text


def exact(prompts, responses):
  """A reward that a person writes first: is the answer right."""
  return [float(p == 'Two and two?' and r == '4') for p, r in zip(prompts, responses, strict=True)]


@pytest.mark.parametrize('form', ['plain', 'chat'])
def test_a_reward_on_the_host_reads_what_samples_show(form):
  template = templates.make(load_tokenizer(str(CHAT)), form)
  said = ['Two and two?', 'Two and three?']
  asked = [template.prompt(p) for p in said]
  prompts = encode.left_pad(asked, max(map(len, asked)), template.pad)
  answers = [template.response('4'), template.response('4')[:-1]]
  answers += [[*template.response('4')[:-1], EOS]]  # the end of text ends a chat's response too
  right = encode.right_pad(answers, 4, template.pad)
  prompts = [x[np.array([0, 0, 0])] for x in prompts]
  failures: list = []
  given = dict(
    prompts_by_tokens=dict(zip(map(tuple, asked), said, strict=True)),
    decode_response=template.decode_response,
    failures=failures,
  )
  scores = jax.jit(
    lambda *x: rewards.host_reward(
      *x, nets=None, frozen=None, function='tests.test_start:exact', **given
    )
  )(*prompts, *right)
  assert scores.tolist() == [1.0, 1.0, 1.0] and not failures
  fake = types.SimpleNamespace(
    text=types.SimpleNamespace(template=template),
    config=types.SimpleNamespace(data={'prompts': 'jsonl:prompts.jsonl'}),
  )
  rollout = types.SimpleNamespace(responses=right[0], mask=right[1], scores=np.ones(3))
  assert [
    row[:2] for row in ppo_ptx.samples_and_gold(fake, [dict(prompt=said[0])] * 3, rollout)[1]
  ] == [('Two and two?', '4')] * 3


def test_the_text_of_a_response():
  template = templates.make(load_tokenizer(str(CHAT)), 'chat')
  four = letters('4')
  assert template.ends == (EOS, TURN) and template.end == TURN
  assert (
    template.decode_response([*four, TURN])
    == template.decode_response(np.array([*four, EOS]))
    == ('4', True)
  )
  assert template.decode_response(four) == ('4', False)
  assert template.decode_response([TURN]) == ('', True) and template.decode_response([]) == (
    '',
    False,
  )
  assert template.decode_response([*four, TURN, TURN]) == ('4<|im_end|>', True), (
    'nothing but the last token ended it'
  )


def test_an_added_token_that_the_checkpoint_names_is_an_end(tmp_path, capsys):
  """Marked as special or not: transformers' generate stops there. Its name in people's text is then
  text."""
  shutil.copytree(CHAT, tmp_path / 'c')
  tokenizer = load_tokenizer(str(tmp_path / 'c'))
  tokenizer.add_tokens(['<eot>', '<blank>'])
  tokenizer.save_pretrained(tmp_path / 'c')
  eot, blank = tokenizer.convert_tokens_to_ids(['<eot>', '<blank>'])
  for name in ('config.json', 'generation_config.json'):  # the second hides the first
    (tmp_path / 'c' / name).write_text(json.dumps({'eos_token_id': eot}))
    for form, expected in (('plain', {EOS, eot}), ('chat', {EOS, TURN, eot})):
      template = templates.make(load_tokenizer(str(tmp_path / 'c')), form)
      assert {*template.ends} == expected
      assert template.decode_response([*letters('4'), eot]) == ('4', True)
      assert eot not in template.response('<eot>4') and blank in template.response('<blank>4')
  assert not capsys.readouterr().err


def test_all_ends_that_the_checkpoint_names_end_a_response(tmp_path, capsys):
  shutil.copytree(CHAT, tmp_path / 'c')
  ends = lambda form: templates.make(load_tokenizer(str(tmp_path / 'c')), form).ends
  assert ends('plain') == (EOS,) and ends('chat') == (EOS, TURN)
  (tmp_path / 'c' / 'generation_config.json').write_text('{"eos_token_id": [256, 258, 5]}')
  assert ends('plain') == (EOS, TURN), 'and 5 is a letter'
  assert '(eos_token_id [5]) as ends. They are text' in capsys.readouterr().err
  for bad in ('"258"', 'true', '[[258]]', '{"a": 258}', '[258.0]'):
    (tmp_path / 'c' / 'generation_config.json').write_text(f'{{"eos_token_id": {bad}}}')
    with pytest.raises(
      ValueError, match='generation_config.json: eos_token_id=.* is neither an id nor a list of ids'
    ):
      ends('plain')
  (tmp_path / 'c' / 'generation_config.json').write_text('[')
  with pytest.raises(ValueError, match='generation_config.json is not a JSON object'):
    ends('plain')
