"""Prompts: every source, the split, rendering and the errors."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tea_rl.data import Prompt, data_digest, load_prompts, tokenize_prompts
from tea_rl.errors import TeaError
from tea_rl.recipe import DataConfig, load_recipe

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """A byte tokenizer: every text has tokens, one a byte; it adds a BOS token by default."""
    from tokenizers.processors import TemplateProcessing

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={"<s>": 0, **{c: i for i, c in enumerate(alphabet, 1)}}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def no_chat(tokenizer):
    tokenizer.chat_template = None
    yield tokenizer
    tokenizer.chat_template = TEMPLATE


def load(tokenizer, path=None, content=None, **settings):
    if path is not None:
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        settings["prompts"] = str(path)
    return load_prompts(DataConfig(**settings), tokenizer)


def error_of(*args, **settings):
    with pytest.raises(TeaError) as caught:
        load(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_quickstart_has_96_and_32_prompts(tokenizer):
    train, heldout = load_prompts(load_recipe("quickstart").data, tokenizer)
    assert (len(train), len(heldout)) == (96, 32)
    assert len({prompt.text for prompt in train + heldout}) == 128


def test_arithmetic_keeps_its_worked_examples_out_of_both_sides(tokenizer):
    pytest.importorskip("reasoning_gym")
    data = load_recipe("arithmetic").data
    train, heldout = load_prompts(data, tokenizer)
    for prompt in train + heldout:
        assert data.template.count(prompt.text) == 0
        terms = prompt.text.split(": ")[1].removesuffix("=")
        assert eval(terms) == int(prompt.columns["answer"])  # noqa: S307
    assert not {p.text for p in train} & {p.text for p in heldout}
    assert len(heldout) > 20


def test_text_file_drops_blank_lines_and_repeats(tokenizer, tmp_path):
    train, heldout = load(tokenizer, tmp_path / "p.txt", "\ufeffone\n\n two \none\nthree\n", eval_fraction=0)
    assert sorted(p.text for p in train) == ["one", "three", "two"] and heldout == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", '{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": 2}\n'),
        ("p.json", '[{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]'),
        ("p.csv", "prompt,answer\na,1\nb,2\n"),
    ],
)
def test_tables_bring_their_columns(tokenizer, tmp_path, name, content):
    train, _ = load(tokenizer, tmp_path / name, content, eval_fraction=0)
    assert {p.text: p.columns for p in train} == {"a": {"answer": 1}, "b": {"answer": 2}}


def test_parquet_and_saved_folders(tokenizer, tmp_path):
    import datasets

    table = datasets.Dataset.from_dict({"prompt": ["a", "b"], "answer": ["x", "y"]})
    table.to_parquet(str(tmp_path / "p.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(test=table).save_to_disk(str(tmp_path / "splits"))
    sources = [
        load(tokenizer, tmp_path / "p.parquet", eval_fraction=0),
        load(tokenizer, tmp_path / "saved", eval_fraction=0),
        load(tokenizer, tmp_path / "splits", eval_fraction=0, kwargs={"split": "test"}),
    ]
    assert sources[0] == sources[1] == sources[2]
    assert {p.text: p.columns["answer"] for p in sources[0][0]} == {"a": "x", "b": "y"}
    assert "it has test" in error_of(tokenizer, tmp_path / "splits")


def test_split_is_by_distinct_prompt_reproducible_and_seeded(tokenizer):
    prompts = [f"prompt {i % 40}" for i in range(120)]
    train, heldout = load(tokenizer, prompts=prompts, eval_fraction=0.25)
    assert (len(train), len(heldout)) == (30, 10)
    assert not {p.text for p in train} & {p.text for p in heldout}
    assert load(tokenizer, prompts=prompts, eval_fraction=0.25) == (train, heldout)
    _, other = load(tokenizer, prompts=prompts, eval_fraction=0.25, split_seed=1)
    assert {p.text for p in other} != {p.text for p in heldout}
    kept, capped = load(tokenizer, prompts=prompts, eval_fraction=0.25, eval_size=4)
    assert capped == heldout[:4] and kept == train  # what the cap leaves out is not trained on


def test_held_out_prompts_of_their_own_are_never_trained_on(tokenizer):
    train, heldout = load(tokenizer, prompts=["a", "b", "c"], eval_prompts=["c", "d"])
    assert {p.text for p in train} == {"a", "b"} and {p.text for p in heldout} == {"c", "d"}


def test_a_generator_writes_other_questions_for_its_held_out_prompts(tokenizer):
    pytest.importorskip("reasoning_gym")
    source = "reasoning_gym/chain_sum"
    train, heldout = load(
        tokenizer, prompts=source, eval_prompts=source, size=20, kwargs={"min_digits": 4, "max_digits": 4}
    )
    assert len(train) == len(heldout) == 20
    assert {"answer", "metadata"} == train[0].columns.keys()


def test_template_is_text_not_a_format_string(tokenizer):
    train, _ = load(tokenizer, prompts=["x"], template='{"q": {prompt}} {0}', eval_fraction=0)
    assert train[0].rendered == '{"q": x} {0}' and train[0].text == "x" and not train[0].chat


def test_chat_wraps_the_templated_prompt(tokenizer):
    train, _ = load(
        tokenizer, prompts=["x"], template="Q {prompt}", format="chat", system="S", eval_fraction=0
    )
    assert train[0] == Prompt("x", "<system>S</s><user>Q x</s><assistant>", {}, chat=True)


def test_conversations_are_rendered_as_chat(tokenizer, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "hi"}]},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "yo"}]},
    ]
    content = "\n".join(map(json.dumps, rows))
    train, _ = load(tokenizer, tmp_path / "c.jsonl", content, format="chat", system="S", eval_fraction=0)
    assert {p.text: p.rendered for p in train} == {
        "hi": "<system>S</s><user>hi</s><assistant>",
        "system: s\nuser: yo": "<system>s</s><user>yo</s><assistant>",
    }


def test_chat_needs_a_template(no_chat):
    assert "chat template" in error_of(no_chat, prompts=["x"], format="chat")


def test_a_template_that_refuses_is_reported(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    try:
        assert "no system turn" in error_of(tokenizer, prompts=["x"], format="chat", system="S")
    finally:
        tokenizer.chat_template = TEMPLATE


def test_only_chat_prompts_go_without_the_tokenizers_special_tokens(tokenizer):
    plain, chat = tokenize_prompts([Prompt("a", "ab"), Prompt("a", "ab", chat=True)], tokenizer, 10)
    assert plain == [tokenizer.bos_token_id, *chat] and len(chat) == 2


def test_too_long_and_empty_prompts_are_named(tokenizer):
    assert tokenize_prompts([Prompt("abc", "abc")], tokenizer, 4) == [tokenizer("abc")["input_ids"]]
    with pytest.raises(TeaError, match='at most 3 tokens.*got 4 in the prompt "abc"'):
        tokenize_prompts([Prompt("abc", "abc")], tokenizer, 3)
    with pytest.raises(TeaError, match="at least one token"):
        tokenize_prompts([Prompt("", "", chat=True)], tokenizer, 3)


def test_digest_sees_text_columns_side_and_order():
    a, b = Prompt("a", "a", {"answer": 1}), Prompt("b", "b", {(1, 2): {"x"}})
    digests = [
        data_digest([a, b], []),
        data_digest([b, a], []),
        data_digest([a], [b]),
        data_digest([Prompt("a", "a", {"answer": 2}), b], []),
    ]
    assert len(set(digests)) == 4 and all(len(digest) == 64 for digest in digests)
    assert data_digest([a, b], []) == digests[0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "", ["empty"]),
        ("p.txt", "\n \n", ["empty"]),
        ("p.txt", b"\xff\xfe", ["UTF-8"]),
        ("p.jsonl", "\n\n", ["empty"]),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', ["p.jsonl line 2", "invalid JSON"]),
        ("p.jsonl", '{"promt": "a"}\n', ['column "prompt"', 'rename "promt"']),
        ("p.jsonl", '{"prompt": 3}\n', ["row 1", "int 3"]),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', ["row 2", "nothing"]),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', ["row 2", "blank"]),
        ("p.jsonl", '{"prompt": [{"role": "user"}]}\n', ["row 1", "content"]),
        ("p.jsonl", '{"prompt": [{"role": "assistant", "content": "x"}]}\n', ["row 1", "assistant"]),
        ("p.json", '[{"prompt": "a"},', ["invalid JSON"]),
        ("p.csv", "prompt,answer\na,1\nb,2,3,4\n", ["line 3", "double quotes"]),
        ("p.parquet", "junk", ["p.parquet"]),
        ("p.xlsx", "junk", [".jsonl", "convert"]),
    ],
)
def test_a_broken_file_is_one_clear_line(tokenizer, tmp_path, capfd, name, content, words):
    message = error_of(tokenizer, tmp_path / name, content)
    assert str(tmp_path) in message
    for word in words:
        assert word in message, message
    assert capfd.readouterr().err == ""  # the readers' own logging would bury the line


def test_missing_sources(tokenizer, tmp_path):
    (tmp_path / "prompts.txt").write_text("a")
    assert 'Did you mean "prompts.txt"?' in error_of(tokenizer, tmp_path / "promts.txt")
    assert "does not exist" in error_of(tokenizer, tmp_path / "folder")
    assert "Hub dataset" in error_of(tokenizer, prompts="nobody/nothing")


def test_settings_a_source_does_not_take(tokenizer):
    pytest.importorskip("reasoning_gym")
    assert "data.kwargs" in error_of(tokenizer, prompts=["a"], kwargs={"x": 1})
    assert 'Did you mean "split"?' in error_of(tokenizer, prompts="a/b", kwargs={"splt": "x"})
    chain = "reasoning_gym/chain_sum"
    assert 'Did you mean "chain_sum"?' in error_of(tokenizer, prompts="reasoning_gym/chain_smu")
    assert 'Did you mean "min_terms"?' in error_of(tokenizer, prompts=chain, kwargs={"min_term": 2})
    assert "max_terms must be" in error_of(tokenizer, prompts=chain, kwargs={"min_terms": 9})
    assert "data.size" in error_of(tokenizer, prompts=chain, kwargs={"size": 9})


def test_nothing_left_to_train_on(tokenizer):
    assert "train on" in error_of(tokenizer, prompts=["a"], eval_prompts=["a"])
    assert "train on" in error_of(tokenizer, prompts=["a"], exclude=["a"])
