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

from alignjax import optim, plugins
from alignjax.runtime import checkpoint, files
from alignjax.setup import inputs
from alignjax.data import encode, templates
from alignjax.data.templates import Template
from alignjax.models import hf, hub, transformer
from alignjax.models.axes import as_used
from alignjax.models.config import TransformerConfig, ranges_without
from alignjax.sharding import Sharder, make_mesh
from alignjax.setup import entries
from alignjax.types import Metrics, Networks, Params, TrainState


class Setup(NamedTuple):
  """The objects that the config describes, shared by all stages of a run.

  nets: logits, logprobs and decoder of the policy's architecture, scalar of the reward model's, which may differ.
  world, labelers: of the sandbox, or None. template: text <-> token ids. ids: those that have a token, in order.
  read: sources, checkpoints and functions that were read, noted by whoever reads (alignjax/setup/inputs.py).
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
  ids: Sequence[int]
  read: inputs.Read

  @property
  def vocabulary(self) -> int:
    """One more than the largest id of a token. The model's vocabulary may be larger."""
    return self.ids[-1] + 1

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
  num_steps: for the loop.
  finish: state -> (params to keep, info as JSON values).
  observe: (step, state, seen) -> (metrics, rows of samples), on the host, at logged steps; or None.
  work: step number -> what that step does, for throughput.metrics: tokens, tokens by phase, episodes, FLOPs. Batches may differ.
  failures: where a function on the host that the step calls says why it gave up (alignjax/rewards.py); one ends the run.
  """
  state: TrainState
  step: Callable[[TrainState, Any], tuple[TrainState, Metrics, Any]]
  batch: Callable[[int], Any]
  num_steps: int
  finish: Callable[[TrainState], tuple[Params, dict]]
  observe: Callable[[int, TrainState, Any], tuple[Metrics, list]] | None = None
  work: Callable[[int], Mapping[str, float]] = lambda step: {}
  failures: Sequence[str] = ()


def make_setup(config: ml_collections.ConfigDict, workdir: str | files.Folder, devices=None,
               text_side: Callable[..., tuple] | None = None) -> Setup:
  """Checks the config's shared part and builds what it names. Fails before anything is compiled.

  text_side: in place of the one below, where no text is read (stages/abstract.py).
  """
  for entry, seed in (('seed', config.seed), ('world.seed', config.world.get('seed', 0))):
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
      raise ValueError(f'{entry}={seed} must be a whole number from 0 on, below 2^32.')
  sharder = Sharder(make_mesh(**config.mesh, devices=devices), config.sharding.to_dict())
  world, labelers, template, ids = (text_side or tokens_and_texts)(config)
  for entry in ('prompt_length', 'response_length', 'row_length'):
    if config.data[entry] < 1:
      raise ValueError(f'data.{entry}={config.data[entry]} must be 1 or more.')
  if config.data.too_long not in encode.TOO_LONG:
    raise ValueError(f'data.too_long={config.data.too_long!r} is none of {encode.TOO_LONG}.')
  policy_model = model_config(config.model, ids, 'model')
  reward_model = model_config(config.reward_model or config.model, ids, 'reward_model')
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
               networks._replace(scalar=reward.scalar), world, labelers, template, ids, {})


def tokens_and_texts(config: ml_collections.ConfigDict) -> tuple:
  """(world, labelers, template, ids) of config.data.tokenizer."""
  if config.data.tokenizer == 'sandbox:':
    from alignjax import sandbox
    template = templates.of_words(sandbox.encode, sandbox.decode, sandbox.EOS_ID, sandbox.PAD_ID, sandbox.NEWLINE)
    return sandbox.World(config.world.seed), sandbox.Labelers(config.world.seed), template, range(len(sandbox.VOCAB))
  tokenizer = load_tokenizer(config.data.tokenizer)
  template = templates.make(tokenizer, config.data.template or 'plain', config.data.get('template_date'))
  return None, None, template, token_ids(tokenizer)


def for_stage(setup: Setup, name: str) -> Setup:
  """The setup with the policy's architecture that a stage asks for: its `model` entry changes config.model."""
  changes = setup.config.stages[name].get('model')
  if not changes:
    return setup
  model = model_config({**setup.config.model, **changes}, setup.ids, f'stages.{name}.model')
  setup.sharder.check_heads(model, f'stages.{name}.model')
  networks = transformer.make_networks(model, setup.sharder.constrain, setup.sharder.for_decoding)
  return setup._replace(policy_model=model, nets=networks._replace(scalar=setup.nets.scalar))


