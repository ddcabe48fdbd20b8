"""`alignjax best_of_n` of this clone.

python experiments/best_of_n.py --policy=runs/ppo_ptx-s0/sft --reward_model=runs/ppo_ptx-s0/rm
"""

import this_clone  # noqa: F401

from alignjax.commands import main

if __name__ == '__main__':
  main.main('best_of_n')
