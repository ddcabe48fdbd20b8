"""What a result of adapters belongs to: it is named in the result, compared when the result is
loaded, and read as a stage would read it."""

import json
import pathlib
import shutil
import types

import jax
import ml_collections
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignjax import train
from alignjax.commands import export as export_command
from alignjax.commands import generate
from alignjax.evals import registry
from alignjax.inference import loading
from alignjax.models import classifier, config_json, export, lora, peft
from alignjax.models.families import FAMILIES
from alignjax.runtime import checkpoint
from alignjax.setup import adapters, inputs
from alignjax.setup.objects import make_setup
from alignjax.setup.weights import initial_params
from alignjax.stages import preference
from tests.fakes import close
from tests.test_forks import offline
from tests.test_lora import CHAT, noisy, pipeline, rows

FAMILY = FAMILIES[config_json.declared(CHAT).kind]


@pytest.fixture
def config(tmp_path):
  """test_lora.pipeline, from a copy of the checkpoint in tmp_path/base."""
  shutil.copytree(CHAT, tmp_path / 'base')
  c = pipeline(tmp_path)
  c.checkpoint = f'hf:{tmp_path / "base"}'
  return c


def setup_of(config, workdir):
  workdir.mkdir(exist_ok=True)
  return make_setup(config, workdir, jax.devices()[:1])


def made_up(parts, role, seed):
  """Random adapters of the shapes of a role."""
  return noisy(parts.params[role], 0.1, seed)


def save(setup, name, seed=1, to='final'):
  """Saves made-up adapters as the result of a stage and returns them."""
  role, head = ('reward', 'scalar') if name == 'rm' else ('policy', 'lm')
  setup = setup._replace(read={})
  parts = adapters.load(setup, name, {role: head}, {}, len)
  own = made_up(parts, role, seed)
  made = train.record(setup, name)
  info = {'head': head} | parts.info[role]
  checkpoint.save_params(setup.workdir / name / to, own, info, made)
  path = setup.workdir / name / 'checkpoints' / 'config.json'
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(train.identity(setup.config, name)))
  return own


def save_peft(setup, folder, rank, head='lm', seed=7):
  """Writes made-up adapters of a rank in the files of peft and returns them."""
  role, stage = ('reward', 'rm') if head == 'scalar' else ('policy', 'sft')
  changed = setup.config.copy_and_resolve_references()
  changed.stages[stage].lora.rank = rank
  changed.stages[stage].init[role] = changed.checkpoint
  parts = adapters.load(setup_of(changed, setup.workdir), stage, {role: head}, {}, len)
  own = made_up(parts, role, seed)
  if head == 'scalar':
    own['final']['score']['bias'] *= 0
  folder.mkdir()
  base = changed.checkpoint.removeprefix('hf:')
  peft.save(folder, FAMILY, setup.policy_model, lora.LoRA(rank, 3.0), own, base)
  return own


def added(whole, *more):
  """The layers of `whole` with the products of adapters (tree, alpha / rank), in float64."""
  layers = jax.tree.map(lambda x: np.array(x, np.float64), whole['layers'])
  for own, scale in more:
    for group, modules in own['layers'].items():
      for name, module in modules.items():
        for i, kernel in enumerate(layers[group][name]['kernel']):
          a, b = (np.asarray(module[k][i], np.float64) for k in ('lora_a', 'lora_b'))
          kernel += scale * np.tensordot(a, b, 1)
  return layers


def check_layers(params, expected):
  jax.tree.map(lambda x, y: close(x, y, atol=1e-6), params['layers'], expected)


def change_checkpoint(folder):
  """Changes one tensor of a checkpoint and returns the file's former contents."""
  path = folder / 'model.safetensors'
  was, tensors = path.read_bytes(), load_file(path)
  name = next(name for name in sorted(tensors) if 'mlp' in name)
  save_file(tensors | {name: tensors[name] * 1.5}, path, metadata={'format': 'pt'})
  return was


@pytest.mark.slow
def test_a_stage_of_dpo_names_what_its_adapters_belong_to(tmp_path):
  c = offline(tmp_path)
  with c.unlocked():
    c.model = dict(source=f'hf:{CHAT}')
  c.stages.dpo.init.update(policy=f'hf:{CHAT}', ref=f'hf:{CHAT}')
  c.stages.dpo.lora.update(rank=2, alpha=3.0)
  setup = setup_of(c, tmp_path / 'run')
  stage = preference.build(setup, 'dpo')
  params, info = stage.finish(stage.state)
  params = noisy(params, 0.1)
  checkpoint.save_params(setup.workdir / 'dpo/final', params, info)
  base = initial_params(setup, f'hf:{CHAT}', 'lm', 0)
  check_layers(initial_params(setup, 'stage:dpo', 'lm', 0), added(base, (params, 1.5)))


