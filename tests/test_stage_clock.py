"""Where the time goes: stages add up, cost nothing when off, and reach the report."""

import json

import pytest
import torch
import yaml
from tiny import save_tiny, tiny_backbone
from typer.testing import CliRunner

from tea_rl import load_recipe, train
from tea_rl.cli import app
from tea_rl.evaluation.report_profile import profile_section
from tea_rl.head.layer import TeaHead
from tea_rl.rollout import DecodeSettings, generate
from tea_rl.stage_clock import OTHER, StageClock


class Hand:
    """A clock that is moved by hand."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def stages(profile):
    return {stage["name"]: stage for stage in profile["stages"]}


def test_nested_stages_are_taken_off_one_another():
    hand = Hand()
    clock = StageClock(hand)
    clock.start()
    for inner in (1.0, 2.0, 30.0):
        with clock.step():
            with clock.stage("outer"):
                hand.time += 5
                with clock.stage("inner"):
                    hand.time += inner
                hand.time += 7
            hand.time += 0.5  # belongs to nobody
        with clock.stage("save"):
            hand.time += 1
    profile = clock.profile()
    found = stages(profile)
    assert (profile["seconds"], profile["steps"]) == (73.5, 3)
    assert {name: stage["seconds"] for name, stage in found.items()} == {
        "outer": 36.0, "inner": 33.0, "save": 3.0, OTHER: 1.5,
    }  # fmt: skip
    # The median leaves out the first step.
    assert (found["outer"]["seconds_a_step"], found["inner"]["seconds_a_step"]) == (12.0, 16.0)
    assert found["save"]["seconds_a_step"] is found[OTHER]["seconds_a_step"] is None


def test_an_exception_closes_its_stage():
    hand = Hand()
    clock = StageClock(hand)
    clock.start()
    with pytest.raises(ValueError, match="x"), clock.stage("a"):
        hand.time += 1
        raise ValueError("x")
    hand.time += 10
    with clock.stage("b"):
        hand.time += 2
    assert {n: s["seconds"] for n, s in stages(clock.profile()).items()} == {"a": 1.0, "b": 2.0, OTHER: 10.0}


def test_off_nothing_is_measured_and_on_nothing_changes(tmp_path):
    backbone = tiny_backbone(tmp_path)
    head = TeaHead.for_backbone(backbone)
    clocks = StageClock(), StageClock()
    clocks[1].start()
    prompts = [backbone.tokenizer(text).input_ids for text in ("one", "another")]
    off, on = (generate(backbone, head, prompts, DecodeSettings(3, 6), clock=clock) for clock in clocks)
    assert torch.equal(off.tokens.actions, on.tokens.actions)
    assert torch.equal(off.tokens.logps, on.tokens.logps)
    assert clocks[0].profile() is None
    found = stages(clocks[1].profile())
    assert set(found) == {"prefill", "decode", "head", "sampling", OTHER}
    assert min(stage["seconds"] for stage in found.values()) > 0


@pytest.fixture
def recipe(tmp_path):
    settings = {
        "model": {"name_or_path": str(save_tiny("llama", tmp_path / "model")), "dtype": "float32"},
        "head": {"hidden_sizes": [16], "shortlist_size": 24},
        "data": {"prompts": [f"prompt number {i}" for i in range(12)]},
        "rewards": [{"name": "length", "kwargs": {"max": 4}}],
        "rollout": {"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 6},
        "train": {"max_steps": 3, "eval_steps": 3, "num_threads": 1},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_the_report_of_a_profiled_run_shows_every_stage(recipe, tmp_path):
    result = CliRunner().invoke(app, ["train", str(recipe), "--output", str(tmp_path / "run"), "--profile"])
    assert result.exit_code == 0, result.output
    profile = json.loads((tmp_path / "run" / "profile.json").read_text())
    names = ["prefill", "head", "sampling", "decode", "reward", "update", "evaluation", "save", OTHER]
    assert sorted(stages(profile)) == sorted(names)
    assert profile["steps"] == 3
    assert sum(stage["seconds"] for stage in profile["stages"]) == pytest.approx(profile["seconds"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Where the time went" in page
    assert all(f"&#9632;</span> {name}</td>" in page for name in names)


def test_without_the_option_there_is_no_profile(recipe, tmp_path):
    train(load_recipe(str(recipe)), tmp_path / "run", profile=True)
    assert (tmp_path / "run" / "profile.json").exists()
    # Of a run that goes on unmeasured, an old profile would tell a wrong story.
    train(load_recipe(str(recipe), ["train.max_steps=4"]), tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "profile.json").exists()
    assert "Where the time went" not in (tmp_path / "run" / "report.html").read_text()


def test_names_are_text_and_an_empty_profile_is_no_section():
    page = profile_section(
        {"seconds": 2.0, "steps": 1, "stages": [{"name": "<b>", "seconds": 2.0, "seconds_a_step": 1.0}]}
    )
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert profile_section({}) == profile_section({"stages": [], "seconds": 1.0, "steps": 0}) == ""
