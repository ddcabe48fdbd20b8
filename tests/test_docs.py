"""The documents against the code: links, commands, flags, config entries, metrics and files.

A command in a code block is parsed. Its comment says what keeps it from being run here:

  # needs ...     hardware, a network, or files that a reader brings: it is parsed only
  # takes ...     time: a run of the sandbox is checked up to its first step, another is parsed only

Every other command is really run; those that use a finished run, after the `:tiny` main job
(pytest -m long).
"""

from __future__ import annotations

import ast
import configparser
import functools
import importlib
import importlib.util
import inspect
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tokenize
from typing import NamedTuple

import jax
import ml_collections
import pytest

from alignjax import studies, train
from alignjax.commands import config_flags, label
from alignjax.data import fields
from alignjax.models.config import TransformerConfig
from alignjax.runtime import failures

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [
  ROOT / 'README.md',
  ROOT / 'CONTRIBUTING.md',
  ROOT / 'CHANGELOG.md',
  *sorted((ROOT / 'docs').glob('*.md')),
  ROOT / 'examples/README.md',
]
COMMANDS = ROOT / 'alignjax/commands'
CONFIGS = ROOT / 'alignjax/configs'
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / 'setup.cfg')

name = lambda path: path.relative_to(ROOT).as_posix()  # of a test's parameter


# links ------------------------------------------------------------------------------------------


def prose(path):
  """The text of a page without its fenced blocks."""
  return re.sub(r'^```.*?^```', '', path.read_text(), flags=re.M | re.S)


def anchors(path):
  """The anchors that a code host gives to the headings of a page."""
  found: set[str] = set()
  for heading in re.findall(r'^#+ (.*)$', prose(path), re.M):
    plain = re.sub(r'[^\w\- ]', '', heading.strip().lower()).replace(' ', '-')
    same = sum(a == plain or re.fullmatch(f'{re.escape(plain)}-\\d+', a) is not None for a in found)
    found.add(f'{plain}-{same}' if same else plain)
  return found


@pytest.mark.parametrize(
  'page', [*PAGES, ROOT / 'launch/README.md', ROOT / 'experiments/LOG.md'], ids=name
)
def test_links_and_anchors_resolve(page):
  for target in re.findall(r'\]\(([^)\s]+)\)', prose(page)):
    if '://' in target:
      continue
    path, _, anchor = target.partition('#')
    file = (page.parent / path).resolve() if path else page
    assert file.exists(), f'{name(page)} links to {target}, which is not there'
    if anchor:
      assert anchor in anchors(file), (
        f'{name(page)} links to {target}; that page has {anchors(file)}'
      )


def test_anchors_of_headings(tmp_path):
  page = tmp_path / 'page.md'
  page.write_text("# A `b.py`, c\n## What's new?\n## Same\n## Same\n```sh\n# no heading\n```\n")
  assert anchors(page) == {'a-bpy-c', 'whats-new', 'same', 'same-1'}


def test_every_page_stands_in_the_navigation_of_the_site():
  listed = re.findall(r'^(\w+)$', (ROOT / 'docs/index.md').read_text(), re.M)
  assert sorted(listed) == sorted(p.stem for p in (ROOT / 'docs').glob('*.md') if p.stem != 'index')


def test_the_readme_is_short_and_says_how_long_the_main_job_takes_alone():
  readme = (ROOT / 'README.md').read_text()
  assert len(readme.splitlines()) <= 130 and len(readme.split()) <= 1000
  duration = re.search(r'takes about (\d+ minutes)', readme).group(1)
  texts = [*PAGES[1:], *CONFIGS.glob('*.py'), ROOT / 'experiments/run.py', *COMMANDS.glob('*.py')]
  assert not [name(p) for p in texts if duration in p.read_text()], 'the README alone says it'


# commands ---------------------------------------------------------------------------------------


class Command(NamedTuple):
  """where: 'FILE:LINE'. words: of the shell. comment: what stands behind it."""

  where: str
  words: list[str]
  comment: str


PROGRAMS = (
  r'(\.venv/bin/)?'
  r'(python3?|alignjax|pip|pytest|ruff|pyright|sphinx-build|sbatch|docker|launch/\S+) '
)


