"""Intervals: how often they cover the truth, by simulation; by hand; and what must hold for any
values."""

import math
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from alignjax.evals import stats
from alignjax.evals.stats import (
  ANY,
  apart,
  fraction,
  gap,
  interval,
  ratio,
  show,
  show_difference,
  statistic,
)

RUNS = 400


def coverage(draw, truth, make):
  """(share of RUNS intervals that hold the truth, their median width); every interval is there."""
  found = np.array([make(draw())['ci95'] for _ in range(RUNS)])
  return ((found[:, 0] <= truth) & (truth <= found[:, 1])).mean(), np.median(
    found[:, 1] - found[:, 0]
  )


@pytest.mark.parametrize(
  'n,p,widest', [(24, 0.95, 0.25), (500, 0.002, 0.013), (24, 0.5, 0.43), (500, 0.3, 0.085)]
)
def test_shares_cover(n, p, widest):
  rng = np.random.default_rng(0)
  hit, width = coverage(lambda: (rng.random(n) < p).astype(float), p, interval)
  assert hit >= 0.93 and width < widest


@pytest.mark.parametrize(
  'clusters,p,icc,widest',
  [
    (4, 0.5, 0.1, 0.65),
    (4, 0.8, 0.3, 0.8),
    (8, 0.9, 0.3, 0.36),
    (8, 0.8, 0.1, 0.32),
    (30, 0.5, 0.3, 0.25),
    (30, 0.9, 0.1, 0.11),
    (30, 0.9, 0.3, 0.17),
  ],
)
def test_shares_of_clusters_cover(clusters, p, icc, widest):
  """Twenty units a cluster, whose own p is from a beta distribution with this correlation within
  clusters."""
  rng = np.random.default_rng(1)
  a = 1 / icc - 1
  group = np.repeat(np.arange(clusters), 20)
  hit, width = coverage(
    lambda: rng.random(len(group)) < rng.beta(a * p, a * (1 - p), clusters)[group],
    p,
    lambda values: interval(values, group),
  )
  assert hit >= 0.93 and width < widest


@pytest.mark.parametrize(
  'n,losses,wins', [(24, 0.02, 0.08), (100, 0.0, 0.01), (500, 0.1, 0.2), (10, 0.3, 0.3)]
)
def test_paired_differences_of_shares_cover(n, losses, wins):
  rng = np.random.default_rng(2)
  hit, width = coverage(
    lambda: rng.choice([-1.0, 0.0, 1.0], n, p=[losses, 1 - losses - wins, wins]),
    wins - losses,
    lambda values: interval(values, bounds=(-1, 1)),
  )
  assert hit >= 0.93 and width < 8 / n + 5 * math.sqrt((losses + wins) / n)


def test_limits_of_skewed_values_are_halls():
  """Hall 1992: t + g (t^2 / 3 + 1 / 6) / sqrt(n) + g^2 t^3 / (27 n), g the skewness, is at the
  quantiles of t at the limits."""
  values = np.array([0.0, 0.1, 0.2, 0.4, 0.9, 1.7, 4.0, 9.0])
  n, mean, deviation = 8, values.mean(), values.std(ddof=1)
  g = (((values - mean) / deviation) ** 3).mean()
  assert g > 1

  def studentised(truth):
    t = (mean - truth) / deviation * math.sqrt(n)
    return t + g * (t**2 / 3 + 1 / 6) / math.sqrt(n) + g**2 * t**3 / (27 * n)

  low, high = interval(values, bounds=ANY)['ci95']
  assert low < mean < high
  assert studentised(low) == pytest.approx(scipy_stats.t.ppf(0.975, 7), rel=1e-6)
  assert studentised(high) == pytest.approx(scipy_stats.t.ppf(0.025, 7), rel=1e-6)


@pytest.mark.parametrize(
  'n,draw,truth',
  [
    (8, 'exponential', 1),
    (24, 'exponential', 1),
    (24, 'chisquare', 1),
    (8, 'normal', 0),
    (100, 'lognormal', math.exp(0.5)),
  ],
)
def test_means_of_skewed_values_cover(n, draw, truth):
  rng = np.random.default_rng(3)
  of = lambda: getattr(rng, draw)(1, size=n) if draw == 'chisquare' else getattr(rng, draw)(size=n)
  hit, width = coverage(of, truth, lambda values: interval(values, bounds=ANY))
  assert hit >= 0.92 and width < 6 * of().std() * 3 / math.sqrt(n)


