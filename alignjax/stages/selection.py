"""Model selection: among the candidates that stages saved, it takes the one with the highest score
on validation prompts. The paper selects SFT checkpoints by the reward model, which predicts
preference better than the validation loss does (C.1), and PPO models by Likert score (E.9).

This is a stage without steps, so that the other stages of a run start from its result as from any
other: c.init.policy='stage:sft_selected'. The figures of every candidate, the choice and its reason
are in its info.json, and so in the report.
"""

from __future__ import annotations

import json

import jax
import numpy as np

from alignjax import plugins
from alignjax.data import batches, hygiene, sources
from alignjax.evals.reward import selection
from alignjax.inference import samples
from alignjax.inference.loading import Model
from alignjax.runtime import checkpoint, files, fingerprints
from alignjax.setup import inputs
from alignjax.setup.objects import Setup, seed_of, stage_dir
from alignjax.setup.weights import initial_params
from alignjax.stages.stage import Stage, without_steps
from alignjax.types import Params


def build(setup: Setup, name: str) -> Stage:
  """The stage `name` of the config. It has no steps; `finish` chooses."""
  cfg = setup.config.stages[name]

  # 1. Validation prompts and candidates.
  if cfg.prompts.source != 'sandbox:':
    setup.read.update(
      inputs.of_data(f'stages.{name}.prompts', cfg.prompts.source, cfg.prompts.mapping)
    )
  records = _prompts(setup, name)
  candidates = find_candidates(setup, name)
  score = plugins.bind(cfg.by, f'stages.{name}.by')

  def finish(_):
    # 2. Every candidate answers every prompt, and the judges measure the responses.
    measured = _measure(setup, name, records, candidates)

    # 3. The candidate with the highest mean score is chosen.
    result = selection.choose(
      {label: np.asarray(score(values), np.float64) for label, values in measured.items()},
      measured,
      [json.dumps(record['prompt']) for record in records],
    )
    if jax.process_index() == 0:
      print(f'{name}: {result["why"]}', flush=True)
    params = _load(setup, name, candidates[result['chosen']], 'lm')
    return params, {'head': 'lm', 'by': cfg.by.fn, 'selection': result}

  return without_steps(setup, finish)


def _load(setup: Setup, name: str, spec: str | files.Folder, head: str) -> Params:
  return initial_params(setup, str(spec), head, seed_of(name))


def _measure(
  setup: Setup, name: str, records: list[dict], candidates: dict[str, files.Folder]
) -> dict[str, dict[str, np.ndarray]]:
  """candidate -> {'reward': f[N], 'kl': f[N], 'gold': f[N]}, as far as the stage names a reward
  model and a reference, and the prompts are the sandbox's."""
  cfg = setup.config.stages[name]
  prompts = [record['prompt'] for record in records]
  reward = _load(setup, name, cfg.init.reward, 'scalar') if cfg.init.reward else None
  ref = _load(setup, name, cfg.init.ref, 'lm') if cfg.init.ref else None
  model = Model(
    cfg=setup.policy_model,
    nets=setup.nets,
    params=None,
    head='lm',
    template=setup.text.template,
    vocabulary=setup.text.vocabulary,
    tokenizer=None,
    source=None,
  )
  how = dict(rows=cfg.rows, sharder=setup.sharder)
  respond = samples.make_responder(
    model, prompts, count=1, max_tokens=setup.response_length, temperature=cfg.temperature, **how
  )
  rewarder = samples.make_rewarder(model._replace(cfg=setup.reward_model), prompts, **how)
  divergence = None
  if ref is not None:
    divergence = samples.make_divergence(
      model, prompts, max_tokens=setup.response_length, temperature=cfg.temperature, **how
    )
  measured = {}
  for label, path in candidates.items():
    params = _load(setup, name, path, 'lm')
    key = fingerprints.of_value(
      [
        checkpoint.weights(path),
        [setup.text.template.prompt(prompt) for prompt in prompts],
        cfg.temperature,
        cfg.rows,
        setup.response_length,
        setup.config.seed,
      ]
    )
    file = stage_dir(setup, name) / 'responses' / f'{label.replace("/", "-")}-{key}.jsonl'
    responses = respond(params, seed_of(f'{setup.config.seed}/{name}'), file)
    values = {}
    if reward is not None:
      values['reward'] = rewarder(reward, responses)[:, 0]
    if divergence is not None:
      values['kl'] = divergence(params, ref, responses)[:, 0]
    if cfg.prompts.source == 'sandbox:':
      gold = samples.gold(setup.text.world, setup.text.labelers, records, responses)
      values['gold'] = gold['gold, training labelers'][:, 0]
    measured[label] = values
    del params  # before the next candidate's are loaded
  return measured


