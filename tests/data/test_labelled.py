"""Labelled rows: every format and file type, reward tags, the split, and the errors."""

import json
from dataclasses import asdict

import pytest

from tea_rl.data.labelled import LabelledRow, read_labelled, row_groups, scan_labelled, split_rows
from tea_rl.data.split import split_groups
from tea_rl.errors import TeaError

USER, ANSWER, OTHER = (
    {"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)


def write(path, content):
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(path, content=None, columns=None, **kwargs):
    source = str(path) if content is None else write(path, content)
    return read_labelled(source, kwargs, columns or {})


def facts(data, *names):
    return [tuple(getattr(row, name) for name in names) for row in data.rows]


def error_of(path, content=None, columns=None, **kwargs):
    with pytest.raises(TeaError) as caught:
        read(path, content, columns, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        ({"prompt": "q", "completion": " a"}, "prompt_completion", [("q", " a", None, None, None, None)]),
        (
            {"prompt": "q", "completion": "a", "reward": -1},
            "prompt_completion",
            [("q", "a", -1.0, None, None, None)],
        ),
        (
            {"prompt": [USER], "completion": [ANSWER]},
            "prompt_completion",
            [([USER], "a", None, None, None, None)],
        ),
        (
            {"prompt": "q", "completion": [ANSWER]},
            "prompt_completion",
            [([USER], "a", None, None, None, None)],
        ),
        ({"messages": [USER, ANSWER], "reward": 0.5}, "messages", [([USER], "a", 0.5, None, None, None)]),
        (
            {"messages": [USER, ANSWER, USER, OTHER]},
            "messages",
            [([USER, ANSWER, USER], "b", None, None, None, None)],
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "preference",
            [("q", "a", None, None, 0, True), ("q", "b", None, None, 0, False)],
        ),
        (
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
            "preference",
            [([USER], "a", None, None, 0, True), ([USER], "b", None, None, 0, False)],
        ),
        (  # the prompt is what both begin with
            {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            "preference",
            [([USER], "a", None, None, 0, True), ([USER], "b", None, None, 0, False)],
        ),
        (
            {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            "preference",
            [([USER], "a", None, None, 0, True), ([USER], "b", None, None, 0, False)],
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            "preference",
            [("The sky is", " blue.", None, None, 0, True), ("The sky is", " black.", None, None, 0, False)],
        ),
        ({"prompt": "q", "completion": "a", "label": True}, "label", [("q", "a", None, True, None, None)]),
        (  # a set that also has the chosen conversation as messages
            {"prompt": "q", "messages": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            "preference",
            [([USER], "a", None, None, 0, True), ([USER], "b", None, None, 0, False)],
        ),
        ({"text": " a b "}, "text", [("", " a b ", None, None, None, None)]),
        ({"text": "a", "reward": 2}, "text", [("", "a", 2.0, None, None, None)]),
        ({"prompt": "", "completion": "a"}, "prompt_completion", [("", "a", None, None, None, None)]),
        ({"completion": "a", "reward": 2}, "text", [("", "a", 2.0, None, None, None)]),
        ({"prompt": "q", "completion": "a <r-0.5>"}, "tagged", [("q", "a", -0.5, None, None, None)]),
        (
            {"messages": [USER, {**ANSWER, "content": "a <2>"}]},
            "tagged",
            [([USER], "a", 2.0, None, None, None)],
        ),
    ],
)
def test_every_format(tmp_path, row, format, expected):
    data = read(tmp_path / "d.jsonl", [{**row, "source": "web"}])
    assert data.format == format
    assert facts(data, "prompt", "completion", "reward", "label", "pair", "chosen") == expected
    assert all(entry.columns == {"source": "web"} for entry in data.rows)
    assert data.rows[0].place.endswith("d.jsonl line 1")


def test_text_lines_keep_their_numbers(tmp_path):
    data = read(tmp_path / "d.txt", "\ufeffone\n\n two \u2028 more \r\n")
    assert facts(data, "prompt", "completion") == [("", "one"), ("", "two \u2028 more")]
    assert [row.place.split()[-1] for row in data.rows] == ["1", "3"]


def test_every_file_type_gives_the_same_rows(tmp_path):
    import datasets

    rows = [
        {"prompt": "p", "completion": " 007", "reward": 1.5, "topic": "x"},
        {"prompt": "q,", "completion": 'a "b"\nc', "reward": -2.0, "topic": "y"},
    ]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "d.parquet"))
    table.to_csv(str(tmp_path / "d.csv"))
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(test=table).save_to_disk(str(tmp_path / "splits"))
    write(tmp_path / "d.json", json.dumps(rows))
    write(tmp_path / "d.jsonl", rows)
    found = [read(tmp_path / name) for name in ("d.jsonl", "d.json", "d.csv", "d.parquet", "saved")]
    found.append(read(tmp_path / "splits", split="test"))
    for data in found:
        plain = [{**asdict(row), "place": ""} for row in data.rows]
        assert plain == [{**asdict(row), "place": ""} for row in found[0].rows]
    assert facts(found[0], "prompt", "completion", "reward") == [("p", " 007", 1.5), ("q,", 'a "b"\nc', -2.0)]


def test_csv_rows_are_named_by_the_line_they_begin_in(tmp_path):
    content = 'prompt,completion,label\na,"x\ny",true\nb,z,0\n'
    data = read(tmp_path / "d.csv", content)
    assert facts(data, "label", "completion") == [(True, "x\ny"), (False, "z")]
    assert [row.place.split()[-1] for row in data.rows] == ["2", "4"]


def test_columns_are_renamed(tmp_path):
    rows = [{"question": "q", "text": "a", "stars": 4}]
    data = read(tmp_path / "d.jsonl", rows, {"prompt": "question", "completion": "text", "reward": "stars"})
    assert facts(data, "prompt", "completion", "reward", "columns") == [("q", "a", 4.0, {})]
    rows = [{"text": "a", "label": 3}]
    assert facts(read(tmp_path / "e.jsonl", rows), "label", "columns") == [(None, {"label": 3})]
    assert facts(read(tmp_path / "e.jsonl", rows, {"reward": "label"}), "reward", "columns") == [(3.0, {})]


# -- tags -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "left", "reward"),
    [
        ("good <r2>", "good", 2.0),
        ("<r-2>bad", "bad", -2.0),
        ("<-1> bad", " bad", -1.0),
        ("a <r0.5> b", "a b", 0.5),
        ("a <1> b <1>\n", "a b", 1.0),
    ],
)
def test_a_tag_rates_the_whole_completion_and_is_taken_out(tmp_path, text, left, reward):
    data = read(tmp_path / "d.jsonl", [{"prompt": "q", "completion": text}])
    assert facts(data, "completion", "reward") == [(left, reward)]


def test_rows_without_a_tag_count_1_where_others_have_one(tmp_path):
    data = read(tmp_path / "d.txt", "good <r2>\nplain\n<r-1> bad\n")
    assert (data.format, data.untagged) == ("tagged", 1)
    assert facts(data, "completion", "reward") == [("good", 2.0), ("plain", 1.0), ("bad", -1.0)]


def test_numbers_in_angle_brackets_are_text_where_nothing_is_tagged(tmp_path):
    assert facts(read(tmp_path / "d.txt", "footnote <7>\n"), "completion", "reward") == [
        ("footnote <7>", None)
    ]
    rows = [{"prompt": "q", "completion": "footnote <1>", "reward": 1}]
    assert facts(read(tmp_path / "d.jsonl", rows), "completion", "reward") == [("footnote <1>", 1.0)]


# -- errors -----------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "q", "completion": "a", "reward": 1}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", ["invalid JSON"]),
        ("[1]", ["JSON object", "list"]),
        ({"prompt": "q", "completion": "", "reward": 1}, ["blank text"]),
        ({"prompt": "q", "completion": None, "reward": 1}, ['"completion" as text', "nothing"]),
        ({"prompt": "q", "completion": 4, "reward": 1}, ["int 4"]),
        ({"prompt": " ", "completion": "a", "reward": 1}, ["prompt", "blank"]),
        ({"prompt": None, "completion": "a", "reward": 1}, ["prompt", "nothing"]),
        ({**GOOD, "reward": "high"}, ["number as reward", "high"]),
        ({**GOOD, "reward": "1"}, ["number as reward", "str"]),
        ({**GOOD, "reward": True}, ["number as reward", "bool"]),
        ({**GOOD, "reward": float("nan")}, ["finite reward", "nan"]),
        ({**GOOD, "reward": float("-inf")}, ["finite reward", "-inf"]),
        ({**GOOD, "reward": 1e39}, ["finite reward", "1e+39"]),
        ({**GOOD, "reward": 10**400}, ["finite reward", "inf"]),
        ({"prompt": "q", "completion": "a"}, ["expected a reward as in", "line 1", "none"]),
        ({"prompt": "q", "completion": "a", "rewrad": 1}, ['"reward"', '"rewrad"']),
        ({"promt": "q", "completion": "a", "reward": 1}, ['"prompt"', '"promt"']),
        ({"text": "a", "reward": 1}, ["mixed formats", "prompt_completion", "got text"]),
        ({"messages": [USER, ANSWER]}, ["mixed formats", "got messages"]),
        ({"prompt": "q"}, ["expected columns prompt and completion", "got prompt"]),
        ({**GOOD, "completion": "a <r1>"}, ["a reward or a tag"]),
        ({**GOOD, "prompts": 1}, ['"prompts"', "rename"]),
        ({**GOOD, "completion": [USER]}, ["one assistant's turn"]),
        ({**GOOD, "completion": [{"role": "assistant"}]}, ["messages", "content"]),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, bad, words):
    lines = [json.dumps(GOOD), bad if isinstance(bad, str) else json.dumps(bad), json.dumps(GOOD)]
    message = error_of(tmp_path / "d.jsonl", "\n".join(lines))
    for word in ["d.jsonl line 2", *words]:
        assert word in message, message
    data, problems = scan_labelled(str(tmp_path / "d.jsonl"), {}, {})
    assert problems == [message] and len(data.rows) == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [USER]}, ["assistant's turn", "1 message"]),
        ({"messages": [USER, ANSWER, USER]}, ["assistant's turn", "user's turn"]),
        ({"messages": "hi"}, ["list of messages", "str"]),
        ({"prompt": "q", "chosen": "a"}, ['"rejected" as text', "nothing"]),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, ["differ", "same text"]),
        ({"chosen": [ANSWER], "rejected": [OTHER]}, ["expected a prompt"]),
        (
            {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "z"}, OTHER]},
            ["share all but their last"],
        ),
        ({"prompt": "q", "completion": "a", "label": "good"}, ["true or false", "good"]),
        ({"prompt": "q", "completion": "a", "label": 2}, ["true or false", "int 2"]),
        ({"prompt": "q", "completion": "a <r3>"}, ["unknown tag <r3>", "<r0.5>"]),
        ({"prompt": "q", "completion": "a <r1> b <-1>"}, ["one tag", "<r1> and <-1>"]),
        ({"prompt": "q", "completion": "<r1>"}, ["blank text"]),
        ({"promt": "q", "chosen": "a", "rejected": "b"}, ['"prompt"', '"promt"', "{prompt: promt}"]),
        ({"prompt": "q", "chosen": "a", "rejcted": "b"}, ['"rejected"', '"rejcted"']),
        ({"messages": [USER, ANSWER], "rewrd": 1}, ['"reward"', '"rewrd"']),
        ({"text": "a", "rewad": 1}, ['"reward"', '"rewad"']),
        ({"txt": "a"}, ["expected columns", "got txt", 'Did you mean "text"?']),
        ({}, ["got none"]),
    ],
)
def test_a_bad_first_row(tmp_path, row, words):
    message = error_of(tmp_path / "d.jsonl", [row])
    for word in ["d.jsonl line 1", *words]:
        assert word in message, message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.txt", "", ["empty"]),
        ("d.txt", " \n", ["at least one row"]),
        ("d.txt", b"fine\nb\xff", ["line 2", "UTF-8"]),
        ("d.jsonl", "\n", ["at least one row"]),
        ("d.json", "[", ["invalid JSON"]),
        ("d.json", "{}", ["list of objects", "dict"]),
        ("d.json", '[{"text": "a"}, 3]', ["row 2", "int"]),
        ("d.csv", "prompt,completion\na,b,c\n", ["line 2", "2 columns", "double quotes"]),
        ("d.csv", 'prompt,completion\na,"b\n', ["line 2", "CSV"]),
        ("d.csv", "prompt,completion,reward\na,b,1\nc,d,x\n", ["line 3", "number as reward", "x"]),
        ("d.csv", "prompt,completion,reward\na,b,1\nc,d,\n", ["line 3", "a reward", "none"]),
        ("d.csv", "prompt,completion,reward\na,b,nan\n", ["line 2", "finite"]),
        ("d.parquet", "junk", ["d.parquet"]),
        ("d.xlsx", "junk", ["data.dataset", ".jsonl"]),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path, capfd, name, content, words):
    message = error_of(tmp_path / name, content)
    for word in [str(tmp_path), *words]:
        assert word in message, message
    assert capfd.readouterr().err == ""


