"""`alignjax heldout_labelers` of this clone.

python experiments/heldout_labelers.py --config=configs/ukp_rm.py --comparisons=jsonl:FILE
"""

import this_clone  # noqa: F401

from alignjax.commands import main

if __name__ == '__main__':
  main.main('heldout_labelers')