def test_adapters_that_nothing_could_load_are_not_saved(tmp_path):
  """A stage of a fork whose finish leaves Parts.info out."""
  own = {'layers': {'mlp': {'up': {'lora_a': np.zeros(1), 'lora_b': np.zeros(1)}}}}
  with pytest.raises(ValueError, match="final: the weights are adapters.* no entry 'lora'"):
    checkpoint.save_params(tmp_path / 'final', own, {'head': 'lm'})
  assert not (tmp_path / 'final').exists()


@pytest.mark.slow
def test_adapters_on_merged_ones_of_peft_are_found_from_another_folder(
  config, tmp_path, monkeypatch
):
  """Rank 2 of peft is merged, and the stage's adapters of rank 1 belong to the sum."""
  setup = setup_of(config, tmp_path / 'run')
  below = save_peft(setup, tmp_path / 'p', rank=2)
  monkeypatch.chdir(tmp_path)
  config.stages.sft.lora.rank = 1
  config.stages.sft.init.policy = 'peft:p'
  setup = setup_of(config, tmp_path / 'run')
  own = save(setup, 'sft')
  monkeypatch.chdir('/')
  spec, base = f'peft:{tmp_path / "p"}', config.checkpoint
  assert checkpoint.load_info(setup.workdir / 'sft/final')['lora']['base'] == spec
  expected = added(initial_params(setup, base, 'lm', 0), (below, 1.5), (own, 3.0))
  setup = setup._replace(read={})
  check_layers(initial_params(setup, 'stage:sft', 'lm', 0), expected)
  assert set(setup.read) == {'stage:sft', spec, base}
  check_layers(loading.load(str(setup.workdir / 'sft')).params, expected)
  with pytest.raises(ValueError, match=f'sft: its adapters belong to .* {spec} .*leave --adapters'):
    export_command.main(
      ['--model', str(setup.workdir / 'sft'), '--out', str(tmp_path / 'out'), '--adapters']
    )
  # A later stage goes on with them and with their base.
  config.stages.rm.lora.rank = 1
  parts = adapters.load(setup_of(config, setup.workdir), 'rm', dict(reward='scalar'), {}, len)
  assert parts.info['reward']['lora']['base'] == spec
  check_layers(
    parts.frozen['base']['scalar'], added(initial_params(setup, base, 'lm', 0), (below, 1.5))
  )
  assert (
    parts.params['reward']['layers']['mlp']['up']['lora_a'] == own['layers']['mlp']['up']['lora_a']
  ).all()
  # And changed adapters below are noticed, as is a changed checkpoint below these.
  change_checkpoint(tmp_path / 'base')
  with pytest.raises(
    inputs.ChangedInput, match=f'sft/final: .* trained on {base}, which has changed'
  ):
    initial_params(setup, 'stage:sft', 'lm', 0)
  file = tmp_path / 'p' / peft.CONFIG
  file.write_text(file.read_text().replace('"lora_alpha": 3.0', '"lora_alpha": 4.0'))
  with pytest.raises(inputs.ChangedInput, match=f'trained on {spec}, which has changed'):
    initial_params(setup, 'stage:sft', 'lm', 0)


def test_a_reward_model_on_merged_ones_of_peft_has_its_own_head(config, tmp_path):
  setup = setup_of(config, tmp_path / 'run')
  below = save_peft(setup, tmp_path / 'p', rank=2, head='scalar')
  config.stages.rm.lora.rank = 1
  config.stages.rm.init.reward = f'peft:{tmp_path / "p"}'
  setup = setup_of(config, tmp_path / 'run')
  own = save(setup, 'rm')
  found = initial_params(setup, 'stage:rm', 'scalar', 0)
  base = initial_params(setup, config.checkpoint, 'lm', 0)
  check_layers(found, added(base, (below, 1.5), (own, 3.0)))
  assert checkpoint.same(found['final']['score'], own['final']['score'])


def test_a_result_is_not_loaded_on_a_checkpoint_that_has_changed(config, tmp_path):
  setup = setup_of(config, tmp_path / 'run')
  save(setup, 'sft')
  save(setup, 'sft', to='candidates/3')
  sft, identity = setup.workdir / 'sft', train.identity(config, 'sft')
  expected = loading.load(str(sft)).params
  (tmp_path / 'run').rename(tmp_path / 'moved')
  assert checkpoint.same(loading.load(str(tmp_path / 'moved/sft')).params, expected)
  (tmp_path / 'moved').rename(tmp_path / 'run')

  was = change_checkpoint(tmp_path / 'base')
  message = (
    f'{sft}/final: its adapters were trained on {config.checkpoint}, which has changed since'
  )
  with pytest.raises(inputs.ChangedInput, match=message):
    loading.load(str(sft))
  with pytest.raises(inputs.ChangedInput, match='restart to train it again.*input=keep to say so'):
    loading.load(str(sft / 'candidates/3'))
  # A stage of another workdir names the folder. It goes on with the adapters, or merges them.
  config.stages.sft.init.policy = str(sft / 'final')
  for rank in (2, 3):
    config.stages.sft.lora.rank = rank
    other = setup_of(config, tmp_path / 'other')
    with pytest.raises(inputs.ChangedInput, match=message):
      adapters.load(other, 'sft', dict(policy='lm'), {}, len)

  (tmp_path / 'base/model.safetensors').write_bytes(was)
  assert checkpoint.same(loading.load(str(sft)).params, expected)
  change_checkpoint(tmp_path / 'base')
  inputs.check(setup.workdir, 'sft', identity, 'keep', print)
  for name in (sft, sft / 'candidates/3'):
    assert not checkpoint.same(loading.load(str(name)).params, expected)


