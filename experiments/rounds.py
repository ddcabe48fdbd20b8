"""`alignjax rounds` of this clone.

python experiments/rounds.py --config=configs/rounds.py
"""

import sys

import this_clone  # noqa: F401

from alignjax.commands import main

if __name__ == '__main__':
  main.start('rounds', sys.argv[1:])
