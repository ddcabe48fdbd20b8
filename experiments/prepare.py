"""`alignjax prepare` of this clone.

python experiments/prepare.py --source=jsonl:raw.jsonl.gz --kind=prompts --out=data/mine
"""

import this_clone  # noqa: F401

from alignjax.commands import main

if __name__ == '__main__':
  main.main('prepare')
