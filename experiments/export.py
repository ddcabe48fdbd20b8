"""Writes a trained policy or reward model as a folder that transformers loads.

    python experiments/export.py --model=runs/smollm2_135m-s0/ppo_ptx --out=my-model
    python experiments/export.py --model=runs/smollm2_135m-s0/rm --out=my-reward-model --dtype=bfloat16

A policy becomes AutoModelForCausalLM, a reward model AutoModelForSequenceClassification with one label. config.json and
tokenizer, chat template included, are those of the checkpoint that the run started from (model.source of its config).
"""

import argparse
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
  sys.path.insert(0, str(HERE.parent))

from experiments import command  # noqa: E402  after the path


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', required=True, help="a finished stage's folder, WORKDIR/STAGE")
  parser.add_argument('--out', required=True, help='the folder to write; not one that is there')
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16', 'float16'), help='of the tensors in the file')
  options = parser.parse_args(argv)
  try:
    from alignjax import files, trouble
    out = files.folder(options.out)
    if out.exists():
      raise ValueError(f'--out={options.out} is there already; name another folder or delete it.')
    trouble.check_writable(out.parent, '--out')
    from alignjax.models import hf
    from alignjax.stages import finished
    model = finished.load(options.model)
    if model.source is None:
      raise ValueError(f'{options.model} started from no Hugging Face checkpoint, so there is no config.json to take over; the '
                       "sandbox's architecture is none of transformers'.")
    report = hf.save(out, model.source, model.cfg, model.params, dtype=options.dtype, tokenizer=model.tokenizer)
  except (ValueError, FileNotFoundError) as error:
    raise SystemExit(f'error: {error}') from None
  print(f'wrote {options.out}: {report["class"]}, {report["tensors"]} tensors, {report["bytes"] / 1e6:.1f} MB')
  if 'bias' in report:
    print(f'bias: {report["bias"]}')


if __name__ == '__main__':
  command.start(main, sys.argv[1:])
