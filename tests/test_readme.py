"""Invariant 8: what the README shows can be typed."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

import tea_rl
import tea_rl.training.sweep as sweep_module
from tea_rl.cli import app, main
from tea_rl.cli.train import from_store
from tea_rl.recipe import load_recipe, schema_markdown
from tea_rl.rewards import load_rewards
from tea_rl.training.progress import Listener

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_recipe_reference_is_the_schema():
    """If this fails: paste the output of `tea-rl recipes --schema` between the marks."""
    shown = README.split("<!-- recipe reference: begin -->")[1].split("<!-- recipe reference: end -->")[0]
    assert shown.strip() == schema_markdown().strip()


def test_commands_exist_with_their_options(capsys):
    lines = [line.split("#")[0] for block in blocks("console") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("tea-rl ")]
    assert len(commands) >= 8
    known = {command.name for command in app.registered_commands}
    groups = {group.name for group in app.registered_groups}
    for command in commands:
        assert command[1] in known | groups, command
        with pytest.raises(SystemExit) as done:
            main([*command[1 : 3 if command[1] in groups else 2], "--help"])
        assert done.value.code == 0
        page = capsys.readouterr().out
        for option in command[2:]:
            if option.startswith("--"):
                assert option in page, (command, option)


@pytest.mark.parametrize("option", ["train", "sweep"])
def test_recipes_that_generate_learn_from_a_store_as_well(option, tmp_path, monkeypatch):
    """Whatever the shipped recipes say of generating is nothing to a store: the commands shown are not refused."""
    for name in ("quickstart", "arithmetic"):
        recipe = load_recipe(name, ["rollout.reward_workers=1", "rollout.reward_timeout=9"])
        settings = load_recipe(name, [*from_store(tmp_path), "objective.name=cross_entropy"])
        assert settings.offline and recipe.rollout.early_steps + recipe.rollout.dynamic_sampling > 0
        if option == "sweep":
            monkeypatch.setattr(sweep_module, "fit_recipe", lambda found, *_: found)
            recipe.objective.name = "cross_entropy"
            store = SimpleNamespace(path=tmp_path)
            grid = {"train.learning_rate": [1e-4, 1e-3]}
            found = sweep_module.grid_recipes(store, recipe, grid, Listener())
            assert [one.train.learning_rate for _, one in found] == [1e-4, 1e-3]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {
        target
        for block in blocks("console")
        for target in re.findall(r"^make (\S+)", block, flags=re.MULTILINE)
    }
    assert {"quickstart", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_recipe_example_parses(tmp_path):
    (tmp_path / "my_prompts.txt").write_text("Hello\n")
    (tmp_path / "my_rewards.py").write_text(blocks("python")[0])
    recipe, game = blocks("yaml")
    (tmp_path / "my_recipe.yaml").write_text(recipe)
    (tmp_path / "my_game.yaml").write_text(game)
    assert load_recipe(str(tmp_path / "my_game.yaml")).env.id == "tea_rl/FrozenLake-v0"
    loaded = load_recipe(str(tmp_path / "my_recipe.yaml"))
    rewards = load_rewards(loaded.rewards, loaded.base_dir)
    assert rewards(["Hello"], ["Yes, please."], {}).terms["polite"] == [1.0]


def test_python_example_names_exist():
    code = blocks("python")[1]
    names = re.search(r"from tea_rl import (.*)", code)[1].split(", ")
    assert all(hasattr(tea_rl, name) for name in names)
    compile(code, "README.md", "exec")


@pytest.mark.slow
@pytest.mark.model
def test_python_example_runs(tmp_path, monkeypatch):
    """The fifteen lines as they stand, with the recipe cut short."""
    import tea_rl.training.online as online

    load = online.load_recipe
    monkeypatch.setattr(
        online, "load_recipe", lambda name: load(name, ["train.max_steps=1", "train.eval_generations=1"])
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[1], "README.md", "exec"), {})
    assert (tmp_path / "my-head" / "tea_head.safetensors").is_file()
