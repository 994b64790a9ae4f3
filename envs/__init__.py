"""Text environments (``gymnasium.Env``) live here; there are none yet."""
