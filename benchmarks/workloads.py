"""What is measured: the same sizes for every framework. Weights are random, and so are tokens."""

from __future__ import annotations

import dataclasses

# GPT-2's architecture in several sizes.
GPT2 = dict(positions='learned', norm='layernorm', mlp='gelu', tie_embeddings=True)
GPT2_SMALL = GPT2 | dict(
  vocab_size=50257, num_layers=12, d_model=768, num_heads=12, max_length=1024, remat='projections'
)
FOUR_LAYERS = GPT2 | dict(vocab_size=8192, num_layers=4, d_model=256, num_heads=4, max_length=128)
ON_GPU = dict(max_length=2048, dtype='bfloat16', remat='dots', logits_chunk=16384)
GPT2_135M = GPT2_SMALL | ON_GPU
GPT_350M = GPT2 | ON_GPU | dict(vocab_size=50257, num_layers=24, d_model=1024, num_heads=16)
GPT_1B3 = GPT2 | ON_GPU | dict(vocab_size=50257, num_layers=24, d_model=2048, num_heads=16)


@dataclasses.dataclass(frozen=True)
class Workload:
  """One program that is timed.

  Attributes:
    kind: 'generate', 'sft', 'rm' or 'ppo'.
    unit: what `amount` counts.
    model: the architecture of the policy, or of the only network (TransformerConfig).
    rows: prompts, rows of a batch, or episodes.
    prompt, response: tokens; a row of SFT and RM has `prompt + response`.
    k: responses to each prompt, of 'rm'.
    minibatches, microbatches: of 'ppo'; microbatches also of 'sft' and 'rm'.
    scalar: the architecture of value network and reward model, of 'ppo'; None: that of the policy.
    text_rows: pretraining rows for each episode, of 'ppo'.
    mean_length: the mean length of a response in tokens where one may end early, of 'ppo'; None:
      all are as long as the limit.
    packed_rows: see docs/fit.md, Pads.
  """

  kind: str
  unit: str
  model: dict
  rows: int
  prompt: int
  response: int
  k: int = 2
  minibatches: int = 4
  microbatches: int = 1
  scalar: dict | None = None
  text_rows: int = 0
  mean_length: int | None = None
  packed_rows: tuple[float, ...] = ()

  @property
  def amount(self) -> int:
    """Units of one run: tokens that are sampled or read, pairs that are compared, or episodes."""
    return {
      'generate': self.rows * self.response,
      'sft': self.rows * (self.prompt + self.response),
      'rm': self.rows * self.k * (self.k - 1) // 2,
      'ppo': self.rows,
    }[self.kind]


CPU = {
  'W1': Workload('generate', 'tokens', GPT2_SMALL, rows=16, prompt=64, response=64),
  'W2': Workload('ppo', 'episodes', FOUR_LAYERS, rows=64, prompt=32, response=32),
  'W3': Workload('sft', 'tokens', GPT2_SMALL, rows=8, prompt=64, response=64),
  'W4': Workload('rm', 'pairs', GPT2_SMALL, rows=8, prompt=64, response=64),
  'W5': Workload('rm', 'pairs', GPT2_SMALL, rows=2, prompt=64, response=64, k=9),
}
GPU = {
  'sft_1b3': Workload('sft', 'tokens', GPT_1B3, rows=16, prompt=1024, response=1024),
  'rm_1b3': Workload('rm', 'pairs', GPT_1B3, rows=4, prompt=1024, response=1024, k=4),
  'sft_135m': Workload('sft', 'tokens', GPT2_135M, rows=32, prompt=512, response=512),
  'generate_64': Workload('generate', 'tokens', GPT_1B3, rows=64, prompt=256, response=256),
  'generate_256': Workload('generate', 'tokens', GPT_1B3, rows=256, prompt=256, response=256),
  'ppo_1b3': Workload(
    'ppo', 'episodes', GPT_1B3, rows=128, prompt=256, response=256, scalar=GPT_350M
  ),
  'ppo_1b3_half': Workload(
    'ppo', 'episodes', GPT_1B3, rows=128, prompt=256, response=256, scalar=GPT_350M, mean_length=80
  ),
  'ppo_1b3_half_packed': Workload(
    'ppo',
    'episodes',
    GPT_1B3,
    rows=128,
    prompt=256,
    response=256,
    scalar=GPT_350M,
    mean_length=80,
    packed_rows=(0.625, 0.75, 0.875),
  ),
  'ppo_four_1b3': Workload(
    'ppo', 'episodes', GPT_1B3, rows=64, prompt=512, response=512, microbatches=2, text_rows=1
  ),
}
ALL = CPU | GPU


def tiny(workload: Workload) -> Workload:
  """The same program at sizes that take a second, to see that it runs."""

  def smaller(model):
    return model | dict(
      vocab_size=512, num_layers=2, d_model=32, num_heads=2, max_length=64, dtype='float32'
    )

  return dataclasses.replace(
    workload,
    model=smaller(workload.model),
    scalar=smaller(workload.scalar) if workload.scalar else None,
    rows=8,
    prompt=8,
    response=8,
    mean_length=4 if workload.mean_length else None,
  )
