"""The pictures of the dashboard, as PNG. They import matplotlib, so that a server that shows none
starts without it."""

from __future__ import annotations

import datetime
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from alignjax.label.figures import Answer

BLUE, GREY = '#1a4f8b', '#6e7781'


def progress(rows: Sequence[Answer], left: int) -> bytes:
  """The answers so far against time. left: how many the task still needs."""
  made = _figure(2.8)
  axes = made.subplots()
  times = [
    datetime.datetime.fromtimestamp(row.at, datetime.UTC) for row in rows if row.status == 'done'
  ]
  wanted = len(times) + left
  axes.step(np.asarray(times), np.arange(1, len(times) + 1), where='post', color=BLUE)
  axes.axhline(wanted, color=GREY, linewidth=1, linestyle='--')
  axes.annotate(
    'needed', (0.01, wanted), xycoords=('axes fraction', 'data'), color=GREY, va='bottom'
  )
  axes.set_ylim(0, wanted * 1.12 + 1)
  axes.set_ylabel('answers')
  axes.set_xlabel('time (UTC)')
  return _png(made)


def labelers(people: Sequence[dict[str, Any]]) -> bytes:
  """The agreement of each labeler with the others and with known answers, with 95% intervals."""
  shown = [p for p in people if p['others']['mean'] is not None or p['gold']['mean'] is not None]
  made = _figure(1.3 + 0.3 * max(len(shown), 1))
  axes = made.subplots()
  for kind, colour, shift in (('others', BLUE, 0.12), ('gold', GREY, -0.12)):
    label = 'with other labelers' if kind == 'others' else 'with known answers'
    for place, person in enumerate(shown):
      value = person[kind]
      if value['mean'] is None:
        continue
      low, high = value['ci95']
      if low is not None:
        axes.plot([low, high], [place + shift] * 2, color=colour, linewidth=1.5)
      axes.plot(value['mean'], place + shift, 'o', color=colour, markersize=4, label=label)
      label = '_nolegend_'
  axes.set_yticks(range(len(shown)), [p['name'] for p in shown])
  axes.set_ylim(-0.6, len(shown) - 0.4)
  axes.set_xlim(0, 1)
  axes.set_xlabel('agreement on two responses of an item (95% interval by item)')
  if axes.get_legend_handles_labels()[0]:
    axes.legend(loc='lower left', frameon=False)
  return _png(made)


def _png(made: Any) -> bytes:
  for axes in made.axes:
    axes.spines[['top', 'right']].set_visible(False)
  buffer = io.BytesIO()
  made.savefig(buffer, format='png', dpi=110)
  return buffer.getvalue()


def _figure(height: float) -> Any:
  from matplotlib import figure

  return figure.Figure(figsize=(7, height), layout='constrained')
