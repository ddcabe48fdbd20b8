"""Short names for contents: weights, files, values, and the source of functions. Results that are
stored for later use are stored under the fingerprints of everything that made them, so that no
result is served for another thing of the same name."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import pathlib
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from alignjax import plugins
from alignjax.runtime import files
from alignjax.runtime.versions import VERSIONS

LENGTH = 16  # hexadecimal digits
# A file that was changed more recently may change again without a change of its times.
SETTLED_SECONDS = 3


def of_value(value: Any) -> str:
  """The fingerprint of JSON values. The order of the entries of an object does not count."""
  return hashlib.sha256(
    json.dumps(value, sort_keys=True, ensure_ascii=False).encode('utf-8', 'surrogatepass')
  ).hexdigest()[:LENGTH]


def is_of_config(fingerprint: str, config: Any) -> bool:
  """Whether it is the fingerprint of this config, under the present names of alignjax's functions
  or under those of version 0.1.0."""
  forms = config, plugins.current_names(config), plugins.earlier_names(config)
  return fingerprint in map(of_value, forms)


def of_params(params: Any) -> str:
  """The fingerprint of a tree of arrays: names, shapes, dtypes and bits. Every process has to call
  it, and all get the same."""
  import jax  # The server of labelers needs the other fingerprints, and starts without jax.

  from alignjax.sharding import fetch

  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = fetch(leaf)
    digest.update(f'{jax.tree_util.keystr(path)}{array.shape}{array.dtype}'.encode())
    digest.update(np.ascontiguousarray(array).view(np.uint8).data)
  return digest.hexdigest()[:LENGTH]


def of_files(paths: Iterable[str | os.PathLike], known: dict[str, list] | None = None) -> str:
  """The fingerprint of the contents of files, local or in a bucket, in the given order.

  Args:
    paths: files; a folder stands for all files in it.
    known: {path: [size, times, hash]} of files that were read before. They are trusted while size
      and times are the same, and new ones are added.

  Raises:
    FileNotFoundError: with the name of the missing file.
  """
  digest = hashlib.sha256()
  for name in paths:
    path = files.folder(name)
    if not path.exists():
      raise FileNotFoundError(f'{name}: no such file or folder.')
    for file in sorted(p for p in path.rglob('*') if p.is_file()) if path.is_dir() else [path]:
      digest.update(_of_file(file, {} if known is None else known))
  return digest.hexdigest()[:LENGTH]


def _of_file(path: files.Folder, known: dict[str, list]) -> bytes:
  if files.is_bucket(path):
    stat = path.stat()
    state, changed = [stat.length, stat.mtime], stat.mtime
  else:
    blob = path.resolve()
    # The cache of the hub names large files by their hash.
    if blob.parent.name == 'blobs' and len(blob.name) == 64:
      return bytes.fromhex(blob.name)
    path, stat = blob, os.stat(blob)
    state, changed = (
      [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns],
      max(stat.st_mtime_ns, stat.st_ctime_ns) / 1e9,
    )
  name = os.fspath(path)
  if name in known and known[name][:-1] == state:
    return bytes.fromhex(known[name][-1])
  if files.is_bucket(path):
    hashed = hashlib.sha256()
    with path.open('rb') as file:
      while part := file.read(1 << 20):
        hashed.update(part)
    digest = hashed.digest()
  else:
    with open(name, 'rb') as file:
      digest = hashlib.file_digest(file, 'sha256').digest()
  if time.time() - changed > SETTLED_SECONDS:
    known[name] = [*state, digest.hex()]
  return digest


def known(folder: files.Folder) -> dict[str, list]:
  """FOLDER/hashed.json: the hashes of files that were read before (of_files), in a workdir or in
  the cache of encoded records. It only saves time, so that a damaged one counts as empty."""
  try:
    found = json.loads((folder / 'hashed.json').read_bytes())
    return {k: v for k, v in found.items() if isinstance(v, list)}
  except (ValueError, OSError, AttributeError):
    return {}


def remember(folder: files.Folder, hashes: dict[str, list]) -> None:
  """Adds hashes to FOLDER/hashed.json, if the folder exists."""
  old = known(folder)
  if any(old.get(path) != found for path, found in hashes.items()) and folder.exists():
    with contextlib.suppress(OSError):  # Another process may write it at the same time.
      files.write(folder / 'hashed.json', json.dumps(old | hashes))


def of_function(function: Callable, named: str = '') -> str:
  """The fingerprint of the source of a function: of its module, and of every module that this
  imports, directly or through others, at import or when it is called, except for the standard
  library and installed packages. Comments, docstrings and layout do not count.

  A user's function is known by the user's own modules alone, so that another version of alignjax
  leaves it as it is. A function of alignjax whose results are kept is known by its version
  (versions.py), so that it can be moved; any other one by its modules of alignjax.

  Args:
    function: the function, or a partial of one.
    named: the 'module:function' that it was found by, whose module counts too. Where that says
      `rule = partial(other, weight=0.5)`, or imports the function from elsewhere, the function
      itself knows only of the other module.
  """
  # The coefficients of a partial are values, not source.
  function = inspect.unwrap(getattr(function, 'func', function))
  module = function.__module__
  if version := VERSIONS.get(f'{module}:{getattr(function, "__qualname__", "")}'):
    return version
  ours = module.split('.')[0] == 'alignjax'
  source = inspect.getsourcefile(inspect.getmodule(function) or function)
  found: dict[str, str] = {}
  waiting = [(module, source)]
  if ':' in named:
    waiting.append((named.partition(':')[0], _origin(named.partition(':')[0])))
  while waiting:
    name, path = waiting.pop()
    counts = ours or name.split('.')[0] != 'alignjax'
    if path is None or path in found or not path.endswith('.py') or not counts or _installed(path):
      continue
    found[path], imported = _source(path, os.stat(path).st_mtime_ns, name)
    waiting += [(child, _origin(child)) for child in imported]
  return of_value([getattr(function, '__qualname__', str(function)), sorted(found.values())])


@functools.lru_cache(maxsize=4096)
def _source(path: str, changed: int, name: str) -> tuple[str, tuple[str, ...]]:
  """(fingerprint, names of the imported modules) of a module's file, which was last changed at
  `changed`."""
  del changed
  tree = ast.parse(pathlib.Path(path).read_bytes())
  imported: list[str] = []
  package = name if path.endswith('__init__.py') else name.rpartition('.')[0]
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      imported += [a.name for a in node.names]
    elif isinstance(node, ast.ImportFrom):
      above = package.split('.')[: len(package.split('.')) - node.level + 1] if node.level else []
      base = '.'.join([*above, *([node.module] if node.module else [])])
      imported += [base, *(f'{base}.{a.name}' for a in node.names)]
    body = getattr(node, 'body', None)
    if (
      isinstance(body, list)
      and body
      and isinstance(body[0], ast.Expr)
      and isinstance(body[0].value, ast.Constant)
      and (isinstance(body[0].value.value, str))
    ):
      body[0].value.value = ''  # a docstring
  return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:LENGTH], tuple(
    dict.fromkeys(imported)
  )


def _origin(name: str) -> str | None:
  """The file of a module, or None for a name that is no module, such as an imported function."""
  if name.split('.')[0] in sys.stdlib_module_names:
    return None
  try:
    spec = importlib.util.find_spec(name)
  except (ImportError, ValueError, AttributeError):
    return None
  return spec.origin if spec is not None else None


def _installed(path: str) -> bool:
  """Whether a file belongs to an installed package other than alignjax: of this environment, of the
  user, or of the system below this environment."""
  own = str(pathlib.Path(__file__).parent.parent)
  places = {sysconfig.get_path(p) for p in ('purelib', 'platlib', 'stdlib', 'platstdlib')}
  return not path.startswith(own) and (
    any(path.startswith(os.path.join(p, '')) for p in places)
    or not {'site-packages', 'dist-packages'}.isdisjoint(pathlib.PurePath(path).parts)
  )
