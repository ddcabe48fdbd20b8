"""The sandbox with labelers who like agreement and refusals and miss falsehoods.

  alignjax run --config=biased[:tiny]

The studies of biased labelers are `alignjax study biases`.
"""

from alignjax.configs import base


def get_config(size: str = 'default'):
  c = base.get_config(size)
  with c.world.unlocked():
    c.world.beliefs = 0.5  # of the questions: before these the user states a belief
    c.world.harmful = 0.5  # of the 'rewrite' prompts: these ask for an insult
    # The bonuses in utility, the probability that a falsehood of the best wording is missed, and
    # the share of the training labelers who have these biases.
    c.world.labelers = dict(agreement=2.0, refusal=2.0, miss=0.9, share=1.0)
  return c
