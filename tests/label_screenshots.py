"""Makes the pictures of the labeling server in docs/images: python -m tests.label_screenshots"""

import argparse
import io
import pathlib
import random
import shutil
import tempfile

import sqlalchemy as sa
from PIL import Image
from playwright import sync_api

from alignjax.label import catalog, exchange, schema
from tests import labeling

HEIGHT = 1440
FOLDER = pathlib.Path(__file__).parents[1] / 'docs' / 'images'
RULES = """Rate each response **by itself** first, then rank them all.

- Helpful: it does what the writer of the prompt *wants*, in clear language.
- Truthful: it makes nothing up.
- Harmless: it would not hurt anybody.

Responses that are about equally good get the same rank.
"""
WRITING = """Write what you would like a careful assistant to answer.

- Follow the prompt exactly; where it asks for three points, give three.
- Say so if a question rests on a wrong assumption.
"""
PROMPT = 'Why does bread go stale faster in the fridge than on the counter? Explain it to a child.'
RESPONSES = [
  'Fresh bread is soft because its starch holds water. When bread gets cold, the starch goes back '
  'to being little hard crystals and pushes the water out. That happens fastest at the '
  'temperature of a fridge. So in the fridge bread turns hard in a day, while on the counter it '
  'stays soft for two or three. In the freezer it is so cold that the crystals cannot form at '
  'all!',
  'Bread goes stale in the fridge because the fridge is a dry place and the water of the bread '
  'evaporates. You should wrap it well.',
  'It does not. Bread keeps longest in the fridge, because microbes grow more slowly there.',
  'Imagine that bread is full of tiny sponges that hold water. In the cold, the sponges squeeze '
  'shut and let go of the water, and the bread feels hard and dry. Warm it in the toaster, and '
  'the sponges open up again!',
]
POLICIES = ['ppo-ptx', 'ppo', 'sft', 'sft']


def fill(engine, url):
  """Tasks of three kinds, with labelers at work, and one known as ann who has just begun."""
  workers = ['ben', 'carla', 'deniz', 'emil', 'farah']
  labeling.people(engine, ann='labeler', rita='researcher', **dict.fromkeys(workers, 'labeler'))
  rng = random.Random(0)
  records = [dict(prompt=PROMPT, responses=RESPONSES, policies=POLICIES, use_case='open QA')]
  records += [
    dict(prompt=f'Question {n} of an exam', responses=[f'{n} {i}' for i in rng.sample(range(4), 4)])
    for n in range(1, 30)
  ]
  ranking = labeling.task(
    engine, 'Answers for children', records=records, overlap=3, gold_rate=0.1, text=RULES
  )
  with schema.writing(engine) as connection:
    writing = catalog.add_task(connection, 'Demonstrations', 'demonstration', text=WRITING)
    prompt = dict(prompt='Write a friendly reminder that the library closes early on Friday.')
    rows = exchange.demonstration_items([prompt | dict(use_case='generation')])
    catalog.add_items(connection, writing, rows)
  labeling.labeler(url, 'ann').next_item(ranking)  # hers is the first item

  def answer(item):
    quality = [int(text.split()[-1]) if text[0].isdigit() else 0 for text in item['responses']]
    noisy = [round(q + rng.gauss(0, 0.9)) for q in quality]
    flags = [['hallucination'] if rng.random() < 0.2 else [] for _ in quality]
    ratings = [
      dict(likert=min(max(q + 3, 1), 7), flags=f) for q, f in zip(noisy, flags, strict=True)
    ]
    return dict(ranks=[1 + sorted(noisy, reverse=True).index(q) for q in noisy], ratings=ratings)

  for count, name in zip([21, 18, 12, 9, 6], workers, strict=True):
    at_work = labeling.labeler(url, name)
    for _ in range(count):
      at_work.submit(item := at_work.next_item(ranking), **answer(item))
  with schema.writing(engine) as connection:  # as if they had worked through a day
    answers = schema.answers
    last = 0.0
    rows = connection.execute(sa.select(answers.c.id, answers.c.at).order_by(answers.c.id)).all()
    for back, (number, at) in enumerate(reversed(rows)):
      last += rng.expovariate(1 / 400)
      connection.execute(
        answers.update()
        .where(answers.c.id == number)
        .values(at=at - last * (back > 0), active=rng.lognormvariate(4.6, 0.4))
      )
  return ranking, writing


def login(page, url, name):
  page.goto(f'{url}/login')
  page.get_by_label('Name').fill(name)
  page.get_by_label('Password').fill(labeling.PASSWORD)
  page.get_by_role('button', name='Log in').click()


def pictures(browser, url, tasks):
  """Yields (name, PNG)."""
  ranking, writing = tasks
  page = browser.new_page(viewport=dict(width=1240, height=HEIGHT))

  def begin(task):
    page.goto(url)
    page.locator(f'form[action="/tasks/{task}/next"] button').click()

  def shot(name):
    page.wait_for_timeout(900)
    height = page.evaluate('document.body.scrollHeight')
    clip = dict(x=0, y=0, width=1240, height=min(height, HEIGHT))
    return name, page.screenshot(full_page=True, clip=clip)

  login(page, url, 'ann')
  begin(ranking)
  page.get_by_label('3', exact=True).check()
  page.get_by_label('It contains a hallucination.').check()
  yield shot('rate')
  for _ in range(4):
    page.get_by_label('4', exact=True).check()
    page.get_by_role('button', name='Next').click()
  page.locator('details.instructions summary').click()
  for card, rank in ((1, 2), (3, 1), (4, 1)):
    page.locator(f'[data-number="{card}"] .handle').drag_to(page.locator('.column').nth(rank - 1))
  yield shot('rank')
  begin(writing)
  page.get_by_label('Response').fill(
    'Dear readers,\n\nplease note that the library closes at three on Friday this week. We look '
    'forward to seeing you on Saturday at the usual hours.\n\nYour library team'
  )
  yield shot('write')
  page.context.clear_cookies()
  login(page, url, 'rita')
  page.goto(f'{url}/dashboard/{ranking}')
  yield shot('dashboard')


def small(png):
  """The same picture with 128 colours."""
  buffer = io.BytesIO()
  made = Image.open(io.BytesIO(png)).convert('RGB').quantize(128, dither=Image.Dither.NONE)
  made.save(buffer, 'PNG', optimize=True)
  return buffer.getvalue()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=pathlib.Path, default=FOLDER)
  out = parser.parse_args().out
  with tempfile.TemporaryDirectory() as folder, sync_api.sync_playwright() as playwright:
    engine = schema.connect(f'{folder}/labels.db')
    with labeling.serving(engine) as url:
      tasks = fill(engine, url)
      browser = playwright.chromium.launch(
        executable_path=shutil.which('chromium'), args=['--no-sandbox']
      )
      for name, png in pictures(browser, url, tasks):
        data = small(png)
        (out / f'label_{name}.png').write_bytes(data)
        print(f'label_{name}.png: {len(data) / 1000:.0f} kB')
      browser.close()
    engine.dispose()


if __name__ == '__main__':
  main()
