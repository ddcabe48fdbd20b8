"""What a real browser finds on the labeling pages: no barrier, no source, no script of others."""

import base64

import pytest

from alignjax.label import schema

pytest.importorskip('playwright', reason='playwright is not installed')

from tests import browsing, labeling  # noqa: E402
from tests.browsing import expect, lease, press, records, written  # noqa: E402

NASTY = '<script>window.hacked = 1</script><img src="/x" onerror="window.hacked = 2">'
AXE_RULES = 'wcag2a wcag2aa wcag21a wcag21aa wcag22aa best-practice'.split()
WRITTEN = dict(plain=dict(count=2), few_shot=dict(count=3), user_based={}, prompts={})


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  with browsing.serving(tmp_path_factory.mktemp('labels')) as made:
    yield made


@pytest.fixture
def visit(site):
  with browsing.visiting(site) as made:
    yield made


def violations(page):
  """What axe finds on the page, {rule: the elements}."""
  axe = pytest.importorskip('axe_playwright_python.sync_playwright', reason='axe is not installed')
  options = dict(runOnly=AXE_RULES, resultTypes=['violations'], preload=False)
  found = axe.Axe().run(page, options=options).response['violations']
  return {rule['id']: [node['html'][:200] for node in rule['nodes']] for rule in found}


def test_no_page_has_a_barrier(site, visit):
  labeling.people(
    site.engine, ada='labeler', axel='labeler', rex='researcher', root='admin',
    sam=('labeler', 'screening'),
  )  # fmt: skip
  rules = '# Rules\n\nBe *kind*. See [this](https://example.org).\n\n' + '- long\n' * 15
  task = labeling.task(
    site.engine, 'barriers', records=records('long ' * 60, 2, 5), overlap=2, text=rules
  )
  toxic = labeling.task(site.engine, 'toxic', 'toxicity', records=records('toxic'), text=rules)
  write = {
    s: written(site.engine, f'write {s}', s, text=rules, **more) for s, more in WRITTEN.items()
  }
  for name in ('ada', 'axel'):
    someone = labeling.labeler(site.url, name)
    item = someone.next_item(task)
    someone.submit(item, range(1, 6), [dict(likert=4, flags=['hallucination'])] * 5)
    someone.write(someone.next_item(write['few_shot']), prompt='p', query_1='q', answer_1='a',
                  query_2='r', answer_2='b')  # fmt: skip
  items = {
    kind: lease(site, 'ada', number).removeprefix(site.url)
    for kind, number in dict(task=task, toxic=toxic, **write).items()
  }
  found = {}

  def check(page, path, *after):
    if path is not None:
      page.goto(site.url + path)
    for what in after:
      what()
    if wrong := violations(page):
      found[path or page.url] = wrong

  page = visit()
  check(page, '/login')
  check(page, '/login', lambda: page.get_by_label('Name').fill('x'),
        lambda: page.get_by_label('Password').fill('x'), lambda: press(page, 'Log in'))  # fmt: skip
  check(page, '/nowhere')
  page = visit('root')
  check(page, '/people', lambda: press(page, 'Make a link'))
  link = page.locator('pre').inner_text().removeprefix(site.url)
  for path in ('/review', f'/tasks/{task}/edit', f'/inspect/{item["item"]}'):
    check(page, path)
  page = visit('rex')
  for path in ('/dashboard', f'/dashboard/{task}', f'/dashboard/{toxic}', '/people'):
    check(page, path)
  page = visit()
  check(page, link)
  page = visit('ada')
  for path in ('/', f'/tasks/{task}/instructions', '/password', '/answers', *items.values()):
    check(page, path)
  check(page, items['task'] + '?step=6')
  page.set_viewport_size(dict(width=400, height=700))  # a phone
  page.get_by_text('Skip this item').click()
  check(page, None)
  page.set_viewport_size(dict(width=1280, height=700))
  check(page, items['task'] + '?step=6', lambda: press(page, 'Submit'))
  check(page, items['prompts'], lambda: press(page, 'Submit'))
  check(page, items['plain'], lambda: page.get_by_text('Skip this item').click(),
        lambda: press(page, 'Skip'))  # fmt: skip
  assert found == {}


