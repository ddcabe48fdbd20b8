"""What each example weighs, and which examples go where: shares of a loss by source, prompts of a
reward model's epoch, ties, what no stage is trained on."""

import json
import pathlib

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses, plugins, steps, train
from alignjax.configs import base, dpo, pythia_1b_hh, ukp_rm
from alignjax.configs.selected import selection as selected
from alignjax.data import encode, hygiene
from alignjax.models import transformer
from alignjax.runtime import checkpoint, metrics
from alignjax.setup import encoded
from alignjax.setup.objects import make_setup
from alignjax.setup.records import records
from alignjax.setup.weights import initial_params
from alignjax.stages import comparisons, rm, selection, sft
from alignjax.stages.comparisons import Comparisons
from tests.fakes import assert_additive, close, model, ppo_batch

CHAT = pathlib.Path(__file__).resolve().parent / 'golden' / 'chat'


@pytest.fixture(scope='module', autouse=True)
def one_device():
  with pytest.MonkeyPatch.context() as m:
    one = jax.devices()[:1]
    m.setattr(jax, 'devices', lambda *_: one)
    yield


# shares of a loss


def mixed_rows(packed: bool):
  """Two rows of short demonstrations, packed: two in each, and two full rows of text."""
  demos = [([3, 4], [5, 6]), ([7], [8, 9, 10])]
  rows = encode.demonstrations(demos, 8, pad=0)
  if packed:
    documents = [(p + r, [0.0] * len(p) + [1.0] * len(r)) for p, r in demos * 2]
    rows = conftest.packed(documents, 8, pad=0)
  text = encode.full_rows(np.array([1, *range(11, 26)], np.int32).reshape(2, 8))
  text = text.replace(mask=text.mask.astype(rows.mask.dtype))
  made = jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x)), rows, text)
  return made.replace(
    source=jnp.asarray([0, 0, 1, 1]), mix=(('demonstrations', 0.9), ('pretrain', 0.1))
  )


@pytest.mark.sampled
@pytest.mark.parametrize('packed', [False, True])
def test_a_mix_is_a_share_of_the_loss(packed):
  """Rows of text hold 7 trained tokens, demonstrations 2 and 3: by tokens, text would be 14 of 19
  where a tenth is asked for."""
  _, nets, params, _ = model()
  batch = mixed_rows(packed)
  loss = jax.jit(lambda batch: losses.sft({'policy': params}, batch.normalized(), None, nets=nets))
  log_p = np.asarray(jax.jit(nets.logprobs)(params, batch.tokens, batch.mask)[0], np.float64)
  live = np.asarray(batch.weights) > 0
  demos, text = (-log_p[rows][live[rows]].mean() for rows in (slice(0, 2), slice(2, 4)))
  total, figures = loss(batch)
  close(total, 0.9 * demos + 0.1 * text)
  close(figures['sft/loss/demonstrations'], demos)
  close(figures['sft/loss/pretrain'], text)
  close(figures['sft/share/pretrain'], 0.1)
  assert figures['sft/loss'] == total
  # more rows of text change the noise, not the weight
  twice = jax.tree.map(lambda x: jnp.concatenate([x, x[2:]]), batch)
  close(loss(twice)[0], total)
  if packed:
    # each microbatch has rows of one source
    assert_additive(losses.sft, {'policy': params}, batch, nets, parts=4)


@pytest.mark.parametrize('pack', [False, True])
@pytest.mark.parametrize('mix,rows', [(0.1, 1), (0.5, 4), (0.01, 1)])
def test_the_batches_of_sft_have_the_share(pack, mix, rows, tmp_path):
  c = base.get_config('tiny')
  c.data.pack = pack
  c.stages.sft.update(
    init=dict(policy='random'), demonstrations=16, documents=64, pretrain_mix=mix, batch_size=8
  )
  setup = make_setup(c, tmp_path)
  made = sft.build(setup, 'sft').batch(0)
  batch = made.normalized()
  assert batch.source.tolist() == [0] * (8 - rows) + [1] * rows
  close([batch.of_source(i).sum() for i in (0, 1)], [1 - mix, mix])
  abstract = sft.abstract_step(setup, 'sft').arguments[1]
  assert jax.tree.structure(abstract) == jax.tree.structure(made), (
    'compile.py and the check see the batch of the stage'
  )
  assert [x.shape for x in jax.tree.leaves(abstract)] == [x.shape for x in jax.tree.leaves(made)]


