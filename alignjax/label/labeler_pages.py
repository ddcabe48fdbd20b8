"""The pages of labelers: log in, get an item, rate its responses one by one, rank them, write a
demonstration, look at one's own answers.

Nothing on them says where a response comes from. Responses are numbered in the order in which this
person sees them.
"""

from __future__ import annotations

import re
from typing import Any

import sqlalchemy as sa
from starlette import responses

from alignjax.evals.preference.judgment_rows import FLAGS
from alignjax.label import accounts, answers, assignment, history, submissions
from alignjax.label.schema import answers as answers_table
from alignjax.label.schema import items, tasks
from alignjax.label.server import Halt, Visit, go, log_in, message, page, route

EXAMPLES = (3, 50)  # How many an instruction with examples has room for, at first and at most.


def login(visit: Visit) -> responses.Response:
  if visit.request.method == 'GET':
    return page(visit, 'login.html', error='', name='')
  name, password = (str(visit.form.get(field, '')) for field in ('name', 'password'))
  try:
    person = accounts.login(visit.settings.engine, name, password, visit.address)
  except accounts.Refused as refused:
    status = 429 if isinstance(refused, accounts.TooMany) else 401
    return page(visit, 'login.html', status, error=str(refused), name=name)
  return log_in(visit, person)


def logout(visit: Visit) -> responses.Response:
  with visit.writing() as connection:
    accounts.end_sessions(connection, visit.number)
  return go('/login')


def join(visit: Visit) -> responses.Response:
  token = visit.request.path_params['invitation']
  name = str(visit.form.get('name', ''))
  try:
    if visit.request.method == 'GET':
      with visit.reading() as connection:
        accounts.invitation(connection, token)
      return page(visit, 'join.html', error='', name='')
    with visit.writing() as connection:
      number = accounts.join(connection, token, name, str(visit.form.get('password', '')))
      person = connection.execute(
        sa.select(accounts.people).where(accounts.people.c.id == number)
      ).one()
  except accounts.Refused as refused:
    if visit.request.method == 'GET':
      return message(visit, 410, 'This invitation has ended', str(refused))
    return page(visit, 'join.html', 422, error=str(refused), name=name)
  return log_in(visit, person)


def password(visit: Visit) -> responses.Response:
  """Changes one's own password."""
  if visit.request.method == 'GET':
    return page(visit, 'password.html', error='')
  try:
    old = str(visit.form.get('old', ''))
    accounts.login(visit.settings.engine, visit.person.name, old, visit.address)
    with visit.writing() as connection:
      accounts.set_password(connection, visit.number, str(visit.form.get('new', '')))
  except accounts.Refused as refused:
    return page(visit, 'password.html', 422, error=str(refused))
  return go('/login')


def home(visit: Visit) -> responses.Response:
  with visit.reading() as connection:
    rows = connection.execute(sa.select(tasks).where(_for(visit.person)).order_by(tasks.c.id)).all()
    done = {
      row.task_id: row.number
      for row in connection.execute(
        sa.select(items.c.task_id, sa.func.count().label('number'))
        .select_from(answers_table.join(items, items.c.id == answers_table.c.item_id))
        .where(
          answers_table.c.person_id == visit.number,
          answers_table.c.current,
          answers_table.c.status == 'done',
        )
        .group_by(items.c.task_id)
      )
    }
  return page(visit, 'home.html', tasks=rows, done=done)


def _for(person: Any) -> Any:
  """The tasks whose items a person may be given."""
  return tasks.c.pool.in_((person.pool, 'all'))


def _task(connection: sa.Connection, visit: Visit, number: int) -> Any:
  row = connection.execute(sa.select(tasks).where(tasks.c.id == number, _for(visit.person))).first()
  if row is None:
    raise Halt(404, 'There is no such task', 'There is no such task for you.')
  return row


def next_item(visit: Visit) -> responses.Response:
  with visit.reading() as connection:
    task = _task(connection, visit, visit.path('task'))
  item = _next(visit, task.id)
  if item is None:
    return message(
      visit, 200, 'Nothing is left for you', f'Every item of “{task.name}” is answered or taken.'
    )
  return go(f'/items/{item}')


def _next(visit: Visit, task: int) -> int | None:
  """The next item of a task. What was submitted before is committed: others who ask at the same
  moment need not wait for it."""
  with visit.writing() as connection:
    return assignment.next_item(connection, task, visit.number, visit.settings.lease_seconds)


def instructions(visit: Visit) -> responses.Response:
  with visit.reading() as connection:
    task = _task(connection, visit, visit.path('task'))
  return page(visit, 'instructions.html', task=task)


