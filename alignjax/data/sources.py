"""Reads records by the name of their source. A source of c.data.KIND is one of

  jsonl:FILE                  a JSON object per line, or one array of them, plain or gzip, local or
                              gs:// (runtime/textfiles.py)
  text:FILE                   pretraining text, one document per file, or several files with *
  tfds:NAME[/CONFIG]:SPLIT    tensorflow-datasets with random access, without TensorFlow
  tfds:FOLDER:SPLIT           the same for a data set that was prepared in a folder
  hf:NAME[/CONFIG]:SPLIT      the datasets library, if it is installed
  hf:FOLDER:SPLIT             the same for a folder on this machine
  sandbox:                    the embedded world (setup/texts.py)

or several of them, separated by ';': all records of the first source, then those of the second. A
';' separates only if the form of a source follows it. A ';' that belongs to a name although such a
form follows is written '\\;'. c.data.mapping.KIND maps their fields to ours (mappings.py). It has
one mapping for all sources, or one for each, again separated by ';'. Without a mapping the fields
must have our names:

  demonstrations  {"prompt", "response"}
  comparisons     {"prompt", "responses": [str, ...], "ranks": [int, ...]}, where rank 0 is the best
                  and equal ranks are a tie; or pairs {"prompt", "chosen", "rejected"}
  prompts         {"prompt"}
  pretrain        {"text"}

Records may also have "user_id" and "use_case" (except pretrain), "labeler_id" (comparisons) and
"kind" (pretrain).

A prompt is a string, or a list of messages {"role", "content"} for the chat template. A response is
a string, or the assistant's single message, alone or in a list, with or without the prompt's
messages before it; its content is read. Ids are text or integers.
"""

from __future__ import annotations

import bisect
import functools
import glob
import inspect
import itertools
import os
import pathlib
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax.data import fields, hub, mappings
from alignjax.runtime import files, textfiles

FORMS = 'jsonl:FILE, text:FILE, tfds:NAME[/CONFIG]:SPLIT, hf:NAME[/CONFIG]:SPLIT or sandbox:'

RECORDS = 64  # of a block


class Source(NamedTuple):
  """The records of a source.

  Attributes:
    count: the number of raw records.
    records: a function of i that returns our checked records of the i-th raw record. It reads them
      when it is called, and only that record of an array_record file, so that a process reads only
      its share.
    version: what its library calls this version of a data set, or ''.
  """

  count: int
  records: Callable[[int], Sequence[dict[str, Any]]]
  version: str = ''


def read(
  source: str, kind: str, mapping: str | None = None, most: int | None = None
) -> list[dict[str, Any]]:
  """Returns the records of a source. Errors name the file and line (or the source and index) and
  the field.

  Args:
    source: the source; see the top of this file.
    kind: 'demonstrations', 'comparisons', 'prompts' or 'pretrain'.
    mapping: the value of c.data.mapping.KIND.
    most: the largest number of records, which are the first ones. None means all of them.
  """
  opened = open_source(source, kind, mapping)
  records = list(
    itertools.islice((r for i in range(opened.count) for r in opened.records(i)), most)
  )
  if not records:
    raise no_records(source, kind, mapping)
  return records


def no_records(source: str, kind: str, mapping: str | None) -> ValueError:
  """Returns the error of a source without records."""
  return ValueError(
    f'data.{kind}={source!r} has no records'
    + (f' that data.mapping.{kind}={mapping!r} can use.' if mapping else '.')
  )


def open_source(source: str, kind: str, mapping: str | None = None) -> Source:
  """Returns a source that can be read by index."""
  parts = [_open_one(name, kind, change) for name, change in _parts(source, kind, mapping)]
  starts = list(itertools.accumulate((part.count for part in parts), initial=0))

  def records(i):
    which = bisect.bisect_right(starts, i) - 1
    return parts[which].records(i - starts[which])

  return Source(starts[-1], records)


def _parts(source: str, kind: str, mapping: str | None) -> list[tuple[str, str]]:
  """The sources that an entry names, each with its mapping."""
  if not isinstance(source, str):
    raise ValueError(f'data.{kind}={source!r}: a source is {FORMS}.')
  names, changes = split(source), [part.strip() for part in (mapping or '').split(';')]
  if len(changes) not in (1, len(names)):
    raise ValueError(
      f'data.mapping.{kind}={mapping!r} has {len(changes)} mappings for the {len(names)} sources '
      f'of '
      f'data.{kind}={source!r}; give one for all or one for each.'
    )
  return list(zip(names, changes * len(names) if len(changes) == 1 else changes, strict=True))


class Block(NamedTuple):
  """Some raw records of a source that follow one another, for any process to read (`reader`).

  Attributes:
    part: which of the sources that the entry names.
    lines: those of a file of JSON, or None.
    start, end: the numbers of the raw records otherwise.
    share: how much of its source has been read after it, from 0 to 1.
  """

  part: int
  lines: textfiles.Block | None
  start: int
  end: int
  share: float


