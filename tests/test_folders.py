"""Checkpoint folders of many shapes: the logits are those of transformers on the same folder, or
the folder is refused by name."""

import functools
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignjax.models import hf, transformer
from alignjax.models.config import TransformerConfig
from alignjax.sharding import Sharder, make_mesh

torch = pytest.importorskip('torch', reason='pip install torch (the parity extra)')
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings('ignore')]

GOLDEN = pathlib.Path(__file__).parent / 'golden'
ONE = Sharder(make_mesh(devices=jax.devices()[:1]))
ROWS = np.array([[7, 30, 59, 20, 5, 60, 1]], np.int32)
FAMILY = dict(
  gpt2=('transformer.', 'transformer.wte.weight', 'lm_head.weight'),
  gpt_neox=('gpt_neox.', 'gpt_neox.embed_in.weight', 'embed_out.weight'),
  llama=('model.', 'model.embed_tokens.weight', 'lm_head.weight'),
)


@functools.cache
def compiled(cfg):
  return jax.jit(lambda params: transformer.make_networks(cfg).logits(params, ROWS, ROWS >= 0))


def ours(folder):
  cfg = TransformerConfig(**hf.fields(folder))
  return np.asarray(compiled(cfg)(hf.load(folder, cfg, 'lm', ONE.params)))


def theirs(folder):
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype='float32').eval()
  with torch.no_grad():
    return model(torch.tensor(ROWS, dtype=torch.long)).logits.numpy()


def start(folder, family='llama', **config):
  """(config.json, tensors) of a golden checkpoint; config.json is written with the changes, None:
  without the entry."""
  folder.mkdir(exist_ok=True)
  c = json.loads((GOLDEN / family / 'config.json').read_text()) | config
  (folder / 'config.json').write_text(json.dumps({k: v for k, v in c.items() if v is not None}))
  return load_file(GOLDEN / family / 'model.safetensors')


def other(tensors):
  """The same tensors of another time."""
  return {k: v + np.float32(0.01) * (v + 1) for k, v in tensors.items()}


def shards(folder, tensors, twice=(), metadata=True, extra=None):
  names = sorted(tensors)
  parts = {
    'model-00001-of-00002.safetensors': names[:9],
    'model-00002-of-00002.safetensors': names[9:],
  }
  for file, some in parts.items():
    save_file({n: tensors[n] for n in [*some, *twice]}, folder / file)
  where = {n: f for f, some in parts.items() for n in some} | (extra or {})
  (folder / 'model.safetensors.index.json').write_text(
    json.dumps({'weight_map': where} | ({'metadata': {'total_size': 1}} if metadata else {}))
  )


def single(folder, tensors, name='model.safetensors'):
  save_file(tensors, folder / name)


def files(kind):
  def make(folder):
    new = start(folder)
    old = other(new)
    if kind == 'single':
      single(folder, new)
    elif kind == 'index':
      shards(folder, new)
    elif kind == 'index, a shard of an earlier time beyond it':
      shards(folder, new)
      single(folder, old, 'model-00003-of-00003.safetensors')
    elif kind == 'index, an average beside':
      shards(folder, new)
      single(folder, old, 'ema.safetensors')
    elif kind == 'single, stale index':
      shards(folder, old)
      single(folder, new)
    elif kind == 'single, stale index of files that are gone':
      shards(folder, old)
      for path in folder.glob('model-*'):
        path.unlink()
      single(folder, new)
    elif kind == 'single, broken index':
      (folder / 'model.safetensors.index.json').write_text('{')
      single(folder, new)
    elif kind in ('a_backup', 'model_before', 'zz', 'model.fp16', 'adapter_model', 'optimizer'):
      single(folder, new)
      single(folder, old, f'{kind}.safetensors')
    elif kind == 'single, vendor names beside':
      single(folder, new)
      single(
        folder, {'layers.0.attention.wq.weight': new['lm_head.weight']}, 'consolidated.safetensors'
      )
    elif kind == 'single, pickle beside':
      single(folder, new)
      (folder / 'pytorch_model.bin').write_bytes(b'no pickle')
    elif kind == 'single, a folder below':
      (folder / 'original').mkdir()
      single(folder, new)
      single(folder, old, 'original/model.safetensors')
    elif kind == 'index into a folder below':
      (folder / 'weights').mkdir()
      single(folder, new, 'weights/all.safetensors')
      (folder / 'model.safetensors.index.json').write_text(
        json.dumps({'metadata': {}, 'weight_map': dict.fromkeys(new, 'weights/all.safetensors')})
      )
    elif kind == 'index names too few tensors':
      shards(folder, new)
      index = json.loads((folder / 'model.safetensors.index.json').read_text())
      index['weight_map'].pop('model.norm.weight')
      (folder / 'model.safetensors.index.json').write_text(json.dumps(index))

  return make


