"""An exported folder is judged by what transformers does with it: where generation stops, what a
padded batch scores, which ids a conversation becomes. Over tokenizers whose pad is a token of its
own, the end of text, the template's end, or absent, with BOS or without.
"""

import copy
import functools
import json
import types

import jax
import numpy as np
import pytest

from alignjax import ops
from alignjax.commands import export as command
from alignjax.data import encode
from alignjax.inference import loading
from alignjax.models import export, hf, transformer
from alignjax.models.config import TransformerConfig
from alignjax.sampling import generate
from alignjax.setup import weights
from alignjax.sharding import Sharder, make_mesh

torch = pytest.importorskip('torch', reason='pip install torch (the parity extra)')
transformers = pytest.importorskip('transformers')
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings('ignore')]
from golden import make as golden  # noqa: E402 needs torch

ONE = Sharder(make_mesh(devices=jax.devices()[:1]))
# TEXT: the first byte's id
END, START, STOP, PAD, BOS, TEXT = (
  '<|endoftext|>',
  '<|im_start|>',
  '<|im_end|>',
  '<|pad|>',
  '<s>',
  5,
)
SIZES = dict(
  vocab_size=TEXT + 256,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=128,
)
CONFIGS = dict(
  llama=lambda **kw: transformers.LlamaConfig(**SIZES | kw, num_key_value_heads=2),
  gpt2=lambda **kw: transformers.GPT2Config(
    vocab_size=kw.get('vocab_size', TEXT + 256),
    n_positions=128,
    n_embd=16,
    n_layer=2,
    n_head=4,
    tie_word_embeddings=False,
  ),
  gpt_neox=lambda **kw: transformers.GPTNeoXConfig(
    **SIZES | kw,
    rope_parameters=dict(rope_type='default', rope_theta=10_000.0, partial_rotary_factor=0.5),
  ),
)


def tokenizer_of(folder, pad, bos, special=(END, START, STOP, PAD, BOS)):
  """Bytes after a few control tokens. pad, bos: names, or None; a tokenizer with bos puts it before
  every text."""
  from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
  from tokenizers.models import BPE

  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  inner = Tokenizer(BPE(vocab={t: i for i, t in enumerate([*special, *letters])}, merges=[]))
  inner.pre_tokenizer, inner.decoder = (
    pre_tokenizers.ByteLevel(add_prefix_space=False),
    decoders.ByteLevel(),
  )
  inner.add_special_tokens(list(special))
  if bos:
    inner.post_processor = processors.TemplateProcessing(
      single=f'{bos} $A', special_tokens=[(bos, special.index(bos))]
    )
  made = transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, eos_token=END, pad_token=pad, bos_token=bos
  )
  made.chat_template = (
    ('{{ bos_token }}' if bos else '') + golden.CHATML if STOP in special else None
  )
  made.save_pretrained(folder)


def source_of(
  folder,
  kind='llama',
  pad=PAD,
  bos=None,
  generation=None,
  seed=0,
  special=(END, START, STOP, PAD, BOS),
  **config,
):
  """A checkpoint as users have them: random weights far from their initial values; of its tokenizer
  see tokenizer_of."""
  torch.manual_seed(seed)
  model = transformers.AutoModelForCausalLM.from_config(
    CONFIGS[kind](**dict(vocab_size=len(special) + 256) | config)
  )
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.3 * torch.randn_like(p))
  model.save_pretrained(folder)
  (folder / 'generation_config.json').unlink(missing_ok=True)
  if generation is not None:
    (folder / 'generation_config.json').write_text(json.dumps(generation))
  tokenizer_of(folder, pad, bos, special)
  return folder


@functools.cache
def greedy(cfg, ends):
  """params, tokens, mask -> at most 24 tokens; compiled once."""
  nets = transformer.make_networks(cfg)
  return jax.jit(
    lambda p, tokens, mask: generate(
      nets.decoder, p, tokens, mask, jax.random.key(0), max_tokens=24, stop_ids=ends, temperature=0
    )
  )


PADS = [(PAD, None), (END, None), (STOP, None), (None, None), (None, BOS), (STOP, BOS)]


