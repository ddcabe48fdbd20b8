"""Collects rankings and demonstrations from people, on a server of your own.

    alignjax label serve                       # a page in the browser; makes labels.db if needed
    alignjax label import --task=ranking-1 --source=jsonl:candidates.jsonl --overlap=2
    alignjax label import --task=write-1 --kind=demonstration --style=plain --count=100
    alignjax label invite --role=labeler --pool=heldout --count=5 --url=https://labels.example.org
    alignjax label status
    alignjax label export --what=comparisons --out=comparisons.jsonl
    alignjax label screen                      # who passes the screening

It needs `pip install 'alignjax[label]'`. docs/labeling.md describes the pages, the tasks and the
files. `alignjax label ACTION --help` lists the flags of an action.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from alignjax.commands import command

ACTIONS = {
  'serve': 'starts the server and prints the links to open',
  'import': 'makes a task of records, or adds items to one',
  'export': 'writes what people answered',
  'invite': 'makes links by which people join',
  'status': 'prints how far the tasks are',
  'screen': 'prints which candidates pass the screening',
}


def arguments(argv: list[str]) -> argparse.Namespace:
  parser = command.make_parser(__name__)
  actions = parser.add_subparsers(dest='action', metavar='ACTION', required=True)
  made = {}
  for name, text in ACTIONS.items():
    made[name] = actions.add_parser(name, help=text, description=f'{text.capitalize()}.')
    made[name].add_argument(
      '--database',
      default='labels.db',
      help='a SQLite file, or postgresql://USER@HOST/NAME; default: labels.db',
    )
  serve = made['serve']
  serve.add_argument('--host', default='127.0.0.1', help='default: only this machine can connect')
  serve.add_argument('--port', type=int, default=8000, help='default: 8000')
  serve.add_argument('--url', help='the address by which people reach the server, for the links')
  serve.add_argument(
    '--lease_minutes',
    type=float,
    default=60,
    help='how long an item stays with a labeler who does not answer; default: 60',
  )
  serve.add_argument(
    '--upgrade', action='store_true', help='change the tables of an older version, after a copy'
  )
  importing = made['import']
  importing.add_argument('--task', required=True, help='the name of the task, which labelers see')
  importing.add_argument(
    '--kind',
    choices=('ranking', 'toxicity', 'demonstration'),
    help='what its labelers do (docs/labeling.md); default: ranking',
  )
  importing.add_argument(
    '--source', help='records with prompt and responses (docs/labeling.md): jsonl:FILE, hf:..., ...'
  )
  importing.add_argument('--mapping', help='the mapping of the fields (docs/data.md)')
  importing.add_argument(
    '--format',
    default='records',
    choices=('records', 'samples', 'label_studio', 'argilla'),
    help='samples: the samples.jsonl of training stages, several joined by commas',
  )
  importing.add_argument(
    '--pool',
    choices=('training', 'heldout', 'screening', 'all'),
    help='the labelers who see the task; default: training',
  )
  importing.add_argument('--overlap', type=int, help='labelers for each item; default: 1')
  importing.add_argument('--gold', action='store_true', help='the ranks are known answers')
  importing.add_argument('--gold_rate', type=float, help='the share of known answers; default: 0')
  importing.add_argument('--instructions', help='a Markdown file')
  importing.add_argument(
    '--no_ratings', action='store_true', help='rank without rating each response first'
  )
  importing.add_argument(
    '--style',
    choices=('plain', 'few_shot', 'user_based'),
    help='for demonstrations whose prompt the labeler writes too; user_based takes the use cases '
    'from --source',
  )
  importing.add_argument('--count', type=int, default=0, help='the number of items of --style')
  exporting = made['export']
  exporting.add_argument(
    '--what',
    default='comparisons',
    choices=('comparisons', 'demonstrations', 'judgments', 'answers'),
    help='default: comparisons',
  )
  exporting.add_argument('--out', required=True, help='the file to write, .jsonl or .json')
  exporting.add_argument('--task', help='only this task')
  exporting.add_argument(
    '--pool',
    choices=('training', 'heldout', 'screening', 'all'),
    help='the labelers whose answers are written; default: training, for judgments also heldout, '
    'for answers and other tools all',
  )
  exporting.add_argument(
    '--format',
    default='records',
    choices=('records', 'label_studio', 'argilla'),
    help='default: records',
  )
  inviting = made['invite']
  inviting.add_argument(
    '--role', default='labeler', choices=('labeler', 'researcher', 'admin'), help='default: labeler'
  )
  inviting.add_argument(
    '--pool',
    default='training',
    choices=('training', 'heldout', 'screening'),
    help='the tasks that a labeler sees are those of this pool and of all; default: training',
  )
  inviting.add_argument('--count', type=int, default=1, help='the number of links; default: 1')
  inviting.add_argument(
    '--url',
    default='http://127.0.0.1:8000',
    help='the address by which people reach the server; default: http://127.0.0.1:8000',
  )
  return parser.parse_args(argv)


def main(argv: list[str]) -> None:
  options = arguments(argv)
  try:
    import alembic  # noqa: F401
    import argon2  # noqa: F401
    import itsdangerous  # noqa: F401
    import markdown_it  # noqa: F401
    import python_multipart  # noqa: F401
    import sqlalchemy  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
  except ModuleNotFoundError as error:
    raise ValueError(f"alignjax label needs {error.name}: pip install 'alignjax[label]'.") from None
  from alignjax.label import schema

  if options.action not in ('serve', 'import') and '://' not in options.database:
    if not pathlib.Path(options.database).expanduser().exists():
      raise FileNotFoundError(
        f'--database={options.database}: there is no such file. `alignjax label import` makes one.'
      )
  with schema.explained(f'--database={options.database}'):
    engine = schema.connect(options.database, getattr(options, 'upgrade', False))
    try:
      {
        'serve': serve,
        'import': import_items,
        'export': export,
        'invite': invite,
        'status': status,
        'screen': screen,
      }[options.action](engine, options)
    finally:
      engine.dispose()


def serve(engine: Any, options: argparse.Namespace) -> None:
  import sqlalchemy as sa
  import uvicorn

  from alignjax.label import accounts, app, schema

  url = (options.url or f'http://{options.host}:{options.port}').rstrip('/')
  made = app.make_app(
    engine, lease_seconds=60 * options.lease_minutes, secure=url.startswith('https:')
  )
  with schema.writing(engine) as connection:
    admins = connection.execute(
      sa.select(sa.func.count()).select_from(schema.people).where(schema.people.c.role == 'admin')
    ).scalar_one()
    token = accounts.invite(connection, 'admin') if not admins else None
  if token:
    print(f'Open this link to become the admin: {url}/join/{token}', flush=True)
  else:
    print(f'Labelers log in at {url}', flush=True)
  if options.host not in ('127.0.0.1', 'localhost', '::1') and not url.startswith('https:'):
    print(
      'WARNING: passwords travel unencrypted over http. Put a proxy with https in front, and name '
      'its address by --url=https://...',
      file=sys.stderr,
    )
  config = uvicorn.Config(
    made,
    host=options.host,
    port=options.port,
    log_level='warning',
    proxy_headers=url.startswith('https:'),
    server_header=False,
  )
  server_of = uvicorn.Server(config)
  server_of.run()
  if not server_of.started:
    raise SystemExit(1)


def import_items(engine: Any, options: argparse.Namespace) -> None:
  import sqlalchemy as sa

  from alignjax.data import sources
  from alignjax.label import argilla, catalog, exchange, label_studio, schema
  from alignjax.runtime import textfiles

  if options.style in ('plain', 'few_shot'):
    if options.source or options.count < 1:
      raise ValueError(
        f'--style={options.style} makes items that have no prompt: name their number by --count, '
        f'and no --source.'
      )
  elif not options.source:
    needed = (
      'use cases, as the prompts of records' if options.style else 'records that become items'
    )
    raise ValueError(f'--source is missing: it names the {needed}.')
  with schema.reading(engine) as connection:
    found = connection.execute(
      sa.select(schema.tasks).where(schema.tasks.c.name == options.task)
    ).first()
  kind = options.kind or (found.kind if found else 'ranking')
  if found and kind != found.kind:
    raise ValueError(f'--kind={kind}: the task {options.task!r} is of the kind {found.kind!r}.')
  if options.style and kind != 'demonstration':
    raise ValueError(f'--style={options.style} needs --kind=demonstration.')
  if options.style in ('plain', 'few_shot'):
    rows = exchange.demonstration_items([], options.style, options.count)
  elif options.format == 'samples':
    found_there, left_out = exchange.samples(options.source.split(','))
    print(f'{left_out} prompts have fewer than two different responses and are left out')
    rows = exchange.ranking_items(found_there)
  elif options.format != 'records':
    reader = {'label_studio': label_studio, 'argilla': argilla}[options.format]
    rows = reader.read(options.source.removeprefix('jsonl:'), kind)
  elif kind == 'demonstration':
    records = sources.read(options.source, 'prompts', options.mapping)
    rows = exchange.demonstration_items(records, options.style)
  else:
    records = sources.read(options.source, 'candidates', options.mapping)
    rows = exchange.ranking_items(records, options.gold)
  text = None
  if options.instructions:
    text = textfiles.read(options.instructions, '--instructions: ')
  with schema.writing(engine) as connection:
    if found is None:
      task = catalog.add_task(
        connection,
        options.task,
        kind,
        pool=options.pool or 'training',
        overlap=1 if options.overlap is None else options.overlap,
        gold_rate=options.gold_rate or 0.0,
        ratings=not options.no_ratings,
        text=text or '',
      )
    else:
      task = found.id
      changes = {
        name: value
        for name, value in dict(
          pool=options.pool, overlap=options.overlap, gold_rate=options.gold_rate, instructions=text
        ).items()
        if value is not None
      }
      if changes:
        catalog.edit_task(connection, task, found.version, **changes)
    added, there = catalog.add_items(connection, task, rows)
  print(f'{options.task}: {added} items added' + (f', {there} were there already' if there else ''))


def export(engine: Any, options: argparse.Namespace) -> None:
  from alignjax.label import argilla, exchange, label_studio, schema
  from alignjax.runtime import failures, files

  out = files.folder(options.out)
  failures.check_writable(out.parent, '--out')
  with schema.reading(engine) as connection:
    task = exchange.task_named(connection, options.task).id if options.task else None
    if options.format != 'records':
      writer = {'label_studio': label_studio, 'argilla': argilla}[options.format]
      text, count, lost = writer.write(connection, task, options.pool)
      for line in lost:
        print(f'NOTE: {line}', file=sys.stderr)
    else:
      rows = exchange.export(connection, options.what, task, options.pool)
      more = len(exchange.export(connection, options.what, task, 'all')) - len(rows)
      if more and not options.pool:
        print(
          f'NOTE: {more} more records are not of labelers of the pool '
          f'{" or ".join(exchange.POOLS[options.what])}. --pool=heldout or --pool=screening writes '
          'those of one pool, --pool=all writes everything.',
          file=sys.stderr,
        )
      text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
      count = len(rows)
  files.write(out, text)
  print(f'{out}: {count} records')


def invite(engine: Any, options: argparse.Namespace) -> None:
  from alignjax.label import accounts, schema

  if options.count < 1:
    raise ValueError(f'--count={options.count}: the number of links must be 1 or more.')
  with schema.writing(engine) as connection:
    for _ in range(options.count):
      token = accounts.invite(connection, options.role, options.pool)
      print(f'{options.url.rstrip("/")}/join/{token}')


def status(engine: Any, options: argparse.Namespace) -> None:
  import sqlalchemy as sa

  from alignjax.evals import stats
  from alignjax.label import figures, schema

  with schema.reading(engine) as connection:
    tasks = connection.execute(sa.select(schema.tasks).order_by(schema.tasks.c.id)).all()
    rows = [figures.of_task(connection, task) for task in tasks]
  if not rows:
    print('There are no tasks yet; `alignjax label import` makes one.')
  for row in rows:
    task, agreement = row['task'], row['agreement']
    print(
      f'{task.name} ({task.kind}, {task.pool}): {row["done"]} answers, {row["left"]} left, '
      f'{row["held"]} with labelers now, {row["skipped"]} skipped, {row["hidden"]} taken out'
    )
    if agreement:
      print(f'  agreement, ties counted: {stats.show(agreement["pairwise"], True, 2)}')
    for labeler in row['labelers']:
      if labeler['alarms']:
        print(f'  {labeler["name"]}: {"; ".join(labeler["alarms"])}')


def screen(engine: Any, options: argparse.Namespace) -> None:
  from alignjax.evals import stats
  from alignjax.label import figures, schema

  with schema.reading(engine) as connection:
    rows = figures.screening(connection)
  if not rows:
    print("Nobody is in the pool 'screening'; `alignjax label invite --pool=screening` invites.")
  for row in rows:
    passes = {None: 'not known yet', True: 'passes', False: 'does not pass'}[row['passes']]
    print(
      f'{row["name"]}: {passes} (rankings {stats.show(row["ranking"], True, 2) or "not measured"}; '
      f'sensitive responses {stats.show(row["flags"], True, 2) or "not measured"}; '
      f'demonstrations {stats.show(row["demonstrations"], True, 2) or "not measured"})'
    )
