"""What the model reads between its turns."""

import pytest
from tiny import tiny_tokenizer

from tea_rl.errors import TeaError
from tea_rl.rollout import ConversationFormat
from tea_rl.rollout.conversation import Conversation


def conversation(**options):
    tokenizer = tiny_tokenizer()
    return tokenizer, Conversation(tokenizer, ConversationFormat(**options))


@pytest.mark.parametrize("system", [None, "be brief"])
def test_chat_turns_add_up_to_the_whole_template(system):
    """What the pieces give is what the template makes of the conversation at once."""
    tokenizer, talk = conversation(system=system)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "22"},
        {"role": "user", "content": "three"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for ending in ("", "<eos>"):
        first, second = (tokenizer(text + ending).input_ids for text in ("1", "22"))
        pieces = talk.first("one") + first + talk.following(first, "two") + second
        pieces += talk.following(second, "three")
        assert pieces == tokenizer(whole, add_special_tokens=False).input_ids


def test_a_turn_of_nothing():
    tokenizer, talk = conversation()
    assert tokenizer.decode(talk.following([], "go on")) == "<eos>\n<user> go on<eos>\n<assistant> "


def test_plain_turns():
    tokenizer, talk = conversation(
        format="plain",
        system="A game.\n",
        user="{observation}\nYou:",
        assistant_end="\n\n",
        choice_prefix=" ",
    )
    assert tokenizer.decode(talk.first("one {x}")) == "A game.\none {x}\nYou:"
    for said, bridge in (("1", "\n\ntwo\nYou:"), ("1\n", "\n\ntwo\nYou:"), ("1\n\n", "two\nYou:")):
        assert tokenizer.decode(talk.following(tokenizer(said).input_ids, "two")) == bridge
    assert tokenizer.decode(talk.choice("left")) == " left\n\n"


def test_chat_choices_end_as_the_template_ends_a_turn():
    tokenizer, talk = conversation()
    assert tokenizer.decode(talk.choice("left")) == "left<eos>"
    assert talk.choice("left")[-1] == tokenizer.eos_token_id


def test_a_plain_format_needs_a_place_for_the_observation():
    with pytest.raises(TeaError, match="expected {observation} in the user turn of a plain conversation"):
        conversation(format="plain", user="none")
