"""The figures of the dashboard: how far a task is, how well labelers agree with each other and with
known answers, and who should be looked at.

Agreement is that of `evals.preference.statistics`: on every two responses of an item, first better,
second better or tie. The unit of every interval is the item.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa

from alignjax.evals import stats
from alignjax.evals.preference import statistics
from alignjax.evals.preference.judgment_rows import FLAGS
from alignjax.evals.preference.verdicts import Verdict
from alignjax.label import history
from alignjax.label.assignment import order_of
from alignjax.label.schema import answers, items, leases, people, reviews, tasks

RESPONSES = [str(i) for i in range(99)]  # the names of an item's responses in verdicts
SENSITIVE = (
  'sexual_content',
  'violent_content',
  'encourages_harm',
  'denigrates_protected_class',
  'harmful_advice',
)
# When a labeler is pointed out: after this many answers, ...
ENOUGH = 8
FAST = 0.25  # ... a median time below this share of the task's median,
# ... or rankings that follow the order shown, or reverse it: this share of those that would not do
# so by chance, ...
SAME_ORDER = 0.5
CHANCE = 0.001  # ... where chance alone would do as much with a smaller probability than this.
# The cut-offs of the paper's screening (B.1, "soft").
AGREEMENT, SCORE = 0.75, 6.0


class Answer(NamedTuple):
  """A current answer, with its item and its labeler."""

  id: int
  item: Any
  person: int
  name: str
  pool: str
  status: str
  payload: dict[str, Any]
  shown: list[int]
  seconds: float
  active: float | None
  at: float


def read(connection: sa.Connection, task: int | None = None) -> list[Answer]:
  """Returns the current answers, of one task or of all, in the order in which they were given."""
  columns = [c.label(f'of_{c.name}') for c in items.c]
  query = (
    sa.select(answers, people.c.name, people.c.pool, *columns)
    .join(items, items.c.id == answers.c.item_id)
    .join(people, people.c.id == answers.c.person_id)
    .where(answers.c.current)
    .order_by(answers.c.id)
  )
  if task is not None:
    query = query.where(items.c.task_id == task)
  item_of: dict[int, Any] = {}
  made = []
  for row in connection.execute(query):
    if row.item_id not in item_of:
      item_of[row.item_id] = Item(*(getattr(row, f'of_{name}') for name in Item._fields))
    made.append(
      Answer(
        row.id,
        item_of[row.item_id],
        row.person_id,
        row.name,
        row.pool,
        row.status,
        row.payload,
        row.shown,
        row.elapsed,
        row.active,
        row.at,
      )
    )
  return made


class Item(NamedTuple):
  """An item as it stands in the database."""

  id: int
  task_id: int
  prompt: Any
  use_case: str | None
  responses: list[dict[str, Any]]
  extra: dict[str, Any]
  gold: dict[str, Any] | None
  is_gold: bool
  hidden: str | None


def ranked(answers: Iterable[Answer]) -> list[Answer]:
  """Those that rank responses."""
  return [a for a in answers if a.status == 'done' and a.payload.get('ranks')]


def verdicts(rows: Iterable[Answer]) -> list[Verdict]:
  """Returns a verdict on every two responses of an item for each answer that ranks them."""
  made = []
  for row in ranked(rows):
    made += _of_ranks(row.payload['ranks'], row.item.id, row.name, row.shown)
  return made


def _of_ranks(
  ranks: Sequence[int], item: int, labeler: str, shown: Sequence[int] = ()
) -> list[Verdict]:
  """The verdicts of one ranking. The responses of an item are named in a random order of its own,
  because Krippendorff's alpha depends on it: where the better response is always stored first, the
  choice "first" would be likelier than "second" by chance too."""
  place = {response: at for at, response in enumerate(shown)}
  names = [RESPONSES[k] for k in order_of(item, 0, len(ranks))]
  return [
    Verdict(
      f'item {item}',
      names[i],
      names[j],
      0.5 * (1 + np.sign(ranks[j] - ranks[i])),
      'people',
      labeler,
      ('a' if place[i] < place[j] else 'b') if shown else '',
    )
    for i, j in itertools.combinations(range(len(ranks)), 2)
  ]


def agreement(rows: Sequence[Answer]) -> dict[str, Any] | None:
  """The agreement between labelers (statistics.agreement), or None where no item has two."""
  return statistics.agreement(statistics.tabulate(verdicts(rows), RESPONSES))


def _same(pairs: Iterable[tuple[int, Sequence[int], Sequence[int]]]) -> stats.Figure:
  """The share of two responses on which two rankings say the same. pairs: (item, ranks, ranks)."""
  same, clusters = [], []
  for item, one, two in pairs:
    for i, j in itertools.combinations(range(len(one)), 2):
      same.append(float(np.sign(one[i] - one[j]) == np.sign(two[i] - two[j])))
      clusters.append(f'item {item}')
  return stats.interval(same, clusters, (0, 1))


def _with_known(rankings: Iterable[Answer]) -> stats.Figure:
  """The agreement of rankings with the known answers of their items."""
  return _same(
    (row.item.id, row.payload['ranks'], row.item.gold['ranks'])
    for row in rankings
    if row.item.gold and row.item.gold.get('ranks')
  )


def labelers(rows: Sequence[Answer]) -> list[dict[str, Any]]:
  """Returns the figures of each labeler among the answers of a task, and their alarms."""
  by_item: dict[int, list[Answer]] = {}
  for row in ranked(rows):
    by_item.setdefault(row.item.id, []).append(row)
  usual = seconds([row for row in rows if row.status == 'done'])
  made = []
  for person in dict.fromkeys(row.person for row in rows):
    figures = _of_labeler([row for row in rows if row.person == person], by_item)
    made.append(figures | {'alarms': alarms(figures, usual)})
  return made


def _of_labeler(mine: Sequence[Answer], by_item: Mapping[int, Sequence[Answer]]) -> dict[str, Any]:
  """The figures of one labeler. by_item: everybody's rankings of each item."""
  done = [row for row in mine if row.status == 'done']
  rankings = ranked(mine)
  ties = [
    float(a == b) for row in rankings for a, b in itertools.combinations(row.payload['ranks'], 2)
  ]
  flags = [
    set(r['flags']) for row in done for r in row.payload.get('ratings') or () if 'flags' in r
  ]
  return dict(
    person=mine[0].person,
    name=mine[0].name,
    pool=mine[0].pool,
    done=len(done),
    skipped=sum(row.status == 'skipped' for row in mine),
    seconds=seconds(done),
    others=_same(
      (row.item.id, row.payload['ranks'], other.payload['ranks'])
      for row in rankings
      for other in by_item[row.item.id]
      if other.person != row.person
    ),
    gold=_with_known(rankings),
    position=statistics.position_bias(verdicts(rankings)),
    ties=float(np.mean(ties)) if ties else None,
    flags={f: sum(f in have for have in flags) / len(flags) for f in FLAGS} if flags else {},
    same_order=same_order([[row.payload['ranks'][i] for i in row.shown] for row in rankings]),
  )


