"""Importing this module puts the clone that it lies in before an installed alignjax.

The folder of the scripts, which Python puts first, goes to the end of the path: evaluate.py and
others have the names of libraries.
"""

import pathlib
import sys

sys.path.append(sys.path[0])
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)
