"""The subcommands of `alignjax`, one module each, and what they share."""
