"""Every mesh of eight devices against one device: all stages of the main job in miniature, by
metrics and sampled responses.

  python tests/meshes.py OUT [DATAxFSDPxTENSOR[xSEQUENCE] ...]

prints a table and ends with status 1 where a mesh disagrees. All of them take some minutes. The
tests run one iteration on a few; this is the whole table.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['JAX_PLATFORMS'] = 'cpu'

from tests import processes  # noqa: E402  after the path

AXES = ('data', 'fsdp', 'tensor', 'sequence')
MESHES = [(d, f, 8 // d // f) for d in (8, 4, 2, 1) for f in (8, 4, 2, 1) if 8 % (d * f) == 0]
MESHES += [(2, 2, 1, 2), (1, 2, 2, 2), (2, 1, 1, 4), (1, 1, 1, 8)]


def furthest(workdir: pathlib.Path, other: pathlib.Path) -> dict[str, float]:
  """Stage -> the largest difference of a metric, relative to 1 + its size."""
  out = {}
  for stage in processes.STAGES:
    pairs = zip(processes.rows(workdir, stage), processes.rows(other, stage), strict=True)
    out[stage] = max(abs(a[name] - b[name]) / (1 + abs(b[name])) for a, b in pairs for name in a)
  return out


def samples(workdir: pathlib.Path) -> list[str]:
  return [
    json.loads(line)['response']
    for line in (workdir / 'ppo_ptx/samples.jsonl').read_text().splitlines()
  ]


def main(arguments: list[str]) -> int:
  out = pathlib.Path(arguments[0]).absolute()
  out.mkdir(parents=True, exist_ok=True)
  wanted = [tuple(map(int, a.split('x'))) for a in arguments[1:]] or MESHES
  one = out / '1x1x1'

  def run(workdir, devices, mesh):
    axes = [f'mesh.{axis}={size}' for axis, size in zip(AXES, (*mesh, 1), strict=False)]
    return processes.run(workdir, 1, devices, [*axes, 'report.policies={}'], timeout=3600)

  if run(one, 1, (1, 1, 1)):
    raise SystemExit(f'the run on one device failed: {one}.0.log')
  wrong = 0
  print(
    '| data x fsdp x tensor x sequence | '
    + ' | '.join(processes.STAGES)
    + ' | samples |\n'
    + '|---' * (len(processes.STAGES) + 2)
    + '|'
  )
  for mesh in wanted:
    name = 'x'.join(map(str, mesh))
    if run(out / name, 8, mesh):
      print(f'| {name} | failed: {out / name}.0.log |', flush=True)
      wrong += 1
      continue
    far, same = furthest(out / name, one), samples(out / name) == samples(one)
    wrong += max(far.values()) > 1e-3 or not same
    print(
      f'| {name} | '
      + ' | '.join(f'{x:.1e}' for x in far.values())
      + f' | {"the same" if same else "DIFFERENT"} |',
      flush=True,
    )
  return int(wrong > 0)


if __name__ == '__main__':
  raise SystemExit(main(sys.argv[1:]))