class Open:
  """An item in the hands of a person: the row, the order in which they see its responses, and what
  they have filled in. `fields` is {step: {field: value}}, and `age` how many seconds ago they were
  saved."""

  def __init__(self, connection: sa.Connection, visit: Visit, number: int):
    found = submissions.given(connection, number, visit.number)
    self.item, self.task, self.lease, self.answer, draft = found
    self.shown: list[int] = (self.lease or self.answer).shown
    self.texts = [self.item.responses[i]['text'] for i in self.shown]
    self.rated = answers.needs_ratings(self.task.kind, self.task.ratings)
    self.count = len(self.shown)
    self.steps = self.count * self.rated + 1
    self.fields: dict[str, dict[str, Any]] = draft.get('fields') or self._answered()
    self.at = history.now(connection)
    since = draft.get('at') or (self.answer.at if self.answer else None)
    self.age = 'Infinity' if since is None else round(self.at - since, 1)

  def _answered(self) -> dict[str, dict[str, Any]]:
    """The fields of a form that an earlier answer would have filled in."""
    if self.answer is None or self.answer.status != 'done':
      return {}
    payload = self.answer.payload
    if self.task.kind == 'demonstration':
      made = {k: payload[k] or '' for k in ('prompt', 'response', 'use_case')}
      for n, (query, reply) in enumerate(payload['examples'], 1):
        made |= {f'query_{n}': query, f'answer_{n}': reply}
      return {'1': made}
    made = {}
    for place, i in enumerate(self.shown, 1):
      if self.rated:
        made[str(place)] = {
          k: v if k == 'flags' else str(v) for k, v in payload['ratings'][i].items()
        }
    last = (
      {f'rank_{p}': str(payload['ranks'][i]) for p, i in enumerate(self.shown, 1)}
      if payload['ranks']
      else {}
    )
    return made | {str(self.steps): last | ({'all_bad': 'yes'} if payload['all_bad'] else {})}

  def take(self, visit: Visit, step: int) -> None:
    """Puts the fields of a form into the draft."""
    form = visit.form
    names = [name for name in form if name not in ('token', 'go', 'step', 'sent', 'flags')]
    taken: dict[str, Any] = {name: str(form.get(name)) for name in names}
    if self.rated and step < self.steps:
      taken['flags'] = [str(flag) for flag in form.getlist('flags')]
    self.fields[str(step)] = taken

  def draft(self) -> dict[str, Any]:
    return {'fields': self.fields, 'at': self.at}

  def examples(self, step: int) -> int:
    """How many examples the form of an instruction with examples has."""
    fields = self.fields.get(str(step), {})
    least, most = EXAMPLES
    return max([least, *(n for n in range(1, most + 1) if f'query_{n}' in fields)])

  def step(self, name: Any) -> int:
    try:
      return min(max(int(str(name)), 1), self.steps)
    except ValueError:
      return 1

  def first_unrated(self) -> int:
    """The first step that is not filled in, or the last one."""
    for step in range(1, self.steps):
      try:
        self.rating(step)
      except answers.FormError:
        return step
    return self.steps

  def rating(self, step: int) -> dict[str, Any]:
    fields = self.fields.get(str(step), {})
    return answers.rating(self.task.kind, fields, fields.get('flags', []))

  def payload(self) -> dict[str, Any]:
    """The answer, in the order of the item's responses. Raises FormError."""
    if self.task.kind == 'demonstration':
      fields = self.fields.get('1', {})
      return answers.demonstration(self.item._asdict(), fields)
    fields = self.fields.get(str(self.steps), {})
    all_bad = bool(fields.get('all_bad'))
    ranks = answers.ranks([fields.get(f'rank_{p}') for p in range(1, self.count + 1)], all_bad)
    ratings = [self.rating(step) for step in range(1, self.steps)]
    back = sorted(range(self.count), key=self.shown.__getitem__)
    return dict(
      ratings=[ratings[p] for p in back] if self.rated else None,
      ranks=None if ranks is None else [ranks[p] for p in back],
      all_bad=all_bad,
    )

  def checked(self, step: int) -> tuple[dict[str, Any] | None, int, str]:
    """(the answer if this is the last step and nothing is missing, the step to show otherwise, what
    is wrong there)."""
    try:
      if step < self.steps:
        self.rating(step)
        return None, step, ''
      if (unrated := self.first_unrated()) < self.steps:
        return None, unrated, 'This response is not rated yet.'
      return self.payload(), step, ''
    except answers.FormError as error:
      return None, step, str(error)

  def active(self) -> float | None:
    """The seconds that the browser counted, where it did."""
    found = []
    for fields in self.fields.values():
      try:
        found.append(min(max(float(fields.get('seconds') or 'nan'), 0.0), 86400.0))
      except ValueError:
        pass
    counted = [x for x in found if x == x]
    return sum(counted) if counted else None


