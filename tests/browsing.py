"""A browser for the tests of the labeling pages."""

import contextlib
import shutil
from typing import NamedTuple

import pytest
import sqlalchemy as sa
from playwright import sync_api

from alignjax.label import catalog, exchange, schema
from tests import labeling

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
SECONDS = 15_000  # Milliseconds, in which what is expected must be there.

expect = sync_api.expect
expect.set_options(timeout=SECONDS)


class Site(NamedTuple):
  engine: sa.Engine
  url: str
  browser: sync_api.Browser


@contextlib.contextmanager
def serving(folder):
  """Runs a server with an empty database, and a browser."""
  if not CHROMIUM:
    pytest.skip('chromium is not installed')
  engine = schema.connect(str(folder / 'labels.db'))
  with sync_api.sync_playwright() as playwright, labeling.serving(engine) as url:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
    yield Site(engine, url, browser)
    browser.close()  # before the server ends, which waits for open connections
  engine.dispose()


@contextlib.contextmanager
def visiting(site):
  """Yields a function that makes a new browser context in which a person is logged in, and a page
  in it. In the end nothing may have left the server, run against its policy, failed or named a
  source."""
  requests, said, contexts = [], [], []

  def begin(name='', **options):
    context = site.browser.new_context(viewport=dict(width=1280, height=1500), **options)
    context.set_default_timeout(SECONDS)
    context.on('request', lambda request: requests.append(request.url))
    context.on('console', lambda message: said.append(message.text))
    context.on('weberror', lambda error: said.append(f'Uncaught: {error.error}'))
    contexts.append(context)
    if name:
      value = labeling.labeler(site.url, name).http.cookies['alignjax_label']
      context.add_cookies([dict(name='alignjax_label', value=value, url=site.url)])
    return context.new_page()

  yield begin
  for context in contexts:
    context.close()
  home = (f'{site.url}/', 'chrome-error:')
  assert requests and [url for url in requests if not url.startswith(home)] == []
  assert [text for text in said if 'Failed to load resource' not in text] == []
  assert not [url for url in requests if 'secret' in url]


def records(prompt, count=1, k=4):
  """Items whose responses are 'PROMPT 0', 'PROMPT 1', ..."""
  return [
    dict(record, prompt=f'{prompt} {i}', responses=[f'{prompt} {i}/{j}' for j in range(k)])
    for i, record in enumerate(labeling.candidates(count, k))
  ]


def written(engine, name, style, **options):
  """Makes a task of demonstrations and returns its number."""
  count = options.pop('count', 0)
  prompts = [] if count else [dict(prompt=f'{name} {i}', use_case='chat') for i in range(3)]
  rows = exchange.demonstration_items(prompts, None if style == 'prompts' else style, count)
  with schema.writing(engine) as connection:
    number = catalog.add_task(connection, name, 'demonstration', **options)
    catalog.add_items(connection, number, rows)
  return number


def lease(site, name, task):
  """Gives a person an item and returns its address."""
  return f'{site.url}/items/{labeling.labeler(site.url, name).next_item(task)["item"]}'


def answer_of(site, name):
  """The only current answer of a person."""
  answers, people = schema.answers, schema.people
  with schema.reading(site.engine) as connection:
    return connection.execute(
      sa.select(answers)
      .join(people, people.c.id == answers.c.person_id)
      .where(people.c.name == name, answers.c.current)
    ).one()


def press(page, name):
  """Clicks a button and waits until the page that follows is loaded and its script has run."""
  page.get_by_role('button', name=name, exact=True).click()
  page.wait_for_load_state()
