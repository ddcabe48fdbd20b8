"""Talks to a model: a stage of a run, or a Hugging Face checkpoint.

    python experiments/generate.py --model=hf:FOLDER_OR_HUB_NAME --chat --prompt='What is the capital of France?'
    python experiments/generate.py --model=runs/smollm2_135m-s0/ppo_ptx                     a session
    python experiments/generate.py --model=runs/ppo_ptx-s0/ppo_ptx --prompts_file=prompts.txt
    python experiments/generate.py --model=runs/ppo_ptx-s0/sft --best_of=8 --reward_model=runs/ppo_ptx-s0/rm

Without --prompt and --prompts_file it reads prompts from the terminal until an empty line or Ctrl-D; with --chat it remembers
the conversation ('/new' forgets it). In a terminal tokens appear as they are sampled; into a pipe goes plain text, one response
after the other, and nothing else.
"""

import argparse
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
  sys.path.insert(0, str(HERE.parent))

from experiments import command  # noqa: E402  after the path


def arguments(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', required=True, help="'hf:FOLDER_OR_HUB_NAME', or a finished stage's folder, WORKDIR/STAGE")
  where = parser.add_mutually_exclusive_group()
  where.add_argument('--prompt', help='one prompt')
  where.add_argument('--prompts_file', help='a prompt a line, or .jsonl records with "prompt"')
  parser.add_argument('--chat', action='store_true', help="apply the tokenizer's chat template")
  parser.add_argument('--temperature', type=float, default=1.0, help='0 is greedy')
  parser.add_argument('--top_p', type=float, help='smallest set of tokens of this probability')
  parser.add_argument('--top_k', type=int, help='this many most likely tokens')
  parser.add_argument('--max_tokens', type=int, default=128)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--best_of', type=int, default=1, help='responses a prompt, of which --reward_model keeps the best')
  parser.add_argument('--reward_model', help="'hf:...' or a finished stage's folder")
  options = parser.parse_args(argv)
  checks = [(options.temperature < 0, '--temperature must not be negative'),
            (options.max_tokens < 1, '--max_tokens must be 1 or more'),
            (options.top_p is not None and not 0 < options.top_p <= 1, '--top_p must lie in (0, 1]'),
            (options.top_k is not None and options.top_k < 1, '--top_k must be 1 or more'),
            (options.best_of < 1, '--best_of must be 1 or more'),
            ((options.best_of > 1) != bool(options.reward_model), '--best_of and --reward_model belong together'),
            (options.best_of > 1 and options.temperature == 0, '--best_of needs a --temperature above 0')]
  for wrong, message in checks:
    if wrong:
      parser.error(message)
  return options


def main(argv: list[str]) -> None:
  options = arguments(argv)
  try:
    from alignjax.evals import talk
    from alignjax.stages import finished
    form = 'chat' if options.chat else None
    if sys.stderr.isatty():
      print(f'loading {options.model} ...', file=sys.stderr, flush=True)
    model = finished.load(options.model, 'lm', form)
    reward = finished.load(options.reward_model, 'scalar', form) if options.reward_model else None
    kwargs = dict(temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, max_tokens=options.max_tokens)
    terminal = sys.stdout.isatty()

    def answer(prompt, seed):
      if reward is not None:
        text = talk.best_of(model, reward, prompt, options.best_of, seed=seed, **kwargs)
        print(text, flush=True)
        return text
      text = ''
      for piece in talk.stream(model, prompt, seed=seed, **kwargs):
        text += piece
        if terminal:
          print(piece, end='', flush=True)
      print('' if terminal else text, flush=True)
      return text

    if options.prompt is not None:
      answer(options.prompt, options.seed)
    elif options.prompts_file:
      for i, prompt in enumerate(read_prompts(options.prompts_file)):
        answer(prompt, options.seed + i)
    else:
      session(answer, options)
  except (ValueError, FileNotFoundError) as error:
    raise SystemExit(f'error: {error}') from None


def session(answer, options) -> None:
  """Prompts from the terminal (or a pipe), one a line."""
  messages: list[dict] = []
  turn = options.seed
  while True:
    try:
      said = input('> ' if sys.stdin.isatty() else '')
    except (EOFError, KeyboardInterrupt):
      return
    if not said.strip():
      return
    if said.strip() == '/new':
      messages = []
      continue
    messages.append({'role': 'user', 'content': said})
    reply = answer(messages if options.chat else said, turn)
    messages.append({'role': 'assistant', 'content': reply})
    turn += 1


def read_prompts(path: str) -> list:
  if path.endswith(('.jsonl', '.jsonl.gz')):
    from alignjax.data import sources
    return [r['prompt'] for r in sources.read(f'jsonl:{path}', 'prompts')]
  from alignjax import files
  file = files.folder(path)
  if not file.exists():
    raise FileNotFoundError(f'--prompts_file={path}: no such file.')
  prompts = [line for line in file.read_text().splitlines() if line.strip()]
  if not prompts:
    raise ValueError(f'--prompts_file={path}: no prompts.')
  return [json.loads(p) if p.startswith('[{') else p for p in prompts]


if __name__ == '__main__':
  command.start(main, sys.argv[1:], ends_with_reader=True)
