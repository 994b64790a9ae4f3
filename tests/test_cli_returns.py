"""Asking a head for a return on the command line: generate, chat and evaluate."""

import json

import easy_envs  # noqa: F401 - registers the environments
import pytest
import yaml
from command_line import last_error, tea
from tiny import save_tiny

from tea_rl import HeadConfig, TeaHead, load_backbone, load_recipe
from tea_rl.backbone import Backbone
from tea_rl.errors import TeaError
from tea_rl.states.embed import embed
from tea_rl.states.rollouts import write_rollouts
from tea_rl.training.online import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def written(folder, name, model, **groups):
    settings = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "head": {"hidden_sizes": [32], "shortlist_size": 300},
        "rollout": {"max_completion_length": 6},
        **groups,
    }
    (folder / name).write_text(yaml.safe_dump(settings))
    return folder / name


@pytest.fixture(scope="module")
def heads(model, folder):
    """A head that learnt to answer a return of 0 in one way and 1 in another, and one without conditioning."""
    rows = [
        {"prompt": f"word {i % 8}:", "completion": "aaaaaa" if i < 8 else "zzzzzz", "reward": float(i < 8)}
        for i in range(16)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    optimizer = {
        "learning_rate": 2e-2,
        "warmup_steps": 1,
        "max_steps": 50,
        "eval_steps": 50,
        "num_threads": 1,
    }
    for on in (True, False):
        path = written(
            folder, "offline.yaml", model,
            head={"hidden_sizes": [32], "shortlist_size": 300, "return_conditioning": on},
            data={"dataset": str(folder / "rows.jsonl")},
            objective={"name": "cross_entropy", "minibatch_tokens": 96},
            train=optimizer,
        )  # fmt: skip
        if on:
            embed(load_recipe(str(path)), folder / "store")
        sources = ["data.dataset=null", f"data.store={folder / 'store'}"]
        train(load_recipe(str(path), sources), folder / f"run-{on}")
    return folder / "run-True" / "head", folder / "run-False" / "head"


@pytest.fixture(scope="module")
def prompts(model, folder):
    """A recipe whose reward is the share of the letter a."""
    (folder / "letters.py").write_text(
        "def share(prompts, completions, **columns):\n"
        "    return [text.count('a') / max(1, len(text)) for text in completions]\n"
    )
    data = {"prompts": [f"word {i}:" for i in range(8)], "eval_fraction": 0.5}
    return written(
        folder, "prompts.yaml", model, data=data, rewards=[{"name": f"{folder / 'letters.py'}:share"}]
    )


@pytest.fixture(scope="module")
def game(model, folder):
    return written(folder, "game.yaml", model, env={"id": "EasyPick-v0", "num_starts": 4, "eval_starts": 3})


def test_generate_aims_at_each_return(capsys, heads):
    args = ["generate", "--head", heads[0], "--prompt", "word 3:", "--temperature", 0, "--max-new-tokens", 6]
    code, out, _ = tea(capsys, *args, "--return", "0,1", "--compare", "--json")
    assert code == 0
    rows = json.loads(out)["completions"]
    assert [(row["strength"], row["return"]) for row in rows] == [(0.0, None), (1.0, 0.0), (1.0, 1.0)]
    assert rows[1]["completion"].startswith("zzz") and rows[2]["completion"].startswith("aaa")
    code, out, err = tea(capsys, *args, "--return", 1)
    assert code == 0 and out.startswith("word 3:aaa") and "warning" not in err
    code, out, err = tea(capsys, *args, "--return", "0,-2.5")
    assert code == 0 and out.count("return ") == 2
    assert "warning: return -2.5 lies outside the 0 to 1 seen in training" in err and "return 0 " not in err
    code, out, _ = tea(capsys, *args, "--json")
    assert code == 0 and json.loads(out)["completions"][0]["return"] is None


def test_evaluate_shows_achieved_against_asked(capsys, heads, prompts, tmp_path):
    args = ["evaluate", prompts, "--head", heads[0], "--returns", "0,1", "--num-generations", 3]
    code, out, err = tea(capsys, *args, "--json", "--plot", tmp_path / "returns.png")
    assert code == 0 and "return 1 on 4 prompts" in err
    base, little, much = json.loads(out)
    assert (base["strength"], base["return"], little["return"], much["return"]) == (0.0, None, 0.0, 1.0)
    assert [row["samples"] for row in (base, little, much)] == [12, 12, 12]
    assert little["eval_reward"] < 0.2 < 0.6 < much["eval_reward"]
    assert base["eval_kl"] == pytest.approx(0, abs=1e-6) and much["eval_kl"] > 0.01
    assert 0 <= much["standard_error"] < 0.2
    assert (tmp_path / "returns.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = tea(capsys, *args, "--strength", "1")
    assert code == 0 and "achieved" in out and "samples" in out and out.count(" 12") == 2


def test_without_returns_the_head_answers_as_it_was_saved(capsys, heads, prompts):
    code, out, _ = tea(capsys, "evaluate", prompts, "--head", heads[0], "--strength", "1", "--json")
    (row,) = json.loads(out)
    assert code == 0 and "return" not in row and "samples" not in row


@pytest.mark.parametrize("choosing", [True, False])
def test_evaluate_asks_in_an_environment_too(capsys, heads, game, tmp_path, choosing):
    args = ["evaluate", game, "--head", heads[0], "--returns", "0,1", "--num-generations", 2, "--json"]
    args += ["--set", f"env.choose_admissible={str(choosing).lower()}", "--plot", tmp_path / "returns.png"]
    code, out, err = tea(capsys, *args)
    rows = json.loads(out)
    assert code == 0 and "3 starts" in err and [row["samples"] for row in rows] == [6, 6, 6]
    assert rows[1]["eval_kl"] != rows[2]["eval_kl"] and rows[1]["eval_expert_reward"] == 1.0
    assert (tmp_path / "returns.png").is_file()


def test_chat_aims_and_changes_its_aim(capsys, heads, monkeypatch):
    lines = iter(["hello", "/return 0", "hello", "/return 9", "/return much", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, out, err = tea(
        capsys, "chat", "--head", heads[0], "--return", 1, "--temperature", 0, "--max-new-tokens", 6
    )
    assert code == 0
    answers = [line for line in out.splitlines() if line.strip()]
    assert "a" in answers[0] and "z" in answers[1] and "z" not in answers[0]
    assert "return 0" in err and "return 9 lies outside" in err and "/return takes finite numbers" in err


@pytest.mark.parametrize("command", ["generate", "chat", "evaluate"])
def test_refusals_are_one_line_and_come_before_the_model(capsys, heads, prompts, monkeypatch, command):
    monkeypatch.setattr("tea_rl.backbone.load_backbone", None)
    conditioned, plain = heads
    option = "--returns" if command == "evaluate" else "--return"
    args = [command, prompts] if command == "evaluate" else [command]
    args += ["--prompt", "word"] if command == "generate" else []
    refused = last_error(tea(capsys, *args, "--head", plain, option, 1))
    assert f"{option} needs a head with return conditioning" in refused and str(plain) in refused
    for value in ("much", "", "0,", "nan", "0,inf"):
        refused = last_error(tea(capsys, *args, "--head", conditioned, option, value))
        assert f"{option} takes finite numbers" in refused and f'got "{value}"' in refused
    assert "no such folder" in last_error(tea(capsys, *args, "--head", "nowhere", option, 1))


def test_a_plot_that_cannot_be_written_is_refused_before_the_model(
    capsys, heads, prompts, monkeypatch, tmp_path
):
    monkeypatch.setattr("tea_rl.backbone.load_backbone", None)
    args = ["evaluate", prompts, "--head", heads[0]]
    assert "needs --returns" in last_error(tea(capsys, *args, "--plot", tmp_path / "a.png"))
    args += ["--returns", "0,1", "--plot"]
    assert "is a folder" in last_error(tea(capsys, *args, tmp_path))
    assert "does not exist" in last_error(tea(capsys, *args, tmp_path / "no" / "a.png"))


def test_rollouts_of_other_returns_are_other_rollouts(model, folder, heads, prompts, tmp_path):
    backbone: Backbone = load_backbone(str(model), dtype="float32")
    recipe = load_recipe(str(prompts), ["train.max_steps=1"])
    digests, texts = set(), []
    for value in (0.0, 1.0, None):
        head = TeaHead.from_pretrained(heads[0], backbone)
        head.set_return(value)
        head.save_pretrained(tmp_path / "asking")
        output = tmp_path / f"store-{value}"
        store = write_rollouts(recipe, output, head=tmp_path / "asking", backbone=backbone)
        digests.add(store.manifest.header.source)
        texts.append("".join(text["completion"] for text in store.texts()))
    assert len(digests) == 3
    assert texts[0].count("z") > texts[0].count("a") and texts[1].count("a") > texts[1].count("z")


def test_a_plain_head_has_no_return_to_keep(model, tmp_path):
    backbone = load_backbone(str(model), dtype="float32")
    TeaHead.for_backbone(backbone, HeadConfig(shortlist_size=32)).save_pretrained(tmp_path / "head")
    assert TeaHead.from_pretrained(tmp_path / "head", backbone).asked_return is None


def test_online_training_cannot_learn_to_follow_a_return(prompts):
    with pytest.raises(
        TeaError, match="head.return_conditioning learns from stored completions .* got data.prompts"
    ):
        load_recipe(str(prompts), ["head.return_conditioning=true"])
