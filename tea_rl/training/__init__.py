"""Training: the learner (states in, update out), the online loop, and the run directory with its checkpoints."""