def load_tokenizer(name: str) -> Any:
  """The tokenizer of 'hf:FOLDER_OR_HUB_NAME' (the prefix may be left out)."""
  from transformers import AutoTokenizer
  folder = hub.folder_of(name.removeprefix('hf:'))
  hub.verify(folder, weights=False)
  try:
    return AutoTokenizer.from_pretrained(folder)
  except Exception as error:  # noqa: BLE001 damaged files raise what their readers raise, a bare Exception of tokenizers included
    raise ValueError(f'data.tokenizer={name!r}: no tokenizer can be read from {folder} '
                     f'({type(error).__name__}: {error}).') from error


def token_ids(tokenizer: Any) -> list[int]:
  """The ids that have a token, in order. Not 0 .. len(tokenizer) - 1: added tokens may leave holes before them."""
  return sorted(set(tokenizer.get_vocab().values()))


def model_config(spec: Mapping[str, Any], ids: Sequence[int], where: str) -> TransformerConfig:
  """TransformerConfig of a config entry; an unknown field is an error with the nearest known one.

  An entry source='hf:FOLDER_OR_HUB_NAME' takes the architecture of that checkpoint; the other entries change it.
  ids: those that have a token; what the model's vocabulary has beside them becomes its unused_ids.
  """
  fields = [f.name for f in dataclasses.fields(TransformerConfig)]
  for key in spec:
    if key not in (*fields, 'source'):
      near = difflib.get_close_matches(key, fields, 1)
      raise ValueError(f'{where}.{key} is no field of TransformerConfig.' + (f' Did you mean {near[0]!r}?' if near else ''))
  vocabulary = ids[-1] + 1
  spec = {'vocab_size': vocabulary, **spec}
  if source := spec.pop('source', None):
    name = source.removeprefix('hf:')
    declared, asked = hf.fields(name), spec.get('max_length')
    if asked is not None and (entry := hf.bound(name)):
      longest = declared['max_length']
      if asked > longest or entry == 'n_positions' and asked != longest:
        raise ValueError(f'{where}.max_length={asked}, but the checkpoint {source} has {entry}={longest} in its config.json' + (
            '; its table of positions has that length. ' if entry == 'n_positions' else
            ', and beyond that its layers would see less than ours. ') + f'Leave {where}.max_length out, or set it to {longest}.')
    spec = declared | {k: v for k, v in spec.items() if k != 'vocab_size'}
  if spec['vocab_size'] < vocabulary:
    raise ValueError(f'{where}{f".source={source!r}" if source else ""} has a vocabulary of {spec["vocab_size"]}, data.tokenizer '
                     f'one of {vocabulary}; they do not belong together.')
  spec.setdefault('unused_ids', ranges_without(ids, spec['vocab_size']))
  missing = [f.name for f in dataclasses.fields(TransformerConfig) if f.default is f.default_factory is dataclasses.MISSING
             and f.name not in spec]
  if missing:
    raise ValueError(f'{where} lacks {", ".join(missing)}; or {where}.source names a checkpoint that has them.')
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
  setup.read.update(inputs.of_weights(spec))
  model = setup.policy_model if head == 'lm' else setup.reward_model
  key = jax.random.fold_in(jax.random.key(setup.config.seed), seed)
  fresh = lambda head: jax.eval_shape(lambda: transformer.init(model, key, head))
  if spec == 'random':
    return jax.jit(lambda: transformer.init(model, key, head), out_shardings=setup.sharder.params(fresh(head)))()
  if spec.startswith('hf:'):
    if head == 'scalar':
      hf.check_end_scored(spec.removeprefix('hf:'), setup.template.end)
    return hf.load(spec.removeprefix('hf:'), model, head, setup.sharder.params, key)
  folder = inputs.weights_folder(setup.workdir, spec)
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
  """Weights of a frozen network, in the dtype that its every use casts them to."""
  return as_used(params, model.dtype)


