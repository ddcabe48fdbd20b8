"""The pages of researchers (how a task goes, its settings, its answers, scores for demonstrations)
and of admins (people and invitations)."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from starlette import responses

from alignjax.evals.preference.judgment_rows import FLAGS
from alignjax.label import accounts, answers, catalog, figures, history, plots
from alignjax.label.schema import answers as answers_table
from alignjax.label.schema import items, people, reviews, tasks
from alignjax.label.server import Halt, Visit, go, page, route

STAFF = ('researcher', 'admin')
ADMIN = ('admin',)


def _task(connection: sa.Connection, visit: Visit) -> Any:
  row = connection.execute(sa.select(tasks).where(tasks.c.id == visit.path('task'))).first()
  if row is None:
    raise Halt(404, 'There is no such task', 'It may be in another database.')
  return row


def dashboard(visit: Visit) -> responses.Response:
  with visit.reading() as connection:
    rows = [
      figures.summary(connection, task, figures.read(connection, task.id))
      for task in connection.execute(sa.select(tasks).order_by(tasks.c.id)).all()
    ]
    screened = figures.screening(connection)
  return page(visit, 'dashboard.html', rows=rows, screened=screened)


def task(visit: Visit) -> responses.Response:
  with visit.reading() as connection:
    row = _task(connection, visit)
    made = figures.of_task(connection, row)
    some = connection.execute(
      sa.select(items)
      .where(items.c.task_id == row.id)
      .order_by(items.c.answers.desc(), items.c.priority, items.c.id)
      .limit(100)
    ).all()
  return page(visit, 'task.html', made=made, items=some, flags=FLAGS)


def picture(visit: Visit) -> responses.Response:
  name = visit.request.path_params['name']
  with visit.reading() as connection:
    row = _task(connection, visit)
    rows = figures.read(connection, row.id)
    left = figures.wanted(connection, row)[2]
  if name == 'progress':
    image = plots.progress(rows, left)
  elif name == 'labelers':
    image = plots.labelers(figures.labelers(rows))
  else:
    raise Halt(404, 'There is no such picture', name)
  return responses.Response(image, media_type='image/png')


def edit_task(visit: Visit) -> responses.Response:
  with visit.reading() as connection:
    row = _task(connection, visit)
  if visit.request.method == 'GET':
    return page(visit, 'edit.html', task=row, values=row._mapping, error='')
  form = visit.form
  values = {name: str(form.get(name, '')) for name in ('overlap', 'gold_rate', 'instructions')}
  values['pool'] = str(form.get('pool', row.pool))
  try:
    changes = dict(
      overlap=int(values['overlap']),
      gold_rate=float(values['gold_rate']),
      pool=values['pool'],
      instructions=values['instructions'].replace('\r\n', '\n'),
    )
    with visit.writing() as connection:
      catalog.edit_task(connection, row.id, int(str(form.get('version'))), visit.number, **changes)
  except catalog.Conflict as error:
    return page(visit, 'edit.html', 409, task=row, values=values, error=str(error))
  except ValueError as error:
    return page(visit, 'edit.html', 422, task=row, values=values, error=str(error))
  return go(f'/dashboard/{row.id}')


def inspect(visit: Visit) -> responses.Response:
  """An item with the sources of its responses and all versions of its answers."""
  with visit.reading() as connection:
    row = connection.execute(sa.select(items).where(items.c.id == visit.path('item'))).first()
    if row is None:
      raise Halt(404, 'There is no such item', 'It may be in another database.')
    versions = connection.execute(
      sa.select(answers_table, people.c.name)
      .join(people, people.c.id == answers_table.c.person_id)
      .where(answers_table.c.item_id == row.id)
      .order_by(answers_table.c.id)
    ).all()
  return page(visit, 'inspect.html', item=row, versions=versions)


def change_item(visit: Visit) -> responses.Response:
  """Hides an item or shows it again; makes an answer the known one, or takes that back."""
  number, what = visit.path('item'), str(visit.form.get('what', ''))
  with visit.writing() as connection:
    if what == 'hide':
      catalog.hide(connection, number, 'researcher', visit.number)
    elif what == 'show':
      connection.execute(items.update().where(items.c.id == number).values(hidden=None))
      history.log(connection, 'shown again', visit.number, number)
    elif what == 'gold':
      found = connection.execute(
        sa.select(answers_table.c.payload).where(
          answers_table.c.id == int(str(visit.form.get('answer', 0))),
          answers_table.c.item_id == number,
          answers_table.c.status == 'done',
        )
      ).scalar()
      if found is None:
        raise Halt(404, 'There is no such answer', 'It may have been withdrawn.')
      catalog.set_gold(connection, number, found, visit.number)
    elif what == 'no gold':
      catalog.set_gold(connection, number, None, visit.number)
    else:
      raise Halt(422, 'Nothing was changed', f'{what!r} is unknown.')
  return go(f'/inspect/{number}')


def review(visit: Visit) -> responses.Response:
  """Shows a demonstration that this researcher has not scored, without its author, and takes the
  score."""
  error = ''
  if visit.request.method == 'POST':
    try:
      score = int(str(visit.form.get('score', '')))
      number = int(str(visit.form.get('answer', '')))
      if not 1 <= score <= 7:
        raise ValueError
    except ValueError:
      error = 'Give a score from 1 to 7.'
    else:
      with visit.writing() as connection:
        earlier = connection.execute(
          sa.select(reviews.c.id).where(
            reviews.c.answer_id == number, reviews.c.person_id == visit.number
          )
        ).first()
        if earlier is None:  # The button may have been pressed twice.
          at = history.log(connection, 'reviewed', visit.number, None, answer=number, score=score)
          connection.execute(
            reviews.insert().values(answer_id=number, person_id=visit.number, score=score, at=at)
          )
      return go('/review')
  mine = sa.exists().where(
    reviews.c.answer_id == answers_table.c.id, reviews.c.person_id == visit.number
  )
  with visit.reading() as connection:
    found = connection.execute(
      sa.select(
        answers_table.c.id, answers_table.c.payload, items.c.prompt, items.c.extra, tasks.c.name
      )
      .select_from(
        answers_table.join(items, items.c.id == answers_table.c.item_id).join(
          tasks, tasks.c.id == items.c.task_id
        )
      )
      .where(
        tasks.c.kind == 'demonstration',
        answers_table.c.current,
        answers_table.c.status == 'done',
        answers_table.c.person_id != visit.number,
        ~mine,
      )
      .order_by(sa.case((tasks.c.pool == 'screening', 0), else_=1), answers_table.c.id)
      .limit(1)
    ).first()
  return page(visit, 'review.html', 422 if error else 200, found=found, error=error)


def everybody(visit: Visit) -> responses.Response:
  return _people(visit)


def _people(visit: Visit, status: int = 200, **values: Any) -> responses.Response:
  with visit.reading() as connection:
    rows = connection.execute(sa.select(people).order_by(people.c.id)).all()
  values = {'error': '', 'link': ''} | values
  return page(
    visit, 'people.html', status, rows=rows, roles=accounts.ROLES, pools=answers.POOLS, **values
  )


def invite(visit: Visit) -> responses.Response:
  try:
    with visit.writing() as connection:
      token = accounts.invite(
        connection, str(visit.form.get('role', '')), str(visit.form.get('pool', '')), visit.number
      )
  except ValueError as error:
    return _people(visit, 422, error=str(error))
  base = str(visit.request.base_url).rstrip('/')
  return _people(visit, link=f'{base}/join/{token}')


def change_person(visit: Visit) -> responses.Response:
  changes: dict[str, Any] = {
    name: str(visit.form[name]) for name in ('role', 'pool') if name in visit.form
  }
  if 'active' in visit.form:
    changes['active'] = visit.form['active'] == 'yes'
  try:
    with visit.writing() as connection:
      accounts.change_person(connection, visit.path('person'), visit.number, **changes)
  except ValueError as error:
    return _people(visit, 422, error=str(error))
  return go('/people')


BOTH = ('GET', 'POST')
ROUTES = [
  route('/dashboard', dashboard, roles=STAFF),
  route('/dashboard/{task:int}', task, roles=STAFF),
  route('/dashboard/{task:int}/{name}.png', picture, roles=STAFF),
  route('/tasks/{task:int}/edit', edit_task, BOTH, STAFF),
  route('/inspect/{item:int}', inspect, roles=STAFF),
  route('/inspect/{item:int}/change', change_item, ('POST',), STAFF),
  route('/review', review, BOTH, STAFF),
  route('/people', everybody, roles=ADMIN),
  route('/people/invite', invite, ('POST',), ADMIN),
  route('/people/{person:int}', change_person, ('POST',), ADMIN),
]
