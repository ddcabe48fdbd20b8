"""Turns text into rows of a fixed shape: sources (records by name), encode (records -> rows), and
batches (the order of the rows)."""