def commands(path):
  """The commands in a page's indented blocks and in its fenced ones without a language or of sh."""
  language, block, found = None, None, []
  for number, line in enumerate(path.read_text().splitlines(), 1):
    if line.startswith('```'):
      language = line[3:] if language is None else None
      continue
    if language not in (None, '', 'sh') or (language is None and not line.startswith('    ')):
      block = None
      continue
    text = line.strip()
    if block is not None and block[1].endswith('\\'):
      block[1] = block[1][:-1] + text
    elif re.match(PROGRAMS, f'{text} '):
      block = [number, text]
      found.append(block)
    else:
      block = None
  for number, text in found:
    code, _, comment = re.sub(r'\s+# ', '\0', text, count=1).partition('\0')
    for one in code.split(' && '):
      words = shlex.split(one.replace('.venv/bin/', ''))
      yield Command(f'{path.relative_to(ROOT)}:{number}', words, comment)


ALL = [c for page in PAGES for c in commands(page)]


def test_commands_are_found_in_a_page():
  assert len(ALL) > 50
  found = [c for c in ALL if c.where.startswith('docs/evaluations.md') and 'best_of_n' in c.words]
  assert len(found) == 1 and '--limit=20' in found[0].words and found[0].comment == ''


def subcommand(words):
  """('run', its arguments) of `alignjax run ...` and of `python experiments/run.py ...`; None for
  anything else."""
  if words[0] == 'alignjax':
    return words[1], words[2:]
  if words[0].startswith('python') and words[1].startswith('experiments/'):
    return pathlib.Path(words[1]).stem, words[2:]
  return None


def program(sub):
  """How this interpreter runs a subcommand."""
  scripts = SETUP['options.entry_points']['console_scripts']
  module, function = re.search(r'alignjax\s*=\s*([\w.]+):(\w+)', scripts).groups()
  call = f'from {module} import {function} as main; main()'
  return [sys.executable, '-c', f"import sys; sys.argv[0] = 'alignjax'; {call}", sub]


def run(words, folder, timeout=600):
  """(status, output) of a subcommand with the arguments, in the folder."""
  sub, arguments = words[0], words[1:]
  environ = os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '',
    'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
    'COLUMNS': '200',
  }
  done = subprocess.run(
    [*program(sub), *arguments],
    cwd=folder,
    env=environ,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=timeout,
  )
  return done.returncode, done.stdout + done.stderr


@functools.cache
def flags(sub, more=False):
  """The flags that a subcommand's help names; more: those of the libraries that it takes too."""
  wanted = '--helpfull' if more else '--help'
  actions = {'label': label.ACTIONS, 'study': studies.NAMES}.get(sub, ()) if not more else ()
  text = '\n'.join(run([sub, *action, wanted], ROOT)[1] for action in [(), *zip(actions)])
  return set(re.findall(r'--(?:\[no\])?([A-Za-z]\w*)', text))


def read_config(arguments):
  """The config of --config=NAME[:ARG] and --config.ENTRY=VALUE, as the commands read them.
  SystemExit with a message for what is wrong."""
  return config_flags.read_config(arguments)[0]


def write_files_of_the_pages(folder):
  """Writes the files that a page has its reader write: the Python block below a line with the name
  of the file."""
  found = [
    file
    for page in PAGES
    for file in re.findall(
      r'`([\w/]+\.py)`[^`\n]*:\n\n```python\n(.*?)^```', page.read_text(), re.M | re.S
    )
  ]
  assert [path for path, _ in found] == ['mylab/losses.py', 'mylab/entries.py', 'mine.py']
  for path, source in found:
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_text(source)


@pytest.mark.parametrize('sub', sorted({s[0] for c in ALL if (s := subcommand(c.words))}))
def test_subcommands_and_their_flags_exist(sub):
  for command in ALL:
    if (subcommand(command.words) or ('',))[0] != sub:
      continue
    for word in subcommand(command.words)[1]:
      flag = re.match(r'--(?!config\.)(\w+)', word)
      if flag and flag.group(1) not in ('config', 'help'):
        known = flag.group(1) in flags(sub) or flag.group(1) in flags(sub, more=True)
        assert known, f'{command.where}: {sub} has no flag {word}'


@pytest.mark.parametrize(
  'command', [c for c in ALL if any(w.startswith('--config=') for w in c.words)], ids=lambda c: c[0]
)
def test_configs_and_their_entries_exist(command, tmp_path, monkeypatch):
  write_files_of_the_pages(tmp_path)
  monkeypatch.chdir(tmp_path)
  arguments = [w for w in command.words if w.startswith('--config') and '...' not in w]
  if not arguments:
    return
  read_config(arguments)  # a wrong one ends with a message


