"""Against transformers and torch, on small random models: the same weights give the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import optim
from alignjax.models import transformer
from alignjax.models.config import TransformerConfig

torch = pytest.importorskip('torch', reason='pip install torch (the parity extra)')
pytestmark = pytest.mark.parity
L, D, N, V, T, F = 2, 32, 4, 61, 24, 48
H = D // N


def array(tensor):
  return tensor.detach().numpy()


def stack(make):
  return jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs)), *[make(i) for i in range(L)])


def norm(module, bias=True):
  return {'scale': array(module.weight), **({'bias': array(module.bias)} if bias else {})}


def shake(model):
  """Biases and norms away from 0 and 1, so that a forgotten one shows."""
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.1 * torch.randn_like(p))
  return model.eval()


def gpt2():
  from transformers import GPT2Config, GPT2LMHeadModel
  model = shake(GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=T, n_embd=D, n_layer=L, n_head=N,
                                           attn_implementation='eager')))

  def layer(i):
    b = model.transformer.h[i]
    w, bias = array(b.attn.c_attn.weight).reshape(D, 3, N, H), array(b.attn.c_attn.bias).reshape(3, N, H)
    return {'norm_1': norm(b.ln_1), 'norm_2': norm(b.ln_2), 'attention': {
        **{n: {'kernel': w[:, j], 'bias': bias[j]} for j, n in enumerate(('query', 'key', 'value'))},
        'out': {'kernel': array(b.attn.c_proj.weight).reshape(N, H, D), 'bias': array(b.attn.c_proj.bias)}},
        'mlp': {'up': {'kernel': array(b.mlp.c_fc.weight), 'bias': array(b.mlp.c_fc.bias)},
                'down': {'kernel': array(b.mlp.c_proj.weight), 'bias': array(b.mlp.c_proj.bias)}}}

  t = model.transformer
  params = {'embed': {'tokens': array(t.wte.weight), 'positions': array(t.wpe.weight)}, 'layers': stack(layer),
            'final': {'norm': norm(t.ln_f)}}
  return model, TransformerConfig(V, L, D, N, T, positions='learned'), params


def llama(tied=False):
  from transformers import LlamaConfig, LlamaForCausalLM
  model = shake(LlamaForCausalLM(LlamaConfig(
      vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N, num_key_value_heads=2,
      max_position_embeddings=T, tie_word_embeddings=tied, attn_implementation='eager')))

  def layer(i):
    b = model.model.layers[i]
    heads = lambda m, n: {'kernel': array(m.weight).T.reshape(D, n, H)}
    dense = lambda m: {'kernel': array(m.weight).T}
    a, m = b.self_attn, b.mlp
    return {'norm_1': norm(b.input_layernorm, False), 'norm_2': norm(b.post_attention_layernorm, False),
            'attention': {'query': heads(a.q_proj, N), 'key': heads(a.k_proj, 2), 'value': heads(a.v_proj, 2),
                          'out': {'kernel': array(a.o_proj.weight).T.reshape(N, H, D)}},
            'mlp': {'up': dense(m.up_proj), 'gate': dense(m.gate_proj), 'down': dense(m.down_proj)}}

  final = {'norm': norm(model.model.norm, False)}
  if not tied:
    final['head'] = {'kernel': array(model.lm_head.weight).T}
  params = {'embed': {'tokens': array(model.model.embed_tokens.weight)}, 'layers': stack(layer), 'final': final}
  cfg = TransformerConfig(V, L, D, N, T, num_kv_heads=2, d_ff=F, norm='rmsnorm', norm_eps=1e-6, mlp='swiglu', qkv_bias=False,
                          out_bias=False, tie_embeddings=tied)
  return model, cfg, params


def neox():
  from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
  model = shake(GPTNeoXForCausalLM(GPTNeoXConfig(
      vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N, max_position_embeddings=T,
      rotary_pct=0.5, rope_parameters={'rope_type': 'default', 'rope_theta': 10000.0, 'partial_rotary_factor': 0.5},
      attn_implementation='eager')))

  def layer(i):
    b = model.gpt_neox.layers[i]
    w = array(b.attention.query_key_value.weight).reshape(N, 3, H, D)
    bias = array(b.attention.query_key_value.bias).reshape(N, 3, H)
    dense = lambda m: {'kernel': array(m.weight).T, 'bias': array(m.bias)}
    return {'norm_1': norm(b.input_layernorm), 'norm_2': norm(b.post_attention_layernorm), 'attention': {
        **{n: {'kernel': w[:, j].transpose(2, 0, 1), 'bias': bias[:, j]} for j, n in enumerate(('query', 'key', 'value'))},
        'out': {'kernel': array(b.attention.dense.weight).T.reshape(N, H, D), 'bias': array(b.attention.dense.bias)}},
        'mlp': {'up': dense(b.mlp.dense_h_to_4h), 'down': dense(b.mlp.dense_4h_to_h)}}

  params = {'embed': {'tokens': array(model.gpt_neox.embed_in.weight)}, 'layers': stack(layer),
            'final': {'norm': norm(model.gpt_neox.final_layer_norm), 'head': {'kernel':
                      array(model.get_output_embeddings().weight).T}}}
  cfg = TransformerConfig(V, L, D, N, T, d_ff=F, rotary_fraction=0.5, mlp='gelu_exact', parallel_residual=True,
                          tie_embeddings=False)
  return model, cfg, params


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('family', [gpt2, llama, lambda: llama(tied=True), neox], ids=['gpt2', 'llama', 'llama-tied', 'neox'])
def test_item_5_logits_equal_those_of_transformers(family, seed, side):
  torch.manual_seed(seed)
  model, cfg, params = family()
  rng = np.random.default_rng(seed)
  lengths = rng.integers(3, 13, 4)
  column = np.arange(12)
  mask = column >= 12 - lengths[:, None] if side == 'left' else column < lengths[:, None]
  tokens = rng.integers(0, V, mask.shape)
  where = np.maximum(np.cumsum(mask, 1) - 1, 0)
  with torch.no_grad():
    expected = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask).long(),
                     position_ids=torch.tensor(where)).logits.numpy()
  out = transformer.make_networks(cfg).logits(jax.tree.map(jnp.asarray, params), jnp.asarray(tokens), jnp.asarray(mask))
  np.testing.assert_allclose(np.asarray(out)[mask], expected[mask], rtol=1e-4, atol=1e-4 * np.abs(expected).max())


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
