"""What a stage was made from: a fingerprint of every source, checkpoint, tokenizer and user's
function that it read, and of the weights that it started from.

While a stage is built and finished, it notes what it reads (`Setup.read`: entry -> (kind, name)).
The notes and their fingerprints are in WORKDIR/STAGE/inputs.json for as long as there are
checkpoints, and in final/info.json for the result. Before a stage's folder is used again, all are
compared with what the same names stand for now. A difference is an error before anything is
compiled, or what --on_changed_input says. Nothing is therefore made from two versions of a thing,
and a stage whose ancestor was trained again is done again.
"""

from __future__ import annotations

import glob
import importlib.util
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from alignjax import plugins
from alignjax.data import sources
from alignjax.models import hf, hub, peft
from alignjax.runtime import checkpoint, files, fingerprints, metrics, saved_config

CHOICES = ('fail', 'keep', 'restart')
TOKENIZER = (
  'tokenizer*',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab*',
  'merges.txt',
  '*.model',
  'chat_template*',
  # The files of a checkpoint that decide its tokens.
  '*.jinja',
  'additional_chat_templates/*',
)
NO_MODULES = ('alignjax', 'stage', 'hf', 'peft', 'jsonl', 'text', 'tfds')  # of users
Read = dict[str, tuple[str, str]]


class ChangedInput(ValueError):
  """Something that a stage was made from has changed."""


# ---- what is read


def of_config(config: Any, stage: str) -> Read:
  """What every stage reads: the tokenizer, the architecture, and the functions that its config
  names."""
  found: Read = {}
  tokenizer = config.data.get('tokenizer')
  if tokenizer and tokenizer != 'sandbox:':
    found['data.tokenizer'] = ('tokenizer', tokenizer)
  own = config.stages[stage].to_dict()
  for entry, model in (
    ('model', config.model),
    ('reward_model', config.reward_model),
    (f'stages.{stage}.model', own.get('model')),
  ):
    if model and model.get('source'):
      found[f'{entry}.source'] = ('architecture', model['source'])
  for path, text in _strings(own, f'stages.{stage}'):
    if is_function(text):
      found[path] = ('function', text)
  return found


def of_data(entry: str, source: str, mapping: str | None) -> Read:
  """A source of records, and the functions of its mapping."""
  found: Read = {entry: ('data', source)}
  for i, name in enumerate((mapping or '').split(';')):
    function = name.split(',')[0].strip()  # renames may follow it
    if is_function(function):
      found[f'{entry}, mapping {i + 1}'] = ('function', function)
    if mapping and _reads_beside(name.strip()):
      found[f'{entry}, beside it'] = ('beside', source)
  return found


def of_weights(spec: str) -> Read:
  """What initial_params (setup/weights.py) starts from."""
  if spec == 'random':
    return {}
  kind = {'hf': 'checkpoint', 'peft': 'adapters'}.get(spec.partition(':')[0], 'weights')
  return {spec: (kind, spec)}


def is_function(text: str) -> bool:
  """Whether a text is a user's 'module:function'. Those of alignjax may change during a run."""
  found = re.fullmatch(r'([A-Za-z_][\w.]*):[A-Za-z_]\w*', text)
  if not found or found[1].split('.')[0] in NO_MODULES:
    return False
  try:
    return importlib.util.find_spec(found[1]) is not None
  except (ImportError, ValueError, AttributeError):
    return False


def _reads_beside(mapping: str) -> bool:
  from alignjax.data import mappings

  function = mappings.find(mapping, 'mapping') if mapping else None
  return function is not None and 'beside' in inspect.signature(function).parameters


def _strings(tree: Any, path: str) -> Iterator[tuple[str, str]]:
  if isinstance(tree, Mapping):
    for key, child in tree.items():
      yield from _strings(child, f'{path}.{key}')
  elif isinstance(tree, (list, tuple)):
    for i, child in enumerate(tree):
      yield from _strings(child, f'{path}[{i}]')
  elif isinstance(tree, str):
    yield path, tree


# ---- fingerprints


def fingerprint(kind: str, name: str, workdir: files.Folder, known: dict[str, list]) -> str:
  """The fingerprint of what a name stands for now.

  Args:
    kind, name: of the input, as in `Setup.read`.
    workdir: the folder of the run.
    known: hashes of files by path, size and times (fingerprints.of_files), so that nothing is read
      twice.

  Raises:
    FileNotFoundError, ValueError: there is no such thing.
  """
  if kind == 'function':
    return fingerprints.of_function(plugins.find(name, 'function'), name)
  if kind == 'weights':
    return checkpoint.weights(weights_folder(workdir, name))
  if kind in ('data', 'beside'):
    return fingerprints.of_value(
      [_of_source(part, kind == 'beside', known) for part in sources.split(name)]
    )
  folder = hub.folder_of(name.removeprefix('hf:').removeprefix('peft:'))
  patterns = {
    'tokenizer': ('config.json', *TOKENIZER),
    'architecture': ('config.json',),
    'checkpoint': ('config.json',),
    'adapters': (peft.CONFIG, peft.TENSORS),
  }[kind]
  paths = sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()})
  names = [p.relative_to(folder).as_posix() for p in paths]
  return fingerprints.of_value(
    [
      names,
      fingerprints.of_files([*paths, *(_tensors(folder) if kind == 'checkpoint' else ())], known),
    ]
  )


