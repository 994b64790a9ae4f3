"""Evaluation: metrics of a policy on held-out prompts, and the report of a run."""
