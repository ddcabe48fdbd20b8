"""Truthfulness, toxicity and bias, as the paper measures them (section 4.2, Appendix D)."""
