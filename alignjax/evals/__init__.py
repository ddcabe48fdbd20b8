"""Measuring policies and reward models: sampling in bulk, intervals, and the sandbox's gold evaluations."""
