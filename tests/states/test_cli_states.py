"""embed, rollout, inspect and relabel on the command line."""

import json
import shutil

import pytest
import yaml
from tiny import save_tiny

from tea_rl.cli import main
from tea_rl.states import StateStore


def run(capsys, *args):
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as done:
        main([str(arg) for arg in args])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return done.value.code, printed.out, printed.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, an offline and an online recipe."""
    folder = tmp_path_factory.mktemp("cli")
    model = {"name_or_path": str(save_tiny("llama", folder)), "dtype": "float32"}
    rows = [{"prompt": f"q{i}", "completion": " good" * (1 + i % 3), "reward": i % 3} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    offline = {
        "model": model,
        "head": {"shortlist_size": 20},
        "data": {"dataset": "rows.jsonl"},
        "objective": {"name": "reward_weighted"},
    }
    online = {
        "model": model,
        "head": {"shortlist_size": 20},
        "data": {"prompts": ["a b", "c d", "e f", "g h"]},
        "rewards": [{"name": "sentiment"}],
        "rollout": {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 4},
        "train": {"max_steps": 2},
    }
    (folder / "offline.yaml").write_text(yaml.safe_dump(offline))
    (folder / "online.yaml").write_text(yaml.safe_dump(online))
    return folder


@pytest.fixture(scope="module")
def store(folder):
    with pytest.raises(SystemExit) as done:
        main(["embed", str(folder / "offline.yaml"), "--output", str(folder / "store")])
    assert done.value.code == 0
    return folder / "store"


@pytest.fixture
def head(store, tmp_path):
    import torch

    opened = StateStore.open(store)
    made = opened.make_head()
    torch.nn.init.normal_(made.members.readout, std=0.05)
    made.save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def test_embed_tells_what_it_made_and_how_fast(folder, tmp_path, capsys):
    code, out, err = run(capsys, "embed", folder / "offline.yaml", "--output", tmp_path / "store")
    assert code == 0
    assert "12 rows" in out and "tea-rl inspect" in out
    assert "tokens/s" in err and "left" in err
    code, out, _ = run(capsys, "embed", folder / "offline.yaml", "--output", tmp_path / "store", "--json")
    assert code == 0 and json.loads(out)["rows"] == 12


def test_inspect_lists_rows(store, capsys):
    code, out, err = run(capsys, "inspect", store, "--limit", 5)
    assert code == 0
    assert "dataset store, 12 rows" in out and "mean reward" in out
    assert out.count(" good") >= 5 and "7 more rows" in err
    code, out, _ = run(capsys, "inspect", store, "--json", "--start", 10)
    listed = json.loads(out)
    assert [row["row"] for row in listed["rows"]] == [10, 11]
    assert set(listed["rows"][0]) >= {"reward", "tokens", "logp", "prompt", "completion"}


def test_inspect_shows_a_row_token_by_token(store, head, capsys):
    code, out, _ = run(capsys, "inspect", store, "--row", 3, "--head", head)
    assert code == 0 and "base_logp" in out and "gain" in out and "<eos>" in out
    code, out, _ = run(capsys, "inspect", store, "--row", 3, "--head", head, "--json")
    row = json.loads(out)
    gains = [token["gain"] for token in row["per_token"]]
    assert row["gain"] == pytest.approx(sum(gains) / len(gains)) and any(gains)
    assert "".join(token["text"] for token in row["per_token"]) == row["completion"] + "<eos>"


@pytest.mark.parametrize("size", [7, 20, 128, "all", "auto"])
def test_inspect_takes_heads_of_every_shortlist_size(store, tmp_path, capsys, size):
    from tea_rl.head.config import HeadConfig

    StateStore.open(store).make_head(HeadConfig(shortlist_size=size)).save_pretrained(tmp_path / "head")
    code, out, _ = run(capsys, "inspect", store, "--head", tmp_path / "head", "--json", "--limit", 3)
    assert code == 0
    assert all(abs(row["gain"]) < 1e-4 for row in json.loads(out)["rows"])  # it has learned nothing


def test_rollout_then_relabel(folder, tmp_path, capsys):
    code, out, _ = run(
        capsys, "rollout", folder / "online.yaml", "--output", tmp_path / "store", "--steps", 1
    )
    assert code == 0 and "4 rows" in out
    code, out, _ = run(capsys, "inspect", tmp_path / "store", "--row", 0)
    assert code == 0 and " logp " in out
    code, out, _ = run(
        capsys, "relabel", tmp_path / "store", "--reward", "sentiment=-1", "--output", tmp_path / "new"
    )
    assert code == 0 and "4 rows" in out
    old, new = StateStore.open(tmp_path / "store"), StateStore.open(tmp_path / "new")
    assert (old.rewards == -new.rewards).all()
    code, out, _ = run(capsys, "relabel", tmp_path / "store", "--recipe", folder / "online.yaml", "--json")
    assert code == 0 and json.loads(out)["rewards"] == 4


def test_a_recipe_that_generates_learns_from_its_store(folder, tmp_path, capsys):
    """What it says of generating alone, such as expected gradients, does not stand in the way."""
    online = yaml.safe_load((folder / "online.yaml").read_text())
    (tmp_path / "rewards.py").write_text(
        "def odd(prompts, completions, **columns):\n    return [float(sum(map(ord, c)) % 7) for c in completions]\n"
    )
    changed = {
        "rewards": [{"name": "rewards.py:odd"}],
        "objective": {"name": "grpo", "expected_gradient": 0.5},
    }
    (tmp_path / "online.yaml").write_text(yaml.safe_dump({**online, **changed}))
    store, recipe = tmp_path / "store", tmp_path / "online.yaml"
    assert run(capsys, "rollout", recipe, "--output", store, "--steps", 2)[0] == 0
    code, _, err = run(capsys, "train", recipe, "--store", store, "--output", tmp_path / "run")
    assert code == 0, err
    assert run(capsys, "train", recipe, "--output", tmp_path / "run", "--resume")[0] == 0
    grid = ("--grid", "train.learning_rate=1e-4,1e-3", "--output", tmp_path / "sweep")
    code, _, err = run(capsys, "sweep", store, recipe, *grid)
    assert code == 0, err


def test_inspect_a_run(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("{}")
    (tmp_path / "samples.jsonl").write_text(
        json.dumps({"step": 0, "prompt": "p", "base": "dull", "trained": "bright", "base_reward": 0.0}) + "\n"
    )
    code, out, _ = run(capsys, "inspect", tmp_path)
    assert code == 0 and "bright" in out
    code, out, _ = run(capsys, "inspect", tmp_path, "--json")
    assert json.loads(out)[0]["trained"] == "bright"
    assert run(capsys, "inspect", tmp_path, "--row", 4)[0] == 2


def test_inspect_an_offline_run_shows_its_held_out_figures(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("{}")
    lines = [
        {"step": 0, "eval_loss": 2.5, "eval_kl": 0.0},
        {"step": 1, "loss": 2.0},
        {"step": 5, "eval_loss": 1.25},
    ]
    code, _, err = run(capsys, "inspect", tmp_path)
    assert code == 2 and "it has 0 steps and neither" in err and len(err.splitlines()) == 1
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[1:2]))
    code, _, err = run(capsys, "inspect", tmp_path)
    assert code == 2 and "it has 1 steps and neither" in err and "metrics.jsonl" in err
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "store").mkdir()
    code, out, err = run(capsys, "inspect", tmp_path)
    assert code == 0 and "+2.500" in out and "+1.250" in out
    assert f"tea-rl inspect {tmp_path / 'store'} --head" in err
    code, out, _ = run(capsys, "inspect", tmp_path, "--json")
    assert json.loads(out) == [
        {"row": 0, "step": 0, "loss": 2.5, "kl": 0.0},
        {"row": 1, "step": 5, "loss": 1.25},
    ]
    assert run(capsys, "inspect", tmp_path, "--row", 2)[0] == 2


@pytest.mark.parametrize("name", ["shard-00000.jsonl", "shard-00000.safetensors", "reference.safetensors"])
def test_inspect_and_relabel_name_a_flipped_file_that_they_read(store, head, tmp_path, capsys, name):
    flipped = shutil.copytree(store, tmp_path / "flipped")
    data = bytearray((flipped / name).read_bytes())
    data[len(data) // 2] ^= 1
    (flipped / name).write_bytes(data)
    commands = {
        "shard-00000.jsonl": (["inspect"], ["inspect", "--row", 3], ["relabel", "--reward", "sentiment"]),
        "shard-00000.safetensors": (["inspect"], ["inspect", "--row", 3]),
        "reference.safetensors": (["inspect", "--head", head],),
    }[name]
    for command, *options in commands:
        code, out, err = run(capsys, command, flipped, *options)
        assert code == 2 and f"{name} does not have the digest" in err and not out, (command, out, err)
        assert len(err.splitlines()) == 1


def test_every_mistake_is_one_line(folder, store, head, tmp_path, capsys):
    torn = shutil.copytree(store, tmp_path / "torn")
    shard = torn / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    for args, expected in (
        (["inspect", tmp_path / "none"], "expected a state store"),
        (["inspect", store, "--row", 12], "rows 0 to 11"),
        (["inspect", store, "--start", 99], "rows 0 to 11"),
        (["inspect", store, "--head", tmp_path], "saved TEA head"),
        (["inspect", torn], "damaged in shard-00000"),
        (["relabel", store], "needs --reward"),
        (["relabel", store, "--reward", "sentimental"], 'Did you mean "sentiment"'),
        (["relabel", store, "--reward", "sentiment=much"], "NAME=WEIGHT"),
        (["relabel", store, "--reward", "sentiment", "--output", folder], "new or empty folder"),
        (["embed", folder / "online.yaml", "--output", tmp_path / "x"], "data.dataset"),
        (["rollout", folder / "offline.yaml", "--output", tmp_path / "x"], "data.prompts"),
        (["embed", folder / "offline.yaml", "--output", folder], "new or empty folder"),
        (
            ["embed", folder / "offline.yaml", "--output", store, "--set", "model.dtype=bfloat16"],
            "dtype is float32",
        ),
    ):
        code, out, err = run(capsys, *args)
        last = err.strip().splitlines()[-1]
        assert code == 2 and last.startswith("error: ") and expected in last, (args, err)
    assert not (tmp_path / "x").exists()
    StateStore.open(store)
