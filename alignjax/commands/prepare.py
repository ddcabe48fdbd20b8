"""Turns raw records into clean splits, as the paper prepared its prompts.

    alignjax prepare --source=jsonl:raw.jsonl.gz --kind=prompts --out=data/mine
    alignjax prepare --source=jsonl:hh.jsonl.gz --mapping=hh_rlhf --kind=comparisons \\
      --out=data/hh --format=tfds

Writes OUT/train.jsonl.gz, valid.jsonl.gz, test.jsonl.gz, or array_record shards for `tfds:`. Prints
how many records each rule removed, and the names to put into the config. The rules
(alignjax/data/hygiene.py has them by kind) remove blank prompts; prompts over --max_tokens;
duplicates, which are prompts with the same first --prefix characters; and more than --per_user
prompts of a user_id. They split by user_id and by prompt, so that neither is in two splits, and
remove personal data by pattern from the training split. `none` turns a rule off. Of pretraining
text only blank texts and duplicates are removed, and whole texts are compared.
"""

import argparse
import gzip
import json
import re
from collections.abc import Callable

from alignjax.commands import command


def number(text: str) -> int | None:
  value = None if text == 'none' else int(text)
  if value is not None and value < 1:
    raise argparse.ArgumentTypeError(
      f"{text} is no number from 1 on, nor 'none', which turns the rule off"
    )
  return value


def main(argv: list[str]) -> None:
  parser = command.make_parser(__name__)
  parser.add_argument(
    '--source', required=True, help='jsonl:FILE, tfds:..., hf:... (alignjax/data/sources.py)'
  )
  parser.add_argument(
    '--kind', required=True, choices=('prompts', 'demonstrations', 'comparisons', 'pretrain')
  )
  parser.add_argument('--mapping', help='of the fields (alignjax/data/mappings.py)')
  parser.add_argument('--out', required=True, help='a folder')
  parser.add_argument('--format', default='jsonl', choices=('jsonl', 'tfds'))
  parser.add_argument('--shards', type=int, default=1, help='files a split, of --format=tfds')
  parser.add_argument(
    '--prefix',
    type=number,
    default=200,
    metavar='CHARACTERS',
    help='of a prompt that make it a duplicate; default 200, the paper reports none; other kinds '
    'have rules of '
    'their own, which any number turns on',
  )
  parser.add_argument('--per_user', type=number, default=200, help='default 200 (paper 3.2)')
  parser.add_argument('--max_tokens', type=number, default=1000, help='default 1000 (paper C)')
  parser.add_argument(
    '--tokenizer', help='hf:FOLDER_OR_HUB_NAME that counts tokens; default: words'
  )
  parser.add_argument(
    '--keep_pii', action='store_true', help='leaves personal data in the training split'
  )
  parser.add_argument('--shares', default='train=0.9,valid=0.05,test=0.05')
  parser.add_argument('--seed', type=int, default=0, help='of the split')
  options = parser.parse_args(argv)
  from alignjax.data import hygiene, sources
  from alignjax.runtime import failures, files

  out = files.folder(options.out)
  failures.check_writable(out if out.exists() else out.parent, '--out')
  try:
    parts = [part.strip().split('=') for part in options.shares.split(',')]
    shares = {name: float(share) for name, share in parts}
  except ValueError:
    raise ValueError(
      f"--shares={options.shares} has not the form 'train=0.9,valid=0.05,test=0.05'."
    ) from None
  if len(shares) < len(parts) or not all(re.fullmatch(r'\w[\w.-]*', name) for name in shares):
    raise ValueError(
      f'--shares={options.shares}: each split has a name of its own, of letters, digits, _, . '
      f'and -.'
    )
  if options.shards < 1:
    raise ValueError(f'--shards={options.shards}: a split has one file or more.')
  if not all(0 <= share < float('inf') for share in shares.values()) or not sum(shares.values()):
    raise ValueError(
      f'--shares={options.shares}: a share is a number from 0 on, and one at least is above 0.'
    )
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
      f'WARNING: the split {name} is empty: of {log[-1][2]} records that are left none came '
      f'into its share of '
      f'{shares[name]:g}. Give more records, other --shares, or another --seed.'
    )
  out.mkdir(parents=True, exist_ok=True)
  if options.format == 'tfds':
    from alignjax.data.records import records_dataset_builder

    folder = records_dataset_builder.store(
      {k: v for k, v in splits.items() if v}, options.kind, out, options.shards
    )
    names = [f'tfds:{folder}:{name}' for name, rows in splits.items() if rows]
  else:
    names = []
    for name, rows in splits.items():
      with gzip.open(out / f'{name}.jsonl.gz', 'wt', encoding='utf-8') as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
      names.append(f'jsonl:{out / name}.jsonl.gz')
  print('\n'.join(names))


def length_by(tokenizer: str | None) -> Callable[[str], int]:
  """The length of a text: its tokens, or its words where no tokenizer is named."""
  if not tokenizer:
    return lambda text: len(text.split())
  from alignjax.setup.texts import load_tokenizer

  encode = load_tokenizer(tokenizer).encode
  return lambda text: len(encode(text, add_special_tokens=False))
