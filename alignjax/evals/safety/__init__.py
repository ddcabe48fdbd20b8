"""Evaluates truthfulness, toxicity and bias as the paper does (section 4.2, Appendix D)."""