def test_an_unknown_entry_in_a_command_would_be_found():
  with pytest.raises((SystemExit, ValueError), match='kl.coeff'):
    read_config(['--config=sft', '--config.stages.ppo.kl.coeff=1'])


@pytest.mark.parametrize(
  'command', [c for c in ALL if not subcommand(c.words)], ids=lambda c: f'{c[0]} {c[1][0]}'
)
def test_other_commands_name_files_extras_and_markers_that_exist(command):
  first, *rest = command.words
  rest = [w for w in rest if '...' not in w]
  if first == 'pip':
    extra = re.fullmatch(r'\.(?:\[([\w-]+)\])?', rest[-1])
    assert rest[0] == 'install' and extra, f'{command.where}: {rest}'
    assert extra.group(1) in (None, *SETUP['options.extras_require'])
  elif first == 'pytest':
    markers = re.findall(r'^(\w+):', SETUP['tool:pytest']['markers'].strip(), re.M)
    if '-m' in rest:
      named = set(re.findall(r'\w+', rest[rest.index('-m') + 1])) - {'or', 'and', 'not'}
      assert named <= set(markers), f'{command.where}: {named}'
    assert all((ROOT / w).exists() for w in rest if '/' in w), command.where
  elif first.startswith('python') and rest[0] == '-m':
    assert importlib.util.find_spec(rest[1]), f'{command.where}: {rest[1]}'
  elif first.startswith('python'):
    source = (ROOT / rest[0]).read_text()
    for word in rest[1:]:
      if word.startswith('--'):
        assert f"'{word.partition('=')[0]}'" in source, f'{command.where}: {word}'
  elif first.startswith('launch/') or first == 'sbatch':
    script = first if first != 'sbatch' else next(w for w in rest if w.startswith('launch/'))
    source = (ROOT / script).read_text()
    before = rest[: rest.index('--')] if '--' in rest else rest[:2] if first != 'sbatch' else []
    for word in before:
      if word.startswith('--'):
        flag = word.partition('=')[0]
        assert re.search(rf'{flag}(?![\w-])', source), f'{command.where}: {word}'


def test_a_command_that_is_not_run_says_why():
  reasons = {c.comment.split()[0] for c in ALL if c.comment}
  assert reasons == {'needs', 'takes'}
  for command in ALL:
    words = ' '.join(command.words)
    if re.search(r'gs://|hf:|:cpu|smollm2|pythia|llama|topology=|tpu|gke|gpu_host', words):
      assert command.comment.startswith('needs'), f'{command.where}: {words}'


def test_the_records_of_the_page_about_data_are_records():
  page = (ROOT / 'docs/data.md').read_text()
  lines = re.search(r'^```json\n(.*?)^```', page, re.M | re.S).group(1).splitlines()
  kinds = ('demonstrations', 'comparisons', 'prompts', 'pretrain', 'comparisons')
  made = [
    fields.check(json.loads(line), kind, kind) for line, kind in zip(lines, kinds, strict=True)
  ]
  assert made[4]['responses'] == ['Blue.', 'A horse.'] and made[4]['ranks'] == [0, 1]


class Checked(Exception):
  """The run has checked its config and would begin."""


@pytest.mark.sampled(5)
@pytest.mark.slow
@pytest.mark.parametrize(
  'command',
  [
    c
    for c in ALL
    if (subcommand(c.words) or ('',))[0] == 'run' and not c.comment.startswith('needs')
    if '--help' not in c.words
  ],
  ids=lambda c: c[0],
)
def test_runs_of_the_sandbox_are_accepted_up_to_their_first_step(command, tmp_path, monkeypatch):
  def stop(folder):
    raise Checked

  write_files_of_the_pages(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  config = read_config([w for w in command.words if w.startswith('--config')])
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *_: one)
  monkeypatch.setattr(failures, 'check_writable', stop)
  with pytest.raises(Checked):
    train.main(config, tmp_path)


def is_run(command):
  """Whether a command can be run here: it has no comment, and is no training run."""
  sub, arguments = subcommand(command.words) or ('', [])
  return sub and not command.comment and (sub != 'run' or '--help' in arguments)


def runs(command, folder):
  """Runs a command as a shell would in the folder, with its patterns expanded."""
  sub, arguments = subcommand(command.words)
  words = []
  for word in arguments:
    found = [str(p.relative_to(folder)) for p in sorted(folder.glob(word))] if '*' in word else []
    words += found or [word]
  status, output = run([sub, *words], folder)
  assert 'Traceback' not in output and status in (0, '--help' in words), (
    f'{command.where}: {output}'
  )


