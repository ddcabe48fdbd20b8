"""Draws reward against KL, for the best of n samples and for PPO policies.

    alignjax best_of_n --policy=runs/ppo_ptx-s0/sft --reward_model=runs/ppo_ptx-s0/rm \\
      --gold=sandbox --ppo=runs/ppo_ptx-s0/ppo,runs/ppo_ptx-s0/ppo_ptx \\
      --out=runs/ppo_ptx-s0/best_of_n
    alignjax best_of_n --policy=hf:SFT --reward_model=hf:RM --prompts=jsonl:prompts.jsonl \\
      --n=1,2,4,8 --out=OUT

A model is the folder of a finished stage, WORKDIR/STAGE, or 'hf:FOLDER_OR_HUB_NAME'. The command
writes OUT/best_of_n.md, .json and .png: the reward model's score, and with --gold=sandbox the true
score of both pools of labelers, against KL. Where the first rises and the second falls, the policy
exploits the reward model. The final policy of a PPO stage (or a kept candidate,
STAGE/candidates/STEP) is measured on the same prompts. What training logged in metrics.jsonl, on
its own prompts, is drawn in panels of its own. --policy should be the reference of the PPO stages.
Samples are stored in OUT/kept, so that an interrupted call resumes.
"""

import argparse
import json
import pathlib

from alignjax.commands import command

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
    choices=('float32', 'bfloat16', 'float16'),
    help='the dtype that all models compute in',
  )
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', required=True)
  return parser.parse_args(argv)


def main(argv: list[str]) -> None:
  run(arguments(argv))


def run(options: argparse.Namespace) -> None:
  import numpy as np

  from alignjax.data import sources
  from alignjax.evals.reward import best_of_n
  from alignjax.inference import loading, samples
  from alignjax.runtime import failures, files, fingerprints, metrics

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
  out = files.folder(options.out)
  failures.check_writable(out, '--out')
  saved = loading.trained_with(options.policy)
  world = None
  split = (
    options.prompts.removeprefix('sandbox:') if options.prompts.startswith('sandbox:') else None
  )
  if options.gold or split is not None:
    if not saved or saved['data']['tokenizer'] != 'sandbox:':
      raise ValueError(
        f'--policy={options.policy} is not a policy of the sandbox: give '
        f'--prompts, and leave --gold out.'
      )
    if split is None:
      raise ValueError(
        f'--gold=sandbox scores only its own prompts, not --prompts={options.prompts}.'
      )
    from alignjax import sandbox

    world, labelers = (
      sandbox.World(saved['world']['seed']),
      sandbox.Labelers(saved['world']['seed']),
    )
    records = sandbox.prompts(world, options.limit, split or 'test')
  else:
    records = sources.read(options.prompts, 'prompts', options.mapping)
    chosen = np.random.default_rng(options.seed).permutation(len(records))[: options.limit]
    records = [records[i] for i in np.sort(chosen)]
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
  policies = {name: load(p, 'lm') for name, p in ppo.items()}
  rewarder = samples.make_rewarder(reward, prompts, rows=options.rows)

  def measured(model, count):
    """Returns (responses, {measure: f[P,count]})."""
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
    if options.gold:
      values |= samples.gold(world, labelers, records, responses)
    return responses, values

  print(f'{options.policy}: {most} samples of {len(prompts)} prompts', flush=True)
  _, values = measured(model, most)
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
    path = ppo[name]
    if policy.cfg != model.cfg:
      raise ValueError(
        f'{path} has another architecture than {options.policy}, which should be its reference.'
      )
    print(f'{path}: {PPO_SAMPLES} samples of {len(prompts)} prompts', flush=True)
    responses, values = measured(policy, PPO_SAMPLES)
    divergence = samples.make_divergence(policy, prompts, max_tokens=max_tokens, rows=options.rows)
    result['policies'][name] = best_of_n.policy(
      divergence(policy.params, model.params, responses), values, names
    )
    log = files.folder(path) / 'metrics.jsonl'
    logged = metrics.read(log) if log.exists() else {}
    if 'objective/kl' in logged:
      result['policies'][name]['training'] = {
        'kl': logged['objective/kl'].tolist(),
        **{m: logged[LOGGED[m]].tolist() for m in result['measures'] if LOGGED[m] in logged},
      }
  out.mkdir(parents=True, exist_ok=True)
  (out / 'best_of_n.json').write_text(json.dumps(result, indent=2))
  (out / 'best_of_n.md').write_text(
    best_of_n.markdown(result) + '\n![reward against KL](best_of_n.png)\n'
  )
  best_of_n.plot(result, out / 'best_of_n.png')
  print(best_of_n.markdown(result), flush=True)


def label(stage: str) -> str:
  """Returns the label of a stage: 'ppo_ptx' for WORKDIR/ppo_ptx, and 'ppo_ptx/20' for
  WORKDIR/ppo_ptx/candidates/20."""
  path = pathlib.Path(stage)
  return f'{path.parent.parent.name}/{path.name}' if path.parent.name == 'candidates' else path.name
