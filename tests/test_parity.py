"""Against transformers and torch: the same weights of small random models give the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import optim
from alignjax.models import export, hf, transformer
from alignjax.models.config import TransformerConfig
from alignjax.sharding import Sharder, make_mesh

torch = pytest.importorskip('torch', reason='pip install torch (the parity extra)')
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings('ignore')]
from golden import make  # noqa: E402 needs torch

SHARDER = Sharder(make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize('seed', [1, 2])
@pytest.mark.parametrize('name', make.MODELS)
def test_item_5_logits_equal_those_of_transformers(name, seed, tmp_path):
  """Beyond the golden files: other weights, other lengths, and back again into transformers."""
  import transformers

  model = make.build(name, seed)
  model.save_pretrained(tmp_path / 'in')
  cfg = TransformerConfig(**hf.fields(tmp_path / 'in'))
  params = hf.load(tmp_path / 'in', cfg, 'lm', SHARDER.params)
  tokens, mask = make.batch(seed)
  expected = make.logits_of(model, tokens, mask)
  out = transformer.make_networks(cfg).logits(params, jnp.asarray(tokens), jnp.asarray(mask))
  np.testing.assert_allclose(
    np.asarray(out)[mask], expected[mask], rtol=1e-4, atol=1e-4 * np.abs(expected).max()
  )
  export.save(tmp_path / 'out', tmp_path / 'in', cfg, params)
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
  np.testing.assert_array_equal(make.logits_of(back, tokens, mask), expected)


STRETCHED = dict(
  linear=dict(rope_type='linear', factor=4.0),
  dynamic=dict(rope_type='dynamic', factor=4.0),
  yarn=dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=8),
  yarn_fine=dict(
    rope_type='yarn',
    factor=2.0,
    original_max_position_embeddings=16,
    beta_fast=2.0,
    beta_slow=0.5,
    mscale=2.0,
    mscale_all_dim=0.5,
    truncate=False,
  ),
  longrope=dict(
    rope_type='longrope',
    original_max_position_embeddings=12,
    short_factor=[1.0, 1.5, 2.0],
    long_factor=[2.0, 3.0, 5.0],
  ),
)


@pytest.mark.parametrize('longer', [False, True])
@pytest.mark.parametrize('name', STRETCHED)
def test_stretched_positions_equal_those_of_transformers(name, longer, tmp_path):
  """Rows within the original context and beyond it, and the export with a longer one still."""
  import transformers

  sizes = make.COMMON | dict(num_key_value_heads=2, head_dim=6)
  table = dict(rope_theta=500.0) | STRETCHED[name]
  torch.manual_seed(3)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**sizes, rope_parameters=table)
  ).eval()
  model.save_pretrained(tmp_path / 'in')
  fields = hf.fields(tmp_path / 'in')
  assert fields['max_length'] == (12 if name == 'longrope' else 32)
  if longer:
    fields['max_length'] = 32 if name == 'dynamic' else 48
  cfg = TransformerConfig(**fields)
  params = hf.load(tmp_path / 'in', cfg, 'lm', SHARDER.params)
  # transformers takes the factors of longrope by the longest row: here all have one length.
  tokens = np.random.default_rng(3).integers(1, make.V, (2, min(cfg.max_length, 32)))
  mask = np.ones(tokens.shape, bool)
  logits = transformer.make_networks(cfg).logits
  expected = make.logits_of(model, tokens, mask)
  out = logits(params, jnp.asarray(tokens), jnp.asarray(mask))
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
  export.save(tmp_path / 'out', tmp_path / 'in', cfg, params)
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
  # The export is the function that was trained, for short rows too, which transformers would read
  # with the short factors of longrope.
  for length in (tokens.shape[1], 8):
    theirs = make.logits_of(back, tokens[:, :length], mask[:, :length])
    ours = logits(params, jnp.asarray(tokens[:, :length]), jnp.asarray(mask[:, :length]))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
  assert back.config.max_position_embeddings == max(32, cfg.max_length)


@pytest.mark.parametrize(
  'name',
  ['gpt2', 'gpt_neox', 'llama', 'qwen2', 'qwen3', 'mistral', 'phi3', 'olmo2', 'gemma2', 'gemma3'],
)
def test_a_reward_model_goes_to_transformers(name, tmp_path):
  """One label; the score of the last token; the bias where the report says it is."""
  import transformers

  make.build(name).save_pretrained(tmp_path / 'in')
  cfg = TransformerConfig(**hf.fields(tmp_path / 'in'))
  params = hf.load(tmp_path / 'in', cfg, 'scalar', SHARDER.params, jax.random.key(5))
  params['final']['score']['bias'] += 0.3
  report = export.save(tmp_path / 'out', tmp_path / 'in', cfg, params, bias='keep')
  model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'out').eval()
  rows = [np.arange(1, n, dtype=np.int32)[None] for n in (4, 9)]
  for row in rows:
    ours = float(transformer.make_networks(cfg).scalar(params, row, row > 0)[0, -1])
    with torch.no_grad():
      theirs = model(input_ids=torch.tensor(row, dtype=torch.long)).logits
    assert theirs.shape == (1, 1)
    bias = 0.0 if 'folded' in report['bias'] else model.config.alignjax_score_bias
    assert float(theirs) + bias == pytest.approx(ours, rel=1e-4, abs=1e-4)


def test_adam_equals_that_of_torch():
  rng = np.random.default_rng(0)
  x = torch.nn.Parameter(torch.zeros(4))
  theirs = torch.optim.Adam([x], lr=0.1, betas=(0.9, 0.95), eps=1e-3)
  tx, params = optim.adam(steps=5, lr=0.1, b2=0.95, eps=1e-3), jnp.zeros(4)
  state = tx.init(params)
  for _ in range(5):
    g = rng.normal(0, 0.01, 4).astype(np.float32)
    x.grad = torch.tensor(g)
    theirs.step()
    updates, state = tx.update(jnp.asarray(g), state, params)
    params = params + updates
  np.testing.assert_allclose(params, x.detach().numpy(), rtol=1e-4)
