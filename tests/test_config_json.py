"""config.json and safetensors headers: the defaults are those of transformers' config classes, and
whatever else stands there is read as they read it or refused by name. Inputs are made by
generation: ALIGNJAX_EXAMPLES=2000 for a long run.
"""

import json
import math
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import tempfile

import jax
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignjax.models import config_json, hf
from alignjax.models.config import TransformerConfig
from alignjax.sharding import Sharder, make_mesh

GOLDEN = pathlib.Path(__file__).parent / 'golden'
ONE = Sharder(make_mesh(devices=jax.devices()[:1]))
KINDS = (
  'gpt2',
  'gpt_neox',
  'llama',
  'mistral',
  'qwen2',
  'qwen3',
  'olmo2',
  'phi3',
  'gemma',
  'gemma2',
  'gemma3_text',
)
LLAMA3 = dict(
  rope_type='llama3',
  rope_theta=500.0,
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8,
)
ENTRIES = sorted(
  {
    'model_type',
    'architectures',
    'vocab_size',
    'n_embd',
    'n_layer',
    'n_head',
    'n_positions',
    'n_inner',
    'layer_norm_epsilon',
    'activation_function',
    'scale_attn_weights',
    'scale_attn_by_inverse_layer_idx',
    'add_cross_attention',
    'hidden_size',
    'num_hidden_layers',
    'num_attention_heads',
    'num_key_value_heads',
    'max_position_embeddings',
    'intermediate_size',
    'head_dim',
    'hidden_act',
    'rms_norm_eps',
    'layer_norm_eps',
    'attention_bias',
    'mlp_bias',
    'tie_word_embeddings',
    'rope_theta',
    'rotary_emb_base',
    'rotary_pct',
    'partial_rotary_factor',
    'rope_scaling',
    'rope_parameters',
    'use_parallel_residual',
    'sliding_window',
    'use_sliding_window',
    'max_window_layers',
    'layer_types',
    'is_causal',
    'quantization_config',
    'dtype',
    'sliding_window_pattern',
    'query_pre_attn_scalar',
    'attn_logit_softcapping',
    'final_logit_softcapping',
    'hidden_activation',
    'use_bidirectional_attention',
    'rope_local_base_freq',
    'original_max_position_embeddings',
  }
)
examples = settings(
  max_examples=int(os.environ.get('ALIGNJAX_EXAMPLES', '40')),
  deadline=None,
  database=None,
  derandomize=True,
  suppress_health_check=list(HealthCheck),
)


def whole(kind):
  """A config.json with all entries that the family's class has, of sizes that fit each default."""
  sizes = dict(
    vocab_size=96,
    hidden_size=4096,
    intermediate_size=128,
    num_hidden_layers=30,
    num_attention_heads=32,
    num_key_value_heads=16,
    max_position_embeddings=8192,
    head_dim=64,
    sliding_window=1024,
  )
  if kind == 'gpt2':
    sizes = dict(n_embd=64, n_layer=2, n_head=4, n_positions=256, vocab_size=96, n_inner=32)
  elif kind in ('gpt_neox', 'olmo2', 'phi3'):
    sizes.pop('head_dim')
  return json.loads(json.dumps(transformers.AutoConfig.for_model(kind, **sizes).to_dict()))


