import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from tea_rl.errors import TeaError
from tea_rl.training.checkpoint import (
    load_optimizer,
    newest_checkpoint,
    replace_directory,
    save_checkpoint,
    save_optimizer,
)


def writer(content: str):
    def write(folder: Path) -> None:
        (folder / "head").mkdir()
        (folder / "head" / "weights.bin").write_text(content * 100)
        (folder / "state.json").write_text(content)

    return write


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_newest_of_several_is_found_and_old_ones_go(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step in (5, 9, 10):
        path = save_checkpoint(tmp_path, step, writer(str(step)), keep=2)
    assert path == tmp_path / "checkpoints" / "step-10"
    assert names(tmp_path / "checkpoints") == {"step-9", "step-10"}
    assert newest_checkpoint(tmp_path) == (path, 10, [])
    complete = json.loads((path / "COMPLETE.json").read_text())
    assert complete["step"] == 10 and set(complete["files"]) == {"head/weights.bin", "state.json"}
    assert (path / "state.json").read_text() == "10"


def test_all_are_kept_without_a_limit(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, writer("x"))
    assert len(names(tmp_path / "checkpoints")) == 5


def flip_a_byte(path: Path) -> None:
    data = bytearray((path / "head/weights.bin").read_bytes())
    data[7] ^= 1
    (path / "head/weights.bin").write_bytes(data)


DAMAGES = {
    "head/weights.bin": flip_a_byte,
    "state.json": lambda path: (path / "state.json").unlink(),
    "COMPLETE.json is missing": lambda path: (path / "COMPLETE.json").unlink(),
    "COMPLETE.json cannot be read": lambda path: (path / "COMPLETE.json").write_text('{"step": 20, "fi'),
    "belongs to step 3": lambda path: (path / "COMPLETE.json").write_text('{"step": 3, "files": {}}'),
}


@pytest.mark.parametrize("told", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path, told):
    good = save_checkpoint(tmp_path, 10, writer("a"))
    bad = save_checkpoint(tmp_path, 20, writer("b"))
    DAMAGES[told](bad)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    path, step, (warning,) = found
    assert (path, step) == (good, 10)
    assert str(bad) in warning and told in warning and "\n" not in warning


def test_damage_to_every_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
    flip_a_byte(save_checkpoint(tmp_path, 10, writer("a")))
    with pytest.raises(TeaError, match="head/weights.bin"):
        newest_checkpoint(tmp_path)


def test_a_damaged_later_checkpoint_is_dropped_before_a_good_one(tmp_path):
    save_checkpoint(tmp_path, 10, writer("a"))
    flip_a_byte(save_checkpoint(tmp_path, 20, writer("b")))
    save_checkpoint(tmp_path, 15, writer("c"), keep=2)
    assert names(tmp_path / "checkpoints") == {"step-10", "step-15"}
    save_checkpoint(tmp_path, 20, writer("d"), keep=1)
    assert names(tmp_path / "checkpoints") == {"step-20"}
    assert newest_checkpoint(tmp_path) == (tmp_path / "checkpoints/step-20", 20, [])


def killed_at(event: int, action) -> bool:
    """Run ``action`` in a child that dies, as by kill -9, at its ``event``-th touch of the disk. Whether it died."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 9), f"the child failed with {code}"
        return code == 9
    try:
        left = event
        watched = (
            "open",
            "os.rename",
            "os.mkdir",
            "os.remove",
            "os.rmdir",
            "os.listdir",
            "os.scandir",
            "shutil.rmtree",
        )

        def count(name: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)

        sys.addaudithook(lambda name, _: count(name) if name in watched else None)
        real_fsync = os.fsync
        os.fsync = lambda handle: (count("fsync"), real_fsync(handle))[1]
        action()
        os._exit(0)
    except BaseException:
        os._exit(3)


@pytest.mark.parametrize("step", [20, 10], ids=["a new step", "the same step again"])
def test_killed_at_any_touch_of_the_disk_a_complete_checkpoint_remains(tmp_path, step):
    event, died, seen = 0, True, set()
    while died:
        run = tmp_path / str(event)
        save_checkpoint(run_made(run), 10, writer("old"), keep=1)
        died = killed_at(event, lambda run=run: save_checkpoint(run, step, writer("new"), keep=1))
        found = newest_checkpoint(run)
        assert found is not None and found[2] == []
        content = (found[0] / "state.json").read_text()
        assert found[1] == (10 if content == "old" else step)
        seen.add(content)
        # The next save clears what the dead process left.
        save_checkpoint(run, 30, writer("next"), keep=1)
        assert names(run / "checkpoints") == {"step-30"}
        event += 1
    assert event > 20 and seen == {"old", "new"}


def test_killed_at_any_touch_of_the_disk_a_replaced_folder_is_whole(tmp_path):
    event, died, seen = 0, True, set()
    while died:
        run = run_made(tmp_path / str(event))
        replace_directory(run / "head", writer("old"))
        died = killed_at(event, lambda run=run: replace_directory(run / "head", writer("new")))
        whole = run / "head" if (run / "head").exists() else run / "head.old"
        content = (whole / "state.json").read_text()
        assert (whole / "head" / "weights.bin").read_text() == content * 100
        seen.add(content)
        replace_directory(run / "head", writer("next"))
        assert names(run) == {"head"}
        event += 1
    assert event > 15 and seen == {"old", "new"}


def run_made(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "mkdir", "write"])
def test_a_full_disk_is_one_line_and_the_previous_checkpoint_survives(tmp_path, monkeypatch, call):
    save_checkpoint(tmp_path, 10, writer("old"), keep=1)

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call != "write":
        monkeypatch.setattr(os, call, refuse)
    with pytest.raises(TeaError) as error:
        save_checkpoint(tmp_path, 20, refuse if call == "write" else writer("new"), keep=1)
    text = str(error.value)
    assert "\n" not in text and "step-20" in text and "step 10" in text and "free some space" in text
    monkeypatch.undo()
    assert names(tmp_path / "checkpoints") == {"step-10"}
    assert newest_checkpoint(tmp_path) == (tmp_path / "checkpoints/step-10", 10, [])
    save_checkpoint(tmp_path, 20, writer("new"), keep=1)
    assert names(tmp_path / "checkpoints") == {"step-20"}


def test_a_full_disk_under_safetensors_is_one_line_too(tmp_path):
    def write(folder: Path) -> None:
        # What save_file raises on a full disk: not an OSError.
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(TeaError, match="free some space"):
        save_checkpoint(tmp_path, 10, write)
    with pytest.raises(TeaError, match="free some space"):
        replace_directory(tmp_path / "head", write)
    assert names(tmp_path / "checkpoints") == set() and names(tmp_path) == {"checkpoints"}


def test_what_the_writer_raises_passes_and_leaves_nothing(tmp_path):
    def write(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise TeaError("the head is not finite")

    with pytest.raises(TeaError, match="not finite"):
        save_checkpoint(tmp_path, 10, write)
    with pytest.raises(TeaError, match="not finite"):
        replace_directory(tmp_path / "head", write)
    assert names(tmp_path) == {"checkpoints"} and names(tmp_path / "checkpoints") == set()


def make_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def make_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def make_ademamix(parameters):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdEMAMix(parameters, lr=1e-3)


def make_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    # 80 x 80 is beyond bitsandbytes' smallest quantised size.
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((80, 80), (3,), ())]


def take_steps(optimizer, parameters, first, last) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("make", [make_adamw, make_sgd, make_ademamix])
def test_an_optimizer_restored_from_disk_goes_on_bit_for_bit(tmp_path, make):
    parameters = make_parameters()
    optimizer = make(parameters)
    take_steps(optimizer, parameters, 0, 3)
    optimizer.param_groups[0]["lr"] = 1.0 / 3.0  # as a schedule leaves it
    save_optimizer(tmp_path, optimizer)
    saved = [parameter.detach().clone() for parameter in parameters]
    take_steps(optimizer, parameters, 3, 6)

    restored = [torch.nn.Parameter(value) for value in saved]
    other = make(restored)
    load_optimizer(tmp_path, other)
    assert other.param_groups[0]["lr"] == 1.0 / 3.0
    take_steps(other, restored, 3, 6)
    for one, two in zip(parameters, restored, strict=True):
        assert torch.equal(one, two)
    assert not list(tmp_path.glob("*.pt")) and names(tmp_path) == {"optimizer.json", "optimizer.safetensors"}


def test_a_fresh_optimizer_can_be_saved_and_restored(tmp_path):
    parameters = make_parameters()
    save_optimizer(tmp_path, make_adamw(parameters))
    other = make_adamw(parameters)
    load_optimizer(tmp_path, other)
    assert other.state_dict()["state"] == {}


def test_optimizer_state_of_other_parameters_or_damaged_is_one_line(tmp_path):
    save_optimizer(tmp_path, make_adamw(make_parameters()))
    with pytest.raises(TeaError, match="this optimizer"):
        load_optimizer(tmp_path, make_adamw(make_parameters()[:1]))
    (tmp_path / "optimizer.safetensors").write_bytes(b"junk")
    with pytest.raises(TeaError, match="this optimizer"):
        load_optimizer(tmp_path, make_adamw(make_parameters()))
    shutil.rmtree(tmp_path)
    with pytest.raises(TeaError, match="this optimizer"):
        load_optimizer(tmp_path, make_adamw(make_parameters()))
