"""`alignjax run` of this clone.

python experiments/run.py --config=configs/ppo_ptx.py
"""

import this_clone  # noqa: F401

from alignjax.commands import main

if __name__ == '__main__':
  main.main('run')
