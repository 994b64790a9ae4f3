"""``tea-rl data check`` as a user meets it."""

import json

import pytest
from tiny import save_tiny

from tea_rl.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny("llama", tmp_path_factory.mktemp("model")))


@pytest.fixture
def check(capsys, model):
    def run(path, content, *args):
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(content)
        with pytest.raises(SystemExit) as exit_:
            main(["data", "check", str(path), "--model", model, *args])
        out = capsys.readouterr()
        return int(exit_.value.code or 0), out.out, out.err

    return run


def rated(*rewards):
    return [{"prompt": f"q{i}", "completion": " fine", "reward": reward} for i, reward in enumerate(rewards)]


def test_good_data(check, tmp_path):
    code, out, _ = check(tmp_path / "d.jsonl", rated(*(i / 7 for i in range(50))))
    assert code == 0
    assert "prompt_completion" in out and "50 good, 0 bad; 50 distinct prompts or texts" in out
    assert "median 9" in out and "none at 128 tokens" in out
    assert out.count("━") + out.count("█") >= 10 and "warning" not in out


def test_every_bad_row_is_named_and_the_exit_code_says_so(check, tmp_path):
    lines = [json.dumps(row) for row in rated(*range(20))]
    for number in range(3, 16):
        lines[number] = "{"
    code, out, err = check(tmp_path / "d.jsonl", "\n".join(lines))
    assert code == 2
    assert "7 good, 13 bad" in out and out.count("bad row:") == 10 and "and 3 more" in out
    assert "d.jsonl line 4" in out
    assert err.strip().splitlines()[-1].startswith("error: 13 bad row(s)")


def test_equal_rewards_are_worth_a_warning(check, tmp_path):
    code, out, _ = check(tmp_path / "d.jsonl", rated(1, 1, 1))
    assert code == 0 and "all rewards are 1" in out and "nothing to learn" in out
    rows = [{"prompt": "q", "completion": "a", "label": True}] * 2
    assert "all labels are true" in check(tmp_path / "e.jsonl", rows)[1]


def test_json_has_the_same_figures(check, tmp_path):
    rows = [
        {"prompt": "q", "chosen": "a" * 30, "rejected": "b"},
        {"prompt": "q" * 30, "chosen": "c", "rejected": "d"},
    ]
    code, out, _ = check(tmp_path / "d.jsonl", rows, "--json", "--max-length", "20")
    found = json.loads(out)
    assert code == 0
    assert (found["format"], found["rows"], found["pairs"], found["prompts"]) == ("preference", 4, 2, 2)
    assert (found["lengths"]["truncated"], found["lengths"]["dropped"]) == (1, 2)
    assert found["rewards"] is None and found["num_bad_rows"] == 0
    code, out, err = check(tmp_path / "e.jsonl", [*rated(1e38, -1e38, *range(20)), {"prompt": 1}], "--json")
    found = json.loads(out)
    assert code == 2 and "line 23" in found["bad_rows"][0] and "error:" in err
    assert sum(bar["rows"] for bar in found["rewards"]["histogram"]) == 22


def test_columns_format_and_tags(check, tmp_path):
    code, out, _ = check(tmp_path / "d.csv", "stars,text\n5,good\n1,bad\n", "--columns", "reward=stars")
    assert code == 0 and "1 to 5" in out
    code, out, _ = check(tmp_path / "d.txt", "good <r2>\nplain\n")
    assert code == 0 and "tagged" in out and "without a tag: 1" in out
    plain, chat = (
        json.loads(check(tmp_path / "e.jsonl", rated(1, 2), "--json", "--format", name)[1])["lengths"][
            "median"
        ]
        for name in ("plain", "chat")
    )
    assert chat > plain


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--columns", "reward"], ["OURS=THEIRS", "reward=stars"]),
        (["--columns", "rewrd=reward"], ["rewrd", 'Did you mean "reward"?']),
        (["--split", "test"], ["--split is for", "leave it out"]),
        (["--format", "chatml"], ["plain or chat", "chatml"]),
    ],
)
def test_wrong_options(check, tmp_path, args, words):
    code, _, err = check(tmp_path / "d.jsonl", rated(1, 2), *args)
    assert code == 2 and len(err.strip().splitlines()) == 1
    for word in words:
        assert word in err


def test_nothing_good_at_all(check, tmp_path):
    code, out, err = check(tmp_path / "d.jsonl", "{\n")
    assert code == 2 and "0 good, 1 bad" in out and "line 1" in err
    code, _, err = check(tmp_path / "d.txt", "")
    assert code == 2 and "empty" in err


def test_the_column_split_is_looked_at(check, tmp_path):
    rows = [
        {**row, "split": side} for row, side in zip(rated(1, 2, 3), ("train", "train", "test"), strict=True)
    ]
    code, out, _ = check(tmp_path / "d.jsonl", rows)
    assert code == 0 and "split:    1 test, 2 train" in out
    rows[1]["split"] = "dev"
    del rows[2]["split"]
    code, out, err = check(tmp_path / "e.jsonl", rows)
    assert code == 2 and "e.jsonl line 2: column" in out and "'dev'" in out
    assert "e.jsonl line 3" in out and "got nothing" in out


def test_unreadable_sources_are_one_line_in_our_words(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.jsonl").write_text("{}\n")
    (tmp_path / "mixed" / "b.csv").write_text("text\na\n")
    (tmp_path / "empty.jsonl").write_text("")
    for source, words in (
        ("none", ["FILE: expected a folder with data files", "without any"]),
        ("mixed", ["several kinds (a.jsonl, b.csv)", "name one of them"]),
        ("empty.jsonl", ["at least one row"]),
        ("nowhere.jsonl", ["check FILE"]),
        ("", ["blank"]),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["data", "check", source])
        err = capsys.readouterr().err
        assert exit_.value.code == 2 and len(err.strip().splitlines()) == 1, err
        assert all(word in err for word in words) and "Error" not in err, err
