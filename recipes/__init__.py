"""Recipes shipped with the package; import name ``tea_rl.recipes``."""