def make_optimizer(config: Mapping[str, Any], steps: int, where: str) -> optax.GradientTransformation:
  """config.{policy, value, reward} -> one transformation; each is dict(fn='module:name', ...)."""
  made = {}
  for name, spec in config.items():
    try:
      made[name] = plugins.bind(spec, f'{where}.optimizer.{name}', given=('steps',))(steps=max(steps, 1))
    except TypeError as error:  # a coefficient of the wrong kind
      raise ValueError(f'{where}.optimizer.{name}: {spec["fn"]} does not take {_entries(spec)} ({error}).') from error
  return optim.make(made)


def _entries(spec: Mapping[str, Any]) -> str:
  return ', '.join(f'{k}={v!r}' for k, v in spec.items() if k != 'fn')


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


# keywords that the stage passes itself
GIVEN = dict(loss=('nets',), reward=('nets', 'frozen'), advantage=())


def check_functions(config: Mapping[str, Any], where: str, facts: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> None:
  """Binds every function that a stage's config names, so that a wrong name or coefficient fails before any stage runs.

  facts: by entry ('loss', 'reward', 'advantage') what the stage knows and passes (plugins.bind).
  """
  for entry, given in GIVEN.items():
    if entry in config:
      plugins.bind(config[entry], f'{where}.{entry}', given=given, facts=facts.get(entry, {}))
      if 'function' in config[entry]:  # of alignjax.rewards:reward
        plugins.find(config[entry]['function'], f'{where}.{entry}.function')
  make_optimizer(config.optimizer, 10**9, where)


def check_divides(size: int, parts: int, what: str) -> None:
  if parts < 1 or size % parts:
    raise ValueError(f'{what}: {size} does not divide by {parts}.')


def check_epochs(epochs: Any, where: str, whole: bool = False) -> None:
  """epochs: 0 is no step, so that the stage's result is what it starts from."""
  if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or not 0 <= epochs < math.inf or (whole and epochs % 1):
    raise ValueError(f'{where}.epochs={epochs!r} must be a {"whole " if whole else ""}number, 0 or more.')


def check_counts(setup: Setup, where: str, kind: str, least: int = 1, **counts: Any) -> None:
  """counts: entries of a stage that say how many records of data.<kind> it takes. None is all of them, where the source ends."""
  endless = setup.config.data[kind] == 'sandbox:'
  none = f"; None, all of them, has no meaning with data.{kind}='sandbox:', which makes as many as it is asked for"
  for entry, count in counts.items():
    if not entries.whole(least, none=not endless)(count):
      more = none if endless else ', or None for all'
      raise ValueError(f'{where}.{entry}={count!r} must be a whole number, {least} or more{more}.')


def steps_per_epoch(rows: int, batch_size: int, epochs: float) -> int:
  """Steps that see every row `epochs` times. 100 rows 1.1 times are 110, though the product of the floats is a bit more."""
  return math.ceil(round(rows * epochs / batch_size, 6))


def stage_key(setup: Setup, stage: str) -> jax.Array:
  """The random key of a stage; each step folds its number in."""
  return jax.random.fold_in(jax.random.key(setup.config.seed), seed_of(stage))


def seed_of(name: str) -> int:
  """A stable 31-bit number of a name, to keep the random streams of stages apart."""
  return zlib.crc32(name.encode()) & 0x7FFFFFFF