def test_a_result_is_not_loaded_on_a_stage_that_was_trained_again(config, tmp_path):
  config.stages.rm.lora.rank = 1  # so that what SFT has made is merged and becomes the base
  setup = setup_of(config, tmp_path / 'run')
  save(setup, 'sft')
  save(setup, 'rm')
  assert checkpoint.load_info(setup.workdir / 'rm/final')['lora']['base'] == 'stage:sft'
  (tmp_path / 'run').rename(tmp_path / 'moved')
  expected = loading.load(str(tmp_path / 'moved/rm')).params
  setup = setup_of(config, tmp_path / 'moved')
  save(setup, 'sft', seed=2)
  with pytest.raises(inputs.ChangedInput, match='rm/final: .*trained on stage:sft, .* again[.]$'):
    loading.load(str(tmp_path / 'moved/rm'))
  save(setup, 'sft')
  assert checkpoint.same(loading.load(str(tmp_path / 'moved/rm')).params, expected)
  shutil.rmtree(tmp_path / 'moved/sft')
  with pytest.raises(FileNotFoundError, match='rm/final: .*sft/final, which holds no finished'):
    loading.load(str(tmp_path / 'moved/rm'))


def test_adapters_of_peft_are_a_model_for_every_command(config, tmp_path, capsys):
  """The commands could not read them without a stage that starts from them."""
  setup = setup_of(config, tmp_path / 'run')
  own = save_peft(setup, tmp_path / 'policy', 3)
  scored = save_peft(setup, tmp_path / 'reward', 2, 'scalar', seed=8)
  base = loading.load(config.checkpoint)
  model = loading.load(f'peft:{tmp_path}/policy')
  check_layers(model.params, added(base.params, (own, 1.0)))  # alpha 3 of rank 3
  assert model.head == 'lm' and model.tokenizer.get_vocab() == base.tokenizer.get_vocab()
  assert loading.facts(model)['weights'] != loading.facts(base)['weights']
  rewards = loading.load(f'peft:{tmp_path}/reward', 'scalar')
  check_layers(rewards.params, added(base.params, (scored, 1.5)))
  kernel = scored['final']['score']['kernel']
  np.testing.assert_array_equal(rewards.params['final']['score']['kernel'], kernel)
  with pytest.raises(ValueError, match='policy is not a reward model'):
    loading.load(f'peft:{tmp_path}/policy', 'scalar')
  with pytest.raises(ValueError, match='is a reward model'):
    loading.load(f'peft:{tmp_path}/reward', 'lm')
  assert loading.load(f'peft:{tmp_path}/reward').head == 'scalar'
  with pytest.raises(ValueError, match='--adapters writes what a stage trained'):
    export_command.main([f'--model=peft:{tmp_path}/policy', f'--out={tmp_path}/out', '--adapters'])
  assert loading.trained_with(f'peft:{tmp_path}/policy') is None
  generate.main(
    [f'--model=peft:{tmp_path}/policy', '--prompt=a', '--max_tokens=4', '--temperature=0']
  )
  said = capsys.readouterr().out
  merged = tmp_path / 'merged'
  export_command.main([f'--model=peft:{tmp_path}/policy', f'--out={merged}'])
  capsys.readouterr()
  generate.main([f'--model=hf:{merged}', '--prompt=a', '--max_tokens=4', '--temperature=0'])
  assert capsys.readouterr().out == said
  # What names them in an option is their adapters and their base.
  named = lambda: registry._contents(f'peft:{tmp_path}/policy')
  first = named()
  change_checkpoint(tmp_path / 'base')
  assert first and named() != first


def test_adapters_of_peft_are_no_function_of_a_user():
  """Where peft is installed, 'peft:NAME' could be a name in its module."""
  pytest.importorskip('peft')
  config = dict(
    data={}, model=None, reward_model=None, stages=dict(sft=dict(init=dict(policy='peft:mine')))
  )
  assert inputs.of_config(ml_collections.ConfigDict(config), 'sft') == {}