@pytest.mark.parametrize('pad, bos', PADS)
def test_generation_stops_where_ours_does(pad, bos, tmp_path):
  """Greedy responses of both, token by token, some ended by the template's end and some by the end
  of text."""
  source = source_of(
    tmp_path / 'in',
    pad=pad,
    bos=bos,
    generation={'eos_token_id': 0, 'temperature': 0.5, '_from_model_config': True},
  )
  model = loading.load(f'hf:{source}', 'lm', 'chat')
  params = jax.tree.map(np.array, model.params)
  params['final']['head']['kernel'][:, [0, 2]] *= 2.5  # both ends become likely
  ends = (model.template.end, 0)
  assert ends == (2, 0)
  export.save(tmp_path / 'out', source, model.cfg, params, tokenizer=model.tokenizer, ends=ends[:1])
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
  read = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  g, c = theirs.generation_config, theirs.config
  assert (g.eos_token_id, c.eos_token_id, g.temperature, g.bos_token_id) == (
    [2, 0],
    [2, 0],
    0.5,
    4 if bos else 1,
  )
  assert (
    g.pad_token_id == (0 if pad is None else model.tokenizer.pad_token_id)
    and c.pad_token_id == model.tokenizer.pad_token_id
  )
  asked = ['a', 'Say b', 'and', 'two words', 'Why?', 'x y z', 'no', '12']
  rows = [model.template.prompt(a) for a in asked]
  ids = [
    read.apply_chat_template(
      [{'role': 'user', 'content': a}], add_generation_prompt=True, return_dict=True
    )['input_ids']
    for a in asked
  ]
  assert ids == [list(row) for row in rows]
  tokens, mask = encode.left_pad(rows, 56, model.template.pad)
  out = greedy(TransformerConfig(**hf.fields(source)), ends)(params, tokens, mask)
  got = theirs.generate(
    torch.tensor(tokens, dtype=torch.long),
    attention_mask=torch.tensor(mask, dtype=torch.long),
    max_new_tokens=24,
    do_sample=False,
  )[:, tokens.shape[1] :].numpy()
  lasts = set()
  for said, live, other in zip(np.asarray(out.responses), np.asarray(out.mask), got, strict=True):
    said = said[live].tolist()
    assert other[: len(said)].tolist() == said and set(other[len(said) :].tolist()) <= {
      g.pad_token_id
    }
    lasts.add(said[-1])
  assert {0, 2} <= lasts


def test_ids_without_a_token_are_not_generated(tmp_path):
  """The vocabulary is larger than the tokenizer's, and ids beyond it are by far the likeliest."""
  source = source_of(tmp_path / 'in', vocab_size=TEXT + 256 + 3)
  model = loading.load(f'hf:{source}')
  params = jax.tree.map(np.array, model.params)
  params['final']['head']['kernel'][:, -3:] *= 50
  export.save(
    tmp_path / 'out', source, model.cfg, params, tokenizer=model.tokenizer, ends=model.template.ends
  )
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
  tokens = np.array([model.template.prompt(a) for a in ('ab', 'cd', 'ef', 'gh')])
  ours = greedy(model.cfg, model.template.ends)(params, tokens, tokens >= 0)
  got = theirs.generate(torch.tensor(tokens, dtype=torch.long), max_new_tokens=24, do_sample=False)[
    :, tokens.shape[1] :
  ].numpy()
  for said, live, other in zip(np.asarray(ours.responses), np.asarray(ours.mask), got, strict=True):
    assert other[: live.sum()].tolist() == said[live].tolist() and max(said[live]) < TEXT + 256


@functools.cache
def scorer(cfg):
  nets = transformer.make_networks(cfg)
  return jax.jit(lambda p, tokens, mask: ops.last_live(nets.scalar(p, tokens, mask), mask))