NEEDS_RUN = [c for c in ALL if is_run(c) and any('runs/' in w for w in c.words)]


@pytest.mark.parametrize(
  'command', [c for c in ALL if is_run(c) and c not in NEEDS_RUN], ids=lambda c: c[0]
)
def test_commands_without_a_finished_run_work(command, tmp_path):
  runs(command, tmp_path)


@pytest.mark.long
def test_commands_with_a_finished_run_work(tmp_path):
  """In the order of the pages, after the `:tiny` main job under the name of the default one."""
  status, output = run(['run', '--config=ppo_ptx:tiny', '--workdir=runs/ppo_ptx-s0'], tmp_path)
  assert status == 0, output
  assert len({subcommand(c.words)[0] for c in NEEDS_RUN}) == 4
  for command in NEEDS_RUN:
    runs(command, tmp_path)


def test_subcommands_in_running_text_exist():
  found = {s for p in PAGES for s in re.findall(r'`alignjax ([a-z_]+)', prose(p))}
  assert found and all((COMMANDS / f'{sub}.py').is_file() for sub in found), found


# what the code says -----------------------------------------------------------------------------


def strings(path):
  """(line, text) of every string and comment of a Python file."""
  source = path.read_text()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield node.lineno, node.value
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      yield token.start[0], token.string


SECTIONS = (
  'data mesh sharding model reward_model report stages world rollout kl ptx init loss advantage '
  'optimizer reward by heldout mapping'
).split()
SECTION = '|'.join(SECTIONS)
ENTRY = re.compile(
  rf'(?<![\w./:*-])(?:(?:c|config)\.|--config\.)?((?:{SECTION})(?:\.[A-Za-z_]\w*)+)(?![\w(])'
)
PREFIXED = re.compile(r'(?<![\w./])(?:c\.|--config\.)([a-z_]\w*(?:\.[A-Za-z_]\w*)*)')
# in docstrings about flags: of no config that there is
EXAMPLES = ('a.b', 'stages.ppo.loss.beta')
FILES = ('py', 'json', 'md', 'safetensors', 'yaml', 'jsonl', 'png', 'npz')


@functools.cache
def entries():
  """Every entry of every config, as 'stages.ppo.kl.coef', and the ends of these names, 'kl.coef',
  that begin with a section. Of a function's dict also the arguments that it could have."""
  from alignjax import plugins

  found = set(SECTIONS)

  def visit(node, path):
    found.update('.'.join(path[i:]) for i in range(len(path)))
    if isinstance(node, (dict, ml_collections.ConfigDict)):
      for key in node:
        visit(node[key], [*path, key])
      if path and isinstance(node.get('fn'), str):
        for key in plugins.keywords(node['fn']):
          visit(None, [*path, key])

  for path in CONFIGS.glob('[!_]*.py'):
    module = importlib.import_module(f'{name(CONFIGS).replace("/", ".")}.{path.stem}')
    takes = inspect.signature(module.get_config).parameters.values()
    if all(p.default is not p.empty for p in takes):
      visit(module.get_config(), [])
  visit(dict.fromkeys(TransformerConfig.__dataclass_fields__), ['model'])
  visit(dict.fromkeys(plugins.keywords('alignjax.rewards:host_reward')), ['reward'])
  return found


def is_entry(text):
  """Whether the configs have the entry; words in capitals, such as STAGE, stand for any name."""
  pattern = re.escape(text)
  pattern = re.sub(r'(?<![a-z_])[A-Z]{2,}(?![a-z_])', r'\\w+', pattern)
  return any(re.fullmatch(pattern, known) for known in entries())


def is_python(text):
  """Whether a dotted name is a module of alignjax, or something in one."""
  module, _, attribute = f'alignjax.{text}'.rpartition('.')
  for _ in range(2):  # NAME of a module, or NAME.method of a class in one
    try:
      found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
      found = None
    if found:
      return hasattr(importlib.import_module(module), attribute.split('.')[0])
    module, _, last = module.rpartition('.')
    attribute = f'{last}.{attribute}'
  return False


def test_entries_of_the_config_that_the_code_names_exist():
  wrong = []
  for path in sorted((ROOT / 'alignjax').rglob('*.py')):
    if path.name == 'families.py':  # has names of Hugging Face's tensors
      continue
    for line, text in strings(path):
      for found in {*ENTRY.findall(text), *PREFIXED.findall(text)}:
        if found.rpartition('.')[2] in FILES:
          continue
        if found not in EXAMPLES and not is_entry(found) and not is_python(found):
          wrong.append(f'{name(path)}:{line}: {found}')
  assert not wrong, wrong