def by_transformers(folder):
  """The fields of TransformerConfig by the attributes of transformers' config."""
  c = transformers.AutoConfig.from_pretrained(folder)
  if c.model_type != 'gpt2':
    c.standardize_rope_params()  # as a model does when it is built
  if c.model_type == 'gpt2':
    return dict(
      vocab_size=c.vocab_size,
      num_layers=c.n_layer,
      d_model=c.n_embd,
      num_heads=c.n_head,
      max_length=c.n_positions,
      mlp_width=c.n_inner or 4 * c.n_embd,
      norm_eps=c.layer_norm_epsilon,
      norm='layernorm',
      mlp='gelu',
      positions='learned',
      tie_embeddings=c.tie_word_embeddings,
      qkv_bias=True,
      out_bias=True,
      qk_norm=False,
      kv_heads=c.n_head,
      head_width=c.n_embd // c.n_head,
      parallel_residual=False,
    )
  gemma, of_gemma3 = c.model_type.startswith('gemma'), c.model_type == 'gemma3_text'
  rope = c.rope_parameters['full_attention'] if of_gemma3 else c.rope_parameters
  neox, n = c.model_type == 'gpt_neox', c.num_attention_heads
  types = getattr(c, 'layer_types', None)
  if c.model_type in ('mistral', 'phi3'):
    types = ['sliding_attention'] * c.num_hidden_layers
  window = c.sliding_window if 'sliding_attention' in (types or ()) else None
  capped = c.model_type in ('gemma2', 'gemma3_text')
  scalar = c.query_pre_attn_scalar if capped else None
  bias = getattr(c, 'attention_bias', False) if c.model_type in ('llama', 'qwen3') else False
  llama3 = rope['rope_type'] == 'llama3'
  original = c.max_position_embeddings
  if rope['rope_type'] == 'longrope':
    original = rope['original_max_position_embeddings']
  return dict(
    vocab_size=c.vocab_size,
    num_layers=c.num_hidden_layers,
    d_model=c.hidden_size,
    num_heads=n,
    max_length=min(original, c.max_position_embeddings),
    mlp_width=c.intermediate_size,
    norm_eps=c.layer_norm_eps if neox else c.rms_norm_eps,
    norm='layernorm' if neox else 'rmsnorm1p' if gemma else 'rmsnorm',
    norms=dict(gemma2='both', gemma3_text='both', olmo2='after').get(c.model_type, 'before'),
    mlp='gelu_exact' if neox else 'geglu' if gemma else 'swiglu',
    embedding_scale=c.hidden_size**0.5 if gemma else 1.0,
    query_scale=None if scalar in (None, c.head_dim if gemma else None) else scalar**-0.5,
    attention_cap=c.attn_logit_softcapping if capped else None,
    logits_cap=c.final_logit_softcapping if capped else None,
    window=window,
    windowed=tuple(bool(window) and t == 'sliding_attention' for t in types)
    if types
    else (False,) * c.num_hidden_layers,
    window_rope_theta=c.rope_parameters['sliding_attention']['rope_theta']
    if of_gemma3 and window
    else None,
    positions='rotary',
    tie_embeddings=c.tie_word_embeddings,
    qkv_bias=neox or c.model_type == 'qwen2' or bias,
    out_bias=neox or bias,
    qk_norm=dict(qwen3=True, gemma3_text=True, olmo2='all').get(c.model_type, False),
    kv_heads=n if neox else c.num_key_value_heads,
    head_width=getattr(c, 'head_dim', None) or c.hidden_size // n,
    parallel_residual=neox and c.use_parallel_residual,
    rope_theta=rope['rope_theta'],
    rotary_fraction=rope.get('partial_rotary_factor', 1.0),
    rope_llama3=(
      rope['factor'],
      rope['low_freq_factor'],
      rope['high_freq_factor'],
      rope['original_max_position_embeddings'],
    )
    if llama3
    else None,
    rope_scaling=stretched(c, rope),
  )


def stretched(c, rope):
  """rope_scaling of a config, with transformers' own defaults for what yarn leaves out."""
  kind = rope['rope_type']
  if kind == 'linear':
    return kind, rope['factor']
  if kind not in ('yarn', 'longrope'):
    return None
  original = rope['original_max_position_embeddings']
  if kind == 'longrope':
    factor = rope.get('factor') or c.max_position_embeddings / original
    magnitude = rope.get('attention_factor') or math.sqrt(1 + math.log(factor) / math.log(original))
    return kind, tuple(rope['short_factor']), tuple(rope['long_factor']), original, magnitude
  factor = rope['factor'] or c.max_position_embeddings / original
  magnitude = rope.get('attention_factor') or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
  turns = rope.get('beta_fast') or 32, rope.get('beta_slow') or 1
  return kind, factor, original, *turns, rope.get('truncate', True), magnitude