def item(visit: Visit) -> responses.Response:
  """Shows a step of an item; saves it and goes on; submits the item at the last step."""
  number = visit.path('item')
  if visit.request.method == 'GET':
    with visit.reading(single=True) as connection:
      opened = Open(connection, visit, number)
    asked = visit.request.query_params.get('step')
    return _show(visit, opened, opened.step(asked) if asked else opened.first_unrated())
  wanted = visit.form.get('go')
  with visit.writing() as connection:
    # A page saves itself while its form is sent, and neither may take back what the other kept.
    assignment.one_request_at_a_time(connection, visit.number)
    opened = Open(connection, visit, number)
    step = opened.step(visit.form.get('step'))
    opened.take(visit, step)
    if wanted == 'more':
      opened.fields[str(step)].setdefault(f'query_{opened.examples(step) + 1}', '')
    payload, shown, error = (None, step, '') if wanted in ('more', 'back') else opened.checked(step)
    if payload is None:
      submissions.save_draft(connection, number, visit.number, opened.draft())
    else:
      submissions.submit(connection, number, visit.number, payload, active=opened.active())
  if error:
    return _show(visit, opened, shown, error)
  if payload is None:
    following = {'more': step, 'back': max(step - 1, 1)}.get(str(wanted), step + 1)
    return _on(visit, f'/items/{number}?step={following}')
  if opened.answer:
    return _on(visit, '/answers')
  following = _next(visit, opened.task.id)
  return _on(visit, f'/items/{following}' if following else '/')


def _on(visit: Visit, path: str) -> responses.Response:
  """Goes on after a form was saved. The fragment names the form, so that the script of the next
  page knows that the browser's own draft of it is no longer needed."""
  sent = str(visit.form.get('sent', ''))
  return go(f'{path}#saved-{sent}' if re.fullmatch(r'[a-z0-9]{1,40}', sent) else path)


def _show(visit: Visit, opened: Open, step: int, error: str = '') -> responses.Response:
  template = 'rank.html' if step == opened.steps else 'rate.html'
  if opened.task.kind == 'demonstration':
    template = 'write.html'
  fields = opened.fields.get(str(step), {})
  return page(
    visit,
    template,
    422 if error else 200,
    opened=opened,
    step=step,
    fields=fields,
    error=error,
    scales=answers.SCALES.get(opened.task.kind, {}),
    flags=FLAGS,
    examples=opened.examples(step),
  )


def draft(visit: Visit) -> responses.Response:
  """Keeps what the browser sends while a person works."""
  number = visit.path('item')
  with visit.writing() as connection:
    assignment.one_request_at_a_time(connection, visit.number)
    opened = Open(connection, visit, number)
    opened.take(visit, opened.step(visit.form.get('step')))
    submissions.save_draft(connection, number, visit.number, opened.draft())
  return responses.Response(status_code=204)


def skip(visit: Visit) -> responses.Response:
  number = visit.path('item')
  with visit.writing() as connection:
    assignment.one_request_at_a_time(connection, visit.number)
    opened = Open(connection, visit, number)
    try:
      submissions.skip(connection, number, visit.number, str(visit.form.get('reason', '')))
    except answers.FormError as error:
      return message(visit, 422, 'The item was not skipped', str(error))
  following = _next(visit, opened.task.id)
  return go(f'/items/{following}' if following else '/')


def withdraw(visit: Visit) -> responses.Response:
  with visit.writing() as connection:
    submissions.withdraw(connection, visit.path('item'), visit.number)
  return go('/answers')


def own_answers(visit: Visit) -> responses.Response:
  with visit.reading() as connection:
    rows = connection.execute(
      sa.select(
        answers_table.c.item_id,
        answers_table.c.status,
        answers_table.c.version,
        answers_table.c.at,
        tasks.c.name.label('task'),
        items.c.prompt,
        items.c.hidden,
      )
      .select_from(
        answers_table.join(items, items.c.id == answers_table.c.item_id).join(
          tasks, tasks.c.id == items.c.task_id
        )
      )
      .where(answers_table.c.person_id == visit.number, answers_table.c.current)
      .order_by(answers_table.c.id.desc())
      .limit(200)
    ).all()
  return page(visit, 'answers.html', rows=rows)


def item_json(visit: Visit) -> responses.Response:
  """What the page of an item shows, for programs that label (client.py)."""
  with visit.reading() as connection:
    opened = Open(connection, visit, visit.path('item'))
  return responses.JSONResponse(
    dict(
      item=opened.item.id,
      task=opened.task.name,
      kind=opened.task.kind,
      prompt=opened.item.prompt,
      use_case=opened.item.use_case,
      responses=opened.texts,
      steps=opened.steps,
      token=visit.settings.sessions.token(visit.session),
    )
  )


BOTH = ('GET', 'POST')
ROUTES = [
  route('/', home),
  route('/login', login, BOTH, None),
  route('/logout', logout, ('POST',)),
  route('/join/{invitation}', join, BOTH, None),
  route('/password', password, BOTH),
  route('/tasks/{task:int}/next', next_item, ('POST',)),
  route('/tasks/{task:int}/instructions', instructions),
  route('/items/{item:int}', item, BOTH),
  route('/items/{item:int}.json', item_json),
  route('/items/{item:int}/draft', draft, ('POST',)),
  route('/items/{item:int}/skip', skip, ('POST',)),
  route('/items/{item:int}/withdraw', withdraw, ('POST',)),
  route('/answers', own_answers),
]
