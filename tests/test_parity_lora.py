"""Adapters against peft: what either writes, the other reads as the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.models import hf, lora, transformer
from alignjax.models import peft as files
from alignjax.models.config import TransformerConfig
from alignjax.models.families import FAMILIES
from alignjax.sharding import Sharder, make_mesh

torch = pytest.importorskip('torch', reason='pip install torch (the parity extra)')
peft = pytest.importorskip('peft', reason='pip install peft (the parity extra)')
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings('ignore')]
from golden import make  # noqa: E402 needs torch

SHARDER = Sharder(make_mesh(devices=jax.devices()[:1]))
NAMES = ('gpt2', 'gpt_neox', 'phi3', 'llama')  # fused in three ways, and not fused


@pytest.fixture(params=NAMES)
def base(request, tmp_path):
  model = make.build(request.param)
  model.save_pretrained(tmp_path / 'base')
  cfg = TransformerConfig(**hf.fields(tmp_path / 'base'))
  params = hf.load(tmp_path / 'base', cfg, 'lm', SHARDER.params)
  return model, FAMILIES[model.config.model_type], cfg, params, tmp_path


def ours(cfg, params, declared, adapters):
  tokens, mask = make.batch(0)
  joined = lora.join(params, jax.tree.map(jnp.asarray, adapters), declared.scale)
  return np.asarray(
    jax.jit(transformer.make_networks(cfg).logits)(joined, jnp.asarray(tokens), jnp.asarray(mask))
  )[mask]


def theirs(model):
  tokens, mask = make.batch(0)
  return make.logits_of(model.eval(), tokens, mask)[mask]


def check(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize('targets', [(), ('query', 'value', 'down')], ids=['all', 'some'])
def test_peft_reads_ours(base, targets):
  model, family, cfg, params, folder = base
  declared = lora.LoRA(rank=2, alpha=3.0, targets=targets)
  shapes = jax.eval_shape(lambda: lora.init(declared, params, jax.random.key(0)))
  rng = np.random.default_rng(1)
  adapters = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
  expected = ours(cfg, params, declared, adapters)
  assert np.abs(expected - theirs(model)).max() > 0.01 * np.abs(expected).max()
  (folder / 'adapters').mkdir()
  files.save(folder / 'adapters', family, cfg, declared, adapters, str(folder / 'base'))
  check(theirs(peft.PeftModel.from_pretrained(model, folder / 'adapters')), expected)
  again, back = files.read(folder / 'adapters', family, cfg)
  check(ours(cfg, params, again, back), expected)


@pytest.mark.parametrize('rslora', [False, True])
def test_we_read_those_of_peft(base, rslora):
  model, family, cfg, params, folder = base
  torch.manual_seed(0)
  every = [m.short for m in files.modules(family, cfg)]
  config = peft.LoraConfig(
    r=3,
    lora_alpha=5,
    target_modules=every[:2],
    use_rslora=rslora,
    rank_pattern={every[0]: 2},
    alpha_pattern={every[1].replace('.', r'\.'): 7},  # a regular expression
    init_lora_weights=False,  # random ones
    task_type='CAUSAL_LM',
  )
  adapted = peft.get_peft_model(model, config)
  adapted.save_pretrained(folder / 'adapters')
  declared, adapters = files.read(folder / 'adapters', family, cfg)
  assert declared.rank == 3 and declared.scale == 1.0
  check(ours(cfg, params, declared, adapters), theirs(adapted))