def weights_folder(workdir: files.Folder, spec: str) -> files.Folder:
  """The folder of the weights that 'stage:NAME' or a path names."""
  return (
    workdir / spec.removeprefix('stage:') / 'final'
    if spec.startswith('stage:')
    else files.folder(spec)
  )


def _of_source(source: str, beside: bool, known: dict[str, list]) -> str:
  form, _, rest = source.partition(':')
  # The name is without its split.
  name = re.sub(r'\[[^\]]*\]', '', rest).rpartition(':')[0] if form in ('hf', 'tfds') else rest
  if form == 'text' and '*' in name and not files.is_bucket(files.folder(name)):
    paths = sorted(glob.glob(os.path.expanduser(name)))
  elif form in ('jsonl', 'text') or files.folder(name).is_dir():
    paths = [name]
  else:
    return fingerprints.of_value(source)  # A data set of a hub is known by its name.
  if beside:
    return fingerprints.of_files(
      sorted(p for p in files.folder(paths[0]).parent.glob('*') if p.is_file()), known
    )
  return fingerprints.of_files(paths, known)


def _tensors(folder: Any) -> list:
  """The files that a checkpoint's weights are read from, and their index."""
  paths = hf.weight_files(folder)
  index = folder / hf.INDEX
  return [*paths, *([index] if len(paths) > 1 and index.exists() else [])]


# ---- records


def record(
  workdir: files.Folder, stage: str, config: Mapping[str, Any], read: Read
) -> dict[str, Any]:
  """Adds what was read to WORKDIR/STAGE/inputs.json and returns its contents.

  They are {'origin', 'config', 'inputs': {entry: {'kind', 'name', 'fingerprint'}}}. The origin is
  the fingerprint of the config and of what had been read when the stage was built. It names the
  training that candidates and result belong to.
  """
  path = workdir / stage / 'inputs.json'
  known = fingerprints.known(workdir)
  made = {
    entry: dict(kind=kind, name=name, fingerprint=fingerprint(kind, name, workdir, known))
    for entry, (kind, name) in sorted(read.items())
  }
  fingerprints.remember(workdir, known)
  old = _load(path) if path.exists() else None
  inputs = old['inputs'] if old else {}
  if changed := [
    e for e in made if e in inputs and inputs[e]['fingerprint'] != made[e]['fingerprint']
  ]:
    raise ChangedInput(
      f'{stage}: {", ".join(changed)} changed while the stage read it. The same command says what '
      f'can be done.'
    )
  hashed = fingerprints.of_value(config)
  origin = (
    old['origin']
    if old
    else fingerprints.of_value([hashed, {e: r['fingerprint'] for e, r in made.items()}])
  )
  new = dict(origin=origin, config=hashed, inputs=inputs | made)
  if new != old:
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, new)
  return new


def _write(path: files.Folder, found: Mapping[str, Any]) -> None:
  files.write(path, json.dumps({**found, 'checksum': fingerprints.of_value(found)}, indent=2))


def _load(path: files.Folder) -> dict[str, Any]:
  try:
    found = json.loads(path.read_bytes())
    if found.pop('checksum') != fingerprints.of_value(found):
      raise ValueError('its checksum differs')
    return found
  except (ValueError, KeyError, AttributeError, OSError) as error:
    raise checkpoint.Damaged(
      f'{path} is damaged or missing ({error}): it says what the checkpoints beside it were made '
      f'from. Delete the folder {path.parent} to do the stage again.'
    ) from None


