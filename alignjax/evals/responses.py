"""What policies answer to the same prompts, sampled in batches and kept on disk: the material of every preference judgment."""

from __future__ import annotations

import hashlib
import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax import metrics
from alignjax.data import sources, templates
from alignjax.evals import bulk, harness, kept

SANDBOX_PROMPTS = 256  # where no limit is given: the sandbox has as many as one asks for


class Response(NamedTuple):
  """text: without the end token; None where the prompt did not fit. ended: whether the model ended it, or the limit of tokens
  did. tokens: sampled ones, the end token among them."""
  text: str | None
  ended: bool = True
  tokens: int = 0


def prompt_id(prompt: Any) -> str:
  """A name of a prompt (text or messages) by its contents, the same in every file and run."""
  return hashlib.sha256(json.dumps(prompt, ensure_ascii=False).encode()).hexdigest()[:12]


def prompts(source: str, mapping: str | None, limit: int | None, seed: int, world_seed: int | None = None) -> list[dict[str, Any]]:
  """Records {'prompt', 'prompt_id', ...} to compare policies on.

  source: one of data/sources.py of kind 'prompts', or 'sandbox:', the test split of the world of world_seed. limit: that many,
  drawn by the seed, the same for every policy. A record's own 'prompt_id' is kept; a prompt that is there twice gets two names.
  """
  if source == 'sandbox:':
    if world_seed is None:
      raise ValueError("--prompts=sandbox: needs policies that were trained in the sandbox; these were not.")
    from alignjax import sandbox
    found = sandbox.prompts(sandbox.World(world_seed), limit or SANDBOX_PROMPTS, 'test')
  else:
    found = sources.read(source, 'prompts', mapping)
  named, seen = [], {}
  for record in found:
    name = str(prompt_id(record['prompt']) if record.get('prompt_id') in (None, '') else record['prompt_id'])
    seen[name] = seen.get(name, 0) + 1
    named.append({**record, 'prompt_id': name if seen[name] == 1 else f'{name}-{seen[name]}'})
  if limit is not None and limit < len(named):
    chosen = np.random.default_rng(seed).choice(len(named), limit, replace=False)
    named = [named[i] for i in sorted(chosen)]
  return named


def respond(model: Any, weights: str, records: Sequence[Mapping[str, Any]], folder: pathlib.Path, *, temperature: float = 1.0,
            max_tokens: int = 128, seed: int = 0, rows: int = 32, name: str = '') -> list[Response]:
  """A response to each prompt, through the model's own template.

  Kept in FOLDER/KEY.jsonl, where KEY says the weights, the tokens of the prompts (so their template too), temperature,
  max_tokens and seed; what is there is not sampled again. Policies draw independently of each other: the random numbers depend
  on the weights. A prompt that the context has no room for gets no response (text None), and is then judged for no policy.

  Args:
    weights: fingerprints.of_params of the model's parameters. rows: prompts a batch.
  """
  room = model.cfg.max_length - max_tokens
  if room < 1:
    raise ValueError(f'--max_tokens={max_tokens} leaves no room for a prompt in the context of {model.cfg.max_length} of {name}.')
  encoded = templates.each(model.template.prompt, [r['prompt'] for r in records], f'{name or "a policy"}, prompts')
  stops = model.template.ends
  described = json.dumps([weights, [r['prompt_id'] for r in records], encoded, temperature, max_tokens, seed, stops])
  path = folder / f'{hashlib.sha256(described.encode()).hexdigest()[:16]}.jsonl'
  done = {row['prompt_id']: Response(row['text'], row['ended'], row['tokens']) for row in kept.read(path)}
  groups: dict[int, list[int]] = {}
  for i, tokens in enumerate(encoded):
    if len(tokens) <= room:
      groups.setdefault(harness.buckets(len(tokens), room), []).append(i)
  total = sum(map(len, groups.values()))
  if total < len(records):
    print(f'{name}: {len(records) - total} of {len(records)} prompts are over {room} tokens '
          f'(context {model.cfg.max_length}, --max_tokens={max_tokens}) and are left out', flush=True)
  count = sum(records[i]['prompt_id'] in done for group in groups.values() for i in group)
  with metrics.Progress(total, initial=count, name=f'{name}: responses') as progress:
    for length, group in sorted(groups.items()):
      sample = bulk.make_sampler(model.nets, lambda x: x, prompt_length=length, max_tokens=max_tokens, stop_ids=stops,
                                 pad=model.template.pad, rows=rows)
      for start in range(0, len(group), rows):
        some = group[start:start + rows]
        new = [(place, i) for place, i in enumerate(some) if records[i]['prompt_id'] not in done]
        if not new:
          continue
        batch_seed = zlib.crc32(f'{seed}/{weights}/{length}/{start}'.encode()) & 0x7FFFFFFF
        sampled, _ = sample(model.params, [encoded[i] for i in some], batch_seed, temperature)
        made = {}
        for place, i in new:
          made[records[i]['prompt_id']] = Response(*model.template.said(sampled[place]), len(sampled[place]))
        kept.append(path, [dict(prompt_id=k, **r._asdict()) for k, r in made.items()])
        done |= made
        count += len(made)
        progress.update(count, {'responses/done': count})
  return [done.get(r['prompt_id'], Response(None)) for r in records]
