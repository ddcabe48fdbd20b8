"""Makes the golden files: a small random checkpoint of each family, as transformers writes it, and
what transformers computes with it. Run once with torch and transformers (the parity extra); the
tests need neither.

  python tests/golden/make.py

Each FAMILY/ holds config.json, model.safetensors and expected.npz: tokens i64[B,T], mask bool[B,T]
(left- and right-padded rows), logits f32[B,T,V], continuation i64[1,12] (greedy, from the last
row's prefix).
"""

import pathlib
import shutil

import numpy as np
import torch
import transformers as hf

HERE = pathlib.Path(__file__).parent
V, D, N, F, T = 61, 16, 4, 24, 32
COMMON = dict(
  vocab_size=V,
  hidden_size=D,
  intermediate_size=F,
  num_hidden_layers=2,
  num_attention_heads=N,
  max_position_embeddings=T,
)
ROPE = lambda **kw: dict(rope_type='default', rope_theta=10_000.0) | kw
LLAMA3 = dict(
  rope_type='llama3',
  rope_theta=500.0,
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8,
)

MODELS = {
  'gpt2': lambda: hf.GPT2LMHeadModel(
    hf.GPT2Config(vocab_size=V, n_positions=T, n_embd=D, n_layer=2, n_head=N)
  ),
  'gpt_neox': lambda: hf.GPTNeoXForCausalLM(
    hf.GPTNeoXConfig(**COMMON, rope_parameters=ROPE(partial_rotary_factor=0.5))
  ),
  'gpt_neox_serial': lambda: hf.GPTNeoXForCausalLM(
    hf.GPTNeoXConfig(
      **COMMON, use_parallel_residual=False, rope_parameters=ROPE(partial_rotary_factor=1.0)
    )
  ),
  'llama': lambda: hf.LlamaForCausalLM(
    hf.LlamaConfig(**COMMON, num_key_value_heads=2, rope_parameters=ROPE())
  ),
  'llama_tied': lambda: hf.LlamaForCausalLM(
    hf.LlamaConfig(
      **COMMON, num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=LLAMA3
    )
  ),
  'llama_biases': lambda: hf.LlamaForCausalLM(
    hf.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True, head_dim=6, rope_parameters=ROPE())
  ),
  'mistral': lambda: hf.MistralForCausalLM(
    hf.MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=20, rope_parameters=ROPE())
  ),
  'qwen2': lambda: hf.Qwen2ForCausalLM(
    hf.Qwen2Config(**COMMON, num_key_value_heads=2, rope_parameters=ROPE())
  ),
  'qwen3': lambda: hf.Qwen3ForCausalLM(
    hf.Qwen3Config(
      **COMMON, num_key_value_heads=2, head_dim=6, tie_word_embeddings=True, rope_parameters=ROPE()
    )
  ),
  # Windows that are shorter than the rows of `batch`.
  'mistral_window': lambda: hf.MistralForCausalLM(
    hf.MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=4, rope_parameters=ROPE())
  ),
  'qwen3_window': lambda: hf.Qwen3ForCausalLM(
    hf.Qwen3Config(
      **COMMON,
      num_key_value_heads=2,
      head_dim=6,
      use_sliding_window=True,
      sliding_window=3,
      max_window_layers=1,
      rope_parameters=ROPE(),
    )
  ),
  'gemma': lambda: hf.GemmaForCausalLM(
    hf.GemmaConfig(
      **COMMON, num_key_value_heads=1, head_dim=6, rope_parameters=ROPE(), eos_token_id=None
    )
  ),
  'gemma2': lambda: hf.Gemma2ForCausalLM(
    hf.Gemma2Config(
      **COMMON,
      num_key_value_heads=2,
      head_dim=6,
      sliding_window=4,
      query_pre_attn_scalar=9,
      attn_logit_softcapping=0.7,
      final_logit_softcapping=1.5,
      eos_token_id=None,
      rope_parameters=ROPE(),
    )
  ),
  'gemma3': lambda: hf.Gemma3ForCausalLM(
    hf.Gemma3TextConfig(
      **COMMON | dict(num_hidden_layers=3),
      num_key_value_heads=2,
      head_dim=6,
      sliding_window=4,
      layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
      query_pre_attn_scalar=6,
      eos_token_id=None,
      rope_parameters={
        'sliding_attention': ROPE(rope_theta=20.0),
        'full_attention': dict(rope_type='linear', factor=4.0, rope_theta=500.0),
      },
    )
  ),
  'phi3': lambda: hf.Phi3ForCausalLM(
    hf.Phi3Config(
      **COMMON,
      num_key_value_heads=2,
      sliding_window=5,
      original_max_position_embeddings=T,
      rope_parameters=ROPE(partial_rotary_factor=0.5),
      pad_token_id=0,
      eos_token_id=None,
    )
  ),
  'olmo2': lambda: hf.Olmo2ForCausalLM(
    hf.Olmo2Config(**COMMON, num_key_value_heads=2, rope_parameters=ROPE(), eos_token_id=None)
  ),
}