def same_order(rankings: Iterable[Sequence[int]]) -> dict[str, dict[str, float]]:
  """Measures how often rankings follow the order in which the responses were shown.

  Of the orders in which K responses can be shown, which are equally likely, a share of
  n_1! n_2! ... / K! is that of a ranking whose ties are groups of n_1, n_2, ... responses. So every
  ranking of two responses without a tie follows the order shown or its reverse, and a random one of
  four does in 1 of 12 cases.

  Args:
    rankings: the ranks of the responses of each item, in the order in which they were shown. Those
      that rank nothing above another are left out.

  Returns:
    {what is followed: {'share': of the rankings that follow it, 'chance': the same share of a
      labeler whose rankings have nothing to do with the order shown, 'p': the probability that such
      a labeler follows it as often or more often}}, or {} if there are no rankings.
  """
  rankings = [list(ranks) for ranks in rankings if len(set(ranks)) > 1]
  if not rankings:
    return {}
  forward = np.array([ranks == sorted(ranks) for ranks in rankings])
  reverse = np.array([ranks == sorted(ranks, reverse=True) for ranks in rankings])
  one = np.array(
    [
      math.prod(math.factorial(ranks.count(rank)) for rank in set(ranks))
      / math.factorial(len(ranks))
      for ranks in rankings
    ]
  )
  ways = {
    'the order shown': (forward, one),
    'the reverse of the order shown': (reverse, one),
    'the order shown or its reverse': (forward | reverse, 2 * one),
  }
  return {
    way: dict(
      share=float(hits.mean()), chance=float(chance.mean()), p=_as_many(int(hits.sum()), chance)
    )
    for way, (hits, chance) in ways.items()
  }


def _as_many(count: int, chances: np.ndarray) -> float:
  """The probability that `count` or more of independent events happen, which have these chances."""
  of_count = np.ones(1)
  for chance in chances:
    of_count = np.convolve(of_count, [1 - chance, chance])
  return float(of_count[count:].sum())


def seconds(rows: Sequence[Answer]) -> float | None:
  """The median time of an answer: that in which the page was used, where the browser counted it,
  otherwise that from getting the item to submitting it."""
  found = [row.seconds if row.active is None else row.active for row in rows]
  return float(np.median(found)) if found else None


def alarms(figures: dict[str, Any], usual: float | None) -> list[str]:
  """Returns what a researcher should look at, in words."""
  made = []
  if figures['done'] >= ENOUGH:
    if usual and figures['seconds'] < FAST * usual:
      made.append(
        f'much faster than the others ({figures["seconds"]:.0f} s where {usual:.0f} s are usual)'
      )
    for way, found in figures['same_order'].items():
      beyond = found['share'] - found['chance'] >= SAME_ORDER * (1 - found['chance'])
      if beyond and found['p'] < CHANCE:
        made.append(f'{found["share"]:.0%} of the rankings follow {way}')
        break
  gold = figures['gold']
  if gold['n'] and gold['ci95'][1] is not None and gold['ci95'][1] < AGREEMENT:
    made.append(f'agrees with known answers in {gold["mean"]:.0%} only')
  return made


