"""Labelers at work in a real browser: with the mouse, with the keyboard, without JavaScript."""

import re

import pytest

from alignjax.label import catalog, schema

pytest.importorskip('playwright', reason='playwright is not installed')

from tests import browsing, labeling  # noqa: E402
from tests.browsing import answer_of, expect, lease, press, records, written  # noqa: E402


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  with browsing.serving(tmp_path_factory.mktemp('labels')) as made:
    yield made


@pytest.fixture
def visit(site):
  with browsing.visiting(site) as made:
    yield made


def response(page):
  """The number of the response that a page of a rating shows: the last digit of its text."""
  return int(page.locator('.response .text').inner_text()[-1])


def card(page, number):
  """The card of a response on the page of a ranking."""
  return page.locator('.rank').filter(has=page.get_by_text(re.compile(rf'/{number}$')))


LIKERT = [5, 7, 1, 4]  # of the responses 0 to 3 ...
RANKS = [2, 1, 4, 1]  # ... and their ranks, which are [2, 1, 3, 1] without a gap


def check_answer(row):
  """Whether an answer is LIKERT and RANKS, with a flag for response 2."""
  assert row.status == 'done' and sorted(row.shown) == [0, 1, 2, 3]
  assert row.payload == dict(
    ratings=[dict(likert=n, flags=['hallucination'] if n == 1 else []) for n in LIKERT],
    ranks=[2, 1, 3, 1],
    all_bad=False,
  )


def test_an_item_is_rated_and_ranked_with_the_mouse(site, visit):
  labeling.people(site.engine, mia='labeler')
  labeling.task(site.engine, 'by mouse', records=records('mouse'))
  page = visit('mia')
  page.goto(site.url)
  page.get_by_role('region', name='by mouse').get_by_role('button').click()
  for step in range(4):
    expect(page.get_by_role('heading', name=f'Response {"ABCD"[step]}')).to_be_visible()
    which = response(page)
    if step == 1:  # A rating that is missing is asked for.
      press(page, 'Next')
      expect(page.get_by_role('alert')).to_have_text('“Overall quality” has no answer yet.')
    page.get_by_label(str(LIKERT[which]), exact=True).click()
    if which == 2:
      page.get_by_label('It contains a hallucination.').click()
    press(page, 'Next')
  columns, tray = page.locator('.column'), page.locator('.cards')
  expect(columns).to_have_count(4)  # The script has made them.
  expect(tray.locator('.rank')).to_have_count(4)
  assert page.locator(':checked:not(.keys *)').count() == 0

  def drag(number, place):
    card(page, number).locator('.handle').drag_to(place)

  drag(0, columns.nth(1))
  drag(2, columns.nth(3))
  press(page, 'Submit')
  expect(page.get_by_role('alert')).to_have_text(
    '2 of 4 responses have no rank yet. Rank all of them, or tick “All are bad”, or skip the item.'
  )
  for i in (1, 3):
    expect(columns.nth(i).locator('.rank')).to_have_count(1)
  drag(0, tray)
  expect(tray.locator('.rank')).to_have_count(3)
  for number, rank in enumerate(RANKS):
    drag(number, columns.nth(rank - 1))
  for i, count in enumerate((2, 1, 0, 1)):
    expect(columns.nth(i).locator('.rank')).to_have_count(count)
  press(page, 'Submit')
  page.wait_for_url(f'{site.url}/')
  check_answer(answer_of(site, 'mia'))


def test_an_item_is_rated_and_ranked_with_the_keyboard_alone(site, visit):
  labeling.people(site.engine, kim='labeler')
  labeling.task(site.engine, 'by keyboard', records=records('keys'))
  page = visit()
  page.goto(f'{site.url}/login')
  clicks = "addEventListener('pointerdown', () => { document.title = 'a mouse was used'; })"
  page.add_init_script(clicks)

  def tab_to(element):
    for _ in range(60):
      if element.evaluate('e => e === document.activeElement'):
        return
      page.keyboard.press('Tab')
    raise AssertionError('The keyboard does not reach it.')

  tab_to(page.get_by_label('Name'))
  page.keyboard.type('kim')
  tab_to(page.get_by_label('Password'))
  page.keyboard.type(labeling.PASSWORD)
  page.keyboard.press('Enter')
  tab_to(page.get_by_role('region', name='by keyboard').get_by_role('button'))
  page.keyboard.press('Enter')
  for step in range(4):
    expect(page.get_by_role('heading', name=f'Response {"ABCD"[step]}')).to_be_visible()
    which = response(page)
    if which == 2:
      tab_to(page.get_by_label('It contains a hallucination.'))
      page.keyboard.press('Space')
    page.keyboard.press(str(LIKERT[which]))
    page.keyboard.press('Enter')
  expect(page.locator('.rank')).to_have_count(4)
  page.keyboard.press('Enter')
  expect(page.get_by_role('alert')).to_contain_text('4 of 4 responses have no rank yet.')
  for place in range(1, 5):
    page.keyboard.press('j')
    focused = page.locator('.rank:focus')
    expect(focused).to_have_attribute('aria-label', f'Response {"ABCD"[place - 1]}')
    page.keyboard.press('9')  # There is no such rank.
    page.keyboard.press(str(RANKS[int(focused.locator('.text').inner_text()[-1])]))
  page.keyboard.press('k')
  page.keyboard.press('0')
  expect(page.locator('.cards .rank')).to_have_count(1)
  page.keyboard.press(str(RANKS[int(page.locator('.rank:focus .text').inner_text()[-1])]))
  page.keyboard.press('Tab')  # from the card to its radio buttons, which arrows change
  page.keyboard.press('ArrowRight')
  page.keyboard.press('ArrowLeft')
  assert 'mouse' not in page.title()
  page.keyboard.press('Enter')
  page.wait_for_url(f'{site.url}/')
  check_answer(answer_of(site, 'kim'))