@pytest.mark.parametrize('clusters', [4, 8, 30])
def test_means_of_clusters_cover(clusters):
  rng = np.random.default_rng(4)
  group = np.repeat(np.arange(clusters), 10)
  hit, width = coverage(
    lambda: rng.normal(size=clusters)[group] * 0.5 + rng.normal(size=len(group)),
    0,
    lambda values: interval(values, group, ANY),
  )
  assert hit >= 0.93 and width < {4: 2.5, 8: 1.2, 30: 0.55}[clusters]


def test_ratios_and_fractions_cover():
  rng = np.random.default_rng(5)

  def documents():
    tokens = rng.integers(5, 40, 60).astype(float)
    return tokens * rng.lognormal(0, 0.4, 60), tokens

  assert coverage(documents, math.exp(0.08), lambda d: ratio(*d))[0] >= 0.93

  def paired():
    y = 1 + rng.normal(size=60)
    return 0.8 * y + 0.5 * rng.normal(size=60), y

  hit, width = coverage(paired, 0.8, lambda d: fraction(*d))
  assert hit >= 0.93 and width < 0.5


def test_gaps_over_common_clusters_cover():
  rng = np.random.default_rng(6)
  one, other = np.repeat(np.arange(40), 5), np.repeat(np.arange(5, 40), 3)

  def pools():
    p = rng.beta(2.8, 1.2, 40)
    return rng.random(len(one)) < p[one], rng.random(len(other)) < p[other]

  hit, width = coverage(pools, 0, lambda d: gap(d[0], one, d[1], other))
  assert hit >= 0.93 and width < 0.3


def test_a_share_by_hand():
  """Of independent units that are right or wrong: Clopper and Pearson's, here from scipy."""
  for right, n in ((23, 24), (0, 10), (1, 500), (7, 7)):
    found = interval([1.0] * right + [0.0] * (n - right))
    exact = scipy_stats.binomtest(right, n).proportion_ci(method='exact')
    assert found['ci95'] == pytest.approx([exact.low, exact.high]) and (
      found['n'],
      found['kind'],
    ) == (n, 'share')
  percent = interval([100.0] * 23 + [0.0], bounds=(0, 100))
  assert percent['ci95'] == pytest.approx([100 * x for x in interval([1.0] * 23 + [0.0])['ci95']])


def test_answers_of_one_cluster_are_not_independent():
  """Where all of a cluster's units are alike, a cluster counts as one unit; units that are their
  own clusters count one each."""
  rng = np.random.default_rng(0)
  values = (rng.random(30) < 0.5).astype(float)
  group = np.arange(30)
  plain, labeled = interval(values), interval(values, [f'q{i}' for i in group])
  assert plain == labeled
  twenty = interval(np.repeat(values, 20), np.repeat(group, 20))
  assert twenty['mean'] == plain['mean'] and twenty['n'] == 600
  assert twenty['ci95'] == pytest.approx(plain['ci95'], abs=0.02)
  perfect = interval(np.ones(600), np.repeat(group, 20))['ci95']
  assert perfect[0] == pytest.approx(interval(np.ones(30))['ci95'][0], abs=0.02)
  assert interval(np.ones(600), [1] * 600)['ci95'] == [None, None], (
    'one cluster says nothing of others'
  )


def test_a_mean_by_hand():
  """Without skewness the limits of t: of -3, -1, 1, 3, mean 0, deviation sqrt(20/3), t with 3
  degrees of freedom."""
  found = interval([-3.0, -1.0, 1.0, 3.0])
  reach = 3.182446 * math.sqrt(20 / 3) / 2
  assert found['ci95'] == pytest.approx([-reach, reach]) and found['kind'] == 'mean'
  doubled = interval([-3.0, -3.0, -1.0, -1.0, 1.0, 1.0, 3.0, 3.0], list('aabbccdd'))
  assert doubled['ci95'] == pytest.approx([-reach, reach]), (
    'the degrees of freedom are those of the clusters'
  )
  low, high = interval(np.arange(20.0) ** 3, bounds=ANY)['ci95']
  assert high - np.mean(np.arange(20.0) ** 3) > np.mean(np.arange(20.0) ** 3) - low, (
    'longer on the side of the long tail'
  )


