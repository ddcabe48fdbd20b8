"""The data that the parts exchange: batches, rollouts, caches and the training state, and the
functions that losses receive.

Axis letters, used in every shape comment of the package:
  B batch   Q prompt length (left-padded)   R response length (right-padded)   T whole sequence
  K ranked responses   V vocabulary   L layers   S cache slots   N heads   G key/value heads
  H head width   D model width   F MLP width

Masks travel with the data. No function derives a mask by comparing ids with the pad or end-of-text
id, because the two ids are often the same (docs/pitfalls.md, 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Params = Any  # nested dict of arrays
Array = jax.Array | np.ndarray  # a batch is built on the host and used in a compiled program
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
  """Everything that an update changes.

  There is no random state: the key of a step is fold_in(key(seed), step), so a resumed run needs
  none.

  Attributes:
    step: i32[], the number of finished steps; of PPO, of finished iterations.
    params: {'policy'}, {'reward'} or {'policy', 'value'} -> parameter tree in float32.
    opt_state: the optax state of the whole params dict.
    ema: float32 moving average of params['policy'], or None.
    extra: scalars that a stage carries along, for example {'kl_coef': f32[]}.
    skipped: i32[2], the updates that were skipped because the loss or the gradients were not
      finite: all of them, and the last ones in a row.
  """

  step: jax.Array
  params: Params
  opt_state: Any
  ema: Any = None
  extra: Any = flax.struct.field(default_factory=dict)
  skipped: jax.Array = flax.struct.field(default_factory=lambda: jnp.zeros(2, jnp.int32))


@flax.struct.dataclass
class TokenBatch:
  """Rows of text for SFT, pretraining and the ptx term.

  Attributes:
    tokens: i32[B,T].
    mask: bool[B,T], True where a token is real; pads never attend and are never attended to. Of
      packed rows i32[B,T]: the number of each token's document in its row, from 1 on, and 0 on
      pads; no token attends to another document.
    weights: f32[B,T], the weight of predicting tokens[:, t] from what precedes it; tokens of weight
      0 are not trained on. After `normalized()` they add up to 1, and the loss is their weighted
      sum.
    source: i32[B], the entry of `mix` that each row comes from; None where all rows have one
      source.
    mix: (name, share) of each source. After `normalized()` the weights of a source add up to its
      share, however many rows and tokens of the batch it has. A share is thus one of the loss and
      not one of the rows.
  """

  tokens: Array
  mask: Array
  weights: Array
  source: Array | None = None
  mix: tuple[tuple[str, float], ...] = flax.struct.field(pytree_node=False, default=())

  def normalized(self) -> TokenBatch:
    """The batch with weights that add up to 1, or to its share within each source."""
    if self.source is None:
      return dataclasses.replace(self, weights=normalize(self.weights))
    parts = [share * normalize(self.of_source(i)) for i, (_, share) in enumerate(self.mix)]
    return dataclasses.replace(self, weights=sum(parts))

  def of_source(self, index: int) -> jax.Array:
    """f32[B,T]: the weights of the rows of source `index`, and 0 elsewhere."""
    return jnp.where((self.source == index)[:, None], self.weights, 0.0)


@flax.struct.dataclass
class ComparisonBatch:
  """K ranked responses to each prompt. All pairs of one prompt are in one batch element (section
  3.5 of the paper).

  Attributes:
    tokens: i32[B,K,T], prompt and response.
    mask: bool[B,K,T], True where a token is real.
    ranks: i32[B,K]; 0 is best, equal numbers are ties, and -1 marks an absent response.
    weights: f32[B], the weight of each prompt in the loss: 1, or 0 for a row that only fills the
      batch. `normalized()` divides them by `prompts`, so that each prompt has the same weight in an
      epoch (the expectation of Eq. 1). A short last batch makes a smaller gradient instead of
      heavier prompts.
    mean_weights: f32[B], the weights of logged figures, or None before `normalized()`. They add up
      to 1 over the prompts of this batch that have a pair without a tie, so that accuracy and loss
      of a short batch are logged as means.
    prompts: how many prompts every update of the run has, without the rows that fill it up to a
      multiple of the devices and microbatches; None: B.
  """

  tokens: Array
  mask: Array
  ranks: Array
  weights: Array
  mean_weights: Array | None = None
  prompts: int | None = flax.struct.field(pytree_node=False, default=None)

  def pairs(self) -> Array:
    """bool[B,K,K]: [b, i, j] is True where response i is ranked above response j, which is never
    the case for ties and absent responses."""
    better = self.ranks[:, :, None] < self.ranks[:, None, :]
    present = self.ranks >= 0
    return better & present[:, :, None] & present[:, None, :]

  def row_mask(self) -> Array:
    """bool[B*K,T]: the mask of the rows that a loss passes to the networks."""
    return self.mask.reshape(-1, self.mask.shape[-1])

  def normalized(self) -> ComparisonBatch:
    """The batch with the weights that losses and metrics sum with."""
    informative = jnp.where(self.pairs().any((1, 2)), self.weights, 0.0)
    return dataclasses.replace(
      self,
      weights=self.weights / (self.prompts or len(self.weights)),
      mean_weights=normalize(informative),
    )


@flax.struct.dataclass(kw_only=True)
class PreferenceBatch(ComparisonBatch):
  """A ComparisonBatch for losses of a policy, without a reward model (stages/preference.py).

  Attributes:
    response_mask: bool[B,K,T], True on the tokens of the responses, including their end token.
    ref_logprobs: f32[B,K,T], log pi_ref of each response token and 0 elsewhere; None where the
      stage has no reference.
  """

  response_mask: Array
  ref_logprobs: Array | None = None


@flax.struct.dataclass
class Rollout:
  """One sampled response to each prompt, and what the networks compute of it before any update.

  Index t of the [B,R] fields is a response token: logprobs[:, t] = log pi(responses[:, t] | prompt,
  responses[:, :t]), and values[:, t] = V(prompt, responses[:, :t]), the value before token t.

  Attributes:
    prompts: i32[B,Q], left-padded.
    prompt_mask: bool[B,Q].
    responses: i32[B,R], right-padded, including the end token where one was sampled.
    mask: bool[B,R], True on sampled tokens: [1, 1, 1, 0] for a response of three tokens.
    logprobs: f32[B,R], under the policy that sampled; 0 outside of the mask.
    ref_logprobs: f32[B,R], under the reference; 0 outside of the mask.
    values: f32[B,R], 0 outside of the mask.
    scores: f32[B], the reward of the whole response, which is added to the reward of its last live
      token.
  """

  prompts: jax.Array
  prompt_mask: jax.Array
  responses: jax.Array
  mask: jax.Array
  logprobs: jax.Array
  ref_logprobs: jax.Array
  values: jax.Array
  scores: jax.Array

  def sequences(self) -> tuple[jax.Array, jax.Array]:
    """Prompts followed by responses: tokens i32[B,Q+R] and mask bool[B,Q+R]."""
    return (
      jnp.concatenate([self.prompts, self.responses], 1),
      jnp.concatenate([self.prompt_mask, self.mask], 1),
    )


@flax.struct.dataclass
class PPOBatch:
  """A rollout, what was derived from it, and the pretraining rows that share its gradient.

  Attributes:
    rollout: Rollout of B episodes.
    advantages: f32[B,R].
    returns: f32[B,R], the targets of the value network.
    weights: f32[B,R], the weight of each response token; they add up to 1 after `normalized()`.
    ptx: TokenBatch of B * rows_per_episode rows, or None.
  """

  rollout: Rollout
  advantages: jax.Array
  returns: jax.Array
  weights: jax.Array
  ptx: TokenBatch | None = None

  def row_mask(self) -> jax.Array:
    """bool[B,Q+R]: the mask of the episodes that a loss passes to the networks."""
    return self.rollout.sequences()[1]

  def normalized(self) -> PPOBatch:
    """The batch with weights that add up to 1, and its pretraining rows likewise."""
    ptx = None if self.ptx is None else self.ptx.normalized()
    return dataclasses.replace(self, weights=normalize(self.weights), ptx=ptx)


@flax.struct.dataclass
class KVCache:
  """Keys and values of the prompts, which are only read, and of the responses so far. The n samples
  of a prompt share those of the prompt: row b * n + j is sample j of prompt b.

  All rows write the same slot. A response has no pads before its end, so the slots before `index`
  are those that are filled. Layers are a tuple and not one [L,...] array, so that a decoding step,
  which visits the layers one by one, updates each in place and slices nothing.

  Attributes:
    prompt: of each layer (k, v), both [B,G,Q,H], or models.cached.Quantized of them; of a layer
      with a window those of the last tokens, which are all that it reads.
    prompt_mask: bool[B,Q].
    response: of each layer (k, v), both [B*n,G,S,H], or Quantized.
    index: i32[], the tokens of a response so far, which is the next slot to write.
  """

  prompt: tuple[tuple[jax.Array, jax.Array], ...]
  prompt_mask: jax.Array
  response: tuple[tuple[jax.Array, jax.Array], ...]
  index: jax.Array

  def with_slots(self, slots: int) -> KVCache:
    """The cache with `slots` slots for each response, of which the new ones are empty."""

    def grow(x):
      return jnp.pad(x, [(0, slots - x.shape[2] if axis == 2 else 0) for axis in range(x.ndim)])

    return dataclasses.replace(self, response=jax.tree.map(grow, self.response))


class Decoder(NamedTuple):
  """The three functions that sampling needs of a model.

  Attributes:
    prepare: (params) -> weights; casts, re-shards and unstacks the parameters once, before the
      sampling loop.
    prefill: (weights, tokens i32[B,Q], mask bool[B,Q], samples=1) -> (logits f32[B*n,V] after the
      last column, KVCache without slots for the n = `samples` responses to each prompt).
    step: (weights, tokens i32[B*n], cache) -> (logits f32[B*n,V], cache); the cache needs a free
      slot (KVCache.with_slots).
  """

  prepare: Callable[..., Any]
  prefill: Callable[..., Any]
  step: Callable[..., Any]


class Networks(NamedTuple):
  """A model as pure functions. Losses, rollout and evaluation receive these and never a module.

  A dropout key of None means no dropout.

  Attributes:
    logits: (params, tokens, mask, key=None, positions=None) -> f32[B,T,V]; position t predicts
      token t + 1. These are the model's own logits over its whole vocabulary, as in transformers,
      for evaluations that compare with other tools. With positions i[B,N], the logits of these
      positions alone: f32[B,N,V].
    logprobs: (params, tokens, mask, temperature=1.0, key=None) -> (logprobs, entropy), both
      f32[B,T]: logprobs[:, t] = log p(tokens[:, t] | tokens[:, :t]) and the entropy of that
      distribution. Column 0 is 0. This is the one place where logits are shifted against tokens and
      where a large vocabulary is processed in chunks. It shares one distribution with the decoder,
      over the ids that have a token.
    scalar: (params, tokens, mask) -> f32[B,T], the value or reward head at every position, after
      token t was read.
    decoder: Decoder.
  """

  logits: Callable[..., jax.Array]
  logprobs: Callable[..., tuple[jax.Array, jax.Array]]
  scalar: Callable[..., jax.Array]
  decoder: Decoder


class LossFn(Protocol):
  """(params, batch, key, *, nets, **coefficients) -> (loss f32[], metrics).

  A loss is a weighted sum. Its weights were normalised over the whole minibatch beforehand
  (batch.normalized()), so that the gradients of microbatches add up to the gradient of the
  minibatch exactly. Metrics add up in the same way, except for those with the word `max` in the
  last part of their name, such as `ppo/ratio_max_dev`, which are combined by maximum.
  """

  def __call__(
    self,
    params: Params,
    batch: Any,
    key: jax.Array | None,
    *,
    nets: Networks,
    **coefficients: float,
  ) -> tuple[jax.Array, Metrics]: ...


def normalize(weights: Array) -> Array:
  """Scales weights to add up to 1 over the whole (global) batch. Weights that are all zero stay
  zero."""
  total = jnp.sum(weights)
  return weights / jnp.where(total > 0, total, 1.0)
