"""A model to use: load it, ask it one thing, or thousands of rows."""
