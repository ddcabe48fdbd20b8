"""Reward models measured: accuracy by labelers, held-out labelers, best of n, model selection
(sections 4.1, E.2, C.1)."""
