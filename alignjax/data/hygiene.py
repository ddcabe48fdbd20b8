"""Prompt hygiene, as the paper did it (section 3.2, appendices A.2 and C): duplicates, a cap a user, splits by user, length,
personal data. Every rule takes records and returns (kept, removed); `clean` runs them in order and counts.

What the paper does not report is ours: the length of prefix that makes two prompts duplicates, how personal data was found
(here: documented patterns), the shares of the splits."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

Records = list[dict[str, Any]]

PII = {
    'e-mail': re.compile(r'\b[\w.+-]+@[\w-]+(\.[\w-]+)+\b'),
    'phone': re.compile(r'(?<![\w.])(\+\d{1,3}[ .-]?)?(\(\d{2,4}\)|\d{3})[ .-]\d{3,4}[ .-]\d{3,4}(?!\w|\.\d)'),
    'us ssn': re.compile(r'(?<!\d)(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?!\d)'),
    'card': re.compile(r'(?<!\d)(?:\d[ -]?){13,16}(?!\d)'),
    'iban': re.compile(r'\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b'),
    'ip address': re.compile(r'(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?!\d|\.\d)'),
}


def text_of(record: dict[str, Any]) -> str:
  """The prompt as one string, for reading only."""
  prompt = record.get('prompt', record.get('text', ''))
  return prompt if isinstance(prompt, str) else '\n'.join(m['content'] for m in prompt)


def pii(text: str) -> str | None:
  """The first kind of personal data found in a text, or None. Card numbers must pass the Luhn check."""
  for kind, pattern in PII.items():
    for match in pattern.finditer(text):
      if kind != 'card' or _luhn(re.sub(r'\D', '', match.group())):
        return kind
  return None


def _luhn(digits: str) -> bool:
  total = sum(sum(divmod(int(d) * 2, 10)) if i % 2 else int(d) for i, d in enumerate(reversed(digits)))
  return total % 10 == 0 and len(digits) >= 13


def deduplicate(records: Records, prefix: int) -> tuple[Records, Records]:
  """Keeps the first of the prompts whose first `prefix` characters are the same, shorter ones whole; case and space apart."""
  seen, kept, removed = set(), [], []
  for record in records:
    key = ' '.join(text_of(record).lower().split())[:prefix]
    (removed if key in seen else kept).append(record)
    seen.add(key)
  return kept, removed


def cap_users(records: Records, most: int) -> tuple[Records, Records]:
  """At most `most` prompts of a user_id, the first ones; records without one are not capped."""
  count: Counter = Counter()
  kept, removed = [], []
  for record in records:
    user = record.get('user_id')
    count[user] += 1
    (removed if user and count[user] > most else kept).append(record)
  return kept, removed


def short_enough(records: Records, most: int, length: Callable[[str], int]) -> tuple[Records, Records]:
  """Prompts of at most `most` tokens by `length`."""
  over = [length(text_of(r)) > most for r in records]
  return [r for r, o in zip(records, over, strict=True) if not o], [r for r, o in zip(records, over, strict=True) if o]


def split(records: Records, shares: dict[str, float], seed: int) -> dict[str, Records]:
  """Splits by user: all records of a user_id on one side; without one, those of a prompt. A pure function of seed and user."""
  out: dict[str, Records] = {name: [] for name in shares}
  for record in records:
    who = f'user:{record["user_id"]}' if record.get('user_id') else f'prompt:{text_of(record)}'
    at = int.from_bytes(hashlib.sha256(f'{seed}/{who}'.encode()).digest()[:8]) / 2**64 * sum(shares.values())
    for name, share in shares.items():
      at -= share
      if at < 0 or name == list(shares)[-1]:
        out[name].append(record)
        break
  return out


def clean(records: Records, *, prefix: int | None, per_user: int | None, max_tokens: int | None, length: Callable[[str], int],
          remove_pii: bool, shares: dict[str, float], seed: int) -> tuple[dict[str, Records], list[tuple[str, int, int]]]:
  """All rules in the paper's order: (records of each split, [(rule, removed, left)]). A rule of None is off. Personal data is
  removed from the training split only (section 3.2)."""
  log = [('read', 0, len(records))]

  def apply(name: str, result: tuple[Records, Records]) -> Records:
    log.append((name, len(result[1]), len(result[0])))
    return result[0]

  if max_tokens is not None:
    records = apply(f'over {max_tokens} tokens', short_enough(records, max_tokens, length))
  if prefix is not None:
    records = apply(f'same first {prefix} characters', deduplicate(records, prefix))
  if per_user is not None:
    records = apply(f'over {per_user} of a user', cap_users(records, per_user))
  splits = split(records, shares, seed)
  if remove_pii and 'train' in splits:
    found = [(r, pii(text_of(r))) for r in splits['train']]
    kinds = Counter(kind for _, kind in found if kind)
    splits['train'] = [r for r, kind in found if not kind]
    told = ', '.join(f'{kind} {n}' for kind, n in kinds.most_common())
    log.append(('personal data in train' + (f' ({told})' if told else ''), sum(kinds.values()), sum(map(len, splits.values()))))
  return splits, log
