"""Low-rank adapters: their mathematics against float64, and stages that train them alone."""

import functools
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import plugins, train
from alignjax.commands import export
from alignjax.configs import smollm2_135m
from alignjax.inference import loading
from alignjax.models import lora, peft, transformer
from alignjax.models.config import TransformerConfig
from alignjax.runtime import checkpoint
from alignjax.setup import adapters
from alignjax.setup.objects import make_setup
from alignjax.setup.weights import initial_params, saved_adapters
from alignjax.stages import average, sft
from tests.fakes import close

CHAT = pathlib.Path(__file__).parent / 'golden' / 'chat'
KEY = jax.random.key(0)
LLAMA = TransformerConfig(
  vocab_size=11,
  num_layers=2,
  d_model=8,
  num_heads=4,
  num_kv_heads=2,
  max_length=16,
  mlp='swiglu',
  norm='rmsnorm',
  qkv_bias=False,
  out_bias=False,
)
GPT2 = TransformerConfig(
  vocab_size=11, num_layers=2, d_model=8, num_heads=2, max_length=16, positions='learned'
)
OURS = lora.LoRA(rank=2, alpha=3.0)


def noisy(shapes, size=0.3, seed=5):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: (size * rng.standard_normal(x.shape)).astype(np.float32), shapes)


def shapes(cfg):
  return jax.eval_shape(lambda: transformer.init(cfg, KEY))


def rows(count=3):
  tokens = jax.random.randint(KEY, (count, 7), 0, 11)
  return tokens, jnp.arange(7)[None] >= (jnp.arange(count) % 4)[:, None]


@pytest.mark.sampled
@pytest.mark.parametrize('cfg', [LLAMA, GPT2], ids=['llama', 'gpt2'])
def test_adapters_add_their_product_to_every_kernel(cfg):
  """W + (alpha / rank) A B, computed here in float64, in scoring, gradients, prefill and step."""
  params = jax.tree.map(jnp.asarray, noisy(shapes(cfg), 0.5, 1))
  own = noisy(jax.eval_shape(lambda: lora.init(OURS, params, KEY)))
  there = {f'{group}/{name}' for group, m in own['layers'].items() for name in m}
  assert len(there) == (7 if cfg is LLAMA else 6)
  whole = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  for group, modules in own['layers'].items():
    for name, module in modules.items():
      a, b = (np.asarray(module[k], np.float64) for k in ('lora_a', 'lora_b'))
      for i in range(cfg.num_layers):
        whole['layers'][group][name]['kernel'][i] += 1.5 * np.tensordot(a[i], b[i], 1)
  whole = jax.tree.map(jnp.float32, whole)
  nets = transformer.make_networks(cfg)
  joined = lora.join(params, own, OURS.scale)
  tokens, mask = rows()
  logprobs = jax.jit(lambda params: nets.logprobs(params, tokens, mask)[0])
  close(logprobs(joined), logprobs(whole), atol=2e-5)
  merged = jax.jit(lora.merge)(joined)
  assert jax.tree.structure(merged) == jax.tree.structure(whole)
  jax.tree.map(lambda x, y: close(x, y, atol=1e-6), merged, whole)

  @jax.jit
  def decoded(params):
    weights = nets.decoder.prepare(params)
    first, cache = nets.decoder.prefill(weights, tokens, mask)
    return first, nets.decoder.step(weights, tokens[:, 0], cache.with_slots(1))[0]

  for x, y in zip(decoded(joined), decoded(whole), strict=True):
    close(x, y, atol=2e-5)

  # The gradient of A and B is that of the kernel, by the chain rule.
  reading = lora.networks(nets, {'shared': params}, OURS.scale)
  loss = lambda nets, p: nets.logprobs(p, tokens, mask)[0].sum()
  found = jax.jit(jax.grad(lambda p: loss(reading, p)))(own)
  of_kernel = jax.jit(jax.grad(lambda p: loss(nets, p)))(whole)['layers']
  for group, modules in own['layers'].items():
    for name, module in modules.items():
      for i in range(cfg.num_layers):
        a, b, g = (
          np.asarray(x[i], np.float64)
          for x in (module['lora_a'], module['lora_b'], of_kernel[group][name]['kernel'])
        )
        inputs = a.ndim - 1
        here = found['layers'][group][name]
        close(here['lora_a'][i], 1.5 * np.tensordot(g, b, ((-1,), (-1,))), rtol=1e-3, atol=1e-4)
        axes = tuple(range(inputs))
        close(here['lora_b'][i], 1.5 * np.tensordot(a, g, (axes, axes)), rtol=1e-3, atol=1e-4)


