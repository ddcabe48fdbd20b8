"""Measuring policies and reward models. Each folder is one kind of evaluation; beside them stands
what they share: items, figures with intervals, the table, and the sandbox's evaluation with exact
answers."""
