"""Two real models against transformers: the same log-probabilities, and the same greedy
continuation over 64 tokens.

stories260K (karpathy, llama2.c): ALIGNJAX_MODELS/stories260k/stories260K.bin, default
../shared/models. SmolLM2-135M-Instruct: its Hugging Face folder in ALIGNJAX_SMOLLM2. What is not
there is skipped.
"""

import json
import os
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from alignjax.models import hf, transformer
from alignjax.models.config import TransformerConfig
from alignjax.sampling import generate
from alignjax.sharding import Sharder, make_mesh

torch = pytest.importorskip('torch', reason='pip install torch (the parity extra)')
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings('ignore')]
MODELS = pathlib.Path(
  os.environ.get('ALIGNJAX_MODELS', pathlib.Path(__file__).parents[2] / 'shared' / 'models')
)


def stories(folder: pathlib.Path) -> pathlib.Path:
  """llama2.c's version-0 file (seven int32, then float32 arrays) as a Hugging Face folder; its
  rotary pairs are neighbours."""
  raw = (MODELS / 'stories260k' / 'stories260K.bin').read_bytes()
  dim, hidden, layers, heads, kv, vocab, length = np.frombuffer(raw, np.int32, 7).tolist()
  rest, at, width = np.frombuffer(raw, np.float32, offset=28), 0, dim // heads

  def take(*shape):
    nonlocal at
    at += int(np.prod(shape))
    return rest[at - int(np.prod(shape)) : at].reshape(shape)

  halves = lambda w, n: w.reshape(n, width // 2, 2, dim).swapaxes(1, 2).reshape(n * width, dim)
  t = {'model.embed_tokens.weight': take(vocab, dim)}
  stacks = [
    ('input_layernorm', (dim,)),
    ('self_attn.q_proj', (dim, dim)),
    ('self_attn.k_proj', (kv * width, dim)),
    ('self_attn.v_proj', (kv * width, dim)),
    ('self_attn.o_proj', (dim, dim)),
    ('post_attention_layernorm', (dim,)),
    ('mlp.gate_proj', (hidden, dim)),
    ('mlp.down_proj', (dim, hidden)),
    ('mlp.up_proj', (hidden, dim)),
  ]
  for name, shape in stacks:
    for i, w in enumerate(take(layers, *shape)):
      t[f'model.layers.{i}.{name}.weight'] = (
        halves(w, w.shape[0] // width) if name[-6:] in ('q_proj', 'k_proj') else w
      )
  t['model.norm.weight'] = take(dim)
  save_file(
    {k: np.ascontiguousarray(v) for k, v in t.items()},
    folder / 'model.safetensors',
    metadata={'format': 'pt'},
  )
  (folder / 'config.json').write_text(
    json.dumps(
      dict(
        architectures=['LlamaForCausalLM'],
        model_type='llama',
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=abs(vocab),
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        hidden_act='silu',
        bos_token_id=1,
        eos_token_id=2,
      )
    )
  )
  return folder


@pytest.fixture(scope='module', params=['stories260k', 'smollm2'])
def folder(request, tmp_path_factory):
  if request.param == 'smollm2':
    if 'ALIGNJAX_SMOLLM2' not in os.environ:
      pytest.skip('set ALIGNJAX_SMOLLM2 to a Hugging Face folder of SmolLM2-135M-Instruct')
    return pathlib.Path(os.environ['ALIGNJAX_SMOLLM2'])
  if not (MODELS / 'stories260k').exists():
    pytest.skip(f'no stories260k under {MODELS}: set ALIGNJAX_MODELS')
  return stories(tmp_path_factory.mktemp('stories'))


def test_real_models_say_the_same(folder):
  import transformers

  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  cfg = TransformerConfig(**hf.fields(folder))
  params = hf.load(folder, cfg, 'lm', Sharder(make_mesh(devices=jax.devices()[:1])).params)
  nets = transformer.make_networks(cfg)
  if (folder / 'tokenizer.json').exists():
    from alignjax.data import templates
    from alignjax.setup.texts import load_tokenizer

    prompt = templates.make(load_tokenizer(str(folder)), 'chat').prompt(
      'Write a short story about a lighthouse.'
    )
  else:
    prompt = [1, 403, 407, 261, 378]  # "Once upon a time"
  x = np.array([prompt], np.int32)
  run = jax.jit(
    lambda p: generate(
      nets.decoder, p, x, x >= 0, jax.random.key(0), max_tokens=64, stop_ids=(), temperature=0
    )
  )
  ours = np.asarray(run(params).responses)[0]
  with torch.no_grad():
    said = theirs.generate(
      torch.tensor(x, dtype=torch.long),
      max_new_tokens=64,
      min_new_tokens=64,
      do_sample=False,
      attention_mask=torch.ones(x.shape, dtype=torch.long),
      pad_token_id=0,
    )[0, len(prompt) :].numpy()
  # min_new_tokens forbids the end token there; compare up to it
  if folder.joinpath('tokenizer.json').exists():
    end = next((i for i, (a, b) in enumerate(zip(ours, said, strict=True)) if a != b), 64)
    assert end == 64 or ours[end] == theirs.generation_config.eos_token_id
    said = said[:end]
    ours = ours[:end]
  assert ours.tolist() == said.tolist()
  assert len(ours) == 64 or len(ours) > 16
  whole = np.concatenate([x[0], ours])[None]
  with torch.no_grad():
    logprobs = torch.log_softmax(
      theirs(torch.tensor(whole, dtype=torch.long)).logits.double(), -1
    ).numpy()
  expected = np.take_along_axis(logprobs[0, :-1], whole[0, 1:, None], -1)[:, 0]
  out = np.asarray(nets.logprobs(params, whole, whole >= 0)[0])[0, 1:]
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