def build(name: str, seed: int = 0):
  """The model, its biases and norms away from 0 and 1, so that a forgotten one shows."""
  torch.manual_seed(seed)
  model = MODELS[name]()
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.15 * torch.randn_like(p))
  return model.eval().float()


def batch(seed: int):
  """Eight rows of 12 columns: four padded on the left, four on the right."""
  rng = np.random.default_rng(seed)
  lengths, column = rng.integers(3, 13, 8), np.arange(12)
  mask = np.concatenate([column >= 12 - lengths[:4, None], column < lengths[4:, None]])
  return rng.integers(0, V, mask.shape), mask


def logits_of(model, tokens, mask):
  where = np.maximum(np.cumsum(mask, 1) - 1, 0)
  with torch.no_grad():
    return (
      model(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(mask).long(),
        position_ids=torch.tensor(where),
      )
      .logits.float()
      .numpy()
    )


CHATML = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


def chat():
  """A tied Llama over bytes with a tokenizer and a chat template: for the tests of recipes, export
  and generation."""
  from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
  from tokenizers.models import BPE

  folder = HERE / 'chat'
  shutil.rmtree(folder, ignore_errors=True)
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(
    [
      AddedToken(t, special=True, normalized=False)
      for t in ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|pad|>')
    ]
  )
  fast = hf.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token='<|endoftext|>', pad_token='<|pad|>'
  )
  fast.chat_template = CHATML
  fast.save_pretrained(folder)
  torch.manual_seed(0)
  config = hf.LlamaConfig(
    **COMMON | dict(vocab_size=264, max_position_embeddings=512),
    num_key_value_heads=2,
    tie_word_embeddings=True,
    rope_parameters=ROPE(),
    eos_token_id=256,
    pad_token_id=259,
  )
  hf.LlamaForCausalLM(config).save_pretrained(folder)
  (folder / 'generation_config.json').unlink(missing_ok=True)


def main():
  chat()
  for name in MODELS:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model = build(name)
    model.save_pretrained(folder)
    (folder / 'generation_config.json').unlink(missing_ok=True)
    tokens, mask = batch(0)
    prefix = torch.tensor(tokens[-1:, :5])
    continuation = model.generate(
      prefix,
      attention_mask=torch.ones_like(prefix),
      max_new_tokens=12,
      min_new_tokens=12,
      do_sample=False,
      pad_token_id=0,
    )[:, 5:].numpy()
    np.savez_compressed(
      folder / 'expected.npz',
      tokens=tokens,
      mask=mask,
      logits=logits_of(model, tokens, mask),
      prefix=prefix.numpy(),
      continuation=continuation,
    )
    print(name, sum(f.stat().st_size for f in folder.iterdir()), 'bytes')


if __name__ == '__main__':
  main()
