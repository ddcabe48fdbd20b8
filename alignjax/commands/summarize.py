"""Makes one table of several runs that differ in their seeds.

    alignjax summarize runs/ppo_ptx-s*

The command reads RUN/report.json of every given folder and prints Markdown: means over seeds with
the smallest and the largest value, and how many seeds show each finding, contradict it, or leave it
open. The runs must have one config and different seeds.
"""

import json
import pathlib

from alignjax.commands import command
from alignjax.report_page import COLUMNS, NAMES


def mean_and_deviation(values: list[float]) -> str:
  return (
    f'{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})' if values else ''
  )


def table(reports: list[dict]) -> str:
  """Returns Markdown of the policies, findings, reward models and seconds of the reports."""
  lines = [
    f'Seeds {", ".join(str(r["seed"]) for r in reports)}: mean (smallest to largest).',
    '',
    '| policy | ' + ' | '.join(COLUMNS.values()) + ' |',
    '|---' * (len(COLUMNS) + 1) + '|',
  ]
  for name in reports[0]['policies']:
    cells = [
      [r['policies'][name][c]['mean'] for r in reports if c in r['policies'].get(name, {})]
      for c in COLUMNS
    ]
    lines.append(
      f'| {NAMES.get(name, name)} | ' + ' | '.join(map(mean_and_deviation, cells)) + ' |'
    )
  outcomes = ('yes', 'no', 'not shown')
  lines += [
    '',
    '| finding, seeds by its intervals | ' + ' | '.join(outcomes) + ' |',
    '|---' * (1 + len(outcomes)) + '|',
  ]
  for claim in reports[0]['findings']:
    held = [r['findings'][claim]['held'] for r in reports]
    lines.append(
      f'| {claim} | ' + ' | '.join(f'{held.count(o)} of {len(held)}' for o in outcomes) + ' |'
    )
  figures = [k for k, v in reports[0]['reward_model'].items() if isinstance(v, dict)]
  lines += ['', '| reward model | |', '|---|---|']
  for k in figures:
    means = [report['reward_model'][k]['mean'] for report in reports]
    lines.append(f'| {k.replace("_", " ")} | {mean_and_deviation(means)} |')
  lines += [
    '',
    'Seconds: '
    + ', '.join(
      f'{k} {mean_and_deviation([r["seconds"][k] for r in reports])}' for k in reports[0]['seconds']
    )
    + '.',
  ]
  return '\n'.join(lines)


def check(reports: dict[str, dict]) -> None:
  """Raises SystemExit if the reports, by their folder, do not have one config, or if two have the
  same seed."""
  flat = {}
  for folder, report in reports.items():
    if 'config' not in report:
      raise SystemExit(
        f'error: {folder}/report.json does not say by which config it was made; another version of '
        'alignjax wrote it.'
      )
    flat[folder] = flatten(report['config'])
  seeds: dict[tuple, str] = {}
  first = next(iter(flat))
  for folder, config in flat.items():
    seed = tuple(config.pop(k, None) for k in ('seed', 'world.seed'))
    if seed in seeds:
      raise SystemExit(
        f'error: {seeds[seed]} and {folder} are both of seed {seed[0]}: a mean over seeds counts '
        f'each once.'
      )
    seeds[seed] = folder
    differ = sorted(
      k for k in config.keys() | flat[first].keys() if config.get(k) != flat[first].get(k)
    )
    if differ:
      shown = '\n'.join(f'  {k}: {flat[first].get(k)!r}, {config.get(k)!r}' for k in differ[:8])
      more = f'\n  and {len(differ) - 8} more' if len(differ) > 8 else ''
      raise SystemExit(
        f'error: {first} and {folder} are of different configs, so a mean over them says '
        f'nothing:\n{shown}{more}'
      )


def flatten(tree, name: str = '') -> dict:
  if isinstance(tree, dict) and tree:
    return {
      k: v
      for key, child in tree.items()
      for k, v in flatten(child, f'{name}.{key}'.lstrip('.')).items()
    }
  return {name: tree}


def main(argv: list[str]) -> None:
  parser = command.make_parser(__name__)
  parser.add_argument('folders', nargs='+', metavar='RUN', help='the folder of a finished run')
  folders = parser.parse_args(argv).folders
  paths = [pathlib.Path(f).expanduser() / 'report.json' for f in folders]
  twice = [
    f for i, f in enumerate(folders) if paths[i].resolve() in [p.resolve() for p in paths[:i]]
  ]
  if twice:
    raise SystemExit(f'error: {twice[0]} is named twice: a mean over seeds counts each once.')
  missing = [str(p) for p in paths if not p.is_file()]
  if missing:
    raise SystemExit(f'there is no report in {", ".join(missing)}: has the run ended?')
  reports = {}
  for folder, path in zip(folders, paths, strict=True):
    try:
      reports[folder] = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
      raise SystemExit(
        f'error: {path} cannot be read ({error}). The command that made the run writes it again.'
      ) from None
  check(reports)
  print(table(list(reports.values())))