def test_entries_of_the_config_that_the_documents_name_exist():
  wrong = []
  for page in PAGES:
    for span in re.findall(r'`([^`\n]+)`', prose(page)):
      for found in {*ENTRY.findall(span), *PREFIXED.findall(span)}:
        if found.rpartition('.')[2] not in FILES and not is_entry(found) and not is_python(found):
          wrong.append(f'{name(page)}: {found}')
  assert not wrong, wrong


def test_an_unknown_entry_would_be_found():
  assert ENTRY.findall('set ptx.source, or c.stages.ppo.loss') == ['ptx.source', 'stages.ppo.loss']
  assert is_entry('ptx.documents') and is_entry('stages.STAGE.microbatches') and is_entry('kl.coef')
  assert is_entry('loss.value_clip') and is_python('sharding.make_mesh')
  assert not is_entry('ptx.source') and not is_python('stages.loading.Model')


MADE = ('report.md', 'table.md', 'preference.md', 'best_of_n.md', 'heldout_labelers.md')


def test_documents_and_files_that_are_named_exist():
  """Documents that the code names, and every path in the documents."""
  texts = [
    p
    for folder in ('alignjax', 'experiments', 'tests', 'launch')
    for p in (ROOT / folder).rglob('*')
    if p.suffix in ('.py', '.md', '.sh', '.sbatch') and p != pathlib.Path(__file__)
  ]
  for path in texts:
    text = path.read_text()
    for found in re.findall(r'\b(?:docs/)?[\w-]+\.md\b', text):
      stem = found.removesuffix('.md')
      if found not in MADE and ('/' in found or stem.isupper()):
        near = (ROOT / found, path.parent / found, ROOT / 'experiments' / found)
        assert any(p.is_file() for p in near), f'{name(path)} names {found}'
    cited = re.search(r'README(\.md)?, "?[A-Z]', text)
    assert not cited, f'{name(path)} names a section of the README: {cited}'
  for page in PAGES:
    if page.name == 'CHANGELOG.md':  # has paths of earlier versions
      continue
    folders = r'`((?:alignjax|experiments|tests|docs|launch|examples)/[\w./-]*)'
    for found in re.findall(folders, prose(page)):
      assert (ROOT / found).exists() or '*' in found, f'{name(page)} names {found}'


def test_the_architecture_names_every_file():
  named = set(re.findall(r'\w+', (ROOT / 'docs/architecture.md').read_text()))
  files = [p for folder in ('alignjax', 'experiments') for p in (ROOT / folder).rglob('*.py')]
  assert len(files) > 80
  missing = [name(p) for p in files if p.stem not in ('__init__', 'compile', *named)]
  assert not missing, f'docs/architecture.md does not name {missing}'


# metrics ----------------------------------------------------------------------------------------

LOGGED = re.compile(r'(?:sft|rm|dpo|objective|rollout|ppo|optim|gold|time|device)/[\w/{}*]+')


def logged():
  """Patterns of the names that the package logs: literals, with `*` for what is filled in."""
  found = set()
  for path in sorted((ROOT / 'alignjax').rglob('*.py')):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
      if id(node) in parts:
        continue
      if isinstance(node, ast.JoinedStr):
        text = ''.join(p.value if isinstance(p, ast.Constant) else '*' for p in node.values)
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
      else:
        continue
      if LOGGED.fullmatch(text) and not text.endswith('/') and '.' not in text:
        found.add(text)
  return found


def test_the_page_of_metrics_has_what_the_code_logs_and_nothing_else():
  page = (ROOT / 'docs/metrics.md').read_text()
  cells = [row.split('|')[1] for row in re.findall(r'^\|.*\|$', page, re.M)]
  documented = {n for cell in cells for n in re.findall(r'`([\w/]+)`', cell)}
  patterns = logged()
  matches = lambda pattern, text: re.fullmatch(re.escape(pattern).replace(r'\*', r'\w+'), text)
  assert len(documented) > 40 and len(patterns) > 30
  assert not [p for p in patterns if not any(matches(p, d) for d in documented)]
  assert not [d for d in documented if not any(matches(p, d) for p in patterns)]
  for row in re.findall(r'^\| `.*\|$', page, re.M):
    assert len(row.split('|')) == 5, f'name, unit and meaning: {row}'
