"""The workloads by what people would use instead, where it is installed: transformers' `generate`,
a loop in torch with torch.compile, and TRL's PPOTrainer (TRL until 1.12)."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from typing import Any

from benchmarks.workloads import Workload


def transformers_generate(w: Workload) -> Callable[[], Any]:
  """`generate` with a static cache and a compiled forward pass, its fastest form."""
  import torch

  model, device = _model(w.model, 'lm')
  model.eval()
  model.forward = torch.compile(model.forward, dynamic=False)
  vocabulary = w.model['vocab_size']
  ids = torch.randint(0, vocabulary - 2, (w.rows, w.prompt), device=device)

  def run():
    with torch.inference_mode():
      model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=w.response,
        max_new_tokens=w.response,
        pad_token_id=vocabulary - 2,
        cache_implementation='static',
      )
    _wait(device)

  return run


def torch_sft(w: Workload) -> Callable[[], Any]:
  """A step of torch.compile, fused AdamW, and bfloat16 by autocast where the model is bfloat16."""
  import torch

  model, device = _model(w.model, 'lm', training=True)
  ids = torch.randint(0, w.model['vocab_size'] - 2, (w.rows, w.prompt + w.response), device=device)

  def loss(part):
    return model(
      input_ids=part, attention_mask=torch.ones_like(part), labels=part, use_cache=False
    ).loss

  return _torch_stepper(w, model, device, loss, ids)


def torch_rm(w: Workload) -> Callable[[], Any]:
  """The ranking loss over all pairs of a prompt, each response read once."""
  import torch

  model, device = _model(w.model, 'scalar', training=True)
  shape = (w.rows * w.k, w.prompt + w.response)
  ids = torch.randint(0, w.model['vocab_size'] - 2, shape, device=device)
  better, worse = torch.triu_indices(w.k, w.k, 1)

  def loss(part):
    scores = model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False).logits[
      :, 0
    ]
    scores = scores.reshape(-1, w.k).float()
    return -torch.nn.functional.logsigmoid(scores[:, better] - scores[:, worse]).mean()

  return _torch_stepper(w, model, device, loss, ids)


def trl_ppo(w: Workload) -> Callable[[], Any]:
  """One iteration of TRL's PPOTrainer, which trains in a thread and waits between iterations."""
  import torch
  from datasets import Dataset
  from transformers import TrainerCallback
  from trl.experimental.ppo import PPOConfig, PPOTrainer

  scalar = w.scalar or w.model
  rows = torch.randint(0, w.model['vocab_size'] - 2, (w.rows * 4, w.prompt)).tolist()
  go, done = threading.Semaphore(0), threading.Semaphore(0)

  class Gate(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
      go.acquire()

    def on_step_end(self, *args, **kwargs):
      done.release()
      go.acquire()

  bfloat16 = w.model.get('dtype') == 'bfloat16'
  trainer = PPOTrainer(
    args=PPOConfig(
      output_dir=tempfile.mkdtemp(),
      per_device_train_batch_size=w.rows,
      gradient_accumulation_steps=1,
      num_mini_batches=w.minibatches,
      total_episodes=w.rows * 10_000,
      num_ppo_epochs=1,
      response_length=w.response,
      temperature=1.0,
      local_rollout_forward_batch_size=w.rows,
      learning_rate=1e-6,
      use_cpu=not torch.cuda.is_available(),
      bf16=bfloat16,
      report_to=[],
      save_strategy='no',
      num_sample_generations=0,
      disable_tqdm=True,
    ),
    processing_class=_tokenizer(w.model['vocab_size']),
    model=_model(w.model, 'lm')[0],
    ref_model=_model(w.model, 'lm')[0],
    reward_model=_model(scalar, 'scalar')[0],
    value_model=_model(scalar, 'scalar')[0],
    train_dataset=Dataset.from_dict({'input_ids': rows}),
    callbacks=[Gate()],
  )
  failed: list[Exception] = []

  def train():
    try:
      trainer.train()
    except Exception as error:  # noqa: BLE001 raised again below
      failed.append(error)
    done.release()

  threading.Thread(target=train, daemon=True).start()

  def run():
    go.release()
    done.acquire()
    if failed:
      raise failed[0]

  return run


PEERS: dict[str, dict[str, Callable[[Workload], Callable[[], Any]]]] = {
  'generate': {'transformers': transformers_generate},
  'sft': {'torch': torch_sft},
  'rm': {'torch': torch_rm},
  'ppo': {'trl': trl_ppo},
}


def _model(sizes: dict, head: str, training: bool = False):
  """(GPT-2 of transformers with these sizes and random weights, its device)."""
  import torch
  from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

  vocabulary = sizes['vocab_size']
  config = GPT2Config(
    vocab_size=vocabulary,
    n_positions=sizes['max_length'],
    n_embd=sizes['d_model'],
    n_layer=sizes['num_layers'],
    n_head=sizes['num_heads'],
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=vocabulary - 1,
    eos_token_id=vocabulary - 1,
    pad_token_id=vocabulary - 2,
    num_labels=1,
  )
  config._attn_implementation = 'sdpa'
  kind = GPT2LMHeadModel if head == 'lm' else GPT2ForSequenceClassification
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model = kind(config).to(device)
  if sizes.get('dtype') == 'bfloat16' and not training:
    model = model.to(torch.bfloat16)
  if training:
    model.train()
    if device == 'cuda':
      model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
  return model, device


def _torch_stepper(w: Workload, model, device: str, loss: Callable, ids) -> Callable[[], Any]:
  import contextlib

  import torch

  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
  compiled = torch.compile(loss)
  bfloat16 = w.model.get('dtype') == 'bfloat16'

  def run():
    for part in ids.chunk(w.microbatches):
      with torch.autocast(device, dtype=torch.bfloat16) if bfloat16 else contextlib.nullcontext():
        value = compiled(part) / w.microbatches
      value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _wait(device)

  return run


def _wait(device: str) -> None:
  import torch

  if device == 'cuda':
    torch.cuda.synchronize()


def _tokenizer(vocabulary: int):
  """A tokenizer of made-up words, which TRL needs for its pad and end tokens."""
  from tokenizers import Tokenizer, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  words = {f't{i}': i for i in range(vocabulary - 2)}
  words |= {'<pad>': vocabulary - 2, '<eos>': vocabulary - 1}
  tokenizer = Tokenizer(models.WordLevel(words, unk_token='t0'))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token='<pad>', eos_token='<eos>', padding_side='left'
  )
