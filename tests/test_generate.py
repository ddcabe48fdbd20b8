"""experiments/generate.py: how long an answer may be, what a person and what a pipe sees, Ctrl-C
and readers that go."""

import dataclasses
import io
import os
import pathlib
import pty
import shutil
import subprocess
import sys

import jax
import pytest

from alignjax import train
from alignjax.commands import generate as command
from alignjax.configs import smollm2_135m
from alignjax.inference import loading, streaming
from alignjax.models import transformer
from alignjax.runtime import checkpoint, saved_config
from alignjax.setup.objects import make_setup
from alignjax.setup.weights import initial_params

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHAT = ROOT / 'tests/golden/chat'
SHORT = [f'--model=hf:{CHAT}', '--max_tokens=2', '--temperature=0']


@pytest.fixture(scope='module')
def model():
  """A context of 24 tokens; one token a character."""
  model = loading.load(f'hf:{CHAT}')
  cfg = dataclasses.replace(model.cfg, max_length=24)
  return model._replace(cfg=cfg, nets=transformer.make_networks(cfg))


def said(model, prompt, **how):
  """(tokens of a greedy answer at its limit, what `cut` heard)."""
  heard, slots = [], []
  text = ''.join(
    streaming.stream(model, prompt, temperature=0, cut=heard.append, starting=slots.append, **how)
  )
  assert len(slots) == 1 and slots[0] <= model.cfg.max_length
  return text, heard


