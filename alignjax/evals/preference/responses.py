"""What policies answer to the same prompts, sampled in batches and kept on disk: the material of
every preference judgment."""

from __future__ import annotations

import hashlib
import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax.data import sources, templates
from alignjax.inference import bulk, loading
from alignjax.inference.loading import Model
from alignjax.runtime import fingerprints, journal, metrics

SANDBOX_PROMPTS = 256  # where no limit is given: the sandbox has as many as one asks for


class Response(NamedTuple):
  """text: without the end token; None where the prompt did not fit. ended: whether the model ended
  it, or the limit of tokens did. tokens: sampled ones, the end token among them."""

  text: str | None
  ended: bool = True
  tokens: int = 0


def prompt_id(prompt: Any) -> str:
  """A name of a prompt (text or messages) by its contents, the same in every file and run."""
  return hashlib.sha256(json.dumps(prompt, ensure_ascii=False).encode()).hexdigest()[:12]


def trained(policies: dict[str, str]) -> tuple[int | None, int]:
  """The seed of the sandbox's world that the policies were trained in, or None; and the longest
  responses of their training."""
  found, lengths = set(), []
  for spec in policies.values():
    if (config := loading.trained_with(spec)) is not None:
      lengths.append(config['data']['response_length'])
      if config['data']['tokenizer'] == 'sandbox:':
        found.add(config['world']['seed'])
  if len(found) > 1:
    raise ValueError(
      f'--policies come from sandboxes with different seeds, {sorted(found)}; their prompts differ.'
    )
  return found.pop() if found else None, max(lengths, default=128)


def prompts(
  source: str, mapping: str | None, limit: int | None, seed: int, world_seed: int | None = None
) -> list[dict[str, Any]]:
  """Records {'prompt', 'prompt_id', ...} to compare policies on.

  source: one of data/sources.py of kind 'prompts', or 'sandbox:', the test split of the world of
  world_seed. limit: that many, drawn by the seed, the same for every policy. A record's own
  'prompt_id' is kept; a prompt that is there twice gets two names.
  """
  if source == 'sandbox:':
    if world_seed is None:
      raise ValueError(
        '--prompts=sandbox: needs policies that were trained in the sandbox; these were not.'
      )
    from alignjax import sandbox

    found = sandbox.prompts(sandbox.World(world_seed), limit or SANDBOX_PROMPTS, 'test')
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
    while seen[name] > 1 and f'{name}-{seen[name]}' in taken:  # another record has that name itself
      seen[name] += 1
    named.append({**record, 'prompt_id': name if seen[name] == 1 else f'{name}-{seen[name]}'})
  if limit is not None and limit < len(named):
    chosen = np.random.default_rng(seed).choice(len(named), limit, replace=False)
    named = [named[i] for i in sorted(chosen)]
  return named


def _name(record: Mapping[str, Any], otherwise: str) -> str:
  """A record's own prompt_id, a number as a name too, or one made of its prompt. otherwise: where a
  record of no source stands."""
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
  """A response to each prompt, through the model's own template.

  Kept in FOLDER/KEY.jsonl, where KEY says the model, temperature, max_tokens, seed and the code
  that samples; what is there is not sampled again. A response depends on these and on its prompt
  alone (bulk.make_sampler), whatever other prompts there are; a prompt that is there twice gets
  two. Policies draw independently of each other: the random numbers depend on the model. A prompt
  that the context has no room for gets no response (text None), and is then judged for no policy.

  Args:
    fingerprint: loading.fingerprint of the model. rows: prompts a batch at most.
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
      f'{name}: {len(records) - len(fit)} of {len(records)} prompts are over {room} tokens '
      f'(context {model.cfg.max_length}, --max_tokens={max_tokens}) and are left out',
      flush=True,
    )
  count = len(fit) - len(new)
  if count:
    print(f'{name}: {count} responses are kept from before, in {path}', flush=True)
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
      said, _ = result
      made[keys[new[place]]] = Response(*model.template.decode_response(said), len(said))
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
