"""A reward that is a Python function of texts: a rule here, but a classifier or a call to a service
has the same form. It runs on the host while the device waits; alignjax.rewards.host_reward calls it
again where it fails, and a run that has to give it up loses nothing. Its flag stands in
examples/README.md.
"""

from __future__ import annotations


def one_sentence(prompts: list[str], responses: list[str]) -> list[float]:
  """1 for a response that is one whole sentence, else 0; a tenth less for each word over ten."""
  del prompts
  whole = [r.rstrip().endswith('.') and r.count('.') == 1 for r in responses]
  return [
    float(w) - 0.1 * max(0, len(r.split()) - 10) for w, r in zip(whole, responses, strict=True)
  ]
