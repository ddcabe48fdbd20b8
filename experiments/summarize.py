"""`alignjax summarize` of this clone.

python experiments/summarize.py runs/ppo_ptx-s*
"""

import this_clone  # noqa: F401

from alignjax.commands import main

if __name__ == '__main__':
  main.main('summarize')
