"""One table of several runs: mean over seeds with the smallest and largest seed, and how many seeds show each finding.

    python experiments/summarize.py runs/ppo_ptx-s*

Reads RUN/report.json of every folder named and prints Markdown.
"""

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
  sys.path.insert(0, str(HERE.parent))

from alignjax.report import COLUMNS, NAMES  # noqa: E402  after the path


def spread(values: list[float]) -> str:
  return f'{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})' if values else ''


def table(reports: list[dict]) -> str:
  """Markdown of the reports' policies, findings, reward models and seconds."""
  lines = [f'Seeds {", ".join(str(r["seed"]) for r in reports)}: mean (smallest to largest).', '',
           '| policy | ' + ' | '.join(COLUMNS.values()) + ' |', '|---' * (len(COLUMNS) + 1) + '|']
  for name in reports[0]['policies']:
    cells = [[r['policies'][name][c]['mean'] for r in reports if c in r['policies'].get(name, {})] for c in COLUMNS]
    lines.append(f'| {NAMES.get(name, name)} | ' + ' | '.join(map(spread, cells)) + ' |')
  lines += ['', '| finding, by intervals | seeds |', '|---|---|']
  for claim in reports[0]['findings']:
    lines.append(f'| {claim} | {sum(bool(r["findings"][claim]) for r in reports)} of {len(reports)} |')
  figures = [k for k, v in reports[0]['reward_model'].items() if isinstance(v, dict)]
  lines += ['', '| reward model | |', '|---|---|']
  lines += [f'| {k.replace("_", " ")} | {spread([r["reward_model"][k]["mean"] for r in reports])} |' for k in figures]
  lines += ['', 'Seconds: ' + ', '.join(f'{k} {spread([r["seconds"][k] for r in reports])}' for k in reports[0]['seconds']) + '.']
  return '\n'.join(lines)


def main(folders: list[str]) -> None:
  if not folders or folders[0] in ('-h', '--help'):
    raise SystemExit(__doc__)
  paths = [pathlib.Path(f) / 'report.json' for f in folders]
  missing = [str(p) for p in paths if not p.exists()]
  if missing:
    raise SystemExit(f'no report in {", ".join(missing)}: has the run ended?')
  print(table([json.loads(p.read_text()) for p in paths]))


if __name__ == '__main__':
  main(sys.argv[1:])
