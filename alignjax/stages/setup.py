"""What every stage starts from: the config checked and turned into objects; parameters by name; the first state."""

from __future__ import annotations

import dataclasses
import difflib
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from alignjax import checkpoint, files, optim, plugins
from alignjax.data import encode, templates
from alignjax.data.templates import Template
from alignjax.models import hf, transformer
from alignjax.models.axes import path_name
from alignjax.models.config import TransformerConfig
from alignjax.sharding import Sharder, make_mesh
from alignjax.types import Metrics, Networks, Params, TrainState


class Setup(NamedTuple):
  """The objects that the config describes, shared by all stages of a run.

  nets: logits, logprobs and decoder of the policy's architecture, scalar of the reward model's, which may differ.
  world, labelers: of the sandbox, or None. encode, decode: text <-> token ids.
  """
  config: ml_collections.ConfigDict
  workdir: files.Folder
  sharder: Sharder
  policy_model: TransformerConfig
  reward_model: TransformerConfig
  nets: Networks
  world: Any
  labelers: Any
  template: Template
  encode: Callable[[str], list[int]]
  decode: Callable[[Any], str]
  vocabulary: int

  @property
  def prompt_length(self) -> int:
    return self.config.data.prompt_length

  @property
  def response_length(self) -> int:
    return self.config.data.response_length

  @property
  def length(self) -> int:
    return self.prompt_length + self.response_length


class Stage(NamedTuple):
  """What train.run needs of a stage. It knows no algorithm.

  state: the first TrainState, on its shardings; a checkpoint replaces it.
  step: (state, batch) -> (state, metrics, seen), compiled, donates the state.
  batch: step number -> global batch; a pure function.
  num_steps, tokens_per_step: for the loop, and for throughput.
  finish: state -> (params to keep, info as JSON values).
  observe: (step, state, seen) -> (metrics, rows of samples), on the host, at logged steps; or None.
  work: what a step does, for throughput.metrics: tokens by phase, episodes, FLOPs.
  failures: where a function on the host that the step calls says why it gave up (alignjax/host.py); one ends the run.
  """
  state: TrainState
  step: Callable[[TrainState, Any], tuple[TrainState, Metrics, Any]]
  batch: Callable[[int], Any]
  num_steps: int
  tokens_per_step: int
  finish: Callable[[TrainState], tuple[Params, dict]]
  observe: Callable[[int, TrainState, Any], tuple[Metrics, list]] | None = None
  work: Mapping[str, float] = {}
  failures: Sequence[str] = ()


def make_setup(config: ml_collections.ConfigDict, workdir: str | files.Folder, devices=None,
               text_side: Callable[..., tuple] | None = None) -> Setup:
  """Checks the config's shared part and builds what it names. Fails before anything is compiled.

  text_side: in place of the one below, where no text is read (stages/abstract.py).
  """
  sharder = Sharder(make_mesh(**config.mesh, devices=devices), config.sharding.to_dict())
  world, labelers, template, to_ids, decode, vocabulary = (text_side or tokens_and_texts)(config)
  if config.data.too_long not in encode.TOO_LONG:
    raise ValueError(f'data.too_long={config.data.too_long!r} is none of {encode.TOO_LONG}.')
  policy_model = model_config(config.model, vocabulary, 'model')
  reward_model = model_config(config.reward_model or config.model, vocabulary, 'reward_model')
  length = config.data.prompt_length + config.data.response_length
  for name, model in (('model', policy_model), ('reward_model', reward_model)):
    sharder.check_heads(model, name)
    needed = max(length, config.data.row_length)
    if needed > model.max_length:
      raise ValueError(f'{name}.max_length={model.max_length} is shorter than the {needed} tokens that '
                       'data.prompt_length + data.response_length, or data.row_length, ask for.')
  networks = transformer.make_networks(policy_model, sharder.constrain, sharder.for_decoding)
  reward = transformer.make_networks(reward_model, sharder.constrain, sharder.for_decoding)
  return Setup(config, files.folder(workdir), sharder, policy_model, reward_model,
               networks._replace(scalar=reward.scalar), world, labelers, template, to_ids, decode, vocabulary)


