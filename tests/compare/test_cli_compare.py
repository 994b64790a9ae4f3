"""What the command line refuses in one line, what it prints, and how it says to go on."""

import json
import shlex

import pytest
from command_line import last_error, tea
from tiny_jobs import tiny_recipe

import tea_rl.compare.runner as runner
from tea_rl.compare.process import Stopped
from tea_rl.compare.results import JobResult


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "even.yaml"
    path.write_text(tiny_recipe(tmp_path).to_yaml())
    return path


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["quickstart", "--methods", "base,grpo-lroa"], 'Did you mean "grpo-lora"?'),
        (["guess-number"], "needs a recipe with data.prompts"),
        (["facts"], "learns from labelled data"),
        (["quickstart", "--seeds", "0,zero"], "--seeds takes different whole numbers"),
        (["quickstart", "--seeds", "1,1"], "--seeds takes different whole numbers"),
        (["quickstart", "--learning-rates", "1e-4,-1"], "--learning-rates takes numbers above 0"),
        (["quickstart", "--set", "compare.levls=[1]"], "levels"),
        (["quickstart", "--set", "compare.learning_rates={lroa: [1e-3]}"], 'no adapter "lroa"'),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, expected):
    assert expected in last_error(tea(capsys, "compare", *arguments))


def test_peers_without_their_packages_are_refused(capsys, monkeypatch, recipe):
    monkeypatch.setattr("tea_rl.cli.compare.find_spec", lambda name: None if name == "trl" else object())
    refused = last_error(tea(capsys, "compare", recipe, "--methods", "base,dpo-lora"))
    assert "dpo-lora needs trl" in refused and 'pip install "tea-rl[compare]"' in refused


def test_a_folder_of_something_else_is_refused(capsys, tmp_path, recipe):
    (tmp_path / "thesis.tex").write_text("")
    assert "holds" in last_error(tea(capsys, "compare", recipe, "--methods", "base", "--output", tmp_path))


def test_a_stop_says_how_to_go_on(capsys, monkeypatch, tmp_path, recipe):
    def stop(*_):
        raise Stopped

    monkeypatch.setattr(runner, "run_process", stop)
    given = ["compare", recipe, "--methods", "base,tea", "--output", tmp_path / "a folder", "--seeds", "3,4"]
    code, _, err = tea(capsys, *given)
    assert code == 130
    again = shlex.split(err.partition("go on with: ")[2])
    assert again[:2] == ["tea-rl", "compare"]
    assert [again[again.index(name) + 1] for name in ("--methods", "--output", "--seeds")] == [
        "base,tea", str(tmp_path / "a folder"), "3,4",
    ]  # fmt: skip


def test_rows_that_did_not_finish_are_printed_with_their_reason(capsys, monkeypatch, tmp_path, recipe):
    asked = []

    def fail(job, arguments, *_):
        asked.append((job.method.name, job.learning_rate, job.seed))
        return JobResult(**job.key, status="memory", reason="used 9.00 GB, above the limit of 8.00 GB")

    monkeypatch.setattr(runner, "run_process", fail)
    options = ["--methods", "dpo-lora", "--learning-rates", "1e-4,1e-3", "--output", tmp_path / "out"]
    code, out, err = tea(capsys, "compare", recipe, *options, "--json")
    assert code == 0
    assert asked == [("base", None, 0), ("dpo-lora", 1e-4, 0), ("dpo-lora", 1e-3, 0)]
    methods = {method["name"]: method for method in json.loads(out)["methods"]}
    assert methods["dpo-lora"]["status"] == "memory" and "above the limit" in methods["dpo-lora"]["reason"]
    assert "dpo-lora 0.001: memory (used 9.00 GB" in err
    assert (tmp_path / "out" / "results.json").is_file() and (tmp_path / "out" / "report.html").is_file()