def test_what_somebody_turned_off_stays_off(site, visit):
  labeling.people(site.engine, off='labeler')
  task = labeling.task(site.engine, 'off', records=records('off', 2), text='Be *kind*.')
  page = visit('off')
  page.goto(lease(site, 'off', task))
  rules = page.locator('.instructions em')
  expect(rules).to_be_visible()
  page.get_by_text('Instructions').click()
  page.get_by_label('Keys').uncheck()
  page.reload()
  page.keyboard.press('5')
  assert page.locator('.scale :checked').count() == 0
  page.get_by_label('Keys').check()
  page.keyboard.press('5')
  expect(page.locator('.scale :checked')).to_have_attribute('value', '5')
  expect(rules).not_to_be_visible()
  with schema.writing(site.engine) as connection:
    catalog.edit_task(connection, task, 1, instructions='Be *quick*.')
  page.reload()
  expect(rules).to_have_text('quick')
  expect(rules).to_be_visible()


def test_everything_works_without_javascript(site, visit):
  labeling.people(site.engine, nora='labeler', nick='labeler')
  task = labeling.task(site.engine, 'no script', records=records('plain'))
  page = visit('nora', java_script_enabled=False)
  page.goto(lease(site, 'nora', task))
  for step in range(4):
    which = response(page)
    page.get_by_label(str(LIKERT[which]), exact=True).check()
    if which == 2:
      page.get_by_label('It contains a hallucination.').check()
    press(page, 'Next')
    if step == 0:  # Going back keeps what was filled in.
      press(page, 'Back')
      expect(page.locator('.scale :checked')).to_have_attribute('value', str(LIKERT[which]))
      press(page, 'Next')
  expect(page.locator('.rank')).to_have_count(4)
  assert page.locator(':checked:not(.keys *)').count() == 0
  card(page, 0).get_by_label('2', exact=True).check()
  press(page, 'Submit')
  expect(page.get_by_role('alert')).to_contain_text('3 of 4 responses have no rank yet.')
  for number, rank in enumerate(RANKS):
    card(page, number).get_by_label(str(rank), exact=True).check()
  press(page, 'Submit')
  check_answer(answer_of(site, 'nora'))

  page = visit('nick', java_script_enabled=False)
  page.goto(lease(site, 'nick', written(site.engine, 'no script, few', 'few_shot', count=1)))
  page.get_by_label('Instruction').fill('\nTranslate.')
  press(page, 'Another example')
  expect(page.get_by_label('Query')).to_have_count(4)
  expect(page.get_by_label('Instruction')).to_have_value('\nTranslate.')
  for n in (1, 4):
    page.get_by_label(f'Query {n}').fill(f'q{n}')
    page.get_by_label(f'Answer {n}').fill(f'a{n}\nmore')
  page.get_by_label('Use case').fill('rewrite')
  press(page, 'Submit')
  assert answer_of(site, 'nick').payload == dict(
    prompt='\nTranslate.',
    response=None,
    use_case='rewrite',
    examples=[['q1', 'a1\nmore'], ['q4', 'a4\nmore']],
  )


def test_all_bad_and_skips(site, visit):
  labeling.people(site.engine, abe='labeler', sky='labeler')
  task = labeling.task(site.engine, 'bad', records=records('bad', 2), ratings=False, overlap=2)
  page = visit('abe')
  page.goto(lease(site, 'abe', task))
  page.get_by_label('All are bad').check()
  press(page, 'Submit')
  expect(page.locator('.prompt .text')).to_have_text('bad 1')
  assert answer_of(site, 'abe').payload == dict(ratings=None, ranks=None, all_bad=True)
  page = visit('sky')
  address = lease(site, 'sky', task)
  page.goto(address)
  page.get_by_text('Skip this item').click()
  press(page, 'Skip')
  expect(page.get_by_role('alert')).to_have_text('Say why you skip the item.')
  page.goto(address)
  page.get_by_text('Skip this item').click()
  page.get_by_label('It contains personal data.').check()
  press(page, 'Skip')
  expect(page.locator('.prompt .text')).to_have_text('bad 1')
  row = answer_of(site, 'sky')
  assert (row.status, row.payload) == ('skipped', {'reason': 'pii'})
  page.goto(address)
  expect(page.get_by_role('alert')).to_contain_text('This item was taken out')