def test_a_fraction_by_hand():
  """Fieller: all r for which (mean(x) - r mean(y))^2 <= t^2 var(mean(x - r y)), by a scan of r."""
  rng = np.random.default_rng(0)
  y = 2 + rng.normal(size=12)
  x = 0.7 * y + 0.3 * rng.normal(size=12)
  scanned = np.linspace(0.3, 1.2, 90_001)
  inside = [
    r
    for r in scanned[::10]
    if abs(np.mean(x - r * y)) <= 2.200985 * np.std(x - r * y, ddof=1) / math.sqrt(12)
  ]
  found = fraction(x, y)
  assert found['ci95'] == pytest.approx([min(inside), max(inside)], abs=2e-4) and found[
    'mean'
  ] == pytest.approx(x.sum() / y.sum())
  nothing = fraction(x, rng.normal(size=12))
  assert nothing['ci95'] == [None, None], 'every part of nothing'
  assert fraction(y, y)['ci95'] == [1.0, 1.0] and fraction(0 * y, y)['ci95'] == pytest.approx(
    [0.0, 0.0]
  )


def test_a_statistic_is_the_jackknife():
  values = np.random.default_rng(0).normal(size=30)
  found = statistic(lambda rows: values[rows].mean(), range(30))
  error = scipy_stats.t.ppf(0.975, 29) * values.std(ddof=1) / math.sqrt(30)
  assert (
    found['ci95'] == pytest.approx([values.mean() - error, values.mean() + error])
    and found['kind'] == 'statistic'
  )
  pair = statistic(lambda rows: np.array([values[rows].mean(), rows.size * 0.0]), range(30))
  assert pair[0] == found and pair[1]['ci95'] == [0.0, 0.0]
  many = np.random.default_rng(1).normal(size=1000)
  low, high = statistic(lambda rows: many[rows].mean(), range(1000))['ci95']
  assert high - low == pytest.approx(2 * 1.96 / math.sqrt(1000), rel=0.35)
  assert statistic(lambda rows: 1.0, list('aab'), (-1, 1))['ci95'] == [None, None], (
    'at its bound and never otherwise'
  )
  assert statistic(lambda rows: float('nan'), ['a', 'b'])['mean'] is None
  assert statistic(lambda rows: 1.0 if len(rows) == 3 else float('nan'), list('abc'))['ci95'] == [
    None,
    None,
  ]
  assert (
    statistic(lambda rows: 3.0, ['a', 'a'])['ci95'] == [None, None]
    and statistic(lambda rows: 3.0, [])['n'] == 0
  )