def refused_files(kind):
  def make(folder):
    new = start(folder)
    if kind == 'one tensor in two shards':
      shards(folder, new, twice=['model.norm.weight'])
    elif kind == 'index names a file that is missing':
      shards(folder, new, extra={'model.norm.weight': 'model-00003-of-00002.safetensors'})
    elif kind == 'index names a tensor that is in no shard':
      shards(
        folder,
        {k: v for k, v in new.items() if k != 'model.norm.weight'},
        extra={'model.norm.weight': 'model-00002-of-00002.safetensors'},
      )
    elif kind == 'shards without an index':
      shards(folder, new)
      (folder / 'model.safetensors.index.json').unlink()
    elif kind == 'a variant alone':
      single(folder, new, 'model.fp16.safetensors')
    elif kind == 'an adapter alone':
      single(folder, new, 'adapter_model.safetensors')
    elif kind == 'score':
      single(folder, new | {'score.weight': np.ones((1, 16), np.float32)})
    elif kind == 'int8':
      single(folder, new | {'model.norm.weight': np.ones(16, np.int8)})
    elif kind == 'float8':
      single(folder, new | {'model.norm.weight': np.ones(16, ml_dtypes.float8_e4m3fn)})
    elif kind == 'vocabulary of another size':
      single(folder, start(folder, vocab_size=64))
    elif kind == 'head of another size':
      single(folder, new | {'lm_head.weight': np.zeros((64, 16), np.float32)})

  return make


def head(family, tied, has):
  """The flag true, false or absent; the file's head missing, equal to the embedding, or another."""

  def make(folder):
    prefix, embedding, name = FAMILY[family]
    tensors = start(folder, family, tie_word_embeddings=tied)
    table = tensors[embedding]
    alone = has.startswith('lm_head')
    tensors.pop(name, None)
    if has != 'none':
      same = 'same' in has
      tensors['lm_head.weight' if alone else name] = (
        table.copy() if same else other({name: table})[name]
      )
    if 'only' in has:
      tensors.pop(embedding)
    single(folder, tensors)

  return make


def dtypes(kind):
  def make(folder):
    tensors = start(folder, dtype='bfloat16' if kind == 'float32' else 'float32')
    cast = {
      'float32': np.float32,
      'float16': np.float16,
      'bfloat16': ml_dtypes.bfloat16,
      'float64': np.float64,
    }
    mixed = lambda i: list(cast.values())[i % 4]
    single(
      folder,
      {
        k: v.astype(mixed(i) if kind == 'mixed' else cast[kind])
        for i, (k, v) in enumerate(sorted(tensors.items()))
      },
    )

  return make


def prefix(family, kind):
  def make(folder):
    begin = FAMILY[family][0]
    tensors = start(folder, family)
    single(
      folder,
      {
        k.removeprefix(begin) if kind == 'none' or i % 2 else k: v
        for i, (k, v) in enumerate(sorted(tensors.items()))
      },
    )

  return make


def padded(folder):
  tensors = start(folder, vocab_size=80)
  more = lambda x: np.concatenate([x, np.ones((19, 16), np.float32)])
  single(folder, {k: more(v) if v.shape[0] == 61 else v for k, v in tensors.items()})


