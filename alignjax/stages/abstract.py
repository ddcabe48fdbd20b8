"""Shapes in place of weights and data. They serve to compile a stage's step without either
(`alignjax estimate`), to check what functions of the config return before any stage runs, and to
count what the mathematics of a step needs: floating-point operations, and bytes between devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from alignjax import plugins
from alignjax.compiler import flops
from alignjax.data.templates import Template
from alignjax.models.config import TransformerConfig
from alignjax.models.sequence import AXIS as SEQUENCE
from alignjax.setup import adapters
from alignjax.setup.objects import Setup, make_setup
from alignjax.setup.texts import Text
from alignjax.setup.weights import param_shapes
from alignjax.types import LossFn, Networks, Params, TokenBatch


class Work(NamedTuple):
  """What a phase of a step does with one network.

  Attributes:
    kind: 'forward' reads rows; 'update' also has a backward pass; 'decode' samples `length` tokens
      after `prompt` tokens; 'gather' collects the weights for decoding.
    model: the architecture of the network.
    head: 'lm' or 'scalar'.
    rows, length: the rows and their tokens.
    times: how often the phase does this in a step.
    prompt: tokens before those that are sampled.
    adapters: whether an update trains adapters alone.
  """

  kind: str
  model: TransformerConfig
  head: str
  rows: int
  length: int
  times: int = 1
  prompt: int = 0
  adapters: bool = False


class Plan(NamedTuple):
  """A stage's step without data and weights.

  Attributes:
    step: the compiled step.
    arguments: its arguments as shapes on their shardings.
    work: the work of each phase.
  """

  step: Callable
  arguments: tuple
  work: dict[str, list[Work]]


def setup(config: ml_collections.ConfigDict, devices) -> Setup:
  """The objects of a config on a mesh of the given devices, real ones or those of a topology. No
  tokenizer is read where config.model has a vocab_size, and nothing is written."""
  return make_setup(
    config,
    'nowhere',
    devices,
    text=_no_text(config.model.vocab_size) if 'vocab_size' in config.model else None,
  )


def params(setup: Setup, head: str, model: TransformerConfig | None = None) -> Params:
  """The shapes of parameters on their shardings. head: 'lm' or 'scalar', as in
  weights.initial_params. model: the architecture; by default that of the setup for the head."""
  model = model or (setup.policy_model if head == 'lm' else setup.reward_model)
  return param_shapes(model, head, setup.sharder)


def array(setup: Setup, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
  """One array of a batch, whose leading axis is divided over the batch's devices."""
  shards = setup.sharder.batch_shards
  if shape[0] % shards:
    raise ValueError(
      f'a batch of {shape[0]} rows does not divide over the {shards} devices of the mesh that '
      'share a batch: change the batch, or a smaller mesh.data or mesh.fsdp.'
    )
  return jax.ShapeDtypeStruct(shape, dtype, sharding=setup.sharder.batch)


def token_rows(setup: Setup, rows: int, length: int) -> TokenBatch:
  """A TokenBatch of `rows` rows of `length` tokens, as shapes."""
  shape = (rows, length)
  return TokenBatch(
    array(setup, shape, jnp.int32),
    array(setup, shape, jnp.int32 if setup.config.data.pack else bool),
    array(setup, shape, jnp.float32),
  )


def evaluate(function: Callable, where: str, *arguments: Any) -> Any:
  """The shapes of function(*arguments). An exception becomes a ValueError that names the config
  key."""
  try:
    return jax.eval_shape(function, *arguments)
  except Exception as error:  # noqa: BLE001 a fork's function may raise anything
    text = (str(error).strip().splitlines() or ['no message'])[0]
    raise ValueError(
      f'{where} cannot be traced on the shapes of this stage: {type(error).__name__}: {text}'
    ) from error


def check_loss(
  loss_fn: LossFn,
  where: str,
  fn: str,
  params: Params,
  batch: Any,
  nets: Callable[[Params], Networks],
  frozen: Params,
  key: jax.Array | None = None,
) -> None:
  """Checks from shapes alone that a loss returns (loss f32[], metrics {name: f32[]}), as
  types.LossFn asks.

  Args:
    loss_fn: the loss with its coefficients bound.
    where, fn: the config key and the function that it names, for the message.
    params: of the stage, as shapes.
    batch: of the stage, as shapes, before `normalized()`.
    nets: frozen -> the networks as pure functions (adapters.networks).
    frozen: what no update changes, as shapes.
    key: of the dropout, or None.
  """
  made = evaluate(
    lambda params, batch, frozen: loss_fn(params, batch.normalized(), key, nets=nets(frozen)),
    f'{where}: {fn}',
    params,
    batch,
    frozen,
  )
  rule = (
    f'{where}: {fn} must return (loss, metrics), a float32 scalar and a dict of names to '
    f'float scalars'
  )
  if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], dict)):
    raise ValueError(f'{rule}; it returns {_shapes(made)}.')
  loss, metrics = made
  if not _is_float(loss, ()) or loss.dtype != jnp.float32:
    raise ValueError(f'{rule}; its loss is {_shapes(loss)}.')
  for name, value in metrics.items():
    if not isinstance(name, str) or not _is_float(value, ()):
      raise ValueError(f'{rule}; its metric {name!r} is {_shapes(value)}.')