def blocks(source: str, kind: str, mapping: str | None = None) -> Iterator[Block]:
  """The blocks of a source in order. A file of JSON lines is never whole in memory."""
  for part, (name, change) in enumerate(_parts(source, kind, mapping)):
    form, _, rest = name.partition(':')
    if form != 'jsonl' or not rest:
      count = _open_one(name, kind, change).count
      for start in range(0, count, RECORDS):
        end = min(start + RECORDS, count)
        yield Block(part, None, start, end, end / count)
      continue
    _change(name, kind, change)  # A wrong name is an error before the file is read.
    path, empty, size = textfiles.place(rest, f'data.{kind}: '), True, 0
    for lines in textfiles.blocks(rest, f'data.{kind}: '):
      size = size or (path.stat().length if files.is_bucket(path) else os.stat(path).st_size)
      empty = empty and not lines.raw.removeprefix(b'\xef\xbb\xbf').strip(b' \t\r\n[]')
      yield Block(part, lines, 0, 0, lines.read / max(size, lines.read, 1))
    if empty:
      _open_one(name, kind, change)  # It says that there are none.


def identity(source: str, kind: str) -> str:
  """Returns what tells versions of data sets of a library apart, which is never the same twice
  where nothing does. It is '' for files, whose contents do that."""
  found = ''
  for name in split(source):
    form, _, rest = name.partition(':')
    if form not in ('tfds', 'hf') or not rest:
      continue
    where = f'data.{kind}={form}'
    folder = _folder(_name_and_split(rest, where)[0], f'{where}:{rest}')
    if folder is None:
      found += f'{_open_one(name, kind, "").version or uuid.uuid4().hex};'
  return found


def reader(
  source: str, kind: str, mapping: str | None = None
) -> Callable[[Block], Sequence[Sequence[dict[str, Any]]]]:
  """Returns a function of a block that returns our checked records of each of its raw records."""
  parts = _parts(source, kind, mapping)
  opened: dict[int, Source] = {}

  def read_block(block):
    name, change = parts[block.part]
    if block.lines is None:
      if block.part not in opened:
        opened[block.part] = _open_one(name, kind, change)
      return [opened[block.part].records(i) for i in range(block.start, block.end)]
    path, function = name.partition(':')[2], _change(name, kind, change)
    raws = textfiles.records(block.lines, path, f'data.{kind}: ')
    return [convert(raw, kind, where, function) for where, raw in raws]

  return read_block


def split(source: str) -> list[str]:
  """Returns the sources that a config entry names."""
  parts = re.split(rf'(?<!\\);(?=\s*(?:{"|".join(READERS)}|sandbox):)', source)
  return [part.strip().replace('\\;', ';') for part in parts]


def _change(source: str, kind: str, mapping: str) -> Callable | None:
  """The function of a mapping, with the folder that it reads beside the source's file."""
  form, _, rest = source.partition(':')
  change = mappings.find(mapping, f'data.mapping.{kind}')
  if change is not None and 'beside' in inspect.signature(change).parameters:
    change = functools.partial(
      change, beside=(files.folder if form == 'jsonl' else pathlib.Path)(rest).parent
    )
  return change


def _open_one(source: str, kind: str, mapping: str) -> Source:
  form, _, rest = source.partition(':')
  if form not in READERS or not rest:
    raise ValueError(f'data.{kind}={source!r}: a source is {FORMS}.')
  change = _change(source, kind, mapping)
  count, get, version = READERS[form](rest, kind)
  if not count:  # One empty source of several is an error too.
    raise ValueError(f'data.{kind}={source!r} has no records.')

  def records(i):
    where, raw = get(i)
    return convert(raw, kind, where, change)

  return Source(count, records, version)


def convert(raw: Any, kind: str, where: str, change: Callable | None = None) -> list[Record]:
  """Returns our checked records of a raw record."""
  if not isinstance(raw, dict):
    raise ValueError(
      f'{where}: a record must be an object with {sorted(fields.FIELDS[kind])}, not '
      f'{textfiles.kind(raw)}.'
    )
  made = [
    Record(fields.check(record, kind, where)) for record in mappings.apply(change, raw, where)
  ]
  for record in made:
    record.where = where
  return made


class Record(dict):
  """A record that remembers its place in its source, for an error that occurs when it is used and
  no longer read."""

  where: str


def place(record: Mapping[str, Any], otherwise: str) -> str:
  """Returns the place of a record, such as 'FILE, line N', or `otherwise` for a record that was not
  read from a source."""
  return record.where if isinstance(record, Record) else otherwise


Raw = tuple[int, Callable[[int], tuple[str, Any]], str]  # (count, i -> (place, record), version)


