import math
import os
import sys

import matplotlib.image
import pytest

from tea_rl.errors import TeaError
from tea_rl.training.plots import _PANELS, _base_level, _series, write_curves

pytestmark = pytest.mark.rendered


def rows() -> list[dict]:
    found = [{"step": 0, "eval_reward": 0.2, "eval_reward_greedy": 0.3, "eval_kl": 0.0, "eval_base_nll": 3.2}]
    for step in range(1, 9):
        found.append({"step": step, "reward": 0.2 + step / 20, "kl": step / 20, "entropy": 3.0})
    found.append(
        {"step": 8, "eval_reward": 0.6, "eval_reward_greedy": 0.7, "eval_kl": 0.4, "eval_base_nll": 3.0}
    )
    return found


def drawn(path) -> set[tuple[int, int, int]]:
    picture = (matplotlib.image.imread(path)[:, :, :3] * 255).round().astype(int)
    return {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}


def colour(text: str) -> tuple[int, int, int]:
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


def test_the_picture_shows_training_held_out_and_base_lines(tmp_path):
    write_curves(rows(), tmp_path / "curves.png", title="quickstart")
    colours = drawn(tmp_path / "curves.png")
    assert {colour("#1f6feb"), colour("#d9730d"), colour("#a8c7f0"), colour("#8b949e")} <= colours
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_the_base_line_is_not_that_of_the_imitating_head():
    found = [{"step": 0, "eval_reward": 0.2}, {"step": 0, "eval_reward": 0.9, "imitated": True}]
    assert _base_level(found, "eval_reward") == 0.2
    assert _series(found, "eval_reward") == ([0.0], [0.9])


def test_a_run_without_evaluation_has_only_the_training_lines(tmp_path):
    write_curves([row for row in rows() if "reward" in row], tmp_path / "curves.png")
    colours = drawn(tmp_path / "curves.png")
    assert colour("#a8c7f0") in colours and colour("#1f6feb") not in colours


@pytest.mark.parametrize(
    "found",
    [
        [],
        [{"step": 0, "eval_reward": 0.1}],
        [{"step": 1, "reward": math.nan, "kl": math.inf, "entropy": None}],
        [{"reward": 1.0}, {"step": 2, "reward": 1.0, "kl": 0.0}],
    ],
    ids=["no rows", "only the base model", "nothing finite", "a row without a step"],
)
def test_odd_metrics_still_make_a_picture(tmp_path, found):
    write_curves(found, tmp_path / "curves.png")
    assert matplotlib.image.imread(tmp_path / "curves.png").shape[0] > 200


def test_series_are_sorted_finite_and_last_line_wins():
    found = [
        {"step": 2, "kl": 1.0},
        {"step": 1, "kl": 0.5},
        {"step": 2, "kl": 2.0},
        {"step": 3, "kl": math.nan},
    ]
    assert _series(found, "kl") == ([1.0, 2.0], [0.5, 2.0])


def test_panels_read_keys_that_runs_write():
    keys = {key for panel in _PANELS for key in panel[2:] if key}
    online = {"kl", "entropy", "eval_kl", "eval_base_nll", "eval_distinct_2"}
    assert keys == online | {"eval_accuracy", "eval_reward_correlation", "eval_pair_accuracy_logp"}


def test_an_offline_run_shows_its_loss(tmp_path):
    found = [{"step": 0, "eval_loss": 3.0, "eval_accuracy": 0.2, "eval_kl": 0.0}]
    found += [{"step": i, "loss": 3 - i / 8, "kl": i / 10} for i in range(1, 9)]
    found.append({"step": 8, "eval_loss": 2.2, "eval_accuracy": 0.4, "eval_kl": 0.3})
    write_curves(found, tmp_path / "curves.png")
    assert {colour("#1f6feb"), colour("#a8c7f0"), colour("#8b949e")} <= drawn(tmp_path / "curves.png")


def test_drawing_is_the_same_twice_and_leaves_pyplot_alone(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    write_curves(rows(), tmp_path / "a.png")
    write_curves(rows(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_a_full_disk_is_one_line_and_the_old_picture_stays(tmp_path, monkeypatch):
    write_curves(rows(), tmp_path / "curves.png")
    old = (tmp_path / "curves.png").read_bytes()

    def refuse(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(TeaError, match="curves.png"):
        write_curves([], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == old
