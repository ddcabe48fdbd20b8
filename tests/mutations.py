# ruff: noqa: E501  an edit stands in one line
"""Puts the bugs of the correctness checklist back, one at a time, and looks whether a test fails.

  python tests/mutations.py               all 25, some minutes; prints a table, ends with 1 where one was not caught
  python tests/mutations.py 1 8 23        these

Each is an edit of a copy of the project and the tests that carry the item's number.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MUTATIONS = {  # item: (the bug, file, what stands there, what stood there when it was wrong, where its tests are)
    1: ('the score lands on the last column', 'ops.py', 'is_last = mask & (live_after == 1)',
        'is_last = jnp.zeros_like(mask).at[:, -1].set(True)', 'test_ops'),
    2: ('a missing end is read off the length', 'rollout.py', 'missing_end_penalty * ~sampled.ended',
        'missing_end_penalty * mask.all(-1)', 'test_rollout'),
    3: ('weights by comparing ids with pad', 'data/encode.py', '    weights[i, len(p):len(p) + len(r)] = 1.0\n  weights[:, 0]',
        '    weights[i, len(p):len(p) + len(r)] = [float(x != pad) for x in r]\n  weights[:, 0]', 'test_data test_losses'),
    4: ('decoding runs to the limit', 'sampling.py', '& ~jnp.all(state[1][2])', '', 'test_sampling'),
    5: ('positions count pads', 'ops.py', 'return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1, 0)',
        'return jnp.broadcast_to(jnp.arange(mask.shape[-1]), mask.shape)', 'test_transformer'),
    6: ('the reward is read at the last column', 'losses.py', 'scores = ops.last_live(values.reshape(b, k, t), batch.mask)',
        'scores = values.reshape(b, k, t)[..., -1]', 'test_losses'),
    7: ('an end is forced at the limit', 'sampling.py', "    live = ~done\n",
        "    live = ~done\n    token = jnp.where(t == max_tokens - 1, stop_ids[0] if stop_ids else token, token)\n", 'test_sampling'),
    8: ("the sampler's log-probabilities go into the ratio", 'rollout.py', 'rollout = Rollout(*rows, logprobs=logprobs,',
        'rollout = Rollout(*rows, logprobs=sampled.logprobs + 1e-4 * mask,', 'test_rollout test_sharding'),
    9: ('scoring without the temperature', 'rollout.py', "nets.logprobs(params['policy'], tokens, token_mask, temperature=temperature)",
        "nets.logprobs(params['policy'], tokens, token_mask)", 'test_rollout'),
    10: ('weights normalised by microbatch', 'steps.py', 'jax.value_and_grad(lambda params, batch, key: loss_fn(params, batch, key, nets=nets)',
         'jax.value_and_grad(lambda params, batch, key: loss_fn(params, batch.normalized(), key, nets=nets)', 'test_losses test_steps'),
    11: ('whitening by row', 'ops.py', '  mean = masked_mean(x, mask)\n  whitened = (x - mean) * jax.lax.rsqrt(masked_variance(x, mask) + 1e-8)',
         '  mean = jax.vmap(masked_mean)(x, mask)[:, None]\n  whitened = (x - mean) * jax.lax.rsqrt(jax.vmap(masked_variance)(x, mask)[:, None] + 1e-8)',
         'test_ops test_sharding'),
    12: ('deltas over pads', 'ops.py', 'deltas = jnp.where(mask, rewards + gamma * next_values - values, 0.0)',
         'deltas = rewards + gamma * next_values - values + ~mask', 'test_ops'),
    13: ('integer rewards are taken', 'rollout.py', 'if not jnp.issubdtype(scores.dtype, jnp.floating):', 'if False:', 'test_rollout'),
    14: ('the same key in every step', 'stages/ppo_ptx.py', 'key = jax.random.fold_in(key, state.step)', 'pass', 'test_sharding'),
    15: ('gradients through advantages', 'losses.py', 'advantages, returns = jax.lax.stop_gradient((batch.advantages, batch.returns))',
         'advantages, returns = batch.advantages, batch.returns', 'test_losses'),
    16: ('a ptx coefficient that does nothing', 'losses.py', 'loss = loss + ptx_coef * ptx_loss', 'loss = loss + 0 * ptx_loss', 'test_losses'),
    17: ('one form of epsilon for both', 'optim.py', 'factor * m / (v**0.5 + eps)',
         '(m / (1 - b1**t)) / ((v / (1 - b2**t))**0.5 + eps)', 'test_optim'),
    18: ('a moving average in bfloat16', 'steps.py', 'e + (1 - ema_decay) * (p.astype(jnp.float32) - e)',
         '(e.astype(jnp.bfloat16) + (1 - ema_decay) * (p - e).astype(jnp.bfloat16)).astype(jnp.float32)', 'test_steps'),
    19: ('one divisor for all prompts', 'losses.py', 'all_pairs = jnp.maximum(present * (present - 1) / 2, 1.0)',
         'all_pairs = jnp.full_like(present, k * (k - 1) / 2)', 'test_losses'),
    20: ('test entities in training prompts', 'sandbox/instructions.py', "return world.test_entities if split == 'test' else world.train_entities",
         'return world.test_entities + world.train_entities', 'test_sandbox'),
    21: ('the held-out pool is the training pool', 'sandbox/labelers.py', 'self.train, self.heldout = np.arange(train), np.arange(train, count)',
         'self.train, self.heldout = np.arange(train), np.arange(train)', 'test_evals test_sandbox'),
    22: ('a reward that is no model is ignored', 'rollout.py', '  scores = reward_fn(*rows, nets=nets, frozen=frozen)',
         '  scores = model_reward(*rows, nets=nets, frozen=frozen)', 'test_rollout'),
    23: ('the data position is one step off after a restart', 'train.py', '    first, state = restored\n', '    first, state = restored[0] + 1, restored[1]\n',
         'test_train'),
    24: ('weights are gathered for every token', 'models/transformer.py',
         "whole = constrain_weights({'embed': params['embed'], 'final': params['final'], 'unstacked': layers})",
         "whole = {'embed': params['embed'], 'final': params['final'], 'unstacked': layers}", 'test_sharding'),
    25: ('a decoded token stands at its cache slot', 'models/transformer.py',
         'where = jax.lax.dynamic_slice_in_dim(ops.positions(seen), cache.index, 1, axis=1)',
         'where = jnp.broadcast_to(cache.index, (tokens.shape[0], 1))', 'test_transformer'),
}


def run(item: int) -> str:
  """'caught' or what is wrong."""
  _, name, right, wrong, files = MUTATIONS[item]
  with tempfile.TemporaryDirectory(prefix=f'mutation-{item}-') as folder:
    copy = pathlib.Path(folder) / 'project'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', '.venv', 'runs', '__pycache__', '.pytest_cache', '*.egg-info'))
    path = copy / 'alignjax' / name
    text = path.read_text()
    if text.count(right) != 1:
      return f'OUT OF DATE: {name} has {text.count(right)} times {right!r}'
    path.write_text(text.replace(right, wrong))
    tests = [f'tests/{f}.py' for f in files.split()]
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '-k', f'item_{item}_', *tests],
                          cwd=copy, capture_output=True, text=True, check=False)
  failed = re.findall(r'^(?:FAILED|ERROR) \S+::(\S+)', done.stdout, re.M)
  if done.returncode == 1 and failed:
    return f'caught by {failed[0]}'
  return f'NOT CAUGHT (pytest ended with {done.returncode}: {done.stdout.strip().splitlines()[-1:]})'


def main(arguments: list[str]) -> int:
  missed = 0
  for item in [int(a) for a in arguments] or sorted(MUTATIONS):
    result = run(item)
    missed += not result.startswith('caught')
    print(f'{item:3} {MUTATIONS[item][0]}: {result}', flush=True)
  return int(missed > 0)


if __name__ == '__main__':
  raise SystemExit(main(sys.argv[1:]))
