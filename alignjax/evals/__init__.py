"""Measures policies and reward models. Each folder holds one kind of evaluation. The modules beside
the folders hold what the evaluations share: items, figures with intervals, the table, and the
sandbox's evaluation, whose exact answers are known."""
