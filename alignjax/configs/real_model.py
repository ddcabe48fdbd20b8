"""SmolLM2-135M by SFT, RM, PPO and PPO-ptx: the runs of the study real_model.

  alignjax study real_model --workdir=runs/real     with tables, over seeds
  alignjax run --config=real_model[:tiny]           its runs alone

It is smollm2_135m with shorter texts, both kinds of PPO, and checkpoints of them along the way, so
that a seed takes minutes on one GPU. `:small` is for two CPU cores, and `:tiny` to see that
checkpoint and data fit. Nothing is tuned on a GPU yet.
"""

from alignjax.configs import recipe, smollm2_135m

CHECKPOINTS = 4  # of each policy, for the curve against KL


def get_config(size: str = 'default'):
  recipe.check_size(size, ('default', 'small', 'tiny'))
  c = smollm2_135m.get_config('default' if size == 'default' else 'cpu')
  c.data.update(
    prompt_length=256 if size == 'default' else 192,
    response_length=128 if size == 'default' else 32,
    row_length=256 if size == 'default' else 64,
    too_long='drop' if size == 'default' else 'truncate',
    heldout=dict(share=0.05, seed=0),
  )
  s = c.stages
  if size == 'default':
    s.sft.update(epochs=2, batch_size=32, microbatches=1)
    s.rm.update(responses_per_batch=32, row_lengths=(192,))
    s.ppo_ptx.update(iterations=100, microbatches=1)
    s.ppo_ptx.rollout.episodes = 128
    s.ppo_ptx.optimizer.policy.update(lr=5e-6)
  else:
    s.sft.update(demonstrations=128, epochs=1, documents=50)
    s.rm.update(prompts=200, row_lengths=(), evaluation_prompts=40)
    s.ppo_ptx.update(iterations=8)
    s.ppo_ptx.ptx.documents = 50
  if size == 'tiny':
    s.sft.update(demonstrations=16, batch_size=8)
    s.rm.update(prompts=24, evaluation_prompts=8, bias_demonstrations=8, responses_per_batch=8)
    s.ppo_ptx.update(iterations=4)
    s.ppo_ptx.rollout.episodes = 8
  p = s.ppo_ptx
  p.optimizer.policy.warmup = min(10, p.iterations // 2) * p.minibatches
  p.save_every, p.keep_candidates = max(1, p.iterations // CHECKPOINTS), CHECKPOINTS
  s.ppo = p.copy_and_resolve_references()
  s.ppo.loss.ptx_coef = 0.0
  s.ppo.ptx.update(documents=0, rows_per_episode=0)
  c.stages_to_run = ('ppo', 'ppo_ptx')
  c.report.policies = dict(
    pretrained=c.get_oneway_ref('checkpoint'), sft='sft', ppo='ppo', ppo_ptx='ppo_ptx'
  )
  return c
