"""Recipes: what they accept, what they refuse and in which words."""

import subprocess
import sys

import pytest
import yaml

from tea_rl.envs import make_env
from tea_rl.errors import TeaError
from tea_rl.recipe import (
    DataConfig,
    Recipe,
    RewardSpec,
    TrainConfig,
    describe_schema,
    load_recipe,
    parse_recipe,
    schema_markdown,
    shipped_recipes,
)

BASE = "data: {prompts: [a, b]}\nrewards: [{name: sentiment}]\n"


@pytest.fixture
def write(tmp_path):
    def write_recipe(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_recipe


def error_of(path, overrides=()):
    with pytest.raises(TeaError) as caught:
        load_recipe(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_every_shipped_recipe_loads_and_its_files_exist():
    shipped = shipped_recipes()
    assert {"quickstart", "arithmetic"} <= shipped.keys()
    for name, path in shipped.items():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.base_dir == path.resolve().parent
        if recipe.env.id is not None:
            make_env(
                recipe.env.id, recipe.env.kwargs, [spec.model_dump() for spec in recipe.env.wrappers]
            ).close()
        elif not recipe.offline and not str(recipe.data.prompts).startswith("reasoning_gym/"):
            assert (recipe.base_dir / recipe.data.prompts).is_file()


def test_yaml_round_trip_keeps_awkward_texts(write, tmp_path):
    recipe = parse_recipe(
        {
            "name": "007",
            "description": "1e5",
            "data": {
                "prompts": ["yes", "3e-4", "a\n b ", "é: #", "null"],
                "template": "\n\n  x {prompt}\n",
                "kwargs": {},
            },
            "rewards": [
                {"name": "regex", "kwargs": {"pattern": "\\d+", "n": 1e-7, "deep": {"a": [None, True]}}}
            ],
            "rollout": {"stop": ["\n", "END"]},
            "train": {"learning_rate": 1e-5},
        },
        base_dir=tmp_path,
    )
    again = load_recipe(write(recipe.to_yaml()))
    assert again == recipe
    assert yaml.safe_load(recipe.to_yaml())["train"]["max_steps"] == 24  # defaults are written out


def test_name_defaults_to_the_file_stem(write):
    assert load_recipe(write(BASE, "my run (2).yaml")).name == "my-run-2"


@pytest.mark.parametrize("number", ["3e-4", "3E-4", ".3e-3", "3.0e-4", "0.0003", "'3e-4'"])
def test_exponents_are_numbers(write, number):
    assert load_recipe(write(BASE + f"train: {{learning_rate: {number}}}")).train.learning_rate == 3e-4


def test_exponents_are_numbers_where_anything_goes(write):
    recipe = load_recipe(
        write("data: {prompts: [a]}\nrewards: [{name: repetition, kwargs: {threshold: 1e-1}}]")
    )
    assert recipe.rewards[0].kwargs == {"threshold": 0.1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty file"]),
        ("- a", ["mapping", '["a"]']),
        (b"\xff\xfe", ["UTF-8", "byte 0"]),
        ("a: [1,\nb: }", ["mine.yaml line 2, column 4", "not valid YAML"]),
        ("train:\n\tseed: 1", ["line 2, column 1", "spaces, not tabs"]),
        ("a: !!python/object:os.system x", ["not valid YAML", "python/object"]),
        (BASE + "data: {prompts: [c]}", ["line 3", '"data" is written twice']),
        (BASE + "trian: {seed: 1}", ['"trian"', 'Did you mean "train"?']),
        (BASE + "train: {lerning_rate: 1}", ["train.lerning_rate", 'Did you mean "learning_rate"?']),
        (BASE + "learning_rate: 1", ['belongs under "train"']),
        (BASE + "head: {num_member: 1}", ["head.num_member", '"num_members"']),
        (BASE + "head: {3: 1}", ["head.3", "num_members"]),
        (BASE + "train:\n", ["train: expected a mapping", "nothing (null)", "delete the line"]),
        (BASE + "train: [1]", ["train: expected a mapping", "[1]"]),
        (BASE + "train: {max_steps: many}", ["train.max_steps", "whole number of at least 1", '"many"']),
        (BASE + "train: {max_steps: true}", ["train.max_steps", "got true"]),
        (BASE + "head: {hidden_sizes: [true]}", ["head.hidden_sizes", "true"]),
        (BASE + "head: {hidden_sizes: 256}", ["list of whole numbers", "[256]"]),
        (BASE + "train: {learning_rate: .inf}", ["train.learning_rate", "Infinity"]),
        (BASE + "train: {optim: adamW}", ["adamw, ademamix, sgd", 'Did you mean "adamw"?']),
        (BASE + "train: {lr_scheduler_type: reduce_lr_on_plateau}", ["constant_with_warmup"]),
        (BASE + "name: 7", ["name: expected text", "quotes"]),
        (BASE + "name: a/b", ["name", "letters"]),
        (BASE + "rollout: {stop: '\\n'}", ["rollout.stop", "list"]),
        (BASE + "rollout: {stop: ['\\n']}", ["rollout.stop", "double quotes"]),
        (BASE + "rollout: {temperature: 0}", ["rollout.temperature", "above 0"]),
        (BASE + "model: {trust_remote_code: true}", ["unknown key", "model.trust_remote_code"]),
        ("data: {prompts: [a]}", ["rewards must hold at least one term", "sentiment"]),
        (
            "data: {prompts: [a], store: s}\nrewards: [{name: sentiment}]",
            ["a recipe needs one of", "data.prompts and data.store"],
        ),
        ("data: {eval_size: 3}\nrewards: [{name: sentiment}]", ["a recipe needs one of", "got none"]),
        (
            "data: {prompts: [a]}\nrewards: [{name: sentiment}]\nobjective: {name: dpo}",
            ["dpo learns from labelled data", "data.dataset or data.store"],
        ),
        ("rewards: [{name: x}]", ["a recipe needs one of", "got none"]),
        ("data: {promts: x}\nrewards: [{name: x}]", ["data.promts", 'Did you mean "prompts"?']),
        ("data: {prompts: [a, yes]}\nrewards: [{name: x}]", ["data.prompts", "texts", "quotes"]),
        ("data: {prompts: []}\nrewards: [{name: x}]", ["data.prompts", "at least one prompt"]),
        ("data: {prompts: [a], template: x}\nrewards: [{name: x}]", ["data.template", "{prompt}"]),
        ("data: {prompts: [a]}\nrewards: sentiment", ["rewards", "list"]),
        ("data: {prompts: [a]}\nrewards: [sentiment]", ["rewards.0", "write {name: sentiment}"]),
        ("data: {prompts: [a]}\nrewards: [{name: x, wieght: 1}]", ["rewards.0.wieght", '"weight"']),
        ("data: {prompts: [a]}\nrewards: []", ["rewards must hold at least one term"]),
        (BASE + "head: {train_reference: true}", ["head.train_reference", "anchor.conservativity"]),
        (BASE + "rollout: {num_generations: 1}", ["rollout.num_generations", "grpo"]),
        (
            BASE + "rollout: {num_generations: 1}\nobjective: {name: rloo}",
            ["rollout.num_generations", "rloo"],
        ),
        (BASE + "rollout: {top_p: 0.9}", ["rollout.top_p", "truncating"]),
        (BASE + "rollout: {top_k: 40}", ["rollout.top_k", "truncating"]),
        ("data: {prompts: [a], system: s}\nrewards: [{name: x}]", ["data.system", "chat"]),
    ],
)
def test_a_mistake_gives_one_line_that_names_it(write, text, words):
    message = error_of(write(text))
    assert "mine.yaml" in message
    for word in words:
        assert word in message, message


def test_settings_that_only_look_like_the_refused_ones_load(write):
    load_recipe(write(BASE + "head: {train_reference: true}\nanchor: {conservativity: 0}"))
    load_recipe(write(BASE + "rollout: {num_generations: 1}\nobjective: {name: reinforce, target_kl: null}"))
    load_recipe(write("data: {prompts: [a], eval_fraction: 0}\nrewards: [{name: x}]"))


def test_overrides(write):
    recipe = load_recipe(
        write(BASE),
        ["rewards.0.weight=2", "train.learning_rate=1e-3", "name=007", "model.revision=123", 'rollout.stop=["\\n"]',
         "data.kwargs.a.b=[1]", "objective.target_kl=null"],
    )  # fmt: skip
    assert (recipe.rewards[0].weight, recipe.train.learning_rate) == (2.0, 1e-3)
    assert (recipe.name, recipe.model.revision) == ("007", "123")
    assert recipe.rollout.stop == ["\n"]
    assert recipe.data.kwargs == {"a": {"b": [1]}}
    assert recipe.objective.target_kl is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_steps", ["KEY=VALUE"]),
        ("train.max_step=5", ['Did you mean "max_steps"?']),
        ("trian.max_steps=5", ['Did you mean "train"?']),
        ("train.max_steps=many", ["whole number"]),
        ("train.max_steps=", ["nothing (null)"]),
        ("rewards.3.weight=5", ["list of 1"]),
        ("data.prompts.x.y=5", ["data.prompts"]),
        ("data.prompts=[a", ["not valid YAML"]),
    ],
)
def test_a_wrong_override_is_quoted(write, override, words):
    message = error_of(write(BASE), [override])
    assert message.startswith("--set ") and override in message
    for word in words:
        assert word in message, message


