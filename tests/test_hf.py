"""Checkpoints of Hugging Face: golden files of transformers (tests/golden/make.py) without torch,
and what is refused."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignjax.inference import loading
from alignjax.models import config_json, export, families, hf, transformer
from alignjax.models.axes import path_name
from alignjax.models.config import TransformerConfig
from alignjax.sampling import generate
from alignjax.setup import models, texts
from alignjax.sharding import Sharder, make_mesh

GOLDEN = pathlib.Path(__file__).parent / 'golden'
NAMES = sorted(p.parent.name for p in GOLDEN.glob('*/expected.npz'))
ONE = Sharder(make_mesh(devices=jax.devices()[:1]))


def config(folder, **changes):
  return TransformerConfig(**hf.fields(folder) | changes)


def leaves(params):
  return {path_name(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(params)}


def same(a, b):
  a, b = leaves(a), leaves(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.sampled(4)
@pytest.mark.parametrize('name', NAMES)
def test_logits_and_greedy_continuation_equal_those_of_transformers(name):
  cfg = config(GOLDEN / name)
  params = hf.load(GOLDEN / name, cfg, 'lm', ONE.params)
  nets, want = transformer.make_networks(cfg), np.load(GOLDEN / name / 'expected.npz')
  logits = np.asarray(nets.logits(params, want['tokens'].astype(np.int32), want['mask']))
  scale = np.abs(want['logits']).max()
  np.testing.assert_allclose(
    logits[want['mask']], want['logits'][want['mask']], rtol=1e-4, atol=1e-4 * scale
  )
  prefix = want['prefix'].astype(np.int32)
  out = jax.jit(
    lambda p: generate(
      nets.decoder,
      p,
      prefix,
      np.ones_like(prefix, bool),
      jax.random.key(0),
      max_tokens=12,
      stop_ids=(),
      temperature=0,
    )
  )(params)
  assert np.asarray(out.responses).tolist() == want['continuation'].tolist()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('head', ['lm', 'scalar'])
def test_saved_and_loaded_is_the_same(name, head, tmp_path):
  cfg = config(GOLDEN / name)
  params = hf.load(GOLDEN / name, cfg, head, ONE.params, jax.random.key(3))
  report = export.save(tmp_path / 'out', GOLDEN / name, cfg, params, shard_bytes=5000)
  assert (
    report['class'].endswith('ForCausalLM' if head == 'lm' else 'ForSequenceClassification')
    or name == 'gpt2'
  )
  assert len(list((tmp_path / 'out').glob('model-*.safetensors'))) > 1 and not list(
    tmp_path.glob('*.partial')
  )
  same(hf.load(tmp_path / 'out', cfg, head, ONE.params), params)
  if head == 'lm':  # the very tensors of transformers, by name, and bit for bit
    theirs = load_file(GOLDEN / name / 'model.safetensors')
    ours = {k: v for f in (tmp_path / 'out').glob('*.safetensors') for k, v in load_file(f).items()}
    assert ours.keys() == theirs.keys()
    for key in theirs:
      np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'gpt_neox'])
def test_pieces_on_eight_devices_are_the_whole(name):
  """data 2, fsdp 2, tensor 2; GPT-2's 61 tokens do not divide, so its vocabulary stays whole."""
  sharder = Sharder(
    make_mesh(2, 2, 2), dict(embed='fsdp', heads='tensor', kv_heads='tensor', mlp='tensor')
  )
  cfg = config(GOLDEN / name)
  whole = hf.load(GOLDEN / name, cfg, 'lm', ONE.params)
  cut = hf.load(GOLDEN / name, cfg, 'lm', sharder.params)
  same(whole, cut)
  kernel = cut['layers']['mlp']['up']['kernel']
  assert {s.data.shape for s in kernel.addressable_shards} == {(2, 8, kernel.shape[2] // 2)}


def test_low_precision_files_are_read_to_float32(tmp_path):
  cfg = config(GOLDEN / 'llama')
  params = hf.load(GOLDEN / 'llama', cfg, 'lm', ONE.params)
  for dtype in ('bfloat16', 'float16'):
    export.save(tmp_path / dtype, GOLDEN / 'llama', cfg, params, dtype=dtype)
    back = leaves(hf.load(tmp_path / dtype, cfg, 'lm', ONE.params))
    for name, value in leaves(params).items():
      np.testing.assert_array_equal(
        back[name], np.asarray(jax.numpy.asarray(value).astype(dtype), np.float32)
      )


def test_a_reward_models_bias_is_folded_or_kept(tmp_path):
  """GPT-2's last LayerNorm takes it (the scores stay); RMSNorm cannot, so there is a choice:
  config.json, or left out."""
  tokens = np.arange(10, dtype=np.int32)[None]
  for name, folded in (('gpt2', True), ('llama', False)):
    cfg = config(GOLDEN / name)
    params = hf.load(GOLDEN / name, cfg, 'scalar', ONE.params, jax.random.key(1))
    params['final']['score']['bias'] += 0.7
    if not folded:
      with pytest.raises(ValueError, match=r'the bias 0\.7, for which .*--bias=drop .*--bias=keep'):
        export.save(tmp_path / name, GOLDEN / name, cfg, params)
      assert not (tmp_path / name).exists()
      export.save(tmp_path / 'dropped', GOLDEN / name, cfg, params, bias='drop')
    report = export.save(tmp_path / name, GOLDEN / name, cfg, params, bias='keep')
    written = json.loads((tmp_path / name / 'config.json').read_text())
    assert ('folded' in report['bias']) == folded and (
      written.get('alignjax_score_bias') is None
    ) == folded
    score = lambda p: transformer.make_networks(cfg).scalar(p, tokens, tokens >= 0)  # noqa: B023
    back = hf.load(tmp_path / name, cfg, 'scalar', ONE.params)
    np.testing.assert_allclose(score(back), score(params), rtol=1e-5, atol=1e-5)
    assert (float(back['final']['score']['bias'][0]) == 0.0) == folded
    if not folded:
      dropped = hf.load(tmp_path / 'dropped', cfg, 'scalar', ONE.params)
      np.testing.assert_allclose(score(dropped) + 0.7, score(params), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match='a reward model'):
      hf.load(tmp_path / name, cfg, 'lm', ONE.params)


def test_old_names_and_buffers_are_understood(tmp_path):
  """The hub's gpt2 leaves out the trunk's prefix and carries attention masks."""
  shutil.copy(GOLDEN / 'gpt2' / 'config.json', tmp_path)
  old = {
    k.removeprefix('transformer.'): v
    for k, v in load_file(GOLDEN / 'gpt2' / 'model.safetensors').items()
  }
  old |= {'h.0.attn.bias': np.ones((1, 1, 4, 4), np.float32), 'lm_head.weight': old['wte.weight']}
  save_file(old, tmp_path / 'model.safetensors')
  cfg = config(tmp_path)
  same(hf.load(tmp_path, cfg, 'lm', ONE.params), hf.load(GOLDEN / 'gpt2', cfg, 'lm', ONE.params))


def _tensors(change):
  def edit(folder):
    tensors = load_file(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors')

  return edit


def _config(**changes):
  def edit(folder):
    c = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(
      json.dumps({k: v for k, v in (c | changes).items() if v != 'DELETE'})
    )

  return edit


def _moved(then):
  """The tensors in a file that is neither model.safetensors nor in an index."""

  def edit(folder):
    (folder / 'model.safetensors').rename(folder / 'model-1.safetensors')
    then(folder)

  return edit


def _index(where):
  return _moved(
    lambda folder: (folder / 'model.safetensors.index.json').write_text(
      json.dumps({'weight_map': where})
    )
  )


NORM, QUERY, HEAD = 'model.norm.weight', 'model.layers.1.self_attn.q_proj.weight', 'lm_head.weight'
BROKEN = {
  'no config': (lambda f: (f / 'config.json').unlink(), 'no config.json'),
  'config cut': (
    lambda f: (f / 'config.json').write_text('{"a":\n 1,'),
    r'config.json, line 2: not JSON',
  ),
  'config without a size': (_config(hidden_size='DELETE'), "'hidden_size' is missing"),
  'another family': (
    _config(model_type='t5'),
    "'t5' is not covered; these are: gemma, gemma2, gemma3_text, gpt2, gpt_neox, llama, mistral",
  ),
  'experts': (_config(model_type='mixtral'), "'mixtral' is not covered: a mixture of experts"),
  'no model_type': (_config(model_type='DELETE'), 'None is not covered'),
  'activation': (_config(hidden_act='relu'), "hidden_act='relu' is not covered for llama"),
  'one bias': (_config(attention_bias=True), 'attention_bias=True with mlp_bias=False'),
  'yarn': (
    _config(rope_parameters={'rope_type': 'yarn'}),
    "the entry 'rope_parameters.factor' is missing",
  ),
  'linear rope, old key': (
    _config(rope_parameters='DELETE', rope_scaling={'type': 'linear'}),
    "the entry 'rope_scaling.factor' is missing",
  ),
  'heads': (_config(num_attention_heads=3, head_dim='DELETE'), 'num_heads=3'),
  'kv heads': (_config(num_key_value_heads=3), 'num_kv_heads=3'),
  'no tensors': (
    lambda f: (f / 'model.safetensors').unlink(),
    'no model.safetensors and no model.safetensors.index.json',
  ),
  'pickle': (
    lambda f: (f / 'model.safetensors').rename(f / 'pytorch_model.bin'),
    'is a pickle, which is not read',
  ),
  'cut file': (
    lambda f: (f / 'model.safetensors').write_bytes((f / 'model.safetensors').read_bytes()[:5000]),
    'model.safetensors: not a whole safetensors file',
  ),
  'empty file': (
    lambda f: (f / 'model.safetensors').write_bytes(b''),
    'not a whole safetensors file',
  ),
  'a tensor missing': (
    _tensors(lambda t: t.pop(NORM)),
    "1 tensors are missing, first 'model.norm.weight'",
  ),
  'a tensor too many': (
    _tensors(lambda t: t.update({'model.extra.weight': t[NORM]})),
    "no place.*'model.extra.weight'",
  ),
  'a tensor misshapen': (
    _tensors(lambda t: t.update({QUERY: t[QUERY][:-1]})),
    r'q_proj.weight has the shape \[15, 16\].*\[16, 16\]',
  ),
  'integers': (
    _tensors(lambda t: t.update({NORM: t[NORM].astype(np.int8)})),
    'model.norm.weight is I8; quantised',
  ),
  'a layer too many': (_config(num_hidden_layers=1), 'tensors have no place'),
  'a layer too few': (_config(num_hidden_layers=3), "missing, first 'model.layers.2"),
  'a file of the index missing': (
    _index({NORM: 'model-2.safetensors'}),
    'model-2.safetensors: named in model.safetensors.index.json',
  ),
  'an index of nothing': (_index({}), 'weight_map has to be an object'),
  'an index of numbers': (_index({NORM: 3}), 'weight_map has to be an object'),
  'an index of other folders': (
    _index({NORM: '../model.safetensors'}),
    'no safetensors file of this folder',
  ),
  'an index cut': (
    _moved(lambda f: (f / 'model.safetensors.index.json').write_text('{"weight_map": ')),
    'line 1: not JSON',
  ),
  'shards without an index': (
    _moved(lambda f: None),
    'model-1.safetensors is not read, as in transformers',
  ),
  'an adapter': (
    lambda f: (f / 'adapter_config.json').write_text('{}'),
    "PEFT adapter: the init of a stage reads it as 'peft:/",
  ),
  'an adapter alone': (
    lambda f: (f / 'config.json').rename(f / 'adapter_config.json'),
    "no config.json; .* It is a PEFT adapter: the init of a stage reads it as 'peft:/",
  ),
  'the head twice': (
    _tensors(lambda t: t.update({'embed_out.weight': t['lm_head.weight']})),
    "no place.*'embed_out.weight'",
  ),
  'a name twice': (
    _tensors(lambda t: t.update({'norm.weight': t[NORM]})),
    "'.*norm.weight' is there twice",
  ),
  'no head': (
    _tensors(lambda t: t.pop('lm_head.weight')),
    "first 'lm_head.weight'. .*tie_word_embeddings",
  ),
  'a tied head of another shape': (
    lambda f: (
      _config(tie_word_embeddings=True)(f),
      _tensors(lambda t: t.update({HEAD: t[HEAD][:-1]}))(f),
    ),
    r'lm_head.weight is F32 \[60, 16\], but .*tie_word_embeddings.* is model.embed_tokens.weight, '
    r'F32 \[61, 16\]',
  ),
  'a tied head of integers': (
    lambda f: (
      _config(tie_word_embeddings=True)(f),
      _tensors(lambda t: t.update({HEAD: t[HEAD].astype(np.int8)}))(f),
    ),
    'lm_head.weight is I8',
  ),
  'quantised': (
    _config(quantization_config={'quant_method': 'fp8'}),
    'quantization_config={.* is not covered',
  ),
  'quantised dtype': (_config(dtype='float8_e4m3fn'), "dtype='float8_e4m3fn' is not covered"),
  'another class': (
    _config(architectures=['LlamaBiModel']),
    r"architectures=\['LlamaBiModel'\] is not covered",
  ),
  'not causal': (_config(is_causal=False), 'is_causal=False is not covered'),
  'another file': (
    _config(transformers_weights='other.safetensors'),
    "transformers_weights='other.safetensors' is not covered",
  ),
  'a text for a number': (_config(hidden_size='16'), "hidden_size='16' is not a whole number"),
  'a fraction of a layer': (
    _config(num_hidden_layers=2.0),
    'num_hidden_layers=2.0 is not a whole number',
  ),
  'a negative size': (
    _config(intermediate_size=-24),
    'intermediate_size=-24 is not a whole number from 1',
  ),
  'null': (_config(vocab_size=None), 'vocab_size=None is not a whole number'),
  'a giant': (
    _config(num_hidden_layers=10**9),
    'the files hold 21 tensors, too few for the 1000000000 layers',
  ),
  'a wide giant': (_config(intermediate_size=2**31 - 1), 'asks for .2147483647, 16'),
  'a list': (
    lambda f: (f / 'config.json').write_text('[]'),
    'config.json: a JSON object is expected',
  ),
  'not text': (lambda f: (f / 'config.json').write_bytes(b'\xff{}'), 'config.json: not JSON'),
  'yes': (_config(tie_word_embeddings='yes'), "tie_word_embeddings='yes' is not true or false"),
  'rope by layer type': (
    _config(rope_parameters={'full_attention': {'rope_type': 'default'}}),
    'one flat object',
  ),
  'rope in text': (_config(rope_scaling='linear'), "rope_scaling='linear' is not covered"),
  'windows in llama': (
    _config(layer_types=['sliding_attention'] * 2),
    'layer_types=.* is not covered for llama',
  ),
  'another width': (_config(hidden_size=32, head_dim=4), r'has the shape \[61, 16\].*\[61, 32\]'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_checkpoint_is_named(name, tmp_path):
  breaks, message = BROKEN[name]
  folder = tmp_path / 'checkpoint'
  shutil.copytree(GOLDEN / 'llama', folder)
  breaks(folder)
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    hf.load(folder, config(folder), 'lm', ONE.params)
  assert str(folder) in str(error.value)


def test_no_such_folder():
  with pytest.raises(FileNotFoundError, match='hf:/nowhere/at/all: no such folder'):
    hf.fields('/nowhere/at/all')


def test_a_table_of_positions_bounds_the_context():
  """model.max_length may not exceed a table of positions. Rotary positions go on, and a window does
  not bound them."""
  assert hf.fields(GOLDEN / 'mistral')['max_length'] == 32
  asked = lambda name, length: (
    models.model_config(
      dict(source=f'hf:{GOLDEN / name}', max_length=length), range(61), 'model'
    ).max_length
  )
  assert (
    asked('mistral', 40) == 40
    and asked('mistral', 8) == 8
    and asked('llama', 64) == 64
    and asked('gpt2', 32) == 32
  )
  for name, length, words in (
    ('gpt2', 33, r'model.max_length=33, but .* n_positions=32 in its config.json; its table'),
    ('gpt2', 16, r'model.max_length=16, but .* n_positions=32 .*set it to 32'),
  ):
    with pytest.raises(ValueError, match=words):
      asked(name, length)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
  shutil.copytree(GOLDEN / 'chat', tmp_path, dirs_exist_ok=True)
  tensors = load_file(tmp_path / 'model.safetensors')
  save_file(
    tensors | {'model.embed_tokens.weight': tensors['model.embed_tokens.weight'][:250]},
    tmp_path / 'model.safetensors',
  )
  _config(vocab_size=250)(tmp_path)
  with pytest.raises(ValueError, match='vocab_size=250, but the tokenizer has ids up to 259'):
    loading.load(f'hf:{tmp_path}', 'lm')


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path):
  """Its readers raise what they like, a bare Exception among it."""
  shutil.copytree(GOLDEN / 'chat', tmp_path, dirs_exist_ok=True)
  raw = (tmp_path / 'tokenizer.json').read_bytes()
  for damaged in (b'', raw[:2000], b'{}', b'[1]', b'\xff\xfe'):
    (tmp_path / 'tokenizer.json').write_bytes(damaged)
    with pytest.raises(ValueError, match=f'data.tokenizer=.*{tmp_path}'):
      texts.load_tokenizer(f'hf:{tmp_path}')


def test_every_parameter_of_every_family_has_a_place():
  for name in NAMES:
    cfg = config(GOLDEN / name)
    kind = config_json.declared(GOLDEN / name).kind
    known = {p for t in families.FAMILIES[kind].tensors(cfg) for p in t.paths}
    assert known == set(
      leaves(
        jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))  # noqa: B023
        and hf.load(GOLDEN / name, cfg, 'lm', ONE.params)
      )
    )


@pytest.mark.parametrize('mesh', [(1, 1, 1), (2, 2, 2)])
def test_every_tensor_is_read_once(mesh, monkeypatch):
  """However many devices share it: one pass over the files, one tensor at a time."""
  read, calls = hf.Files.read, []
  monkeypatch.setattr(hf.Files, 'read', lambda self, name: calls.append(name) or read(self, name))
  devices = jax.devices()[: int(np.prod(mesh))]
  sharder = Sharder(
    make_mesh(*mesh, devices=devices),
    dict(embed='fsdp', heads='tensor', kv_heads='tensor', mlp='tensor'),
  )
  hf.load(GOLDEN / 'llama', config(GOLDEN / 'llama'), 'lm', sharder.params)
  assert sorted(calls) == sorted(load_file(GOLDEN / 'llama' / 'model.safetensors'))