def test_wrong_settings(tmp_path):
    path = tmp_path / "data.jsonl"
    write(path, [GOOD])
    assert 'Did you mean "data.jsonl"?' in error_of(tmp_path / "dta.jsonl")
    assert "data.kwargs" in error_of(path, split="x")
    assert 'Did you mean "reward"?' in error_of(path, columns={"rewards": "reward"})
    message = error_of(path, columns={"reward": "rewrd"})
    assert "line 1" in message and 'Did you mean "reward"?' in message


def test_more_bad_rows_are_counted(tmp_path):
    message = error_of(tmp_path / "d.jsonl", [GOOD, {**GOOD, "completion": ""}, {**GOOD, "reward": "x"}])
    assert "line 2" in message and "1 more bad rows" in message


def test_an_unknown_tag_without_its_r_is_seen_when_others_are_tagged(tmp_path):
    message = error_of(tmp_path / "d.txt", "a <3>\nb <r1>\n")
    assert "line 1" in message and "unknown tag <3>" in message


@pytest.mark.parametrize("tag", ["<rgood>", "<r=2>", "<r+>", "<r 2>", "<R2>", "<r>", "<r-good>"])
def test_what_looks_like_a_tag_is_one(tmp_path, tag):
    for text in (f"fine {tag}", f"{tag} fine"):
        message = error_of(tmp_path / "d.txt", f"first\n{text}\n")
        assert "line 2" in message and f"unknown tag {tag}" in message