def test_paths_in_the_file_are_relative_to_it_and_those_on_the_command_line_to_the_shell(
    tmp_path, monkeypatch, write
):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "shell").mkdir()
    (tmp_path / "recipes" / "folder").mkdir()
    path = write(
        "data: {prompts: p.txt, eval_prompts: folder}\nmodel: {name_or_path: ./model}\n"
        "rewards: [{name: 'r/my.py:f'}, {name: sentiment}, {name: json_schema, kwargs: {schema: s.json}}]",
        "recipes/r.yaml",
    )
    monkeypatch.chdir(tmp_path / "shell")
    recipe = load_recipe(path)
    here = (tmp_path / "recipes").resolve()
    assert recipe.data.prompts == str(here / "p.txt")
    assert recipe.data.eval_prompts == str(here / "folder")
    assert recipe.model.name_or_path == str(here / "model")
    assert [spec.name for spec in recipe.rewards] == [f"{here / 'r/my.py'}:f", "sentiment", "json_schema"]
    assert recipe.rewards[2].kwargs["schema"] == str(here / "s.json")
    overridden = load_recipe(path, ["data.prompts=q.txt", "data.eval_prompts=user/hub"])
    assert overridden.data.prompts == str((tmp_path / "shell").resolve() / "q.txt")
    assert overridden.data.eval_prompts == "user/hub"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("quikstart", ['Did you mean "quickstart"?']),
        ("quickstart.yaml", ['shipped recipe is called "quickstart"']),
        ("nowhere/r.yaml", ["does not exist"]),
        ("./", ["folder"]),
    ],
)
def test_a_recipe_that_is_not_there(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error_of(name)
    for word in words:
        assert word in message, message


def test_python_callers_get_the_cross_checks_too():
    data = DataConfig(prompts=["a"])
    with pytest.raises(TeaError, match="train_reference"):
        Recipe(data=data, rewards=[RewardSpec(name="x")], head={"train_reference": True})


def test_parsing_leaves_the_callers_mapping_alone():
    raw = {"data": {"prompts": "p.txt"}, "rewards": [{"name": "x"}]}
    parse_recipe(raw, overrides=["train.seed=3"])
    assert raw == {"data": {"prompts": "p.txt"}, "rewards": [{"name": "x"}]}


def test_every_schedule_offered_works_in_transformers():
    import torch
    from transformers import get_scheduler

    for name in TrainConfig.model_fields["lr_scheduler_type"].annotation.__args__:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=4)
        optimizer.step()
        scheduler.step()


def test_every_setting_is_described_and_the_reference_lists_it():
    rows = {row.key: row for row in describe_schema()}
    assert all(row.description for row in rows.values())
    assert rows["rewards[].name"].default is None
    assert rows["rewards[].weight"].default == "1.0"
    assert rows["anchor.conservativity"].type == "a number of at least 0"
    reference = schema_markdown()
    for row in rows.values():
        group, _, key = row.key.rpartition(".")
        section = (
            reference.split(f"### `{group.removesuffix('[]')}`")[1].split("###")[0] if group else reference
        )
        assert f"| `{key}` |" in section
    widths = {line.replace("\\|", "").count("|") for line in reference.splitlines() if line.startswith("|")}
    assert widths == {5}


def test_reading_a_recipe_imports_nothing_heavy():
    code = "import sys, tea_rl.recipe as r; r.load_recipe('quickstart'); print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
