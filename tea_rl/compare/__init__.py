"""Comparison of training methods on equal terms: jobs in their own processes, one way of measuring, one page of results."""
