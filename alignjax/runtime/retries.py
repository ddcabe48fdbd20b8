"""Requests to servers over HTTP, tried again while the failure may pass."""

from __future__ import annotations

import http.client
import json
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

LONGEST = 60.0  # seconds between two tries, whatever the server asks for

Result = TypeVar('Result')


class Passing(Exception):
  """A failure that may pass, so that the request is tried again: the server is busy or broken, the
  connection broke, or the answer is not what it should be.

  Attributes:
    after: seconds that the server asks to wait.
  """

  def __init__(self, problem: str, after: float = 0.0):
    super().__init__(problem)
    self.after = after


class Refused(Exception):
  """An answer that another try would not change.

  Attributes:
    code: the status code of HTTP.
  """

  def __init__(self, problem: str, code: int):
    super().__init__(problem)
    self.code = code


def failure(code: int, text: str, retry_after: str | None) -> Passing | Refused:
  """The exception for an answer with a status code of 400 or more.

  Args:
    code: the status code.
    text: of the answer.
    retry_after: the Retry-After header; a date counts as none.
  """
  problem = f'HTTP {code}: {text[:300]}'
  if code not in (408, 409, 429) and code < 500:
    return Refused(problem, code)
  seconds = re.fullmatch(r'\d+(\.\d+)?', retry_after or '')
  return Passing(problem, float(seconds[0]) if seconds else 0.0)


def tried(
  request: Callable[[], Result],
  *,
  tries: int,
  wait: float,
  sleep: Callable[[float], Any] = time.sleep,
) -> Result:
  """What `request` returns, called again while it raises Passing.

  Args:
    request: called without arguments.
    tries: calls before the last Passing is raised.
    wait: seconds before the second call, doubled before each further one; up to a fifth is added or
      taken away at random, so that callers that failed together do not come again together. A wait
      that the server asks for counts where it is longer.
    sleep: waits for a number of seconds.
  """
  for attempt in range(1, tries + 1):
    try:
      return request()
    except Passing as problem:
      if attempt == tries:
        raise
      backoff = wait * 2 ** (attempt - 1) * random.uniform(0.8, 1.2)
      sleep(min(max(backoff, problem.after), LONGEST))
  raise ValueError(f'tries={tries} must be 1 or more.')


def post(url: str, value: Any, timeout: float) -> Any:
  """Sends a JSON value and returns the JSON value of the answer, None where that is empty.

  Raises:
    Passing, Refused: The messages do not hold the URL, which may hold a key.
  """
  request = urllib.request.Request(
    url, json.dumps(value).encode(), {'Content-Type': 'application/json'}
  )
  return _answer(request, timeout)


def get(url: str, timeout: float) -> Any:
  """The JSON value at a URL. It raises what `post` does."""
  return _answer(urllib.request.Request(url), timeout)


def _answer(request: urllib.request.Request, timeout: float) -> Any:
  try:
    with urllib.request.urlopen(request, timeout=timeout) as answer:
      text = answer.read()
      return json.loads(text) if text else None
  except urllib.error.HTTPError as error:
    with error:
      text = error.read().decode('utf-8', 'replace')
    raise failure(error.code, text, error.headers.get('Retry-After')) from None
  except (OSError, http.client.HTTPException, ValueError) as error:
    # no such host, connection refused, reset or timed out, an answer that is not JSON
    raise Passing(f'{type(error).__name__}: {error}') from None
