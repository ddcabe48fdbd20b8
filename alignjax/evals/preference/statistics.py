"""Computes preference figures from verdicts: win rates, Bradley-Terry strengths and agreement (the
paper's sections 3.6 and 4.1). The influence of length is in length.py.

The two orders in which one labeler judged a pair are averaged first; then every labeler's verdict
on a pair counts as one. Ties count one half. The intervals are by prompt, because the verdicts on
one prompt are not independent.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from alignjax.evals.preference import length
from alignjax.evals.preference.judgment_rows import FLAGS
from alignjax.evals.preference.verdicts import Judged, Table, Verdict, clusters
from alignjax.evals.stats import ANY, SHARE, Figure, interval, statistic


def tabulate(
  verdicts: Sequence[Verdict], policies: Sequence[str], same: Mapping[str, str] | None = None
) -> Table:
  """Returns the columns of the verdicts that are not None. Repeated verdicts of the same labeler
  are averaged. same: the labels of verdicts.clusters; None takes every prompt_id for a prompt of
  its own."""
  place = {name: k for k, name in enumerate(policies)}
  cells: dict[tuple, list[float]] = {}
  for v in verdicts:
    if v.p is not None:
      i, j = place[v.a], place[v.b]
      key, p = (
        ((v.prompt_id, i, j, v.labeler), v.p)
        if i < j
        else ((v.prompt_id, j, i, v.labeler), 1 - v.p)
      )
      cells.setdefault(key, []).append(p)
  columns = list(zip(*cells, strict=True)) if cells else [[], [], [], []]
  return Table(
    np.array(columns[0], str),
    np.array(columns[1], int),
    np.array(columns[2], int),
    np.array(columns[3], str),
    np.array([np.mean(c) for c in cells.values()], float),
    np.array(_labels(columns[0], same), str),
  )


def summarize(
  judged: Judged, policies: Sequence[str], baseline: str, texts: Mapping[tuple[str, str], str]
) -> dict[str, Any]:
  """Returns all figures as JSON values.

  Args:
    judged: the verdicts and ratings.
    policies: the names of the policies.
    baseline: the policy that win rates and strengths are relative to.
    texts: {(prompt_id, policy): the response}, where it is known.

  Returns:
    {'judges': {judge: {'win_rate': {a: {b: Figure}}, 'bradley_terry': {policy: Figure}, 'length':
      ..., 'length_controlled': {policy: Figure}, 'agreement': ..., 'position': ...}}, 'ratings':
      {judge: {policy: {'likert': Figure, FLAG: Figure}}}, 'between_judges': [...], 'words':
      {policy: Figure}}.
  """
  by_judge: dict[str, list[Verdict]] = {}
  for v in judged.verdicts:
    by_judge.setdefault(v.judge, []).append(v)
  judges, tables, same = {}, {}, clusters(judged)
  words = {at: len(text.split()) for at, text in texts.items()}
  for judge, verdicts in by_judge.items():
    table = tables[judge] = tabulate(verdicts, policies, same)
    judges[judge] = dict(
      verdicts=len(table.p),
      prompts=len({judged.repeats.get(q, q) for q in table.prompts}),
      unjudged=sum(v.p is None for v in verdicts),
      labelers=sorted(set(table.labelers) - {''}),
      ties=interval(table.p == 0.5, table.clusters, SHARE),
      win_rate=win_rates(table, policies),
      bradley_terry=bradley_terry(table, policies, baseline),
      length=length.effect(table, policies, words),
      length_controlled=length.controlled_win_rates(table, policies, baseline, words),
      agreement=agreement(table),
      position=position_bias(verdicts, same),
    )
  # A response of a prompt that has several of another policy is there for each of these.
  each = {
    (judged.repeats.get(q, q), policy, text): (q, words[q, policy])
    for (q, policy), text in texts.items()
  }
  mean_words = {}
  for name in policies:
    own = [found for (_, policy, _), found in each.items() if policy == name]
    labels = _labels((q for q, _ in own), same)
    mean_words[name] = interval([n for _, n in own], labels, ANY)
  return dict(
    policies=list(policies),
    baseline=baseline,
    judges=judges,
    between_judges=between(tables),
    ratings=rated(judged, policies),
    words=mean_words,
  )


def win_rates(table: Table, policies: Sequence[str]) -> dict[str, dict[str, Figure]]:
  """Returns {a: {b: the share of verdicts that prefer a to b}}. It holds both [a][b] and [b][a],
  which sum to 1."""
  out: dict[str, dict[str, Figure]] = {name: {} for name in policies}
  for i, j in itertools.combinations(range(len(policies)), 2):
    rows = (table.i == i) & (table.j == j)
    figure = interval(table.p[rows], table.clusters[rows], SHARE)
    out[policies[i]][policies[j]] = figure
    out[policies[j]][policies[i]] = interval(1 - table.p[rows], table.clusters[rows], SHARE)
  return out


def bradley_terry(table: Table, policies: Sequence[str], baseline: str) -> dict[str, Figure]:
  """Returns the strengths theta with P(a over b) = sigmoid(theta_a - theta_b), by maximum
  likelihood (choix). The strength of the baseline is 0, and a tie counts as half a win for each
  side.

  The likelihood has no maximum if some policies never lost to the others, or were never compared
  with them; 'mean' is None then. The interval is None if there is no maximum without some of the
  prompts. 'n' is the number of verdicts on the policy.
  """
  names, group = np.unique(table.clusters, return_inverse=True)
  k = len(policies)
  wins = np.zeros((len(names), k, k))  # [prompt, a, b]: wins of a over b
  np.add.at(wins, (group, table.i, table.j), table.p)
  np.add.at(wins, (group, table.j, table.i), 1 - table.p)
  counts = (wins.sum((0, 2)) + wins.sum((0, 1))).round().astype(int)
  anchor = list(policies).index(baseline)
  start = _strengths(wins.sum(0))

  def relative(rows: np.ndarray) -> np.ndarray:
    found = _strengths(wins[rows].sum(0), start) if start is not None else None
    return np.full(k, np.nan) if found is None else found - found[anchor]

  figures = statistic(relative, range(len(names))) if len(names) else [statistic(relative, ())] * k
  return {
    name: figure | {'n': int(n)} for name, figure, n in zip(policies, figures, counts, strict=True)
  }


def _strengths(wins: np.ndarray, start: np.ndarray | None = None) -> np.ndarray | None:
  """Returns the strengths, f64[K], for a matrix of wins. It returns None if the likelihood has no
  maximum, that is, if some policy cannot be reached from another one by a chain of defeats (Ford
  1957)."""
  try:
    import choix
  except ModuleNotFoundError:
    raise ValueError("Bradley-Terry strengths need choix: pip install 'alignjax[eval]'.") from None
  reach = (wins > 0) | np.eye(len(wins), dtype=bool)
  for _ in range(len(wins).bit_length()):
    reach = reach.astype(float) @ reach > 0
  if not reach.all():
    return None
  try:
    return choix.ilsr_pairwise_dense(wins, initial_params=start, max_iter=10_000)
  except (
    RuntimeError,
    ValueError,
  ):  # The likelihood is so flat that the iteration does not reach its maximum.
    return None


def agreement(table: Table) -> dict[str, Figure] | None:
  """Measures the agreement between labelers who judged the same pair. It is None if no pair has two
  labelers.

  The choices are a, b and tie. 'pairwise' is the share of (pair, two labelers) with the same
  choice, which corresponds to the paper's 72.6% for training labelers; 'pairwise_without_ties' is
  the same where neither labeler chose a tie. 'alpha' is Krippendorff's nominal alpha over the three
  choices, where a is the policy that comes first in the list of policies.
  """
  units: dict[tuple, list[int]] = {}
  for q, i, j, p in zip(table.prompts, table.i, table.j, table.p, strict=True):
    units.setdefault((q, i, j), []).append(0 if p > 0.5 else 1 if p < 0.5 else 2)
  units = {key: choices for key, choices in units.items() if len(choices) > 1}
  if not units:
    return None
  both = [
    (key[0], x, y) for key, choices in units.items() for x, y in itertools.combinations(choices, 2)
  ]
  same = np.array([x == y for _, x, y in both], float)
  decided = np.array([2 not in (x, y) for _, x, y in both])
  same_prompt = dict(zip(table.prompts, table.clusters, strict=True))
  prompts = np.array([same_prompt[q] for q, _, _ in both])
  counts = np.array([np.bincount(choices, minlength=3) for choices in units.values()])
  return dict(
    pairs=len(units),
    pairwise=interval(same, prompts, SHARE),
    pairwise_without_ties=interval(same[decided], prompts[decided], SHARE),
    alpha=statistic(
      lambda rows: _alpha(counts[rows]), [same_prompt[q] for q, _, _ in units], (-1, 1)
    ),
  )


def _alpha(counts: np.ndarray) -> float:
  """Returns Krippendorff's alpha of counts i[units, choices]. It is NaN, because undefined, if all
  choices are the same."""
  try:
    import krippendorff
  except ModuleNotFoundError:
    raise ValueError("agreement needs krippendorff: pip install 'alignjax[eval]'.") from None
  if (counts.sum(0) > 0).sum() < 2:
    return float('nan')
  return float(krippendorff.alpha(value_counts=counts, level_of_measurement='nominal'))


def position_bias(
  verdicts: Sequence[Verdict], same: Mapping[str, str] | None = None
) -> dict[str, Figure] | None:
  """Measures the position bias where the order of presentation is known, and returns None where it
  is not. 'first_wins' is how often the response that was shown first was preferred (0.5 means no
  bias). 'consistent' is the share of the same answer among pairs that the same labeler judged in
  both orders. same: as in `tabulate`."""
  shown = [v for v in verdicts if v.shown_first and v.p is not None]
  if not shown:
    return None
  first = interval(
    [v.p if v.shown_first == 'a' else 1 - v.p for v in shown],
    _labels((v.prompt_id for v in shown), same),
    SHARE,
  )
  twice: dict[tuple, dict[str, float]] = collections.defaultdict(dict)
  for v in shown:
    a, b, p, side = (
      (v.a, v.b, v.p, v.shown_first)
      if v.a < v.b
      else (v.b, v.a, 1 - v.p, 'b' if v.shown_first == 'a' else 'a')
    )
    twice[v.prompt_id, a, b, v.labeler][side] = p
  orders = {key: sides for key, sides in twice.items() if len(sides) == 2}
  equal = [float(np.sign(s['a'] - 0.5) == np.sign(s['b'] - 0.5)) for s in orders.values()]
  labels = _labels((key[0] for key in orders), same)
  return dict(first_wins=first, consistent=interval(equal, labels, SHARE))


def between(tables: Mapping[str, Table]) -> list[dict[str, Any]]:
  """Measures the agreement of every two judges on the pairs that both judged and neither called a
  tie. 'agreement' is how often they prefer the same response, after the labelers of each judge are
  averaged. It shows how far a reward model or a language model can replace people."""
  choices, same = {}, {}
  for judge, t in tables.items():
    same |= dict(zip(t.prompts, t.clusters, strict=True))
    cells: dict[tuple, list[float]] = {}
    for q, i, j, p in zip(t.prompts, t.i, t.j, t.p, strict=True):
      cells.setdefault((q, i, j), []).append(p)
    choices[judge] = {
      key: np.sign(np.mean(ps) - 0.5) for key, ps in cells.items() if np.mean(ps) != 0.5
    }
  out = []
  for one, two in itertools.combinations(choices, 2):
    common = [key for key in choices[one] if key in choices[two]]
    out.append(
      dict(
        judges=[one, two],
        agreement=interval(
          [float(choices[one][k] == choices[two][k]) for k in common],
          _labels((k[0] for k in common), same),
          SHARE,
        ),
      )
    )
  return out


def rated(judged: Judged, policies: Sequence[str]) -> dict[str, dict[str, dict[str, Figure]]]:
  """Returns {judge: {policy: {'likert' or a flag: Figure}}} of the ratings, with intervals by
  prompt."""
  out: dict[str, dict] = {}
  same = clusters(judged)
  for judge in dict.fromkeys(r.judge for r in judged.ratings):
    for policy in policies:
      mine = [r for r in judged.ratings if (r.judge, r.policy) == (judge, policy)]
      columns = {'likert': [(r.prompt_id, r.likert) for r in mine if r.likert is not None]}
      columns |= {
        flag: [(r.prompt_id, float(r.flags[flag])) for r in mine if flag in r.flags]
        for flag in FLAGS
      }
      out.setdefault(judge, {})[policy] = {
        name: interval(
          [x for _, x in rows],
          _labels((q for q, _ in rows), same),
          (1, 7) if name == 'likert' else SHARE,
        )
        for name, rows in columns.items()
        if rows
      }
  return out


def _labels(prompt_ids: Iterable[str], same: Mapping[str, str] | None) -> list[str]:
  """Returns the label of the prompt of each prompt_id."""
  return [(same or {}).get(q, q) for q in prompt_ids]
