"""Turns raw records into clean splits, as the paper prepared its prompts.

    alignjax prepare --source=jsonl:raw.jsonl.gz --kind=prompts --out=data/mine
    alignjax prepare --source=jsonl:hh.jsonl.gz --mapping=hh_rlhf --kind=comparisons \\
      --out=data/hh --format=tfds

The command writes OUT/train.jsonl.gz, valid.jsonl.gz, test.jsonl.gz, or array_record shards for
`tfds:`. It prints how many records each rule removed, and the names to put into the config. The
rules (alignjax/data/hygiene.py lists them by kind) remove blank prompts; prompts over --max_tokens;
duplicates, which are prompts with the same first --prefix characters; and more than --per_user
prompts of a user_id. The records are split by user_id and by prompt, so that neither is in two
splits, and personal data is removed by pattern from the training split. `none` turns a rule off.
From pretraining text only blank texts and duplicates are removed, and whole texts are compared.
"""

import argparse
import gzip
import json
import pathlib
import re
from collections.abc import Callable

from alignjax.commands import command


def number(text: str) -> int | None:
  value = None if text == 'none' else int(text)
  if value is not None and value < 1:
    raise argparse.ArgumentTypeError(
      f"{text} is neither a number from 1 on nor 'none', which turns the rule off"
    )
  return value


def arguments(argv: list[str]) -> argparse.Namespace:
  parser = command.make_parser(__name__)
  parser.add_argument(
    '--source', required=True, help='jsonl:FILE, tfds:..., hf:... (alignjax/data/sources.py)'
  )
  parser.add_argument(
    '--kind', required=True, choices=('prompts', 'demonstrations', 'comparisons', 'pretrain')
  )
  parser.add_argument('--mapping', help='the mapping of the fields (alignjax/data/mappings.py)')
  parser.add_argument('--out', required=True, help='the folder to write to')
  parser.add_argument('--format', default='jsonl', choices=('jsonl', 'tfds'))
  parser.add_argument(
    '--shards', type=int, default=1, help='the number of files per split with --format=tfds'
  )
  parser.add_argument(
    '--prefix',
    type=number,
    default=200,
    metavar='CHARACTERS',
    help='the first characters by which a prompt is a duplicate; default: 200, because the paper '
    'reports none; other kinds have rules of their own, which any number turns on',
  )
  parser.add_argument(
    '--per_user',
    type=number,
    default=200,
    help='the largest number of prompts per user; default: 200 (paper 3.2)',
  )
  parser.add_argument(
    '--max_tokens',
    type=number,
    default=1000,
    help='the largest length of a prompt; default: 1000 (paper C)',
  )
  parser.add_argument(
    '--tokenizer',
    help='the tokenizer that counts tokens, hf:FOLDER_OR_HUB_NAME; default: words are counted',
  )
  parser.add_argument(
    '--keep_pii', action='store_true', help='keep personal data in the training split'
  )
  parser.add_argument('--shares', default='train=0.9,valid=0.05,test=0.05')
  parser.add_argument('--seed', type=int, default=0, help='the seed of the split')
  return parser.parse_args(argv)


def main(argv: list[str]) -> None:
  options = arguments(argv)
  from alignjax.data import hygiene, sources
  from alignjax.runtime import failures, files

  out = files.folder(options.out)
  failures.check_writable(out if out.exists() else out.parent, '--out')
  if options.shards < 1:
    raise ValueError(f'--shards={options.shards}: a split must have one file or more.')
  shares = parse_shares(options.shares)
  length = length_by(options.tokenizer)
  records = sources.read(options.source, options.kind, options.mapping)
  splits, log = hygiene.clean(
    records,
    kind=options.kind,
    prefix=options.prefix,
    per_user=options.per_user,
    max_tokens=options.max_tokens,
    length=length,
    remove_pii=not options.keep_pii,
    shares=shares,
    seed=options.seed,
  )
  width = max(len(rule) for rule, _, _ in log)
  for rule, removed, left in log:
    print(f'{rule.ljust(width)}  removed {removed:>8}  left {left:>8}')
  for name, rows in splits.items():
    print(f'{name}: {len(rows)} records, {len({hygiene.user_of(r) for r in rows} - {None})} users')
  for name in (name for name, rows in splits.items() if not rows):
    print(
      f'WARNING: the split {name} is empty: none of the {log[-1][2]} remaining records fell into '
      f'its share of {shares[name]:g}. Give more records, other --shares, or another --seed.'
    )
  out.mkdir(parents=True, exist_ok=True)
  if options.format == 'tfds':
    names = write_shards(splits, options.kind, out, options.shards)
  else:
    names = [write_lines(rows, out / f'{name}.jsonl.gz') for name, rows in splits.items()]
  print('\n'.join(names))


def parse_shares(text: str) -> dict[str, float]:
  """Returns {split: share} of 'train=0.9,valid=0.1'."""
  try:
    parts = [part.strip().split('=') for part in text.split(',')]
    shares = {name: float(share) for name, share in parts}
  except ValueError:
    raise ValueError(
      f"--shares={text} does not have the form 'train=0.9,valid=0.05,test=0.05'."
    ) from None
  if len(shares) < len(parts) or not all(re.fullmatch(r'\w[\w.-]*', name) for name in shares):
    raise ValueError(
      f'--shares={text}: each split must have a name of its own, of letters, digits, _, . and -.'
    )
  if not all(0 <= share < float('inf') for share in shares.values()) or not sum(shares.values()):
    raise ValueError(
      f'--shares={text}: a share must be a number from 0 on, and at least one must be above 0.'
    )
  return shares


def write_lines(rows: list[dict], path: pathlib.Path) -> str:
  """Writes the records as gzipped JSON lines and returns their source for the config."""
  with gzip.open(path, 'wt', encoding='utf-8') as file:
    file.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  return f'jsonl:{path}'


def write_shards(
  splits: dict[str, list[dict]], kind: str, out: pathlib.Path, shards: int
) -> list[str]:
  """Writes the splits that have records as array_record shards and returns their sources for the
  config."""
  from alignjax.data.records import records_dataset_builder

  filled = {name: rows for name, rows in splits.items() if rows}
  folder = records_dataset_builder.store(filled, kind, out, shards)
  return [f'tfds:{folder}:{name}' for name in filled]


def length_by(tokenizer: str | None) -> Callable[[str], int]:
  """Returns a function that counts the tokens of a text or, if no tokenizer is named, its words."""
  if not tokenizer:
    return lambda text: len(text.split())
  from alignjax.setup.texts import load_tokenizer

  encode = load_tokenizer(tokenizer).encode
  return lambda text: len(encode(text, add_special_tokens=False))