def test_ptx_is_a_mean_over_its_own_tokens():
  """Its weight does not depend on how many pretraining rows an episode has, nor does that of the
  PPO terms."""
  _, nets, params, scalar = model()
  params = {'policy': params, 'value': scalar}
  batch = ppo_batch(0)
  more = batch.replace(ptx=jax.tree.map(lambda x: jnp.concatenate([x, x, x]), batch.ptx))
  loss = jax.jit(
    lambda batch: losses.ppo_ptx(params, batch.normalized(), None, nets=nets, ptx_coef=3.0)
  )
  (a, one), (b, three) = loss(batch), loss(more)
  close(a, b)
  for name in one:
    close(one[name], three[name])
  log_p = np.asarray(
    jax.jit(nets.logprobs)(params['policy'], batch.ptx.tokens, batch.ptx.mask)[0], np.float64
  )
  weights = np.asarray(batch.ptx.weights, np.float64)
  close(one['ppo/loss/ptx'], -(weights * log_p).sum() / weights.sum())
  close(a, one['ppo/loss/policy'] + one['ppo/loss/value'] + 3 * one['ppo/loss/ptx'])


@pytest.mark.parametrize(
  'changes,words',
  [
    ({'pretrain_mix': 1.0}, 'pretrain_mix=1.0 must be a share of the loss'),
    ({'pretrain_mix': -0.1}, 'pretrain_mix=-0.1 must be'),
    ({'pretrain_mix': 0.5, 'batch_size': 1}, 'no demonstration in a batch of 1'),
    ({'microbatches': 3}, 'batch_size by microbatches'),
    ({'microbatches': 0}, 'batch_size by microbatches'),
    ({'epochs': -1}, 'epochs=-1 must be a number, 0 or more'),
    (
      {'demonstrations': None},
      'demonstrations=None must be a whole number, 1 or more; None, .* data.demon',
    ),
    ({'documents': None}, "documents=None must .* data.pretrain='sandbox:'"),
    ({'demonstrations': 0}, 'demonstrations=0 must be'),
  ],
)
def test_settings_of_sft_that_cannot_be(changes, words, tmp_path):
  c = base.get_config('tiny')
  with c.ignore_type():
    c.stages.sft.update(changes)
  with pytest.raises(ValueError, match=words):
    sft.check(make_setup(c, tmp_path), 'sft')


# prompts of a reward model's epoch


def rankings(sizes):
  """Prompts [i + 2] of K responses of one or nine tokens."""
  responses = [[[5 + j] * (1 + 8 * (i % 2)) for j in range(k)] for i, k in enumerate(sizes)]
  return Comparisons(
    [[i + 2] for i in range(len(sizes))], responses, [list(range(k)) for k in sizes]
  )


@pytest.mark.parametrize('devices,microbatches', [(1, 1), (1, 2), (2, 4), (8, 1), (8, 2)])
def test_over_an_epoch_every_prompt_weighs_the_same(devices, microbatches, tmp_path):
  """Eq. 1 is a mean over prompts. 21 pairs, 7 of K=4 and 3 of K=9, in buckets of K and length whose
  last batches are short. Devices and microbatches change the rows that fill a batch, and neither
  which prompts an update has nor what they weigh."""
  c = base.get_config('tiny')
  c.stages.rm.update(
    k_buckets=(2, 4, 9),
    row_lengths=(8,),
    responses_per_batch=36,
    microbatches=microbatches,
    epochs=2,
  )
  setup = make_setup(c, tmp_path, jax.local_devices()[:devices])
  data = rankings([2] * 21 + [4] * 7 + [9] * 3)
  plan = comparisons.updates(setup, 'rm', data)
  assert plan.prompts == 4 and len({shape for shape, _ in plan.order}) > 2
  assert plan.rows == max(4, devices * microbatches)
  c.stages.rm.microbatches = 1
  alone = comparisons.updates(make_setup(c, tmp_path, jax.local_devices()[:1]), 'rm', data)
  assert [(k, rows.tolist()) for k, rows in plan.order] == [
    (k, rows.tolist()) for k, rows in alone.order
  ]
  weights = np.zeros(31)
  for i, (shape, rows) in enumerate(plan.order):
    batch = comparisons.batch(setup, data, plan, i, encode.comparisons).normalized()
    assert batch.tokens.shape[:2] == (plan.rows, shape[0])
    own = np.concatenate(steps.split(np.asarray(batch.weights), microbatches))
    assert (own[len(rows) :] == 0).all() and (
      np.asarray(batch.tokens)[: len(rows), 0, 0] == np.asarray(rows) + 2
    ).all()
    np.add.at(weights, rows, own[: len(rows)])
  np.testing.assert_allclose(weights, 2 / 4)


