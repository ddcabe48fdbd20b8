"""Inputs by generation: how many, and the values that people's files and flags are made of.

A few examples in every run of the tests, always the same; ALIGNJAX_EXAMPLES=2000 draws as many, new
ones each time.
"""

import json
import math
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

MANY = int(os.environ.get('ALIGNJAX_EXAMPLES', 0))
examples = settings(
  max_examples=MANY or 25,
  derandomize=not MANY,
  deadline=None,
  database=None,
  suppress_health_check=[
    HealthCheck.too_slow,
    HealthCheck.filter_too_much,
    HealthCheck.data_too_large,
  ],
)

ODD = [
  '',
  ' ',
  '\n',
  '\u2028',
  '\x85',
  '\x0c',
  '\r',
  '\x00',
  '\ufeff',
  '\ud83d',
  '\udc00',
  '\U0001f600',
  '"',
  "'",
  '\\',
  '[',
  '{',
  ';',
  ':',
  '=',
  ',',
  '{prompt}',
  '<|im_end|>',
  '<|endoftext|>',
  'NaN',
  '0',
  'x' * 3000,
]
text = st.one_of(
  st.sampled_from(ODD), st.text(max_size=8), st.lists(st.sampled_from(ODD), max_size=4).map(''.join)
)
number = st.one_of(
  st.integers(-3, 9), st.floats(), st.sampled_from([2**31, 10**400, -1, True, 1e308])
)
scalar = st.one_of(st.none(), st.booleans(), number, text)
value = st.recursive(
  scalar,
  lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
  max_leaves=6,
)
message = st.fixed_dictionaries(
  {},
  optional={
    'role': st.one_of(st.sampled_from(['system', 'user', 'assistant', 'tool']), value),
    'content': st.one_of(text, text, value),
    'name': value,
  },
)
good_message = st.fixed_dictionaries(
  {'role': st.sampled_from(['system', 'user', 'assistant']), 'content': text}
)
messages = st.lists(st.one_of(good_message, good_message, message), max_size=4)


def rows(fields, ours=text):
  """Objects with these fields, each mostly as it should be, or anything; some missing, some that
  nobody asked for."""
  return st.one_of(
    value,
    st.fixed_dictionaries(
      {},
      optional={name: st.one_of(good, good, good, value, ours) for name, good in fields.items()}
      | {'more': value},
    ),
  )


def as_lines(found, ascii_only: bool) -> bytes:
  """JSON lines, which may hold what JSON does not: NaN, and halves of surrogate pairs."""
  return '\n'.join(json.dumps(row, ensure_ascii=ascii_only) for row in found).encode(
    'utf-8', 'surrogatepass'
  )


def whole(found) -> bool:
  """Whether a value is one of strict JSON: finite numbers, and text that UTF-8 can hold."""
  if isinstance(found, dict):
    return all(map(whole, found)) and all(map(whole, found.values()))
  if isinstance(found, list):
    return all(map(whole, found))
  if isinstance(found, str):
    return not any('\ud800' <= c <= '\udfff' for c in found)
  return not isinstance(found, float) or math.isfinite(found)
