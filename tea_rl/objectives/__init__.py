"""Objectives: pure functions of tensors, shared by online training, offline training and tests (DESIGN section 5)."""
