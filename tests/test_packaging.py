"""The list of packages in pyproject.toml is written by hand: it must name every folder that holds code."""

import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def package_folders() -> set[str]:
    inside = {path.parent.relative_to(ROOT) for path in (ROOT / "tea_rl").rglob("*.py")}
    beside = {
        path.parent.relative_to(ROOT) for name in ("envs", "recipes") for path in (ROOT / name).rglob("*.py")
    }
    names = {".".join(folder.parts) for folder in inside} | {
        ".".join(("tea_rl", *folder.parts)) for folder in beside
    }
    return {name for name in names if "__pycache__" not in name}


def test_every_folder_with_code_is_a_listed_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["packages"]) == package_folders()


def test_every_listed_package_has_an_init_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {"tea_rl.envs": ROOT / "envs", "tea_rl.recipes": ROOT / "recipes"}
    for name in project["tool"]["setuptools"]["packages"]:
        folder = folders.get(name, ROOT.joinpath(*name.split(".")))
        assert (folder / "__init__.py").is_file(), f"{folder}/__init__.py is missing"


def test_core_dependencies_are_pinned_for_every_supported_python():
    packaging_requirements = pytest.importorskip("packaging.requirements")
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = [packaging_requirements.Requirement(line) for line in lines]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["rewards"] + extras["reasoning"]
    wanted += extras["envs"] + extras["dev"]
    for python in ("3.10", "3.11", "3.13"):
        for text in wanted:
            requirement = packaging_requirements.Requirement(text)
            pin = [
                pin
                for pin in pins
                if pin.name.lower().replace("_", "-") == requirement.name.lower().replace("_", "-")
                and (pin.marker is None or pin.marker.evaluate({"python_version": python}))
            ]
            assert len(pin) == 1, f"{text} on Python {python}: {len(pin)} pins in constraints.txt"
            version = next(iter(pin[0].specifier)).version
            assert requirement.specifier.contains(version), f"{pin[0]} is outside of {text}"
