"""Makes one table of several runs that differ in their seeds.

    alignjax summarize runs/ppo_ptx-s*

The command reads RUN/report.json of every given folder and prints Markdown: means over seeds with
the smallest and the largest value, and how many seeds show each finding, contradict it, or leave it
open. The runs must have one config and different seeds.
"""

import json
import pathlib

from alignjax.commands import command
from alignjax.evals import markdown
from alignjax.report_page import COLUMNS, NAMES


def mean_and_range(values: list[float]) -> str:
  """Returns the mean with the smallest and the largest value, and '' if there are no values."""
  return (
    f'{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})' if values else ''
  )


def table(reports: list[dict]) -> str:
  """Returns Markdown of the policies, findings, reward models and seconds of the reports."""
  first = reports[0]
  policies = [
    [
      NAMES.get(name, name),
      *(
        mean_and_range(
          [r['policies'][name][c]['mean'] for r in reports if c in r['policies'].get(name, {})]
        )
        for c in COLUMNS
      ),
    ]
    for name in first['policies']
  ]
  outcomes = ('yes', 'no', 'not shown')
  findings = []
  for claim in first['findings']:
    held = [r['findings'][claim]['held'] for r in reports]
    findings.append([claim, *(f'{held.count(o)} of {len(held)}' for o in outcomes)])
  reward_models = [
    [name.replace('_', ' '), mean_and_range([r['reward_model'][name]['mean'] for r in reports])]
    for name, figure in first['reward_model'].items()
    if isinstance(figure, dict)
  ]
  seconds = (
    f'{name} {mean_and_range([r["seconds"][name] for r in reports])}' for name in first['seconds']
  )
  return '\n'.join(
    [
      f'Seeds {", ".join(str(r["seed"]) for r in reports)}: mean (smallest to largest).',
      '',
      *markdown.table(('policy', *COLUMNS.values()), policies),
      '',
      *markdown.table(('finding, seeds by its intervals', *outcomes), findings),
      '',
      *markdown.table(('reward model', ''), reward_models),
      '',
      f'Seconds: {", ".join(seconds)}.',
    ]
  )


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
