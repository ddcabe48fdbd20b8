# ruff: noqa: E501  an edit stands in one line
"""Puts bugs into the code, one at a time, and looks whether a test fails.

  python tests/mutations.py                            the 25 of the correctness checklist and others by hand, some minutes
  python tests/mutations.py 1 8 23                     these
  python tests/mutations.py --generated=60 --seed=0    60 of those that tests/mutants.py makes of the numeric files, an hour
  python tests/mutations.py --generated=9 --files=ops.py,losses.py

Each is an edit of a copy of the project and the tests that carry the item's number, or that TESTS
names for the file. Prints a table; ends with 1 where one was not caught and EQUIVALENT gives no
reason.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import mutants  # noqa: E402  after the path

# item: (the bug, file, what stands there, what stood there when it was wrong, where its tests are)
MUTATIONS = {
  1: (
    'the score lands on the last column',
    'ops.py',
    'is_last = mask & (live_after == 1)',
    'is_last = jnp.zeros_like(mask).at[:, -1].set(True)',
    'test_ops',
  ),
  2: (
    'a missing end is read off the length',
    'rollout.py',
    'missing_end_penalty * ~sampled.ended',
    'missing_end_penalty * mask.all(-1)',
    'test_rollout',
  ),
  3: (
    'weights by comparing ids with pad',
    'data/encode.py',
    '    weights[i, len(p) : len(p) + len(r)] = 1.0\n  weights[:, 0]',
    '    weights[i, len(p) : len(p) + len(r)] = [float(x != pad) for x in r]\n  weights[:, 0]',
    'test_data test_losses',
  ),
  4: (
    'decoding runs to the limit',
    'sampling.py',
    'return (t < stop) & (jnp.max(jnp.sum(~rows.out.ended.reshape(parts, -1), axis=1)) > leave)',
    'return t < stop',
    'test_sampling',
  ),
  5: (
    'positions count pads',
    'ops.py',
    'return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1, 0)',
    'return jnp.broadcast_to(jnp.arange(mask.shape[-1]), mask.shape)',
    'test_transformer',
  ),
  6: (
    'the reward is read at the last column',
    'losses.py',
    'scores = ops.last_live(values.reshape(b, k, t), batch.mask)',
    'scores = values.reshape(b, k, t)[..., -1]',
    'test_losses',
  ),
  7: (
    'an end is forced at the limit',
    'sampling.py',
    '    live = ~ended\n',
    '    live = ~ended\n    token = jnp.where(t == max_tokens - 1, stop_ids[0] if stop_ids else '
    'token, token)\n',
    'test_sampling',
  ),
  8: (
    "the sampler's log-probabilities go into the ratio",
    'rollout.py',
    '*rows, logprobs=logprobs,',
    '*rows, logprobs=sampled.logprobs + 1e-4 * mask,',
    'test_rollout test_sharding',
  ),
  9: (
    'scoring without the temperature',
    'rollout.py',
    "nets.logprobs(params['policy'], tokens, token_mask, temperature=temperature)",
    "nets.logprobs(params['policy'], tokens, token_mask)",
    'test_rollout',
  ),
  10: (
    'weights normalised by microbatch',
    'steps.py',
    'return jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key, nets=nets)',
    'return jax.value_and_grad(loss_fn, has_aux=True)(params, batch.normalized(), key, nets=nets)',
    'test_losses test_steps',
  ),
  11: (
    'whitening by row',
    'ops.py',
    '  mean = masked_mean(x, mask)\n  whitened = (x - mean) * jax.lax.rsqrt(masked_variance(x, '
    'mask) + 1e-8)',
    '  mean = jax.vmap(masked_mean)(x, mask)[:, None]\n  whitened = (x - mean) * '
    'jax.lax.rsqrt(jax.vmap(masked_variance)(x, mask)[:, None] + 1e-8)',
    'test_ops test_sharding',
  ),
  12: (
    'deltas over pads',
    'ops.py',
    'deltas = jnp.where(mask, rewards + gamma * next_values - values, 0.0)',
    'deltas = rewards + gamma * next_values - values + ~mask',
    'test_ops',
  ),
  13: (
    'integer rewards are taken',
    'rollout.py',
    'if not jnp.issubdtype(scores.dtype, jnp.floating):',
    'if False:',
    'test_rollout',
  ),
  14: (
    'the same key in every step',
    'stages/ppo_ptx.py',
    'key = jax.random.fold_in(key, state.step)',
    'pass',
    'test_sharding',
  ),
  15: (
    'gradients through advantages',
    'losses.py',
    'advantages, returns = jax.lax.stop_gradient((batch.advantages, batch.returns))',
    'advantages, returns = batch.advantages, batch.returns',
    'test_losses',
  ),
  16: (
    'a ptx coefficient that does nothing',
    'losses.py',
    'loss = loss + ptx_coef * ptx_loss',
    'loss = loss + 0 * ptx_loss',
    'test_losses',
  ),
  17: (
    'one form of epsilon for both',
    'optim.py',
    'factor * m / (v**0.5 + eps)',
    '(m / (1 - b1**t)) / ((v / (1 - b2**t))**0.5 + eps)',
    'test_optim',
  ),
  18: (
    'a moving average in bfloat16',
    'steps.py',
    'e + (1 - ema_decay) * (p.astype(jnp.float32) - e)',
    '(e.astype(jnp.bfloat16) + (1 - ema_decay) * (p - e).astype(jnp.bfloat16)).astype(jnp.float32)',
    'test_steps',
  ),
  19: (
    'one divisor for all prompts',
    'losses.py',
    'all_pairs = jnp.maximum(present * (present - 1) / 2, 1.0)',
    'all_pairs = jnp.full_like(present, k * (k - 1) / 2)',
    'test_losses',
  ),
  20: (
    'test entities in training prompts',
    'sandbox/instructions.py',
    '  entities = world.entities[split]\n  # Few',
    "  entities = world.entities[split] + world.entities['test']\n  # few",
    'test_sandbox',
  ),
  21: (
    'the held-out pool is the training pool',
    'sandbox/labelers.py',
    'self.train, self.heldout = np.arange(train), np.arange(train, count)',
    'self.train, self.heldout = np.arange(train), np.arange(train)',
    'test_evals test_sandbox',
  ),
  22: (
    'a reward that is no model is ignored',
    'rollout.py',
    '  scores = reward_fn(*rows, nets=nets, frozen=frozen)',
    '  scores = model_reward(*rows, nets=nets, frozen=frozen)',
    'test_rollout',
  ),
  23: (
    'the data position is one step off after a restart',
    'train.py',
    '  step, state = restored\n',
    '  step, state = restored[0] + 1, restored[1]\n',
    'test_train',
  ),
  24: (
    'weights are gathered for every token',
    'models/transformer.py',
    "whole = constrain_weights(\n    {'embed': params['embed'], 'final': params['final'], "
    "'unstacked': layers}\n  )",
    "whole = {'embed': params['embed'], 'final': params['final'], 'unstacked': layers}",
    'test_sharding',
  ),
  25: (
    'a decoded token stands at its cache slot',
    'models/transformer.py',
    'where = jnp.repeat(lengths, len(tokens) // len(lengths))[:, None] + cache.index',
    'where = jnp.full((len(tokens), 1), cache.prompt_mask.shape[1]) + cache.index',
    'test_transformer',
  ),
  # of no item: bugs that once no test saw
  26: (
    'the KL penalty is a bonus',
    'stages/ppo_ptx.py',
    'rollout.logprobs, rollout.ref_logprobs, rollout.mask, kl_coef',
    'rollout.ref_logprobs, rollout.logprobs, rollout.mask, kl_coef',
    'test_iteration',
  ),
  27: (
    'the adaptive KL coefficient is discarded',
    'stages/ppo_ptx.py',
    'jnp.where(finite, steered, kl_coef)',
    'jnp.where(finite, kl_coef, kl_coef)',
    'test_iteration',
  ),
  28: (
    "keep='ema' keeps the policy",
    'stages/ppo_ptx.py',
    "'ema': state.ema}[keep]",
    "'ema': state.params['policy']}[keep]",
    'test_iteration',
  ),
  29: (
    'later inner epochs are not shuffled',
    'stages/ppo_ptx.py',
    'orders.at[0].set(jnp.arange(count))',
    'orders.at[:].set(jnp.arange(count))',
    'test_iteration',
  ),
  30: (
    "the reward model's accuracy is of training prompts",
    'stages/comparisons.py',
    "cfg.policies[:1], cfg.evaluation_prompts, 'test')",
    "cfg.policies[:1], cfg.evaluation_prompts, 'train')",
    'test_heldout_prompts',
  ),
  31: (
    'the reference is scored without the temperature',
    'rollout.py',
    "nets.logprobs(frozen['ref'], tokens, token_mask, temperature=temperature)",
    "nets.logprobs(frozen['ref'], tokens, token_mask)",
    'test_iteration',
  ),
  32: (
    'the moving average is of the parameters before the update',
    'steps.py',
    "- e), ema, params['policy']",
    "- e), ema, state.params['policy']",
    'test_iteration',
  ),
  33: (
    'untied logits are rounded to bfloat16',
    'models/layers.py',
    'dot_general=to_float32, name',
    'name',
    'test_transformer',
  ),
  34: (
    'decay of stacked norms',
    'optim.py',
    "len(leaf.shape) - ('layers' in parents) > 1",
    'len(leaf.shape) > 1',
    'test_optim',
  ),
  35: (
    'a query that sees nothing sees all',
    'models/attention.py',
    'weights = jnp.where(visible, weights, 0.0)',
    'weights = jnp.where(visible, weights, 1.0 / visible.shape[-1])',
    'test_transformer',
  ),
  36: (
    'ids without a token are drawn',
    'models/transformer.py',
    'return _next_token_logits(cfg, weights, x, products.multiply)',
    'return _unembed(cfg, weights, x, products.multiply)',
    'test_transformer',
  ),
  37: (
    'packed episodes see each other',
    'packing.py',
    'jnp.arange(1, count + 1, dtype=jnp.int32)[:, None]',
    'jnp.ones(count, jnp.int32)[:, None]',
    'test_packing',
  ),
  38: (
    'a program runs that does not hold the live tokens',
    'packing.py',
    'fits = jnp.searchsorted(jnp.asarray(sizes), arrangement.rows)',
    'fits = jnp.searchsorted(jnp.asarray(sizes), arrangement.rows - 1)',
    'test_packing',
  ),
  39: (
    'scoring packs other rows than the update',
    'stages/ppo_ptx_plan.py',
    'cfg.rollout.episodes // (cfg.minibatches * cfg.microbatches)',
    'cfg.rollout.episodes // cfg.minibatches',
    'test_entries test_packing',
  ),
  41: (
    'a token reads pads',
    'models/attention.py',
    'return near & (mask[:, start:stop, None] == keys) & (keys > 0)',
    'return near & ((mask[:, start:stop, None] == keys) | (keys == 0))',
    'test_attention',
  ),
  42: (
    'pads stay on the left of rows that cuDNN reads',
    'models/transformer.py',
    'order = attention.pads_last(mask)',
    'order = attention.pads_last(jnp.ones_like(mask))',
    'test_attention',
  ),
  43: (
    'splash knows no documents',
    'models/attention.py',
    'kernels.SegmentIds(own.astype(jnp.int32), mask.astype(jnp.int32))',
    'kernels.SegmentIds(jnp.ones_like(own, jnp.int32), jnp.ones_like(mask, jnp.int32))',
    'test_attention',
  ),
  44: (
    'ids that lengthen a vocabulary have a probability',
    'models/transformer.py',
    'unused_ids=(*cfg.unused_ids, (cfg.vocab_size, size))',
    'unused_ids=cfg.unused_ids',
    'test_attention',
  ),
  45: (
    'backward products run in float32',
    'models/products.py',
    'return jax.vjp(product, a, b)[1](gradient.astype(dtype))',
    'return jax.tree.map(lambda x: x.astype(dtype), jax.vjp(product, *(x.astype(jnp.float32) '
    'for x in (a, b)))[1](gradient.astype(dtype)))',
    'test_attention',
  ),
  46: (
    'a cotangent is cast before it is complete',
    'ops.py',
    '  p = jnp.exp(logprobs)\n  grad = 0.0',
    '  p = jnp.exp(logprobs).astype(jnp.bfloat16).astype(jnp.float32)\n  grad = 0.0',
    'test_ops',
  ),
  50: (
    'a segment ends a check too late',
    'sampling.py',
    'return (t < stop) & ',
    'return (t < jnp.minimum(stop + chunk, max_tokens)) & ',
    'test_sampling',
  ),
  51: (
    'a row is halved away too early',
    'sampling.py',
    'leaves = [*sizes[1:], 0]',
    'leaves = [*(size + 1 for size in sizes[1:]), 0]',
    'test_sampling',
  ),
  52: (
    'a halved row draws the numbers of another',
    'sampling.py',
    'jax.tree.map(take, (rows.logits, rows.numbers, rows.out))',
    'jax.tree.map(take, (rows.logits, jnp.roll(rows.numbers, 1, 0), rows.out))',
    'test_sampling',
  ),
  53: (
    'a sample reads the cache of another prompt',
    'models/cached.py',
    'x = x.reshape(prompts, -1, *x.shape[1:]).swapaxes(1, 2)',
    'x = x.reshape(-1, prompts, *x.shape[1:]).swapaxes(0, 1).swapaxes(1, 2)',
    'test_sampling',
  ),
  60: (
    "an int8 cache's values lose their scales",
    'models/cached.py',
    '(weights * columns(values)).astype(v.dtype)',
    'weights.astype(v.dtype)',
    'test_transformer',
  ),
  61: (
    'the new vector of an int8 cache keeps the scale of the old slot',
    'models/cached.py',
    'kept = jax.tree.map(write, response, new)',
    'kept = tuple(r._replace(values=write(r.values, n.values)) if quantized else write(r, n) '
    'for r, n in zip(response, new))',
    'test_transformer',
  ),
  62: (
    'the logits of a likelihood are those of the position after',
    'inference/bulk.py',
    'where = np.minimum(positions[some], length - 1)',
    'where = np.minimum(positions[some] + 1, length - 1)',
    'test_bulk',
  ),
  54: (
    'a token is drawn by the share of another block',
    'sampling.py',
    'place, _ = _invert(jnp.exp(chosen - largest), u)',
    'place, _ = _invert(jnp.exp(chosen - largest), jnp.zeros_like(u))',
    'test_sampling',
  ),
  55: (
    'a window is one token too wide in a decoding step',
    'models/cached.py',
    'filled &= index - slots < window',
    'filled &= index - slots <= window',
    'test_transformer',
  ),
  56: (
    'a decoding step takes the rotary base of the layers without a window',
    'models/transformer.py',
    'x, angles[windowed], cache.prompt_mask',
    'x, angles[False], cache.prompt_mask',
    'test_transformer',
  ),
  57: (
    'a chunk of queries lacks the first key of its window',
    'models/attention.py',
    'first = 0 if window is None else max(before + start - window + 1, 0)',
    'first = 0 if window is None else max(before + start - window + 2, 0)',
    'test_attention',
  ),
  63: (
    'keys are rotated by a part too few',
    'models/sequence.py',
    'end = (jax.lax.axis_index(AXIS) + 1) * q.shape[1]',
    'end = jax.lax.axis_index(AXIS) * q.shape[1]',
    'test_sequence',
  ),
  64: (
    'the later tokens of other devices are not hidden',
    'models/sequence.py',
    'mask * earlier[None]',
    'mask',
    'test_sequence',
  ),
  65: (
    'splash counts the queries of a device from 0',
    'models/attention.py',
    'masks.CausalMask(shape, before)',
    'masks.CausalMask(shape, 0)',
    'test_sequence',
  ),
  66: (
    'cuDNN sees later tokens where devices share a row',
    'models/attention.py',
    'visible &= distance >= 0',
    'visible &= distance >= -before',
    'test_sequence',
  ),
  67: (
    'a window counts the queries of a device from 0',
    'models/attention.py',
    'masks.LocalMask(shape, local, before)',
    'masks.LocalMask(shape, local, 0)',
    'test_sequence',
  ),
  68: (
    'a prompt is lengthened behind its last token',
    'models/sequence.py',
    '(rest, 0) if left else (0, rest)',
    '(0, rest)',
    'test_sequence',
  ),
  69: (
    'targets move where the columns are made to divide',
    'models/transformer.py',
    'targets = jnp.pad(targets, ((0, 0), (0, x.shape[1] - targets.shape[1])))',
    'targets = jnp.pad(targets, ((0, 0), (x.shape[1] - targets.shape[1], 0)))',
    'test_sequence',
  ),
  70: (
    'every device that shares tokens decodes all rows',
    'models/transformer.py',
    "axes = ('rows' if axis == 'batch' else axis for axis in axes)",
    'axes = tuple(axes)',
    'test_sequence',
  ),
  71: (
    'weights are gathered in the decoding loop over the devices that share tokens',
    'sharding.py',
    "gathered = {*_as_tuple(self.rules.get('batch')), SEQUENCE}",
    "gathered = {*_as_tuple(self.rules.get('batch'))}",
    'test_sequence',
  ),
}


TESTS = {  # numeric file: the tests that touch it, the quick ones first
  'ops.py': 'test_ops test_iteration test_losses',
  'losses.py': 'test_iteration test_losses',
  'steps.py': 'test_iteration test_steps test_losses',
  'packing.py': 'test_packing',
  'types.py': 'test_losses test_iteration',
  'optim.py': 'test_optim test_iteration',
  'sampling.py': 'test_sampling test_iteration test_compile',
  'rollout.py': 'test_iteration test_rollout',
  'stages/ppo_ptx.py': 'test_iteration test_stages test_compile test_train',
  'stages/pretrain.py': 'test_stages test_train',
  'stages/sft.py': 'test_stages test_weights test_train',
  'stages/rm.py': 'test_stages test_weights test_train',
  'stages/stage.py': 'test_steps test_failures',
  'stages/comparisons.py': 'test_stages test_train test_weights',
  'stages/sampled_comparisons.py': 'test_train test_weights',
  'stages/loop.py': 'test_failures test_select',
  'stages/selection.py': 'test_select test_weights',
  'stages/ppo_ptx_plan.py': 'test_compile test_forks test_train',
  'models/attention.py': 'test_attention test_transformer test_compile',
  'models/products.py': 'test_attention test_transformer',
  'models/layers.py': 'test_transformer test_hf test_rollout test_compile',
  'models/transformer.py': 'test_transformer test_hf test_rollout test_compile',
  'models/cached.py': 'test_transformer test_sampling',
  'models/weights_first.py': 'test_transformer test_sampling',
  'models/rotary.py': 'test_hf test_transformer',
  'data/chat.py': 'test_templates test_start',
  'data/control.py': 'test_templates test_start',
  'data/templates.py': 'test_templates test_start',
  'data/encode.py': 'test_limit_lengths test_data',
  'data/batches.py': 'test_limit_lengths test_data',
  'data/text.py': 'test_data test_start',
  'data/fields.py': 'test_textfiles test_mappings test_templates',
  'data/hygiene.py': 'test_hygiene',
  'data/mappings.py': 'test_mappings test_textfiles',
  'data/sources.py': 'test_textfiles test_data test_mappings',
  'inference/batching.py': 'test_bulk',
  'inference/bulk.py': 'test_bulk',
  'inference/completions.py': 'test_bulk test_evals',
  'label/answers.py': 'test_label test_label_pages',
  'label/assignment.py': 'test_label test_label_pages',
  'label/catalog.py': 'test_label test_label_command',
  'label/exchange.py': 'test_label test_label_command',
  'label/figures.py': 'test_label',
  'label/submissions.py': 'test_label test_label_pages',
  'evals/reward/accuracy.py': 'test_evals',
  'evals/reward/selection.py': 'test_select test_best_of_n',
  'compiler/flops.py': 'test_trace',
}
# a survivor, by its file and its line as it would be: why no test can or need tell it from the code
EQUIVALENT = {
  "stages/rm.py: tx = make_optimizer(cfg.optimizer, 11**6, f'stages.{name}')": 'a number of updates for shapes alone',
  'data/batches.py: if count is None or count > length:': 'all items are drawn and sorted: in their order',
  'optim.py: after = optax.cosine_decay_schedule(lr, max(steps - warm, 2), alpha=final)': 'they differ '
  'after the last update only',
  'optim.py: t = state.count': 'a float to the power of an int32 is a float32',
  "rollout.py: 'objective/entropy': jnp.mean(-jnp.sum(logprobs, 1)),": 'the last axis of two is '
  'axis 1',
  "rollout.py: 'rollout/length': jnp.mean(jnp.sum(mask, -1)),": 'the mean of integers is a float32',
  'steps.py: params = optax.apply_updates(updates, state.params)': 'a sum; updates have the dtype '
  'of their parameters',
}


def trial(cache: str, edits: dict[str, str], tests: str, only: str = '') -> str:
  """'caught by TEST', or what pytest said, of a copy of the project with these texts of files below
  alignjax/. cache: of compiled programs, for what an edit leaves as it was."""
  with tempfile.TemporaryDirectory(prefix='mutation-') as folder:
    copy = pathlib.Path(folder) / 'project'
    shutil.copytree(
      ROOT,
      copy,
      ignore=shutil.ignore_patterns(
        '.git', '.venv', 'runs', '__pycache__', '.pytest_cache', '*.egg-info'
      ),
    )
    for name, text in edits.items():
      (copy / 'alignjax' / name).write_text(text)
    command = [
      sys.executable,
      '-m',
      'pytest',
      '-q',
      '-x',
      '-p',
      'no:cacheprovider',
      *(['-k', only] if only else []),
      *(f'tests/{f}.py' for f in tests.split()),
    ]
    env = os.environ | {
      'PYTHONPATH': str(copy),
      'JAX_COMPILATION_CACHE_DIR': cache,
      'ALIGNJAX_SAMPLE': 'all',
    }
    try:
      done = subprocess.run(
        command, cwd=copy, capture_output=True, text=True, check=False, timeout=1800, env=env
      )
    except subprocess.TimeoutExpired:
      return 'caught by the time limit'
  failed = re.findall(r'^(?:FAILED|ERROR) \S+?::(\S+)|^ERROR (\S+)', done.stdout, re.M)
  if done.returncode in (1, 2) and failed:
    return f'caught by {"".join(failed[0])}'
  return (
    f'NOT CAUGHT (pytest ended with {done.returncode}: '
    f'{"".join(done.stdout.strip().splitlines()[-1:])})'
  )


def of_checklist(cache: str, item: int) -> str:
  _, name, right, wrong, tests = MUTATIONS[item]
  text = (ROOT / 'alignjax' / name).read_text()
  if text.count(right) != 1:
    return f'OUT OF DATE: {name} has {text.count(right)} times {right!r}'
  return trial(
    cache, {name: text.replace(right, wrong)}, tests, f'item_{item}_' if item <= 25 else ''
  )


def generated(cache: str, count: int, seed: int, files: list[str]) -> int:
  """Tries a sample of the generated mutants; how many nobody caught or explains."""
  sources = {name: (ROOT / 'alignjax' / name).read_text() for name in files}
  missed = 0
  for i, mutant in enumerate(
    mutants.sample(
      {name: mutants.mutants(name, text) for name, text in sources.items()}, count, seed
    ),
    1,
  ):
    text = sources[mutant.file]
    text = text[: mutant.start] + mutant.after + text[mutant.end :]
    result = trial(cache, {mutant.file: text}, TESTS[mutant.file])
    if not result.startswith('caught'):
      reason = EQUIVALENT.get(f'{mutant.file}: {text.splitlines()[mutant.line - 1].strip()}')
      missed += reason is None
      result = f'equivalent: {reason}' if reason else result
    print(f'| {i} | {mutant} | {result} |', flush=True)
  return missed


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(description='Bugs put into the code, and whether a test fails.')
  parser.add_argument('items', nargs='*', type=int, help='of MUTATIONS; none: all')
  parser.add_argument(
    '--generated', type=int, default=0, help='this many generated mutants instead'
  )
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--files', default=','.join(TESTS), help='of the generated ones, below alignjax/'
  )
  options = parser.parse_args(arguments)
  missed = 0
  with tempfile.TemporaryDirectory(prefix='mutations-compiled-') as cache:
    if options.generated:
      return int(generated(cache, options.generated, options.seed, options.files.split(',')) > 0)
    for item in options.items or sorted(MUTATIONS):
      result = of_checklist(cache, item)
      missed += not result.startswith('caught')
      print(f'{item:3} {MUTATIONS[item][0]}: {result}', flush=True)
  return int(missed > 0)


if __name__ == '__main__':
  raise SystemExit(main(sys.argv[1:]))