def test_no_source_is_named_where_a_labeler_can_look(site, visit):
  labeling.people(site.engine, blind='labeler')
  task = labeling.task(site.engine, 'blind', records=records('blind', 2), text='Be *fair*.')
  someone, seen = labeling.labeler(site.url, 'blind'), []
  someone.http.event_hooks['response'].append(
    lambda answer: seen.append(f'{answer.url} {answer.headers} {answer.read().decode()}')
  )
  item = someone.next_item(task)
  path = f'/items/{item["item"]}'
  draft = dict(token=item['token'], step=1, likert=3)
  assert someone.http.post(f'{path}/draft', data=draft).status_code == 204
  for suffix in ('', '.json', '?step=1', '?step=5', '/skip'):
    someone.http.get(path + suffix)
  someone.submit(item, [1, 2, 3, 4], [labeling.RATING] * 4)
  for other in ('/', '/answers', '/dashboard', f'/inspect/{item["item"]}', path, path + '.json'):
    someone.http.get(other)
  seen += [_decoded(value) for value in someone.http.cookies.values()]
  page = visit('blind')
  for step in range(1, 6):
    page.goto(f'{site.url}{path}?step={step}')
    stored = 'JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}])'
    seen += [page.content(), page.evaluate(stored), str(page.context.cookies())]
  assert len(seen) > 30 and 'blind 0/3' in ''.join(seen) and '"person"' in ''.join(seen)
  assert [text for text in seen if 'secret' in text] == []


def _decoded(cookie):
  """The parts of a signed cookie as text."""
  parts = [base64.urlsafe_b64decode(part + '==') for part in cookie.split('.') if part]
  return b' '.join(parts).decode(errors='replace')


def test_stored_script_is_shown_and_never_runs(site, visit):
  people = labeling.people(site.engine, eve=('labeler', 'screening'), ria='researcher', max='admin')
  rules = f'{NASTY} [one](javascript:alert(1)) ![two](https://example.org/x.png)'
  talk = [dict(role='user', content=f'{NASTY} prompt')]
  texts = [f'{NASTY} {i} [one](javascript:alert(1))' for i in range(4)]
  record = dict(prompt=talk, responses=texts, policies=[NASTY] * 4, use_case=NASTY)
  task = labeling.task(
    site.engine, f'task {NASTY}', records=[record], text=rules, pool='all', overlap=2
  )
  write = written(site.engine, 'write script', 'plain', count=2, pool='screening')
  more = written(site.engine, 'write more', 'plain', count=2)
  someone = labeling.labeler(site.url, 'eve')
  someone.submit(item := someone.next_item(task), [1, 2, 2, 1], [labeling.RATING] * 4)
  someone.write(mine := someone.next_item(write), prompt=NASTY, response=NASTY, use_case=NASTY)
  with schema.writing(site.engine) as connection:
    connection.execute(
      schema.people.update().where(schema.people.c.id == people['eve']).values(name=NASTY)
    )

  def check(page, path):
    page.goto(site.url + path)
    page.wait_for_load_state('load')
    assert NASTY in page.locator('body').inner_text() + ' '.join(
      area.input_value() for area in page.locator('textarea').all()
    ), path
    bad = 'main script, main img:not([src^="/dashboard/"]), [onerror], [href^="javascript"]'
    assert page.locator(bad).count() == 0 and page.evaluate('window.hacked') is None, path

  page = visit('ria')
  for path in ('/dashboard', f'/dashboard/{task}', f'/tasks/{task}/edit', '/review'):
    check(page, path)
  for number in (item['item'], mine['item']):
    page.goto(f'{site.url}/inspect/{number}')
    assert page.evaluate('window.hacked') is None and page.locator('main img').count() == 0
  check(visit('max'), '/people')
  page = visit('ria')
  for path in ('/', f'/tasks/{task}/instructions'):
    check(page, path)
  path = lease(site, 'ria', task).removeprefix(site.url)
  for step in range(1, 6):
    check(page, f'{path}?step={step}')
  path = lease(site, 'ria', more).removeprefix(site.url)
  page.goto(site.url + path)
  page.get_by_label('Response').fill(NASTY)
  press(page, 'Submit')
  expect(page.get_by_role('alert')).to_have_text('“Prompt” is empty.')
  check(page, path)
  page.get_by_role('textbox', name='Prompt').fill('x')
  page.locator('form.work [name=token]').evaluate('e => { e.value = "old"; }')
  press(page, 'Submit')  # an error page, with what was filled in
  expect(page.locator('.kept')).to_contain_text(NASTY)
  assert page.evaluate('window.hacked') is None