@pytest.mark.sampled
@pytest.mark.parametrize('devices', [1, 8])
def test_an_update_of_the_reward_model_is_the_same_on_eight_devices(devices, tmp_path):
  """Six prompts on eight devices: two rows fill the batch, and the gradient is that of six."""
  c = base.get_config('tiny')
  c.stages.rm.update(k_buckets=(2,), row_lengths=(), responses_per_batch=12)
  setup = make_setup(c, tmp_path, jax.local_devices()[:devices])
  data = rankings([2] * 6)
  plan = comparisons.updates(setup, 'rm', data)
  assert (plan.prompts, plan.rows) == (6, 6 if devices == 1 else 8)
  batch = comparisons.batch(setup, data, plan, 0, encode.comparisons)
  chosen = plan.order[0][1]
  expected = encode.comparisons(
    [data.prompts[i] for i in chosen],
    [data.responses[i] for i in chosen],
    [[0, 1]] * 6,
    setup.length,
    2,
    setup.text.template.pad,
  )
  params = {'reward': transformer.init(setup.reward_model, jax.random.key(0), 'scalar')}
  grads = jax.jit(
    lambda p, b: steps.gradients(losses.reward_ranking, p, b, None, nets=setup.nets)[:2]
  )
  whole, figures = grads(params, batch)
  six, of_six = grads(params, jax.tree.map(jnp.asarray, expected))
  jax.tree.map(lambda a, b: close(a, b, rtol=1e-4, atol=1e-6), whole, six)
  for name in figures:
    close(figures[name], of_six[name], rtol=1e-5)


def test_a_short_batch_makes_a_smaller_gradient_and_its_figures_are_means():
  """One prompt in a batch of four: a quarter of the gradient that it makes alone, and its own loss
  and accuracy."""
  _, nets, _, scalar = model()
  alone = jax.tree.map(
    jnp.asarray, encode.comparisons([[5, 8]], [[[7, 1], [2]]], [[1, 0]], 6, 2, pad=0)
  )
  short = jax.tree.map(lambda x: jnp.repeat(x, 4, 0), alone).replace(
    weights=jnp.asarray([1.0, 0, 0, 0])
  )
  grads = jax.jit(lambda p, b: steps.gradients(losses.reward_ranking, p, b, None, nets=nets)[:2])
  (whole, expected), (part, figures) = (grads({'reward': scalar}, b) for b in (alone, short))
  jax.tree.map(lambda a, b: close(a / 4, b, rtol=1e-4), whole, part)
  for name in expected:
    close(figures[name], expected[name])
  assert_additive(losses.reward_ranking, {'reward': scalar}, short, nets, parts=2)


@pytest.mark.parametrize('microbatches', [1, 2, 3, 16])
@pytest.mark.parametrize('k', [2, 4, 9])
def test_every_update_can_be_cut_into_the_microbatches(microbatches, k, tmp_path):
  c = base.get_config('tiny')
  c.stages.rm.update(responses_per_batch=64, microbatches=microbatches)
  setup = make_setup(c, tmp_path, jax.local_devices()[:2])
  prompts = comparisons.prompts_per_update(setup, 'rm', k)
  assert prompts == {2: 32, 4: 16, 9: 7}[k]
  rows = comparisons.filled(setup, 'rm', prompts)
  assert rows % (2 * microbatches) == 0 and 0 <= rows - prompts < 2 * microbatches


@pytest.mark.parametrize(
  'changes,words',
  [
    (
      {'microbatches': 28},
      r'microbatches=28 cuts an update of stages.rm.responses_per_batch=54 into parts of no prompt',
    ),
    ({'microbatches': 0}, 'microbatches=0'),
    ({'epochs': 0.5}, 'epochs=0.5 must be a whole number'),
    ({'k_buckets': ()}, 'k_buckets'),
    ({'prompts': None}, "prompts=None must .* data.comparisons='sandbox:'"),
    ({'evaluation_prompts': None}, 'evaluation_prompts=None must be a whole number, 0 or more'),
    ({'bias_demonstrations': None}, 'bias_demonstrations=None must'),
    ({'bias_demonstrations': 0}, 'bias_demonstrations=0 must be'),
  ],
)
def test_settings_of_the_reward_model_that_cannot_be(changes, words, tmp_path):
  c = base.get_config('tiny')
  with c.ignore_type():
    c.stages.rm.update(changes)
  with pytest.raises(ValueError, match=words):
    rm.check(make_setup(c, tmp_path), 'rm')


