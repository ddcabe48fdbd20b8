"""A bucket on this machine: the parts of the JSON API of Google Cloud Storage that gcsfs,
tensorstore and tensorboardX call.

  python tests/fake_gcs.py PORT

serves the bucket gs://bucket from memory, and environment(PORT) points those packages at it.

Not there: other buckets, permissions, versions of objects, pages of lists.
"""

from __future__ import annotations

import http.server
import json
import re
import sys
import threading
import time
import urllib.parse

ROOT = '/storage/v1/b/bucket'


def environment(port: int) -> dict[str, str]:
  """Variables for a process that takes this server for Google's. Nothing asks for credentials."""
  where = f'http://localhost:{port}'
  return {
    'STORAGE_EMULATOR_HOST': where,
    'TENSORSTORE_GCS_HTTP_URL': where,
    'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
    'FSSPEC_GCS_TOKEN': 'anon',
    'FSSPEC_GS_TOKEN': 'anon',
    'GOOGLE_CLOUD_PROJECT': 'none',
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
  }


class Bucket(http.server.ThreadingHTTPServer):
  """objects: name -> (contents, generation). begun: (name, contents so far) of uploads in several
  requests. hold: the name of an object; while there is one, nothing is answered."""

  daemon_threads = True

  def __init__(self, port: int = 0):
    super().__init__(('localhost', port), Handler)
    self.objects: dict[str, tuple[bytes, int]] = {}
    self.begun: list[tuple[str, bytes]] = []
    self.hold: str | None = None
    self.generation = 1000
    self.lock = threading.Lock()

  @property
  def port(self) -> int:
    return self.server_address[1]


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, *_):
    pass

  def handle_one(self) -> None:
    size = int(self.headers.get('Content-Length') or 0)
    body = (
      self.rfile.read(size)
      if size or 'chunked' not in self.headers.get('Transfer-Encoding', '')
      else self.chunks()
    )
    path, _, query = self.path.partition('?')
    query = {k: v[0] for k, v in urllib.parse.parse_qs(query).items()}
    while self.server.hold in self.server.objects:
      time.sleep(0.01)
    with self.server.lock:
      status, headers, content = self.answer(self.command, path, query, body)
    content = json.dumps(content).encode() if isinstance(content, dict) else content
    self.send_response(status)
    for name, value in {
      'Content-Type': 'application/json',
      **headers,
      'Content-Length': str(len(content)),
    }.items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(content)

  do_GET = do_POST = do_DELETE = do_PUT = do_HEAD = handle_one

  def chunks(self) -> bytes:
    out = b''
    while size := int(self.rfile.readline(), 16):
      out += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return out

  def answer(
    self, method: str, path: str, query: dict[str, str], body: bytes
  ) -> tuple[int, dict, bytes | dict]:
    if path == '/batch/storage/v1':
      return self.batch(body)
    if path == f'/upload{ROOT}/o':
      return self.upload(query, body)
    if path == ROOT:
      return (
        200,
        {},
        {
          'kind': 'storage#bucket',
          'name': 'bucket',
          'locationType': 'region',
          'storageClass': 'STANDARD',
        },
      )
    if path == f'{ROOT}/o':
      return self.list(query)
    path = path.removeprefix('/download')
    if not path.startswith(f'{ROOT}/o/'):
      return 404, {}, {'error': {'code': 404, 'message': f'no {path}'}}
    source, *target = re.split(
      r'/(?:moveTo|rewriteTo/b/bucket)/o/', path.removeprefix(f'{ROOT}/o/')
    )
    name = urllib.parse.unquote(source)
    contents, generation = self.server.objects.get(name, (None, 0))
    wanted = query.get('ifGenerationMatch')
    if wanted is not None and int(wanted) != generation:
      return 412, {}, {'error': {'code': 412, 'message': 'generation'}}
    if contents is None:
      return 404, {}, {'error': {'code': 404, 'message': f'no {name}'}}
    if method == 'DELETE':
      del self.server.objects[name]
      return 204, {}, b''
    if target:
      made = self.put(urllib.parse.unquote(target[0]), contents)
      if '/moveTo/' in path:
        del self.server.objects[name]
        return 200, {}, made
      return 200, {}, {'done': True, 'resource': made}
    if query.get('alt') == 'media':
      return self.media(contents, generation, query)
    return 200, {}, self.describe(name)

  def media(
    self, contents: bytes, generation: int, query: dict[str, str]
  ) -> tuple[int, dict, bytes]:
    headers = {'x-goog-generation': str(generation), 'Content-Type': 'application/octet-stream'}
    if query.get('ifGenerationNotMatch') == str(generation):
      return 304, headers, b''
    part = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
    if not part:
      return 200, headers, contents
    size = len(contents)
    first, last = (
      (max(0, size - int(part[2])), size - 1)
      if not part[1]
      else (int(part[1]), min(int(part[2] or size), size - 1))
    )
    if first >= size:
      return 416, headers, b''
    return (
      206,
      headers | {'Content-Range': f'bytes {first}-{last}/{size}'},
      contents[first : last + 1],
    )

  def describe(self, name: str) -> dict:
    contents, generation = self.server.objects[name]
    time = '2026-01-01T00:00:00.000Z'
    return {
      'kind': 'storage#object',
      'bucket': 'bucket',
      'name': name,
      'size': str(len(contents)),
      'generation': str(generation),
      'metageneration': '1',
      'contentType': 'application/octet-stream',
      'timeCreated': time,
      'updated': time,
      'storageClass': 'STANDARD',
    }

  def put(self, name: str, contents: bytes) -> dict:
    self.server.generation += 1
    self.server.objects[name] = contents, self.server.generation
    return self.describe(name)

  def upload(self, query: dict[str, str], body: bytes) -> tuple[int, dict, dict]:
    if query['uploadType'] == 'resumable':
      return self.resumable(query, body)
    name = query.get('name')
    if query['uploadType'] == 'multipart':  # a JSON part, then the contents
      mark = re.search(r'boundary=[\'"]?([^\'";]+)', self.headers['Content-Type'])[1].encode()
      described, contents = body.split(b'--' + mark)[1:3]
      name = json.loads(re.split(rb'\r?\n\r?\n', described, maxsplit=1)[1])['name']
      body = re.sub(rb'\r?\n$', b'', re.split(rb'\r?\n\r?\n', contents, maxsplit=1)[1])
    wanted = query.get('ifGenerationMatch')
    if wanted is not None and int(wanted) != self.server.objects.get(name, (None, 0))[1]:
      return 412, {}, {'error': {'code': 412, 'message': 'generation'}}
    return 200, {}, self.put(name, body)

  def resumable(self, query: dict[str, str], body: bytes) -> tuple[int, dict, dict]:
    begun = self.server.begun
    if 'upload_id' not in query:
      begun.append((json.loads(body)['name'] if body else query['name'], b''))
      return (
        200,
        {'Location': f'http://localhost:{self.server.port}{self.path}&upload_id={len(begun) - 1}'},
        {},
      )
    number = int(query['upload_id'])
    name, before = begun[number]
    begun[number] = name, before + body
    if self.headers.get('Content-Range', '').endswith('/*'):
      return 308, {'Range': f'bytes=0-{len(before + body) - 1}'}, {}
    return 200, {}, self.put(name, before + body)

  def list(self, query: dict[str, str]) -> tuple[int, dict, dict]:
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    items, folders = [], set()
    for name in sorted(self.server.objects):
      before_end = 'endOffset' not in query or name < query['endOffset']
      if name.startswith(prefix) and query.get('startOffset', '') <= name and before_end:
        rest = name[len(prefix) :]
        if delimiter and delimiter in rest:
          folders.add(prefix + rest.split(delimiter)[0] + delimiter)
        else:
          items.append(self.describe(name))
    return 200, {}, {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(folders)}

  def batch(self, body: bytes) -> tuple[int, dict, bytes]:
    answers = []
    for name in re.findall(rf'DELETE {ROOT}/o/(\S*?)(?:\?\S*)? HTTP', body.decode()):
      there = self.server.objects.pop(urllib.parse.unquote(name), None)
      answers.append(
        '\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n'
        if there
        else '\r\n\r\nHTTP/1.1 404 Not Found\r\n\r\n{"error": {"code": 404}}\r\n'
      )
    text = ''.join(f'--batch{a}' for a in answers) + '--batch--'
    return 200, {'Content-Type': 'multipart/mixed; boundary=batch'}, text.encode()


if __name__ == '__main__':
  Bucket(int(sys.argv[1])).serve_forever()
