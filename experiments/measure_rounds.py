"""Measures what rounds of collection and choices of items are worth on the sandbox.

python experiments/measure_rounds.py --config=rounds --seeds=0,1,2,3,4 --labels=2000 --out=OUT

For each seed, a reward model and a policy are trained with the same number of rankings in one
round and in two, for each function of label/choose.py. Then OUT/measured.md has the accuracy of the
reward model and the gold reward of the policy by labels spent, as means over seeds with intervals,
and the differences paired by seed. Each run is made as by `alignjax rounds`, in the folder
OUT/seed-S/CHOICE-ROUNDS; the same command goes on after an interruption. --config.ENTRY=VALUE
changes an entry.

In the first round there is no reward model, so that disagreement and near_tie are random: their
single round is that of random.
"""

import json
import os
import pathlib
import sys
import time

import this_clone  # noqa: F401

from alignjax.commands import command, config_flags
from alignjax.commands.run import divide_cpu

CHOICES = ('random', 'disagreement', 'near_tie', 'd_optimal')
WITHOUT_MODEL = ('random', 'd_optimal')  # their first round is one of their own
FIGURES = {
  'accuracy_first': 'accuracy on the samples of round 0',
  'accuracy_own': "accuracy on its policy's samples",
  'gold': 'gold reward',
  'gap': 'proxy less gold',
  'kl': 'KL',
}
COMPARED = ('accuracy_first', 'accuracy_own', 'gold')


def arguments(argv):
  config, _, rest = config_flags.read_config(argv)
  parser = command.make_parser(__name__)
  parser.add_argument('--config', help='NAME[:ARG] of a config with rounds on the sandbox')
  parser.add_argument('--seeds', default='0,1,2,3,4')
  parser.add_argument('--labels', type=int, default=2000, help='rankings of a run, all rounds')
  parser.add_argument('--choices', default=','.join(CHOICES))
  parser.add_argument('--ensemble', type=int, default=3, help='reward models for disagreement')
  parser.add_argument('--out', required=True)
  options = parser.parse_args(rest)
  options.seeds = [int(seed) for seed in options.seeds.split(',')]
  options.choices = options.choices.split(',')
  if options.labels < 2 or options.labels % 2:
    raise ValueError(f'--labels={options.labels} must be even: two rounds have one half each.')
  if wrong := [name for name in options.choices if name not in CHOICES]:
    raise ValueError(f'--choices={wrong[0]} is none of {", ".join(CHOICES)}.')
  return config, options


def arms(choices):
  """Returns the runs of a seed, (choice, rounds)."""
  return [(c, r) for c in choices for r in (1, 2) if r == 2 or c in WITHOUT_MODEL]