def of_task(connection: sa.Connection, task: Any) -> dict[str, Any]:
  """Returns the figures of a task: those of `summary`, and of each labeler."""
  rows = read(connection, task.id)
  return summary(connection, task, rows) | dict(labelers=labelers(rows))


def wanted(connection: sa.Connection, task: Any) -> tuple[int, int, int]:
  """(the number of items of a task, how many of them are taken out, the answers that are left)."""
  overlap = sa.func.coalesce(items.c.overlap, task.overlap)
  left = sa.case((items.c.answers < overlap, overlap - items.c.answers), else_=0)
  count, hidden, missing = connection.execute(
    sa.select(
      sa.func.count(),
      sa.func.sum(sa.case((items.c.hidden.is_not(None), 1), else_=0)),
      sa.func.sum(sa.case((items.c.is_gold | items.c.hidden.is_not(None), 0), else_=left)),
    ).where(items.c.task_id == task.id)
  ).one()
  return count, int(hidden or 0), int(missing or 0)


def summary(connection: sa.Connection, task: Any, rows: Sequence[Answer]) -> dict[str, Any]:
  """Returns what is done and left of a task, the rate, and agreement. rows: its current answers."""
  at = history.now(connection)
  count, hidden, left = wanted(connection, task)
  held = connection.execute(
    sa.select(sa.func.count())
    .select_from(leases.join(items, items.c.id == leases.c.item_id))
    .where(items.c.task_id == task.id, leases.c.expires > at)
  ).scalar_one()
  done = [row for row in rows if row.status == 'done']
  last_day = [row for row in done if row.at > at - 86400]
  span = (at - min((row.at for row in last_day), default=at)) / 3600
  return dict(
    task=task,
    items=count,
    hidden=hidden,
    done=len(done),
    left=left,
    held=held,
    skipped=sum(row.status == 'skipped' for row in rows),
    per_hour=len(last_day) / span if span > 1 / 60 else None,
    seconds=seconds(done),
    agreement=agreement(rows),
    position=statistics.position_bias(verdicts(rows)),
  )


def screening(connection: sa.Connection) -> list[dict[str, Any]]:
  """Returns what each candidate of the pool 'screening' reached, and whether that passes the
  paper's cut-offs (B.1): agreement of 75% with the researchers' answers, on rankings and on which
  responses are sensitive, and 6 of 7 for demonstrations. `passes` is None while something is not
  measured.
  """
  rows = read(connection)
  kinds = {row.id: row.kind for row in connection.execute(sa.select(tasks.c.id, tasks.c.kind))}
  scores: dict[int, list[int]] = {}
  for row in connection.execute(sa.select(reviews.c.answer_id, reviews.c.score)):
    scores.setdefault(row.answer_id, []).append(row.score)
  made = []
  for candidate in connection.execute(
    sa.select(people.c.id, people.c.name)
    .where(people.c.pool == 'screening', people.c.role == 'labeler')
    .order_by(people.c.id)
  ):
    mine = [row for row in rows if row.person == candidate.id and row.status == 'done']
    judged = [row for row in mine if row.item.gold]
    ranking = _with_known(ranked(judged))
    flagged = _flags_agree(judged)
    written = [
      float(np.mean(scores[row.id]))
      for row in mine
      if kinds[row.item.task_id] == 'demonstration' and row.id in scores
    ]
    demonstrations = stats.interval(written, bounds=(1, 7))
    parts = [
      (ranking['mean'], AGREEMENT),
      (flagged['mean'], AGREEMENT),
      (demonstrations['mean'], SCORE),
    ]
    known = [value >= least for value, least in parts if value is not None]
    made.append(
      dict(
        name=candidate.name,
        ranking=ranking,
        flags=flagged,
        demonstrations=demonstrations,
        passes=False if not all(known) else True if len(known) == len(parts) else None,
      )
    )
  return made


def _flags_agree(rows: Sequence[Answer]) -> stats.Figure:
  """How often a labeler and the known answer say the same on whether a response is sensitive."""
  same, clusters = [], []
  for row in rows:
    pairs = zip(
      row.payload.get('ratings') or (), (row.item.gold or {}).get('ratings') or (), strict=False
    )
    for mine, known in pairs:
      if 'flags' in mine and 'flags' in known:
        same.append(float(_sensitive(mine) == _sensitive(known)))
        clusters.append(f'item {row.item.id}')
  return stats.interval(same, clusters, (0, 1))


def _sensitive(rating: Mapping[str, Any]) -> bool:
  return bool(set(rating['flags']) & set(SENSITIVE))
