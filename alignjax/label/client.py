"""A labeler that is a program: it speaks to the server over HTTP as a browser does. The sandbox's
labelers and the tests use it."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx


class Labeler:
  """A session of one person.

  Args:
    url: the address of the server.
    transport: of httpx, for tests without a network.
  """

  def __init__(self, url: str, transport: Any = None):
    self.http = httpx.Client(base_url=url, transport=transport, follow_redirects=True, timeout=60)

  def close(self) -> None:
    self.http.close()

  def _token(self, path: str) -> str:
    found = re.search(r'name="token" value="([^"]+)"', self._checked(self.http.get(path)).text)
    if not found:
      raise ValueError(f'{path} has no form; perhaps this person is not logged in.')
    return found[1]

  @staticmethod
  def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.status_code >= 400:
      found = re.search(r'role="alert">([^<]+)<', answer.text)
      raise ValueError(f'{answer.url}: {answer.status_code}: {found[1] if found else answer.text}')
    return answer

  def join(self, link: str, name: str, password: str) -> None:
    """Joins by an invitation and is logged in."""
    path = '/join/' + link.rpartition('/')[2]
    self._post(path, self._token(path), name=name, password=password)

  def login(self, name: str, password: str) -> None:
    self._post('/login', self._token('/login'), name=name, password=password)

  def _post(self, path: str, token: str, **fields: Any) -> httpx.Response:
    return self._checked(self.http.post(path, data={'token': token, **fields}))

  def tasks(self) -> dict[str, int]:
    """{name: number} of the tasks that this person may work on."""
    text = self._checked(self.http.get('/')).text
    names = re.findall(r'<section class="card" aria-label="([^"]*)">', text)
    names = map(html.unescape, names)
    return dict(zip(names, map(int, re.findall(r'action="/tasks/(\d+)/next"', text)), strict=True))

  def next_item(self, task: int) -> dict[str, Any] | None:
    """The item that is given out next, as the page shows it, or None if there is none."""
    answer = self._post(f'/tasks/{task}/next', self._token('/'))
    found = re.fullmatch(r'/items/(\d+)', answer.url.path)
    return self.item(int(found[1])) if found else None

  def item(self, number: int) -> dict[str, Any]:
    return self._checked(self.http.get(f'/items/{number}.json')).json()

  def submit(
    self,
    item: Mapping[str, Any],
    ranks: Sequence[int],
    ratings: Sequence[Mapping[str, Any]] = (),
    all_bad: bool = False,
  ) -> httpx.Response:
    """Rates and ranks the responses, both in the order of item['responses']. Rank 1 is the best.
    Returns the page that follows."""
    path = f'/items/{item["item"]}'
    for step in range(1, item['steps']):
      fields = {'step': step, 'go': 'next', **ratings[step - 1]}
      self._post(path, item['token'], **fields)
    fields: dict[str, Any] = {f'rank_{i}': rank for i, rank in enumerate(ranks, 1)}
    if all_bad:
      fields['all_bad'] = 'yes'
    return self._post(path, item['token'], step=item['steps'], go='submit', **fields)

  def write(self, item: Mapping[str, Any], **fields: str) -> httpx.Response:
    """Submits a demonstration: 'response', and 'prompt' where the item has none."""
    return self._post(f'/items/{item["item"]}', item['token'], step=1, go='submit', **fields)

  def skip(self, item: Mapping[str, Any], reason: str) -> httpx.Response:
    return self._post(f'/items/{item["item"]}/skip', item['token'], reason=reason)

  def work(self, task: int, answer: Callable[[dict[str, Any]], Mapping[str, Any]]) -> int:
    """Answers items until none is left. answer(item) returns the arguments of `submit`. Returns how
    many items were answered."""
    count = 0
    while (item := self.next_item(task)) is not None:
      self.submit(item, **answer(item))
      count += 1
    return count
