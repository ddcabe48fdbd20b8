"""The config that lies beside the checkpoints of a run, compared with the one that goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax

from alignjax import plugins
from alignjax.runtime import files


class Mismatch(ValueError):
  """The folder was written with another config."""


def check(path: files.Folder, config: Mapping[str, Any]) -> None:
  """Compares a config with the one in a file, which is written where it is missing.

  Raises:
    Mismatch: entries differ; the message names them.
    ValueError: the file cannot be read.
  """
  config = json.loads(json.dumps(config))
  if not path.exists():
    if jax.process_index() == 0:
      path.parent.mkdir(parents=True, exist_ok=True)
      files.write(path, json.dumps(config, indent=2))
    return
  try:
    old = _flat(plugins.current_names(json.loads(path.read_text())))
  except ValueError as error:
    raise ValueError(
      f'{path} cannot be read ({error}). Delete it if you are sure that the config is the same.'
    ) from None
  new, absent = _flat(plugins.current_names(config)), '(absent)'
  wrong = [
    f'  {k}: {old.get(k, absent)!r} -> {new.get(k, absent)!r}'
    for k in sorted(old.keys() | new.keys())
    if old.get(k, absent) != new.get(k, absent)
  ]
  if wrong:
    raise Mismatch(
      f'{path.parent} was written with another config:\n'
      + '\n'.join(wrong[:20])
      + '\nUse another --workdir, set the old values, or delete the folder.'
    )


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  """{'data': {'heldout': 1}} -> {'data.heldout': 1}."""
  if isinstance(tree, dict):
    return {
      k: v for name, child in tree.items() for k, v in _flat(child, f'{prefix}{name}.').items()
    }
  return {prefix.rstrip('.'): tree}
