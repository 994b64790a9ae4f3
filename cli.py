"""Launcher: ``python cli.py ...`` is ``tea-rl ...``."""

from tea_rl.cli import main

if __name__ == "__main__":
    main()
