"""Rounds of labels: sample, choose, label, reward model, PPO-ptx, and again.

  alignjax rounds --config=rounds[:tiny]
  alignjax rounds --config=rounds --config.rounds.labels="(1000, 500, 500)"
  alignjax rounds --config=rounds --config.rounds.choose.fn=alignjax.label.choose:near_tie

On the sandbox, whose labelers answer at once. Any other config has rounds when it gets an entry
`rounds` like this one, with labelers='people' outside of the sandbox: c.rounds = rounds.entry().
It takes the place of what the reward model's stage says about its comparisons.
"""

from ml_collections import config_dict

from alignjax.configs import base


def entry(**changes) -> dict:
  """The entries of `rounds`.

  Args:
    **changes: entries with other values.
  """
  return (
    dict(
      labels=(1000, 1000),  # of each round, how many rankings are made: one by one labeler each
      prompts=3000,  # of each round, new ones; `choose` says which of them are labelled
      responses=(4, 9),  # to a prompt; those that are the same are shown once
      # init: a stage before the reward model, or 'newest' or 'earlier', the policies of the rounds
      # before. The shares of those that a round has add up to 1.
      policies=(
        dict(init='stage:sft', temperature=1.0, share=0.4),
        dict(init='stage:sft', temperature=1.5, share=0.1),
        dict(init='newest', temperature=1.0, share=0.4),
        dict(init='earlier', temperature=1.0, share=0.1),
      ),
      choose=dict(fn='alignjax.label.choose:random'),
      ensemble=1,  # reward models whose scores `choose` is given
      labelers='sandbox',  # or 'clients', the same over HTTP, or 'people'
      database=config_dict.placeholder(str),  # of clients and people; None: WORKDIR/labels.db
      task='round',  # in the database the tasks are called by this word and the number of the round
      reward_model='rm',  # the stage that learns from the rankings
      policy='ppo_ptx',  # the stage that a round ends with, from the same policy in every round
      base=config_dict.placeholder(str),  # where the stages before them are; None: WORKDIR/base
      # held-out prompts and samples of each that a round is measured on. Outside of the sandbox
      # people rank these too, beyond `labels`.
      evaluation_prompts=300,
      evaluation_samples=4,
    )
    | changes
  )


def get_config(size: str = 'default'):
  c = base.get_config(size)
  del c.stages.ppo
  c.rounds = entry()
  if size == 'tiny':
    c.rounds.update(labels=(48, 48), prompts=96, evaluation_prompts=12)
  return c