def check(folder, either=False):
  """Refused with the file's name, or the same as transformers. Returns the message or None.

  either: transformers may refuse what counts for nothing here, such as layer_types of GPT-2 that is
    no list.
  """
  try:
    hf.fields(folder)  # and the files, which may hold a head of their own
    cfg = TransformerConfig(**config_json.declared(folder).fields)
  except (ValueError, FileNotFoundError) as error:
    assert str(folder) in str(error) and len(str(error)) < 1000, error
    return str(error)
  try:
    expected = by_transformers(folder)
  except Exception:  # noqa: BLE001 whatever its checks raise
    assert either
    return None
  assert {k: getattr(cfg, k) for k in expected} == expected
  return None


@pytest.mark.parametrize('kind', KINDS)
def test_a_missing_entry_has_the_default_of_transformers(kind, tmp_path):
  """One at a time: the same value, or the entry's name in an error where we want it said."""
  c = whole(kind)
  said = []
  for entry in [None, *c]:
    (tmp_path / 'config.json').write_text(json.dumps({k: v for k, v in c.items() if k != entry}))
    message = check(tmp_path)
    if message is not None:
      assert f'the entry {entry!r} is missing' in message or entry == 'model_type', message
      said.append(entry)
  sizes = (
    {'n_embd', 'n_layer', 'n_head', 'n_positions'}
    if kind == 'gpt2'
    else {
      'hidden_size',
      'num_hidden_layers',
      'num_attention_heads',
      'max_position_embeddings',
      'intermediate_size',
    }
  )
  assert set(said) == {'model_type', 'vocab_size', *sizes}


