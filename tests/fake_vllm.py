"""A server that answers as vLLM's does, with the weights that it was last told to read, sampled by
alignjax.sampling."""

from __future__ import annotations

import http.server
import json
import pathlib
import shutil
import tempfile
import threading

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.models import hf, transformer
from alignjax.sampling import generate


class Server(http.server.ThreadingHTTPServer):
  """Serves on a port of its own while it is a context.

  Attributes:
    asked: the path of every request, with those for a response counted as one.
    weights: those that are read.
    answers: prompt and seed -> (tokens, log-probabilities), what was answered last.
    change: what an answer goes through, for servers that are wrong.
    salts: the cache salts of all requests for a response.
    unused: the ids that no token has.
    broken: how often the weights were read when requests for a response fail.
  """

  daemon_threads = True

  def __init__(self, checkpoint, *, prompt_length: int, cfg):
    super().__init__(('127.0.0.1', 0), Handler)
    self.checkpoint, self.prompt_length, self.cfg = pathlib.Path(checkpoint), prompt_length, cfg
    self.nets = transformer.make_networks(cfg)
    self.asked: list[str] = []
    self.answers: dict = {}
    self.change, self.lock = lambda answer: answer, threading.Lock()
    self.broken: tuple[int, ...] = ()
    self.salts: set[str] = set()
    self.unused = [i for low, high in cfg.unused_ids for i in range(low, high)]
    self.weights = self.read(self.checkpoint)
    self.sampler = jax.jit(self._sample, static_argnames=('max_tokens', 'stop_ids'))

  def __enter__(self):
    threading.Thread(target=self.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *_):
    self.shutdown()
    self.server_close()

  @property
  def url(self) -> str:
    return f'http://127.0.0.1:{self.server_port}'

  def read(self, folder: pathlib.Path):
    with tempfile.TemporaryDirectory() as whole:
      shutil.copy(self.checkpoint / 'config.json', whole)
      for path in folder.glob('*.safetensors*'):
        shutil.copy(path, whole)
      return self.of_folder(whole)

  def of_folder(self, folder):
    alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return hf.load(folder, self.cfg, 'lm', lambda t: jax.tree.map(lambda _: alone, t))

  def _sample(self, params, prompt, mask, seed, temperature, *, max_tokens, stop_ids):
    key = jax.random.key(seed)
    return generate(
      self.nets.decoder, params, prompt, mask, key,
      max_tokens=max_tokens, stop_ids=stop_ids, temperature=temperature, segments=1,
    )  # fmt: skip

  def respond(self, asked: dict) -> dict:
    prompt = asked['prompt']
    row = np.zeros((1, self.prompt_length), np.int32)
    row[0, self.prompt_length - len(prompt) :] = prompt
    mask = jnp.arange(self.prompt_length)[None] >= self.prompt_length - len(prompt)
    with self.lock:
      made = self.sampler(
        self.weights, row, mask, asked['seed'], asked['temperature'],
        max_tokens=asked['max_tokens'], stop_ids=tuple(asked['stop_token_ids']),
      )  # fmt: skip
    live = np.asarray(made.mask[0])
    tokens, logprobs = (np.asarray(x[0])[live].tolist() for x in (made.responses, made.logprobs))
    self.answers[tuple(prompt), asked['seed']] = tokens, logprobs
    return dict(choices=[dict(token_ids=tokens, logprobs=dict(token_logprobs=logprobs))])


class Handler(http.server.BaseHTTPRequestHandler):
  server: Server

  def do_GET(self):
    self.answer(dict(data=[dict(id='policy')]))

  def do_POST(self):
    asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    server = self.server
    if self.path != '/v1/completions' or server.asked[-1:] != [self.path]:
      server.asked.append(self.path)
    if self.path == '/collective_rpc':
      assert asked['method'] == 'reload_weights'
      server.weights = server.read(pathlib.Path(asked['kwargs']['weights_path']))
      return self.answer(dict(results=[None]))
    if self.path != '/v1/completions':
      return self.answer(None)
    assert asked['model'] == 'policy' and (asked['top_p'], asked['top_k']) == (1.0, -1)
    server.salts.add(asked['cache_salt'])
    assert asked['logit_bias'] == {str(i): -100.0 for i in server.unused}
    if server.asked.count('/collective_rpc') in server.broken:
      return self.answer(dict(error='out of memory'), 500)
    return self.answer(server.change(server.respond(asked)))

  def answer(self, value, code=200):
    body = b'' if value is None else json.dumps(value).encode()
    self.send_response(code)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *_):
    pass
