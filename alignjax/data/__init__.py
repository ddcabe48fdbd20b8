"""Text in, fixed-shape rows out: sources (records by name), encode (records -> rows), batches
(their order)."""