def test_fresh_adapters_change_nothing():
  params = noisy(shapes(LLAMA))
  nets = transformer.make_networks(LLAMA)
  init = jax.jit(lora.init, static_argnums=0)
  own = init(OURS, params, KEY)
  joined = lora.join(params, own, OURS.scale)
  logprobs = jax.jit(nets.logprobs)
  close(logprobs(joined, *rows())[0], logprobs(params, *rows())[0], rtol=0, atol=1e-6)
  a = np.asarray(own['layers']['attention']['query']['lora_a'])
  assert abs(a).max() <= 8**-0.5 and a.std() > 0.5 * 8**-0.5 / 3**0.5
  some = init(OURS._replace(targets=('query', 'down')), params, KEY)
  assert {k: list(v) for k, v in some['layers'].items()} == {
    'attention': ['query'],
    'mlp': ['down'],
  }
  # What a target draws does not depend on the others.
  assert checkpoint.same(some['layers']['mlp']['down'], own['layers']['mlp']['down'])


@pytest.mark.parametrize(
  'entry,message',
  [
    (dict(rank=-1), 'x.rank=-1 must be a whole number'),
    (dict(rank=True), 'x.rank=True'),
    (dict(rank=2, alpha=0), 'x.alpha=0 must be'),
    (dict(rank=2, targets=('q_proj',)), "x.targets: 'q_proj' is none of query, "),
    (dict(rank=2, r=3), 'x.r is no entry of lora: rank, alpha, targets, quant'),
  ],
)
def test_declarations_that_cannot_be(entry, message):
  assert lora.declared(dict(rank=0, alpha=32.0, targets=()), 'x') is None is lora.declared({}, 'x')
  with pytest.raises(ValueError, match=message):
    lora.declared(entry, 'x')


def test_adapters_that_do_not_fit():
  params = shapes(GPT2)
  with pytest.raises(ValueError, match="no projection 'gate'"):
    lora.init(OURS._replace(targets=('gate',)), params, KEY)
  with pytest.raises(ValueError, match='lora.rank=9 is more than .* lower it to 8'):
    lora.init(OURS._replace(rank=9), params, KEY)


@pytest.mark.parametrize(
  'entry,message',
  [
    (dict(use_dora=True), 'use_dora=True is not covered'),
    (dict(bias='all'), "bias='all' is not covered"),
    (dict(init_lora_weights='pissa'), "init_lora_weights='pissa' .* it changes the base"),
    (dict(layer_replication=[[0, 2]]), 'layer_replication=.* is not covered'),
    (dict(an_entry_of_next_year=1), 'an_entry_of_next_year=1 is not covered'),
    (dict(modules_to_save=['lm_head']), 'whole modules beside the adapters'),
    (dict(modules_to_save=['score']), r'but for the score of a classifier \(task_type SEQ_CLS\)'),
    (dict(modules_to_save=['score', 'embed'], task_type='SEQ_CLS'), 'whole modules beside'),
    (dict(r='2'), "r='2' is no number"),
    (dict(base_model_name_or_path=None), 'names no checkpoint'),
    (dict(revision='v2'), "adapter_config.json: revision='v2' of the base is not covered"),
    (dict(alignjax_score_bias=0.5), 'alignjax_score_bias=0.5 is for the scores of a reward model'),
  ],
)
def test_folders_of_peft_that_are_refused(entry, message, tmp_path):
  """Whatever may change the function is refused by name; what says nothing is not."""
  plain = dict(peft_type='LORA', r=2, lora_alpha=3, use_dora=False, loftq_config={}, bias='none')
  plain |= dict(revision='main', alignjax_score_bias=0.0)
  file = tmp_path / peft.CONFIG
  file.write_text(json.dumps(plain | dict(base_model_name_or_path='base')))
  assert peft.base_of(tmp_path) == 'base'
  file.write_text(json.dumps(plain | dict(base_model_name_or_path='base') | entry))
  with pytest.raises(ValueError, match=message):
    peft.base_of(tmp_path)


