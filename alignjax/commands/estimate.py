"""Says whether a step fits on devices that need not be there, and how fast it is.

    alignjax estimate --config=instructgpt_175b --topology=v5p:8x8x8 --stage=ppo_ptx
    alignjax estimate --config=ppo_ptx:tiny             for the devices at hand

The command compiles the step of a stage and reads the compiled program. It reads no weights and no
data, and of a checkpoint that a recipe starts from only config.json and the tokenizer. A TPU
topology needs the TPU compiler but no TPU: libtpu, in a folder of its own (an error explains how to
install it). The command prints memory, operations, communication and time by phase. --out=FOLDER
writes them as JSON, and FOLDER/table.md with all estimates in the folder. The exit code is 1 if the
step does not fit.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import time

from alignjax.commands import config_flags


def find_libtpu() -> str:
  """Returns the file of the TPU compiler: TPU_LIBRARY_PATH, or that of an installed libtpu. An
  error explains how to install it."""
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
    (f'TPU_LIBRARY_PATH={path} does not exist. ' if path else '')
    + 'To compile for a TPU topology, install the TPU compiler '
    '(no TPU is needed) into a folder of its own, because every jax process would try to use it '
    'otherwise:\n'
    f"  pip install --no-deps --target ~/.libtpu '{wants[0]}'\n  export "
    f'TPU_LIBRARY_PATH=~/.libtpu/libtpu/libtpu.so'
  )


def find_devices(topology: str):
  """Returns (devices, chip name or None) for CHIP:SHAPE, or for `local`."""
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
    # One device per chip, which is the default of the other chips.
    cores = dict(chip_config_name='megacore') if chip == 'v4' else {}
    return topologies.get_topology_desc(topology, platform='tpu', **cores).devices, chip
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f'--topology={topology}: the TPU compiler does not know this slice '
      f'({str(error).splitlines()[0]}).'
    ) from None


def compile_stage(config, stage: str, devices, chip_name: str | None) -> dict:
  """Returns everything that is printed, as JSON values."""
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
  # The code of a TPU is also parsed.
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


def main(argv: list[str]) -> None:
  from absl import flags

  config, name, argv = config_flags.read_config(argv)
  flags.DEFINE_string('config', None, 'NAME[:ARG] and --config.ENTRY=VALUE, as for `alignjax run`.')
  topology = flags.DEFINE_string(
    'topology', 'local', 'CHIP:SHAPE, such as v5e:4x4, or `local` for the devices at hand.'
  )
  stage = flags.DEFINE_string(
    'stage', None, 'The stage whose step is compiled. Default: the last stage of the config.'
  )
  out = flags.DEFINE_string(
    'out', None, 'A folder for CONFIG-STAGE-TOPOLOGY.json and the table of all of them.'
  )

  def run():
    from alignjax.commands import estimate_page
    from alignjax.runtime import failures, files

    if out.value:
      folder = files.folder(out.value)
      failures.check_writable(folder, '--out')
    devices, chip = find_devices(topology.value)
    chosen = stage.value or config.stages_to_run[-1]
    result = compile_stage(config, chosen, devices, chip)
    title = f'{name} {chosen} {topology.value}'
    print(estimate_page.describe(title, result))
    if out.value:
      files.write(
        folder / f'{re.sub("[ :]", "-", title)}.json', json.dumps(result | {'title': title})
      )
      found = [json.loads(p.read_text()) for p in sorted(folder.glob('*.json'))]
      text = estimate_page.summary({r['title']: r for r in found})
      files.write(
        folder / 'table.md',
        '\n'.join([text, '', *(estimate_page.describe(r['title'], r) for r in found)]),
      )
      print(text)
    if not result['fits']:
      raise SystemExit(1)

  config_flags.run_with_flags(run, __name__, argv)