def tokens_and_texts(config: ml_collections.ConfigDict) -> tuple:
  """(world, labelers, template, encode, decode, vocabulary) of config.data.tokenizer."""
  if config.data.tokenizer == 'sandbox:':
    from alignjax import sandbox
    template = Template(lambda text: [sandbox.EOS_ID, *sandbox.encode(text), *sandbox.encode(sandbox.NEWLINE)],
                        lambda text: [*sandbox.encode(text), sandbox.EOS_ID], sandbox.EOS_ID, sandbox.PAD_ID, sandbox.EOS_ID)
    return (sandbox.World(config.world.seed), sandbox.Labelers(config.world.seed), template, sandbox.encode, sandbox.decode,
            len(sandbox.VOCAB))
  tokenizer = load_tokenizer(config.data.tokenizer)
  return (None, None, templates.make(tokenizer, config.data.template or 'plain'),
          lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False), tokenizer.decode, len(tokenizer))


def for_stage(setup: Setup, name: str) -> Setup:
  """The setup with the policy's architecture that a stage asks for: its `model` entry changes config.model."""
  changes = setup.config.stages[name].get('model')
  if not changes:
    return setup
  model = model_config({**setup.config.model, **changes}, setup.policy_model.vocab_size, f'stages.{name}.model')
  setup.sharder.check_heads(model, f'stages.{name}.model')
  networks = transformer.make_networks(model, setup.sharder.constrain, setup.sharder.for_decoding)
  return setup._replace(policy_model=model, nets=networks._replace(scalar=setup.nets.scalar))


def load_tokenizer(name: str) -> Any:
  """The tokenizer of 'hf:FOLDER_OR_HUB_NAME' (the prefix may be left out)."""
  from transformers import AutoTokenizer
  folder = hf.folder_of(name.removeprefix('hf:'))
  try:
    return AutoTokenizer.from_pretrained(folder)
  except (ValueError, OSError, KeyError) as error:
    raise ValueError(f'data.tokenizer={name!r}: no tokenizer can be read from {folder} ({error}).') from error


def model_config(spec: Mapping[str, Any], vocabulary: int, where: str) -> TransformerConfig:
  """TransformerConfig of a config entry; an unknown field is an error with the nearest known one.

  An entry source='hf:FOLDER_OR_HUB_NAME' takes the architecture of that checkpoint; the other entries change it.
  """
  fields = [f.name for f in dataclasses.fields(TransformerConfig)]
  for key in spec:
    if key not in (*fields, 'source'):
      near = difflib.get_close_matches(key, fields, 1)
      raise ValueError(f'{where}.{key} is no field of TransformerConfig.' + (f' Did you mean {near[0]!r}?' if near else ''))
  spec = {'vocab_size': vocabulary, **spec}
  if source := spec.pop('source', None):
    spec = hf.fields(source.removeprefix('hf:')) | {k: v for k, v in spec.items() if k != 'vocab_size'}
    if spec['vocab_size'] < vocabulary:
      raise ValueError(f'{where}.source={source!r} has a vocabulary of {spec["vocab_size"]}, data.tokenizer one of '
                       f'{vocabulary}; they do not belong together.')
  return TransformerConfig(**spec)


def stage_dir(setup: Setup, name: str) -> files.Folder:
  return setup.workdir / name


def initial_params(setup: Setup, spec: str, head: str, seed: int) -> Params:
  """Parameters by name, on their shardings, in buffers of their own.

  Args:
    spec: 'random'; 'stage:NAME', the final weights of a finished stage of this workdir; the folder of one; or
      'hf:FOLDER_OR_HUB_NAME', a checkpoint of models/families.py.
    head: 'lm' (policy) or 'scalar' (reward, value). A language model's trunk gets a fresh scalar head.
  """
  model = setup.policy_model if head == 'lm' else setup.reward_model
  key = jax.random.fold_in(jax.random.key(setup.config.seed), seed)
  fresh = lambda head: jax.eval_shape(lambda: transformer.init(model, key, head))
  if spec == 'random':
    return jax.jit(lambda: transformer.init(model, key, head), out_shardings=setup.sharder.params(fresh(head)))()
  if spec.startswith('hf:'):
    return hf.load(spec.removeprefix('hf:'), model, head, setup.sharder.params, key)
  folder = stage_dir(setup, spec.removeprefix('stage:')) / 'final' if spec.startswith('stage:') else files.folder(spec)
  if not checkpoint.is_finished(folder):
    raise FileNotFoundError(f'{spec!r}: {folder} holds no finished stage. Forms: random, stage:NAME, '
                            'hf:FOLDER_OR_HUB_NAME, FOLDER.')
  saved = checkpoint.load_info(folder)['head']
  shapes = fresh(saved)
  shardings = setup.sharder.params(shapes)
  params = checkpoint.load_params(folder, jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings))
  if saved == head:
    return params
  if head == 'lm':
    raise ValueError(f'{spec!r} is a reward model; a policy cannot start from it.')
  head_shardings = setup.sharder.params(fresh('scalar'))
  return jax.jit(lambda p: transformer.with_scalar_head(model, p, key), out_shardings=head_shardings)(params)


