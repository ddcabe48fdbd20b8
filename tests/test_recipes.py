"""A recipe's `:tiny` from a small checkpoint and files to trained stages; export.py and generate.py
on what it leaves."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from alignjax import train
from alignjax.commands import export
from alignjax.commands import generate as command
from alignjax.configs import llama3_8b, llama3_8b_lora, pythia_1b_hh, smollm2_135m
from alignjax.data import hygiene
from alignjax.evals.table import Cell
from alignjax.inference import loading, streaming
from alignjax.models import hf
from alignjax.models.config import TransformerConfig
from alignjax.runtime import metrics
from alignjax.sampling import generate

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHAT = ROOT / 'tests' / 'golden' / 'chat'


def write(path, rows):
  path.write_text('\n'.join(map(json.dumps, rows)))
  return f'jsonl:{path}'


def parts(model, *, data, limit, seed, keep):
  """A task of a fork: the sum of a norm's scale."""
  return [Cell('sum', '', [float(model.params['final']['norm']['scale'].sum())], ['all'])]


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('recipe')
  c = smollm2_135m.get_config('tiny')
  c.checkpoint = f'hf:{CHAT}'
  c.model.max_length = 256
  rng = np.random.default_rng(0)
  word = lambda: ''.join(rng.choice(list('abcdefg '), 6))
  c.data.demonstrations = write(
    folder / 'd.jsonl', [dict(instruction=word(), context='', response=word()) for _ in range(16)]
  )
  c.data.prompts = c.data.demonstrations
  c.data.comparisons = write(
    folder / 'c.jsonl',
    [
      dict(
        instruction=word(),
        completions=[dict(response=word(), overall_score=int(s)) for s in rng.integers(0, 5, 4)],
      )
      for _ in range(24)
    ],
  )
  (folder / 'p.txt').write_text(' '.join(word() for _ in range(200)))
  c.data.pretrain = f'text:{folder / "p.txt"}'
  one = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as m:
    m.setattr(jax, 'devices', lambda *_: one)
    m.syspath_prepend(str(ROOT / 'tests'))
    m.setitem(sys.modules, 'test_recipes', sys.modules[__name__])
    c.report.tasks = ('no_task',)
    with pytest.raises(ValueError, match="no task 'no_task'"):
      train.main(c, folder / 'run')
    assert not (folder / 'run').exists()
    c.report.tasks = ('test_recipes:parts',)
    train.main(c, folder / 'run')
  return folder / 'run'


@pytest.mark.slow
def test_a_run_ends_with_its_evaluations(workdir):
  made = json.loads((workdir / 'evaluation' / 'table.json').read_text())
  assert (
    list(made['models']) == ['pretrained', 'sft', 'ppo_ptx'] and made['baseline'] == 'pretrained'
  )
  assert made['rows'][0]['task'] == 'test_recipes:parts'
  assert made['rows'][0]['models']['ppo_ptx']['difference']['n'] == 1


@pytest.mark.slow
def test_a_recipe_runs_from_a_checkpoint_and_files(workdir):
  for stage, loss in (('sft', 'sft/loss'), ('rm', 'rm/loss'), ('ppo_ptx', 'ppo/loss/ptx')):
    assert np.isfinite(metrics.read(workdir / stage / 'metrics.jsonl')[loss]).all()
  log = metrics.read(workdir / 'ppo_ptx' / 'metrics.jsonl')
  assert (log['ppo/ratio_max_dev'] == 0).all() and log['objective/kl'][0] == pytest.approx(
    0, abs=1e-5
  )
  info = json.loads((workdir / 'rm' / 'final' / 'info.json').read_text())
  config = json.loads((workdir / 'rm' / 'checkpoints' / 'config.json').read_text())['data']
  lines = pathlib.Path(config['comparisons'].removeprefix('jsonl:')).read_text().split('\n')
  raw = [json.loads(line)['instruction'] for line in lines if line]
  held = sum(hygiene.held_out(prompt, **config['heldout']) for prompt in raw)
  assert (
    0 < held < 24
    and info['prompts'] <= 24 - held
    and 0 <= info['accuracy_heldout_prompts']['mean'] <= 1
  )


