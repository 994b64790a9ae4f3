"""What the tests of trainings share."""

import pytest


@pytest.fixture(autouse=True)
def pictures(request):
    """Trainings save their curves empty, except where a test is marked ``rendered``."""
    if not request.node.get_closest_marker("rendered"):
        request.getfixturevalue("unrendered_pictures")
