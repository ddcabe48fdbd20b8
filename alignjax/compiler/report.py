"""What `alignjax estimate` says of a compiled step, in Markdown.

Results are the JSON values of alignjax/commands/estimate.py: compile_stage.
"""

from alignjax.compiler import chips, cost


def describe(name: str, r: dict) -> str:
  """The report of one step in Markdown."""
  head = (
    f'## {name}\n\n{r["devices"]} x {r["kind"]}, mesh '
    + ' x '.join(f'{a} {n}' for a, n in r['mesh'].items())
    + f'; compiled in {r["minutes"]:.1f} minutes (jax {r["jax"]})'
  )
  if 'memory' not in r:
    return f'{head}\n\nDoes not fit: {r["why"]}\n'
  m, chip = r['memory'], chips.CHIPS.get(r['chip'])
  lines = [
    head,
    cost.table(
      ('memory of a device', ''),
      [
        ('arguments (state, frozen networks, batch)', _gib(m['arguments'])),
        ('temporaries', _gib(m['temporaries'])),
        ("outputs, beyond what takes an argument's place", _gib(m['outputs'] - m['alias'])),
        ('program', _gib(m['code'])),
        ('peak', _gib(r['peak'])),
        *([('capacity', _gib(r['capacity']))] if r['capacity'] else []),
      ],
    ),
  ]
  lines.append(
    cost.table(
      ('largest at the fullest point, beside the arguments', 'arrays', 'together', 'phase', 'from'),
      [(f'`{s}`', count, _gib(b), p, f'`{n[-70:]}`') for s, count, b, p, n in r['arrays']],
    )
  )
  rows = []
  for phase, p in r['phases'].items():
    flops, wire = r['needed'].get(phase, (0, 0))
    rows.append(
      (
        phase,
        cost.si(p['flops']),
        cost.si(flops / r['devices']) if flops else '',
        cost.si(p['traffic'], 'B'),
        cost.si(p['wire'], 'B'),
        cost.si(wire, 'B') if wire else '',
        *((f'{p["seconds"]:.3g}', f'{p["wire"] / chip.wire:.3g}') if chip else ()),
      )
    )
  lines.append(
    cost.table(
      (
        'phase, a device',
        'FLOPs',
        'model FLOPs',
        'memory traffic',
        'received',
        'least for the sharding',
        *(('chip s', 'wire s') if chip else ()),
      ),
      rows,
    )
  )
  lines.append(
    cost.table(
      ('collective', 'over', 'phase', 'largest array', 'times', 'received', 'from'),
      [
        (
          s['kind'],
          s['axes'],
          s['phase'],
          f'`{s["shape"]}`',
          s['times'],
          cost.si(s['bytes'], 'B'),
          f'`{cost.short(s["op_name"])[-60:]}`',
        )
        for s in r['collectives'][:16]
      ],
    )
  )
  if r['decode_tokens']:
    lines.append(decode_words(r))
  if chip:
    lines.append(
      f'Estimated step: {r["seconds"][0]:.3g} s with communication behind computation, '
      f'{r["seconds"][1]:.3g} s with '
      f'none of it hidden; MFU {r["mfu"][0]:.0%} to {r["mfu"][1]:.0%}.'
    )
  return '\n\n'.join(lines) + '\n'


def decode_words(r: dict) -> str:
  """What crosses the wire for each decoded token, and the largest gather among it."""
  inside = [s for s in r['collectives'] if s['phase'] == 'decode' and s['in_loop']]
  gathers = [s for s in inside if s['kind'] == 'all-gather']
  each = sum(s['bytes'] for s in inside) / r['decode_tokens']
  least = r['needed']['decode'][1] / r['decode_tokens']
  largest = max((s['bytes'] / s['times'] for s in gathers), default=0)
  return (
    f'Decode loop: {cost.si(each, "B")} a generated position and device, {cost.si(least, "B")} at '
    f'least for the sharding; '
    f'largest gather inside it {cost.si(largest, "B")}.'
  )


def summary(results: dict[str, dict]) -> str:
  """One row a step: the table of what fits where."""
  rows = []
  for name, r in sorted(results.items()):
    if 'memory' not in r:
      rows.append((name, '', '', 'no', '', '', '', '', f'{r["minutes"]:.1f}'))
      continue
    wire, least = (
      sum(p['wire'] for p in r['phases'].values()),
      sum(w for _, w in r['needed'].values()),
    )
    decode = ''
    if r['decode_tokens']:
      inside = sum(s['bytes'] for s in r['collectives'] if s['phase'] == 'decode' and s['in_loop'])
      decode = (
        f'{cost.si(inside / r["decode_tokens"], "B")} / '
        f'{cost.si(r["needed"]["decode"][1] / r["decode_tokens"], "B")}'
      )
    rows.append(
      (
        name,
        ' x '.join(str(n) for n in r['mesh'].values()),
        f'{_short(r["memory"]["arguments"])} + {_short(r["memory"]["temporaries"])}',
        f'{_short(r["peak"])}' + (f' of {_short(r["capacity"])}' if r['capacity'] else ''),
        cost.si(sum(p['flops'] for p in r['phases'].values())),
        f'{cost.si(wire, "B")} / {cost.si(least, "B")}',
        decode,
        f'{r["seconds"][0]:.3g} to {r["seconds"][1]:.3g}; {r["mfu"][0]:.0%} to {r["mfu"][1]:.0%}'
        if r['chip']
        else '',
        f'{r["minutes"]:.1f}',
      )
    )
  return cost.table(
    (
      'config, stage, slice',
      'data x fsdp x tensor',
      'arguments + temporaries, GiB',
      'peak, GiB',
      'FLOPs a device',
      'received a step / least',
      'received a token / least',
      'step, s; MFU',
      'compile, min',
    ),
    rows,
  )


def _gib(count: float) -> str:
  return f'{count / 2**30:.2f} GiB'


def _short(count: float) -> str:
  """Bytes in GiB for a column whose head names the unit."""
  return f'{count / 2**30:.1f}'
