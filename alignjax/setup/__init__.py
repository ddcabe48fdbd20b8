"""From the config to objects: text, architectures, weights by name, records. Below stages,
evaluations and inference."""
