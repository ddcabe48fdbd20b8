"""The names under which alignjax 0.1.0 stored the results of its own tasks.

That release identified a task by its module and by the contents of its task file; now the short
name of a task and its version (runtime/versions.py) identify it. A result that was stored under the
earlier name is still used as long as the version is still that of release 0.1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignjax import plugins
from alignjax.runtime import fingerprints

# For each task: its module and function, and the fingerprint of its task file, in version 0.1.0.
TASKS = {
  'cnn_dm': ('alignjax.evals.public:cnn_dm', 'a8e37f196339aa96'),
  'crows_pairs': ('alignjax.evals.bias:crows_pairs', None),
  'drop': ('alignjax.evals.public:drop', 'db12cd556683c090'),
  'hellaswag': ('alignjax.evals.public:hellaswag', '50845069a4388db6'),
  'judge_agreement': ('alignjax.evals.truthfulness:judge_agreement', None),
  'quac': ('alignjax.evals.public:quac', 'dfa4a08b7b8fdd8e'),
  'realtoxicityprompts': ('alignjax.evals.toxicity:realtoxicityprompts', None),
  'rte': ('alignjax.evals.public:rte', '40c568257e214bac'),
  'squadv2': ('alignjax.evals.public:squadv2', 'ddff081beaefbcaa'),
  'sst': ('alignjax.evals.public:sst', '1a78c55086b89edf'),
  'tldr': ('alignjax.evals.public:tldr', 'e9afd82b265591ca'),
  'truthfulqa': ('alignjax.evals.truthfulness:truthfulqa', None),
  'truthfulqa_mc': ('alignjax.evals.public:truthfulqa_mc', None),
  'winogender': ('alignjax.evals.bias:winogender', None),
  'wmt15_fr_en': ('alignjax.evals.public:wmt15_fr_en', '1a73593e828197cc'),
  'wsc': ('alignjax.evals.public:wsc', '2962d77f27251d07'),
}


def name_of(name: str, protocol: Mapping[str, Any], facts: Mapping[str, Any]) -> str | None:
  """Returns the name of a result's file and folder in alignjax 0.1.0, or None for a task that this
  release did not have.

  Args:
    name: the name of the task.
    protocol: the value of registry.protocol.
    facts: the value of loading.facts for the model.
  """
  if name not in TASKS:
    return None
  task, file = TASKS[name]
  options = plugins.earlier_names(protocol['options'])
  then = dict(protocol, task=task, file=file, options=options)
  return f'{name}-{fingerprints.of_value([then, facts])}'
