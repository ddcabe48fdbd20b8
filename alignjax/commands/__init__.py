"""The subcommands of `alignjax`, with one module each, and the modules that they share."""
