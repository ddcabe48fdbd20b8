"""Public NLP tasks, by lm-evaluation-harness on our compiled functions (paper's Table 14, Appendix
D)."""