@pytest.mark.parametrize(
  'trained,letters,expected', [(5, 10, 5), (None, 10, 14), (100, 10, 14), (100, 23, 1), (5, 21, 3)]
)
def test_an_answer_is_as_long_as_in_training_and_fits(model, trained, letters, expected):
  _, heard = said(model._replace(response_length=trained), 'a' * letters)
  assert heard == [expected]  # this model never ends by itself here


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A finished stage of no steps, with a candidate, and the checkpoint it started from:
  (WORKDIR/sft, folder)."""
  place = tmp_path_factory.mktemp('trained')
  shutil.copytree(CHAT, place / 'base')
  c = smollm2_135m.get_config('tiny')
  c.checkpoint, c.model.max_length = f'hf:{place / "base"}', 256
  setup = make_setup(c, place / 'run', jax.devices()[:1])
  folder = place / 'run' / 'sft'
  saved_config.check(folder / 'checkpoints' / 'config.json', train.identity(c, 'sft'))
  params, made = initial_params(setup, f'hf:{place / "base"}', 'lm', 0), train.record(setup, 'sft')
  for to in (folder / 'final', folder / 'candidates' / '1'):
    checkpoint.save_params(to, params, dict(head='lm', seconds=0, steps=1), made)
  return folder, place / 'base'


@pytest.mark.parametrize('name', ['', 'candidates/1'])
def test_a_stage_is_used_with_the_tokens_and_the_config_of_its_training_alone(
  trained, tmp_path, name
):
  folder, base = tmp_path / 'run' / 'sft', trained[1]
  shutil.copytree(trained[0].parent, folder.parent)
  spec = str(folder / name)
  assert (
    loading.load(spec).response_length
    == 16
    == loading.trained_with(spec)['data']['response_length']
  )
  template = base / 'chat_template.jinja'
  before = template.read_text()
  try:
    template.write_text(f'{before} ')
    with pytest.raises(
      ValueError, match=r'data.tokenizer=hf:.*base has changed since .*--on_changed_input=keep'
    ):
      loading.load(spec)
  finally:
    template.write_text(before)
  loading.load(spec)
  config = folder / 'checkpoints' / 'config.json'
  before = config.read_text()
  config.write_text(before.replace('"response_length": 16', '"response_length": 12'))
  for read in (loading.load, loading.trained_with):
    with pytest.raises(
      checkpoint.Damaged,
      match=r'checkpoints/config.json is damaged or missing .*Delete it, and the command',
    ):
      read(spec)
  config.write_text(before)
  loading.load(spec)


def test_a_length_that_was_asked_for_is_kept_or_refused(model):
  assert said(model, 'a' * 10, max_tokens=7)[1] == [7]
  with pytest.raises(
    ValueError, match='the prompt has 10 tokens; with max_tokens=20 the context of 24 leaves 4'
  ):
    said(model, 'a' * 10, max_tokens=20)
  with pytest.raises(
    ValueError, match='the prompt has 24 tokens; the context of 24 leaves none for an answer'
  ):
    said(model, 'a' * 24)


def test_an_answer_that_the_model_ended_is_not_marked(model):
  first = model.template.prompt(said(model, 'abc', max_tokens=1)[0] or 'x')[0]
  ends = model._replace(template=model.template._replace(ends=(first,)))
  assert said(ends, 'abc') == ('', [])


class Pipe(io.StringIO):
  """A standard input that is no terminal."""

  def __init__(self, raw: bytes):
    super().__init__()
    self.buffer = io.BytesIO(raw)


def test_a_pipe_gets_answers_and_nothing_else(monkeypatch, capsys):
  """Blank lines are left out, wherever they stand; a line ends at newline; nothing is said on
  either stream besides the answers."""
  asked = []

  def stream(model, prompt, *, cut, **how):
    asked.append(prompt)
    cut(2)
    yield 'so'

  monkeypatch.setattr(streaming, 'stream', stream)
  monkeypatch.setattr(
    sys, 'stdin', Pipe(b'\xef\xbb\xbfone\r\n\n \ntwo\xe2\x80\xa8still\x0ctwo\n/new\nthree')
  )
  command.main(SHORT)
  assert asked == ['one', 'two\u2028still\x0ctwo', 'three'] and capsys.readouterr() == (
    'so\n' * 3,
    '',
  )
  monkeypatch.setattr(sys, 'stdin', Pipe(b'one\n\xff\n'))
  with pytest.raises(ValueError, match=r'standard input: not UTF-8 .byte 0. in line 2'):
    command.main(SHORT)
  monkeypatch.setattr(
    streaming, 'stream', lambda *_, **how: (_ for _ in ()).throw(KeyboardInterrupt)
  )
  with pytest.raises(SystemExit) as stopped:
    command.main([*SHORT, '--prompt=x'])
  assert stopped.value.code == 130


@pytest.mark.parametrize(
  'flags,words',
  [
    (['--temperature=nan'], 'must not be negative'),
    (['--temperature=inf'], 'must not be'),
    (['--seed=-1'], 'must lie in'),
    ([f'--seed={2**31}'], 'must lie in'),
    (['--prompt=\udcff'], '--prompt is not UTF-8'),
  ],
)
def test_flags_that_cannot_be(flags, words, capsys):
  with pytest.raises(SystemExit):
    command.main(['--model=hf:x', *flags])
  assert words in capsys.readouterr().err


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(monkeypatch, capsys):
  """As before the question that was not answered; an error is told and does not end the session
  either."""
  lines, asked = iter(['one', 'two', 'three', 'four', '', 'never']), []

  def stream(model, prompt, *, cut, **how):
    asked.append([m['content'] for m in prompt])
    yield 'so'
    if prompt[-1]['content'] == 'two':
      raise KeyboardInterrupt
    if prompt[-1]['content'] == 'three':
      raise ValueError('too long')

  monkeypatch.setattr(streaming, 'stream', stream)
  monkeypatch.setattr('builtins.input', lambda mark='': next(lines))
  for stream_of in (sys.stdin, sys.stderr):
    monkeypatch.setattr(stream_of, 'isatty', lambda: True, raising=False)
  command.main([*SHORT, '--chat'])
  assert asked == [['one'], ['one', 'so', 'two'], ['one', 'so', 'three'], ['one', 'so', 'four']]
  out, err = capsys.readouterr()
  # standard output is a pipe here
  assert out == 'so\nso\n' and '(stopped' in err and 'error: too long' in err


def test_a_terminal_is_told_what_happens():
  """Through a pseudo-terminal: loading and compiling are announced, the cut is marked after the
  answer."""
  master, slave = pty.openpty()
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | {
    'PYTHONPATH': str(ROOT)
  }
  process = subprocess.Popen(
    [sys.executable, 'experiments/generate.py', *SHORT, '--prompt=abc'],
    cwd=ROOT,
    env=environment,
    stdin=slave,
    stdout=slave,
    stderr=slave,
  )
  os.close(slave)
  shown = b''
  try:
    while True:
      shown += os.read(master, 4096)
  except OSError:  # its end
    assert process.wait(60) == 0
  finally:
    process.kill()
    os.close(master)
  first, second, third, last = shown.decode().strip().split('\r\n')
  assert first == f'loading hf:{CHAT} ...' and second == 'compiling for 18 tokens ...' and third
  assert last == '(cut at 2 tokens, the limit; --max_tokens sets another)'
