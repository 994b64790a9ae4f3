"""Settings every test shares. They are made before torch or transformers is imported."""

import os
import sys

import pytest

# No test may reach for the network: the real model comes from an installed package, the others from configurations.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Rich and typer wrap and colour by terminal; tests read what they print.
os.environ.setdefault("NO_COLOR", "1")
os.environ.setdefault("COLUMNS", "200")

# Helpers that several test modules share lie beside this file.
sys.path.insert(0, os.path.dirname(__file__))


@pytest.fixture
def unrendered_pictures(monkeypatch):
    """Learning curves are laid out as ever and saved empty: rendering them is nine tenths of a tiny run's time."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda figure, buffer, **_: buffer.write(b"\x89PNG\r\n\x1a\n"))