CHANGES = [
  (
    'llama',
    dict(
      rope_scaling=dict(type='llama3', factor=8, low_freq_factor=1, high_freq_factor=4),
      rope_theta=7e5,
    ),
    False,
  ),
  (
    'llama',
    dict(
      rope_scaling={'rope_type': 'default', 'rope_theta': 5.0}, rope_parameters={'rope_theta': 6.0}
    ),
    False,
  ),
  ('llama', dict(rope_scaling={}, rope_parameters={'rope_theta': 6.0}), False),
  ('llama', dict(rope_parameters=LLAMA3, original_max_position_embeddings=16), False),
  ('llama', dict(rope_parameters=None, rope_theta=6.0), False),
  ('llama', dict(rope_parameters=dict(rope_type='linear', factor=2)), False),
  ('llama', dict(rope_parameters=dict(rope_type='dynamic', factor=2.5)), False),
  ('qwen2', dict(rope_scaling=dict(type='yarn', factor=4.0, beta_fast=16)), False),
  (
    'qwen3',
    dict(
      rope_parameters=dict(
        rope_type='yarn', factor=None, attention_factor=0.5, rope_theta=1e6, truncate=False
      ),
      original_max_position_embeddings=16,
    ),
    False,
  ),
  ('llama', dict(rope_parameters=dict(rope_type='yarn')), True),
  ('llama', dict(rope_parameters=dict(rope_type='yarn', factor=4, rope_theta=1)), True),
  ('llama', dict(rope_parameters=dict(rope_type='longrope', short_factor=[1])), True),
  ('llama', dict(rope_parameters=dict(rope_type='ntk', factor=4)), True),
  ('llama', dict(num_key_value_heads=None, head_dim=None), False),
  ('llama', dict(sliding_window=8, use_sliding_window=True), False),
  ('llama', dict(attention_bias=True, mlp_bias=True), False),
  ('llama', dict(partial_rotary_factor=0.5), True),
  ('mistral', dict(sliding_window=None), False),
  ('mistral', dict(use_sliding_window=False), False),
  ('mistral', dict(attention_bias=True), True),
  ('qwen2', dict(use_sliding_window=True, sliding_window=99, layer_types=None), False),
  (
    'qwen2',
    dict(use_sliding_window=True, sliding_window=99, layer_types=None, max_window_layers=30),
    False,
  ),
  (
    'qwen2',
    dict(use_sliding_window=True, layer_types=None, max_window_layers=0, sliding_window=None),
    False,
  ),
  (
    'qwen2',
    dict(
      use_sliding_window=True,
      sliding_window=99,
      layer_types=['full_attention'] * 29 + ['sliding_attention'],
    ),
    False,
  ),
  (
    'qwen2',
    dict(use_sliding_window=False, layer_types=['full_attention'] * 29 + ['sliding_attention']),
    True,
  ),
  ('qwen2', dict(layer_types=['full_attention'] * 29), True),
  ('qwen3', dict(layer_types=['full_attention'] * 29 + ['linear_attention']), True),
  ('qwen3', dict(head_dim=None), True),
  ('qwen3', dict(attention_bias=True), True),
  (
    'gpt_neox',
    dict(rope_parameters=None, rotary_emb_base=500, rotary_pct=0.5, rope_theta=7.0),
    False,
  ),
  ('olmo2', dict(attention_bias=True), True),
  ('olmo2', dict(num_key_value_heads=None), False),
  ('phi3', dict(sliding_window=None), False),
  ('phi3', dict(rope_parameters=dict(rope_type='linear', factor=2.0)), True),
  (
    'phi3',
    dict(
      rope_scaling=dict(type='longrope', short_factor=[1.5] * 48, long_factor=[2.5] * 48),
      partial_rotary_factor=0.75,
      original_max_position_embeddings=2048,
    ),
    False,
  ),
  ('gemma', dict(hidden_act='gelu'), False),
  ('gemma', dict(hidden_act='silu'), True),
  ('gemma', dict(tie_word_embeddings=False), False),
  ('gemma2', dict(layer_types=None, query_pre_attn_scalar=64), False),
  ('gemma2', dict(attn_logit_softcapping=None, final_logit_softcapping=None), False),
  ('gemma2', dict(sliding_window=None), True),
  ('gemma2', dict(layer_types=['full_attention'] * 30, sliding_window=None), False),
  ('gemma2', dict(use_bidirectional_attention=True), True),
  ('gemma2', dict(hidden_activation='gelu'), True),
  (
    'gemma3_text',  # as the files of the first release
    dict(
      rope_parameters=None,
      rope_theta=5e5,
      rope_local_base_freq=2e4,
      rope_scaling=dict(rope_type='linear', factor=8.0),
      layer_types=None,
      sliding_window_pattern=4,
    ),
    False,
  ),
  ('gemma3_text', dict(rope_parameters=None), False),
  ('gemma3_text', dict(rope_parameters=dict(full_attention=dict(rope_theta=7e5))), False),
  ('gemma3_text', dict(rope_parameters=dict(rope_type='default', rope_theta=5.0)), True),
  (
    'gemma3_text',
    dict(rope_parameters=dict(sliding_attention=dict(rope_type='linear', factor=2.0))),
    True,
  ),
  ('gpt_neox', dict(head_dim=32), True),
  ('gpt2', dict(n_head=4, num_attention_heads=8), True),
  ('gpt2', dict(n_head=4, num_attention_heads=4), False),
  ('gpt2', dict(reorder_and_upcast_attn=True), False),
  ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), True),
]


@pytest.mark.parametrize('kind, changes, refused', CHANGES)
def test_entries_mean_what_they_mean_to_transformers(kind, changes, refused, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(whole(kind) | changes))
  message = check(tmp_path)
  assert (message is not None) == refused, message
  if refused:
    assert any(name in message for name in changes), message


VALUES = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-3, 40),
  st.integers(),
  st.floats(),
  st.text(max_size=6),
  st.sampled_from(['16', 'silu', 'gelu', 'full_attention', 'bfloat16', 10**30, -(10**30)]),
  st.lists(
    st.one_of(st.integers(0, 3), st.sampled_from(['full_attention', 'sliding_attention'])),
    max_size=3,
  ),
  st.dictionaries(
    st.sampled_from(
      ['rope_type', 'type', 'rope_theta', 'factor', 'partial_rotary_factor', 'low_freq_factor']
    ),
    st.one_of(
      st.none(),
      st.floats(),
      st.integers(),
      st.sampled_from(['default', 'llama3', 'yarn', 'linear', 'dynamic', 'longrope']),
    ),
    max_size=4,
  ),
)