@pytest.mark.parametrize('place', ['sft/final', 'sft/candidates/30'])
def test_the_base_of_saved_adapters_is_in_the_same_workdir(place, tmp_path):
  """Also after the workdir was moved."""
  entry = dict(rank=2, alpha=3.0, targets=('up',), base='stage:pretrain')
  checkpoint.save_params(tmp_path / 'a' / place, {'x': jnp.zeros(1)}, dict(head='lm', lora=entry))
  (tmp_path / 'a').rename(tmp_path / 'b')
  found = saved_adapters(tmp_path / 'b' / place)
  assert found == (lora.LoRA(2, 3.0, ('up',)), str(tmp_path / 'b/pretrain/final'))


# Stages


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return f'jsonl:{path}'


def pipeline(folder, dtype='float32', **entry):
  """SFT, RM and PPO-ptx of the golden checkpoint on a few lines, all with adapters."""
  c = smollm2_135m.get_config('tiny')
  c.checkpoint = f'hf:{CHAT}'
  text = [chr(ord('a') + i % 26) for i in range(60)]
  c.data.update(
    template='plain',
    prompt_length=6,
    response_length=4,
    row_length=8,
    pretrain=write(folder / 't.jsonl', [dict(text=x * 9) for x in text]),
    demonstrations=write(folder / 'd.jsonl', [dict(prompt=f's{x}', response=x * 2) for x in text]),
    comparisons=write(
      folder / 'c.jsonl',
      [dict(prompt=f'a{x}', responses=['a', 'bb', x], ranks=[0, 2, 1]) for x in text],
    ),
    prompts=write(folder / 'p.jsonl', [dict(prompt=f'p{x}') for x in text]),
  )
  c.data.mapping.update(dict.fromkeys(('pretrain', 'demonstrations', 'comparisons', 'prompts')))
  for stage in ('sft', 'rm', 'ppo_ptx'):
    c.stages[stage].lora.update(dict(rank=2, alpha=3.0) | entry)
    for optimizer in c.stages[stage].optimizer.values():
      optimizer.update(lr=1e-2, warmup=0, warmup_from=0.0)
  for stage in ('rm', 'ppo_ptx'):
    c.stages[stage].packed_rows = ()  # fewer programs to compile
  c.stages.ppo_ptx.update(iterations=2, rollout=dict(segments=1))
  c.model.dtype = dtype
  c.report.policies = {}
  return c


def finish(setup, name, order=(0, 1)):
  """Does a stage's steps on these batches, keeps the result, and returns the metrics."""
  stage = plugins.find(setup.config.stages[name].build, 'build')(setup, name)
  state, measured = stage.state, []
  for i in order:
    state, metrics, _ = stage.step(state, stage.batch(i))
    measured.append(jax.device_get(metrics))
  checkpoint.save_params(setup.workdir / name / 'final', *stage.finish(state))
  config = setup.workdir / name / 'checkpoints' / 'config.json'
  config.parent.mkdir()
  config.write_text(json.dumps(train.identity(setup.config, name)))
  return measured


