"""Stores that were killed, cut, flipped, mixed up or full: named, mended by the same command, or left alone."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from stores import ROWS, Stop, contents, embed
from tiny import save_tiny

from tea_rl.errors import TeaError
from tea_rl.recipe import RewardSpec, load_recipe
from tea_rl.states import StateStore, StoreHeader, StoreWriter, check_keys, recipe_keys, writer
from tea_rl.states.manifest import Manifest
from tea_rl.states.relabel import relabel

LENGTH = [RewardSpec(name="length", weight=-1.0, kwargs={"max": 2})]


def flip(path, place=0.5):
    """Flip a bit; the size stays."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.unlink()  # a hard link of another store keeps its bytes
    path.write_bytes(data)


def rewards_file(store):
    (path,) = store.glob("rewards-*")
    return path


def test_a_stopped_embed_continues_to_the_same_bytes(made, tmp_path, monkeypatch):
    store, recipe, _ = made
    append, calls = StoreWriter.append, []

    def stopping(self, rows, tokens):
        calls.append(len(rows))
        if len(calls) % 5 == 0:  # a shard or so further with every call
            raise Stop
        append(self, rows, tokens)

    monkeypatch.setattr(StoreWriter, "append", stopping)
    for _ in range(100):
        try:
            embed(recipe, tmp_path / "store")
            break
        except Stop:
            with pytest.raises(TeaError, match="not complete .* it continues"):
                StateStore.open(tmp_path / "store")
    assert contents(tmp_path / "store") == contents(store.path)


def test_leftovers_are_removed(copy, made):
    (copy / "shard-00077.safetensors").write_bytes(b"torn")
    (copy / ".shard-00001.safetensors.tmp-99").write_bytes(b"torn")
    embed(made[1], copy)
    assert contents(copy) == contents(made[0].path)


def test_a_complete_store_is_only_opened(copy, made, monkeypatch):
    monkeypatch.setattr(StoreWriter, "append", lambda *a: pytest.fail("wrote"))
    assert len(embed(made[1], copy)) == len(ROWS)


@pytest.mark.parametrize("flipped", [True, False])
def test_a_damaged_shard_is_named_and_mended_by_embed(copy, made, flipped):
    path = copy / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # among the states
    path.write_bytes(data if flipped else data[:-9])
    with pytest.raises(TeaError, match="damaged in shard-00001: shard-00001.safetensors") as error:
        StateStore.open(copy)
    assert "\n" not in str(error.value)
    if flipped:
        StateStore.open(copy, verify=False)  # the size is right
    embed(made[1], copy)
    assert contents(copy) == contents(made[0].path)


