"""Does it fit, and how fast could it be? Compiles the step of a stage for devices that need not be
there, and reads the program.

    python experiments/compile.py --config=configs/instructgpt_175b.py --stage=ppo_ptx \\
      --topology=v5p:8x8x8
    python experiments/compile.py --config=configs/ppo_ptx.py:tiny      for the devices at hand

No weights, data or tokenizer are read. A TPU topology needs the TPU compiler, no TPU: libtpu, in a
folder of its own (the command says how). Prints memory, operations, communication and time by
phase; --out=FOLDER keeps them as JSON and makes FOLDER/table.md of all that lie there. Exits with 1
where the step does not fit.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
  sys.path.insert(0, str(HERE.parent))

from experiments import command  # noqa: E402


def find_libtpu() -> str:
  """The TPU compiler's file: TPU_LIBRARY_PATH, or the one of an installed libtpu. An error says how
  to get it."""
  path = os.environ.get('TPU_LIBRARY_PATH')
  installed = importlib.util.find_spec('libtpu')
  if not path and installed:
    path = str(pathlib.Path(installed.origin).parent / 'libtpu.so')
  if path and pathlib.Path(path).is_file():
    return path
  wants = [
    re.sub(r'[\s;].*', '', r) for r in importlib.metadata.requires('jax') if r.startswith('libtpu')
  ] or ['libtpu']
  raise FileNotFoundError(
    (f'TPU_LIBRARY_PATH={path}: no such file. ' if path else '')
    + 'To compile for a TPU topology, install the TPU compiler '
    '(no TPU is needed) into a folder of its own, because every jax process would try to use it '
    'otherwise:\n'
    f"  pip install --no-deps --target ~/.libtpu '{wants[0]}'\n  export "
    f'TPU_LIBRARY_PATH=~/.libtpu/libtpu/libtpu.so'
  )


def find_devices(topology: str):
  """(devices, chip name or None) of CHIP:SHAPE, or of `local`."""
  from alignjax.compiler import chips

  if topology == 'local':
    import jax

    return jax.devices(), chips.of_device(jax.devices()[0].device_kind)
  chip = chips.of_topology(topology)
  os.environ.update(
    TPU_LIBRARY_PATH=find_libtpu(),
    JAX_PLATFORMS='cpu',
    TPU_SKIP_MDS_QUERY='1',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
  )
  for key, value in (('TPU_WORKER_HOSTNAMES', 'localhost'), ('TF_CPP_MIN_LOG_LEVEL', '2')):
    os.environ.setdefault(key, value)
  import jax
  from jax.experimental import topologies

  jax.config.update('jax_platforms', 'cpu')
  try:
    # a device a chip, as the others have by themselves
    cores = dict(chip_config_name='megacore') if chip == 'v4' else {}
    return topologies.get_topology_desc(topology, platform='tpu', **cores).devices, chip
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f'--topology={topology}: the TPU compiler knows no such slice ({str(error).splitlines()[0]}).'
    ) from None


def compile_stage(config, stage: str, devices, chip_name: str | None) -> dict:
  """Everything that is printed, as JSON values."""
  import jax

  from alignjax import plugins
  from alignjax.compiler import chips, cost, hlo
  from alignjax.setup import objects
  from alignjax.stages import abstract

  if stage not in config.stages:
    raise ValueError(
      f'--stage={stage}: the config has the stages {", ".join(sorted(config.stages))}.'
    )
  made = objects.for_stage(abstract.setup(config, devices), stage)
  where = f'stages.{stage}.build'
  module = plugins.find(config.stages[stage].build, where).__module__
  plugins.find(f'{module}:check', where)(made, stage)
  plan = plugins.find(f'{module}:abstract_step', where)(made, stage)
  chip = chips.CHIPS.get(chip_name)
  mesh = dict(made.sharder.mesh.shape)
  out = dict(
    stage=stage,
    devices=len(devices),
    kind=devices[0].device_kind,
    mesh=mesh,
    chip=chip_name,
    capacity=chip.hbm if chip else None,
    jax=jax.__version__,
  )
  began = time.perf_counter()
  lowered = plan.step.trace(*plan.arguments).lower()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return out | dict(fits=False, why=str(error), minutes=(time.perf_counter() - began) / 60)
  memory = compiled.memory_analysis()
  sizes = dict(
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes,
    alias=memory.alias_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    code=memory.generated_code_size_in_bytes,
  )
  # a TPU's code, too
  peak = (
    sizes['arguments'] + sizes['outputs'] - sizes['alias'] + sizes['temporaries'] + sizes['code']
  )
  out |= dict(
    minutes=(time.perf_counter() - began) / 60,
    memory=sizes,
    peak=peak,
    fits=not chip or peak <= chip.hbm,
  )
  program = hlo.parse(compiled.as_text())
  phases, sent = cost.analyse(program, mesh, chip)
  needed = {
    name: [
      sum(abstract.model_flops(w) for w in works),
      sum(abstract.wire_bytes(made, w) for w in works),
    ]
    for name, works in plan.work.items()
  }
  out |= dict(
    phases={name: vars(p) for name, p in phases.items()},
    needed=needed,
    collectives=[vars(s) for s in sent],
    arrays=cost.largest_arrays(program),
    decode_tokens=sum(w.length * w.times for w in plan.work.get('decode', [])),
  )
  if chip:
    fast, slow = cost.step_seconds(phases, chip)
    total = sum(f for f, _ in needed.values()) / len(devices) / chip.flops
    out |= dict(seconds=[fast, slow], mfu=[total / fast, total / slow])
  return out


def describe(name: str, r: dict) -> str:
  """The report of one step in Markdown."""
  from alignjax.compiler import chips, cost

  def gib(x):
    return f'{x / 2**30:.2f} GiB'

  head = (
    f'## {name}\n\n{r["devices"]} x {r["kind"]}, mesh '
    + ' x '.join(f'{a} {n}' for a, n in r['mesh'].items())
    + f'; compiled in {r["minutes"]:.1f} minutes (jax {r["jax"]})'
  )
  if 'memory' not in r:
    return f'{head}\n\nDoes not fit: {r["why"]}\n'
  m, chip = r['memory'], chips.CHIPS.get(r['chip'])
  lines = [
    head,
    cost.table(
      ('memory of a device', ''),
      [
        ('arguments (state, frozen networks, batch)', gib(m['arguments'])),
        ('temporaries', gib(m['temporaries'])),
        ("outputs, beyond what takes an argument's place", gib(m['outputs'] - m['alias'])),
        ('program', gib(m['code'])),
        ('peak', gib(r['peak'])),
        *([('capacity', gib(r['capacity']))] if r['capacity'] else []),
      ],
    ),
  ]
  lines.append(
    cost.table(
      ('largest at the fullest point, beside the arguments', 'arrays', 'together', 'phase', 'from'),
      [(f'`{s}`', count, gib(b), p, f'`{n[-70:]}`') for s, count, b, p, n in r['arrays']],
    )
  )
  rows = []
  for phase, p in r['phases'].items():
    flops, wire = r['needed'].get(phase, (0, 0))
    rows.append(
      (
        phase,
        cost.si(p['flops']),
        cost.si(flops / r['devices']) if flops else '',
        cost.si(p['traffic'], 'B'),
        cost.si(p['wire'], 'B'),
        cost.si(wire, 'B') if wire else '',
        *((f'{p["seconds"]:.3g}', f'{p["wire"] / chip.wire:.3g}') if chip else ()),
      )
    )
  lines.append(
    cost.table(
      (
        'phase, a device',
        'FLOPs',
        'model FLOPs',
        'memory traffic',
        'received',
        'least for the sharding',
        *(('chip s', 'wire s') if chip else ()),
      ),
      rows,
    )
  )
  lines.append(
    cost.table(
      ('collective', 'over', 'phase', 'largest array', 'times', 'received', 'from'),
      [
        (
          s['kind'],
          s['axes'],
          s['phase'],
          f'`{s["shape"]}`',
          s['times'],
          cost.si(s['bytes'], 'B'),
          f'`{cost.short(s["op_name"])[-60:]}`',
        )
        for s in r['collectives'][:16]
      ],
    )
  )
  if r['decode_tokens']:
    lines.append(decode_words(r))
  if chip:
    lines.append(
      f'Estimated step: {r["seconds"][0]:.3g} s with communication behind computation, '
      f'{r["seconds"][1]:.3g} s with none of it hidden; MFU {r["mfu"][0]:.0%} to {r["mfu"][1]:.0%}.'
    )
  return '\n\n'.join(lines) + '\n'


def decode_words(r: dict) -> str:
  """What crosses the wire for each decoded token, and the largest gather among it."""
  from alignjax.compiler import cost

  inside = [s for s in r['collectives'] if s['phase'] == 'decode' and s['in_loop']]
  gathers = [s for s in inside if s['kind'] == 'all-gather']
  each = sum(s['bytes'] for s in inside) / r['decode_tokens']
  least = r['needed']['decode'][1] / r['decode_tokens']
  largest = max((s['bytes'] / s['times'] for s in gathers), default=0)
  return (
    f'Decode loop: {cost.si(each, "B")} a generated position and device, {cost.si(least, "B")} at '
    f'least for the sharding; largest gather inside it {cost.si(largest, "B")}.'
  )


def summary(results: dict[str, dict]) -> str:
  """One row a step: the table of what fits where."""
  from alignjax.compiler import cost

  rows = []
  for name, r in sorted(results.items()):
    if 'memory' not in r:
      rows.append((name, '', '', 'no', '', '', '', '', f'{r["minutes"]:.1f}'))
      continue

    def gib(x):
      return f'{x / 2**30:.1f}'

    wire, least = (
      sum(p['wire'] for p in r['phases'].values()),
      sum(w for _, w in r['needed'].values()),
    )
    decode = ''
    if r['decode_tokens']:
      inside = sum(s['bytes'] for s in r['collectives'] if s['phase'] == 'decode' and s['in_loop'])
      decode = (
        f'{cost.si(inside / r["decode_tokens"], "B")} / '
        f'{cost.si(r["needed"]["decode"][1] / r["decode_tokens"], "B")}'
      )
    rows.append(
      (
        name,
        ' x '.join(str(n) for n in r['mesh'].values()),
        f'{gib(r["memory"]["arguments"])} + {gib(r["memory"]["temporaries"])}',
        f'{gib(r["peak"])}' + (f' of {gib(r["capacity"])}' if r['capacity'] else ''),
        cost.si(sum(p['flops'] for p in r['phases'].values())),
        f'{cost.si(wire, "B")} / {cost.si(least, "B")}',
        decode,
        f'{r["seconds"][0]:.3g} to {r["seconds"][1]:.3g}; {r["mfu"][0]:.0%} to {r["mfu"][1]:.0%}'
        if r['chip']
        else '',
        f'{r["minutes"]:.1f}',
      )
    )
  return cost.table(
    (
      'config, stage, slice',
      'data x fsdp x tensor',
      'arguments + temporaries, GiB',
      'peak, GiB',
      'FLOPs a device',
      'received a step / least',
      'received a token / least',
      'step, s; MFU',
      'compile, min',
    ),
    rows,
  )


def main(argv: list[str]) -> None:
  from absl import app, flags

  config, name, argv = command.read_config(argv)
  flags.DEFINE_string('config', None, 'FILE.py[:arg] and --config.ENTRY=VALUE, as for run.py.')
  topology = flags.DEFINE_string(
    'topology', 'local', 'CHIP:SHAPE, such as v5e:4x4; `local`: the devices at hand.'
  )
  stage = flags.DEFINE_string('stage', None, "Which stage's step. Default: the config's last.")
  out = flags.DEFINE_string(
    'out', None, 'A folder for CONFIG-STAGE-TOPOLOGY.json and the table of all of them.'
  )

  def run(_):
    from alignjax.runtime import failures, files

    if out.value:
      folder = files.folder(out.value)
      failures.check_writable(folder, '--out')
    try:
      devices, chip = find_devices(topology.value)
      chosen = stage.value or config.stages_to_run[-1]
      result = compile_stage(config, chosen, devices, chip)
    except (ValueError, FileNotFoundError) as error:
      raise SystemExit(f'error: {error}') from None
    title = f'{name} {chosen} {topology.value}'
    print(describe(title, result))
    if out.value:
      (folder / f'{re.sub("[ :]", "-", title)}.json').write_text(
        json.dumps(result | {'title': title})
      )
      found = [json.loads(p.read_text()) for p in sorted(folder.glob('*.json'))]
      text = summary({r['title']: r for r in found})
      (folder / 'table.md').write_text(
        '\n'.join([text, '', *(describe(r['title'], r) for r in found)])
      )
      print(text)
    if not result['fits']:
      raise SystemExit(1)

  app.run(run, argv=[sys.argv[0], *argv])


if __name__ == '__main__':
  command.start(main, sys.argv[1:])
