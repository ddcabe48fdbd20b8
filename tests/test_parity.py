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


@pytest.mark.parametrize('name', ['gpt2', 'gpt_neox', 'llama', 'qwen2', 'qwen3', 'mistral'])
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
