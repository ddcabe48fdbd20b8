"""Asks judges which policy is better: win rates, strengths, agreement.

    alignjax preference --policies=sft=runs/x/sft,ppo=runs/x/ppo,ppo_ptx=runs/x/ppo_ptx \\
      --prompts=sandbox: --judge=sandbox --judge=rm:runs/x/rm --out=runs/x/preference
    alignjax preference --policies=... --prompts=jsonl:FILE --mapping=fastchat_questions \\
      --judge=openai:MODEL --judge_url=http://localhost:8000/v1
    alignjax preference --policies=... --prompts=jsonl:FILE --export=sheet.jsonl
    alignjax preference --policies=... --prompts=jsonl:FILE --judge=file:sheet.jsonl
    alignjax preference --judge=file:testset.jsonl.gz --judge_mapping=pandalm --judge=rm:runs/x/rm

--export writes a sheet for people to fill in, and --judge=file: reads it back. The last command
reads the judgments of others and measures how far a reward model agrees with them.

The evaluation is that of the paper's section 4.1. A policy is the folder of a finished stage,
WORKDIR/STAGE, 'hf:FOLDER_OR_HUB_NAME', or 'peft:FOLDER_OR_HUB_NAME' for adapters of one.
alignjax/data/sources.py describes the sources of prompts, alignjax/evals/preference/judges.py the
judges, and alignjax/evals/preference/judgments.py the files of judgments. The command writes
OUT/preference.md, preference.json and preference.png. Responses, scores and answers are stored in
OUT under everything that they depend on. A second call therefore computes only what is new and
reports what it reuses, and an interrupted call resumes.
"""

import argparse
import json
import os
import pathlib

from alignjax.commands import command


def arguments(argv: list[str]) -> argparse.Namespace:
  parser = command.make_parser(__name__)
  parser.add_argument('--policies', default='', help='NAME=MODEL,...; optional with --judge=file:')
  parser.add_argument(
    '--template',
    help="template of the policies: 'plain', 'dialogue' or 'chat'; default: that of the training, "
    'or plain for hf:',
  )
  parser.add_argument('--prompts', help="a source of prompts, or 'sandbox:'")
  parser.add_argument(
    '--mapping', help="the mapping of the prompts' fields (alignjax/data/mappings.py)"
  )
  parser.add_argument('--limit', type=int, help='the largest number of prompts, drawn by the seed')
  parser.add_argument('--temperature', type=float, default=1.0, help='0 is greedy')
  parser.add_argument(
    '--max_tokens',
    type=int,
    help='tokens per response; default: as in the training of the policies, or 128 for hf:',
  )
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--rows', type=int, default=32, help='the largest number of responses, or scores, in a batch'
  )
  parser.add_argument(
    '--dtype',
    default='float32',
    choices=command.DTYPES,
    help='the dtype that policies and reward models compute in',
  )
  parser.add_argument(
    '--judge',
    action='append',
    default=[],
    metavar='JUDGE',
    help='rm:MODEL, sandbox, openai:MODEL, file:PATH or module:function; can be repeated',
  )
  parser.add_argument('--judge_template', help='the template of rm:, as --template')
  parser.add_argument(
    '--judge_url',
    help='the URL of openai:, up to /chat/completions; default: https://api.openai.com/v1',
  )
  parser.add_argument(
    '--judge_key_env', help='the environment variable that holds the key; default: OPENAI_API_KEY'
  )
  parser.add_argument('--judge_instructions', help='a text file with the instructions for openai:')
  parser.add_argument(
    '--judge_body',
    default='{"temperature": 0}',
    help='more fields of the requests to openai:, as JSON',
  )
  parser.add_argument(
    '--judge_workers', type=int, default=8, help='the number of concurrent requests to openai:'
  )
  parser.add_argument(
    '--judge_mapping', help="the mapping of file:, 'pandalm', module:function or ours=theirs,..."
  )
  parser.add_argument(
    '--judge_key', help='the key of a blinded sheet for file:; default: the key beside the sheet'
  )
  parser.add_argument(
    '--export', help='a file for a blinded sheet of all pairs, for people to judge'
  )
  parser.add_argument(
    '--baseline', help='the policy that win rates are against; default: the first'
  )
  parser.add_argument('--out', default='runs/preference')
  return parser.parse_args(argv)


def main(argv: list[str]) -> None:
  run(arguments(argv))


