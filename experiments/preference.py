"""`alignjax preference` of this clone.

python experiments/preference.py --policies=... --prompts=sandbox: --judge=sandbox
"""

import this_clone  # noqa: F401

from alignjax.commands import main

if __name__ == '__main__':
  main.main('preference')