def check(
  workdir: files.Folder,
  stage: str,
  config: Mapping[str, Any],
  choice: str,
  say: Callable[[str], None],
) -> None:
  """Compares what a stage's folder was made from with what it would be made from now. Ancestors
  that are not finished yet are left out.

  Args:
    workdir: the folder of the run.
    stage: the name of the stage.
    config: the entries that decide its result (train.identity).
    choice: 'fail' raises; 'keep' takes the new contents for those that the folder was made from,
      but not the weights of other stages; 'restart' deletes the folder.
    say: prints a line.

  Raises:
    ChangedInput: with the inputs that have changed.
    saved_config.Mismatch: with the entries of the config that differ.
  """
  folder = workdir / stage
  finished = checkpoint.is_finished(folder / 'final')
  steps = folder / 'checkpoints' / 'steps'
  if not finished and not (steps.exists() and any(p.name.isdigit() for p in steps.iterdir())):
    return
  what = f'{folder} {"was made" if finished else "goes on"}'
  found = _noted(folder, finished)
  if found is None:
    _of_another_version(folder, choice)
    return
  _check_config(found, config, folder, what)
  if finished:
    now = logs(folder)
    wrong = [folder / name for name, was in found.get('logs', {}).items() if now.get(name) != was]
    if wrong:
      say(checkpoint.logs_changed(wrong, 'since the stage ended'))
  changes, gone = _changes(workdir, found['inputs'])
  if gone and finished:
    say(
      f'{stage}: reused, although this cannot be compared with what it was made from: '
      f'{"; ".join(gone)}'
    )
  if not changes:
    return
  lines = [_line(entry, found['inputs'][entry], now) for entry, now in changes.items()]
  has_weights = any(found['inputs'][entry]['kind'] == 'weights' for entry in changes)
  if choice == 'restart':
    say('\n'.join([f'{stage}: done again, as its inputs are others:', *lines]))
    files.remove(folder)
  elif choice == 'keep' and not has_weights:
    first = f'{stage}: kept, although its inputs are others (--on_changed_input=keep):'
    say('\n'.join([first, *lines]))
    _accept(changes, found, folder, finished)
  else:
    first = f'{what} from other inputs than those that are there now:'
    raise ChangedInput('\n'.join([first, *lines, _choose(folder, has_weights)]))


def _noted(folder: files.Folder, finished: bool) -> dict[str, Any] | None:
  """What `record` noted about a stage's folder; None for a finished one of another version, which
  noted nothing."""
  if finished:
    return checkpoint.load_info(folder / 'final').get('made')
  return _load(folder / 'inputs.json')


def _of_another_version(folder: files.Folder, choice: str) -> None:
  """What `choice` does to a finished stage that does not say what it was made from."""
  if choice == 'fail':
    raise ChangedInput(
      f'{folder} does not say what it was made from: another version of alignjax wrote it. '
      f'{_choose(folder)}'
    )
  if choice == 'restart':
    files.remove(folder)


def _check_config(
  found: Mapping[str, Any], config: Mapping[str, Any], folder: files.Folder, what: str
) -> None:
  """Raises saved_config.Mismatch where the folder was made with another config."""
  if fingerprints.is_of_config(found['config'], config):
    return
  if (folder / 'checkpoints' / 'config.json').exists():
    # This error names the entries.
    saved_config.check(folder / 'checkpoints' / 'config.json', config)
  raise saved_config.Mismatch(
    f'{what} with another config than this one. Use another --workdir, or delete the folder.'
  )


def _line(entry: str, was: Mapping[str, str], now: str) -> str:
  """A line of a message about an input that has changed."""
  name = f' ({was["name"]})' if was['name'] != entry else ''
  return f'  {entry}{name}: {was["fingerprint"]} then, {now} now'


def _accept(
  changes: Mapping[str, str], found: dict[str, Any], folder: files.Folder, finished: bool
) -> None:
  """Notes the present contents of the inputs as those that the folder was made from."""
  for entry, now in changes.items():
    found['inputs'][entry]['fingerprint'] = now
  if finished:
    checkpoint.save_made(folder / 'final', found)
  _write(folder / 'inputs.json', {k: found[k] for k in ('origin', 'config', 'inputs')})


def _changes(
  workdir: files.Folder, noted: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, str], list[str]]:
  """(entry -> present fingerprint, for inputs that have changed; the inputs that cannot be
  read)."""
  known, changes, gone = fingerprints.known(workdir), {}, []
  for entry, was in noted.items():
    if was['kind'] == 'weights' and not checkpoint.is_finished(
      weights_folder(workdir, was['name'])
    ):
      continue
    try:
      now = fingerprint(was['kind'], was['name'], workdir, known)
      if now != was['fingerprint'] and was['kind'] not in ('function', 'weights'):
        # A remembered hash is no proof of a change, so the files are read.
        now = fingerprint(was['kind'], was['name'], workdir, known := {})
    except checkpoint.Damaged:
      raise
    except (ValueError, OSError) as error:
      gone.append(f'{entry} ({error})')
      continue
    if now != was['fingerprint']:
      changes[entry] = now
  fingerprints.remember(workdir, known)
  return changes, gone


def logs(folder: files.Folder) -> dict[str, str]:
  """The fingerprints of the logs of a stage, which plots are drawn from."""
  paths = [folder / name for name in metrics.LOGS]
  return {p.name: fingerprints.of_files([p]) for p in paths if p.exists()}


def _choose(folder: files.Folder, weights: bool = False) -> str:
  keep = (
    'Weights of another stage cannot be kept apart from it.'
    if weights
    else '--on_changed_input=keep goes on with what is there and takes the new contents for the '
    'same.'
  )
  return (
    f'Choose: --on_changed_input=restart deletes {folder} and does the stage again. {keep} Or put '
    'back what was there, or use another --workdir.'
  )
