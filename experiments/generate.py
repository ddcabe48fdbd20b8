"""`alignjax generate` of this clone.

python experiments/generate.py --model=runs/ppo_ptx-s0/ppo_ptx
"""

import this_clone  # noqa: F401

from alignjax.commands import main

if __name__ == '__main__':
  main.main('generate')
