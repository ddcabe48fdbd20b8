"""Rounds of collection, as the paper's data grew: comparisons of samples of the present policies, a
reward model on all comparisons so far, PPO-ptx, and again with the new policy.

    rounds.main(config, workdir)

The stages before the reward model run once, in WORKDIR/base. Then each round has its folder,
WORKDIR/round-1, ..., and in it

  candidates.json     new prompts with samples of the present policies, in the order in which
                      rounds.choose wants them to be labelled (rounds_items.py)
  comparisons.jsonl   the rankings of the first ones, as many as rounds.labels says, by the
                      sandbox's labelers or by people (label/collect.py)
  rm, ppo_ptx         the stages, trained by train.py on the comparisons of all rounds so far, from
                      the same weights in every round
  measured.json       the figures of the round (rounds_report.py)

The report is WORKDIR/rounds.md, rounds.json and rounds.png. A run that was stopped at any point
goes on where it was and ends with the same results, and one that has ended goes on when
rounds.labels names more rounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from alignjax import rounds_items, rounds_report, train
from alignjax.label import collect
from alignjax.rounds_items import Run
from alignjax.runtime import failures, files
from alignjax.runtime.interrupt import Interrupt
from alignjax.setup import entries, template_date
from alignjax.setup.objects import Setup, make_setup
from alignjax.setup.records import of_sandbox, say

LABELERS = ('sandbox', 'clients', 'people')


def main(
  config: Any, workdir: str | files.Folder, on_changed_input: str = 'fail'
) -> dict[str, Any]:
  """Runs all rounds of the config and returns the contents of rounds.json.

  Args:
    config: the whole config, with the entry `rounds` (configs/rounds.py).
    workdir: the folder of the run.
    on_changed_input: as of train.main.

  Raises:
    collect.Missing: people have not made all rankings of a round yet. The same call goes on.
    lock.Busy: another run holds the workdir.
  """
  if 'rounds' not in config:
    raise ValueError(
      'the config has no entry `rounds`. Use --config=rounds, or give your config the entry, as '
      'alignjax/configs/rounds.py says.'
    )
  workdir = files.absolute(workdir)
  config = config.copy_and_resolve_references()
  with entries.none_lacking():
    template_date.pin(config, workdir)
    base = files.absolute(config.rounds.base or workdir / 'base')
    run = Run(config, workdir, base, make_setup(of_base(config), base), on_changed_input)
    check(run)
  failures.check_writable(workdir)
  # Between stages a signal ends the run at once: what is written appears whole or not at all.
  with Interrupt(config.grace_seconds), train.alone(workdir):
    train.main(of_base(config), base, on_changed_input=on_changed_input)
    figures = []
    for number in range(1, len(config.rounds.labels) + 1):
      label(run, number)
      train.main(of_round(run, number), run.folder(number), on_changed_input=on_changed_input)
      figures.append(rounds_report.measure(run, number))
    result = rounds_report.result(run, figures)
    rounds_report.write(workdir, result)
  return result


# ---- the configs of the stages


def stages_before(config: Any) -> list[str]:
  """Returns the stages that run once: those that the reward model and the policy of a round start
  from, and others that items are sampled from."""
  own = config.rounds.reward_model, config.rounds.policy
  named = [p['init'] for p in config.rounds.policies]
  wanted = [*own, *(n.removeprefix('stage:') for n in named if n.startswith('stage:'))]
  return [name for name in train.resolve(config, wanted) if name not in own]


def of_base(config: Any) -> Any:
  """Returns the config of the stages that run once."""
  made = config.copy_and_resolve_references()
  with made.unlocked(), made.ignore_type():
    made.stages_to_run, made.report.policies = tuple(stages_before(config)), {}
  return made


def on_rankings(config: Any) -> Any:
  """Returns the config with a reward model that learns from all comparisons of a file."""
  made = config.copy_and_resolve_references()
  with made.unlocked(), made.ignore_type():
    reward_model = made.stages[made.rounds.reward_model]
    made.report.policies = {}
    made.data.comparisons, made.data.mapping.comparisons = 'jsonl:comparisons.jsonl', None
    reward_model.prompts, reward_model.policies = None, ()
    if made.data.tokenizer == 'sandbox:':
      # A response that was cut at the length limit gets an end token when its text is read, and
      # that is cut off again.
      made.data.too_long, reward_model.evaluation_prompts = 'truncate', 0
    if made.data.prompts == 'sandbox:':
      made.data.heldout.share = 0.0  # Its test prompts are others anyway.
  return made


def of_round(run: Run, number: int, members: Sequence[int] = ()) -> Any:
  """Returns the config of the stages of a round.

  Args:
    run: the run.
    number: of the round.
    members: the numbers of further reward models (Run.reward_model), which are trained in place of
      the round's stages. They differ from its own in the seeds, which are those of their names.
  """
  made = on_rankings(run.config)
  name, policy = made.rounds.reward_model, made.rounds.policy
  with made.unlocked(), made.ignore_type():
    made.data.comparisons = ';'.join(f'jsonl:{run.comparisons(i)}' for i in range(1, number + 1))
    for stage in (name, policy):
      for role, spec in made.stages[stage].init.items():
        if spec is not None and spec.removeprefix('stage:') not in (name, policy):
          made.stages[stage].init[role] = run.in_base(spec)
    for i in members:
      made.stages[f'{name}_{i}'] = made.stages[name].copy_and_resolve_references()
    made.stages_to_run = tuple(f'{name}_{i}' for i in members) or (name, policy)
  return made


# ---- checks


def check(run: Run) -> None:
  """Raises ValueError for entries that cannot be, before any stage runs."""
  config, cfg = run.config, run.config.rounds
  check_entries(cfg, run.setup)
  check_rewards(config)
  rounds_items.find_choose(run)
  checked = on_rankings(config)
  train.find_builders(make_setup(checked, run.base), [cfg.reward_model, cfg.policy])
  most = max(config.stages[cfg.reward_model].k_buckets)
  if cfg.responses[1] > most:
    raise ValueError(
      f'rounds.responses={tuple(cfg.responses)} are up to {cfg.responses[1]} responses, more than '
      f'the {most} that stages.{cfg.reward_model}.k_buckets leave room for. Sample fewer, or add '
      f'that number to k_buckets.'
    )


def check_rewards(config: Any) -> None:
  """Raises ValueError where a policy would be trained against a reward model that the rounds do not
  train."""
  cfg = config.rounds
  for role, spec in config.stages[cfg.policy].init.items():
    if role.startswith('reward') and spec != f'stage:{cfg.reward_model}' and 'stage:' in str(spec):
      raise ValueError(
        f'stages.{cfg.policy}.init.{role}={spec!r}, but rounds train one reward model on the new '
        f'rankings, stages.{cfg.reward_model} (rounds.reward_model). Name it there, and leave out '
        f'other reward models.'
      )


def check_entries(cfg: Any, setup: Setup) -> None:
  """Raises ValueError for the first entry of `rounds` that has a wrong value."""
  whole = entries.whole
  kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
    'labels': (
      'a tuple of whole numbers, 1 or more, one for each round',
      lambda x: isinstance(x, (tuple, list)) and len(x) > 0 and all(map(whole(1), x)),
    ),
    'responses': (
      'a range of whole numbers from 2 to 9, such as (4, 9)',
      lambda x: len(x) == 2 and all(map(whole(2), x)) and x[0] <= x[1] <= 9,
    ),
    'labelers': (f'one of {", ".join(LABELERS)}', lambda x: x in LABELERS),
    'evaluation_samples': ('a whole number, 2 or more', whole(2)),
    **dict.fromkeys(('prompts', 'ensemble', 'evaluation_prompts'), entries.ONE),
  }
  for entry, (words, good) in kinds.items():
    if not good(cfg[entry]):
      raise ValueError(f'rounds.{entry}={cfg[entry]!r} must be {words}.')
  if cfg.prompts < max(cfg.labels):
    raise ValueError(
      f'rounds.prompts={cfg.prompts} are fewer than the {max(cfg.labels)} rankings of a round '
      f'(rounds.labels). Raise it, or lower rounds.labels.'
    )
  at_first = [p['share'] for p in cfg.policies if p['init'] not in ('newest', 'earlier')]
  if sum(at_first) <= 0 or any(p['share'] < 0 for p in cfg.policies):
    raise ValueError(
      'rounds.policies must have shares of 0 or more, and one above 0 of a policy that the first '
      "round has: not 'newest' or 'earlier'."
    )
  if cfg.labelers != 'people' and not of_sandbox(setup, 'prompts'):
    raise ValueError(
      f'rounds.labelers={cfg.labelers!r} are those of the sandbox, which this config is not about. '
      f"Set rounds.labelers='people'."
    )


# ---- a round


def label(run: Run, number: int) -> None:
  """Makes the comparisons of a round, unless they are there."""
  path, cfg = run.comparisons(number), run.config.rounds
  ensemble = rounds_items.scored_by(run, number)
  if len(ensemble) > 1:
    own = of_round(run, number - 1, range(2, len(ensemble) + 1))
    train.main(own, run.folder(number - 1), on_changed_input=run.on_changed_input)
  items = rounds_items.candidates(run, number)
  if path.exists():
    return
  labels = cfg.labels[number - 1] + sum('held_out' in item for item in items)
  task, labelers, seed = f'{cfg.task} {number}', run.setup.text.labelers, run.config.seed
  if cfg.labelers == 'sandbox':
    rows = collect.by_sandbox(items, labels, labelers, seed)
  else:
    engine, database = open_database(run)
    from alignjax.label import schema

    try:
      with schema.explained(f'rounds.database={database}'):
        if cfg.labelers == 'people':
          rows = collect.by_people(engine, task, items, labels)
        else:
          rows = collect.by_clients(engine, task, items, labels, labelers, seed)
    except collect.Missing as missing:
      raise collect.Missing(
        f'{missing} `alignjax label serve --database={database}` shows the items to labelers; when '
        f'they have ranked them, the same command goes on.'
      ) from None
    finally:
      engine.dispose()
  files.write(path, ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))
  say(f'round {number}: {len(rows)} rankings in {path}')


def open_database(run: Run) -> tuple[Any, str]:
  """Opens the labeling database and returns it with its name."""
  try:
    from alignjax.label import accounts, app, client, schema  # noqa: F401
  except ModuleNotFoundError as error:
    raise ValueError(
      f'rounds.labelers={run.config.rounds.labelers!r} needs {error.name}. Install it: pip install '
      f"'alignjax[label]'."
    ) from None
  database = run.config.rounds.database or str(run.workdir / 'labels.db')
  return schema.connect(database), database
