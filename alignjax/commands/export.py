"""Writes a trained policy or reward model as a folder that transformers loads.

    alignjax export --model=runs/smollm2_135m-s0/ppo_ptx --out=my-model
    alignjax export --model=runs/smollm2_135m-s0/rm --out=my-reward-model \\
      --dtype=bfloat16 --bias=drop
    alignjax export --model=... --out=my-model --push=USER/NAME --private
    alignjax export --model=... --out=my-adapters --adapters

A policy becomes AutoModelForCausalLM, and a reward model becomes AutoModelForSequenceClassification
with one label. config.json comes from the checkpoint that the run started from (model.source of its
config), and the tokenizer, including its chat template, comes from data.tokenizer. transformers'
generate then stops where training ended a response, and its classifier scores padded batches as
alignjax does. With the file SHA256SUMS, `sha256sum -c` and alignjax detect damage. README.md is the
model card.
"""

import functools

from alignjax.commands import command


def main(argv: list[str]) -> None:
  parser = command.make_parser(__name__)
  parser.add_argument(
    '--model', required=True, help='the folder of a finished stage, WORKDIR/STAGE'
  )
  parser.add_argument('--out', required=True, help='the folder to write, which must not exist')
  parser.add_argument(
    '--dtype',
    default='float32',
    choices=command.DTYPES,
    help='the dtype of the tensors in the file',
  )
  parser.add_argument(
    '--bias',
    choices=('drop', 'keep'),
    help='the bias of a reward model whose class in transformers has no place for it (RMSNorm '
    'families, and all with --adapters): drop it, which shifts every score, or keep it in '
    'config.json or adapter_config.json, from which you add it yourself',
  )
  parser.add_argument(
    '--adapters',
    action='store_true',
    help="write the adapters of a stage with `lora` alone, in peft's files, without merging them",
  )
  parser.add_argument(
    '--push',
    metavar='USER/NAME',
    help='upload the folder to this repository on the Hugging Face hub, with the login of `hf auth '
    'login`',
  )
  parser.add_argument(
    '--private', action='store_true', help='make the new repository of --push private'
  )
  options = parser.parse_args(argv)
  from alignjax.runtime import failures, files

  out = files.folder(options.out)
  if out.exists():
    raise ValueError(f'--out={options.out} already exists; name another folder or delete it.')
  failures.check_writable(out.parent, '--out')
  from alignjax.evals import card
  from alignjax.inference import loading
  from alignjax.models import export, hub

  if options.push:
    hub.check_push(options.push)
  elif options.private:
    raise ValueError('--private requires --push=USER/NAME.')
  if options.adapters and options.push:
    raise ValueError('--push uploads whole models; upload the folder of --adapters by yourself.')
  if options.adapters and options.model.startswith(hub.SCHEMES):
    raise ValueError(
      f'--adapters writes what a stage trained, and {options.model} is no stage; without '
      '--adapters, adapters of peft are written merged into their base.'
    )
  model = loading.load(options.model)
  if model.source is None:
    raise ValueError(
      f'{options.model} started from no Hugging Face checkpoint, so there is no config.json to '
      "take over; the sandbox's architecture is none of transformers'."
    )
  ends = (model.template.end, *model.template.ends)
  if options.adapters:
    declared, own, base = loading.adapters(options.model, model)
    report = export.save_adapters(out, model, declared, own, base, ends, options.bias)
    print(
      f'wrote {options.out}: adapters of {report["modules"]} modules a layer, '
      f'{report["bytes"] / 1e6:.1f} MB'
    )
    print_choices(report)
    if declared.quantization:
      print(
        f'note: they were trained on {base} in {declared.quantization}. peft adds them to whatever '
        f'it loads; without --adapters, the merged model is written as it was trained'
      )
    return
  report = export.save(
    out,
    model.source,
    model.cfg,
    model.params,
    dtype=options.dtype,
    tokenizer=model.tokenizer,
    ends=ends,
    bias=options.bias,
    card=functools.partial(card.write, options.model, model),
  )
  print(
    f'wrote {options.out}: {report["class"]}, {report["tensors"]} tensors, '
    f'{report["bytes"] / 1e6:.1f} MB'
  )
  print_choices(report)
  if not trained_as_chat(model):
    print(
      "note: the tokenizer's chat template is not how this model was trained; its prompts look "
      f'like {model.tokenizer.decode(model.template.prompt("PROMPT"))!r}'
    )
  if options.push:
    print(f'pushed to {hub.push(out, options.push, options.private)}')


def print_choices(report) -> None:
  """Prints what became of a reward model's bias and pad token."""
  for part in ('bias', 'pad'):
    if part in report:
      print(f'{part}: {report[part]}')


def trained_as_chat(model) -> bool:
  """Returns whether the tokenizer's chat template, if there is one, renders a prompt as the run
  did."""
  if not model.tokenizer.chat_template:
    return False
  messages = [{'role': 'user', 'content': 'PROMPT'}]
  try:
    rendered = model.tokenizer.apply_chat_template(
      messages, add_generation_prompt=True, tokenize=False
    )
  except Exception:  # noqa: BLE001 a template may raise anything, and several may have no default
    return False
  return model.tokenizer.encode(rendered, add_special_tokens=False) == list(
    model.template.prompt('PROMPT')
  )
