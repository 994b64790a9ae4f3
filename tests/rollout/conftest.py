"""Tiny models, made once for all tests of the decode loop."""

import os
import sys

import pytest
from tiny import tiny_backbone

sys.path.insert(0, os.path.dirname(__file__))


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """Tiny backbones by family, made once."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tiny_backbone(tmp_path_factory.mktemp("models"), family)
        return made[family]

    return get
