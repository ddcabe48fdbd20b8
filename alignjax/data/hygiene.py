"""Hygiene of records, as the paper did it for its prompts (section 3.2, appendices A.2 and C):
duplicates, a cap per user, splits by user and prompt, length, and personal data. Every rule takes
records and returns (kept, removed). `clean` applies the rules in order and counts. `held_out`
decides which prompts no stage is trained on.

The rules by kind of record are:

  rule           prompts             demonstrations       comparisons               pretrain
  no text        blank prompt        blank prompt         blank prompt              blank text
  length         of the prompt       of the prompt        of the prompt             none
  duplicate      the same beginning  prompt and response  prompt, ranked responses  the whole text
                                                          and labeler
  cap            prompts of a user   distinct prompts     distinct prompts          none
  personal data  in the prompt       prompt or response   prompt or any response    none

Two comparisons are the same whatever the order of their responses, and different if their labelers
ranked the responses differently. Pretraining text belongs to no user, and it is long: a book is not
dropped for its length, for a licence that many books begin with, or for one address in it.

We choose what the paper does not report: the length of the beginning that makes two prompts
duplicates, how personal data is found (by patterns and the phonenumbers package), and the shares of
the splits.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import phonenumbers

from alignjax.data import fields

Records = list[dict[str, Any]]

# Phone numbers of these regions are found without a country code (the US include Canada).
REGIONS = ('US', 'GB')
CARD = re.compile(r'(?<!\w)(?:\d[ -]?){12,15}\d(?!\w)')
# In 'no.4111' and '...4111' the point does not belong to a number.
DECIMAL = re.compile(r'(?:\d+|(?<![^\s(=+-]))\.\d+')


def text_of(record: dict[str, Any]) -> str:
  """Returns the prompt, or the document, as one string."""
  prompt = record.get('prompt', record.get('text', ''))
  return prompt if isinstance(prompt, str) else '\n'.join(m['content'] for m in prompt)


def texts_of(record: dict[str, Any]) -> str:
  """Returns the prompt with its response or responses as one string."""
  return '\n'.join(
    [
      text_of(record),
      *([record['response']] if 'response' in record else []),
      *record.get('responses', []),
    ]
  )


def user_of(record: dict[str, Any]) -> str | None:
  """Returns the user_id of a record as text, where 0 is a valid id, or None if there is none. An
  empty text means that there is none (records_dataset_builder.py)."""
  user = record.get('user_id')
  return None if user is None or user == '' else str(user)


def conversation(prompt: str | list[dict[str, str]]) -> str:
  """Returns the key by which a split treats two prompts as one: the first message of the person,
  without regard to case and white space. It is the same for a prompt as text, as messages, and in
  the form of a dialogue ("Human: ...", then "Assistant:"). The later turns of a conversation, which
  contain answers to the first message, therefore stay on its side."""
  if isinstance(prompt, list):
    first = next((m['content'] for m in prompt if m['role'] == 'user'), text_of({'prompt': prompt}))
  else:
    dialogue = re.match(r'\s*Human:(.*?)(?:\n\nAssistant:|\Z)', prompt, re.DOTALL)
    first = dialogue[1] if dialogue else prompt
  return ' '.join(first.lower().split())


def held_out(prompt: str | list[dict[str, str]], share: float, seed: int) -> bool:
  """Returns whether a prompt belongs to the `share` of conversations that no stage is trained on.
  It depends on the prompt and the seed alone, so that demonstrations, comparisons and prompts of
  one source agree on it in every run."""
  return place(f'held out/{seed}', conversation(prompt)) < share


def place(seed: Any, who: str) -> float:
  """Returns a number from 0 to 1 that depends on the arguments alone and is uniform over them."""
  return (
    int.from_bytes(hashlib.sha256(f'{seed}/{who}'.encode('utf-8', 'surrogatepass')).digest()[:8])
    / 2**64
  )


def pii(text: str) -> str | None:
  """Returns the first kind of personal data that is found in a text, or None. A card number must
  pass the Luhn check; the digits of a decimal number or of a word are not a card number."""
  return next((kind for kind, holds in PII.items() if holds(text)), None)


def _phone(text: str) -> bool:
  """Returns whether a text contains a phone number that is valid and grouped as such numbers are
  written. A number with a country code may be of any country, and one without it must be of
  REGIONS. Digits without a separator are not a phone number, because many ids look like that."""
  return any(
    not match.raw_string.isdigit()
    for region in REGIONS
    for match in phonenumbers.PhoneNumberMatcher(
      text, region, leniency=phonenumbers.Leniency.STRICT_GROUPING
    )
  )


def _card(text: str) -> bool:
  return any(
    _luhn(re.sub(r'\D', '', match.group())) for match in CARD.finditer(DECIMAL.sub(' . ', text))
  )


def _luhn(digits: str) -> bool:
  total = sum(
    sum(divmod(int(d) * 2, 10)) if i % 2 else int(d) for i, d in enumerate(reversed(digits))
  )
  return total % 10 == 0 and len(digits) >= 13


PII: dict[str, Callable[[str], Any]] = {
  'e-mail': re.compile(r'\b[\w.+-]+@[\w-]+(\.[\w-]+)+\b').search,
  'phone': _phone,
  'us ssn': re.compile(r'(?<!\d)(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?!\d)').search,
  'card': _card,
  'iban': re.compile(r'\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b').search,
  'ip address': re.compile(
    r'(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?!\d|\.\d)'
  ).search,
}


def not_blank(records: Records) -> tuple[Records, Records]:
  """Keeps the records whose prompt or text has more than white space."""
  return _parted(records, lambda r: bool(text_of(r).strip()))


def deduplicate(records: Records, prefix: int, kind: str = 'prompts') -> tuple[Records, Records]:
  """Keeps the first record of each set of duplicates, without regard to case and white space (see
  the top of this file).

  Args:
    records: the records.
    prefix: prompts are duplicates if their first `prefix` characters are the same. Shorter prompts
      are compared whole.
    kind: the kind of the records.
  """

  def plain(text):
    return ' '.join(text.lower().split())

  seen: set = set()

  def new(record):
    key: Any = plain(text_of(record))
    if kind == 'prompts':
      key = key[:prefix]
    elif kind == 'demonstrations':
      key = key, plain(record['response'])
    elif kind == 'comparisons':
      ranks = fields.dense_ranks(record['ranks'])
      ranked = sorted(zip(map(plain, record['responses']), ranks, strict=True))
      key = key, tuple(ranked), str(record.get('labeler_id'))
    key = hashlib.sha256(repr(key).encode()).digest()  # The key of a book is short too.
    fresh = key not in seen
    seen.add(key)
    return fresh

  return _parted(records, new)


def cap_users(records: Records, most: int) -> tuple[Records, Records]:
  """Keeps the first `most` distinct prompts of each user_id. Records without a user_id are not
  capped."""
  prompts: dict[str, set[str]] = {}

  def within(record):
    user, text = user_of(record), text_of(record)
    if user is None:
      return True
    own = prompts.setdefault(user, set())
    if text not in own and len(own) >= most:
      return False
    own.add(text)
    return True

  return _parted(records, within)


def short_enough(
  records: Records, most: int, length: Callable[[str], int]
) -> tuple[Records, Records]:
  """Keeps the prompts of at most `most` tokens, as counted by `length`."""
  return _parted(records, lambda r: length(text_of(r)) <= most)


def _parted(records: Records, keep: Callable[[dict[str, Any]], bool]) -> tuple[Records, Records]:
  kept, removed = [], []
  for record in records:
    (kept if keep(record) else removed).append(record)
  return kept, removed


def split(records: Records, shares: dict[str, float], seed: int) -> dict[str, Records]:
  """Splits records by user and by prompt. The records of one user_id are on one side, and so are
  the records of one conversation (or document), whoever wrote it. Records that are connected
  through others in this way are on one side too, so that no prompt is on two sides. The side is a
  function of the seed and of its members, for records of every kind and in any order."""
  joined: dict[str, str] = {}  # {name: another name of its side, or itself}

  def side(name):
    joined.setdefault(name, name)
    while joined[name] != name:
      joined[name] = joined[joined[name]]
      name = joined[name]
    return name

  prompts = [f'prompt:{conversation(r["prompt"]) if "prompt" in r else r["text"]}' for r in records]
  for record, prompt in zip(records, prompts, strict=True):
    user = user_of(record)
    one, other = side(prompt), side(prompt if user is None else f'user:{user}')
    # The last name represents its side; it is a user's name if there is one.
    joined[min(one, other)] = max(one, other)
  out: dict[str, Records] = {name: [] for name in shares}
  for record, prompt in zip(records, prompts, strict=True):
    at = place(seed, side(prompt)) * sum(shares.values())
    for name, share in shares.items():
      at -= share
      if at < 0 or name == list(shares)[-1]:
        out[name].append(record)
        break
  return out


def clean(
  records: Records,
  *,
  kind: str,
  prefix: int | None,
  per_user: int | None,
  max_tokens: int | None,
  length: Callable[[str], int],
  remove_pii: bool,
  shares: dict[str, float],
  seed: int,
) -> tuple[dict[str, Records], list[tuple[str, int, int]]]:
  """Applies all rules of a kind in the paper's order. Returns (records of each split, [(rule,
  removed, left)]). A rule of None is off. Personal data is removed from the training split only
  (section 3.2)."""
  log = [('read', 0, len(records))]
  asked = kind != 'pretrain'  # The records are prompts that people wrote.

  def apply(name: str, result: tuple[Records, Records]) -> Records:
    log.append((name, len(result[1]), len(result[0])))
    return result[0]

  records = apply('blank', not_blank(records))
  if max_tokens is not None and asked:
    records = apply(f'over {max_tokens} tokens', short_enough(records, max_tokens, length))
  if prefix is not None:
    same = {
      'prompts': f'same first {prefix} characters',
      'demonstrations': 'same prompt and response',
      'comparisons': 'same prompt, ranking and labeler',
      'pretrain': 'same text',
    }[kind]
    records = apply(same, deduplicate(records, prefix, kind))
  if per_user is not None and asked:
    records = apply(f'over {per_user} of a user', cap_users(records, per_user))
  splits = split(records, shares, seed)
  if remove_pii and asked and 'train' in splits:
    found = [(r, pii(texts_of(r))) for r in splits['train']]
    kinds = Counter(kind for _, kind in found if kind)
    splits['train'] = [r for r, kind in found if not kind]
    counts = ', '.join(f'{kind} {n}' for kind, n in kinds.most_common())
    log.append(
      (
        'personal data in train' + (f' ({counts})' if counts else ''),
        sum(kinds.values()),
        sum(map(len, splits.values())),
      )
    )
  return splits, log
