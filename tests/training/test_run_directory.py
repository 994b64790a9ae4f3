import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tea_rl.errors import TeaError
from tea_rl.training import files
from tea_rl.training.run_directory import RunDirectory

HOLD_LOCK = """
import sys
from tea_rl.training.run_directory import RunDirectory
run = RunDirectory.create(sys.argv[1])
run.write_recipe("name: held")
print("held", flush=True)
sys.stdin.read()
"""


def one_line(error: pytest.ExceptionInfo[TeaError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_run_begins_ends_and_resumes(tmp_path):
    with RunDirectory.create(tmp_path / "runs" / "a") as run:
        run.write_recipe("name: a\n")
        run.write_manifest({"seed": 0, "digest": "ä"})
        run.append_metrics({"step": 1, "reward": 0.5})
    assert (tmp_path / "runs/a/recipe.yaml").read_text() == "name: a\n"
    assert json.loads(run.manifest_path.read_text(encoding="utf-8")) == {"seed": 0, "digest": "ä"}
    with RunDirectory.create(tmp_path / "runs" / "a", resume=True) as run:
        run.append_metrics({"step": 2, "reward": 0.6})
        assert run.read_metrics() == [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.6}]


def test_an_existing_run_is_not_overwritten(tmp_path):
    with RunDirectory.create(tmp_path) as run:
        run.write_recipe("name: a\n")
    with pytest.raises(TeaError) as error:
        RunDirectory.create(tmp_path)
    assert "--resume" in one_line(error)
    RunDirectory.create(tmp_path, resume=True).close()  # the refusal left no lock behind


def test_resume_needs_a_run_and_makes_nothing(tmp_path):
    with pytest.raises(TeaError) as error:
        RunDirectory.create(tmp_path / "none", resume=True)
    assert "nothing to resume" in one_line(error)
    assert not (tmp_path / "none").exists()


def test_a_run_killed_before_its_recipe_was_written_can_begin_either_way(tmp_path):
    RunDirectory.create(tmp_path).close()
    RunDirectory.create(tmp_path, resume=True).close()
    RunDirectory.create(tmp_path).close()


def test_a_file_is_not_a_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TeaError) as error:
        RunDirectory.create(tmp_path / "file")
    assert "is a file" in one_line(error)
    with pytest.raises(TeaError) as error:
        RunDirectory.create(tmp_path / "file" / "below")
    assert "could not make the run folder" in one_line(error)


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(files.__file__).parents[2],
    )
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(TeaError) as error:
                RunDirectory.create(tmp_path, resume=resume)
            assert f"in use by process {first.pid}" in one_line(error)
    finally:
        first.kill()
        first.wait()
    RunDirectory.create(tmp_path, resume=True).close()


def test_nan_is_written_and_read_as_nan(tmp_path):
    with RunDirectory.create(tmp_path) as run:
        run.append_metrics({"step": 1, "kl": float("nan"), "loss": float("-inf")})
        assert run.metrics_path.read_text() == '{"step": 1, "kl": NaN, "loss": -Infinity}\n'
        (row,) = run.read_metrics()
    assert math.isnan(row["kl"]) and row["loss"] == -math.inf


def test_truncate_after_drops_later_steps_and_a_torn_line_and_keeps_other_bytes(tmp_path):
    kept = (
        b'{"step": 0, "eval_reward": 0.10}\n{"step":1,   "reward": NaN}\n{"step": 1, "eval_reward": 1e-1}\n'
    )
    with RunDirectory.create(tmp_path) as run:
        run.metrics_path.write_bytes(kept + b'{"step": 2, "reward": 3}\n{"step": 1, "rew')
        run.samples_path.write_bytes('{"step": 2, "prompt": "a\u2028b"}\n'.encode() + b'{"step": 3')
        run.truncate_after(1)
        assert run.metrics_path.read_bytes() == kept
        assert run.samples_path.read_bytes() == b""
        run.append_metrics({"step": 2})
        assert run.metrics_path.read_bytes() == kept + b'{"step": 2}\n'
        run.truncate_after(-1)
        assert run.metrics_path.read_bytes() == b""


def test_a_whole_row_without_its_line_end_is_torn(tmp_path):
    with RunDirectory.create(tmp_path) as run:
        run.metrics_path.write_bytes(b'{"step": 1}\n{"step": 2}')
        run.truncate_after(2)
        assert run.metrics_path.read_bytes() == b'{"step": 1}\n'


def test_samples_keep_line_breaks_and_every_character(tmp_path):
    rows = [
        {
            "step": 0,
            "prompt": "a\nb\u2028c\x85d",
            "base": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
        }
    ]
    with RunDirectory.create(tmp_path) as run:
        run.append_samples(rows)
        assert run.read_samples() == rows


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path):
    with RunDirectory.create(tmp_path) as run:
        run.metrics_path.symlink_to("/dev/full")
        with pytest.raises(TeaError) as error:
            run.append_metrics({"step": 1})
    assert os.strerror(28) in one_line(error) and "metrics.jsonl" in one_line(error)


def test_a_line_the_disk_refuses_half_way_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    files.append_jsonl(path, [{"step": 1}])

    def refuse(handle):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(OSError):
        files.append_jsonl(path, [{"step": 2}])
    assert path.read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_atomic_write_keeps_the_old_file_when_refused(tmp_path, monkeypatch, step):
    path = tmp_path / "recipe.yaml"
    files.atomic_write_text(path, "old")

    def refuse(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(files.os, step, refuse)
    with pytest.raises(OSError):
        files.atomic_write_text(path, "new")
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    RunDirectory.create(tmp_path).close()
    (tmp_path / ".metrics.jsonl.tmp-123").write_text("half")
    RunDirectory.create(tmp_path, resume=True).close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.lock"]


def test_a_lock_whose_file_was_removed_is_nobodys(tmp_path, monkeypatch):
    """Its holder ends and removes the file between our opening it and our locking it."""
    path = tmp_path / "lock"
    first = files.take_lock(path)
    real, opened = os.open, []

    def opening(*args):
        opened.append(real(*args))
        if len(opened) == 1:
            files.drop_lock(path, first)
        return opened[-1]

    monkeypatch.setattr(files.os, "open", opening)
    second = files.take_lock(path)
    monkeypatch.undo()
    assert len(opened) == 2 and path.read_text() == f"{os.getpid()}\n"
    with pytest.raises(TeaError, match=f"in use by process {os.getpid()}"):
        files.take_lock(path)
    files.drop_lock(path, second)
    assert not path.exists()