def check_result(setup, stage, head):
  """A stage's result holds adapters and the name of their base. Merged, some kernels differ from
  those of the base, and nothing else does."""
  folder = setup.workdir / stage
  assert checkpoint.load_info(folder / 'final')['lora'] == dict(
    rank=2, alpha=3.0, targets=[], quantization=None, base=f'hf:{CHAT}'
  )
  sums = json.loads((folder / 'final' / 'sums.json').read_text())
  assert all('lora_' in name or 'final.score' in name for name in sums), list(sums)
  of_base = initial_params(setup, f'hf:{CHAT}', 'lm', 0)
  setup = setup._replace(read={})
  whole = initial_params(setup, f'stage:{stage}', head, 0)
  assert set(setup.read) == {f'stage:{stage}', f'hf:{CHAT}'}  # The base counts too.
  moved = {
    jax.tree_util.keystr(path, simple=True, separator='/')
    for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(whole['layers']),
      jax.tree.leaves(of_base['layers']),
      strict=True,
    )
    if (np.asarray(x) != np.asarray(y)).any()
  }
  assert moved and all(name.endswith('kernel') for name in moved), moved
  assert checkpoint.same(whole['embed'], of_base['embed'])
  assert checkpoint.same(loading.load(str(folder)).params, whole)


def test_sft_trains_adapters(tmp_path):
  setup = make_setup(pipeline(tmp_path), tmp_path / 'run', jax.devices()[:1])
  losses = [float(m['sft/loss']) for m in finish(setup, 'sft', (0, 0, 0))]
  assert losses[2] < losses[1] < losses[0]
  check_result(setup, 'sft', 'lm')
  state = adapters.load(setup, 'sft', dict(policy='lm'), {}, len).params['policy']
  plan = sft.abstract_step(setup, 'sft')
  describe = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
  assert describe(plan.arguments[0].params['policy']) == describe(state)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('lora')
  # In bfloat16 and with a scale, 1.5, that rounds: policy and reference are still equal at first.
  config = pipeline(folder, 'bfloat16')
  setup = make_setup(config, folder / 'run', jax.devices()[:1])
  train.find_builders(setup, ('sft', 'rm', 'ppo_ptx'))
  return setup, {name: finish(setup, name) for name in ('sft', 'rm', 'ppo_ptx')}


@pytest.mark.long
def test_stages_train_adapters_of_one_base(run):
  setup, measured = run
  for stage, head in (('sft', 'lm'), ('rm', 'scalar'), ('ppo_ptx', 'lm')):
    check_result(setup, stage, head)

  parts = adapters.load(
    setup, 'ppo_ptx', dict(policy='lm', value='scalar'), dict(ref='lm', reward='scalar'), len
  )
  assert set(parts.frozen) == {'ref', 'reward', 'base'} and set(parts.frozen['base']) == {'shared'}
  assert lora.is_adapters(parts.frozen['ref']) and lora.is_adapters(parts.frozen['reward'])
  # The policy goes on with the adapters of SFT, and the reference stays there.
  assert checkpoint.same(parts.params['policy'], parts.frozen['ref'])
  assert checkpoint.same(parts.params['value'], parts.frozen['reward'])
  first, second = measured['ppo_ptx']
  assert first['ppo/ratio_max_dev'] == second['ppo/ratio_max_dev'] == 0.0
  assert first['objective/kl'] == 0.0 != second['objective/kl']


@pytest.mark.parametrize(
  'stages', [('sft',), pytest.param(('sft', 'rm', 'ppo_ptx'), marks=pytest.mark.long)]
)
def test_a_run_that_ended_half_way_ends_with_the_same_adapters(stages, tmp_path, monkeypatch):
  """Each stage fails once behind a checkpoint; the same command goes on. Nothing of the base is in
  the checkpoints."""
  config = pipeline(tmp_path)
  config.stages_to_run = stages
  for name in stages:
    config.stages[name].save_every = 1
  train.main(config, tmp_path / 'whole')
  for name in stages:
    module = importlib.import_module(config.stages[name].build.partition(':')[0])
    build, left = module.build, [1]

    @functools.wraps(build)  # Its module has the checks of the stage too.
    def failing(setup, name, build=build, left=left):
      stage = build(setup, name)
      assert all(map(lora.is_adapters, stage.state.params.values()))

      def batch(i):
        if i == stage.num_steps - 1 and left:
          left.clear()
          raise RuntimeError('the disk is away')
        return stage.batch(i)

      return stage._replace(batch=batch)

    monkeypatch.setattr(module, 'build', failing)
    with pytest.raises(RuntimeError, match='the disk is away'):
      train.main(config, tmp_path / 'half')
  train.main(config, tmp_path / 'half')
  for name in stages:
    one, other = (
      json.loads((tmp_path / run / name / 'final/sums.json').read_text())
      for run in ('whole', 'half')
    )
    assert one == other and any('lora_a' in leaf for leaf in one)


