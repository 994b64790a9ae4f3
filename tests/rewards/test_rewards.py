"""Rewards: what each built-in pays, how terms sum, and how user functions fail."""

import json
import math
import sys

import pytest

from tea_rl.errors import TeaError
from tea_rl.recipe import RewardSpec, load_recipe
from tea_rl.rewards import BUILTIN_REWARDS, list_rewards, load_rewards


def score(name, completions, columns=None, prompts=None, base_dir=".", **kwargs):
    rewards = load_rewards([RewardSpec(name=name, kwargs=kwargs)], base_dir)
    return rewards(prompts or ["p"] * len(completions), completions, columns or {}).total


def error_of(name, base_dir=".", completions=("x", "a"), columns=None, **kwargs):
    with pytest.raises(TeaError) as caught:
        score(name, list(completions), columns, base_dir=base_dir, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sentiment_reads_the_prompt_unless_told_not_to():
    pytest.importorskip("vaderSentiment")
    good, bad = score("sentiment", [" wonderful.", " awful."])
    assert good > 0.4 and bad < -0.3
    whole = score("sentiment", [" was here."], prompts=["The wonderful friend"])[0]
    alone = score("sentiment", [" was here."], prompts=["The wonderful friend"], include_prompt=False)[0]
    assert whole > 0.5 and alone == 0.0


def test_length():
    texts = ["one", "one two", "one two three four", "", "a b c d e f g h i"]
    assert score("length", texts, target=2) == [0.5, 1.0, 0.0, 0.0, 0.0]
    assert score("length", texts, min=2) == [0.5, 1.0, 1.0, 0.0, 1.0]
    assert score("length", texts, min=2, max=3) == [0.5, 1.0, pytest.approx(2 / 3), 0.0, 0.0]


def test_echo_counts_phrases_of_other_completions():
    texts = ["a great day out", "What a Great day!", "nothing in common", "", "word"]
    assert score("echo", texts, threshold=0) == pytest.approx([-2 / 3, -2 / 3, 0.0, 0.0, 0.0])
    assert score("echo", texts) == pytest.approx([0.2 - 2 / 3, 0.2 - 2 / 3, 0.0, 0.0, 0.0])
    assert score("echo", ["so good so good so good"]) == [0.0]  # within a text is the matter of `repetition`
    assert score("echo", ["same text here", "same text here"], threshold=0, n=3) == [-1.0, -1.0]


def test_repetition():
    values = score("repetition", ["a b c d", "great great great Great", "word", "", "the cat saw the dog"])
    assert values == [0.0, pytest.approx(-0.6), 0.0, 0.0, pytest.approx(-0.05)]
    assert all(math.copysign(1, value) == 1 for value in values if value == 0)  # no -0.0 in logs
    assert score("repetition", ["a a"], threshold=0) == [-0.5]


def test_regex():
    assert score("regex", ["ab1", "12"], pattern=r"\d+") == [1.0, 1.0]
    assert score("regex", ["ab1", "12"], pattern=r"\d+", full=True) == [0.0, 1.0]


def test_exact_match():
    columns = {"answer": ["4", 4, 4.0, "4", "4"]}
    completions = [" 4\nQuestion: 3", "4", "4 ", "44", "\n\n4\n"]
    assert score("exact_match", completions, columns) == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert score("exact_match", ["4\nmore"], {"answer": ["4"]}, first_line=False) == [0.0]
    assert score("exact_match", [" 4"], {"answer": ["4"]}, strip=False) == [0.0]
    assert score("exact_match", ["x"], {"gold": ["x"]}, column="gold") == [1.0]
    assert 'Did you mean "answer"?' in error_of("exact_match", columns={"answer": ["a", "b"]}, column="anser")


def test_json_schema(tmp_path):
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    texts = ['{"age": 3}', ' {"age": 3} ', '{"age": "3"}', "{}", "no", '{"age": NaN}', "[" * 5000]
    expected = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert score("json_schema", texts, schema=schema) == expected
    (tmp_path / "s.json").write_text(json.dumps(schema))
    assert score("json_schema", texts, base_dir=tmp_path, schema="s.json") == expected
    assert "nofile.json" in error_of("json_schema", tmp_path, schema="nofile.json")
    assert "invalid schema" in error_of("json_schema", schema={"type": "objct"})
    assert "http://localhost" in error_of(
        "json_schema", completions=["1"], schema={"$ref": "http://localhost/s"}
    )


def test_readability():
    pytest.importorskip("pyphen")
    easy, hard, nothing = score(
        "readability",
        [
            "The cat sat on the mat. It was warm.",
            "Institutional considerations necessitate comprehensive deliberation.",
            " 12!",
        ],
    )
    assert easy > 0.9 and hard < 0.1 and nothing == 0.0
    # 14 words, 1 sentence, 16 syllables: 206.835 - 1.015 * 14 - 84.6 * 16 / 14
    text = "The old man took his brown dog down to the river on a Sunday."
    assert score("readability", [text])[0] == pytest.approx(
        (206.835 - 14.21 - 84.6 * 16 / 14) / 100, abs=1e-6
    )


def test_listing_names_every_builtin():
    listed = list_rewards()
    assert listed.keys() == BUILTIN_REWARDS.keys() and all(listed.values())


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("sentimnt", {}, ['Did you mean "sentiment"?', "Built in:"]),
        ("echo", {"n": 0}, ["at least 1"]),
        ("repetition", {"thresh": 1}, ['Did you mean "threshold"?']),
        ("repetition", {"threshold": "a"}, ["threshold", "number"]),
        ("length", {}, ["target"]),
        ("length", {"min": 5, "max": 2}, ["min 5", "max 2"]),
        ("length", {"target": 2.5}, ["whole number"]),
        ("regex", {}, ['setting "pattern"']),
        ("regex", {"pattern": "("}, ["pattern", "position 0"]),
        ("regex", {"pattern": 3}, ["quotes"]),
    ],
)
def test_wrong_settings_of_a_builtin(name, kwargs, words):
    message = error_of(name, **kwargs)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("name", "package", "kwargs"),
    [
        ("sentiment", "vaderSentiment", {}),
        ("readability", "pyphen", {}),
        ("json_schema", "jsonschema", {"schema": {}}),
    ],
)
def test_missing_optional_package(monkeypatch, name, package, kwargs):
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    assert 'pip install "tea-rl[rewards]"' in error_of(name, **kwargs)


