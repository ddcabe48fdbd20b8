"""The methods of the leaderboard: how each is trained, how its policy is measured, and what it
spends."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax import report, train
from alignjax.configs import leaderboard as config_of_leaderboard
from alignjax.evals import sandbox as evaluation
from alignjax.evals.reward import best_of_n
from alignjax.inference import bulk
from alignjax.runtime import checkpoint, files, metrics
from alignjax.setup.objects import Setup, make_setup
from alignjax.setup.records import records, say
from alignjax.setup.weights import initial_params
from alignjax.stages import comparisons, sampled_comparisons, sft
from alignjax.studies.study import Trial
from alignjax.types import Params

BEST_OF = 16
SHARED = ('pretrain', 'sft')  # Their cost is that of every method, and is not counted.
# Expert iteration: rounds, passes over what is kept, and samples of a prompt of which one is kept.
ROUNDS, PASSES = 4, 3


class Spent(NamedTuple):
  """What a method has spent after SFT.

  Attributes:
    rankings: comparisons that labelers made.
    sampled_tokens: tokens of responses that policies sampled in training, or for the test prompts
      where a method only selects.
    update_tokens: response tokens that the losses read, those of the reward models among them.
    text_tokens: tokens of pretraining text that the losses read, at full length of the rows.
    seconds: of its stages.
  """

  rankings: int
  sampled_tokens: int
  update_tokens: int
  text_tokens: int
  seconds: float


def config_of(trial: Trial) -> Any:
  """The config of a trial, with the stages of all methods."""
  config = config_of_leaderboard.get_config('tiny' if trial.tiny else 'default')
  config.seed = trial.seed
  return config


def train_stages(config: Any, workdir: files.Folder, stages: Sequence[str]) -> Setup:
  """Trains stages with those that they start from, and returns their setup."""
  made = config.copy_and_resolve_references()
  with made.unlocked(), made.ignore_type():
    made.stages_to_run, made.report.policies = tuple(stages), {}
  train.main(made.lock(), workdir)
  return make_setup(config, workdir)


# ---- what a stage has spent


def spent(setup: Setup, stage: str) -> Spent:
  """The cost of a stage and of those that it starts from, but for SHARED.

  It counts the stages of stages/rm.py, preference.py and ppo_ptx.py by their entries and logs. Of
  another kind of stage, which a fork may have, it counts the seconds.
  """
  rankings = sampled = updated = text = 0
  seconds = 0.0
  for name in train.resolve(setup.config, [stage]):
    if name in SHARED:
      continue
    cfg, folder = setup.config.stages[name], setup.workdir / name
    seconds += checkpoint.load_info(folder / 'final')['seconds']
    if 'k_buckets' in cfg:
      data = comparisons.training(setup, name)
      rankings += cfg.prompts
      updated += int(cfg.epochs) * sum(len(r) for responses in data.responses for r in responses)
    if 'rollout' in cfg:
      log = metrics.read(folder / 'metrics.jsonl')
      tokens = round(float(np.sum(log['rollout/length'])) * cfg.rollout.episodes)
      sampled += tokens
      updated += tokens * cfg.inner_epochs
      rows = cfg.iterations * cfg.rollout.episodes * cfg.ptx.rows_per_episode
      text += rows * setup.config.data.row_length
  return Spent(rankings, sampled, updated, text, round(seconds, 1))


# ---- how policies are measured


def measure(setup: Setup, params: Params, best_by: Params | None = None) -> tuple[dict, int]:
  """Returns (the figures of a policy against SFT, the tokens that were sampled for them).

  Args:
    setup: of the trial.
    params: of the policy.
    best_by: a reward model, by which every response is the best of BEST_OF samples; None takes one
      sample. The divergence of the best is then the bound of evals/reward/best_of_n.py.
  """
  ev, ref = report.prepare(setup), initial_params(setup, 'stage:sft', 'lm', 0)
  judged = evaluation.respond(ev, ref, ev.prompts, 1)[2]
  baseline = {'features': ev.labelers.features(judged)}
  count = 0
  if best_by is None:
    arrays = evaluation.measure(ev, params, ref)
  else:
    sample, tokens = best_sampler(setup, ev.sample, best_by)
    arrays = evaluation.measure(ev._replace(sample=sample), params, None)
    arrays['kl'] = np.full(len(ev.prompts), best_of_n.kl(BEST_OF))
    count = sum(tokens)
  return evaluation.summarize(ev, arrays, baseline), count


def best_sampler(setup: Setup, sample: Callable, reward: Params) -> tuple[Callable, list[int]]:
  """Returns a function like `sample` of bulk.make_sampler, whose responses are the best of BEST_OF
  by the reward model, and a list that grows by the tokens that each call has sampled."""
  score = bulk.make_scorer(
    setup.nets,
    setup.sharder,
    length=setup.length + evaluation.PREFIX_TOKENS,
    pad=setup.text.template.pad,
  )
  tokens: list[int] = []

  def best(params, prompts, seed):
    drawn = [sample(params, prompts, seed + 1000 * (1 + i)) for i in range(BEST_OF)]
    tokens.append(sum(len(r) for responses, _ in drawn for r in responses))
    scores = np.stack(
      [
        score(reward, [[*p, *r] for p, r in zip(prompts, responses, strict=True)])
        for responses, _ in drawn
      ]
    )
    chosen = np.argmax(scores, axis=0)
    responses = [drawn[i][0][j] for j, i in enumerate(chosen)]
    return responses, np.array([drawn[i][1][j] for j, i in enumerate(chosen)])

  return best, tokens


# ---- expert iteration


def expert_iteration(trial: Trial) -> tuple[Setup, Params, Spent]:
  """Expert iteration (Anthony et al. 2017; for language models RAFT, Dong et al. 2023): in each
  round the present policy answers new prompts BEST_OF times, the reward model chooses the best
  answer to each, and SFT goes on with these.

  It draws as many samples as PPO, in ROUNDS rounds with the folders WORKDIR/expert-1, ..., and each
  round is SFT's stage with its own optimizer. Returns (setup, the last policy, what it spent).
  """
  config = config_of(trial)
  setup = train_stages(config, trial.workdir, ['rm'])
  ppo = config.stages.ppo
  prompts = ppo.iterations * ppo.rollout.episodes // (BEST_OF * ROUNDS)
  every = records(setup, 'prompts', prompts * ROUNDS)
  total = spent(setup, 'rm')
  policy = str(trial.workdir / 'sft' / 'final')
  sampled = updated = text = 0
  seconds = total.seconds
  for number in range(1, ROUNDS + 1):
    folder = trial.workdir / f'expert-{number}'
    path = folder / 'chosen.jsonl'
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
      say(f'expert iteration: round {number} of {ROUNDS}, samples of {prompts} prompts')
      own = every[prompts * (number - 1) : prompts * number]
      files.write(path, choose(setup, policy, own, number))
    own = of_round(config, policy, path)
    train_stages(own, folder, ['expert'])
    first, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    cfg = own.stages.expert
    sampled += first['sampled_tokens']
    template = setup.text.template
    kept = [len(template.row(row['prompt'], row['response'])[1]) for row in (first, *rows)]
    updated += cfg.epochs * sum(kept)
    info = checkpoint.load_info(folder / 'expert' / 'final')
    text += info['steps'] * sft.text_rows_of(cfg) * setup.length
    seconds += info['seconds']
    policy = str(folder / 'expert' / 'final')
  return (
    setup,
    initial_params(setup, policy, 'lm', 0),
    Spent(total.rankings, sampled, total.update_tokens + updated, text, round(seconds, 1)),
  )


def choose(setup: Setup, policy: str, own: list[dict], number: int) -> str:
  """JSON lines of prompts with the best of BEST_OF responses; those without an end token are left
  out. Every line also has the tokens that were sampled for all."""
  template = setup.text.template
  sample, tokens = best_sampler(
    setup, sampled_comparisons.make_sampler(setup), initial_params(setup, 'stage:rm', 'scalar', 0)
  )
  queries = [template.prompt(record['prompt']) for record in own]
  responses, _ = sample(initial_params(setup, policy, 'lm', 0), queries, 10_000 * number)
  lines = []
  for record, response in zip(own, responses, strict=True):
    text, ended = template.decode_response(response)
    if ended and text:
      row = dict(prompt=record['prompt'], response=text, sampled_tokens=sum(tokens))
      lines.append(json.dumps(row) + '\n')
  return ''.join(lines)


def of_round(config: Any, policy: str, path: files.Folder) -> Any:
  """The config of a round's stage, SFT on the chosen responses."""
  made = config.copy_and_resolve_references()
  with made.unlocked(), made.ignore_type():
    made.stages.expert = made.stages.sft.copy_and_resolve_references()
    made.stages.expert.init.policy, made.stages.expert.demonstrations = policy, None
    made.stages.expert.epochs = PASSES
    made.data.demonstrations, made.data.heldout.share = f'jsonl:{path}', 0.0
  return made