def test_intervals_are_those_of_the_bootstrap():
  """Of 300 units without clusters, where both are right: an independent way to the same limits."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(5, 40, 300).astype(float)
  loss = tokens * rng.gamma(4, 0.5, 300)
  won = rng.random(300) < 0.3
  cases = [
    (interval(loss, bounds=ANY), lambda rows: loss[rows].mean()),
    (interval(won), lambda rows: won[rows].mean()),
    (ratio(loss, tokens), lambda rows: loss[rows].sum() / tokens[rows].sum()),
    (fraction(loss, tokens), lambda rows: loss[rows].sum() / tokens[rows].sum()),
    *(
      (statistic(of, range(300), groups=300), of)
      for of in (
        lambda rows: np.corrcoef(loss[rows], tokens[rows])[0, 1],
        lambda rows: np.log(loss[rows].var()),
      )
    ),
  ]
  for found, of in cases:
    other = scipy_stats.bootstrap(
      (np.arange(300),),
      of,
      vectorized=False,
      n_resamples=2000,
      method='BCa',
      rng=np.random.default_rng(1),
    ).confidence_interval
    assert found['mean'] == pytest.approx(of(np.arange(300)))
    assert found['ci95'] == pytest.approx([*other], abs=0.06 * (other.high - other.low)), found


def test_nothing_measured_and_one_unit():
  assert (
    interval([float('nan')])
    == interval([])
    == {'mean': None, 'ci95': [None, None], 'n': 0, 'kind': 'share'}
  )
  assert interval([1.0]) == {'mean': 1.0, 'ci95': [None, None], 'n': 1, 'kind': 'share'}
  assert interval([7.0, float('inf')])['mean'] is None and interval([7.0, float('inf')])['n'] == 2
  assert interval([7.0])['ci95'] == [None, None] and interval([7.0, float('nan')])['n'] == 1
  assert ratio([], [])['mean'] is None and ratio([2.0, 4.0], [1.0, 3.0])['mean'] == 1.5
  assert ratio([2.0, 4.0], [0.0, 0.0])['mean'] is None and ratio([2.0, 0.0], [1.0, 0.0])[
    'ci95'
  ] == [None, None]
  assert gap([], [], [1.0], ['a'])['mean'] is None and fraction([], [])['mean'] is None
  with pytest.raises(ValueError, match='from 0.0 to 2.0 do not lie within the bounds 0 and 1'):
    interval([0.0, 2.0], bounds=(0, 1))


def test_equal_values():
  """Three ties do not show that every pair is a tie; a difference that is the same on every item,
  without bounds, is certain."""
  low, high = interval([0.5] * 3)['ci95']
  assert low < 0.25 and high > 0.75
  low, high = interval([0.5] * 500)['ci95']
  assert 0.495 < low < 0.5 < high < 0.505
  assert interval([0.1] * 5)['ci95'] == pytest.approx([0.1, 0.1])
  same = interval(np.zeros(24), bounds=(-1, 1))['ci95']
  assert -0.2 < same[0] < -0.05 and 0.05 < same[1] < 0.2


def test_weights_are_counts():
  """A document of weight 0 counts for nothing, whole weights are the number."""
  found = ratio([1.0, 2.0, 6.0, 9.0], [1.0, 1.0, 2.0, 0.0])
  assert found['mean'] == 18 / 4 and found['n'] == 4
  assert ratio([2.5, 1.0], [0.5, 1.0])['n'] == 1.5


def test_how_figures_are_shown():
  figure = {'mean': 0.5, 'ci95': [0.25, 0.75], 'n': 7, 'kind': 'share'}
  assert (
    show(figure) == '0.500 [0.250, 0.750]'
    and show(figure, True) == '0.500 [0.250, 0.750] (7)'
    and show(None) == ''
  )
  assert (
    show(interval([1.0])) == '1.000 [no interval]'
    and show_difference(interval([1.0])) == '1.000 [no interval]'
  )
  assert show_difference(figure) == '**0.500 [0.250, 0.750]**'
  assert [apart(figure, x) for x in (0, 0.3, 1)] == [1, 0, -1] and apart(interval([1.0])) == 0


unit = st.floats(0, 1, allow_subnormal=True)
finite = st.floats(allow_nan=False, allow_infinity=False)
labels = st.integers(0, 4)


def sound(figure):
  low, high = figure['ci95']
  if figure['mean'] is None or low is None:
    return figure['ci95'] == [None, None]
  return np.isfinite([figure['mean'], low, high]).all() and low <= figure['mean'] <= high


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(unit, labels), min_size=1, max_size=30))
def test_any_share_holds_its_mean_and_stays_in_its_bounds(rows):
  values, clusters = zip(*rows, strict=True)
  for labeled in (None, clusters):
    found = interval(values, labeled, (0, 1))
    assert sound(found)
    if found['ci95'][0] is not None:
      assert 0 <= found['ci95'][0] and found['ci95'][1] <= 1
      mirror = interval([1 - v for v in values], labeled, (0, 1))
      assert mirror['ci95'] == pytest.approx([1 - x for x in found['ci95'][::-1]], abs=1e-6)
  assert sound(gap(values, clusters, values[::-1], clusters))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=30))
def test_any_share_is_narrower_of_four_times_the_units(values):
  width = lambda f: f['ci95'][1] - f['ci95'][0]
  assert width(interval(values * 4, bounds=(0, 1))) < width(interval(values, bounds=(0, 1)))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(finite, finite, st.integers(0, 50), labels), min_size=1, max_size=30))
def test_any_finite_values_give_no_nan_and_no_warning(rows):
  x, y, counts, clusters = zip(*rows, strict=True)
  for labeled in (None, clusters):
    assert sound(interval(x, labeled)) and sound(interval(x, labeled, ANY))
    assert sound(ratio(x, counts, labeled)) and sound(fraction(x, y, None, labeled))


def test_intervals_are_made_in_one_place():
  root = pathlib.Path(stats.__file__).parents[1]
  found = [
    path.name
    for path in root.rglob('*.py')
    if re.search(r'percentile\(|multinomial\(|quantile\(|1\.96', path.read_text())
  ]
  assert found == []