def ends_well(folder):
  """The checkpoint is read to finite parameters of its config's shapes, or refused in words."""
  if check(folder, either=True) is None:
    try:
      hf.load(folder, TransformerConfig(**hf.fields(folder)), 'lm', ONE.params)
    except (ValueError, FileNotFoundError) as error:
      assert str(folder) in str(error) and len(str(error)) < 1000, error


@examples
@given(
  st.sampled_from(KINDS),
  st.dictionaries(
    st.sampled_from(ENTRIES), st.one_of(st.just('DELETE'), VALUES), min_size=1, max_size=3
  ),
)
def test_any_config_is_read_as_by_transformers_or_refused(kind, changes):
  with tempfile.TemporaryDirectory() as folder:
    golden = GOLDEN / kind.removesuffix('_text')
    c = json.loads((golden / 'config.json').read_text()) | changes
    shutil.copy(golden / 'model.safetensors', folder)
    pathlib.Path(folder, 'config.json').write_text(
      json.dumps({k: v for k, v in c.items() if v != 'DELETE'})
    )
    ends_well(pathlib.Path(folder))


@examples
@given(st.data())
def test_a_damaged_config_is_read_or_refused(data):
  text = (GOLDEN / 'llama' / 'config.json').read_bytes()
  place = data.draw(st.integers(0, len(text) - 1))
  how = data.draw(st.sampled_from(['cut', 'byte', 'insert']))
  byte = bytes([data.draw(st.integers(0, 255))])
  with tempfile.TemporaryDirectory() as folder:
    shutil.copy(GOLDEN / 'llama' / 'model.safetensors', folder)
    pathlib.Path(folder, 'config.json').write_bytes(
      text[:place] + (b'' if how == 'cut' else byte + text[place + (how == 'byte') :])
    )
    ends_well(pathlib.Path(folder))


HEADERS = st.one_of(
  st.tuples(
    st.just('dtype'),
    st.sampled_from(
      [
        'F64',
        'F16',
        'BF16',
        'I8',
        'I64',
        'BOOL',
        'F8_E4M3',
        'F8_E5M2',
        'F4',
        'C64',
        'U16',
        'X',
        3,
        None,
      ]
    ),
  ),
  st.tuples(
    st.just('shape'),
    st.one_of(
      st.lists(st.integers(-2, 20), max_size=4), st.lists(st.integers(), max_size=3), st.just('16')
    ),
  ),
  st.tuples(
    st.just('data_offsets'),
    st.one_of(
      st.lists(st.integers(-2, 30000), max_size=3), st.lists(st.integers(), max_size=2), st.none()
    ),
  ),
  st.tuples(st.sampled_from(['drop', 'rename', 'other']), st.text(max_size=5)),
)


@examples
@given(st.lists(st.tuples(st.integers(0, 20), HEADERS), min_size=1, max_size=2), st.booleans())
def test_any_header_of_safetensors_is_read_or_refused(changes, index):
  """Entries of the header changed; half of them behind an index."""
  raw = (GOLDEN / 'llama' / 'model.safetensors').read_bytes()
  size = struct.unpack('<Q', raw[:8])[0]
  header = json.loads(raw[8 : 8 + size])
  names = sorted(n for n in header if n != '__metadata__')
  for place, (entry, value) in changes:
    name = names[place % len(names)]
    if name not in header:
      continue
    if entry == 'drop':
      header.pop(name)
    elif entry == 'rename':
      header[value] = header.pop(name)
    else:
      header[name][entry] = value
  new = json.dumps(header).encode()
  with tempfile.TemporaryDirectory() as folder:
    shutil.copy(GOLDEN / 'llama' / 'config.json', folder)
    file = 'model-00001-of-00001.safetensors' if index else 'model.safetensors'
    pathlib.Path(folder, file).write_bytes(struct.pack('<Q', len(new)) + new + raw[8 + size :])
    if index:
      pathlib.Path(folder, hf.INDEX).write_text(
        json.dumps({'metadata': {}, 'weight_map': dict.fromkeys(names, file)})
      )
    ends_well(pathlib.Path(folder))