def reward_of(source, bias):
  cfg = TransformerConfig(**hf.fields(source))
  params = jax.tree.map(np.array, hf.load(source, cfg, 'scalar', ONE.params, jax.random.key(1)))
  params['final']['score']['bias'] += np.float32(bias)
  return cfg, params


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
  'kind, pad, bos, special, added',
  [
    *[('llama', pad, bos, (END, START, STOP, PAD, BOS), 0) for pad, bos in PADS],
    ('llama', STOP, BOS, (END, START, STOP, BOS), 0),  # nothing but BOS is left
    ('llama', STOP, None, (END, START, STOP), 1),
    ('gpt2', None, None, (END,), 1),
    ('gpt2', END, None, (END, '<|reserved_0|>'), 0),
    ('gpt_neox', END, None, (END, '<|padding|>'), 0),
  ],
)
def test_padded_batches_score_as_ours(kind, pad, bos, special, added, tmp_path):
  """One at a time, padded on the right and on the left: our scores, and those of the folder loaded
  back."""
  chat = STOP in special
  source = source_of(tmp_path / 'in', kind, pad, bos, special=special)
  cfg, params = reward_of(source, 0.4)
  model = loading.load(f'hf:{source}', 'lm', 'chat' if chat else 'plain')
  report = export.save(
    tmp_path / 'out',
    source,
    cfg,
    params,
    tokenizer=model.tokenizer,
    ends=(model.template.end,),
    bias='keep',
  )
  assert not (tmp_path / 'out' / 'generation_config.json').exists()
  rows = [
    [*model.template.prompt('Say a'), *model.template.response(said)]
    for said in ('a', 'a much longer answer', '', 'ab')
  ]
  ours = np.asarray(scorer(cfg)(params, *encode.right_pad(rows, 72, model.template.pad)))
  back = loading.load(f'hf:{tmp_path / "out"}', 'scalar', 'chat' if chat else 'plain')
  assert back.cfg.vocab_size == cfg.vocab_size + added
  again = scorer(TransformerConfig(**hf.fields(tmp_path / 'out')))(
    back.params, *encode.right_pad(rows, 72, back.template.pad)
  )
  np.testing.assert_allclose(again, ours, rtol=1e-5, atol=1e-5)
  theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'out').eval()
  read = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  assert (
    read.pad_token_id
    == theirs.config.pad_token_id
    not in (None, read.eos_token_id, model.template.end)
  )
  assert read.padding_side == 'right' and read.pad_token in report['pad']
  bias = getattr(theirs.config, 'alignjax_score_bias', 0.0)
  assert (bias == 0) == (kind != 'llama') == ('folded' in report['bias'])
  with torch.no_grad():
    alone = [float(theirs(torch.tensor([row])).logits[0, 0]) + bias for row in rows]
    np.testing.assert_allclose(alone, ours, rtol=1e-4, atol=1e-4)
    for side in ('right', 'left'):
      padded = read.pad({'input_ids': rows}, padding_side=side, return_tensors='pt')
      assert (padded['input_ids'] == read.pad_token_id).any()
      # absolute positions: transformers counts them from the first column unless told
      if kind == 'gpt2' and side == 'left':
        padded['position_ids'] = (padded['attention_mask'].cumsum(1) - 1).clip(0)
      np.testing.assert_allclose(
        theirs(**padded).logits[:, 0].numpy() + bias, ours, rtol=1e-4, atol=1e-4, err_msg=side
      )