def test_drafts_survive(site, visit):
  labeling.people(site.engine, dora='labeler')
  address = lease(site, 'dora', written(site.engine, 'drafts', 'prompts'))
  page = visit('dora')
  page.goto(address)
  here = page.context
  text, saved = page.get_by_label('Response'), page.locator('.saved')
  text.press_sequentially('A😀é')
  expect(page.locator('#response-count')).to_have_text('3 characters')
  expect(saved).to_have_text('Draft saved.')
  page.close()

  elsewhere = visit('dora')  # the server's draft
  elsewhere.goto(address)
  expect(elsewhere.get_by_label('Response')).to_have_value('A😀é')
  elsewhere.get_by_label('Response').fill('typed in the last moment')
  elsewhere.goto(site.url)  # before the draft was saved
  expect(elsewhere.get_by_role('heading', name='Tasks')).to_be_visible()
  elsewhere.context.clear_cookies()

  page = here.new_page()
  page.goto(address)
  text, saved = page.get_by_label('Response'), page.locator('.saved')
  expect(text).to_have_value('typed in the last moment')
  here.set_offline(True)  # for the page, the server is gone
  text.fill('without a server')
  expect(saved).to_have_text('Not saved on the server; this browser keeps your draft.')
  page.close()
  here.set_offline(False)
  page = here.new_page()
  page.goto(address)
  text, saved = page.get_by_label('Response'), page.locator('.saved')
  expect(text).to_have_value('without a server')
  expect(saved).to_have_text('Draft saved.')

  here.set_offline(True)
  text.fill('submitted without a server')
  press(page, 'Submit')
  page.wait_for_url('chrome-error:**')
  here.set_offline(False)
  page.goto(site.url)
  page.goto(address)
  expect(text).to_have_value('submitted without a server')
  drafts = "Object.keys(localStorage).filter((key) => key.includes('draft')).length"
  assert page.evaluate(drafts) == 1
  page.evaluate("localStorage.setItem('alignjax-label/draft/0/0/1', '{}')")  # of another item
  press(page, 'Submit')
  expect(page.locator('.prompt .text')).to_have_text('drafts 1')
  assert page.url.endswith(f'/items/{int(address.rpartition("/")[2]) + 1}')  # and no fragment
  assert page.evaluate(drafts) == 1
  assert page.evaluate("localStorage.getItem('alignjax-label/draft/0/0/1')") == '{}'
  assert answer_of(site, 'dora').payload['response'] == 'submitted without a server'

  # A draft that this browser kept gives way to a newer one of the server.
  page.get_by_label('Response').fill('old')
  expect(page.locator('.saved')).to_have_text('Draft saved.')
  form = "document.querySelector('form.work')"
  for age, value in ((60, 'old'), (-60, 'new')):
    page.evaluate(
      f"""() => {{
        const {{ person, item, step }} = {form}.dataset;
        const fields = {{ response: ['new'], use_case: ['chat'], seconds: ['1'] }};
        localStorage.setItem(`alignjax-label/draft/${{person}}/${{item}}/${{step}}`,
          JSON.stringify({{ fields, at: Date.now() - {age} * 1000 }}));
      }}"""
    )
    page.reload()
    expect(page.get_by_label('Response')).to_have_value(value)


def test_the_seconds_of_use_are_counted(site, visit):
  labeling.people(site.engine, tom='labeler')
  page = visit('tom')
  page.clock.install()
  page.goto(lease(site, 'tom', written(site.engine, 'time', 'prompts')))
  seconds = page.locator('[name=seconds]')

  def after(run):
    page.clock.run_for(1000 * run)
    return float(seconds.input_value())

  page.keyboard.press('Shift')
  assert after(10) == pytest.approx(10, abs=1)
  assert after(300) == pytest.approx(60, abs=1)  # nobody was there after a minute
  page.mouse.move(50, 50)
  assert after(10) == pytest.approx(70, abs=1)
  page.evaluate("Object.defineProperty(document, 'visibilityState', {get: () => 'hidden'})")
  page.keyboard.press('Shift')
  assert after(10) == pytest.approx(70, abs=1)
  page.get_by_label('Response').fill('done')
  press(page, 'Submit')
  page.wait_for_url(re.compile('/items/'))
  assert answer_of(site, 'tom').active == pytest.approx(70, abs=1)
