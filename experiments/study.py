"""`alignjax study` of this clone.

python experiments/study.py leaderboard --workdir=runs/lab
"""

import this_clone  # noqa: F401

from alignjax.commands import main

if __name__ == '__main__':
  main.main('study')
