"""A model and a store in several shards, made once for all tests of the state store."""

import shutil

import pytest
from stores import embed, write_recipe
from tiny import save_tiny

from tea_rl.recipe import load_recipe


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def made(tmp_path_factory, model):
    """A store in several shards, its recipe and folder; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("made")
    recipe = load_recipe(write_recipe(folder, model))
    return embed(recipe, folder / "store"), recipe, folder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[0].path, tmp_path / "store")
