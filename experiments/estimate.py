"""`alignjax estimate` of this clone.

python experiments/estimate.py --config=configs/ppo_ptx.py --topology=v5p:8x8x8 --stage=ppo_ptx
"""

import this_clone  # noqa: F401

from alignjax.commands import main

if __name__ == '__main__':
  main.main('estimate')