def test_a_reward_model_of_others_that_is_scored_before_the_end_is_refused(tmp_path):
  """Where its pad is the token that responses end with, transformers' score is that of the token
  before."""
  torch.manual_seed(0)
  for pad, refused in ((0, False), (2, True), (None, False)):
    folder = tmp_path / str(pad)
    model = transformers.AutoModelForSequenceClassification.from_config(
      CONFIGS['llama'](pad_token_id=pad, num_labels=1)
    ).eval()
    model.save_pretrained(folder)
    tokenizer_of(folder, STOP, None)
    if refused:
      with pytest.raises(
        ValueError, match=r'config.json: pad_token_id=2 is the token that responses end with'
      ):
        loading.load(f'hf:{folder}', 'scalar', 'chat')
      loading.load(f'hf:{folder}', 'scalar', 'plain')  # ends with the end of text
      fake = types.SimpleNamespace(
        read={},
        policy_model=None,
        reward_model=None,
        config=types.SimpleNamespace(seed=0),
        text=types.SimpleNamespace(template=types.SimpleNamespace(end=2)),
      )
      with pytest.raises(
        ValueError, match=r'config.json: pad_token_id=2 is the token that responses end with'
      ):
        weights.initial_params(fake, f'hf:{folder}', 'scalar', 0)
      continue
    ours = loading.load(f'hf:{folder}', 'scalar', 'chat')
    row = [*ours.template.prompt('Say a'), *ours.template.response('ab')]
    assert row[-1] == 2
    score = scorer(ours.cfg)(ours.params, *encode.right_pad([row], 72, ours.template.pad))
    np.testing.assert_allclose(
      score[0], float(model(torch.tensor([row])).logits[0, 0]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize('pad, bos', PADS)
def test_texts_become_the_same_ids(pad, bos, tmp_path):
  """With and without the chat template, of the policy's tokenizer and of the reward model's, whose
  pad may be another."""
  source = source_of(tmp_path / 'in', pad=pad, bos=bos)
  cfg, reward = reward_of(source, 0.0)
  policy = hf.load(source, cfg, 'lm', ONE.params)
  plain, chat = (loading.load(f'hf:{source}', 'lm', form) for form in ('plain', 'chat'))
  for name, params in (('policy', policy), ('reward', reward)):
    export.save(tmp_path / name, source, cfg, params, tokenizer=plain.tokenizer, ends=(2,))
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
    for said in ('Hello.', ' two  spaces ', 'Zeile\nund ä'):
      assert read(said)['input_ids'] == list(plain.template.prompt(said))
      messages = [{'role': 'user', 'content': said}, {'role': 'assistant', 'content': 'yes'}]
      whole = read.apply_chat_template(messages, tokenize=True, return_dict=True)['input_ids']
      ours = [*chat.template.prompt(said), *chat.template.response('yes')]
      assert whole[: len(ours)] == ours
      assert read.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)[
        'input_ids'
      ] == list(chat.template.prompt(said))
    assert (tmp_path / name / 'chat_template.jinja').read_text() == (
      source / 'chat_template.jinja'
    ).read_text()


def test_untied_gpt2_goes_there_and_back(tmp_path):
  source = source_of(tmp_path / 'in', 'gpt2')
  cfg = TransformerConfig(**hf.fields(source))
  assert not cfg.tie_embeddings
  params = hf.load(source, cfg, 'lm', ONE.params)
  export.save(tmp_path / 'out', source, cfg, params)
  rows = torch.arange(9)[None]
  a, b = (
    transformers.AutoModelForCausalLM.from_pretrained(f).eval()(rows).logits.detach()
    for f in (source, tmp_path / 'out')
  )
  np.testing.assert_array_equal(a, b)
  ours = transformer.make_networks(cfg).logits(
    params, rows.numpy().astype(np.int32), np.ones((1, 9), bool)
  )
  np.testing.assert_allclose(ours, a, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def test_a_head_that_differs_is_exported_as_such(tmp_path):
  """config.json said tied, the file had another head: the export says untied, so that older readers
  see the head too."""
  source = source_of(tmp_path / 'in', tie_word_embeddings=False)
  c = json.loads((source / 'config.json').read_text())
  (source / 'config.json').write_text(json.dumps(c | dict(tie_word_embeddings=True)))
  cfg = TransformerConfig(**hf.fields(source))
  export.save(tmp_path / 'out', source, cfg, hf.load(source, cfg, 'lm', ONE.params))
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['tie_word_embeddings'] is False


def test_generation_entries_of_config_json_are_kept(tmp_path):
  """Older folders have them there; beside a generation_config.json transformers would no longer
  read them."""
  source = source_of(tmp_path / 'in')
  c = json.loads((source / 'config.json').read_text())
  (source / 'config.json').write_text(json.dumps(c | dict(do_sample=True, top_p=0.7)))
  cfg = TransformerConfig(**hf.fields(source))
  export.save(
    tmp_path / 'out',
    source,
    cfg,
    hf.load(source, cfg, 'lm', ONE.params),
    tokenizer=transformers.AutoTokenizer.from_pretrained(source),
    ends=(2,),
  )
  assert json.loads((tmp_path / 'out' / 'generation_config.json').read_text()) == dict(
    do_sample=True, top_p=0.7, use_cache=True, eos_token_id=[2, 0], pad_token_id=3, bos_token_id=1
  )


def test_a_longer_context_keeps_the_frequencies(tmp_path):
  """Llama 3's frequencies depend on the original context, which is max_position_embeddings where
  the table does not say."""
  source = source_of(
    tmp_path / 'in',
    rope_parameters=dict(
      rope_type='llama3', rope_theta=10_000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    max_position_embeddings=32,
  )
  c = json.loads((source / 'config.json').read_text())
  # transformers may have added it
  c['rope_parameters'].pop('original_max_position_embeddings', None)
  (source / 'config.json').write_text(json.dumps(c))
  cfg = TransformerConfig(**hf.fields(source) | dict(max_length=128))
  params = hf.load(source, cfg, 'lm', ONE.params)
  export.save(tmp_path / 'out', source, cfg, params)
  assert TransformerConfig(**hf.fields(tmp_path / 'out')) == cfg
  rows = torch.arange(5, 105)[None]
  ours = transformer.make_networks(cfg).logits(
    params, rows.numpy().astype(np.int32), np.ones((1, 100), bool)
  )
  theirs = (
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
    .eval()(rows)
    .logits.detach()
    .numpy()
  )
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_what_config_json_cannot_say_is_not_exported(tmp_path):
  source = source_of(tmp_path / 'in')
  cfg = TransformerConfig(**hf.fields(source))
  params = hf.load(source, cfg, 'lm', ONE.params)
  with pytest.raises(
    ValueError, match=r'model.norm_eps=0.01 was trained, but .*config.json means 1e-06'
  ):
    export.save(
      tmp_path / 'out', source, TransformerConfig(**hf.fields(source) | dict(norm_eps=0.01)), params
    )
  big = copy.deepcopy(jax.tree.map(np.array, params))
  big['layers']['mlp']['up']['kernel'][1, 3, 2] = 7e4
  with pytest.raises(
    ValueError, match=r'model.layers.1.mlp.up_proj.weight holds numbers that float16 cannot'
  ):
    export.save(tmp_path / 'out', source, cfg, big, dtype='float16')
  assert not (tmp_path / 'out').exists()


def test_damage_of_an_export_is_noticed(tmp_path):
  """Each file with a byte changed, cut short, emptied or removed; also files that do not count."""
  source = source_of(tmp_path / 'in')
  cfg = TransformerConfig(**hf.fields(source))
  out = tmp_path / 'out'
  export.save(
    out,
    source,
    cfg,
    hf.load(source, cfg, 'lm', ONE.params),
    shard_bytes=9000,
    tokenizer=transformers.AutoTokenizer.from_pretrained(source),
    ends=(2,),
  )
  loading.load(f'hf:{out}', 'lm', 'chat')
  names = sorted(p.name for p in out.iterdir())
  assert {
    'SHA256SUMS',
    'config.json',
    'generation_config.json',
    'model.safetensors.index.json',
    'tokenizer.json',
  } < set(names)
  for name in names:
    path, raw = out / name, (out / name).read_bytes()
    for damaged in (
      raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 4]) + raw[len(raw) // 2 + 1 :],
      raw[:-7],
      b'',
      None,
    ):
      path.unlink()
      if damaged is not None:
        path.write_bytes(damaged)
      if name == 'SHA256SUMS' and not damaged:
        loading.load(f'hf:{out}', 'lm', 'chat')  # then nothing is compared
      else:
        with pytest.raises((ValueError, FileNotFoundError), match=str(out)):
          loading.load(f'hf:{out}', 'lm', 'chat')
    path.write_bytes(raw)
  loading.load(f'hf:{out}', 'lm', 'chat')


def test_the_commands_errors_are_lines(tmp_path, monkeypatch):
  """A reward model's bias without a choice; a folder that cannot be written."""
  source = source_of(tmp_path / 'in')
  cfg, params = reward_of(source, 0.5)
  model = loading.load(f'hf:{source}', 'lm', 'chat')._replace(params=params, head='scalar', cfg=cfg)
  monkeypatch.setattr(loading, 'load', lambda name: model)
  with pytest.raises(
    ValueError, match='the reward model has the bias 0.5.*--bias=drop.*--bias=keep'
  ):
    command.main(['--model=x', f'--out={tmp_path / "out"}'])
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match='cannot write to .*file'):
    command.main(['--model=x', f'--out={tmp_path / "file" / "out"}', '--bias=drop'])


def test_the_command_names_the_trained_end_first(tmp_path, monkeypatch, capsys):
  """And a chat template without a default, which transformers cannot render, is only said not to be
  what was trained."""
  source = source_of(tmp_path / 'in')
  model = loading.load(f'hf:{source}', 'lm', 'chat')
  monkeypatch.setattr(loading, 'load', lambda name: model)
  command.main(['--model=x', f'--out={tmp_path / "chat"}'])
  assert json.loads((tmp_path / 'chat' / 'generation_config.json').read_text())['eos_token_id'] == [
    2,
    0,
  ]
  assert 'note' not in capsys.readouterr().out
  model.tokenizer.chat_template = {'rag': golden.CHATML, 'tool_use': golden.CHATML}
  command.main(['--model=x', f'--out={tmp_path / "several"}'])
  assert (
    "note: the tokenizer's chat template is not how this model was trained"
    in capsys.readouterr().out
  )
