"""Evaluates reward models: accuracy by labelers, held-out labelers, best of n, and model selection
(sections 4.1, E.2, C.1)."""