READ = {
  kind: files(kind)
  for kind in (
    'single',
    'index',
    'index, a shard of an earlier time beyond it',
    'index, an average beside',
    'single, stale index',
    'single, stale index of files that are gone',
    'single, broken index',
    'a_backup',
    'model_before',
    'zz',
    'model.fp16',
    'adapter_model',
    'optimizer',
    'single, vendor names beside',
    'single, pickle beside',
    'single, a folder below',
    'index into a folder below',
    'index names too few tensors',
  )
}
READ |= {
  f'{family}, tied {tied}, head {has}': head(family, tied, has)
  for family in FAMILY
  for tied in (None, True, False)
  for has in (
    'none',
    'same',
    'other',
    *(['lm_head same', 'lm_head other'] if family == 'gpt_neox' else ['only']),
  )
  if not (has in ('none', 'only') and not (tied or tied is None and family == 'gpt2'))
}
READ |= {kind: dtypes(kind) for kind in ('float32', 'float16', 'bfloat16', 'float64', 'mixed')}
READ |= {
  f'{family}, prefix {kind}': prefix(family, kind)
  for family in FAMILY
  for kind in ('none', 'of some')
}
READ['padded vocabulary'] = padded
REFUSED = {
  kind: refused_files(kind)
  for kind in (
    'one tensor in two shards',
    'index names a file that is missing',
    'index names a tensor that is in no shard',
    'shards without an index',
    'a variant alone',
    'an adapter alone',
    'score',
    'int8',
    'float8',
    'vocabulary of another size',
    'head of another size',
  )
}
REFUSED |= {
  f'{family}, tied {tied}, head {has}': head(family, tied, has)
  for family in FAMILY
  for tied in (None, False)
  for has in ('none', 'only')
  if not (tied is None and family == 'gpt2')
}


@pytest.mark.sampled(20)
@pytest.mark.parametrize('name', READ)
def test_a_folder_is_read_as_transformers_reads_it(name, tmp_path):
  READ[name](tmp_path / 'm')
  expected = theirs(tmp_path / 'm')
  np.testing.assert_allclose(
    ours(tmp_path / 'm'), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
  )


@pytest.mark.parametrize('name', REFUSED)
def test_a_folder_that_transformers_would_fill_up_or_refuse_is_refused_by_name(name, tmp_path):
  REFUSED[name](tmp_path / 'm')
  with pytest.raises((ValueError, FileNotFoundError)) as error:
    ours(tmp_path / 'm')
  assert str(tmp_path / 'm') in str(error.value)


def test_a_classifier_of_two_labels_is_no_reward_model(tmp_path):
  single(tmp_path, start(tmp_path) | {'score.weight': np.ones((2, 16), np.float32)})
  cfg = TransformerConfig(**hf.fields(tmp_path))
  with pytest.raises(ValueError, match=r'score.weight has the shape \[2, 16\].*\[1, 16\]'):
    hf.load(tmp_path, cfg, 'scalar', ONE.params)


def test_the_head_of_a_file_is_not_given_up_for_a_flag(tmp_path):
  """model.tie_embeddings=True over a checkpoint with an own head is an error; it was ignored."""
  folder = tmp_path / 'm'
  head('llama', False, 'other')(folder)
  cfg = TransformerConfig(**hf.fields(folder) | dict(tie_embeddings=True))
  with pytest.raises(ValueError, match='lm_head.weight differs from model.embed_tokens.weight'):
    hf.load(folder, cfg, 'lm', ONE.params)
  hf.load(folder, cfg, 'scalar', ONE.params)


def test_the_scalar_head_takes_the_trunk_of_any_of_them(tmp_path):
  """Tied, untied or with the head alone: the trunk is the same."""
  trees = []
  for i, (tied, has) in enumerate(((True, 'none'), (True, 'other'), (False, 'other'))):
    folder = tmp_path / str(i)
    head('llama', tied, has)(folder)
    cfg = TransformerConfig(**hf.fields(folder))
    trees.append(
      jax.tree.map(np.asarray, hf.load(folder, cfg, 'scalar', ONE.params, jax.random.key(0)))
    )
    shutil.rmtree(folder)
  for tree in trees[1:]:
    jax.tree.map(np.testing.assert_array_equal, trees[0], tree)
