"""Puts the pages together to an application for an ASGI server such as uvicorn."""

from __future__ import annotations

import sqlalchemy as sa
from starlette import responses, routing, staticfiles
from starlette.applications import Starlette
from starlette.requests import Request

from alignjax.label import accounts, assignment, labeler_pages, researcher_pages, schema
from alignjax.label.server import FOLDER, Headers, Settings, Turns, templates

AT_ONCE = 8  # requests that are worked on at once


def make_app(
  engine: sa.Engine, *, lease_seconds: float = assignment.LEASE_SECONDS, secure: bool = False
) -> Starlette:
  """Returns the application.

  Args:
    engine: the database (schema.connect).
    lease_seconds: how long an item stays with a labeler who does not answer.
    secure: whether the server is reached over https, so that its cookie is sent over nothing else.
  """
  with schema.writing(engine) as connection:
    sessions = accounts.Sessions(accounts.secret(connection))
  app = Starlette(
    routes=[
      *labeler_pages.ROUTES,
      *researcher_pages.ROUTES,
      routing.Mount('/static', staticfiles.StaticFiles(directory=FOLDER / 'static')),
    ],
    exception_handlers={404: _not_found, 405: _not_found, 400: _bad_request},
  )
  app.add_middleware(Headers)
  app.state.turns = Turns(AT_ONCE)
  app.state.settings = Settings(engine, sessions, lease_seconds, secure)
  return app


async def _not_found(request: Request, error: Exception) -> responses.Response:
  return responses.HTMLResponse(
    templates.get_template('bare.html').render(
      title='There is no such page', text='Check the address, or go back to the beginning.'
    ),
    getattr(error, 'status_code', 404),
  )


async def _bad_request(request: Request, error: Exception) -> responses.Response:
  return responses.HTMLResponse(
    templates.get_template('bare.html').render(
      title='The form could not be read', text=str(getattr(error, 'detail', error))
    ),
    400,
  )