# ties


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return f'jsonl:{path}'


def small_rm(folder, rows, share=0.0):
  c = ukp_rm.get_config()
  c.data.update(
    tokenizer=f'hf:{CHAT}',
    template='plain',
    comparisons=write(folder / 'c.jsonl', rows),
    prompt_length=8,
    response_length=4,
    row_length=8,
  )
  c.data.demonstrations = write(
    folder / 'd.jsonl', [dict(prompt=f'd{i}', response='a') for i in range(8)]
  )
  c.data.mapping.update(comparisons=None, demonstrations=None)
  c.data.heldout.share = share
  c.model.update(num_layers=1, d_model=32, num_heads=2, max_length=32)
  c.stages.rm.update(
    bias_demonstrations=4, responses_per_batch=12, k_buckets=(3,), row_lengths=(), log_every=1
  )
  return c


def ranked(i, ranks):
  return dict(prompt=f'Say {i}', responses=['a', 'b', 'c'], ranks=ranks)


def test_ties_alone_are_an_error_before_training(tmp_path):
  c = small_rm(tmp_path, [ranked(i, [1, 1, 1]) for i in range(8)])
  with pytest.raises(
    ValueError, match='stages.rm: none of the 8 comparisons .* ranks a response above another'
  ):
    train.main(c, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'rm' / 'metrics.jsonl').exists()


def test_prompts_of_ties_are_left_out_and_every_batch_has_figures(tmp_path, capsys):
  """Six of ten prompts tie throughout. As rows of their own they would be batches of accuracy 0."""
  train.main(
    small_rm(tmp_path, [ranked(i, [0, 1, 1] if i < 4 else [2, 2, 2]) for i in range(10)]),
    tmp_path / 'run',
  )
  out = capsys.readouterr().out
  assert 'rm: 6 of 10 comparisons rank all of their responses the same and are left out' in out
  assert (
    'rm: no comparison without ties and within the lengths is held out (data.heldout.share=0.0), '
    'so its accuracy is not '
    'measured'
  ) in out
  log = metrics.read(tmp_path / 'run' / 'rm' / 'metrics.jsonl')
  assert len(log['step']) == 1 and log['rm/loss'][0] > 0.1
  info = checkpoint.load_info(tmp_path / 'run' / 'rm' / 'final')
  assert info['prompts'] == 4 and 'accuracy_heldout_prompts' not in info


# no step


def test_no_epoch_is_no_step(tmp_path):
  c = base.get_config('tiny')
  c.stages_to_run = ('sft',)
  c.stages.sft.update(init=dict(policy='random'), demonstrations=16, documents=64, epochs=0)
  train.main(c, tmp_path)
  setup = make_setup(c, tmp_path)
  from alignjax.setup.objects import seed_of

  assert checkpoint.same(
    initial_params(setup, 'stage:sft', 'lm', 0),
    initial_params(setup, 'random', 'lm', seed_of('sft')),
  )
  c.stages.rm.update(epochs=0)
  assert comparisons.updates(setup, 'rm', rankings([4] * 6)).order == []


# what no stage is trained on


def hh(i):
  """A sorted file: the first half is about cats. Every conversation has a second turn in a record
  of its own."""
  first = f'\n\nHuman: {"cats" if i < 200 else "dogs"} {i}\n\nAssistant:'
  answers = dict(chosen=' yes', rejected=' no')
  longer = first + ' well\n\nHuman: and?\n\nAssistant:'
  return [{name: before + text for name, text in answers.items()} for before in (first, longer)]


@pytest.fixture(scope='module')
def one_source(tmp_path_factory):
  """The recipe on hh-rlhf, where one file is demonstrations, comparisons and prompts."""
  folder = tmp_path_factory.mktemp('hh')
  c = pythia_1b_hh.get_config()
  c.checkpoint = f'hf:{CHAT}'
  c.data.demonstrations = c.data.comparisons = c.data.prompts = write(
    folder / 'hh.jsonl', [r for i in range(400) for r in hh(i)]
  )
  c.data.pretrain = write(folder / 't.jsonl', [dict(text=f'{i}') for i in range(1000)])
  c.data.heldout.share = 0.1
  c.model.update(dtype='float32', remat='none', max_length=512)
  c.stages.sft.demonstrations = 100
  return c


def number(record):
  return int(hygiene.conversation(record['prompt']).split()[1])


