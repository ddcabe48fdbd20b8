"""The device mesh, and where arrays live on it. Logical axis names come from models/axes.py, and
the rules from the config:

    c.mesh = dict(data=None, fsdp=1, tensor=1, sequence=1)
    c.sharding = dict(batch=('data', 'fsdp'), embed=('fsdp', 'sequence'), heads='tensor',
                      kv_heads='tensor', mlp='tensor', vocab='tensor')

data=None takes the devices that the others leave. A logical axis that no rule names is replicated.
Activations have more axes, which need no rule:

    tokens, sequence   the tokens of a row, which mesh.sequence divides (models/sequence.py);
                       'sequence' are those of the residual stream between layers. With
                       mesh.sequence=1, sequence='tensor' divides what each layer stores for the
                       backward pass.
    rows               the rows of a batch that is sampled. A token that is sampled has no others to
                       divide, so that the devices of mesh.sequence take rows too.

Without any rule, every device would hold everything.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alignjax.models import attention
from alignjax.models.axes import logical_axes, logical_names, path_name
from alignjax.models.config import TransformerConfig
from alignjax.models.sequence import AXIS as SEQUENCE

AXES = ('data', 'fsdp', SEQUENCE, 'tensor')
RULES = dict(
  batch=('data', 'fsdp'),
  embed=('fsdp', SEQUENCE),
  heads='tensor',
  kv_heads='tensor',
  mlp='tensor',
  vocab='tensor',
)


def make_mesh(
  data: int | None = None, fsdp: int = 1, tensor: int = 1, sequence: int = 1, devices=None
) -> Mesh:
  """A mesh of axes (data, fsdp, sequence, tensor) over all devices.

  Whatever trains or uses a model begins here, and therefore jax's 64-bit mode is refused here:
  random draws, integers and parameters would have other types than programs and checkpoints
  declare.

  Args:
    data, fsdp, tensor, sequence: the sizes of the axes; data=None takes what the others leave.
    devices: None takes all.

  Raises:
    ValueError: the sizes do not fit the devices, or jax is in its 64-bit mode.
  """
  if jax.config.jax_enable_x64:
    raise ValueError(
      'jax is in its 64-bit mode (JAX_ENABLE_X64, or --jax_enable_x64), but alignjax computes in '
      'float32 and less. Unset JAX_ENABLE_X64.'
    )
  devices = jax.devices() if devices is None else devices
  rest = fsdp * tensor * sequence
  named = f'mesh.fsdp={fsdp} x mesh.tensor={tensor}'
  named += f' x mesh.sequence={sequence}' if sequence != 1 else ''
  if data is None:
    if len(devices) % rest:
      raise ValueError(f'{named} does not divide the {len(devices)} devices.')
    data = len(devices) // rest
  named = f'mesh.data={data} x {named}'
  if data * rest != len(devices):
    raise ValueError(f'{named} is {data * rest}, but there are {len(devices)} devices.')
  shape, kinds = (data, fsdp, sequence, tensor), (AxisType.Auto,) * 4
  try:
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)
  except NotImplementedError:
    pass  # No axes of the TPU slice have these sizes.
  try:
    laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  except NotImplementedError as error:
    raise ValueError(f'{named} cannot be laid over this slice: {error}') from None
  return Mesh(laid, AXES, axis_types=kinds)


class Sharder:
  """Turns logical axes into shardings of one mesh.

  Args:
    mesh: of make_mesh.
    rules: logical axis -> mesh axis, tuple of mesh axes, or None. 'table', the embedding's D, is as
      'embed' where no rule names it, and 'rows' are as 'batch' and over mesh.sequence too.

  Raises:
    ValueError: A rule names a logical axis that no array has, or a mesh axis that the mesh does not
      have; or the rules do not go with mesh.sequence.
  """

  def __init__(self, mesh: Mesh, rules: Mapping[str, Any] = RULES):
    self.mesh = mesh
    self.rules = {
      name: tuple(value) if isinstance(value, (list, tuple)) else value
      for name, value in rules.items()
    }
    self.rules.setdefault('table', self.rules.get('embed'))
    self.rules.setdefault('tokens', SEQUENCE)
    self.rules.setdefault('sequence', self.rules['tokens'])
    if self.rules.get('rows') is None:
      self.rules['rows'] = (*_as_tuple(self.rules.get('batch')), SEQUENCE)
    known = logical_names()
    for name, value in self.rules.items():
      if name not in known:
        near = difflib.get_close_matches(name, known, 1, cutoff=0)
        raise ValueError(
          f'sharding.{name}={value!r}: no array has a logical axis {name!r}; did you mean '
          f'{near[0]!r}? There are {", ".join(known)}. A network of your own adds its axes to '
          'models/axes.py.'
        )
      for axis in _as_tuple(value):
        if axis not in mesh.axis_names:
          raise ValueError(
            f'sharding.{name}={value!r} names {axis!r}, but the mesh has the axes '
            f'{mesh.axis_names}.'
          )
    self._check_sequence()

  def _check_sequence(self) -> None:
    parts = self.token_parts
    if parts == 1:
      return
    for name in ('tokens', 'sequence'):
      if _as_tuple(self.rules[name]) != (SEQUENCE,):
        raise ValueError(
          f'sharding.{name}={self.rules[name]!r} does not go with mesh.sequence={parts}, which '
          f"divides the tokens between layers and in them alike: set sharding.{name}='{SEQUENCE}', "
          'or mesh.sequence=1.'
        )
    for name in ('batch', 'heads', 'kv_heads', 'mlp', 'vocab'):
      if SEQUENCE in _as_tuple(self.rules.get(name)):
        raise ValueError(
          f'sharding.{name}={self.rules[name]!r} divides over {SEQUENCE!r} what mesh.sequence='
          f"{parts} divides by tokens there. It divides weights by sharding.embed=('fsdp', "
          f"'{SEQUENCE}')."
        )
    if not self._grouped:
      raise ValueError(
        f'sharding.heads={self.rules.get("heads")!r} and sharding.kv_heads='
        f'{self.rules.get("kv_heads")!r} have to be the same with mesh.sequence={parts}: each '
        'device gathers the keys of its own query heads.'
      )

  @property
  def _grouped(self) -> bool:
    return _as_tuple(self.rules.get('heads')) == _as_tuple(self.rules.get('kv_heads'))

  def sharding(self, *axes: str | None) -> NamedSharding:
    """The sharding of an array with these logical axes."""
    spec = [self.rules.get(axis) if axis else None for axis in axes]
    used = [axis for entry in spec for axis in _as_tuple(entry)]
    if len(used) != len(set(used)):
      raise ValueError(f'the axes {axes} use a mesh axis twice: {spec}; change the sharding rules.')
    return NamedSharding(self.mesh, PartitionSpec(*spec))

  @property
  def replicated(self) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def batch(self) -> NamedSharding:
    """The leading axis over the mesh axes of the batch, and the other axes replicated."""
    return self.sharding('batch')

  @property
  def batch_shards(self) -> int:
    """The number of devices that share the rows of a batch."""
    return self.parts('batch')

  @property
  def row_shards(self) -> int:
    """The number of devices that share the rows of a batch that is sampled."""
    return self.parts('rows')

  @property
  def token_parts(self) -> int:
    """The number of devices that share the tokens of a row."""
    return self.mesh.shape[SEQUENCE]

  def parts(self, axis: str) -> int:
    """The number of devices that share a logical axis."""
    return int(np.prod([self.mesh.shape[a] for a in _as_tuple(self.rules.get(axis))], initial=1))

  def check_heads(self, model: TransformerConfig, name: str = 'model') -> None:
    """Raises ValueError where the rules would cut a head: the columns of a kernel may divide where
    its heads do not."""
    for axis, count in (('heads', model.num_heads), ('kv_heads', model.kv_heads)):
      parts = self.parts(axis)
      if count % parts:
        raise ValueError(
          f'{name}: its {count} {axis} do not divide over the {parts} devices of mesh axis '
          f'{self.rules[axis]!r}; change the mesh or sharding.{axis}.'
        )

  def params(self, shapes: Any) -> Any:
    """The shardings of a parameter tree (arrays or shapes). Raises ValueError for an axis that does
    not divide; the message names the axis and the devices."""

    def one(path, leaf, axes):
      sharding = self.sharding(*axes)
      for size, axis, entry in zip(leaf.shape, axes, sharding.spec, strict=True):
        parts = int(np.prod([self.mesh.shape[a] for a in _as_tuple(entry)], initial=1))
        if size % parts:
          raise ValueError(
            f'parameter {path_name(path)} {leaf.shape}: its {axis!r} axis of {size} does not '
            f'divide over the {parts} devices of mesh axis {entry!r}; change the mesh or '
            f'sharding.{axis}.'
          )
      return sharding

    return jax.tree_util.tree_map_with_path(one, shapes, logical_axes(shapes))

  def state(self, shapes: Any, params_shapes: Any) -> Any:
    """The shardings of a whole TrainState of shapes. What has the path and shape of a parameter
    (optimizer moments, EMA) lives where that parameter does; everything else is replicated."""
    by_path = {
      path_name(p): (leaf.shape, s)
      for (p, leaf), s in zip(
        jax.tree_util.tree_leaves_with_path(params_shapes),
        jax.tree.leaves(self.params(params_shapes)),
        strict=True,
      )
    }

    def one(path, leaf):
      name = path_name(path)
      parts = name.split('/')
      # The longest suffix that is a parameter counts: opt_state/0/mu/policy/... -> policy/...
      for start in range(len(parts)):
        for key in ('/'.join(parts[start:]), '/'.join(['policy', *parts[start:]])):
          if key in by_path and by_path[key][0] == leaf.shape:
            return by_path[key][1]
      return self.replicated

    return jax.tree_util.tree_map_with_path(one, shapes)

  def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the sharding of an activation inside a compiled function."""
    return jax.lax.with_sharding_constraint(x, self.sharding(*axes))

  def per_device(self, function: Callable, inputs: tuple, output: tuple) -> Callable:
    """The function, applied to each device's part of its arguments.

    Args:
      function: arrays -> array. It must need nothing of the parts of other devices.
      inputs: the logical axes of each argument.
      output: the logical axes of the result.

    The result raises ValueError if the devices cannot divide the rows of its arguments equally.
    """
    mapped = jax.shard_map(
      function,
      mesh=self.mesh,
      in_specs=tuple(self.sharding(*axes).spec for axes in inputs),
      out_specs=self.sharding(*output).spec,
      check_vma=False,  # Kernels do not say along which mesh axes their results vary.
    )

    def run(*arrays):
      rows, parts = arrays[0].shape[0], self.parts(inputs[0][0])
      if rows % parts:
        raise ValueError(
          f'a fused attention kernel gets {rows} rows at a time, which the {parts} devices that '
          'share a batch cannot divide equally. Set fewer microbatches of the stage, more rows, or '
          "model.attention='reference'."
        )
      return mapped(*arrays)

    return run

  @property
  def machine(self) -> attention.Machine:
    """What networks have to know of the mesh to choose their kernels. It comes from the devices of
    the mesh, which need not be those of this process."""
    return attention.machine_of(
      self.mesh.devices.flat[0], self.per_device, self._grouped, self.token_parts
    )

  def for_decoding(self, params: Any) -> Any:
    """Pins the sharding of weights in the sampling loop: they are gathered over the axes of rows
    and tokens once, before the loop, and stay divided over the others. Otherwise sharded weights
    would be gathered again for every token (docs/pitfalls.md, 24)."""
    gathered = {*_as_tuple(self.rules.get('batch')), SEQUENCE}

    def keep(entry):
      return tuple(a for a in _as_tuple(entry) if a not in gathered) or None

    def one(leaf, sharding):
      spec = PartitionSpec(*(keep(entry) for entry in sharding.spec))
      return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))

    return jax.tree.map(one, params, self.params(params))

  def local(self, rows: np.ndarray) -> np.ndarray:
    """The rows of a batch that lie on devices of this process, in order: what it passes to `put`.
    Processes that share a part of the batch, because a tensor axis spans them, get the same rows.
    """
    if len(rows) % self.batch_shards:
      raise ValueError(
        f'a batch of {len(rows)} rows does not divide over the {self.batch_shards} devices that '
        f'share it.'
      )
    if jax.process_count() == 1:
      return rows
    parts = self.batch.addressable_devices_indices_map((len(rows),)).values()
    return rows[np.unique(np.concatenate([np.arange(len(rows))[part] for part in parts]))]

  def put(self, tree: Any) -> Any:
    """Host arrays -> global arrays whose leading axis is divided over the batch axes. Each process
    passes its own rows (`local`)."""
    if jax.process_count() == 1:
      return jax.device_put(tree, self.batch)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.batch, x), tree)

  def put_full(self, tree: Any) -> Any:
    """The same as `put`, for rows that every process has in full."""
    if jax.process_count() == 1:
      return jax.device_put(tree, self.batch)
    return jax.tree.map(
      lambda x: jax.make_array_from_callback(x.shape, self.batch, lambda index: x[index]), tree
    )


def sync(what: str) -> None:
  """Waits until all processes have come here, so that all can read what the first has written."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def fetch(tree: Any) -> Any:
  """Arrays -> whole numpy arrays on every process, whichever of them hold the parts. All processes
  have to call it."""

  def one(x):
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
      return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)

  return jax.tree.map(one, tree)


def _as_tuple(entry) -> tuple:
  if entry is None:
    return ()
  return tuple(entry) if isinstance(entry, (list, tuple)) else (entry,)
