"""The documentation as a site: sphinx-build -W docs docs/_build.

The first page is the README, and the navigation that docs/index.md adds to it. Links that lead out
of docs/ work on a code host; in the site they become the name of the file.
"""

import pathlib
import re

HERE = pathlib.Path(__file__).resolve().parent

project = 'alignjax'
author = 'the alignjax authors'
extensions = ['myst_parser', 'sphinxcontrib.mermaid']
html_theme = 'furo'
html_title = 'alignjax'
exclude_patterns = ['_build']
# Links to a heading, such as data.md#records, get the anchors that GitHub gives to headings.
myst_heading_anchors = 3
# ```mermaid is a picture on GitHub and here.
myst_fence_as_directive = ['mermaid']


def inside(link: re.Match) -> str:
  """A Markdown link of a page in docs/ as the site needs it."""
  text, target = link.groups()
  if '://' in target or target.startswith('#'):
    return link.group()
  target = target.replace('../README.md', 'index.md')
  path = target.partition('#')[0]
  if (HERE / path).is_file() and not path.startswith('..'):
    return f'[{text}]({target})'
  name = path.replace('../', '')
  return f'`{name}`' if text in name else f'{text} (`{name}`)'


def read(app, docname: str, source: list[str]) -> None:
  """Replaces source[0], the text of a page, before Sphinx parses it."""
  del app
  text = source[0]
  if docname == 'index':
    text = (HERE.parent / 'README.md').read_text().replace('](docs/', '](') + text
  source[0] = re.sub(r'(?<!!)\[([^\]]*)\]\(([^)\s]+)\)', inside, text)


def setup(app) -> None:
  app.connect('source-read', read)
