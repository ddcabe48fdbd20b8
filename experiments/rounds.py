"""`alignjax rounds` of this clone.

python experiments/rounds.py --config=configs/rounds.py
"""

import this_clone  # noqa: F401

from alignjax.commands import main

if __name__ == '__main__':
  main.main('rounds')