def check_stage_loss(
  setup: Setup, name: str, params: Params, batch: Any, frozen: Params, key: jax.Array | None = None
) -> None:
  """check_loss for the entry stages.NAME.loss, to which the stage passes the networks and nothing
  else."""
  spec, where = setup.config.stages[name].loss, f'stages.{name}.loss'
  loss_fn = plugins.bind(spec, where, given=('nets',))
  nets = functools.partial(adapters.networks, setup, name)
  check_loss(loss_fn, where, spec.fn, params, batch, nets, frozen, key)


def check_arrays(made: Any, where: str, names: tuple[str, ...], shape: tuple[int, ...]) -> None:
  """Checks that a function returned one float array of `shape` for each of `names`."""
  arrays = made if isinstance(made, tuple) else (made,)
  if len(arrays) != len(names) or not all(_is_float(x, shape) for x in arrays):
    raise ValueError(
      f'{where} must return {" and ".join(names)}, float arrays of shape {shape}; it returns '
      f'{_shapes(made)}.'
    )


def _is_float(x: Any, shape: tuple[int, ...]) -> bool:
  return (
    isinstance(x, jax.ShapeDtypeStruct)
    and x.shape == shape
    and jnp.issubdtype(x.dtype, jnp.floating)
  )


def _shapes(tree: Any) -> str:
  """A value of shapes as a person reads it: '(float32[4, 7], int32[])'."""
  return str(jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', tree)).replace("'", '')


def model_flops(work: Work) -> float:
  """The floating-point operations that the mathematics needs, on all devices together: two for each
  multiply-add of a matrix product, and flops.update_flops for an update. Recomputation does not
  count, as in Chowdhery et al. 2022, appendix B, for MFU; attention is only to earlier tokens."""
  if work.kind == 'gather':
    return 0.0
  if work.kind == 'update':
    each = flops.update_flops(work.model, work.length, work.head, work.adapters)
    return each * work.rows * work.times
  each = flops.forward_flops(work.model, work.prompt + work.length, work.head)
  before = flops.forward_flops(work.model, work.prompt, work.head) if work.prompt else 0
  return (each - before) * work.rows * work.times


def wire_bytes(setup: Setup, work: Work) -> float:
  """The bytes that each device must receive for a piece of work, given where the rules of the
  config put weights and batch.

  Weights that are divided over the devices of rows and tokens are gathered once for the forward
  pass and once more for the backward pass, in the dtype of the model, and the gradient is summed
  into pieces once, unless adapters alone are trained. Weights that are divided over other devices
  (`tensor`) cost two sums of activations in each layer: in the forward pass, again where it is
  recomputed (remat), and in the backward pass. Where devices share the tokens of a row, they gather
  the keys and values of each layer as often, and the backward pass sums their gradients. Decoding
  gathers neither; before it, each device gets the keys and values of the rows that it samples.
  """
  shapes, sharder = params(setup, work.head, work.model), setup.sharder
  batch = set(np.atleast_1d(np.asarray(sharder.rules.get('batch') or (), dtype=object)).tolist())
  batch |= {SEQUENCE}
  shards, tokens = sharder.batch_shards * sharder.token_parts, work.rows * work.length
  size = jnp.dtype(work.model.dtype).itemsize
  gathered, copies, split = 0.0, 0.0, 1
  for leaf in jax.tree.leaves(shapes):
    axes = [
      a
      for entry in leaf.sharding.spec
      for a in ([] if entry is None else np.atleast_1d(entry).tolist())
    ]

    def parts(some):
      return int(np.prod([sharder.mesh.shape[a] for a in some], initial=1))

    over, kept = parts([a for a in axes if a in batch]), parts([a for a in axes if a not in batch])
    split = max(split, kept)
    piece = leaf.size * size / kept
    gathered += piece * (1 - 1 / over)
    # Gradients are summed over the devices that hold copies of the weights (`data`).
    copies += 2 * (piece / over) * (1 - over / shards)
  sums = 2 * work.model.num_layers * 2 * (1 - 1 / split)
  activations = sums * tokens * work.model.d_model * size / shards
  width = 2 * work.model.kv_heads * work.model.head_width // sharder.parts('kv_heads')
  keys = work.model.num_layers * tokens * width * size / sharder.batch_shards
  keys *= 1 - 1 / sharder.token_parts
  once = {
    'gather': gathered,
    'decode': activations,
    'forward': gathered + activations + keys,
    'update': (2 * gathered if work.adapters else 3 * gathered + copies)
    + (activations + keys) * (2 if work.model.remat == 'none' else 3),
  }
  return once[work.kind] * work.times


def _no_text(vocabulary: int) -> Text:
  """The Text where no tokenizer is at hand. The last id ends a response, as in GPT-2, and no text
  can be read."""

  def refuse(*_):
    raise ValueError('a step compiled without a tokenizer reads no text.')

  last = vocabulary - 1
  template = Template(
    prompt=refuse,
    pair=refuse,
    response=refuse,
    bare=refuse,
    decode=refuse,
    end=last,
    ends=(last,),
    pad=last,
    first=(),
    start=(last,),
    close=(),
  )
  return Text(template, range(vocabulary))