@pytest.mark.long
def test_other_adapters_start_from_the_merged_weights(run):
  changed, workdir = run[0].config.copy_and_resolve_references(), run[0].workdir
  changed.stages.ppo_ptx.lora.rank, changed.model.dtype = 3, 'float32'
  setup = make_setup(changed, workdir, jax.devices()[:1])
  heads = dict(policy='lm', value='scalar'), dict(ref='lm', reward='scalar')
  parts = adapters.load(setup, 'ppo_ptx', *heads, len)
  assert parts.info['policy']['lora']['base'] == 'stage:sft'
  assert set(parts.frozen['base']) == {'lm', 'scalar'}
  nets = adapters.networks(setup, 'ppo_ptx', parts.frozen)
  tokens, mask = rows(8)
  sft = initial_params(setup, 'stage:sft', 'lm', 0)
  reward = initial_params(setup, 'stage:rm', 'scalar', 0)
  close(
    nets.logprobs(parts.params['policy'], tokens, mask)[0],
    setup.nets.logprobs(sft, tokens, mask)[0],
  )
  close(nets.scalar(parts.params['value'], tokens, mask), setup.nets.scalar(reward, tokens, mask))
  # Another alpha is the same function: B takes the factor.
  changed.stages.ppo_ptx.lora.update(rank=2, alpha=1.0)
  parts = adapters.load(make_setup(changed, workdir, jax.devices()[:1]), 'ppo_ptx', *heads, len)
  assert parts.info['policy']['lora']['base'] == f'hf:{CHAT}'
  nets = adapters.networks(make_setup(changed, workdir, jax.devices()[:1]), 'ppo_ptx', parts.frozen)
  close(
    nets.logprobs(parts.params['policy'], tokens, mask)[0],
    setup.nets.logprobs(sft, tokens, mask)[0],
    atol=1e-5,
  )


@pytest.mark.long
def test_a_mesh_trains_the_same_adapters(tmp_path):
  config = pipeline(tmp_path)
  losses = []
  for place, devices, mesh in (('one', 1, {}), ('eight', 8, dict(fsdp=2, tensor=2))):
    config.mesh.update(mesh)
    setup = make_setup(config, tmp_path / place, jax.devices()[:devices])
    losses.append([m['sft/loss'] for m in finish(setup, 'sft', (0, 1, 0))])
  parts = adapters.load(setup, 'sft', dict(policy='lm'), {}, len)
  query = parts.params['policy']['layers']['attention']['query']
  assert tuple(query['lora_a'].sharding.spec) == (None, ('fsdp', 'sequence'), None)
  assert tuple(query['lora_b'].sharding.spec) == (None, None, 'tensor')
  close(losses[0], losses[1], rtol=1e-4)


