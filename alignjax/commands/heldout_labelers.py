"""Measures reward models on the labelers of their training and on other labelers.

    alignjax heldout_labelers --config=ukp_rm --folds=5 --seeds=3 --rankings=9 --rounds=4 \\
      --comparisons=jsonl:data/ukp_convarg/judgments.jsonl.gz --out=runs/heldout_labelers
    alignjax heldout_labelers --config=smollm2_135m \\
      --config.stages.rm.init.reward=runs/mine/sft/final ...

The experiment is that of the paper's section 4.1 and appendix E.2. Labelers with --min_votes or
more are dealt to --folds groups, and the prompts to as many blocks. For each fold, the config's own
reward model stage trains --seeds reward models on the other groups' votes on the other blocks'
prompts. Both pools of labelers are measured on the fold's prompts, which no model saw. The result
also shows how often two labelers agree, and how accurate the rule "the longer response wins" is.
The command writes OUT/heldout_labelers.md and .json. The scores of each model are stored in
OUT/fold<i>-seed<j>, so that the same command resumes after an interruption. Start the stage from a
folder or a checkpoint, because a 'stage:' would be trained again for each model.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from alignjax.commands import command, config_flags

if TYPE_CHECKING:
  from alignjax.evals.reward import labelers


def cross_validate(
  config,
  out: pathlib.Path,
  *,
  folds: int,
  seeds: int,
  min_votes: int,
  split_seed: int = 0,
  rankings: int | None = None,
  rounds: int = 1,
  dtype: str = 'float32',
) -> dict:
  """Trains the reward models that are missing and returns the contents of heldout_labelers.json.

  The last stage in stages_to_run of the config must be a reward model. The config's
  data.comparisons, with its mapping, are cross-validated.

  Args:
    config: the config.
    out: the folder to write to.
    folds: the number of groups of labelers and of blocks of prompts.
    seeds: the number of reward models per fold.
    min_votes: the number of votes that a labeler must have.
    split_seed: the seed of the groups and blocks.
    rankings: the number of responses in a ranking that is made from the votes. None means that
      every vote is a comparison of its own.
    rounds: the number of rounds of rankings.
    dtype: the dtype that the models are measured in.
  """
  from alignjax.data import sources
  from alignjax.evals.reward import labelers
  from alignjax.runtime import fingerprints

  records = sources.read(config.data.comparisons, 'comparisons', config.data.mapping.comparisons)
  groups = labelers.groups(records, folds=folds, min_votes=min_votes, seed=split_seed)
  protocol = dict(
    comparisons=fingerprints.of_value(records),
    folds=folds,
    min_votes=min_votes,
    split_seed=split_seed,
    rankings=rankings,
    rounds=rounds if rankings else None,
    dtype=dtype,
    models=made_from(config, out),
    code=fingerprints.of_function(labelers.split),
  )
  check_protocol(out, protocol)
  known = {name for group in groups for name in group}
  chosen = [r for r in records if labelers.labeler(r) in known]
  print(
    f'{len(known)} labelers with {min_votes} votes or more, {len(chosen)} of {len(records)} votes, '
    f'{len({labelers.prompt_key(r) for r in chosen})} prompts',
    flush=True,
  )
  cuts = [labelers.split(chosen, groups, fold, split_seed) for fold in range(folds)]
  for fold, cut in enumerate(cuts):
    check_fold(fold, cut)
  scores: list[list[labelers.Scores]] = []  # [fold][seed]
  for fold, cut in enumerate(cuts):
    train = cut.train
    if rankings:
      train = labelers.rankings(train, k=rankings, rounds=rounds, seed=split_seed + fold)
    scores.append(
      [
        score_fold(config, out, train, cut, fold=fold, seed=seed, dtype=dtype)
        for seed in range(seeds)
      ]
    )
  return dict(
    protocol=protocol,
    labelers=len(known),
    groups=groups,
    votes=len(chosen),
    figures=figures(cuts, scores),
  )


def check_protocol(out: pathlib.Path, protocol: dict) -> None:
  """Writes the protocol to OUT/protocol.json, or raises a ValueError if the results in OUT are
  those of another protocol."""
  from alignjax.runtime import journal

  path = out / 'protocol.json'
  before = journal.read_whole(path)
  if before not in (None, protocol):
    other = ', '.join(k for k in protocol if before.get(k) != protocol[k])
    raise ValueError(
      f'{out} holds the results of another protocol, {before}, not {protocol}: {other} changed. '
      'Use another --out, or delete the folder.'
    )
  journal.write_whole(path, protocol)


def check_fold(fold: int, cut: labelers.Fold) -> None:
  """Raises a ValueError if a part of the fold has no votes."""
  from alignjax.evals.reward import labelers

  for part, purpose in (
    (cut.train, 'train'),
    (labelers.votes(cut.seen), 'measure'),
    (labelers.votes(cut.heldout), 'measure'),
  ):
    if not part:
      raise ValueError(
        f'fold {fold}: no votes to {purpose} on are left; lower --folds or --min_votes.'
      )


def score_fold(
  config, out: pathlib.Path, train: list, cut: labelers.Fold, *, fold: int, seed: int, dtype: str
) -> labelers.Scores:
  """Returns the scores that a reward model, trained on the records `train`, gives to the responses
  that the fold is measured on. Scores that OUT has are read from there."""
  from alignjax.evals.reward import labelers
  from alignjax.runtime import journal

  folder = out / f'fold{fold}-seed{seed}'
  scored = journal.read_whole(folder / 'scores.json')
  if scored is None:
    scored = dict(scores=trained(config, folder, train, [*cut.seen, *cut.heldout], seed, dtype))
    journal.write_whole(folder / 'scores.json', scored)
  else:
    print(f'fold {fold}, seed {seed}: scores were already in {folder}', flush=True)
  scores = {(prompt, response): score for prompt, response, score in scored['scores']}

  def score(prompt: str, response: str) -> float:
    return scores[prompt, response]

  seen, heldout = (
    labelers.hits(labelers.votes(part), score).mean() for part in (cut.seen, cut.heldout)
  )
  print(f'fold {fold}, seed {seed}: seen {seen:.3f}, held out {heldout:.3f}', flush=True)
  return score


def figures(
  cuts: Sequence[labelers.Fold], scores: Sequence[Sequence[labelers.Scores]]
) -> dict[str, dict]:
  """Returns the figures of heldout_labelers.json, with intervals: the accuracy of the reward models
  by pool of labelers, their difference, the agreement of labelers, and the accuracy of the rule
  that the longer response wins. scores: [fold][seed]."""
  from alignjax.evals import stats
  from alignjax.evals.reward import labelers

  votes = {
    'seen': [labelers.votes(cut.seen) for cut in cuts],
    'heldout': [labelers.votes(cut.heldout) for cut in cuts],
  }
  prompts = {pool: [[v.prompt for v in fold] for fold in votes[pool]] for pool in votes}

  def over_folds(values: Iterable[Iterable], clusters: Iterable[Iterable]) -> dict:
    return stats.interval(flat(values), flat(clusters), (0, 1))

  result, means = {}, {}
  for pool, folds in votes.items():
    hits = [
      [labelers.hits(fold, score) for score in own] for fold, own in zip(folds, scores, strict=True)
    ]
    means[pool] = [sum(fold) / len(fold) for fold in hits]
    result[f'accuracy_{pool}'] = labelers.over_models(hits, prompts[pool])
  result['gap'] = stats.gap(
    flat(means['seen']), flat(prompts['seen']), flat(means['heldout']), flat(prompts['heldout'])
  )
  agreed = {
    'seen': [labelers.agreement(fold) for fold in votes['seen']],
    'heldout': list(map(labelers.agreement, votes['heldout'], votes['seen'])),
  }
  for pool, folds in votes.items():
    values, clusters = zip(*agreed[pool], strict=True)
    result[f'agreement_{pool}'] = over_folds(values, clusters)
    longer = [labelers.hits(fold, labelers.longer) for fold in folds]
    result[f'longer_{pool}'] = over_folds(longer, prompts[pool])
  return result


def flat(lists: Iterable[Iterable]) -> list:
  return [x for one in lists for x in one]


def made_from(config, out: pathlib.Path) -> str:
  """Returns the fingerprint of everything that determines the reward models besides the votes: the
  config, the checkpoint, and functions of your own."""
  from alignjax import train
  from alignjax.runtime import fingerprints
  from alignjax.setup import inputs

  stages = train.resolve(config)
  read = {}
  for name in stages:
    read |= inputs.of_config(config, name)
    own = config.stages[name]
    for spec in (*(own.get('init') or {}).values(), *(own.get('members') or ())):
      read |= {} if spec.startswith('stage:') else inputs.of_weights(spec)

  def shared(identity):
    data = {k: v for k, v in identity['data'].items() if k not in ('comparisons', 'mapping')}
    return {**identity, 'data': data}

  found = {entry: inputs.fingerprint(kind, name, out, {}) for entry, (kind, name) in read.items()}
  return fingerprints.of_value([[shared(train.identity(config, name)) for name in stages], found])


def trained(
  config, folder: pathlib.Path, train: list, measured: list, seed: int, dtype: str
) -> list:
  """Trains a reward model on records by the config's stage and scores all responses of other
  records: [[prompt, response, score]]."""
  from alignjax import train as trainer
  from alignjax.data import encode
  from alignjax.evals.reward import labelers
  from alignjax.inference import bulk, loading
  from alignjax.runtime import files

  name = config.stages_to_run[-1]
  folder.mkdir(parents=True, exist_ok=True)
  files.write(folder / 'train.jsonl', ''.join(json.dumps(r) + '\n' for r in train))
  own = config.copy_and_resolve_references()
  own.seed = config.seed + seed
  own.data.comparisons, own.data.mapping.comparisons = f'jsonl:{folder / "train.jsonl"}', None
  own.data.heldout.share = 0.0  # The fold itself holds out prompts.
  own.stages[name].evaluation_prompts = 0
  trainer.main(own, folder)
  model = loading.load(str(folder / name), 'scalar', dtype=dtype)
  rows = sorted({(labelers.prompt_key(r), text) for r in measured for text in r['responses']})
  pairs = [model.template.row(json.loads(p), text) for p, text in rows]
  tokens = [(prompt, [response]) for prompt, response in pairs]
  limited = encode.limit_lengths(
    tokens, own.data.prompt_length, own.data.response_length, 'truncate', 'votes to measure on'
  ).rows
  score = bulk.make_scorer(
    model.nets,
    model.sharder,
    length=own.data.prompt_length + own.data.response_length,
    pad=model.template.pad,
    rows=32,
  )
  scores = score(model.params, [p + r[0] for p, r in limited])
  return [[p, text, float(s)] for (p, text), s in zip(rows, scores, strict=True)]


def markdown(result: dict) -> str:
  """Returns the contents of heldout_labelers.md."""
  from alignjax.evals.markdown import table
  from alignjax.evals.stats import show

  f, p = result['figures'], result['protocol']
  models = f['accuracy_seen']['models']

  def cell(figure):
    return show(figure, count=True) or 'no two judged the same pair'

  def mean_and_deviation(figure):
    mean = f'{figure["mean_over_models"]:.3f}'
    if figure['sd_over_models'] is None:
      return mean
    return f'{mean} ± {figure["sd_over_models"]:.3f}'

  rows = [
    ('reward model', 'accuracy', cell),
    ('mean over models ± their deviation', 'accuracy', mean_and_deviation),
    ('the longer response wins', 'longer', cell),
    ('agreement with one of the training groups', 'agreement', cell),
  ]
  return '\n'.join(
    [
      '# Held-out labelers',
      '',
      f'{result["labelers"]} labelers with {p["min_votes"]} votes or more in {p["folds"]} groups, '
      f'{models} reward models. Share of votes ordered as the labeler did, on prompts that no '
      'model saw; mean and 95% interval by prompt (votes). Paper: 72.4 ± 0.4% seen, 69.6 ± 0.9% '
      'held out.',
      '',
      *table(
        ('', 'labelers of the training groups', 'labelers of the held-out group'),
        [(name, show_as(f[f'{k}_seen']), show_as(f[f'{k}_heldout'])) for name, k, show_as in rows],
      ),
      '',
      f'Seen less held out: {cell(f["gap"])}.',
      '',
    ]
  )


def main(argv: list[str]) -> None:
  from absl import flags

  config, _, argv = config_flags.read_config(argv)
  flags.DEFINE_string(
    'config', None, 'NAME[:ARG] of a config with a reward model stage, and --config.ENTRY=VALUE.'
  )
  comparisons = flags.DEFINE_string(
    'comparisons',
    None,
    "A source such as jsonl:FILE, with labeler_id. Default: the config's data.comparisons.",
  )
  mapping = flags.DEFINE_string(
    'mapping', None, "The mapping of their fields. Default: the config's data.mapping.comparisons."
  )
  folds = flags.DEFINE_integer(
    'folds', 5, 'The number of groups of labelers, each of which is held out once.'
  )
  seeds = flags.DEFINE_integer('seeds', 3, 'The number of reward models per fold.')
  min_votes = flags.DEFINE_integer(
    'min_votes', 100, 'The number of votes that a labeler must have.'
  )
  split_seed = flags.DEFINE_integer('split_seed', 0, 'The seed of the groups and blocks.')
  rankings = flags.DEFINE_integer(
    'rankings',
    None,
    'Makes rankings of this many responses from the training votes (labelers.py). '
    'Default: every vote is a comparison of its own.',
  )
  rounds = flags.DEFINE_integer(
    'rounds', 8, 'The number of rankings that each response is in, with --rankings.'
  )
  dtype = flags.DEFINE_enum(
    'dtype', 'float32', command.DTYPES, 'The dtype that the models are measured in.'
  )
  out = flags.DEFINE_string('out', 'runs/heldout_labelers', 'The folder to write to.')

  def run():
    from absl import logging

    from alignjax.runtime import failures, files

    logging.set_verbosity(logging.WARNING)
    c = config
    if comparisons.value:
      c.data.comparisons = comparisons.value
    if mapping.value:
      c.data.mapping.comparisons = mapping.value
    folder = files.absolute(out.value)
    failures.check_writable(folder, '--out')
    result = cross_validate(
      c,
      folder,
      folds=folds.value,
      seeds=seeds.value,
      min_votes=min_votes.value,
      split_seed=split_seed.value,
      rankings=rankings.value,
      rounds=rounds.value,
      dtype=dtype.value,
    )
    files.write(folder / 'heldout_labelers.json', json.dumps(result, indent=2))
    files.write(folder / 'heldout_labelers.md', markdown(result))
    print(markdown(result), flush=True)

  config_flags.run_with_flags(run, __name__, argv)