def test_what_the_reward_model_is_measured_on_is_trained_on_nowhere(one_source, tmp_path):
  setup = make_setup(one_source, tmp_path)
  held = {number(r) for r in records(setup, 'comparisons', None, 'test')}
  assert len(held) == pytest.approx(40, abs=15)
  for kind in ('demonstrations', 'comparisons', 'prompts'):
    trained = {number(r) for r in records(setup, kind, None)}
    assert trained == set(range(400)) - held, (
      f'{kind}: every other conversation, with all of its turns'
    )
  one_source.seed = 7  # a checkpoint of another run may be what this one starts from
  try:
    assert {
      number(r) for r in records(make_setup(one_source, tmp_path), 'comparisons', None, 'test')
    } == held
  finally:
    one_source.seed = 0
  found = comparisons.evaluation(setup, 'rm')
  assert len(found.prompts) == 2 * len(held)
  one_source.stages.rm.evaluation_prompts = 5
  assert len(comparisons.evaluation(setup, 'rm').prompts) == 5


def test_draws_of_a_sorted_file_are_by_the_seed(one_source, tmp_path):
  """The first 100 of 800 would be about cats alone."""
  setup = make_setup(one_source, tmp_path)
  for kind in ('demonstrations', 'prompts', 'comparisons'):
    drawn = records(setup, kind, 100)
    assert len(drawn) == 100 and sum(
      'cats' in hygiene.conversation(r['prompt']) for r in drawn
    ) == pytest.approx(50, abs=20)
    assert drawn == records(setup, kind, 100)
  chosen = [int(r['text']) for r in records(setup, 'pretrain', 100)]
  assert len(set(chosen)) == 100 and np.mean(chosen) == pytest.approx(500, abs=120)
  number, to_rows = encoded.documents(setup, 100)
  first = to_rows(np.arange(number), 8).take(np.arange(1)).tokens[0].tolist()
  text = setup.text.template.document(str(chosen[0]))
  assert number == 100 and first[: len(text)] == text


def test_selection_on_a_source_of_training_takes_what_is_held_out(one_source, tmp_path):
  c = one_source.copy_and_resolve_references()
  c.stages.chosen = selected(
    'stage:sft', source=c.data.prompts, mapping='hh_rlhf_demonstrations', count=10, fn='x:y'
  )
  setup = make_setup(c, tmp_path)
  drawn = selection._prompts(setup, 'chosen')
  assert len(drawn) == 10 and {number(r) for r in drawn} <= {
    number(r) for r in records(setup, 'comparisons', None, 'test')
  }
  c.data.heldout.share = 0.0
  with pytest.raises(ValueError, match='is trained on, and data.heldout.share=0.0 holds none'):
    selection._prompts(setup, 'chosen')


@pytest.mark.parametrize('share', [1.0, -0.1])
def test_a_share_that_cannot_be(one_source, share, tmp_path):
  c = one_source.copy_and_resolve_references()
  c.data.heldout.share = share
  with pytest.raises(ValueError, match=f'data.heldout.share={share} must be from 0 to below 1'):
    records(make_setup(c, tmp_path), 'demonstrations', None)


@pytest.mark.parametrize('stage', ['sft', 'rm', 'dpo'])
def test_a_step_compiles_from_shapes(stage, tmp_path):
  """experiments/estimate.py asks for this: the step on its own abstract batch, as the stage's real
  one."""
  c = dpo.get_config('tiny')
  if stage == 'rm':
    c = base.get_config('tiny')
  setup = make_setup(c, tmp_path)
  plan = plugins.find(f'{c.stages[stage].build.partition(":")[0]}:abstract_step', 'x')(setup, stage)
  after, figures, _ = jax.eval_shape(plan.step, *plan.arguments)
  assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(
    lambda x: x.shape, plan.arguments[0]
  )
  assert figures[f'{stage}/loss'].shape == () and sum(map(len, plan.work.values())) > 0


def test_ranks_begin_at_0_where_the_best_response_is_too_long(tmp_path):
  rows = [
    dict(prompt='a', responses=['much too long', 'b', 'c', 'd'], ranks=[0, 3, 1, 1]),
    dict(prompt='b', responses=['x', 'y'], ranks=[2, 5]),
  ]
  c = small_rm(tmp_path, rows)
  c.stages.rm.k_buckets = (4,)
  c.data.too_long = 'drop'
  made = comparisons.training(make_setup(c, tmp_path / 'run'), 'rm')
  assert list(made.ranks) == [[1, 0, 0], [0, 1]]
