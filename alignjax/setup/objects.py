"""What the stages of a run share: the config, checked and turned into objects."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import jax
import ml_collections

from alignjax.data import encode
from alignjax.models import transformer
from alignjax.models.config import TransformerConfig
from alignjax.runtime import files
from alignjax.setup import inputs, texts
from alignjax.setup.models import policy_config, reward_config
from alignjax.setup.texts import Text
from alignjax.sharding import Sharder, make_mesh
from alignjax.types import Networks


class Setup(NamedTuple):
  """The objects that the config describes, shared by all stages of a run.

  Attributes:
    config: the whole config.
    workdir: the folder of the run.
    sharder: of the mesh and the rules of the config.
    policy_model, reward_model: the two architectures, which may differ.
    nets: logits, logprobs and decoder of the policy's architecture, and scalar of the reward
      model's.
    text: converts text to tokens and back; in the sandbox it also has the world and the labelers.
    read: the sources, checkpoints and functions that were read so far (setup/inputs.py).
  """

  config: ml_collections.ConfigDict
  workdir: files.Folder
  sharder: Sharder
  policy_model: TransformerConfig
  reward_model: TransformerConfig
  nets: Networks
  text: Text
  read: inputs.Read

  @property
  def prompt_length(self) -> int:
    """The tokens of a prompt, including its padding."""
    return self.config.data.prompt_length

  @property
  def response_length(self) -> int:
    """The tokens of a response, including its padding."""
    return self.config.data.response_length

  @property
  def length(self) -> int:
    """The tokens of a prompt and its response."""
    return self.prompt_length + self.response_length


def make_setup(
  config: ml_collections.ConfigDict,
  workdir: str | files.Folder,
  devices=None,
  text: Text | None = None,
) -> Setup:
  """Checks the shared part of the config and builds what it names. It fails before anything is
  compiled.

  Args:
    config: the whole config.
    workdir: the folder of the run.
    devices: of the mesh; None takes all.
    text: replaces that of the config where no text is read (stages/abstract.py).
  """
  for entry, seed in (('seed', config.seed), ('world.seed', config.world.get('seed', 0))):
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
      raise ValueError(f'{entry}={seed} must be a whole number from 0 on, below 2^32.')
  sharder = Sharder(make_mesh(**config.mesh, devices=devices), config.sharding.to_dict())
  text = texts.of_config(config) if text is None else text
  for entry in ('prompt_length', 'response_length', 'row_length'):
    if config.data[entry] < 1:
      raise ValueError(f'data.{entry}={config.data[entry]} must be 1 or more.')
  if config.data.too_long not in encode.TOO_LONG:
    raise ValueError(f'data.too_long={config.data.too_long!r} is none of {encode.TOO_LONG}.')
  policy_model, reward_model = policy_config(config, text.ids), reward_config(config, text.ids)
  length = config.data.prompt_length + config.data.response_length
  for name, model in (('model', policy_model), ('reward_model', reward_model)):
    sharder.check_heads(model, name)
    needed = max(length, config.data.row_length)
    if needed > model.max_length:
      raise ValueError(
        f'{name}.max_length={model.max_length} is shorter than the {needed} tokens that '
        'data.prompt_length + data.response_length, or data.row_length, ask for.'
      )
  policy = transformer.make_networks(
    policy_model, sharder.constrain, sharder.for_decoding, sharder.platform
  )
  reward = transformer.make_networks(
    reward_model, sharder.constrain, sharder.for_decoding, sharder.platform
  )
  return Setup(
    config=config,
    workdir=files.folder(workdir),
    sharder=sharder,
    policy_model=policy_model,
    reward_model=reward_model,
    nets=policy._replace(scalar=reward.scalar),
    text=text,
    read={},
  )


def for_stage(setup: Setup, name: str) -> Setup:
  """The setup with the policy's architecture that a stage asks for: its `model` entry changes
  config.model."""
  if not setup.config.stages[name].get('model'):
    return setup
  model = policy_config(setup.config, setup.text.ids, name)
  setup.sharder.check_heads(model, f'stages.{name}.model')
  networks = transformer.make_networks(
    model, setup.sharder.constrain, setup.sharder.for_decoding, setup.sharder.platform
  )
  return setup._replace(policy_model=model, nets=networks._replace(scalar=setup.nets.scalar))


def stage_dir(setup: Setup, name: str) -> files.Folder:
  """The folder of a stage of this run."""
  return setup.workdir / name


def stage_key(setup: Setup, stage: str) -> jax.Array:
  """The random key of a stage; each step folds its number in."""
  return jax.random.fold_in(jax.random.key(setup.config.seed), seed_of(stage))


def seed_of(name: str) -> int:
  """A stable 31-bit number of a name, which keeps the random streams of stages apart."""
  return zlib.crc32(name.encode()) & 0x7FFFFFFF
