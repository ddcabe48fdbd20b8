"""Measures whose responses people, or models in their place, prefer (sections 3.6 and 4.1)."""