@pytest.mark.long
def test_adapters_go_to_peft_and_come_back(tmp_path):
  """SFT's adapters, exported in peft's files, are what another SFT starts from."""
  config = pipeline(tmp_path)
  setup = make_setup(config, tmp_path / 'run', jax.devices()[:1])
  finish(setup, 'sft', (0, 0))
  command = ['--model', str(tmp_path / 'run/sft'), '--out', str(tmp_path / 'out'), '--adapters']
  export.main(command)
  assert (tmp_path / 'out/tokenizer.json').exists()
  config.stages.sft.init.policy = f'peft:{tmp_path / "out"}'
  again = make_setup(config, tmp_path / 'again', jax.devices()[:1])
  parts = adapters.load(again, 'sft', dict(policy='lm'), {}, len)
  before = adapters.load(setup, 'sft', dict(policy='lm'), {}, len)  # of the checkpoint, fresh
  kept = checkpoint.load_params(tmp_path / 'run/sft/final', before.params['policy'])
  jax.tree.map(lambda x, y: close(x, y, atol=1e-7), parts.params['policy'], kept)
  assert parts.info['policy']['lora']['base'] == f'hf:{CHAT}'
  assert set(again.read) == {config.stages.sft.init.policy, f'hf:{CHAT}'}
  merged = initial_params(again, config.stages.sft.init.policy, 'lm', 0)
  jax.tree.map(lambda x, y: close(x, y), merged, initial_params(setup, 'stage:sft', 'lm', 0))
  file = tmp_path / 'out/adapter_config.json'
  for key, value, message in (
    ('use_dora', True, 'use_dora=True is not covered'),
    ('modules_to_save', ['lm_head'], 'whole modules beside the adapters'),
    ('r', 5, 'rank 5 for .* whose tensors have 2'),
    ('base_model_name_or_path', None, 'names no checkpoint'),
  ):
    file.write_text(json.dumps(json.loads(was := file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
      adapters.load(again, 'sft', dict(policy='lm'), {}, len)
    file.write_text(was)
  config.stages.sft.lora.rank = 0
  whole = make_setup(config, tmp_path / 'whole', jax.devices()[:1])
  finish(whole, 'sft', (0,))
  with pytest.raises(ValueError, match='was trained without adapters'):
    export.main(
      [*command[:1], str(tmp_path / 'whole/sft'), '--out', str(tmp_path / 'o'), '--adapters']
    )


@pytest.mark.slow
def test_reward_models_go_to_peft_and_come_back(tmp_path, capsys):
  """The adapters and the head of a trained reward model, exported in peft's files, are what another
  reward model starts from."""
  config = pipeline(tmp_path)
  config.stages.rm.init.reward = f'hf:{CHAT}'
  config.stages.mean = dict(head='scalar')
  setup = make_setup(config, tmp_path / 'run', jax.devices()[:1])
  finish(setup, 'rm', (0,))
  out = tmp_path / 'out'
  command = ['--model', str(tmp_path / 'run/rm'), '--out', str(out), '--adapters']
  with pytest.raises(ValueError, match='the reward model has the bias .*--bias=drop.*--bias=keep'):
    export.main(command)
  assert not out.exists()
  export.main([*command, '--bias=keep'])
  said = capsys.readouterr().out
  assert 'in adapter_config.json as alignjax_score_bias' in said and 'pad_token_id' in said
  written = json.loads((out / peft.CONFIG).read_text())
  assert written['task_type'] == 'SEQ_CLS' and written['modules_to_save'] == ['score']
  spec = f'peft:{out}'
  again = make_setup(config, tmp_path / 'again', jax.devices()[:1])
  kept = initial_params(setup, 'stage:rm', 'scalar', 0)
  assert kept['final']['score']['bias'][0] == np.float32(written['alignjax_score_bias']) != 0
  jax.tree.map(lambda x, y: close(x, y), initial_params(again, spec, 'scalar', 0), kept)
  config.stages.rm.init.reward = spec
  parts = adapters.load(again, 'rm', dict(reward='scalar'), {}, len)
  assert parts.info['reward']['lora']['base'] == f'hf:{CHAT}'
  before = adapters.load(setup, 'rm', dict(reward='scalar'), {}, len)
  own = checkpoint.load_params(tmp_path / 'run/rm/final', before.params['reward'])
  jax.tree.map(lambda x, y: close(x, y, atol=1e-7), parts.params['reward'], own)
  average.check_head(again, 'mean', spec)
  with pytest.raises(
    ValueError, match="'peft:.*' is a reward model; a policy cannot start from it"
  ):
    initial_params(again, spec, 'lm', 0)
  file = out / peft.CONFIG
  file.write_text(json.dumps(written | dict(alignjax_score_bias='much')))
  with pytest.raises(
    ValueError, match='adapter_config.json: alignjax_score_bias=.* is not a number'
  ):
    initial_params(again, spec, 'scalar', 0)


def test_a_random_base_is_refused(tmp_path):
  config = pipeline(tmp_path)
  config.stages.sft.init.policy = 'random'
  with pytest.raises(ValueError, match="stages.sft.init.policy='random' has no base"):
    train.main(config, tmp_path / 'run')
