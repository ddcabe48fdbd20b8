"""Draws reward against KL, for the best of n samples and for PPO policies.

    alignjax best_of_n --policy=runs/ppo_ptx-s0/sft --reward_model=runs/ppo_ptx-s0/rm \\
      --gold=sandbox --ppo=runs/ppo_ptx-s0/ppo,runs/ppo_ptx-s0/ppo_ptx \\
      --out=runs/ppo_ptx-s0/best_of_n
    alignjax best_of_n --policy=hf:SFT --reward_model=hf:RM --prompts=jsonl:prompts.jsonl \\
      --n=1,2,4,8 --out=OUT

A model is the folder of a finished stage, WORKDIR/STAGE, 'hf:FOLDER_OR_HUB_NAME', or
'peft:FOLDER_OR_HUB_NAME' for adapters of one. The command writes OUT/best_of_n.md, .json and .png:
the reward model's score, and with --gold=sandbox the true score of both pools of labelers, against
KL. Where the first rises and the second falls, the policy exploits the reward model. The final
policy of a PPO stage (or a kept candidate, STAGE/candidates/STEP) is measured on the same prompts.
What training logged in metrics.jsonl, on its own prompts, is drawn in panels of its own. --policy
should be the reference of the PPO stages. Samples are stored in OUT/kept, so that an interrupted
call resumes.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from alignjax.commands import command

if TYPE_CHECKING:
  from alignjax.inference.samples import Responses

  Gold = Callable[[Responses], dict]  # responses to {measure: f[P,count]}

PPO_SAMPLES = 8  # Samples per prompt of the trained policies, whose mean is measured.
LOGGED = {
  'reward model': 'objective/scores',
  'gold, training labelers': 'gold/train_labelers',
  'gold, held-out labelers': 'gold/heldout_labelers',
}


def arguments(argv: list[str]) -> argparse.Namespace:
  parser = command.make_parser(__name__)
  parser.add_argument('--policy', required=True, help='the model to sample from')
  parser.add_argument('--reward_model', required=True)
  parser.add_argument(
    '--gold', choices=('sandbox',), help='also measure the true scores, for policies of the sandbox'
  )
  parser.add_argument(
    '--ppo', default='', help='FOLDER,FOLDER: finished PPO stages, or STAGE/candidates/STEP'
  )
  parser.add_argument('--n', default='1,2,4,8,16,32,64')
  parser.add_argument(
    '--samples',
    type=int,
    help='samples per prompt; default: twice the largest n, for a more precise estimate',
  )
  parser.add_argument(
    '--prompts',
    default='sandbox:',
    help="a source such as jsonl:FILE, 'sandbox:', or 'sandbox:train' for PPO's own prompts",
  )
  parser.add_argument(
    '--mapping', help="the mapping of the prompts' fields (alignjax/data/mappings.py)"
  )
  parser.add_argument(
    '--limit', type=int, default=200, help='the number of prompts, drawn by the seed'
  )
  parser.add_argument(
    '--template',
    help="'plain', 'dialogue' or 'chat'; default: that of the training, or plain for hf:",
  )
  parser.add_argument(
    '--max_tokens', type=int, help='tokens per response; default: as in training, or 128 for hf:'
  )
  parser.add_argument('--temperature', type=float, default=1.0)
  parser.add_argument(
    '--rows', type=int, default=256, help='rows in a batch; use fewer if memory is short'
  )
  parser.add_argument(
    '--dtype',
    default='float32',
    choices=command.DTYPES,
    help='the dtype that all models compute in',
  )
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', required=True)
  return parser.parse_args(argv)


def main(argv: list[str]) -> None:
  run(arguments(argv))


def check(options: argparse.Namespace) -> tuple[list[int], int]:
  """Returns (the values of --n, samples per prompt), after checking the flags."""
  try:
    ns = sorted({int(n) for n in options.n.split(',')})
  except ValueError:
    raise ValueError(f'--n={options.n} does not have the form 1,2,4.') from None
  most = options.samples or 2 * ns[-1]
  for wrong, message in (
    (ns[0] < 1, '--n must be 1 or more.'),
    (options.limit < 1, '--limit must be 1 or more.'),
    (most < ns[-1], f'--samples={most} is fewer than the largest n, {ns[-1]}.'),
    (options.rows < 1, '--rows must be 1 or more.'),
    (options.seed < 0, '--seed must not be negative.'),
    (options.max_tokens is not None and options.max_tokens < 1, '--max_tokens must be 1 or more.'),
    (
      not 0 < options.temperature < float('inf'),
      '--temperature must be above 0: greedy samples are all the same.',
    ),
  ):
    if wrong:
      raise ValueError(message)
  return ns, most


def find_prompts(options: argparse.Namespace, saved: dict | None) -> tuple[list[dict], Gold | None]:
  """Returns (records with prompts, how their responses are scored by the truth, which is None
  outside the sandbox). saved: the config that --policy was trained with."""
  import numpy as np

  from alignjax import sandbox
  from alignjax.data import sources
  from alignjax.inference import samples

  in_sandbox = options.prompts.startswith('sandbox:')
  if not options.gold and not in_sandbox:
    records = sources.read(options.prompts, 'prompts', options.mapping)
    chosen = np.random.default_rng(options.seed).permutation(len(records))[: options.limit]
    return [records[i] for i in np.sort(chosen)], None
  if not saved or saved['data']['tokenizer'] != 'sandbox:':
    raise ValueError(
      f'--policy={options.policy} is not a policy of the sandbox: give --prompts, and leave --gold '
      'out.'
    )
  if not in_sandbox:
    raise ValueError(
      f'--gold=sandbox scores only its own prompts, not --prompts={options.prompts}.'
    )
  world, labelers = sandbox.of_entries(saved['world'])
  split = options.prompts.removeprefix('sandbox:') or 'test'
  records = sandbox.prompts(world, options.limit, split)
  if not options.gold:
    return records, None
  return records, functools.partial(samples.gold, world, labelers, records)


def run(options: argparse.Namespace) -> None:
  from alignjax.evals.reward import best_of_n
  from alignjax.inference import loading, samples
  from alignjax.runtime import failures, files, fingerprints

  ns, most = check(options)
  out = files.folder(options.out)
  failures.check_writable(out, '--out')
  saved = loading.trained_with(options.policy)
  records, gold = find_prompts(options, saved)
  max_tokens = options.max_tokens or (saved['data']['response_length'] if saved else 128)
  prompts = [r['prompt'] for r in records]
  names = [json.dumps(p) for p in prompts]  # A repeated prompt is one cluster.
  ppo = {label(p): p for p in options.ppo.split(',') if p}
  if len(ppo) < len(list(filter(None, options.ppo.split(',')))):
    raise ValueError(f'--ppo={options.ppo}: two stages have the same name.')

  def load(name, head):
    return loading.load(name, head, options.template, dtype=options.dtype)

  model = load(options.policy, 'lm')
  reward = load(options.reward_model, 'scalar')
  policies = {name: load(path, 'lm') for name, path in ppo.items()}
  for name, policy in policies.items():
    if policy.cfg != model.cfg:
      raise ValueError(
        f'{ppo[name]} has another architecture than {options.policy}, which should be its '
        'reference.'
      )
  rewarder = samples.make_rewarder(reward, prompts, rows=options.rows)

  def measured(path, model, count):
    """Returns (responses, {measure: f[P,count]})."""
    print(f'{path}: {count} samples of {len(prompts)} prompts', flush=True)
    key = [
      loading.fingerprint(model),
      prompts,
      max_tokens,
      options.temperature,
      options.seed,
      count,
      fingerprints.of_function(samples.make_responder),
    ]
    kept = out / 'kept' / f'{fingerprints.of_value(key)}.jsonl'
    respond = samples.make_responder(
      model,
      prompts,
      count=count,
      max_tokens=max_tokens,
      temperature=options.temperature,
      rows=options.rows,
    )
    responses = respond(model.params, options.seed, kept)
    values = {'reward model': rewarder(reward.params, responses)}
    return responses, values | (gold(responses) if gold else {})

  _, values = measured(options.policy, model, most)
  result = dict(
    policy=options.policy,
    reward_model=options.reward_model,
    prompts=len(prompts),
    samples=most,
    seed=options.seed,
    temperature=options.temperature,
    max_tokens=max_tokens,
    measures=list(values),
    best_of_n=best_of_n.curve(values['reward model'], values, ns, names),
    policies={},
  )
  for name, policy in policies.items():
    responses, values = measured(ppo[name], policy, PPO_SAMPLES)
    divergence = samples.make_divergence(
      policy, prompts, max_tokens=max_tokens, temperature=options.temperature, rows=options.rows
    )
    kl = divergence(policy.params, model.params, responses)
    result['policies'][name] = best_of_n.policy(kl, values, names) | logged(ppo[name], values)
  out.mkdir(parents=True, exist_ok=True)
  files.write(out / 'best_of_n.json', json.dumps(result, indent=2))
  files.write(
    out / 'best_of_n.md', best_of_n.markdown(result) + '\n![reward against KL](best_of_n.png)\n'
  )
  best_of_n.plot(result, out / 'best_of_n.png')
  print(best_of_n.markdown(result), flush=True)


def logged(stage: str, measures: Iterable[str]) -> dict[str, dict]:
  """Returns {'training': {'kl': values, measure: values}} from metrics.jsonl of a PPO stage, or {}
  if the stage has no such log."""
  from alignjax.runtime import files, metrics

  path = files.folder(stage) / 'metrics.jsonl'
  log = metrics.read(path) if path.exists() else {}
  if 'objective/kl' not in log:
    return {}
  found = {m: log[LOGGED[m]].tolist() for m in measures if LOGGED[m] in log}
  return {'training': {'kl': log['objective/kl'].tolist(), **found}}


def label(stage: str) -> str:
  """Returns the label of a stage: 'ppo_ptx' for WORKDIR/ppo_ptx, and 'ppo_ptx/20' for
  WORKDIR/ppo_ptx/candidates/20."""
  path = pathlib.Path(stage)
  return f'{path.parent.parent.name}/{path.name}' if path.parent.name == 'candidates' else path.name
