"""Registers models of alignjax in lm-evaluation-harness, for its own command and for Python.

    python -m alignjax.evals.public.lm_eval_plugin --model alignjax \\
        --model_args pretrained=runs/x/sft --tasks arc_easy,my_task --include_path my_tasks/

This command is `lm_eval` with the model 'alignjax' added, and takes all of its subcommands and
flags. The harness looks for models in a table of its own and in imported modules, not in the entry
points of packages, so that its command `lm_eval` itself cannot find ours. In Python, the import is
enough:

    import lm_eval
    import alignjax.evals.public.lm_eval_plugin

    lm_eval.simple_evaluate(model='alignjax', model_args='pretrained=runs/x/sft', tasks=[...])

--model_args takes these entries:

    pretrained          WORKDIR/STAGE, WORKDIR/STAGE/candidates/STEP, hf:FOLDER_OR_HUB_NAME, or
                        peft:FOLDER_OR_HUB_NAME for adapters of one
    form                the prompt template; by default the one that the model was trained with
    dtype               such as float32; by default that of the training
    data, fsdp, tensor, sequence
                        devices along each axis of the mesh; by default one device
    keep                a JSON-lines file of answers, from which an interrupted evaluation resumes

--batch_size and --device have no effect: the rows of a batch are chosen by their length and the
available memory, and JAX chooses the device (JAX_PLATFORMS=cpu, cuda or tpu).
"""

from __future__ import annotations

import difflib
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from alignjax.evals.public import harness
from alignjax.inference import loading

MESH = ('data', 'fsdp', 'tensor', 'sequence')
ARGUMENTS = ('pretrained', 'form', 'dtype', *MESH, 'keep')


@register_model('alignjax')
class Alignjax(LM):
  """The entry of the name in the harness's table. The class has no instances; it creates the
  objects of harness.language_model."""

  @classmethod
  def create_from_arg_string(
    cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
  ) -> LM:
    return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

  @classmethod
  def create_from_arg_obj(
    cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
  ) -> LM:
    """Creates the LM object. The harness's additional_config (device and batch size) has no effect.
    An unknown argument is a ValueError."""
    for key in arg_dict:
      if key not in ARGUMENTS:
        near = difflib.get_close_matches(key, ARGUMENTS, 1)
        hint = f' Did you mean {near[0]!r}?' if near else ''
        raise ValueError(f'--model_args: {key!r} is none of {", ".join(ARGUMENTS)}.{hint}')
    if 'pretrained' not in arg_dict:
      raise ValueError(
        '--model_args: pretrained=WORKDIR/STAGE or pretrained=hf:FOLDER_OR_HUB_NAME is missing.'
      )
    keep = arg_dict.get('keep')
    model = loading.load(
      str(arg_dict['pretrained']),
      'lm',
      form=arg_dict.get('form'),
      mesh={axis: arg_dict[axis] for axis in MESH if axis in arg_dict} or None,
      dtype=arg_dict.get('dtype'),
    )
    return harness.language_model(model, keep=pathlib.Path(keep) if keep else None)


def main(argv: list[str] | None = None) -> None:
  """Runs the harness's command. `argv` is without the program's name; None means the arguments of
  the process."""
  from lm_eval.__main__ import cli_evaluate

  if argv is not None:
    sys.argv = [sys.argv[0], *argv]
  try:
    cli_evaluate()
  except (ValueError, OSError) as error:
    if os.environ.get('ALIGNJAX_TRACEBACK'):
      raise
    raise SystemExit(f'error: {error}') from None


if __name__ == '__main__':
  main()
