"""Real processes with jax.distributed and gloo: the same run as one process has, and a resume by
another number of them."""

import json
import pathlib

import jax
import numpy as np
import pytest

from alignjax.runtime import checkpoint
from alignjax.setup.objects import make_setup
from alignjax.setup.weights import initial_params
from tests import processes
from tests.processes import STAGES, rows


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  """All runs are compiled without LLVM's optimizations, which takes three fifths of the time."""
  with pytest.MonkeyPatch.context() as m:
    m.setattr(processes, 'FLAGS', '--xla_backend_optimization_level=0')
    yield


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """One process with four devices."""
  workdir = tmp_path_factory.mktemp('alone') / 'run'
  assert processes.run(workdir, 1, 4) == 0, log(workdir)
  return workdir


def log(workdir: pathlib.Path) -> str:
  return '\n'.join(p.read_text() for p in sorted(workdir.parent.glob(f'{workdir.name}.*.log')))


def params(workdir: pathlib.Path, stage: str):
  c = processes.micro()
  c.mesh.fsdp = 1
  setup = make_setup(c, workdir, jax.devices()[:1])
  return jax.tree.map(
    np.asarray, initial_params(setup, f'stage:{stage}', 'scalar' if stage == 'rm' else 'lm', 0)
  )


def assert_same(workdir: pathlib.Path, other: pathlib.Path) -> None:
  """Reductions over processes add up in another order, which Adam's division by small moments
  enlarges: 1e-3 of a metric's size."""
  for stage in STAGES:
    mine, theirs = rows(workdir, stage), rows(other, stage)
    assert [r['step'] for r in mine] == [r['step'] for r in theirs]
    for a, b in zip(mine, theirs, strict=True):
      assert a.keys() == b.keys()
      for name in a:
        np.testing.assert_allclose(
          a[name], b[name], rtol=1e-3, atol=1e-4, err_msg=f'{stage}, step {a["step"]}, {name}'
        )
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-3),
      params(workdir, stage),
      params(other, stage),
    )
  mine, theirs = (json.loads((w / 'report.json').read_text())['policies'] for w in (workdir, other))
  assert mine.keys() == theirs.keys()
  np.testing.assert_allclose(
    mine['sft']['pretraining_loss']['mean'], theirs['sft']['pretraining_loss']['mean'], rtol=1e-3
  )


@pytest.mark.parametrize(
  'count', [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.long)]
)
def test_item_29_several_processes_are_one_run(alone, tmp_path, count):
  assert processes.run(tmp_path / 'run', count, 4 // count) == 0, log(tmp_path / 'run')
  assert_same(tmp_path / 'run', alone)
  ratios = [r['ppo/ratio_max_dev'] for r in rows(tmp_path / 'run', 'ppo_ptx')]
  assert ratios == [0.0] * len(ratios)


@pytest.mark.long
def test_four_then_one_then_two_processes(alone, tmp_path):
  """Killed -9 in SFT and in the reward model, each time gone on with by another number of processes
  on another mesh."""
  workdir = tmp_path / 'run'
  saved = lambda stage, step: lambda: (workdir / stage / 'checkpoints/steps' / str(step)).exists()
  assert processes.run(workdir, 4, 1, kill_when=saved('sft', 1)) != 0
  assert not checkpoint.is_finished(workdir / 'sft/final') and checkpoint.is_finished(
    workdir / 'pretrain/final'
  )
  assert (
    processes.run(workdir, 1, 4, ['mesh.fsdp=1', 'mesh.tensor=2'], kill_when=saved('rm', 2)) != 0
  )
  assert not checkpoint.is_finished(workdir / 'rm/final')
  assert processes.run(workdir, 2, 2) == 0, log(workdir)
  text = log(workdir)
  assert 'sft: goes on from step 1' in text and 'rm: goes on from step 2' in text
  assert_same(workdir, alone)


@pytest.mark.long
def test_a_reward_on_the_host_that_fails_ends_all_and_the_same_command_goes_on(
  tmp_path, monkeypatch
):
  """The function runs on process 0 alone, and both know of its end."""
  workdir = tmp_path / 'run'
  reward = 'stages.ppo_ptx.reward=' + str(
    dict(
      fn='alignjax.rewards:host_reward', function='tests.processes:length', attempts=2, pause=0.1
    )
  )
  monkeypatch.setenv('BROKEN', '1')
  assert processes.run(workdir, 2, 2, [reward]) == 1
  assert (
    'step 1: the reward function tests.processes:length failed 2 times, at last with '
    'ConnectionError' in log(workdir)
  )
  monkeypatch.delenv('BROKEN')
  assert processes.run(workdir, 2, 2, [reward]) == 0, log(workdir)
  assert rows(workdir, 'ppo_ptx')[-1]['step'] == 2 and checkpoint.is_finished(
    workdir / 'ppo_ptx/final'
  )
