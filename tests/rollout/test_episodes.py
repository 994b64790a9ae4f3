"""Multi-turn rollouts: what is recorded against one plain pass, greedy play against transformers, order against the batch."""

import math

import pytest
import torch
from episode_envs import PLAIN, Ragged, histories, play, scratch, starts, trained_head
from tiny import SUPPORTED

from tea_rl.errors import TeaError
from tea_rl.head.config import ContextConfig
from tea_rl.head.context import ContextState
from tea_rl.rollout import ConversationFormat, EpisodeStart
from tea_rl.rollout import episodes as episodes_module

CONTEXT = ContextConfig(layers=[1, -1], horizons=["all", 6])


def tokens_of(batch, episode):
    """Records of an episode's tokens, in order."""
    turns = torch.tensor([turn.episode for turn in batch.turns])
    return batch.tokens.select((turns[batch.tokens.rows] == episode).nonzero().squeeze(1))


def summary(batch):
    return [
        (e.token_ids, e.model_mask, e.total_reward, e.length, e.terminated, e.truncated, e.reason)
        for e in batch.episodes
    ]


@pytest.mark.parametrize(
    ("family", "form"),
    [(family, "plain") for family in sorted(SUPPORTED)] + [("llama", "chat"), ("gpt2", "chat")],
)
def test_records_equal_one_plain_pass(backbones, family, form):
    """Ragged observations, several turns, replaced episodes: every record as from the whole conversation at once."""
    backbone = backbones(family)
    head = trained_head(backbone)
    conversation = PLAIN if form == "plain" else ConversationFormat()
    batch = play(
        backbone, head, which=starts(4, 2), num_parallel=3, conversation=conversation, temperature=0.8
    )
    assert batch.num_failed == 0
    assert len({episode.length for episode in batch.episodes}) > 1
    assert max(episode.length for episode in batch.episodes) >= 3
    close = {"atol": 2e-4, "rtol": 1e-4}
    for number, episode in enumerate(batch.episodes):
        mine = tokens_of(batch, number)
        places = torch.tensor(episode.model_mask).nonzero().squeeze(1)
        ids = torch.tensor(episode.token_ids)
        assert torch.equal(mine.actions, ids[places])
        states, logps, base = scratch(backbone, head, episode.token_ids, 0.8)
        torch.testing.assert_close(mine.states, states[places - 1], atol=1e-4, rtol=1e-3)
        chosen = mine.actions.unsqueeze(1)
        torch.testing.assert_close(mine.logps, logps[places - 1].gather(1, chosen).squeeze(1), **close)
        torch.testing.assert_close(mine.base_logps, base[places - 1].gather(1, chosen).squeeze(1), **close)
    terms = head.terms(batch.tokens, 0.8)
    torch.testing.assert_close(terms.logps, batch.tokens.logps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_wide_states_equal_one_plain_pass(backbones, family):
    backbone = backbones(family)
    head = trained_head(backbone, context=CONTEXT, std=0.3)
    batch = play(backbone, head, max_turns=3)
    assert batch.num_failed == 0
    for number, episode in enumerate(batch.episodes):
        ids = torch.tensor([episode.token_ids])
        wide = backbone.forward(
            ids, attention_mask=torch.ones_like(ids), context=ContextState.begin(CONTEXT)
        )[0]
        places = torch.tensor(episode.model_mask).nonzero().squeeze(1)
        torch.testing.assert_close(tokens_of(batch, number).states, wide[places - 1], atol=1e-4, rtol=1e-3)
        if episode.truncated:
            torch.testing.assert_close(episode.final_state, wide[-1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom"])
def test_greedy_play_equals_a_naive_loop_over_transformers(backbones, family):
    """Each turn naively: transformers re-reads the whole conversation with the head installed."""
    backbone = backbones(family)
    head = trained_head(backbone)
    form = ConversationFormat(system="S")
    batch = play(backbone, head, which=starts(5, 1), greedy=True, conversation=form, num_parallel=2)
    render = backbone.tokenizer.apply_chat_template
    backbone.install(head)
    try:
        for episode in batch.episodes:
            env = Ragged()
            observation, _ = env.reset(seed=0, options={"index": episode.start.index})
            messages = [{"role": "system", "content": "S"}, {"role": "user", "content": observation}]
            text = render(messages, tokenize=False, add_generation_prompt=True)
            ids = backbone.tokenizer(text, add_special_tokens=False).input_ids
            total, over, turns = 0.0, False, 0
            while not over and len(ids) + 6 <= backbone.max_length:
                out = backbone.model.generate(
                    torch.tensor([ids]),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                    do_sample=False,
                    max_new_tokens=6,
                )
                completion = out[0, len(ids) :].tolist()
                observation, reward, over, _, _ = env.step(
                    backbone.tokenizer.decode(completion, skip_special_tokens=True)
                )
                total, turns, ids = total + reward, turns + 1, ids + completion
                if not over:
                    ended = completion[-1] in backbone.eos_token_ids
                    bridge = ("" if ended else "<eos>") + f"\n<user> {observation}<eos>\n<assistant> "
                    ids += backbone.tokenizer(bridge, add_special_tokens=False).input_ids
            assert episode.token_ids == ids[: backbone.max_length]
            assert (episode.total_reward, episode.length) == (total, turns)
            assert episode.terminated == over
    finally:
        backbone.uninstall()


@pytest.mark.parametrize("config", [{}, {"context": CONTEXT, "std": 0.3}, {"shortlist_size": "all"}])
def test_an_episode_does_not_depend_on_the_batch_around_it(backbones, config):
    backbone = backbones("llama")
    head = trained_head(backbone, **config)
    batches = [play(backbone, head, num_parallel=count, max_turns=4) for count in (1, 3, 8)]
    assert summary(batches[0]) == summary(batches[1]) == summary(batches[2])
    for other in batches[1:]:
        torch.testing.assert_close(batches[0].tokens.logps, other.tokens.logps, atol=1e-4, rtol=1e-4)
        assert batches[0].turns == other.turns
    alone = play(backbone, head, which=[starts()[7]], max_turns=4)
    assert summary(alone)[0] == summary(batches[1])[7]
    other_seed = play(backbone, head, seed=(6,), max_turns=4)
    assert summary(other_seed) != summary(batches[1])


def test_observations_of_very_different_lengths(backbones):
    """They run in several passes, whose rows are put together again."""

    class Uneven(Ragged):
        def step(self, action):
            observation, *rest = super().step(action)
            return observation * (1 if self.index % 2 else 12), *rest

    backbone = backbones("llama")
    head = trained_head(backbone)
    for config in ({}, {"context": CONTEXT, "std": 0.3}):
        head = trained_head(backbone, **config)
        together = play(backbone, head, Uneven, which=starts(4, 2), num_parallel=8, max_new_tokens=4)
        alone = play(backbone, head, Uneven, which=starts(4, 2), num_parallel=1, max_new_tokens=4)
        assert summary(together) == summary(alone)
        torch.testing.assert_close(together.tokens.states, alone.tokens.states, atol=1e-4, rtol=1e-3)


def test_generations_of_a_start_share_its_first_prompt_and_part(backbones):
    backbone = backbones("llama")
    head = trained_head(backbone)
    batch = play(backbone, head, which=starts(2, 6), num_parallel=12, max_turns=2)
    first = [turn for turn in range(len(batch.turns)) if batch.turns[turn].turn == 0]
    begins = [(batch.tokens.rows == turn) & (batch.tokens.positions == 0) for turn in first]
    states = [int(batch.tokens.state_ids[begin]) for begin in begins]
    assert len(set(states[:6])) == len(set(states[6:])) == 1
    assert states[0] != states[6]
    assert len({tuple(episode.token_ids) for episode in batch.episodes[:6]}) > 1
    # Sharing must hold in numbers, too: equal ids, equal states.
    for state in batch.tokens.state_ids.unique():
        same = batch.tokens.states[batch.tokens.state_ids == state]
        assert torch.equal(same, same[:1].expand_as(same))


def test_turns_rewards_and_order(backbones):
    backbone = backbones("llama")
    batch = play(backbone, trained_head(backbone), max_turns=4)
    assert [(turn.episode, turn.turn) for turn in batch.turns] == [
        (number, turn) for number, episode in enumerate(batch.episodes) for turn in range(episode.length)
    ]
    for number, episode in enumerate(batch.episodes):
        turns = [turn for turn in batch.turns if turn.episode == number]
        assert episode.start == starts()[number]
        assert episode.total_reward == sum(turn.reward for turn in turns)
        assert [turn.reward for turn in turns] == [len(turn.completion) + 0.5 for turn in turns]
        assert [turn.invalid for turn in turns] == [turn.turn == 0 for turn in turns]
        assert turns[-1].terminated == episode.terminated
        assert turns[0].observation.endswith(str(episode.start.index))
    rows, positions = batch.tokens.rows, batch.tokens.positions
    assert (rows.diff() >= 0).all()
    assert (positions[1:][rows.diff() > 0] == 0).all()
    assert (positions.diff()[rows.diff() == 0] == 1).all()
    for number, turn in enumerate(batch.turns):
        text = backbone.tokenizer.decode(batch.tokens.actions[rows == number], skip_special_tokens=True)
        assert text == turn.completion


def test_environment_tokens_are_never_recorded(backbones):
    """Observations speak in digits and capitals that the masked-out model tokens cannot account for."""
    backbone = backbones("llama")
    batch = play(backbone, trained_head(backbone))
    assert len(batch.tokens) == sum(sum(episode.model_mask) for episode in batch.episodes)
    for number, episode in enumerate(batch.episodes):
        turns = [turn for turn in batch.turns if turn.episode == number]
        theirs = [t for t, own in zip(episode.token_ids, episode.model_mask, strict=True) if not own]
        heard = backbone.tokenizer.decode(theirs)
        expected = "".join(turn.observation + "\n" for turn in turns)
        assert heard.replace("\n", "").startswith(expected.replace("\n", ""))
        assert [token for _, token in histories(episode)] == tokens_of(batch, number).actions.tolist()


@pytest.mark.parametrize("form", ["plain", "chat"])
def test_sampled_tokens_are_kept_where_text_would_be_tokenised_otherwise(backbones, form):
    """Random bytes are seldom text: decoding and encoding again would change them."""
    backbone = backbones("llama")
    head = trained_head(backbone)
    batch = play(
        backbone, head, temperature=2.0, conversation=PLAIN if form == "plain" else ConversationFormat()
    )
    changed = 0
    for number, turn in enumerate(batch.turns):
        own = batch.tokens.actions[batch.tokens.rows == number].tolist()
        again = backbone.tokenizer(turn.completion, add_special_tokens=False).input_ids
        changed += own != again
        ids, mask = (getattr(batch.episodes[turn.episode], name) for name in ("token_ids", "model_mask"))
        assert any(
            ids[place : place + len(own)] == own and all(mask[place : place + len(own)])
            for place in range(len(ids))
        )
    assert changed


def test_a_full_context_cuts_the_episode(backbones):
    class Endless(Ragged):
        def step(self, action):
            return ("much text " * 2, 1.0, False, False, {})

    backbone = backbones("llama")
    head = trained_head(backbone)
    batch = play(backbone, head, Endless, which=starts(2, 2), max_context=64)
    for episode in batch.episodes:
        assert (episode.truncated, episode.terminated, episode.reason) == (True, False, "context")
        assert episode.length >= 2
        assert len(episode.token_ids) <= 64
        states, _, _ = scratch(backbone, head, episode.token_ids)
        torch.testing.assert_close(episode.final_state, states[-1], atol=1e-4, rtol=1e-3)
    assert not any(turn.truncated for turn in batch.turns)

    class Talkative(Endless):
        def reset(self, *, seed=None, options=None):
            return "x" * 500, {}

    batch = play(backbone, head, Talkative, which=starts(1, 2))
    for episode in batch.episodes:
        assert (episode.length, episode.reason, episode.total_reward) == (0, "context", 0)
        assert episode.final_state is None
    assert len(batch.tokens) == 0
    assert batch.tokens.states.shape == (0, backbone.hidden_size)


def test_time_limits_cut_and_terminal_states_do_not_bootstrap(backbones):
    class Limited(Ragged):
        def step(self, action):
            observation, reward, _, _, info = super().step(action)
            return observation, reward, self.index == 1, self.turn == 2, info

    backbone = backbones("llama")
    head = trained_head(backbone)
    batch = play(backbone, head, Limited, which=starts(3, 1))
    assert [episode.reason for episode in batch.episodes] == ["environment", None, "environment"]
    assert batch.episodes[1].terminated
    assert batch.episodes[1].final_state is None
    assert batch.turns[1].truncated
    batch = play(backbone, head, Limited, which=starts(3, 1), max_turns=1)
    assert [episode.reason for episode in batch.episodes] == ["turns", None, "turns"]
    for number in (0, 2):
        episode = batch.episodes[number]
        assert episode.token_ids[-1] == backbone.tokenizer("\n").input_ids[-1]
        assert episode.final_observation
        states, _, _ = scratch(backbone, head, episode.token_ids)
        torch.testing.assert_close(episode.final_state, states[-1], atol=1e-4, rtol=1e-3)


def test_a_greedy_start_among_sampled_ones(backbones):
    backbone = backbones("llama")
    head = trained_head(backbone)
    which = [EpisodeStart(1), EpisodeStart(1, 1, greedy=True), EpisodeStart(1, 2)]
    mixed = play(backbone, head, which=which)
    greedy = play(backbone, head, which=[EpisodeStart(1)], greedy=True)
    sampled = play(backbone, head, which=[EpisodeStart(1), EpisodeStart(1, 2)])
    assert mixed.episodes[1].token_ids == greedy.episodes[0].token_ids
    assert [mixed.episodes[n].token_ids for n in (0, 2)] == [e.token_ids for e in sampled.episodes]


def test_stop_strings_end_a_turn_and_are_not_repeated(backbones):
    backbone = backbones("llama")
    head = trained_head(backbone)
    sampling = {"max_new_tokens": 20, "max_turns": 2, "temperature": 1.5}
    free = play(backbone, head, **sampling)
    letter = max("ghijklmnopqrstuvwxyz", key=lambda a: sum(a in t.completion[:-1] for t in free.turns))
    form = ConversationFormat(format="plain", user="{observation}\n", assistant_end=letter)
    batch = play(backbone, head, stop=(letter,), conversation=form, **sampling)
    stopped = [letter in turn.completion for turn in batch.turns]
    assert {True, False} == set(stopped)
    for number, (turn, ended) in enumerate(zip(batch.turns, stopped, strict=True)):
        assert turn.finished or not ended
        assert ended == turn.completion.endswith(letter)
        if turn.turn == 1 or batch.episodes[turn.episode].length < 2:
            continue
        own = batch.tokens.actions[batch.tokens.rows == number].tolist()
        answered = batch.turns[number + 1].observation
        bridge = ("" if ended else letter) + answered + "\n"
        first = backbone.tokenizer(turn.observation + "\n").input_ids
        expected = first + own + backbone.tokenizer(bridge).input_ids
        assert batch.episodes[turn.episode].token_ids[: len(expected)] == expected


def test_nothing_to_play(backbones):
    backbone = backbones("llama")
    head = trained_head(backbone)
    settings = {"num_parallel": 2}
    batch = episodes_module.run_episodes(
        backbone, head, Ragged, [], episodes_module.EpisodeSettings(**settings)
    )
    assert (batch.episodes, batch.turns, len(batch.tokens), batch.choices) == ([], [], 0, None)


def test_finished_episodes_are_replaced_at_once(backbones, monkeypatch):
    sizes = []
    listen = episodes_module._Run._listen

    def counted(run):
        sizes.append((len(run.live), len(run.waiting)))
        listen(run)

    monkeypatch.setattr(episodes_module._Run, "_listen", counted)
    backbone = backbones("llama")
    play(backbone, trained_head(backbone), which=starts(6, 2), num_parallel=5)
    assert all(size == 5 for size, waiting in sizes if waiting)
    assert sum(waiting > 0 for _, waiting in sizes) >= 3


def test_the_cache_is_kept(backbones):
    """Tokens run once: a turn costs its observation and its completion, not the conversation before them."""
    backbone = backbones("llama")
    batch = play(backbone, trained_head(backbone), which=starts(4, 1), num_parallel=1)
    whole = sum(len(episode.token_ids) for episode in batch.episodes)
    assert batch.tokens_run <= whole
    assert 0 < batch.model_seconds < batch.seconds
    assert math.isclose(batch.environment_seconds, batch.seconds - batch.model_seconds)


def test_the_backbone_is_left_alone(backbones):
    backbone = backbones("gpt2")
    head = trained_head(backbone).train()
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    play(backbone, head)
    assert head.training
    assert not backbone.installed
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_refusals(backbones):
    backbone = backbones("llama")
    head = trained_head(backbone)
    with pytest.raises(TeaError, match="max_context is 999999"):
        play(backbone, head, max_context=999999)
    with pytest.raises(TeaError, match="max_new_tokens is 64, which leaves no room"):
        play(backbone, head, max_context=64, max_new_tokens=64)
    with pytest.raises(TeaError, match="num_parallel above 0, got 0"):
        play(backbone, head, num_parallel=0)
    with pytest.raises(TeaError, match="observation"):
        play(backbone, head, conversation=ConversationFormat(format="plain", user="no place"))
    sliding = backbones("gemma3")
    with pytest.raises(TeaError, match="head.context need full attention"):
        play(sliding, trained_head(sliding, context=CONTEXT))
    template = backbone.tokenizer.chat_template
    try:
        backbone.tokenizer.chat_template = None
        with pytest.raises(TeaError, match="chat template"):
            play(backbone, head, conversation=ConversationFormat())
        backbone.tokenizer.chat_template = "{{ messages[-1]['content'] }}"
        with pytest.raises(TeaError, match="leaves out what the assistant said"):
            play(backbone, head, conversation=ConversationFormat())
        backbone.tokenizer.chat_template = "{{ raise_exception('no system') }}"
        with pytest.raises(TeaError, match="refuses the conversation: no system"):
            play(backbone, head, conversation=ConversationFormat())
    finally:
        backbone.tokenizer.chat_template = template