def test_markup_placeholders_and_code_are_no_tags(tmp_path):
    texts = ["<reasoning>so</reasoning> yes", "Dear <recipient>, hello", "a Vec<R> of them", "Map<R1, R2> it"]
    data = read(tmp_path / "d.jsonl", [{"prompt": "q", "completion": text} for text in texts])
    assert data.format == "prompt_completion" and [row.completion for row in data.rows] == texts
    beside = [{"prompt": "q", "completion": "a <rgood>", "reward": 1}]
    assert facts(read(tmp_path / "e.jsonl", beside), "completion", "reward") == [("a <rgood>", 1.0)]
    assert "unknown tag <recipient>" in error_of(tmp_path / "d.txt", texts[1] + "\nfine <r1>\n")


# -- split ------------------------------------------------------------------------------------------------------------


def make_rows():
    rows = [LabelledRow(f"q{i % 10}", f"a{i}") for i in range(40)]
    rows += [LabelledRow("", f"text {i % 5}") for i in range(10)]
    rows += [
        LabelledRow("", f"{i} {side}", pair=i, chosen=side == "good")
        for i in range(5)
        for side in ("good", "bad")
    ]
    return rows


def test_a_prompt_a_pair_and_a_repeated_text_stay_on_one_side():
    rows = make_rows()
    groups = row_groups(rows)
    assert len(set(groups)) == 20
    train, heldout = split_rows(rows, 0.25, 0)
    assert sorted(train + heldout) == list(range(len(rows))) and train == sorted(train)
    assert len({groups[i] for i in heldout}) == 5
    assert not {groups[i] for i in train} & {groups[i] for i in heldout}


def test_the_split_is_reproducible_seeded_and_blind_to_order():
    groups = row_groups(make_rows())
    train, heldout = split_groups(groups, 0.25, 3)
    assert split_groups(groups, 0.25, 3) == (train, heldout) != split_groups(groups, 0.25, 4)
    _, mirrored = split_groups(groups[::-1], 0.25, 3)
    assert {groups[::-1][i] for i in mirrored} == {groups[i] for i in heldout}


def test_shares_that_leave_a_side_empty():
    assert split_groups([0, 1, 2], 0.0, 0) == ([0, 1, 2], [])
    assert [len(side) for side in split_groups([0, 1], 0.01, 0)] == [1, 1]
    assert [len(side) for side in split_groups([0, 1], 0.99, 0)] == [1, 1]
    assert split_groups([7, 7], 0.5, 0) == ([0, 1], [])
    with pytest.raises(TeaError, match="at least one row"):
        split_groups([], 0.5, 0)
