"""Uses a trained model: loads it, answers one prompt, or processes thousands of rows."""
