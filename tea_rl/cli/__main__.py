"""``python -m tea_rl.cli``, the same as ``tea-rl``."""

from tea_rl.cli import main

main()
