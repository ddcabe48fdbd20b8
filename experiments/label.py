"""`alignjax label` of this clone.

python experiments/label.py serve
"""

import this_clone  # noqa: F401

from alignjax.commands import main

if __name__ == '__main__':
  main.main('label')