@pytest.mark.slow
def test_export_is_what_was_trained(workdir, tmp_path, capsys):
  for stage, head in (('ppo_ptx', 'lm'), ('rm', 'scalar')):
    export.main([f'--model={workdir / stage}', f'--out={tmp_path / stage}', '--bias=keep'])
    model, back = loading.load(str(workdir / stage)), loading.load(f'hf:{tmp_path / stage}', head)
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(back.params), strict=True):
      np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert back.tokenizer.chat_template == model.tokenizer.chat_template
  assert 'wrote' in capsys.readouterr().out
  assert json.loads((tmp_path / 'rm' / 'config.json').read_text())['pad_token_id'] == 259
  for arguments, words in (
    ([f'--model={workdir / "rm"}', f'--out={tmp_path / "rm"}'], 'already exists'),
    ([f'--model={workdir}', '--out=x'], 'Its folder has the stages ppo_ptx, rm, sft'),
  ):
    with pytest.raises((ValueError, OSError), match=words):
      export.main(arguments)


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize('temperature', [0, 0.8])
def test_streamed_text_is_that_of_generate(workdir, temperature):
  """Decode one by one on the host == the scanned loop, greedy and sampled."""
  model = loading.load(str(workdir / 'sft'), 'lm')
  for seed in range(3):
    prompt = 'abc def ' * (seed + 1)
    text = ''.join(
      streaming.stream(model, prompt, temperature=temperature, max_tokens=24, seed=seed)
    )
    tokens = np.asarray([model.template.prompt(prompt)], np.int32)
    out = generate(
      model.nets.decoder,
      model.params,
      tokens,
      tokens >= 0,
      jax.random.key(seed),
      max_tokens=24,
      stop_ids=model.template.ends,
      temperature=temperature,
    )
    assert (
      text
      == model.template.decode_response(np.asarray(out.responses)[0][np.asarray(out.mask)[0]])[0]
    )


@pytest.mark.slow
def test_generate_prints_text_and_best_of_is_the_best(workdir, capsys, tmp_path):
  common = [f'--model={workdir / "ppo_ptx"}', '--max_tokens=8', '--seed=3']
  command.main([*common, '--prompt=abc', '--temperature=0'])
  one = capsys.readouterr().out
  (tmp_path / 'prompts.txt').write_text('abc\n\nabc\n')
  command.main([*common, f'--prompts_file={tmp_path}/prompts.txt', '--temperature=0'])
  assert capsys.readouterr().out == one * 2
  command.main([*common, '--prompt=abc', '--best_of=4', f'--reward_model={workdir / "rm"}'])
  best = capsys.readouterr().out
  policy, reward = loading.load(str(workdir / 'ppo_ptx')), loading.load(str(workdir / 'rm'))
  texts, scores = streaming.ranked(policy, reward, 'abc', 4, max_tokens=8, seed=3)
  assert best == texts[int(np.argmax(scores))] + '\n' and len(set(scores.tolist())) > 1
  compiled = streaming._sampler.cache_info().misses
  streaming.ranked(policy, reward, 'xyz', 4, max_tokens=8, seed=4)
  assert streaming._sampler.cache_info().misses == compiled, 'every prompt is compiled again'
  for arguments, words in (
    ([f'--model={workdir / "rm"}', '--prompt=x'], 'is a reward model, not a policy'),
    ([*common, '--prompts_file=/nowhere.txt'], 'no such file'),
    (
      [f'--model=hf:{CHAT}', '--prompt=x', '--best_of=2', f'--reward_model=hf:{CHAT}'],
      'is not a reward model',
    ),
  ):
    with pytest.raises((ValueError, OSError), match=words):
      command.main(arguments)


@pytest.mark.slow
def test_a_session_in_a_pipe_remembers_with_chat(workdir):
  run = subprocess.run(
    [
      sys.executable,
      str(ROOT / 'experiments/generate.py'),
      f'--model={workdir / "sft"}',
      '--chat',
      '--max_tokens=4',
      '--temperature=0',
    ],
    input='abc\n/new\nabc\nabc\n\nnever\n',
    capture_output=True,
    text=True,
    check=True,
  )
  lines = run.stdout.split('\n')
  assert lines[0] == lines[1] and len(lines) >= 3


@pytest.mark.parametrize(
  'flags,words',
  [
    (['--temperature=-1'], 'must not be negative'),
    (['--top_p=0'], r'must lie in \(0, 1\]'),
    (['--top_k=0'], '1 or more'),
    (['--best_of=4'], 'belong together'),
    (['--best_of=4', '--reward_model=x', '--temperature=0'], 'above 0'),
    (['--max_tokens=0'], '1 or more'),
  ],
)
def test_flags_that_cannot_be(flags, words, capsys):
  with pytest.raises(SystemExit):
    command.main(['--model=hf:x', '--prompt=y', *flags])
  assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize('config', [smollm2_135m, pythia_1b_hh, llama3_8b, llama3_8b_lora])
@pytest.mark.parametrize('size', ['default', 'tiny'])
def test_every_recipe_builds(config, size):
  c = config.get_config(size)
  assert train.resolve(c) == ['sft', 'rm', 'ppo_ptx']
  c.checkpoint = 'hf:other'
  assert c.model.source == c.data.tokenizer == c.stages.sft.init.policy == 'hf:other'


def test_a_context_that_is_too_short_is_refused():
  model = loading.load(f'hf:{CHAT}')
  with pytest.raises(
    ValueError, match='the prompt has 600 tokens; with max_tokens=100 the context of 512 leaves 412'
  ):
    next(streaming.stream(model, 'x' * 600, max_tokens=100))
  assert model.cfg == TransformerConfig(**hf.fields(CHAT), unused_ids=((260, 264),))