@pytest.mark.parametrize("name", ["shard-00002.jsonl", "reference.safetensors"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(TeaError, match=f"{name} is missing"):
        StateStore.open(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": 2}', "[" * 100000])
def test_a_bad_manifest_is_one_line_and_its_advice_works(copy, made, text):
    (copy / "manifest.json").write_text(text)
    for attempt in (StateStore.open, partial(embed, made[1])):
        with pytest.raises(
            TeaError, match=f"damaged, or not the manifest .* remove .* rm -r {copy} and run"
        ) as error:
            attempt(copy)
        assert "\n" not in str(error.value)
    shutil.rmtree(copy)
    embed(made[1], copy)
    assert contents(copy) == contents(made[0].path)


@pytest.mark.parametrize("version", [1, 99])
def test_another_format_version_is_told_from_damage(copy, version):
    (copy / "manifest.json").write_text(f'{{"format_version": {version}, "tea_rl_version": "9.9"}}')
    with pytest.raises(
        TeaError, match=f"has format version {version} .of tea-rl 9.9., but this tea-rl reads"
    ):
        StateStore.open(copy)


@pytest.mark.parametrize("key", ["temperature", "hidden_size", "complete", "rewards", "rows", "sha256"])
def test_an_edited_manifest_is_refused(copy, key):
    value = json.loads((copy / "manifest.json").read_text())
    part = value["shards"][1] if key == "rows" else value
    part[key] = {"complete": False, "rewards": "shard-00000.safetensors", "sha256": "0" * 64}.get(key, 7)
    (copy / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(TeaError, match="does not have the digest it was written with"):
        StateStore.open(copy)


@pytest.mark.parametrize(
    ("path", "came"),
    [
        (("shards", 1, "rows"), -1),
        (("shards", 1, "rows"), 4),
        (("shards", 1, "tokens"), 4),
        (("shards", 1, "name"), "../shard-00001"),
        (("shards", 0, "files", "shard-00000.jsonl"), 7),
        (("shards",), []),
        (("rewards",), None),
        (("width",), 31),
        (("shortlist_size",), "100"),
        (("keys",), "llama"),
    ],
)
def test_a_forged_manifest_is_one_line(copy, made, path, came):
    """Edited with its digest brought up to date."""
    value = json.loads((copy / "manifest.json").read_text())
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = came
    rest = {name: item for name, item in value.items() if name != "sha256"}
    value["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(value))
    for verify in (True, False):
        with pytest.raises(TeaError, match="rm -r") as error:
            StateStore.open(copy, verify)
        assert "\n" not in str(error.value)


def test_a_lost_manifest_has_a_remedy(copy, made):
    (copy / "manifest.json").unlink()
    with pytest.raises(TeaError, match="expected a state store"):
        StateStore.open(copy)
    with pytest.raises(TeaError, match=f"its manifest.json is missing; .* rm -r {copy} and run the same"):
        embed(made[1], copy)


def test_no_store(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(TeaError, match="expected a state store in"):
            StateStore.open(path)


def test_another_recipe_model_or_data_is_refused_by_name(copy, made, tmp_path, model):
    _, recipe, folder = made
    path = folder / "recipe.yaml"
    for override, name in (
        ("rollout.temperature=0.5", "temperature is 1.0 there and 0.5 here"),
        ("data.template='Q: {prompt}'", "rendering_digest"),
        ("head.shortlist_size=20", "shortlist_size is 100 there and 20 here"),
        ("model.dtype=bfloat16", "dtype is float32 there and bfloat16 here"),
        ("head.context.layers=[-1]", "context"),
        ("data.max_length=15", "digest of data and settings"),
    ):
        with pytest.raises(TeaError, match=name) as error:
            embed(load_recipe(path, [override]), copy)
        assert "\n" not in str(error.value)
    other = save_tiny("llama", tmp_path, seed=1)
    with pytest.raises(TeaError, match="reference_digest is .* there and .* here"):
        embed(load_recipe(path, [f"model.name_or_path={other}"]), copy)
    # A sibling with the same output layer, fine-tuned further down.
    sibling = shutil.copytree(model, tmp_path / "sibling")
    from safetensors.torch import load_file, save_file

    weights = load_file(sibling / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].add_(0.01)
    save_file(weights, sibling / "model.safetensors", {"format": "pt"})
    with pytest.raises(TeaError, match="made otherwise: body_digest is"):
        embed(load_recipe(path, [f"model.name_or_path={sibling}"]), copy)


def test_check_keys(made):
    store, recipe, folder = made
    check_keys(store, recipe_keys(recipe))
    for size in ("all", "auto"):
        check_keys(store, recipe_keys(load_recipe(folder / "recipe.yaml", [f"head.shortlist_size={size}"])))
    wrong = load_recipe(folder / "recipe.yaml", ["rollout.temperature=2", "head.context.layers=[1]"])
    with pytest.raises(TeaError, match="temperature is 1.0 there and 2.0 here, context is"):
        check_keys(store, recipe_keys(wrong))


def test_foreign_folders_are_left_alone(made, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(TeaError, match="holds thesis.tex"):
        embed(made[1], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(TeaError, match="is a file"):
        embed(made[1], tmp_path / "thesis.tex")


def test_two_writers(made, tmp_path):
    header = StoreHeader("dataset", {}, "s", 32, 32, 320, 12, 1.0, 1.0)
    reference = made[0].reference()
    with (
        StoreWriter.create_or_continue(tmp_path / "store", header, reference),
        pytest.raises(TeaError, match="in use by process"),
    ):
        StoreWriter.create_or_continue(tmp_path / "store", header, reference)


def test_disk_full(made, tmp_path, monkeypatch):
    import errno

    from tea_rl.states import writer

    real, calls = writer.write_tensors, []

    def full(path, pieces):
        calls.append(path)
        if len(calls) == 3:  # reference, first shard, second shard
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, pieces)

    monkeypatch.setattr(writer, "write_tensors", full)
    with pytest.raises(TeaError, match="could not write shard-00001 .* free some space, then run the same"):
        embed(made[1], tmp_path / "store")
    assert not list((tmp_path / "store").glob(".*"))
    assert embed(made[1], tmp_path / "store").num_tokens == made[0].num_tokens
    assert contents(tmp_path / "store") == contents(made[0].path)


def test_a_store_that_cannot_begin_leaves_nothing_behind(made, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: a run")
    (tmp_path / "run" / "manifest.json").write_text("{}")
    with pytest.raises(
        TeaError, match="expected a new folder or a state store, but .* is a run; choose another"
    ):
        embed(made[1], tmp_path / "run")
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["manifest.json", "recipe.yaml"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_tensors", full)
    with pytest.raises(TeaError, match="No space left"):
        embed(made[1], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_no_lock_stays(made, copy):
    relabel(copy, LENGTH)
    for folder in (made[0].path, copy):
        assert "store.lock" not in [file.name for file in folder.iterdir()]


# -- parts of a shard, saved by the clock -------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_tokens", [100, 10**6])
def test_parts_leave_no_trace(made, tmp_path, monkeypatch, shard_tokens):
    """Killed after every few batches, with every batch saved: never a row twice, and the same bytes in the end."""
    run = partial(embed, made[1], shard_tokens=shard_tokens)
    run(tmp_path / "whole")
    monkeypatch.setattr(writer, "PART_SECONDS", 0.0)
    append, progress = StoreWriter.append, []

    def stopping(self, rows, tokens):
        append(self, rows, tokens)
        progress.append(self.num_rows)
        if len(progress) % 3 == 0:
            raise Stop

    monkeypatch.setattr(StoreWriter, "append", stopping)
    for _ in range(20):
        try:
            run(tmp_path / "parts")
            break
        except Stop:
            assert Manifest.read(tmp_path / "parts").num_rows == progress[-1]
    assert progress == sorted(set(progress)) and progress[-1] == len(ROWS) and len(progress) > 6
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_damaged_part_is_computed_again(made, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PART_SECONDS", 0.0)
    append, calls = StoreWriter.append, []

    def stopping(self, rows, tokens):
        append(self, rows, tokens)
        calls.append(1)
        if len(calls) == 4:
            raise Stop

    monkeypatch.setattr(StoreWriter, "append", stopping)
    run = partial(embed, made[1], tmp_path / "store", shard_tokens=10**6)
    with pytest.raises(Stop):
        run()
    flip(tmp_path / "store" / "part-00000-00002.safetensors")
    (tmp_path / "store" / "part-00000-00007.jsonl").write_text("left over")
    run()
    embed(made[1], tmp_path / "whole", shard_tokens=10**6)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_ctrl_c_loses_nothing(made, tmp_path):
    from tea_rl.training.progress import Listener

    class Interrupt(Listener):
        def __init__(self):
            self.heard = []

        def on_progress(self, done, total, unit):
            self.heard.append(done)
            if done > 60:
                raise KeyboardInterrupt

    first, second = Interrupt(), Interrupt()
    for listener in (first, second):
        with pytest.raises(KeyboardInterrupt):
            embed(made[1], tmp_path / "store", listener, shard_tokens=10**6)
    assert (
        len(first.heard) > 1 and second.heard == first.heard[-1:]
    )  # the second begins where the first ended


# -- damage under lazy verification, and after relabel -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shard-00001.jsonl", "shard-00001.safetensors", "reference.safetensors"])
def test_what_is_read_is_checked_first(copy, name):
    flip(copy / name)
    store = StateStore.open(copy, verify=False)
    row = store.manifest.shards[0]["rows"]  # the first of the second shard
    reads = {
        "jsonl": [lambda: store.text(row), lambda: list(store.texts())],
        "safetensors": [lambda: store.tokens(rows=[row]), lambda: store.prompt_ids(row)],
    }[name.split(".")[1]]
    if name.startswith("reference"):
        reads = [store.reference, store.make_head]
    for read in reads:
        with pytest.raises(TeaError, match=f"damaged in .*: {name} does not have the digest"):
            read()
    assert store.text(0)["prompt"] and len(store.tokens(rows=[0]))  # other files are fine


@pytest.mark.parametrize("array", ["token_offsets", "group", "finished", "label"])
def test_row_arrays_are_checked_at_once(copy, array):
    path = copy / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[8 + length + json.loads(data[8 : 8 + length])[array]["data_offsets"][0]] ^= 1
    path.write_bytes(data)
    with pytest.raises(TeaError, match="damaged in shard-00001: shard-00001.safetensors does not have"):
        StateStore.open(copy, verify=False)


@pytest.mark.parametrize("place", [0, 7, 8, 12, 60, 200])
def test_a_flipped_header_is_damage(copy, place):
    path = copy / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(TeaError, match="damaged in shard-00001"):
        StateStore.open(copy)
    with pytest.raises(TeaError, match="shard-00001"):
        StateStore.open(copy, verify=False).tokens(rows=range(len(ROWS)))


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00000.jsonl", "reference.safetensors"])
@pytest.mark.parametrize("how", [flip, os.unlink])
def test_mending_keeps_relabelled_rewards(copy, made, name, how):
    relabel(copy, LENGTH)
    before = contents(copy)
    how(copy / name)
    with pytest.raises(
        TeaError, match="run the tea-rl embed or tea-rl rollout that made it again, which mends"
    ):
        StateStore.open(copy)
    mended = embed(made[1], copy)
    assert contents(copy) == before
    assert not np.array_equal(mended.rewards, made[0].rewards) and set(mended.terms) == {"length"}


def test_rewards_of_the_data_come_back_from_the_shards(copy, made):
    flip(rewards_file(copy))
    with pytest.raises(TeaError, match="damaged in rewards-.* which mends it"):
        StateStore.open(copy)
    embed(made[1], copy)
    assert contents(copy) == contents(made[0].path)


@pytest.mark.parametrize("also", [None, "shard-00001.jsonl", "shard-00002.safetensors"])
def test_lost_relabelled_rewards_are_never_replaced_in_silence(copy, made, also):
    relabel(copy, LENGTH)
    before = contents(copy)
    flip(rewards_file(copy))
    if also:
        flip(copy / also)
    else:
        with pytest.raises(
            TeaError, match=f"run tea-rl relabel {copy} again with the rewards it had .length=-1."
        ):
            StateStore.open(copy)
    # The shards are mended, and the rewards asked for.
    with pytest.raises(TeaError, match=f"damaged in rewards-.* run tea-rl relabel {copy} again"):
        embed(made[1], copy)
    with pytest.raises(TeaError, match="damaged in rewards-"):
        StateStore.open(copy, verify=False)
    relabel(copy, LENGTH)
    assert contents(copy) == before
    embed(made[1], copy)


def test_relabel_reads_no_damaged_text(copy):
    flip(copy / "shard-00001.jsonl")
    before = contents(copy)
    with pytest.raises(TeaError, match="damaged in shard-00001: shard-00001.jsonl"):
        relabel(copy, LENGTH)
    assert contents(copy) == before


def test_shards_of_another_store_are_damage(copy, made, tmp_path):
    other = embed(load_recipe(made[2] / "recipe.yaml", ["rollout.temperature=2"]), tmp_path / "other")
    for name in ("shard-00001.safetensors", "shard-00001.jsonl", "reference.safetensors"):
        shutil.copy(other.path / name, copy / name)
    with pytest.raises(TeaError, match="damaged in shard-00001"):
        StateStore.open(copy)
    with pytest.raises(TeaError, match="damaged in shard-00001"):
        StateStore.open(copy, verify=False).tokens(rows=range(len(ROWS)))
    shutil.copy(made[0].path / "shard-00000.safetensors", copy / "shard-00001.safetensors")
    with pytest.raises(TeaError, match="damaged in shard-00001"):
        StateStore.open(copy, verify=False)
    embed(made[1], copy)
    assert contents(copy) == contents(made[0].path)


# -- limits of the system -----------------------------------------------------------------------------------------------


def test_more_shards_than_file_descriptors(made, tmp_path):
    """One row a shard, and fewer descriptors than shards."""
    store = embed(made[1], tmp_path / "store", batch_tokens=1, shard_tokens=1)
    assert len(store.manifest.shards) == len(ROWS)
    program = f"""
import os, resource, sys
import numpy as np
from tea_rl.states import StateStore, tensor_file
StateStore.open(sys.argv[1]).tokens(rows=[0])
tensor_file.MOST_MAPPED = 8
used = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (used + 16, used + 16))
store = StateStore.open(sys.argv[1])
index = np.random.default_rng(0).permutation(store.num_tokens)
np.save(sys.argv[2], store.tokens(index=index).states[np.argsort(index)].numpy())
assert len(store.prompt_ids(39)) and len(list(store.texts())) == {len(ROWS)}
"""
    out = tmp_path / "states.npy"
    subprocess.run([sys.executable, "-c", program, str(store.path), str(out)], check=True)
    assert np.array_equal(np.load(out), store.tokens(rows=range(len(ROWS))).states.numpy())


def test_a_limit_on_file_sizes_is_one_line(made, tmp_path):
    """The disk's refusal in the midst of a shard; nothing half-written stays, and the rest continues."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(file.stat().st_size for file in made[0].path.glob("shard-*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 100, limits[1]))
    try:
        with pytest.raises(TeaError, match="could not write shard-.* run the same command again") as error:
            embed(made[1], tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and not list((tmp_path / "store").glob(".*"))
    embed(made[1], tmp_path / "store")
    assert contents(tmp_path / "store") == contents(made[0].path)
