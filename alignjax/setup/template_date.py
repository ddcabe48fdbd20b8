"""The date of a chat template that prints the date. It is the same for a whole run, whenever a
restart or an evaluation takes place."""

from __future__ import annotations

import datetime

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from alignjax.data import chat
from alignjax.runtime import files
from alignjax.setup.texts import load_tokenizer


def pin(config: ml_collections.ConfigDict, workdir: str | files.Folder) -> None:
  """Sets data.template_date where the chat template prints the date and the config names none. It
  is the date on which this workdir first asked, which its file template_date stores. A restart on
  another day thus has the same prompts, and a finished stage is used with those that it was trained
  with."""
  data = config.data
  if (
    data.tokenizer == 'sandbox:' or data.template != 'chat' or data.get('template_date') is not None
  ):
    return
  if not chat.dated(load_tokenizer(data.tokenizer)):
    return
  path = files.folder(workdir) / 'template_date'
  date = path.read_text().strip() if path.exists() else datetime.date.today().isoformat()
  try:
    datetime.date.fromisoformat(date)
  except ValueError:
    raise ValueError(
      f'{path}: {date!r} is no day of the form 2026-07-31: set the day that this run began on by '
      'data.template_date, or delete the file and the stages.'
    ) from None
  if jax.process_count() > 1:  # Around midnight two processes may see two dates.
    date = datetime.date.fromordinal(
      int(
        multihost_utils.broadcast_one_to_all(
          np.int32(datetime.date.fromisoformat(date).toordinal())
        )
      )
    ).isoformat()
  if jax.process_index() == 0:
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      files.write(path, f'{date}\n')
    print(
      f'the chat template prints the day: it is {date} for all of this run ({path}); '
      f'data.template_date sets another',
      flush=True,
    )
  with data.unlocked():
    data.template_date = date