def changed(config, seed, choice, rounds, options, base):
  """Returns the config of a run."""
  made = config.copy_and_resolve_references()
  with made.unlocked(), made.ignore_type():
    made.seed = made.world.seed = seed
    made.rounds.base = str(base)
    made.rounds.labels = (options.labels // rounds,) * rounds
    made.rounds.prompts = 2 * config.rounds.prompts // rounds  # as many in all
    made.rounds.choose = dict(fn=f'alignjax.label.choose:{choice}')
    made.rounds.ensemble = options.ensemble if choice == 'disagreement' else 1
  return made


def measure(config, options, out):
  """Makes the runs that are missing and returns {seed: {'CHOICE-ROUNDS': the rounds of
  rounds.json}}."""
  import jax

  from alignjax import rounds

  found = {}
  for seed in options.seeds:
    found[seed] = {}
    for choice, count in arms(options.choices):
      name, began = f'{choice}-{count}', time.perf_counter()
      folder = out / f'seed-{seed}' / name
      path = folder / 'rounds.json'
      if not path.exists():
        own = changed(config, seed, choice, count, options, folder.with_name('base'))
        rounds.main(own, folder)
        jax.clear_caches()
        print(f'seed {seed}, {name}: {time.perf_counter() - began:.0f} s', flush=True)
      found[seed][name] = json.loads(path.read_bytes())['rounds']
    for choice in options.choices:
      if choice not in WITHOUT_MODEL and 'random-1' in found[seed]:
        found[seed][f'{choice}-1'] = found[seed]['random-1']
  return found


def means(found):
  """Returns [{'name', 'round', 'labels', figure: over seeds}]."""
  from alignjax.evals.stats import ANY, interval

  rows = []
  for name in dict.fromkeys(name for runs in found.values() for name in runs):
    for i, one in enumerate(next(iter(found.values()))[name]):
      row = dict(name=name, round=i + 1, labels=one['labels_so_far'])
      for key in FIGURES:
        row[key] = interval([runs[name][i][key]['mean'] for runs in found.values()], None, ANY)
      rows.append(row)
  return rows


def differences(found):
  """Returns [{'what', figure: of the last rounds, paired by seed}]."""
  from alignjax.evals.stats import ANY, interval

  names = list(next(iter(found.values())))
  choices = list(dict.fromkeys(name.rpartition('-')[0] for name in names))
  wanted = {f'{c}: two rounds less one': (f'{c}-2', f'{c}-1') for c in choices}
  for count, words in ((1, 'one round'), (2, 'two rounds')):
    for choice in choices:
      if choice != 'random' and (count == 2 or choice in WITHOUT_MODEL):
        wanted[f'{words}: {choice} less random'] = (f'{choice}-{count}', f'random-{count}')
  return [
    dict(what=what)
    | {
      key: interval(
        [runs[a][-1][key]['mean'] - runs[b][-1][key]['mean'] for runs in found.values()], None, ANY
      )
      for key in COMPARED
    }
    for what, (a, b) in wanted.items()
    if a in names and b in names
  ]


def markdown(result):
  """Returns the contents of measured.md."""
  from alignjax.evals.markdown import table
  from alignjax.evals.stats import apart, show, show_difference

  words = {1: 'better', -1: 'worse', 0: 'not told apart'}
  verdicts = [
    f'- {row["what"]}: '
    + ', '.join(f'{FIGURES[key]} {words[apart(row[key])]}' for key in COMPARED)
    + '.'
    for row in result['differences']
  ]
  return '\n'.join(
    [
      '# Rounds of collection, measured',
      '',
      f'{result["labels"]} rankings a run, seeds {", ".join(map(str, result["seeds"]))}. Mean over '
      'seeds and 95% interval.',
      '',
      *table(
        ('choice-rounds', 'round', 'labels', *FIGURES.values()),
        [
          (row['name'], row['round'], row['labels'], *(show(row[key]) for key in FIGURES))
          for row in result['runs']
        ],
      ),
      '',
      'Differences of the last rounds, paired by seed; bold where the interval leaves out 0:',
      '',
      *table(
        ('difference', *(FIGURES[key] for key in COMPARED)),
        [
          (row['what'], *(show_difference(row[key]) for key in COMPARED))
          for row in result['differences']
        ],
      ),
      '',
      *verdicts,
      '',
    ]
  )


def main(argv):
  config, options = arguments(argv)
  import jax
  from absl import logging

  from alignjax.runtime import files, fingerprints, journal

  logging.set_verbosity(logging.WARNING)
  divide_cpu(config.get('cpu_devices'))
  out = pathlib.Path(files.absolute(options.out))
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):  # The runs of a seed share their programs.
    jax.config.update('jax_compilation_cache_dir', str(out / 'compiled'))
  protocol = dict(
    config=fingerprints.of_value(config.to_dict()), labels=options.labels, ensemble=options.ensemble
  )
  before = journal.read_whole(out / 'protocol.json')
  if before not in (None, protocol):
    raise ValueError(
      f'{out} holds runs of another protocol, {before}, not {protocol}. Use another --out, or '
      'delete the folder.'
    )
  journal.write_whole(out / 'protocol.json', protocol)
  found = measure(config, options, out)
  result = dict(
    seeds=options.seeds,
    labels=options.labels,
    runs=means(found),
    differences=differences(found),
    each={str(seed): runs for seed, runs in found.items()},
  )
  files.write(out / 'measured.json', json.dumps(result, indent=2))
  files.write(out / 'measured.md', markdown(result))
  print(markdown(result), flush=True)


if __name__ == '__main__':
  command.start(main, sys.argv[1:])
