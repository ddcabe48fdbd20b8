"""What `alignjax estimate` prints about compiled steps, in Markdown.

Each function takes what estimate.compile_stage returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alignjax.compiler import chips, cost
from alignjax.evals import markdown


def describe(title: str, result: Mapping[str, Any]) -> str:
  """Returns the report of one step."""
  mesh = ' x '.join(f'{axis} {size}' for axis, size in result['mesh'].items())
  head = (
    f'## {title}\n\n{result["devices"]} x {result["kind"]}, mesh {mesh}; compiled in '
    f'{result["minutes"]:.1f} minutes (jax {result["jax"]})'
  )
  if 'memory' not in result:
    return f'{head}\n\nDoes not fit: {result["why"]}\n'
  parts = [head, _memory(result), _arrays(result), _phases(result), _collectives(result)]
  if result['decode_tokens']:
    parts.append(_decoding(result))
  if 'seconds' in result:
    (fast, slow), (most, least) = result['seconds'], result['mfu']
    parts.append(
      f'Estimated step: {fast:.3g} s if communication is hidden behind computation, {slow:.3g} s '
      f'if none of it is; MFU {most:.0%} to {least:.0%}.'
    )
  return '\n\n'.join(parts) + '\n'


def summary(results: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns the table of several steps by their titles, one row each."""
  return _table(
    (
      'config, stage, slice',
      'data x fsdp x sequence x tensor',
      'arguments + temporaries, GiB',
      'peak, GiB',
      'FLOPs per device',
      'received per step / least',
      'received per token / least',
      'step, s; MFU',
      'compile, min',
    ),
    [_row(title, result) for title, result in sorted(results.items())],
  )


def _memory(result: Mapping[str, Any]) -> str:
  sizes = result['memory']
  rows = [
    ('arguments (state, frozen networks, batch)', sizes['arguments']),
    ('temporaries', sizes['temporaries']),
    ("outputs, beyond what takes an argument's place", sizes['outputs'] - sizes['alias']),
    ('program', sizes['code']),
    ('peak', result['peak']),
    *([('capacity', result['capacity'])] if result['capacity'] else []),
  ]
  return _table(('memory of a device', ''), [(what, _gib(size)) for what, size in rows])


def _arrays(result: Mapping[str, Any]) -> str:
  """The arrays that fill the memory where the step needs most of it."""
  return _table(
    ('largest at the peak, beside the arguments', 'arrays', 'together', 'phase', 'from'),
    [
      (f'`{shape}`', count, _gib(size), phase, f'`{source[-70:]}`')
      for shape, count, size, phase, source in result['arrays']
    ],
  )


def _phases(result: Mapping[str, Any]) -> str:
  chip = chips.CHIPS.get(result['chip'])
  rows = []
  for name, phase in result['phases'].items():
    flops, wire = result['needed'].get(name, (0, 0))
    rows.append(
      (
        name,
        cost.si(phase['flops']),
        cost.si(flops / result['devices']) if flops else '',
        cost.si(phase['traffic'], 'B'),
        cost.si(phase['wire'], 'B'),
        cost.si(wire, 'B') if wire else '',
        *((f'{phase["seconds"]:.3g}', f'{phase["wire"] / chip.wire:.3g}') if chip else ()),
      )
    )
  return _table(
    (
      'phase, per device',
      'FLOPs',
      'model FLOPs',
      'memory traffic',
      'received',
      'least for the sharding',
      *(('chip, s', 'wire, s') if chip else ()),
    ),
    rows,
  )


def _collectives(result: Mapping[str, Any]) -> str:
  """The largest 16."""
  return _table(
    ('collective', 'over', 'phase', 'largest array', 'times', 'received', 'from'),
    [
      (
        sent['kind'],
        sent['axes'],
        sent['phase'],
        f'`{sent["shape"]}`',
        sent['times'],
        cost.si(sent['bytes'], 'B'),
        f'`{cost.short(sent["op_name"])[-60:]}`',
      )
      for sent in result['collectives'][:16]
    ],
  )


def _decoding(result: Mapping[str, Any]) -> str:
  """The communication for each decoded token, and the largest gather in it."""
  received, least = _per_token(result)
  gathers = [s for s in _in_decode_loop(result) if s['kind'] == 'all-gather']
  largest = max((s['bytes'] / s['times'] for s in gathers), default=0)
  return (
    f'Decode loop: each device receives {cost.si(received, "B")} per generated token; the sharding '
    f'needs at least {cost.si(least, "B")}. The largest gather in the loop has '
    f'{cost.si(largest, "B")}.'
  )


def _row(title: str, result: Mapping[str, Any]) -> tuple[str, ...]:
  minutes = f'{result["minutes"]:.1f}'
  if 'memory' not in result:
    return (title, '', '', 'no', '', '', '', '', minutes)
  sizes, phases = result['memory'], result['phases'].values()
  least = sum(wire for _, wire in result['needed'].values())
  capacity = f' of {_in_gib(result["capacity"])}' if result['capacity'] else ''
  decoding = seconds = ''
  if result['decode_tokens']:
    decoding = ' / '.join(cost.si(x, 'B') for x in _per_token(result))
  if 'seconds' in result:
    (fast, slow), (most, least_mfu) = result['seconds'], result['mfu']
    seconds = f'{fast:.3g} to {slow:.3g}; {most:.0%} to {least_mfu:.0%}'
  return (
    title,
    ' x '.join(str(size) for size in result['mesh'].values()),
    f'{_in_gib(sizes["arguments"])} + {_in_gib(sizes["temporaries"])}',
    f'{_in_gib(result["peak"])}{capacity}',
    cost.si(sum(p['flops'] for p in phases)),
    f'{cost.si(sum(p["wire"] for p in phases), "B")} / {cost.si(least, "B")}',
    decoding,
    seconds,
    minutes,
  )


def _in_decode_loop(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  return [s for s in result['collectives'] if s['phase'] == 'decode' and s['in_loop']]


def _per_token(result: Mapping[str, Any]) -> tuple[float, float]:
  """(bytes that a device receives per generated token, the least that the sharding needs)."""
  tokens = result['decode_tokens']
  received = sum(s['bytes'] for s in _in_decode_loop(result))
  return received / tokens, result['needed']['decode'][1] / tokens


def _gib(count: float) -> str:
  return f'{count / 2**30:.2f} GiB'


def _in_gib(count: float) -> str:
  """The number for a column whose head names the unit."""
  return f'{count / 2**30:.1f}'


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  return '\n'.join(markdown.table(head, rows))