def test_a_folder_of_this_workdir_is_named_as_a_stage(config, tmp_path, monkeypatch):
  """Also where the workdir is given from the current folder and the weights from the root."""
  save(setup_of(config, tmp_path / 'run'), 'sft')
  config.stages.rm.lora.rank = 1
  config.stages.rm.init.reward = f'{tmp_path}/run/sft/final'
  monkeypatch.chdir(tmp_path)
  setup = setup_of(config, pathlib.Path('run'))
  parts = adapters.load(setup, 'rm', dict(reward='scalar'), {}, len)
  assert parts.info['reward']['lora']['base'] == 'stage:sft'


@pytest.mark.slow
def test_a_frozen_reward_model_of_peft_scores_on_the_base_as_it_is(config, tmp_path):
  """It was not trained on the codes, whatever its rank."""
  setup = setup_of(config, tmp_path / 'run')
  own = save_peft(setup, tmp_path / 'p', rank=2, head='scalar')
  spec = f'peft:{tmp_path / "p"}'
  init = dict(policy=config.checkpoint, ref=config.checkpoint, value=spec, reward=spec)
  config.stages.ppo_ptx.init.update(init)
  config.stages.ppo_ptx.lora.quantization = 'nf4'
  setup = setup_of(config, tmp_path / 'run')
  parts = adapters.load(
    setup, 'ppo_ptx', dict(policy='lm', value='scalar'), dict(ref='lm', reward='scalar'), len
  )
  whole = initial_params(setup, config.checkpoint, 'lm', 0)
  layers = jax.tree.map(np.float32, added(whole, (own, 1.5)))
  final = {**whole['final'], 'score': own['final']['score']}
  tokens, mask = rows(6)
  score = jax.jit(adapters.networks(setup, 'ppo_ptx', parts.frozen).scalar)
  expected = jax.jit(setup.nets.scalar)({**whole, 'layers': layers, 'final': final}, tokens, mask)
  close(score(parts.frozen['reward'], tokens, mask), expected, atol=1e-5)
  # The reference is still the policy's adapters on the codes, and so is the value at the start.
  assert lora.is_adapters(parts.frozen['ref']) and lora.is_adapters(parts.params['value'])
  assert np.abs(score(parts.params['value'], tokens, mask) - expected).max() > 1e-3


def test_adapters_of_more_rank_than_a_projection_has_are_merged(config, tmp_path):
  """peft allows it. value has 8 outputs, and the adapters rank 12."""
  setup = setup_of(config, tmp_path / 'run')
  model = setup.policy_model
  shape = lambda *x: jax.ShapeDtypeStruct((model.num_layers, *x), np.float32)
  outputs = dict(query=model.num_heads * model.head_width, value=8)
  assert model.kv_heads * model.head_width == 8
  below = {
    'layers': {
      'attention': {
        name: {'lora_a': shape(model.d_model, 12), 'lora_b': shape(12, size)}
        for name, size in outputs.items()
      }
    }
  }
  below = noisy(below, 0.1)
  (tmp_path / 'p').mkdir()
  peft.save(tmp_path / 'p', FAMILY, model, lora.LoRA(12, 6.0), below, str(tmp_path / 'base'))
  config.stages.sft.init.policy = f'peft:{tmp_path / "p"}'
  setup = setup_of(config, tmp_path / 'run')
  parts = adapters.load(setup, 'sft', dict(policy='lm'), {}, len)
  assert parts.info['policy']['lora']['base'] == config.stages.sft.init.policy
  whole = initial_params(setup, config.checkpoint, 'lm', 0)
  check_layers(parts.frozen['base']['lm'], added(whole, (below, 0.5)))


def test_the_table_of_embeddings_is_not_read_for_adapters(config, tmp_path):
  """No token is left to pad with, and adapters have no place for the row of a new one."""
  setup = setup_of(config, tmp_path / 'run')
  own = save_peft(setup, tmp_path / 'p', rank=2, head='scalar')
  tokenizer, path = setup.text.tokenizer, tmp_path / 'base/config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | dict(vocab_size=len(tokenizer))))
  model = types.SimpleNamespace(cfg=setup.policy_model, params=None, tokenizer=tokenizer)
  ends = tokenizer.eos_token_id, tokenizer.pad_token_id
  report = export.save_adapters(
    tmp_path / 'out', model, lora.LoRA(2, 3.0), own, str(tmp_path / 'base'), ends
  )
  assert report['pad'] == 'none: score one row at a time'


def test_new_rows_of_embeddings_are_zeros():
  params = {'embed': {'tokens': np.ones((3, 2), np.float32)}, 'final': {}}
  assert classifier.with_vocabulary(params, 3) is params
  more = classifier.with_vocabulary(params, 4)
  assert more['embed']['tokens'].tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]
  assert params['embed']['tokens'].shape == (3, 2)