def run(options: argparse.Namespace) -> None:
  from alignjax.evals.preference import verdicts

  policies, kinds, out = check(options)
  records, world = [], None
  if policies:
    from alignjax.evals.preference import responses as answers

    world, _ = answers.trained(policies)
    records = answers.prompts(options.prompts, options.mapping, options.limit, options.seed, world)
  # Wrong files are reported before anything is sampled.
  sheets = [spec for kind, spec in kinds if kind == 'file']
  judged = read_sheets(sheets, options, policies, records)
  responses, pairs = {}, []
  if policies:
    responses = sample(options, policies, records, out)
    pairs = answered_pairs(records, responses, judged)
    if options.export:
      export(pairs, options)
  elif len(sheets) < len(kinds):
    pairs = verdicts.pairs_of(judged)
  for kind, spec in kinds:
    if kind != 'file':
      verdicts.add(judged, ask(kind, spec, pairs, options, world, out / 'judged'))
  if judged.verdicts:
    write(summarize(judged, options, policies, records, responses), out)


def read_sheets(
  paths: list[str], options: argparse.Namespace, policies: dict[str, str], records: list[dict]
):
  """Returns the judgments in people's files. If there are policies, the files may judge only these,
  and only the prompts of the records."""
  from alignjax.evals.preference import judgments, verdicts

  judged = verdicts.empty()
  known = {}
  if policies:
    known = dict(policies=list(policies), prompts={r['prompt_id'] for r in records})
  for path in paths:
    judgments.read(
      path,
      judge=f'file:{path}',
      mapping=options.judge_mapping,
      key=options.judge_key,
      into=judged,
      **known,
    )
  return judged


def answered_pairs(records: list[dict], responses: dict[str, list], judged) -> list:
  """Returns the pairs of the policies' responses, and adds a note to the judgments if prompts are
  left out."""
  from alignjax.evals.preference import verdicts

  pairs = verdicts.make_pairs(records, responses)
  if not pairs:
    raise ValueError('no prompt has a response of every policy; lower --max_tokens.')
  left = len(records) - len({p.record['prompt_id'] for p in pairs})
  if left:
    judged.notes.append(
      f'{left} of {len(records)} prompts lack a response of some policy and are left out'
    )
  return pairs


def export(pairs: list, options: argparse.Namespace) -> None:
  """Writes the sheet for people to judge."""
  from alignjax.evals.preference import judgments
  from alignjax.runtime import files

  key = judgments.export(pairs, files.folder(options.export), options.seed)
  print(f'{options.export}: {len(pairs)} pairs to judge; {key} names their policies', flush=True)


def summarize(
  judged,
  options: argparse.Namespace,
  policies: dict[str, str],
  records: list[dict],
  responses: dict[str, list],
) -> dict:
  """Returns the contents of preference.json."""
  from alignjax.evals import stats
  from alignjax.evals.preference import statistics

  judged_names = (name for v in judged.verdicts for name in sorted((v.a, v.b)))
  names = list(policies) or list(dict.fromkeys(judged_names))
  baseline = options.baseline or names[0]
  if baseline not in names:
    raise ValueError(f'--baseline={baseline} is none of the policies {", ".join(names)}.')
  texts = {
    (r['prompt_id'], n): a.text
    for n, answers in responses.items()
    for r, a in zip(records, answers, strict=True)
    if a.text is not None
  }
  for at, text in judged.texts.items():
    if texts.setdefault(at, text).strip() != text.strip():
      raise ValueError(
        f'the judgments are of another response of {at[1]!r} to the prompt {at[0]!r} than the one '
        'sampled with these --temperature, --max_tokens and --seed.'
      )
  # Judgments of the same prompt are not independent, whatever its records are called.
  judged.prompts.update({r['prompt_id']: r['prompt'] for r in records})
  result = statistics.summarize(judged, names, baseline, texts)
  result |= dict(
    notes=judged.notes, options={k: v for k, v in vars(options).items() if v is not None}
  )
  if responses:
    result['ended'] = {
      n: stats.interval([a.ended for a in answers if a.text is not None], bounds=(0, 1))
      for n, answers in responses.items()
    }
  return result


def write(result: dict, out: pathlib.Path) -> None:
  """Writes preference.json, .md and .png, and prints the notes and a short table."""
  from alignjax.evals.preference import page
  from alignjax.runtime import files, metrics

  out.mkdir(parents=True, exist_ok=True)
  files.write(out / 'preference.json', json.dumps(result, indent=1))
  files.write(out / 'preference.md', page.markdown(result, result['notes']))
  page.plot(result, out / 'preference.png')
  for note in result['notes']:
    print(note, flush=True)

  def short(figure):
    return '-' if not figure or figure['mean'] is None else f'{figure["mean"]:.3f}'

  def cell(judge, policy):
    rate = judge['win_rate'][policy].get(result['baseline'])
    return f'{short(rate)} ({short(judge["bradley_terry"][policy])})'

  metrics.print_table(
    f'{out}/preference.md: win rate against {result["baseline"]} (strength)',
    ('policy', *result['judges']),
    [(p, *(cell(judge, p) for judge in result['judges'].values())) for p in result['policies']],
  )


