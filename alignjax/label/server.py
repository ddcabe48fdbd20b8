"""The web server: what every page has in common.

A page is a function of a Visit that returns a Response; it runs in a thread. Around it stand the
session, the token that every form carries, the headers that keep a browser from loading or sending
anything elsewhere, and the errors.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import pathlib
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

import jinja2
import markdown_it
import markupsafe
import sqlalchemy as sa
from sqlalchemy import exc
from starlette import concurrency, responses, routing
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alignjax.label import accounts, answers, history, schema, submissions
from alignjax.label.schema import people

COOKIE = 'alignjax_label'
# Fields that an error page does not show again.
UNSHOWN = ('token', 'password', 'old', 'new', 'seconds', 'sent', 'step', 'go')
LARGEST_FORM = 1_000_000  # bytes of a field
HEADERS = {
  'content-security-policy': "default-src 'none'; script-src 'self'; style-src 'self'; "
  "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
  'x-content-type-options': 'nosniff',
  'x-frame-options': 'DENY',
  'referrer-policy': 'no-referrer',
  'cross-origin-opener-policy': 'same-origin',
  'cross-origin-resource-policy': 'same-origin',
  'permissions-policy': 'camera=(), geolocation=(), microphone=()',
}
_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
_PERSON = sa.select(people).where(
  people.c.id == sa.bindparam('person'), people.c.active, people.c.epoch == sa.bindparam('epoch')
)
FOLDER = pathlib.Path(__file__).parent

# No HTML, and no images: a page makes no request to another server.
_markdown = markdown_it.MarkdownIt('commonmark', {'html': False}).disable('image')
_markdown.enable('table')


@functools.lru_cache(maxsize=64)
def rendered(text: str) -> markupsafe.Markup:
  """Returns Markdown as HTML."""
  return markupsafe.Markup(_markdown.render(text))


class Settings(NamedTuple):
  """What the server was started with.

  Attributes:
    engine: the database.
    sessions: signs cookies and forms.
    lease_seconds: how long an item stays with a labeler who does not answer.
    secure: whether browsers may send the cookie over https only.
  """

  engine: sa.Engine
  sessions: accounts.Sessions
  lease_seconds: float
  secure: bool


class Visit(NamedTuple):
  """A request, with what the pages need.

  Attributes:
    request: starlette's request.
    settings: of the server.
    connection: to the database, while the request is worked on.
    form: the fields of the form, {} for a GET.
    session: the content of the cookie.
    person: the row of the person who is logged in, or None.
  """

  request: Request
  settings: Settings
  connection: Any
  form: Any
  session: dict[str, Any]
  person: Any

  @property
  def number(self) -> int:
    return self.person.id

  @property
  def address(self) -> str:
    """Where the request comes from, for the limit on failed logins."""
    return self.request.client.host if self.request.client else ''

  def path(self, name: str) -> int:
    return int(self.request.path_params[name])

  def reading(self, single: bool = False):
    return schema.reading(self.connection, single)

  def writing(self):
    return schema.writing(self.connection)


class Halt(Exception):
  """Ends a page with a message for the person."""

  def __init__(self, status: int, title: str, text: str):
    super().__init__(text)
    self.status, self.title, self.text = status, title, text


templates = jinja2.Environment(
  loader=jinja2.FileSystemLoader(FOLDER / 'templates'),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
  auto_reload=False,
  trim_blocks=True,
  lstrip_blocks=True,
)
templates.globals.update(rendered=rendered, skips=answers.SKIPS)


def page(visit: Visit, template: str, status: int = 200, **values: Any) -> responses.Response:
  """Returns a template as a page."""
  text = templates.get_template(template).render(
    person=visit.person,
    token=visit.settings.sessions.token(visit.session),
    path=visit.request.url.path,
    **values,
  )
  return responses.HTMLResponse(text, status)


def message(visit: Visit, status: int, title: str, text: str, **values: Any) -> responses.Response:
  return page(visit, 'message.html', status, title=title, text=text, **({'kept': []} | values))


def go(path: str) -> responses.Response:
  return responses.RedirectResponse(path, 303)


def log_in(visit: Visit, person: Any) -> responses.Response:
  """Begins a new session, with a new name: one that somebody had planted is worth nothing."""
  response = go('/')
  with visit.reading() as connection:
    session = visit.settings.sessions.begin(history.now(connection), person)
  _set_cookie(response, visit.settings, session)
  return response


def _set_cookie(response: responses.Response, settings: Settings, session: dict) -> None:
  response.set_cookie(
    COOKIE,
    settings.sessions.write(session),
    max_age=accounts.SESSION_SECONDS,
    httponly=True,
    secure=settings.secure,
    samesite='lax',
  )


def route(
  path: str,
  handler: Callable[[Visit], responses.Response],
  methods: Sequence[str] = ('GET',),
  roles: Sequence[str] | None = accounts.ROLES,
) -> routing.Route:
  """Returns the route of a page. roles: who may see it; None means everybody, logged in or not."""

  async def endpoint(request: Request) -> responses.Response:
    form: Any = {}
    if request.method == 'POST':
      form = await request.form(max_files=0, max_part_size=LARGEST_FORM)
    async with request.app.state.turns.of(request):
      return await concurrency.run_in_threadpool(_answer, request, form, handler, roles)

  return routing.Route(path, endpoint, methods=list(methods), name=handler.__name__)


def _answer(
  request: Request, form: Any, handler: Callable, roles: Sequence[str] | None
) -> responses.Response:
  settings: Settings = request.app.state.settings
  fresh = False
  visit = Visit(request, settings, None, form, settings.sessions.begin(0.0), None)
  opened = contextlib.ExitStack()
  try:
    # One connection for the whole request: to take one from the pool is to ask whether it lives.
    visit = visit._replace(connection=opened.enter_context(settings.engine.connect()))
    with visit.reading(single=True) as connection:
      at = history.now(connection)
      session = settings.sessions.read(request.cookies.get(COOKIE, ''), at)
      if session is None:
        session, fresh = settings.sessions.begin(at), True
      known = dict(person=session.get('person'), epoch=session.get('epoch'))
      person = connection.execute(_PERSON, known).first()
    visit = visit._replace(session=session, person=person)
    token = str(form.get('token', ''))
    if request.method == 'POST' and not settings.sessions.check(session, token):
      raise Halt(
        403,
        'This page is too old',
        'The form belongs to another session, perhaps because you logged in again. Go back, reload '
        'the page and send it again.',
      )
    if roles is not None and visit.person is None:
      if request.method == 'POST' or request.url.path.endswith('.json'):
        raise Halt(401, 'Please log in', 'You are not logged in any more. What you typed is below.')
      response: responses.Response = go('/login')
    elif roles is not None and visit.person.role not in roles:
      raise Halt(403, 'Not for you', f'A {visit.person.role} cannot see this page.')
    else:
      response = handler(visit)
  except Halt as halt:
    response = message(visit, halt.status, halt.title, halt.text, kept=_texts(form))
  except submissions.Gone as error:
    response = message(visit, 410, 'This item is not yours', str(error), kept=_texts(form))
  except exc.OperationalError as error:
    response = message(visit, 507, 'It could not be saved', _trouble(error), kept=_texts(form))
  except Exception:  # noqa: BLE001 a fault of ours must not lose what a person typed
    traceback.print_exc()
    text = 'This is a fault of the server, which has noted it. What you filled in is below.'
    response = message(visit, 500, 'Something went wrong', text, kept=_texts(form))
  finally:
    opened.close()
  if fresh and not any(k == b'set-cookie' for k, _ in response.raw_headers):
    _set_cookie(response, settings, visit.session)
  response.headers['cache-control'] = 'no-store'
  return response


def _texts(form: Any) -> list[tuple[str, str]]:
  """What a person typed, so that an error page can show it: nothing is lost with the page."""
  return [
    (name, str(value))
    for name, value in (form.multi_items() if hasattr(form, 'multi_items') else ())
    if name not in UNSHOWN and str(value).strip()
  ]


def _trouble(error: exc.OperationalError) -> str:
  text = str(error.orig)
  full = 'is full' in text or 'No space left' in text
  reason = 'The disk of the server is full.' if full else 'The database cannot be written now.'
  return (
    f'{reason} Your answer was not saved. What you filled in is below, and your browser keeps a '
    f'draft. Tell the people who run this server ({text}), and send it again later.'
  )


class Turns:
  """Lets a few requests be worked on at once: more threads only wait for each other, and the last
  one for longest. What a person hands in goes before the pages that others ask for, so that a
  submit waits for other submits only, however many people are waiting for a page.

  Args:
    count: of requests that are worked on at once.
  """

  def __init__(self, count: int):
    self.free = count
    self.submits: collections.deque[asyncio.Future] = collections.deque()
    self.others: collections.deque[asyncio.Future] = collections.deque()

  @contextlib.asynccontextmanager
  async def of(self, request: Request) -> AsyncIterator[None]:
    """Waits for the request's turn, and ends it."""
    if self.free:
      self.free -= 1
    else:
      submit = request.method == 'POST' and request.url.path.startswith('/items/')
      turn = asyncio.get_running_loop().create_future()
      (self.submits if submit else self.others).append(turn)
      try:
        await turn
      except asyncio.CancelledError:
        if turn.done() and not turn.cancelled():
          self._end()
        raise
    try:
      yield
    finally:
      self._end()

  def _end(self) -> None:
    """Gives the turn to the next one that waits. Who has gone away in the meantime does not."""
    for waiting in (self.submits, self.others):
      while waiting:
        turn = waiting.popleft()
        if not turn.done():
          turn.set_result(None)
          return
    self.free += 1


class Headers:
  """Adds HEADERS to every response."""

  def __init__(self, app: ASGIApp):
    self.app = app

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    async def with_headers(message: Message) -> None:
      if message['type'] == 'http.response.start':
        message['headers'] = [*message['headers'], *_HEADERS]
      await send(message)

    await self.app(scope, receive, with_headers if scope['type'] == 'http' else send)