def find_candidates(setup: Setup, name: str) -> dict[str, files.Folder]:
  """{'sft/100': folder, ..., 'sft/final': folder}: the candidates and the result of each stage that
  is named, and any folder that is named. A label that is taken is followed by whole paths."""
  out: dict[str, files.Folder] = {}
  for spec in setup.config.stages[name].candidates:
    folder = (
      stage_dir(setup, spec.removeprefix('stage:'))
      if spec.startswith('stage:')
      else files.folder(spec)
    )
    if checkpoint.is_finished(folder):
      out[str(folder)] = folder
      continue
    if not checkpoint.is_finished(folder / 'final'):
      raise FileNotFoundError(
        f'stages.{name}.candidates: {spec!r}: {folder} holds no finished stage.'
      )

    def origin(p):
      return checkpoint.load_info(p).get('made', {}).get('origin')

    kept = sorted(
      (
        p
        for p in (folder / 'candidates').glob('*')
        if p.name.isdigit()
        and checkpoint.is_finished(p)
        # Others were left by another training of the stage.
        and origin(p) == origin(folder / 'final')
      ),
      key=lambda p: int(p.name),
    )
    for path in (*kept, folder / 'final'):
      label = f'{folder.name}/{path.name}'
      # Stages of two runs may have one name.
      out[label if out.get(label, path) == path else str(path)] = path
  if len(out) < 2:
    raise ValueError(
      f'stages.{name}.candidates={tuple(setup.config.stages[name].candidates)}: nothing to choose '
      f'from but {", ".join(out) or "nothing"}. A stage that runs with '
      'stages.NAME.keep_candidates=N keeps N.'
    )
  return out


def _prompts(setup: Setup, name: str) -> list[dict]:
  """Validation prompts, a random choice by the seed. Of a source that stages are trained on they
  are the held-out ones."""
  cfg, data = setup.config.stages[name].prompts, setup.config.data
  if cfg.source == 'sandbox:':
    from alignjax import sandbox

    return sandbox.prompts(setup.text.world, cfg.count, 'valid')
  found = sources.read(cfg.source, 'prompts', cfg.mapping)
  if cfg.source in (data.demonstrations, data.comparisons, data.prompts):
    found = [
      r for r in found if hygiene.held_out(r['prompt'], data.heldout.share, data.heldout.seed)
    ]
    if not found:
      raise ValueError(
        f'stages.{name}.prompts.source={cfg.source!r} is trained on, and '
        f'data.heldout.share={data.heldout.share} '
        'holds none of its prompts out: raise it, or name another source.'
      )
  return batches.draw(found, cfg.count, (setup.config.seed, seed_of(name)))


def check(setup: Setup, name: str) -> None:
  """Raises ValueError for entries that cannot be, before any stage runs."""
  cfg, where = setup.config.stages[name], f'stages.{name}'
  plugins.bind(cfg.by, f'{where}.by')
  if cfg.temperature < 0:
    raise ValueError(f'{where}.temperature={cfg.temperature} must not be negative.')
  if cfg.temperature == 0 and cfg.init.ref:
    raise ValueError(
      f'{where}.temperature=0: greedy responses have no KL to {where}.init.ref={cfg.init.ref!r}. '
      f'Set a temperature above 0, or {where}.init.ref=None.'
    )
  if cfg.prompts.source == 'sandbox:' and setup.text.world is None:
    raise ValueError(
      f"{where}.prompts.source='sandbox:' has prompts of the sandbox alone; name a file of "
      f'validation prompts.'
    )
  if not cfg.candidates:
    raise ValueError(f'{where}.candidates is empty: name stages, such as stage:sft.')
  for spec in cfg.candidates:
    other = spec.removeprefix('stage:')
    if spec.startswith('stage:') and other in setup.config.stages and len(cfg.candidates) == 1:
      if (
        not setup.config.stages[other].get('keep_candidates')
        and not (stage_dir(setup, other) / 'candidates').exists()
      ):
        raise ValueError(
          f'{where} would choose among the candidates of {other}, but '
          f'stages.{other}.keep_candidates is not set.'
        )
