"""From the config to objects: text, architectures, weights by name, records. This room is below
stages, evaluations and inference."""