@examples
@given(st.data())
def test_a_damaged_file_of_tensors_is_read_or_refused(data):
  """Cut, or a byte changed in the length, the header or the numbers: the last is silent by nature
  without SHA256SUMS."""
  raw = (GOLDEN / 'llama' / 'model.safetensors').read_bytes()
  size = struct.unpack('<Q', raw[:8])[0]
  place = data.draw(
    st.one_of(st.integers(0, 7), st.integers(8, 8 + size), st.integers(0, len(raw) - 1))
  )
  byte = data.draw(st.integers(0, 255))
  new = raw[:place] + (b'' if data.draw(st.booleans()) else bytes([byte]) + raw[place + 1 :])
  with tempfile.TemporaryDirectory() as folder:
    shutil.copy(GOLDEN / 'llama' / 'config.json', folder)
    pathlib.Path(folder, 'model.safetensors').write_bytes(new)
    ends_well(pathlib.Path(folder))


def test_names_are_read_or_refused_in_words(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  fail = lambda message: (_ for _ in ()).throw(OSError(message))
  monkeypatch.setattr(
    'huggingface_hub.HfApi.model_info', lambda self, name, timeout: fail(f'no way to {name}')
  )
  monkeypatch.setattr(
    'huggingface_hub.snapshot_download',
    lambda name, local_files_only, **kw: fail('not in the cache'),
  )
  shutil.copytree(GOLDEN / 'llama', tmp_path / 'some' / 'model')
  for name in (
    tmp_path / 'some' / 'model',
    'some/model',
    'some/model/',
    './some/model',
    '~/some/model',
    '~/some/model/',
    'some//model',
  ):
    assert hf.fields(name)['d_model'] == 16
  absent = f'no such folder .*{tmp_path}'
  for name, words in (
    (f'{tmp_path}/some/modle', absent),
    ('./some/modle', absent),
    ('some/model/deeper', absent),
    ('../x', absent),
    ('~/modle', absent),
    ('~nobody-of-this-name/x', 'no such folder'),
    ('', 'names no checkpoint'),
    (' ', 'names no checkpoint'),
    ('some/model/config.json', 'is a file; name the folder'),
    (
      'org/model',
      f"no folder {tmp_path}/org/model, and no model 'org/model' is to be had from .*no way",
    ),
    ('org/model/', "no model 'org/model' is to be had"),
    ('model', "no model 'model' is to be had"),
    ('a b/c', absent),
    ('a\0b', 'no such folder'),
    ('org/model@v1', absent),
  ):
    with pytest.raises(FileNotFoundError, match=words):
      hf.fields(name)


@pytest.mark.parametrize('silent', [True, False])
def test_a_hub_that_cannot_be_reached_is_an_error(silent, tmp_path):
  """Nobody listens, or somebody who never answers: this hung without end."""
  code = (
    'from alignjax.models import hf, hub\nhub.HUB_SECONDS = 1\n'
    'try: hf.fields("org/model")\n'
    'except FileNotFoundError as error: print(error)'
  )
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    if silent:
      listener.listen()
    done = subprocess.run(
      [sys.executable, '-c', code],
      capture_output=True,
      text=True,
      timeout=300,
      cwd=tmp_path,
      env={
        **os.environ,
        'HF_ENDPOINT': f'http://127.0.0.1:{listener.getsockname()[1]}',
        'HF_HOME': str(tmp_path),
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': str(pathlib.Path(__file__).parent.parent),
      },
    )
  assert "no model 'org/model' is to be had from the hub" in done.stdout, done.stderr[-2000:]


def test_score_bias_is_a_number(tmp_path):
  for value, right in (
    (0.5, True),
    (2, True),
    ('0.5', False),
    (None, False),
    (True, False),
    (10**400, False),
  ):
    (tmp_path / 'config.json').write_text(json.dumps({'alignjax_score_bias': value}))
    if right:
      assert config_json.score_bias(tmp_path) == value
    else:
      with pytest.raises(ValueError, match='alignjax_score_bias=.* is not a number'):
        config_json.score_bias(tmp_path)
