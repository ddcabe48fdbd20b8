"""Talks to a model: a stage of a run, or a Hugging Face checkpoint.

    alignjax generate --model=hf:FOLDER_OR_HUB_NAME --chat --prompt='What is the capital of France?'
    alignjax generate --model=runs/smollm2_135m-s0/ppo_ptx          asks for prompts
    alignjax generate --model=runs/ppo_ptx-s0/ppo_ptx --prompts_file=prompts.txt
    alignjax generate --model=runs/ppo_ptx-s0/sft --best_of=8 --reward_model=runs/ppo_ptx-s0/rm

Without --prompt and --prompts_file the command reads prompts from the terminal until an empty line
or Ctrl-D. With --chat it remembers the conversation ('/new' begins another one), and Ctrl-C stops
an answer. From a pipe it reads one prompt per line and skips blank lines. In a terminal, tokens
appear as they are sampled, and a note reports a response that was cut at the limit. Into a pipe the
command writes only plain text, one response after the other.
"""

import argparse
import math
import sys
from collections.abc import Iterator

from alignjax.commands import command


def arguments(argv: list[str]) -> argparse.Namespace:
  parser = command.make_parser(__name__)
  parser.add_argument(
    '--model',
    required=True,
    help="'hf:FOLDER_OR_HUB_NAME', 'peft:FOLDER_OR_HUB_NAME' for adapters of one, or the folder of "
    'a finished stage, WORKDIR/STAGE',
  )
  where = parser.add_mutually_exclusive_group()
  where.add_argument('--prompt', help='one prompt')
  where.add_argument(
    '--prompts_file',
    help='a file with one prompt per line, or .jsonl or .json records with "prompt"',
  )
  parser.add_argument('--chat', action='store_true', help="apply the tokenizer's chat template")
  parser.add_argument('--temperature', type=float, default=1.0, help='0 is greedy')
  parser.add_argument(
    '--top_p', type=float, help='sample from the smallest set of tokens with this probability'
  )
  parser.add_argument('--top_k', type=int, help='sample from this many most likely tokens')
  parser.add_argument(
    '--max_tokens',
    type=int,
    help='tokens per answer; default: as in training, or 128 for hf:, and never more than the '
    'prompt leaves of the context',
  )
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--best_of',
    type=int,
    default=1,
    help='responses per prompt, of which --reward_model selects the best',
  )
  parser.add_argument('--reward_model', help="'hf:...' or the folder of a finished stage")
  options = parser.parse_args(argv)
  checks = [
    (not 0 <= options.temperature < math.inf, '--temperature must not be negative, and a number'),
    (options.max_tokens is not None and options.max_tokens < 1, '--max_tokens must be 1 or more'),
    (not 0 <= options.seed < 2**31, f'--seed={options.seed} must lie in [0, 2^31)'),
    (not is_text(options.prompt or ''), '--prompt is not UTF-8'),
    (options.top_p is not None and not 0 < options.top_p <= 1, '--top_p must lie in (0, 1]'),
    (options.top_k is not None and options.top_k < 1, '--top_k must be 1 or more'),
    (options.best_of < 1, '--best_of must be 1 or more'),
    (
      (options.best_of > 1) != bool(options.reward_model),
      '--best_of and --reward_model belong together',
    ),
    (options.best_of > 1 and options.temperature == 0, '--best_of needs a --temperature above 0'),
  ]
  for wrong, message in checks:
    if wrong:
      parser.error(message)
  return options


def is_text(text: str) -> bool:
  """Returns whether the text has no bytes that are not UTF-8, which Python reads as halves of
  surrogate pairs."""
  return not any('\ud800' <= c <= '\udfff' for c in text)


def main(argv: list[str]) -> None:
  options = arguments(argv)
  try:
    run(options)
  except KeyboardInterrupt:
    note('')
    raise SystemExit(130) from None


