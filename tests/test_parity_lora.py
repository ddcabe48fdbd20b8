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
import transformers  # noqa: E402 needs torch
from golden import make  # noqa: E402 needs torch

SHARDER = Sharder(make_mesh(devices=jax.devices()[:1]))
PAD = 60  # of the classifiers
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


def classifier(folder):
  """The base as transformers' classifier with one label, whose head is random."""
  torch.manual_seed(1)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
    folder / 'base', num_labels=1, pad_token_id=PAD
  )
  return model.eval()


def right_padded():
  """Rows without the pad token: tokens [4,9] with PAD after each row, and their mask."""
  rng = np.random.default_rng(2)
  mask = np.arange(9) < rng.integers(2, 10, 4)[:, None]
  return np.where(mask, rng.integers(0, PAD, (4, 9)), PAD), mask


def scores_of(model):
  tokens, mask = map(torch.tensor, right_padded())
  with torch.no_grad():
    return model(tokens, attention_mask=mask.long()).logits[:, 0].numpy()


def our_scores(cfg, params, declared, adapters):
  tokens, mask = right_padded()
  joined = lora.join(params, jax.tree.map(jnp.asarray, adapters), declared.scale)
  scores = jax.jit(transformer.make_networks(cfg).scalar)(joined, tokens, mask)
  return np.asarray(scores)[np.arange(4), mask.sum(-1) - 1]


def test_peft_reads_our_reward_models(base):
  _, family, cfg, params, folder = base
  params = transformer.with_scalar_head(cfg, params, jax.random.key(1))
  declared = lora.LoRA(rank=2, alpha=3.0, targets=())
  shapes = jax.eval_shape(lambda: lora.init(declared, params, jax.random.key(0)))
  rng = np.random.default_rng(1)
  adapters = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
  head = dict(kernel=rng.normal(0, 0.3, (cfg.d_model, 1)).astype('f'), bias=np.float32([0.25]))
  adapters['final'] = {'score': head}
  expected = our_scores(cfg, params, declared, adapters)
  (folder / 'adapters').mkdir()
  kept = {'alignjax_score_bias': 0.25}
  files.save(folder / 'adapters', family, cfg, declared, adapters, str(folder / 'base'), kept)
  model = peft.PeftModel.from_pretrained(classifier(folder), folder / 'adapters')
  check(scores_of(model) + 0.25, expected)
  again, back = files.read(folder / 'adapters', family, cfg)
  assert back['final']['score']['bias'] == 0.25
  check(our_scores(cfg, params, again, back), expected)


def test_we_read_reward_models_of_peft(base):
  _, family, cfg, params, folder = base
  params = transformer.with_scalar_head(cfg, params, jax.random.key(1))
  torch.manual_seed(0)
  every = [m.short for m in files.modules(family, cfg)]
  config = peft.LoraConfig(
    r=3, lora_alpha=5, target_modules=every[:2], init_lora_weights=False, task_type='SEQ_CLS'
  )
  adapted = peft.get_peft_model(classifier(folder), config)
  adapted.save_pretrained(folder / 'adapters')
  assert files.has_score(folder / 'adapters')
  declared, adapters = files.read(folder / 'adapters', family, cfg)
  assert adapters['final']['score']['bias'] == 0
  check(our_scores(cfg, params, declared, adapters), scores_of(adapted.eval()))
