"""`alignjax export` of this clone.

python experiments/export.py --model=runs/smollm2_135m-s0/ppo_ptx --out=my-model
"""

import this_clone  # noqa: F401

from alignjax.commands import main

if __name__ == '__main__':
  main.main('export')
