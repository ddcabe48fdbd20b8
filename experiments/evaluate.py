"""`alignjax evaluate` of this clone.

python experiments/evaluate.py --models=sft=runs/mine/sft --tasks=winogender
"""

import this_clone  # noqa: F401

from alignjax.commands import main

if __name__ == '__main__':
  main.main('evaluate')
