import math

import pytest

from tea_rl.errors import TeaError
from tea_rl.training import trackers
from tea_rl.training.trackers import make_tracker


def test_none_does_nothing(tmp_path):
    tracker = make_tracker("none", tmp_path, {})
    tracker.log({"reward": 1.0}, 1)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused_with_a_suggestion(tmp_path):
    with pytest.raises(TeaError, match='Did you mean "tensorboard"'):
        make_tracker("tensorbord", tmp_path, {})


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_names_the_install_command(tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TeaError) as error:
        make_tracker(name, tmp_path, {})
    assert f'pip install "tea-rl[{name}]"' in str(error.value) and "\n" not in str(error.value)


def test_a_tracker_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")

    def fail(*_):
        raise RuntimeError("no network\nsecond line")

    monkeypatch.setattr(trackers, "_start", fail)
    with pytest.raises(TeaError) as error:
        make_tracker("tensorboard", tmp_path, {})
    assert "no network" in str(error.value) and "\n" not in str(error.value)


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_gets_the_numbers_and_a_resumed_run_replaces_its_later_steps(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = make_tracker("tensorboard", tmp_path, {"train": {"learning_rate": 1e-3}})
    for step in (1, 2, 3):
        tracker.log(
            {"step": step, "reward": step / 2, "eval_kl": math.nan, "note": "text", "flag": True}, step
        )
    tracker.close()
    tracker.close()
    assert scalars(tmp_path / "tensorboard", "reward") == [(1, 0.5), (2, 1.0), (3, 1.5)]
    resumed = make_tracker("tensorboard", tmp_path, {}, resume_step=1)
    resumed.log({"reward": 7.0}, 2)
    resumed.close()
    assert scalars(tmp_path / "tensorboard", "reward") == [(1, 0.5), (2, 7.0)]