def freeze(params: Params, model: TransformerConfig) -> Params:
  """Weights that are only read, in the dtype that every use casts them to; norms and scalar heads, used in float32, stay."""

  def one(path, leaf):
    if any(word in path_name(path) for word in ('norm', 'score')):
      return leaf
    return leaf.update(dtype=model.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.astype(model.dtype)

  return jax.tree_util.tree_map_with_path(one, params)


def make_optimizer(config: Mapping[str, Any], steps: int, where: str) -> optax.GradientTransformation:
  """config.{policy, value, reward} -> one transformation; each is dict(fn='module:name', ...)."""
  return optim.make({name: plugins.bind(spec, f'{where}.optimizer.{name}', given=('steps',))(steps=max(steps, 1))
                     for name, spec in config.items()})


def make_state(setup: Setup, params: dict[str, Params], tx: optax.GradientTransformation, ema: bool = False,
               extra: Mapping[str, float] | None = None) -> TrainState:
  """The first state, born on its shardings; the given parameters are copied, so that frozen ones keep their buffers.
  Of abstract parameters (stages/abstract.py) the abstract state."""

  def build(params):
    average = jax.tree.map(lambda p: p.astype(jnp.float32), params['policy']) if ema else None
    scalars = {name: jnp.float32(value) for name, value in (extra or {}).items()}
    return TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params), ema=average, extra=scalars)

  shapes = jax.eval_shape(build, params)
  shardings = setup.sharder.state(shapes, shapes.params)
  if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
  return jax.jit(build, out_shardings=shardings)(params)


def compile_step(step: Callable, state: TrainState) -> Callable:
  """jit of step(state, ...) -> (state, ...): the state is donated and comes back on the shardings it went in with, so that
  the second call finds the first one's program."""
  shardings = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None, None))


GIVEN = dict(loss=('nets',), reward=('nets', 'frozen', 'decode', 'failures'), advantage=())  # keywords that the stage passes itself


def check_functions(config: Mapping[str, Any], where: str, facts: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> None:
  """Binds every function that a stage's config names, so that a wrong name or coefficient fails before any stage runs.

  facts: by entry ('loss', 'reward', 'advantage') what the stage knows and passes (plugins.bind).
  """
  for entry, given in GIVEN.items():
    if entry in config:
      plugins.bind(config[entry], f'{where}.{entry}', given=given, facts=facts.get(entry, {}))
      if 'function' in config[entry]:  # of alignjax.host:reward
        plugins.find(config[entry]['function'], f'{where}.{entry}.function')
  make_optimizer(config.optimizer, 10**9, where)


def check_divides(size: int, parts: int, what: str) -> None:
  if parts < 1 or size % parts:
    raise ValueError(f'{what}: {size} does not divide by {parts}.')


def check_epochs(epochs: Any, where: str, whole: bool = False) -> None:
  """epochs: 0 is no step, so that the stage's result is what it starts from."""
  if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or not 0 <= epochs < math.inf or (whole and epochs % 1):
    raise ValueError(f'{where}.epochs={epochs!r} must be a {"whole " if whole else ""}number, 0 or more.')


def steps_per_epoch(rows: int, batch_size: int, epochs: float) -> int:
  """Steps that see every row `epochs` times."""
  return math.ceil(rows * epochs / batch_size)


def stage_key(setup: Setup, stage: str) -> jax.Array:
  """The random key of a stage; each step folds its number in."""
  return jax.random.fold_in(jax.random.key(setup.config.seed), seed_of(stage))


def seed_of(name: str) -> int:
  """A stable 31-bit number of a name, to keep the random streams of stages apart."""
  return zlib.crc32(name.encode()) & 0x7FFFFFFF
