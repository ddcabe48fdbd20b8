"""What a stage trains and what it keeps frozen, with or without adapters.

Without an entry `lora`, or with rank 0, a stage trains all parameters of the networks that its
init names. With

    c.stages.sft.lora = dict(rank=16, alpha=32.0, targets=(), quantization=None)     (lora.LoRA)

it trains adapters, and what they belong to, the base, is frozen and kept in the dtype of the
computation, or in 8 or 4 bits with quantization='int8' or 'nf4'. The result of such a stage holds
its adapters and the name of the base. A later stage with the same entry goes on with these adapters
and with the same base, so that policy, reference, value and reward model can share one copy of it:
the reference is then the base with the adapters that the policy starts with. With another entry, or
none, what a stage starts from is merged first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from alignjax.models import lora, quantized, transformer
from alignjax.runtime import checkpoint, files
from alignjax.setup import inputs
from alignjax.setup.objects import Setup
from alignjax.setup.weights import (
  adapter_shapes,
  freeze,
  initial_params,
  load_adapters,
  param_shapes,
  peft_adapters,
  placed,
  saved_adapters,
)
from alignjax.types import Networks, Params


class Parts(NamedTuple):
  """The networks of a stage.

  Attributes:
    params: {role: what is trained}, whole parameters or adapters.
    frozen: {role: what no update changes}, and {'base': {'lm', 'scalar' or 'shared': whole
      parameters}} where there are adapters (lora.networks).
    info: {role: what the result of the stage says about its adapters}; a stage's finish returns it
      with its own info.
  """

  params: dict[str, Params]
  frozen: dict[str, Params]
  info: dict[str, dict[str, Any]]


class Origin(NamedTuple):
  """What a role starts from.

  Attributes:
    base: a spec of weights.initial_params, as results keep it (_lasting).
    adapters: the tree of adapters to go on with, or None.
    scale: of their products A B.
    quantization: of the base that they were trained on.
  """

  base: str
  adapters: Params | None = None
  scale: float = 1.0
  quantization: str | None = None


def declared(setup: Setup, name: str) -> lora.LoRA | None:
  """The adapters that a stage of the config trains, or None."""
  return lora.declared(setup.config.stages[name].get('lora'), f'stages.{name}.lora')


def used(setup: Setup, name: str) -> bool:
  """Whether a stage trains adapters alone."""
  return declared(setup, name) is not None


def networks(setup: Setup, name: str, frozen: Mapping[str, Params] | None) -> Networks:
  """The networks of a stage, for its params and for what is frozen."""
  own = declared(setup, name)
  return setup.nets if own is None else lora.networks(setup.nets, (frozen or {})['base'], own.scale)


def check(setup: Setup, name: str, trained: Mapping[str, str]) -> None:
  """Raises ValueError for an entry `lora` that cannot be. trained: {role: head}."""
  own = declared(setup, name)
  if own is None:
    return
  for role, head in trained.items():
    if setup.config.stages[name].init[role] == 'random':
      raise ValueError(
        f"stages.{name}.init.{role}='random' has no base that stages.{name}.lora could be added "
        f'to: name a checkpoint or a stage, or leave lora out.'
      )
    model = _model(setup, head)
    try:
      adapter_shapes(own, model, head)
      _frozen_base(setup, own, param_shapes(model, head, setup.sharder), model)
    except ValueError as error:
      raise ValueError(f'stages.{name}.{error}') from None


def load(
  setup: Setup,
  name: str,
  trained: Mapping[str, str],
  frozen: Mapping[str, str],
  seed: Callable[[str], int],
) -> Parts:
  """The networks that a stage starts with.

  Args:
    setup, name: the stage, whose config names the weights of each role under `init`.
    trained, frozen: {role: head}, 'lm' or 'scalar'.
    seed: role -> the seed of a fresh head.
  """
  own, init = declared(setup, name), setup.config.stages[name].init

  def whole(role, head):
    return initial_params(setup, init[role], head, seed(role))

  def still(role, head):
    return freeze(whole(role, head), _model(setup, head))

  if own is None:
    return Parts(
      {role: whole(role, head) for role, head in trained.items()},
      {role: still(role, head) for role, head in frozen.items()},
      {},
    )
  origins = {
    role: _origin(setup, init[role], own, head) for role, head in {**trained, **frozen}.items()
  }
  named = {head: origins[role].base for role, head in trained.items()}
  of_base = {head: seed(role) for role, head in trained.items()}
  if _shared(setup, named):
    bases = {'shared': initial_params(setup, named['lm'], 'lm', of_base['lm'])}
  else:
    bases = {head: initial_params(setup, spec, head, of_base[head]) for head, spec in named.items()}

  def adapters(role, head):
    final = bases.get(head, {}).get('final')
    return _adapters(setup, own, origins[role], head, seed(role), final, role in trained)

  # Frozen adapters stay in float32: rounded before they are multiplied by the scale, they would
  # not be exactly those that the policy starts with.
  params = {role: adapters(role, head) for role, head in trained.items()}

  def on_base(role, head):
    # What was not trained on codes stays as it is: a reward model scores as it did when it was
    # measured. The reference has to be the function that the policy starts as.
    as_measured = head == 'scalar' and origins[role].quantization != own.quantization
    return not as_measured and origins[role].base == named.get(head)

  rest = {
    role: (adapters if on_base(role, head) else still)(role, head) for role, head in frozen.items()
  }
  info = {role: {'lora': own._asdict() | {'base': origins[role].base}} for role in trained}
  models = {head: _model(setup, head) for head in ('lm', 'scalar')} | {'shared': setup.policy_model}
  kept = {key: _frozen_base(setup, own, tree, models[key]) for key, tree in bases.items()}
  return Parts(params, rest | {'base': kept}, info)


def shapes(setup: Setup, name: str, trained: Mapping[str, str], frozen: Mapping[str, str]) -> Parts:
  """`load` as shapes, without weights: one base for each head, or one for both where their
  architectures are the same."""
  own = declared(setup, name)

  def whole(head):
    return param_shapes(_model(setup, head), head, setup.sharder)

  def still(head):
    return freeze(whole(head), _model(setup, head))

  if own is None:
    return Parts(
      {role: whole(head) for role, head in trained.items()},
      {role: still(head) for role, head in frozen.items()},
      {},
    )
  heads = dict.fromkeys(trained.values())
  names = {'shared': 'lm'} if _shared(setup, heads) else {head: head for head in heads}
  bases = {
    key: _frozen_base(setup, own, whole(head), _model(setup, head)) for key, head in names.items()
  }

  def adapters(head):
    return placed(adapter_shapes(own, _model(setup, head), head), setup.sharder)

  return Parts(
    {role: adapters(head) for role, head in trained.items()},
    {role: adapters(head) for role, head in frozen.items()} | {'base': bases},
    {},
  )


def whole(
  setup: Setup, name: str, head: str, params: Params, frozen: Mapping[str, Params]
) -> Params:
  """The params of a role as setup.nets read them: adapters are joined with their base. Nothing is
  copied."""
  own = declared(setup, name)
  if own is None:
    return params
  return lora.join(lora.base_of(frozen['base'], head), params, own.scale)


def _frozen_base(setup: Setup, own: lora.LoRA, params: Params, model) -> Params:
  """What adapters belong to, as it is kept while they are trained. params: float32, or shapes."""
  kind = own.quantization
  if kind is None:
    return freeze(params, model)

  def kept(params):
    return freeze(quantized.quantize(params, kind), model)

  shapes = placed(jax.eval_shape(kept, params), setup.sharder)
  if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
    return shapes
  return jax.jit(kept, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(params)


def _model(setup: Setup, head: str):
  return setup.policy_model if head == 'lm' else setup.reward_model


def _shared(setup: Setup, named: Mapping[str, Any]) -> bool:
  """Whether the two heads have one base. named: {head: its base}."""
  if len(named) < 2 or len(set(named.values())) > 1:
    return False
  key = jax.random.key(0)
  policy, reward = (
    jax.eval_shape(lambda model=model: transformer.init(model, key, 'lm'))
    for model in (setup.policy_model, setup.reward_model)
  )
  return policy == reward


def _origin(setup: Setup, spec: str, own: lora.LoRA, head: str) -> Origin:
  model = _model(setup, head)
  wanted = adapter_shapes(own, model, 'lm')

  def alike(other):
    try:
      return adapter_shapes(other, model, 'lm') == wanted
    except ValueError:  # A projection has a smaller side than their rank, as peft allows.
      return False

  if spec.startswith('peft:'):
    saved, tree, base = peft_adapters(spec, model, head)
    if alike(saved):
      setup.read.update(inputs.of_weights(spec))
      return Origin(base, tree, saved.scale)
  elif not spec.startswith('hf:'):
    folder = inputs.weights_folder(setup.workdir, spec)
    saved, base = saved_adapters(folder) if checkpoint.is_finished(folder) else (None, '')
    if saved is not None and alike(saved) and saved.quantization == own.quantization:
      found = checkpoint.load_info(folder)['head']
      if found == 'scalar' and head == 'lm':
        raise ValueError(f'{spec!r} is a reward model; a policy cannot start from it.')
      setup.read.update(inputs.of_weights(spec))
      tree = load_adapters(folder, saved, model, found, setup.sharder)
      return Origin(_lasting(setup, base), tree, saved.scale, saved.quantization)
  return Origin(_lasting(setup, spec))


def _lasting(setup: Setup, spec: str) -> str:
  """The same weights by a name that results can keep: 'stage:NAME' for a folder of this workdir, so
  that a moved workdir still finds it, and any other folder, also one of peft, from the root."""
  if spec == 'random' or spec.startswith(('hf:', 'stage:')):
    return spec
  if spec.startswith('peft:'):
    folder = files.absolute(spec.removeprefix('peft:'))
    return f'peft:{folder}' if folder.is_dir() else spec  # Or it is a name on the hub.
  folder = files.absolute(spec)
  of_this_run = folder.name == 'final' and folder.parent.parent == files.absolute(setup.workdir)
  return f'stage:{folder.parent.name}' if of_this_run else str(folder)


def _adapters(
  setup: Setup,
  own: lora.LoRA,
  origin: Origin,
  head: str,
  seed: int,
  final: Params | None,
  trained: bool,
) -> Params:
  """The adapters of a role in float32, on their shardings: those that it starts from, or fresh
  ones. A frozen role that starts from none is the base itself.

  Args:
    setup, own, origin, head: of the role.
    seed: of fresh adapters and of a fresh scalar head.
    final: that of the base, with its scalar head where it was loaded with one.
    trained: whether the stage trains them.
  """
  model = _model(setup, head)
  key = jax.random.fold_in(jax.random.key(setup.config.seed), seed)
  wanted = placed(adapter_shapes(own, model, head), setup.sharder)
  shardings = jax.tree.map(lambda x: x.sharding, wanted)
  made: Params = {}
  if origin.adapters is not None:
    made = lora.rescaled(origin.adapters, origin.scale / own.scale)
    made = jax.device_put(made, {part: shardings[part] for part in made})
  elif trained:
    shapes = jax.eval_shape(lambda: transformer.init(model, key, head))
    made = jax.jit(
      lambda: lora.init(own, shapes, key), out_shardings={'layers': shardings['layers']}
    )()
  if head == 'scalar' and 'final' not in made:
    score = (final or {}).get('score') or transformer.init_head(model, key)
    made = made | {'final': {'score': jax.device_put(score, shardings['final']['score'])}}
  return made
