"""The items of a round of collection (rounds.py): prompts with samples of the present policies, in
the order in which they are to be labelled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax import plugins
from alignjax.data import encode, hygiene, sources
from alignjax.inference import bulk, features
from alignjax.label import choose
from alignjax.runtime import files, journal, saved_config
from alignjax.setup import inputs
from alignjax.setup.objects import Setup, seed_of
from alignjax.setup.records import encoded, of_sandbox, records, say
from alignjax.setup.weights import initial_params
from alignjax.stages.sampled_comparisons import make_sampler

# What a function of rounds.choose is told where it has an argument of that name.
FACTS = ('seed', 'labels', 'features', 'earlier')
Row = dict[str, Any]


class Run(NamedTuple):
  """A run of rounds.

  Attributes:
    config: the whole config.
    workdir: its folder.
    base: the folder of the stages before the reward model.
    setup: of these stages.
    on_changed_input: as of train.main.
  """

  config: Any
  workdir: files.Folder
  base: files.Folder
  setup: Setup
  on_changed_input: str

  def folder(self, number: int) -> files.Folder:
    return self.workdir / f'round-{number}'

  def comparisons(self, number: int) -> files.Folder:
    return self.folder(number) / 'comparisons.jsonl'

  def in_base(self, spec: str) -> str:
    """The folder of the weights 'stage:NAME'; other names stay as they are."""
    name = spec.removeprefix('stage:')
    return spec if name == spec else str(self.base / name / 'final')

  def policy(self, number: int) -> str:
    """The policy of a round; of round 0 the one that PPO-ptx starts from in every round."""
    name = self.config.rounds.policy
    if number == 0:
      return self.in_base(self.config.stages[name].init.policy)
    return str(self.folder(number) / name / 'final')

  def reward_model(self, number: int, member: int = 1) -> str:
    """The reward model of a round; member: 1, or the number of a further one (members)."""
    name = self.config.rounds.reward_model
    return str(self.folder(number) / (name if member == 1 else f'{name}_{member}') / 'final')

  def fingerprints(self, specs: Sequence[str]) -> list[str]:
    """The fingerprints of weights."""
    read = {name: found for spec in specs for name, found in inputs.of_weights(spec).items()}
    return [inputs.fingerprint(*read[name], self.workdir, {}) for name in sorted(read)]


class Policy(NamedTuple):
  """A policy that is sampled from.

  Attributes:
    name: of the policy in the field 'policies' of a comparison.
    spec: its weights, as of setup/weights.py.
    temperature: of the samples.
    share: of the samples.
  """

  name: str
  spec: str
  temperature: float
  share: float


def candidates(run: Run, number: int) -> list[Row]:
  """Returns the items of a round in the order in which they are to be labelled. candidates.json
  keeps them, and label/collect.py has their fields.

  Raises:
    saved_config.Mismatch: they were made from other entries or weights.
  """
  path = run.folder(number) / 'candidates.json'
  policies, models = mixture(run, number), scored_by(run, number)
  made_from = _made_from(run, number, policies, models)
  found = journal.read_whole(path)
  if found is None:
    items = ordered(run, number, sample(run, number, policies), models)
    journal.write_whole(path, dict(made_from=made_from, items=items))
    say(f'round {number}: {len(items)} items in {path}')
    return items
  differ = [k for k, v in made_from.items() if found['made_from'].get(k) != v]
  if differ:
    raise saved_config.Mismatch(
      f'{path} was made from something else than what is there now: {", ".join(differ)}. Use '
      f'another --workdir, set the old values, or delete {path.parent} and the rounds after it.'
    )
  return found['items']


def _made_from(run: Run, number: int, policies: Sequence[Policy], models: Sequence[str]) -> Row:
  """What the items of a round are made from, as JSON values."""
  config = run.config.to_dict()
  named = ('prompts', 'responses', 'policies', 'choose', 'labelers', 'evaluation_prompts')
  made = {f'rounds.{k}': config['rounds'][k] for k in named}
  made |= {'rounds.labels': config['rounds']['labels'][number - 1]}
  made |= {k: config[k] for k in ('seed', 'world', 'model', 'reward_model')}
  made |= {'data.prompts': config['data']['prompts']}
  made |= {'the policies': run.fingerprints([p.spec for p in policies])}
  made |= {'the reward models': run.fingerprints(models)}
  return json.loads(json.dumps(made))


# ---- samples


def mixture(run: Run, number: int) -> list[Policy]:
  """Returns the policies that a round samples from. Those of rounds.policies that there are not yet
  are left out, and the policies of earlier rounds have equal shares."""
  past = {'newest': range(max(number - 1, 1), number), 'earlier': range(1, number - 1)}
  made = []
  for entry in run.config.rounds.policies:
    name, temperature = entry['init'], entry['temperature']
    found = {name.removeprefix('stage:'): run.in_base(name)}
    if name in past:
      found = {f'round {i}': run.policy(i) for i in past[name]}
    for policy, spec in found.items():
      if temperature != 1:
        policy = f'{policy}, temperature {temperature:g}'
      made.append(Policy(policy, spec, temperature, entry['share'] / len(found)))
  return made


def prompts(run: Run, number: int) -> list[Row]:
  """Returns new prompts for a round: a prompt of a file is in one round at most, and those of the
  sandbox are drawn anew."""
  count, setup = run.config.rounds.prompts, run.setup
  if of_sandbox(setup, 'prompts'):
    return records(setup, 'prompts', number * count)[-count:]
  every = records(setup, 'prompts', None)
  order = np.random.default_rng([run.config.seed, seed_of('rounds')]).permutation(len(every))
  return [every[i] for i in order[(number - 1) * count : number * count]]


def sample(run: Run, number: int, policies: Sequence[Policy]) -> list[Row]:
  """Returns the items of a round: responses to new prompts, each by a policy that is drawn by its
  share.

  Outside of the sandbox there are also items of held-out prompts, by the newest policy. They have
  'held_out': the round is measured on them, and no stage is trained on them.
  """
  setup, cfg = run.setup, run.config.rounds
  rng = np.random.default_rng([run.config.seed, seed_of(f'rounds/{number}')])
  rows, shares = prompts(run, number), np.array([p.share for p in policies])
  draws = []  # of each response, its prompt and its policy
  for i in range(len(rows)):
    count = rng.integers(cfg.responses[0], cfg.responses[1] + 1)
    draws += [(i, int(j)) for j in rng.choice(len(policies), count, p=shares / shares.sum())]
  if not of_sandbox(setup, 'prompts'):
    first = len(rows)
    rows = [
      *rows,
      *(
        row | {'held_out': True}
        for row in records(setup, 'prompts', cfg.evaluation_prompts, 'test')
      ),
    ]
    policies = [*policies, Policy(f'round {number - 1}', run.policy(number - 1), 1.0, 0.0)]
    draws += [
      (i, len(policies) - 1) for i in range(first, len(rows)) for _ in range(cfg.evaluation_samples)
    ]
  said = respond(run, rows, policies, draws, f'rounds/{number}')
  made = distinct(rows, [policy.name for policy in policies], draws, said)
  items = [item(setup, row, texts, number, i) for i, (row, texts) in enumerate(made)]
  labels = cfg.labels[number - 1]
  if (count := sum('held_out' not in one for one in items)) < labels:
    raise ValueError(
      f'round {number}: rounds.prompts={cfg.prompts} and data.prompts='
      f'{setup.config.data.prompts!r} give {count} items, fewer than the {labels} rankings of the '
      f'round (rounds.labels). Raise rounds.prompts, add prompts, or lower rounds.labels.'
    )
  return items


def respond(
  run: Run,
  rows: Sequence[Row],
  policies: Sequence[Policy],
  draws: Sequence[tuple[int, int]],
  name: str,
) -> dict[int, tuple[str, bool]]:
  """Samples a response for each draw, (number of its row, number of its policy).

  Returns:
    {number of the draw: (text, whether it ended)}. Draws of prompts that are too long
      (data.too_long) are left out.
  """
  setup = run.setup
  limited = encoded(setup, 'prompts', rows)
  queries = {i: prompt for i, (prompt, _) in zip(limited.index, limited.rows, strict=True)}
  sampler = make_sampler(setup)
  said = {}
  for number, policy in enumerate(policies):
    own = [j for j, (i, which) in enumerate(draws) if which == number and i in queries]
    if own:
      params = initial_params(setup, policy.spec, 'lm', 0)
      seed = seed_of(f'{run.config.seed}/{name}/{number}')
      out, _ = sampler(params, [queries[draws[j][0]] for j in own], seed, policy.temperature)
      said |= {j: setup.text.template.decode_response(t) for j, t in zip(own, out, strict=True)}
  return said


def distinct(
  rows: Sequence[Row],
  names: Sequence[str],
  draws: Sequence[tuple[int, int]],
  said: Mapping[int, tuple[str, bool]],
) -> list[tuple[Row, dict[str, tuple[bool, str]]]]:
  """Returns (row, {text: (whether it ended, its policy)}) for each prompt that has two different
  responses or more. Those that read the same are one, and so are two prompts that have the same
  responses.

  Args:
    rows: of the prompts.
    names: of the policies.
    draws: (number of the row, number of the policy) of each response.
    said: (text, whether it ended) by the number of the draw.
  """
  texts: list[dict[str, tuple[bool, str]]] = [{} for _ in rows]
  for j, (text, ended) in said.items():
    texts[draws[j][0]].setdefault(text, (ended, names[draws[j][1]]))
  found = {}
  for row, own in zip(rows, texts, strict=True):
    if len(own) > 1:
      found.setdefault(json.dumps([row['prompt'], sorted(own)], sort_keys=True), (row, own))
  return list(found.values())


def item(
  setup: Setup, row: Row, texts: Mapping[str, tuple[bool, str]], round: int, number: int
) -> Row:
  """Returns an item for labelers (label/collect.py)."""
  made = dict(
    prompt=row['prompt'],
    responses=list(texts),
    policies=[policy for _, policy in texts.values()],
    round=round,
    number=number,
    **{k: row[k] for k in ('use_case', 'user_id', 'held_out') if row.get(k) is not None},
  )
  if of_sandbox(setup, 'prompts'):
    from alignjax import sandbox

    judged = [
      sandbox.judge(setup.text.world, row['meta'], text, ended)
      for text, (ended, _) in texts.items()
    ]
    made['features'] = setup.text.labelers.features(judged).tolist()
  return made


# ---- the order


def find_choose(run: Run, **facts: Any) -> Callable:
  """Returns the function of rounds.choose with its coefficients and with what it is told."""
  told = dict.fromkeys(FACTS) | facts
  return plugins.bind(run.config.rounds.choose, 'rounds.choose', facts=told)


def scored_by(run: Run, number: int) -> list[str]:
  """Returns the weights of the reward models whose scores rounds.choose is given. There are none in
  the first round, and a function that reads no score needs none."""
  if number == 1 or find_choose(run).func in choose.WITHOUT_SCORES:
    return []
  return [run.reward_model(number - 1, i) for i in range(1, run.config.rounds.ensemble + 1)]


def ordered(run: Run, number: int, items: list[Row], models: Sequence[str]) -> list[Row]:
  """Returns the items in the order of rounds.choose. Those of held-out prompts come at random
  places among the first, so that all of them are labelled."""
  held_out = [one for one in items if 'held_out' in one]
  items = [one for one in items if 'held_out' not in one]
  labels, seed = run.config.rounds.labels[number - 1], seed_of(f'{run.config.seed}/rounds/{number}')
  spec = run.config.rounds.choose.fn
  facts: Row = dict(seed=seed, labels=labels)
  if 'features' in plugins.keywords(spec) or 'earlier' in plugins.keywords(spec):
    facts['features'], facts['earlier'] = last_layers(run, number, items, labelled(run, number))
  most = max(len(one['responses']) for one in items)
  scores = np.full((len(models), len(items), most), np.nan)
  for i, model in enumerate(models):
    made = make_scorer(run)(
      initial_params(run.setup, model, 'scalar', 0), rows_of(run.setup, items)
    )
    scores[i] = _by_item(made, items, most)
  order = choose.check(find_choose(run, **facts)(items, scores), len(items), labels, spec)
  made = [items[i] for i in order]
  places = np.random.default_rng([seed, 3]).permutation(labels + len(held_out))[: len(held_out)]
  for place, one in zip(sorted(places.tolist()), held_out, strict=True):
    made.insert(place, one)
  return made


def labelled(run: Run, number: int) -> list[Row]:
  """Returns the rankings of the rounds before that a reward model is trained on."""
  return [
    row
    for i in range(1, number)
    for row in sources.read(f'jsonl:{run.comparisons(i)}', 'comparisons')
    if not is_held_out(run, row)
  ]


def is_held_out(run: Run, row: Row) -> bool:
  """Returns whether no stage is trained on the prompt of a record. In the sandbox, the held-out
  prompts are of another world, so that none of a round is."""
  held = run.config.data.heldout
  own = of_sandbox(run.setup, 'prompts')
  return not own and hygiene.held_out(row['prompt'], held.share, held.seed)


def rows_of(setup: Setup, items: Sequence[Row]) -> list[list[int]]:
  """Returns prompt and response of every response of the items as tokens, as the reward model is
  trained on them."""
  template = setup.text.template
  pairs = [template.row(one['prompt'], text) for one in items for text in one['responses']]
  limited = encode.limit_lengths(
    [(prompt, [response]) for prompt, response in pairs],
    setup.prompt_length,
    setup.response_length,
    'truncate',
    'items',
  )
  return [prompt + responses[0] for prompt, responses in limited.rows]


def make_scorer(run: Run) -> Callable:
  """Returns a function score(params, rows of tokens) of reward models (bulk.make_scorer)."""
  return bulk.make_scorer(
    run.setup.nets,
    run.setup.sharder,
    length=run.setup.length,
    pad=run.setup.text.template.pad,
    rows=run.config.stages[run.config.rounds.reward_model].responses_per_batch,
  )


def last_layers(
  run: Run, number: int, items: Sequence[Row], earlier: Sequence[Row]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns f64[N,K,D] of the items and of those that were labelled before: the last layer of the
  newest reward model, or of the network that the first one starts from."""
  setup, name = run.setup, run.config.rounds.reward_model
  spec = run.in_base(run.config.stages[name].init.reward)
  if number > 1:
    spec = run.reward_model(number - 1)
  compute = features.make_features(
    setup.nets,
    setup.sharder,
    length=setup.length,
    pad=setup.text.template.pad,
    rows=run.config.stages[name].responses_per_batch,
  )
  every = [*items, *earlier]
  made = compute(initial_params(setup, spec, 'scalar', seed_of(name)), rows_of(setup, every))
  most = max(len(one['responses']) for one in every)
  cut = _by_item(made, every, most)
  return cut[: len(items)], cut[len(items) :]


def _by_item(values: np.ndarray, items: Sequence[Row], most: int) -> np.ndarray:
  """Returns f64[N,most,...] of values of all responses, NaN where an item has fewer."""
  made = np.full((len(items), most, *values.shape[1:]), np.nan)
  start = 0
  for i, one in enumerate(items):
    count = len(one['responses'])
    made[i, :count] = values[start : start + count]
    start += count
  return made
