"""Encoding: the border between prompt and completion, end tokens, cuts and drops, digests."""

import pytest
from tiny import BOS, EOS, tiny_tokenizer

from tea_rl.data import encode as encode_module
from tea_rl.data.encode import encode_rows, labelled_digest, rendering_digest, tokenizer_digest
from tea_rl.data.labelled import LabelledData, LabelledRow
from tea_rl.data.prompts import Prompt, tokenize_prompts
from tea_rl.errors import TeaError
from tea_rl.packaged import INSTALL_COMMAND, packaged_gguf, packaged_model
from tea_rl.recipe import DataConfig

END = 1  # of the tiny tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def merging_tokenizer(*, opening=False):
    """Like Llama's: every first word gets a space, words are tokens, ``ab`` is one; optionally a BOS in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<eos>", "<bos>", "▁", "\n", "a", "b", "c", "ab", "▁a", "▁b", "▁ab", "▁c"]
    merges = [("a", "b"), ("▁", "ab"), ("▁", "a"), ("▁", "b"), ("▁", "c")]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    if opening:
        core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def encode(tokenizer, *rows, max_length=100, eos=END, **settings):
    rows = [row if isinstance(row, LabelledRow) else LabelledRow(*row) for row in rows]
    config = DataConfig(dataset="d", **settings)
    return encode_rows(LabelledData("prompt_completion", rows, "d"), config, tokenizer, eos, max_length)


def pieces(tokenizer, row):
    return tuple(tokenizer.convert_ids_to_tokens(ids) for ids in (row.prompt_ids, row.completion_ids))


def test_a_prompt_reads_as_it_does_when_it_is_generated_from(tokenizer):
    (row,), report = encode(tokenizer, ("the cat", " sat"))
    assert [row.prompt_ids] == tokenize_prompts([Prompt("", "the cat")], tokenizer, 99)
    assert tokenizer.decode(row.completion_ids) == " sat" + EOS
    assert (report.rows, report.tokens, report.truncated, report.dropped) == (1, 5, 0, 0)


def test_the_completion_reads_as_in_running_text():
    tokenizer = merging_tokenizer()
    rows, _ = encode(tokenizer, ("a", " b"), ("a", "c"), ("a", "b"), ("a ", "b"))
    assert [pieces(tokenizer, row) for row in rows] == [
        (["▁a"], ["▁b", "<eos>"]),
        (["▁a"], ["c", "<eos>"]),  # no space of its own
        (["▁a"], ["b", "<eos>"]),  # together they would be one token
        (["▁a", "▁"], ["b", "<eos>"]),
    ]


def test_opening_tokens_stand_once_before_prompts_and_plain_text():
    tokenizer = merging_tokenizer(opening=True)
    rows, _ = encode(tokenizer, ("a", " b"), ("", "a b"))
    assert [pieces(tokenizer, row) for row in rows] == [
        (["<bos>", "▁a"], ["▁b", "<eos>"]),
        (["<bos>"], ["▁a", "▁b", "<eos>"]),
    ]
    assert rows[0].prompt_ids == tokenizer("a")["input_ids"]


def test_plain_text_without_opening_token_is_predicted_from_its_first_token(tokenizer):
    (row,), _ = encode(tokenizer, ("", "abc"), template="Q {prompt}")
    assert pieces(tokenizer, row) == (["a"], ["b", "c", EOS])
    (row,), _ = encode(tokenizer, ("", "abc"), template="Q {prompt}", format="chat", system="S")
    assert pieces(tokenizer, row) == (["a"], ["b", "c", EOS])


def test_template_system_and_chat_are_applied_once(tokenizer):
    rows = [("x", "y"), ([{"role": "user", "content": "x"}], "y")]
    encoded, _ = encode(tokenizer, *rows, format="chat", template="Q {prompt}", system="S")
    assert encoded[0].prompt_ids == encoded[1].prompt_ids
    assert tokenizer.decode(encoded[0].prompt_ids) == f"<system> S{EOS}\n<user> Q x{EOS}\n<assistant> "
    assert pieces(tokenizer, encoded[0])[1] == ["y", EOS]
    (row,), _ = encode(tokenizer, ("x", "y"), template="Q {prompt}")
    assert tokenizer.decode(row.prompt_ids) == "Q x"


def test_one_end_token(tokenizer):
    rows, _ = encode(tokenizer, ("a", "b"), ("a", "b" + EOS))
    assert [row.completion_ids.count(END) for row in rows] == [1, 1]
    (row,), _ = encode(tokenizer, ("a", "b"), eos=None)
    assert END not in row.completion_ids


def test_a_chat_answer_ends_as_its_template_ends_it(tokenizer):
    before = tokenizer.chat_template
    tokenizer.chat_template = before.replace(EOS, BOS)
    try:
        (row,), _ = encode(tokenizer, ("a", "b"), format="chat")
        assert pieces(tokenizer, row)[1] == ["b", BOS]
        (row,), _ = encode(tokenizer, ("a", "b"))
        assert pieces(tokenizer, row)[1] == ["b", EOS]
        tokenizer.chat_template = before.replace(EOS, "")
        (row,), _ = encode(tokenizer, ("a", "b"), format="chat")
        assert pieces(tokenizer, row)[1] == ["b", EOS]
    finally:
        tokenizer.chat_template = before


def test_long_rows_are_cut_and_counted(tokenizer):
    rows, report = encode(tokenizer, ("ab", "c" * 10), ("ab", "cd"), max_length=5)
    assert [row.truncated for row in rows] == [True, False]
    assert pieces(tokenizer, rows[0])[1] == ["c", "c", "c"]  # no end token: it does not end there
    assert pieces(tokenizer, rows[1])[1] == ["c", "d", EOS]
    assert (report.truncated, report.dropped, report.tokens) == (1, 0, 6)
    assert "1 cut at 5 tokens" in report.describe()


def test_the_recipes_length_wins_when_it_is_smaller(tokenizer):
    config = DataConfig(dataset="d", max_length=4)
    data = LabelledData("prompt_completion", [LabelledRow("ab", "cdef")], "d")
    (row,), report = encode_rows(data, config, tokenizer, END, 100)
    assert len(row.completion_ids) == 2 and report.max_length == 4


def test_rows_without_room_are_dropped_with_their_pair(tokenizer):
    rows = [
        LabelledRow("a" * 9, "b", place="d line 1"),
        LabelledRow("", "x" * 3, pair=0, chosen=True),
        LabelledRow("y" * 5, "x", pair=0, chosen=False),
        LabelledRow("a", "b"),
    ]
    kept, report = encode(tokenizer, *rows, max_length=5)
    assert [row.row.prompt for row in kept] == ["a"] and report.dropped == 3
    assert "3 left out" in report.describe() and "d line 1" in report.describe()
    with pytest.raises(TeaError, match="fits 5 tokens, got none of 1"):
        encode(tokenizer, ("a" * 9, "b"), max_length=5)


def test_a_text_of_one_token_needs_an_end_to_predict(tokenizer):
    (row,), _ = encode(tokenizer, ("", "a"))
    assert pieces(tokenizer, row) == (["a"], [EOS])
    with pytest.raises(TeaError, match="got none"):
        encode(tokenizer, ("", "a"), eos=None)


def test_excluded_prompts_are_left_out(tokenizer):
    kept, report = encode(tokenizer, ("a ", "b"), ("c", "d"), exclude=["a"])
    assert [row.row.prompt for row in kept] == ["c"] and report.dropped == 0


def test_order_stays_over_several_batches(tokenizer, monkeypatch):
    rows = [(f"{i}", "x") for i in range(7)]
    together, _ = encode(tokenizer, *rows)
    monkeypatch.setattr(encode_module, "_BATCH", 2)
    apart, _ = encode(tokenizer, *rows)
    assert apart == together and [row.row.prompt for row in apart] == [prompt for prompt, _ in rows]


def test_a_model_without_chat_template_is_named_with_the_row():
    with pytest.raises(TeaError, match="line 3: expected a model with a chat template"):
        encode(merging_tokenizer(), LabelledRow([{"role": "user", "content": "a"}], "b", place="line 3"))


def test_tokenizer_digest_sees_the_vocabulary_and_nothing_that_use_changes(tokenizer):
    digest = tokenizer_digest(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == digest == tokenizer_digest(tiny_tokenizer())
    assert (
        len({digest, tokenizer_digest(tiny_tokenizer(("new",))), tokenizer_digest(merging_tokenizer())}) == 3
    )


def test_rendering_digest_sees_all_that_shapes_a_prompt(tokenizer):
    configs = [{}, {"template": "Q {prompt}"}, {"format": "chat"}, {"format": "chat", "system": "S"}]
    configs += [{"max_length": 9}]
    digests = [rendering_digest(DataConfig(dataset="d", **config), tokenizer) for config in configs]
    other = tiny_tokenizer()
    other.chat_template += " "
    digests.append(rendering_digest(DataConfig(dataset="d"), other))
    assert all(one != two for i, one in enumerate(digests) for two in digests[:i])
    assert digests[1]["template"] == "Q {prompt}" and len(digests[0]["tokenizer"]) == 64
    same = DataConfig(store="s", eval_fraction=0.5)
    assert rendering_digest(same, tokenizer) == rendering_digest(DataConfig(dataset="d"), tokenizer)


def test_labelled_digest_sees_contents_and_order_but_not_places():
    a, b = LabelledRow("p", "a", 1.0, place="x"), LabelledRow("p", "b", 1.0)
    changed = [
        [a, b],
        [b, a],
        [a],
        [LabelledRow("p", "a", 2.0), b],
        [LabelledRow("p", "a", 1.0, columns={"k": 1}), b],
        [LabelledRow([{"role": "user", "content": "p"}], "a", 1.0), b],
        [LabelledRow("p", "a", 1.0, True), b],
    ]
    assert len({labelled_digest(rows) for rows in changed}) == len(changed)
    assert labelled_digest([a]) == labelled_digest([LabelledRow("p", "a", 1.0, place="y")])


@pytest.fixture(scope="module")
def real():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(packaged_model())


@pytest.mark.model
@pytest.mark.skipif(packaged_gguf() is None, reason="the packaged model is not installed: " + INSTALL_COMMAND)
def test_texts_come_back_whole_and_chat_is_encoded_as_trl_does(real):
    rows = [
        ("The capital of France is", " Paris."),
        ("Q: 12+", "34\n"),
        ("The ", "cat"),
        ("x\n", "\n\nnew paragraph"),
        ("naïve caf", "é 🙂"),
        ("", "  two spaces, then words"),
    ]
    encoded, _ = encode(real, *rows, eos=real.eos_token_id)
    for row, (prompt, completion) in zip(encoded, rows, strict=True):
        assert real.decode(row.prompt_ids + row.completion_ids) == prompt + completion + real.eos_token
    from trl.data_utils import apply_chat_template

    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}
    (row,), _ = encode(real, ([user], "Hello there."), eos=real.eos_token_id)
    texts = apply_chat_template({"prompt": [user], "completion": [answer]}, real)
    assert real.decode(row.prompt_ids) == texts["prompt"]
    assert real.decode(row.completion_ids) == texts["completion"].rstrip("\n")  # which is never generated