def _jsonl(path: str, kind: str) -> Raw:
  records = textfiles.Records(textfiles.read(path, f'data.{kind}: '), path)
  return len(records), records.__getitem__, ''


def _text(pattern: str, kind: str) -> Raw:
  if kind != 'pretrain':
    raise ValueError(
      f'data.{kind}=text:{pattern}: plain text is a source of pretraining documents only.'
    )
  folder = textfiles.place(pattern, f'data.{kind}: ')
  if '*' in pattern and files.is_bucket(folder):
    fixed = next(p for p in folder.parents if '*' not in str(p))
    paths = sorted(str(p) for p in fixed.glob(folder.relative_to(fixed).as_posix()))
  elif '*' in pattern and not os.path.exists(folder):
    paths = sorted(p for p in glob.glob(str(folder)) if not pathlib.Path(p).is_dir())
  else:
    paths = [pattern]

  def get(i):
    return paths[i], {'text': textfiles.read(paths[i], f'data.{kind}: ')}

  return len(paths), get, ''


def _name_and_split(text: str, where: str) -> tuple[str, str]:
  """Splits the rest of a source: 'NAME:train[:5%]+test' -> ('NAME', 'train[:5%]+test')."""
  part = r'[\w.-]+(?:\[[^\]]*\])?'
  found = re.fullmatch(rf'(.+):({part}(?:\+{part})*)', text)
  if not found:
    raise ValueError(
      f'{where}:{text}: name the split, as in {where.partition("=")[2]}:{text}:train.'
    )
  return found[1], found[2]


def _folder(name: str, where: str) -> pathlib.Path | None:
  """Returns the existing folder that a name of hf: or tfds: means, or None for a name of the
  library. It is an error if a name that is written as a folder does not exist, or if a part of its
  path would be read as the name of another folder."""
  try:
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
      return path
    found = path.is_file()
  except (RuntimeError, OSError, ValueError):  # such as a name that is too long
    path, found = pathlib.Path(name), False
  if found:
    raise ValueError(
      f'{where}: {path} is a file, but a folder is required; a file of records is jsonl:{name}.'
    )
  if path.is_absolute() or name.startswith(('.', '~')):
    raise FileNotFoundError(f'{where} names the folder {path}, which does not exist.')
  owner = pathlib.Path(*path.parts[:2])
  if len(path.parts) > 2 and os.path.isdir(owner):  # of a name that is too long, False
    raise FileNotFoundError(
      f'{where}: there is no folder {path}, but there is {owner}, which would be read in its '
      f'place; '
      'write the path of the folder that you mean.'
    )
  return None


def _tfds(name: str, kind: str) -> Raw:
  name, splits = _name_and_split(name, f'data.{kind}=tfds')
  where = f'data.{kind}=tfds:{name}:{splits}'
  folder = _folder(name, where)
  import tensorflow_datasets as tfds

  from alignjax.data.records import records_dataset_builder

  with hub.reading(where):
    if folder is not None:
      builder = tfds.builder_from_directory(folder)
    else:
      builder = tfds.builder(name, file_format='array_record')
      builder.download_and_prepare()
    rows = builder.as_data_source(splits)  # pyright: ignore[reportCallIssue] a decorator hides `split`
    features = builder.info.features
    stored = isinstance(features, tfds.features.FeaturesDict) and 'messages' in features
    change = records_dataset_builder.restore if stored else lambda row: row

  def get(i):
    place = f'tfds:{name}:{splits}, record {i}'
    with hub.reading(place):  # A damaged file is found when its records are read.
      return place, change(_plain(rows[i]))

  return len(rows), get, getattr(builder.info, 'full_name', '')


def _plain(x: Any) -> Any:
  """Converts numpy arrays and bytes, as tfds returns them, to what JSON would give."""
  if isinstance(x, dict):
    return {k: _plain(v) for k, v in x.items()}
  if isinstance(x, np.ndarray):
    return _plain(x.tolist())
  if isinstance(x, np.generic):
    return _plain(x.item())
  if isinstance(x, (list, tuple)):
    return [_plain(v) for v in x]
  return x.decode('utf-8') if isinstance(x, bytes) else x


def _datasets(name: str, kind: str) -> Raw:
  name, splits = _name_and_split(name, f'data.{kind}=hf')
  where = f'data.{kind}=hf:{name}:{splits}'
  folder = _folder(name, where)
  owner, _, rest = name.partition('/')
  repository, _, config = rest.partition('/')
  if folder is not None:
    rows = hub.load(str(folder), None, splits, where=where)
  else:
    named = f'{owner}/{repository}' if repository else owner
    rows = hub.load(named, config or None, splits, where=where)

  def get(i):
    place = f'hf:{name}:{splits}, record {i}'
    with hub.reading(place):
      return place, rows[i]

  return len(rows), get, getattr(rows, '_fingerprint', '')


READERS = dict(jsonl=_jsonl, text=_text, tfds=_tfds, hf=_datasets)