def note(text: str) -> None:
  """Prints a note for the person at the terminal, which a pipe does not get."""
  if sys.stderr.isatty():
    print(text, file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> None:
  # The prompts are checked before a model is loaded.
  prompts = read_prompts(options.prompts_file) if options.prompts_file else None
  note(f'loading {options.model} ...')
  from alignjax.inference import loading, streaming

  form = 'chat' if options.chat else None
  model = loading.load(options.model, 'lm', form)
  reward = loading.load(options.reward_model, 'scalar', form) if options.reward_model else None
  compiled = set()

  def starting(slots):
    if slots not in compiled:
      note(f'compiling for {slots} tokens ...')
    compiled.add(slots)

  def answer(prompt, seed):
    """Prints a response and returns it."""
    limit: list[int] = []
    how = dict(
      temperature=options.temperature,
      top_p=options.top_p,
      top_k=options.top_k,
      max_tokens=options.max_tokens,
      seed=seed,
      starting=starting,
      cut=limit.append,
    )
    terminal, text = sys.stdout.isatty() and reward is None, ''
    for piece in (
      [streaming.best_of(model, reward, prompt, options.best_of, **how)]
      if reward
      else streaming.stream(model, prompt, **how)
    ):
      text += piece
      if terminal:
        print(piece, end='', flush=True)
    print('' if terminal else text, flush=True)
    if limit:
      note(f'(cut at {limit[0]} tokens, the limit; --max_tokens sets another)')
    return text

  if options.prompt is not None:
    answer(options.prompt, options.seed)
  elif prompts is not None:
    for i, prompt in enumerate(prompts):
      answer(prompt, options.seed + i)
  else:
    session(answer, options)


def session(answer, options) -> None:
  """Answers prompts from the terminal, or from a pipe, one per line."""
  live = sys.stdin.isatty()
  messages: list[dict] = []
  turn = options.seed
  for text in lines(live):
    if text.strip() == '/new':
      messages = []
      continue
    conversation = [*messages, {'role': 'user', 'content': text}]
    try:
      reply = answer(conversation if options.chat else text, turn)
    except (
      KeyboardInterrupt,
      ValueError,
    ) as error:  # The conversation continues without this turn.
      if not live:
        raise
      note(
        f'error: {error}'
        if isinstance(error, ValueError)
        else '\n(stopped; not part of the conversation)'
      )
      continue
    messages = [*conversation, {'role': 'assistant', 'content': reply}]
    turn += 1


def lines(live: bool) -> Iterator[str]:
  """Yields the lines of a terminal until an empty line or its end, or the lines of a pipe that are
  not blank."""
  from alignjax.runtime import textfiles

  if not live:
    for number, raw in enumerate(sys.stdin.buffer, 1):  # Only "\n" ends a line.
      text = textfiles.decode(raw, 'standard input', number).removesuffix('\n').removesuffix('\r')
      if text.strip():
        yield text
    return
  while True:
    try:
      if sys.stdout.isatty():
        text = input('> ')
      else:  # `input('> ')` would write the mark into the pipe.
        print('> ', end='', file=sys.stderr, flush=True)
        text = input()
    except (EOFError, KeyboardInterrupt):
      note('')
      return
    if not text.strip():
      return
    if not is_text(text):
      note('error: this is not UTF-8.')
      continue
    yield text


def read_prompts(path: str) -> list:
  from alignjax.data import fields, sources
  from alignjax.runtime import textfiles

  if path.lower().removesuffix('.gz').endswith(('.jsonl', '.json')):
    return [r['prompt'] for r in sources.read('jsonl:' + path.replace(';', '\\;'), 'prompts')]
  prompts = []
  for number, line in enumerate(textfiles.lines(textfiles.read(path, '--prompts_file=')), 1):
    where = f'--prompts_file={path}, line {number}'
    if line.startswith('[{'):
      prompts.append(
        fields.check({'prompt': textfiles.parse(line, where)}, 'prompts', where)['prompt']
      )
    elif line.strip():
      prompts.append(line)
  if not prompts:
    raise ValueError(f'--prompts_file={path} has no prompts.')
  return prompts