MINE = """\
import math
from dataclasses import dataclass
from neighbour import BONUS

@dataclass
class Thing:
    x: "int" = 1

def size(prompts, completions, scale=1.0):
    return [scale * len(c) for c in completions]

def even(prompts, completions, **columns):
    return [None if len(c) % 2 else BONUS for c in completions]

def none(prompts, completions, **columns):
    return [None for c in completions]

def needs_gold(prompts, completions, gold):
    return [float(c == g) for c, g in zip(completions, gold)]

def array(prompts, completions, **columns):
    import torch
    return torch.tensor([float(len(c)) for c in completions], requires_grad=True).detach()

def boom(prompts, completions, **columns):
    return [1 / 0 for c in completions]

def leave(prompts, completions, **columns):
    raise SystemExit(3)

def short(prompts, completions, **columns):
    return [1.0]

def nan(prompts, completions, **columns):
    return [1.0, math.nan]

def inf(prompts, completions, **columns):
    return [-math.inf, 1.0]

def text(prompts, completions, **columns):
    return [1.0, "3"]

def scalar(prompts, completions, **columns):
    return 1.0

def lazy(prompts, completions, **columns):
    return (1.0 for c in completions)

async def later(prompts, completions, **columns):
    return [1.0, 1.0]

def texts_only(texts):
    return [1.0 for t in texts]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "neighbour.py").write_text("BONUS = 0.5\n")
    (tmp_path / "syntax.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "failing.py").write_text("\nimport a_package_nobody_has\n")
    return tmp_path


def test_functions_from_a_file_with_weights_settings_and_none(folder):
    rewards = load_rewards(
        [
            RewardSpec(name="mine.py:size", weight=2.0, kwargs={"scale": 10}),
            RewardSpec(name="mine.py:even", weight=-1.0),
            RewardSpec(name="mine.py:size"),
        ],
        folder,
    )
    batch = rewards(["p", "q"], ["ab", "abc"], {"answer": ["x", "y"]})
    assert rewards.names == ["size", "even", "size_2"]
    assert batch.terms == {"size": [20.0, 30.0], "even": [0.5, None], "size_2": [2.0, 3.0]}
    assert batch.total == [40.0 - 0.5 + 2.0, 60.0 + 3.0]
    assert str(folder) not in sys.path


def test_arrays_and_columns_reach_user_functions(folder):
    assert score("mine.py:array", ["a", "bb"], base_dir=folder) == [1.0, 2.0]
    columns = {"gold": ["a", "z"], "unused": [1, 2]}
    assert score("mine.py:needs_gold", ["a", "b"], columns, base_dir=folder) == [1.0, 0.0]
    assert '"gold"' in error_of("mine.py:needs_gold", folder)


def test_a_setting_beats_a_column_of_the_same_name(folder):
    assert score("mine.py:size", ["ab"], {"scale": [7]}, base_dir=folder, scale=3) == [6]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine.py:boom", ['"boom"', "ZeroDivisionError", "mine.py line 26"]),
        ("mine.py:leave", ['"leave"', "SystemExit"]),
        ("mine.py:short", ['"short"', "expected 2 values", "got 1"]),
        ("mine.py:nan", ['"nan"', "row 1", "nan"]),
        ("mine.py:inf", ['"inf"', "row 0", "-inf"]),
        ("mine.py:text", ['"text"', "row 1", "str '3'"]),
        ("mine.py:scalar", ['"scalar"', "list", "float"]),
        ("mine.py:lazy", ['"lazy"', "list", "generator"]),
        ("mine.py:none", ["row 0", "None from all"]),
        ("mine.py:later", ["async"]),
        ("mine.py:texts_only", ["prompts, completions", "texts"]),
        ("mine.py:sise", ['Did you mean "size"?']),
        ("mine.py:Thing", ["function", "class"]),
        ("mine.py:BONUS", ["function", "float"]),
        ("mine.py", ["path/to/file.py:function"]),
        ("mine.py:", ["path/to/file.py:function"]),
        ("absent.py:f", ["absent.py", "does not exist"]),
        ("syntax.py:f", ["syntax.py line 2", "SyntaxError"]),
        ("failing.py:f", ["failing.py line 2", "a_package_nobody_has"]),
    ],
)
def test_a_user_function_that_fails_is_named(folder, name, words):
    message = error_of(name, folder)
    for word in words:
        assert word in message, message


def test_settings_a_user_function_does_not_take(folder):
    assert 'Did you mean "scale"?' in error_of("mine.py:size", folder, scal=2)


def test_rewards_of_the_shipped_recipes_score():
    pytest.importorskip("vaderSentiment")
    recipe = load_recipe("quickstart")
    batch = load_rewards(recipe.rewards, recipe.base_dir)(
        ["The day was"] * 2, [" lovely", " great great great great"]
    )
    assert batch.total[0] > batch.terms["sentiment"][0] - 1e-9
    assert batch.total[1] == pytest.approx(batch.terms["sentiment"][1] + 2 * batch.terms["repetition"][1])
    recipe = load_recipe("arithmetic")
    assert load_rewards(recipe.rewards)(["q"], [" 4\n"], {"answer": ["4"]}).total == [1.0]
