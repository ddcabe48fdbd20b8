"""The laboratory: small questions about RLHF, each answered by one command on the sandbox.

`study.py` says what a study is. NAMES are the studies that are included.
"""

NAMES: tuple[str, ...] = (
  'leaderboard',
  'calibration',
  'overoptimization',
  'averages',
  'ensembles',
  'biases',
)