def check(
  options: argparse.Namespace,
) -> tuple[dict[str, str], list[tuple[str, str]], pathlib.Path]:
  """Returns (policies, judges as (kind, rest), out), after checking the flags before anything
  runs."""
  from alignjax.evals.preference import judges
  from alignjax.evals.preference.responses import trained
  from alignjax.runtime import failures, files

  policies = command.pairs(options.policies, '--policies')
  kinds = [judges.split(spec) for spec in dict.fromkeys(options.judge)]
  if not kinds and not options.export:
    raise ValueError(
      f'--judge is missing: give {judges.FORMS}; or --export=FILE for people to judge.'
    )
  alone = any(kind == 'file' for kind, _ in kinds) and not options.export
  if len(policies) == 1 or not policies and not alone:
    raise ValueError(
      f'--policies={options.policies}: a preference is between two policies or more, '
      f'NAME=MODEL,NAME=MODEL.'
    )
  if policies and not options.prompts:
    raise ValueError('--prompts names no prompts for the policies to answer.')
  if options.baseline and policies and options.baseline not in policies:
    raise ValueError(
      f'--baseline={options.baseline} is none of the policies {", ".join(policies)}.'
    )
  for name in ('limit', 'max_tokens', 'rows', 'judge_workers'):
    if getattr(options, name) is not None and getattr(options, name) < 1:
      raise ValueError(f'--{name} must be 1 or more.')
  if options.temperature < 0:
    raise ValueError('--temperature must not be negative.')
  if any(kind == 'openai' for kind, _ in kinds):
    endpoint('', options)
  if any(kind == 'sandbox' for kind, _ in kinds) and trained(policies)[0] is None:
    raise ValueError(
      '--judge=sandbox needs policies that were trained in the sandbox; these were not.'
    )
  out = files.folder(options.out)
  failures.check_writable(out, '--out')
  return policies, kinds, out


def sample(
  options: argparse.Namespace, policies: dict[str, str], records: list[dict], out: pathlib.Path
) -> dict[str, list]:
  from alignjax.evals.preference import responses
  from alignjax.inference import loading

  made = {}
  for name, spec in policies.items():
    model = loading.load(spec, 'lm', options.template, dtype=options.dtype)
    most = options.max_tokens or responses.trained(policies)[1]
    made[name] = responses.respond(
      model,
      loading.fingerprint(model),
      records,
      out / 'responses',
      name=name,
      rows=options.rows,
      temperature=options.temperature,
      max_tokens=most,
      seed=options.seed,
    )
    del model
  return made


def ask(
  kind: str,
  spec: str,
  pairs: list,
  options: argparse.Namespace,
  world: dict | None,
  folder: pathlib.Path,
):
  """Returns the verdicts of one judge on the pairs."""
  from alignjax import plugins
  from alignjax.evals.preference import judges, openai_judge
  from alignjax.inference import loading

  if kind == 'sandbox':
    return judges.sandbox(pairs, world)
  if kind == 'rm':
    model = loading.load(spec, 'scalar', options.judge_template, dtype=options.dtype)
    return judges.reward_model(
      pairs, model, loading.fingerprint(model), folder, f'rm:{spec}', options.rows
    )
  if kind == 'openai':
    text = instructions(options) or openai_judge.INSTRUCTIONS
    return openai_judge.judge(
      pairs, endpoint(spec, options), folder, f'openai:{spec}', text, options.judge_workers
    )
  return judges.own(pairs, plugins.find(spec, '--judge'), folder, spec)


def endpoint(model: str, options: argparse.Namespace):
  from alignjax.evals.preference import openai_judge

  variable = options.judge_key_env or 'OPENAI_API_KEY'
  key = os.environ.get(variable)
  if not key and (options.judge_key_env or not options.judge_url):
    raise ValueError(
      f'--judge=openai: needs a key, but the environment variable {variable} is not set. Name '
      'another variable by --judge_key_env=NAME, or a server without keys by --judge_url=URL.'
    )
  url = options.judge_url or openai_judge.URL
  if not url.startswith(('http://', 'https://')):
    raise ValueError(f'--judge_url={url} must begin with http:// or https://.')
  try:
    body = json.loads(options.judge_body)
  except json.JSONDecodeError as error:
    raise ValueError(f'--judge_body={options.judge_body} is not JSON ({error.msg}).') from None
  if not isinstance(body, dict):
    raise ValueError(f'--judge_body={options.judge_body} is not a JSON object.')
  instructions(options)
  openai_judge.library()
  return openai_judge.Endpoint(url, key, model, body)


def instructions(options: argparse.Namespace) -> str | None:
  from alignjax.runtime import textfiles

  return (
    textfiles.read(options.judge_instructions, '--judge_instructions=')
    if options.judge_instructions
    else None
  )
