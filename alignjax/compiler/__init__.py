"""What a compiled step costs, read off the program that XLA made of it."""
