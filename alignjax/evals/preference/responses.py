"""Samples the responses of several policies to the same prompts in batches and stores them on disk.
Every preference judgment is about these responses."""

from __future__ import annotations

import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignjax.data import sources, templates
from alignjax.evals.preference.judgment_rows import Response, prompt_id
from alignjax.inference import bulk, loading
from alignjax.inference.loading import Model
from alignjax.runtime import fingerprints, journal, metrics

SANDBOX_PROMPTS = 256  # The default limit, because the sandbox can make any number of prompts.


def trained(policies: dict[str, str]) -> tuple[dict[str, Any] | None, int]:
  """Returns the entries `world` of the sandbox that the policies were trained in, or None, and the
  longest response length of their training."""
  found, lengths = [], []
  for spec in policies.values():
    if (config := loading.trained_with(spec)) is not None:
      lengths.append(config['data']['response_length'])
      if config['data']['tokenizer'] == 'sandbox:':
        found.append(config['world'])
  if differ := [world for world in found if world != found[0]]:
    raise ValueError(
      f'--policies come from different sandboxes, {found[0]} and {differ[0]}; their prompts differ.'
    )
  return found[0] if found else None, max(lengths, default=128)


def prompts(
  source: str, mapping: str | None, limit: int | None, seed: int, world: Mapping | None = None
) -> list[dict[str, Any]]:
  """Returns the records {'prompt', 'prompt_id', ...} on which the policies are compared.

  A record's own 'prompt_id' is kept. A prompt that occurs twice gets two names.

  Args:
    source: a source of data/sources.py of the kind 'prompts', or 'sandbox:' for the test split of a
      sandbox's world.
    mapping: the mapping of the source's fields (data/mappings.py), or None.
    limit: the number of prompts to draw by the seed, or None for all. They are the same for every
      policy.
    seed: the seed by which prompts are drawn.
    world: the entries `world` of the sandbox's config, for 'sandbox:'.
  """
  if source == 'sandbox:':
    if world is None:
      raise ValueError(
        '--prompts=sandbox: needs policies that were trained in the sandbox; these were not.'
      )
    from alignjax import sandbox

    found = sandbox.prompts(sandbox.of_entries(world)[0], limit or SANDBOX_PROMPTS, 'test')
  else:
    found = sources.read(source, 'prompts', mapping)
  named, seen, own = (
    [],
    {},
    [_name(record, f'--prompts={source}, record {i}') for i, record in enumerate(found, 1)],
  )
  taken = set(own)
  for record, name in zip(found, own, strict=True):
    seen[name] = seen.get(name, 0) + 1
    while seen[name] > 1 and f'{name}-{seen[name]}' in taken:  # Another record has that name.
      seen[name] += 1
    named.append({**record, 'prompt_id': name if seen[name] == 1 else f'{name}-{seen[name]}'})
  if limit is not None and limit < len(named):
    chosen = np.random.default_rng(seed).choice(len(named), limit, replace=False)
    named = [named[i] for i in sorted(chosen)]
  return named


def _name(record: Mapping[str, Any], otherwise: str) -> str:
  """Returns a record's own prompt_id, where a number is converted to text, or one made from its
  prompt. `otherwise` says where the record is, if it was not read from a source."""
  name = record.get('prompt_id')
  if name is None or name == '':
    return prompt_id(record['prompt'])
  if isinstance(name, bool) or not isinstance(name, (str, int)):
    raise ValueError(
      f"{sources.place(record, otherwise)}: field 'prompt_id' must be text or a whole number, not "
      f'{name!r}.'
    )
  return str(name)


def respond(
  model: Model,
  fingerprint: str,
  records: Sequence[Mapping[str, Any]],
  folder: pathlib.Path,
  *,
  temperature: float = 1.0,
  max_tokens: int = 128,
  seed: int = 0,
  rows: int = 32,
  name: str = '',
) -> list[Response]:
  """Samples a response to each prompt through the model's own template.

  The responses are stored in FOLDER/KEY.jsonl, where KEY is computed from the model, temperature,
  max_tokens, the seed and the code that samples; stored responses are not sampled again. A response
  depends on these and on its prompt alone (bulk.make_sampler), not on the other prompts. A prompt
  that occurs twice gets two responses. Policies are sampled independently of each other, because
  the random numbers depend on the model. A prompt that does not fit into the context gets no
  response (text None) and is then judged for no policy.

  Args:
    model: the policy.
    fingerprint: the value of loading.fingerprint for the model.
    records: the prompts (`prompts`).
    folder: the folder that stores the responses.
    temperature: the sampling temperature.
    max_tokens: the length limit of a response in tokens.
    seed: the seed of the samples.
    rows: the largest number of prompts in a batch.
    name: the name of the policy in messages.
  """
  room = model.cfg.max_length - max_tokens
  if room < 1:
    raise ValueError(
      f'--max_tokens={max_tokens} leaves no room for a prompt in the context of '
      f'{model.cfg.max_length} of {name}.'
    )
  encoded = templates.each(
    model.template.prompt, [r['prompt'] for r in records], f'{name or "a policy"}, prompts'
  )
  numbers = bulk.occurrences(map(tuple, encoded))
  keys = [
    fingerprints.of_value([tokens, number]) for tokens, number in zip(encoded, numbers, strict=True)
  ]
  stops = model.template.ends
  key = fingerprints.of_value(
    [fingerprint, float(temperature), max_tokens, seed, stops, fingerprints.of_function(respond)]
  )
  path = folder / f'{key}.jsonl'
  known = {
    row['prompt']: Response(row['text'], row['ended'], row['tokens']) for row in journal.read(path)
  }
  fit = [i for i, tokens in enumerate(encoded) if len(tokens) <= room]
  new = [i for i in fit if keys[i] not in known]
  if len(fit) < len(records):
    print(
      f'{name}: {len(records) - len(fit)} of {len(records)} prompts exceed {room} tokens '
      f'(context {model.cfg.max_length}, --max_tokens={max_tokens}) and are left out',
      flush=True,
    )
  count = len(fit) - len(new)
  if count:
    print(f'{name}: {count} responses were already in {path}', flush=True)
  made: dict[str, Response] = {}
  sample = bulk.make_sampler(
    model.nets,
    model.sharder,
    prompt_length=room,
    max_tokens=max_tokens,
    stop_ids=stops,
    pad=model.template.pad,
    rows=rows,
  )
  with metrics.Progress(len(fit), initial=count, name=f'{name}: responses') as progress:

    def done(place, result):
      response, _ = result
      made[keys[new[place]]] = Response(*model.template.decode_response(response), len(response))
      journal.append(path, [dict(prompt=keys[new[place]], **made[keys[new[place]]]._asdict())])
      progress.update(count + len(made), {'responses/done': count + len(made)})

    sample(
      model.params,
      [encoded[i] for i in new],
      zlib.crc32(f'{seed}/{fingerprint}'.encode()) & 0x7FFFFFFF,
      temperature,
      [numbers[i] for i in new],
      done,
    )
  known |= made
  return [known.get(key, Response(None)) for key in keys]
