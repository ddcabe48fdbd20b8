"""Evaluates public NLP tasks with lm-evaluation-harness on our compiled functions (the paper's
Table 14 and Appendix D)."""
