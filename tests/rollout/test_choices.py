"""Turns between listed choices: exact probabilities, what a learner recomputes, and how they mix with free text."""

import math

import pytest
import torch
from episode_envs import PLAIN, Choices, Ragged, play, scratch, starts, trained_head
from tiny import SUPPORTED

from tea_rl.head.config import ContextConfig
from tea_rl.rollout import ConversationFormat, EpisodeStart
from tea_rl.rollout.choices import choice_logps

CONTEXT = ContextConfig(layers=[1, -1], horizons=["all", 6])
TEXTS = ["go", "go on", "go off", "stay", "x"]


def choose(backbone, head, make_env=Choices, **options):
    return play(backbone, head, make_env, choose_admissible=True, **options)


def naive_scores(backbone, head, before, texts, end, temperature):
    """Summed log-probabilities of each choice after a conversation, one plain pass a choice."""
    scores = []
    for text in texts:
        own = backbone.tokenizer(text, add_special_tokens=False).input_ids + end
        _, logps, _ = scratch(backbone, head, before + own, temperature)
        scores.append(sum(logps[len(before) - 1 + n, token] for n, token in enumerate(own)))
    return torch.stack(scores)


@pytest.mark.parametrize(
    ("family", "form"),
    [(family, "plain") for family in sorted(SUPPORTED)] + [("llama", "chat"), ("gpt2", "chat")],
)
def test_probabilities_equal_a_naive_computation(backbones, family, form):
    backbone = backbones(family)
    head = trained_head(backbone, std=0.2)
    conversation = PLAIN if form == "plain" else ConversationFormat()
    which = starts(3, 2)[1:]
    batch = choose(
        backbone, head, which=which, num_parallel=2, max_turns=3, temperature=1.7, conversation=conversation
    )
    assert batch.num_failed == 0
    choices = batch.choices
    assert len(batch.tokens) == 0
    assert len(choices) == len(batch.turns) == sum(episode.length for episode in batch.episodes)
    assert choices.turns.tolist() == list(range(len(batch.turns)))
    assert choices.texts == TEXTS * len(choices)
    logps = choice_logps(choices.tokens.logps, choices.tokens.rows, choices.decision_of_choice)
    sums = torch.zeros(len(choices)).index_add(0, choices.decision_of_choice, logps.exp())
    torch.testing.assert_close(sums, torch.ones(len(choices)))
    torch.testing.assert_close(logps[choices.chosen], choices.logps)
    base = choice_logps(choices.tokens.base_logps, choices.tokens.rows, choices.decision_of_choice)
    torch.testing.assert_close(base[choices.chosen], choices.base_logps)
    table, base_table = logps.view(-1, len(TEXTS)), base.view(-1, len(TEXTS))
    torch.testing.assert_close(choices.entropy, -(table.exp() * table).sum(1))
    torch.testing.assert_close(choices.kl, (table.exp() * (table - base_table)).sum(1), atol=1e-6, rtol=1e-4)
    assert choices.kl.max() > 1e-5
    end = backbone.tokenizer("\n" if form == "plain" else "<eos>").input_ids
    for decision, turn in enumerate(batch.turns):
        before = conversation_before(batch, decision)
        naive = naive_scores(backbone, head, before, TEXTS, end, 1.7).log_softmax(0)
        torch.testing.assert_close(table[decision], naive, atol=5e-4, rtol=1e-4)
        assert turn.completion == choices.texts[choices.chosen[decision]]


def conversation_before(batch, number):
    """Token ids that the model had read when it took turn ``number``."""
    turn = batch.turns[number]
    episode = batch.episodes[turn.episode]
    starts_of_turns = [
        place
        for place, own in enumerate(episode.model_mask)
        if own and (place == 0 or not episode.model_mask[place - 1])
    ]
    return episode.token_ids[: starts_of_turns[turn.turn]]


def test_conversations_go_on_from_the_chosen_one(backbones):
    backbone = backbones("llama")
    head = trained_head(backbone)
    batch = choose(backbone, head)
    for number, episode in enumerate(batch.episodes):
        turns = [turn for turn in batch.turns if turn.episode == number]
        said = "".join(f"{turn.observation}\n{turn.completion}\n" for turn in turns)
        assert backbone.tokenizer.decode(episode.token_ids) == said
        own = [t for t, mine in zip(episode.token_ids, episode.model_mask, strict=True) if mine]
        assert backbone.tokenizer.decode(own) == "".join(f"{turn.completion}\n" for turn in turns)


@pytest.mark.parametrize("config", [{}, {"context": CONTEXT, "std": 0.3}, {"shortlist_size": "all"}])
def test_a_learner_recomputes_the_policy(backbones, config):
    """Replayed from the cached states, with a gradient to the members; shared beginnings share their state."""
    backbone = backbones("llama")
    head = trained_head(backbone, **config)
    choices = choose(backbone, head, temperature=0.9, max_turns=3).choices
    tokens = choices.tokens
    replayed = choice_logps(head.terms(tokens, 0.9).logps, tokens.rows, choices.decision_of_choice)
    torch.testing.assert_close(replayed[choices.chosen], choices.logps, atol=1e-5, rtol=1e-5)
    replayed[choices.chosen].sum().backward()
    assert head.members.readout.grad.abs().max() > 0
    firsts = tokens.state_ids[tokens.positions == 0].view(len(choices), -1)
    assert (firsts == firsts[:, :1]).all()
    for state in tokens.state_ids.unique():
        same = tokens.states[tokens.state_ids == state]
        assert torch.equal(same, same[:1].expand_as(same))
    assert (tokens.rows.diff() >= 0).all()


@pytest.mark.parametrize("config", [{}, {"context": CONTEXT, "std": 0.3}])
def test_decisions_do_not_depend_on_the_batch(backbones, config):
    backbone = backbones("llama")
    head = trained_head(backbone, **config)
    batches = [choose(backbone, head, num_parallel=count, max_turns=3) for count in (1, 3, 8)]
    for other in batches[1:]:
        assert [t.completion for t in other.turns] == [t.completion for t in batches[0].turns]
        torch.testing.assert_close(batches[0].choices.logps, other.choices.logps, atol=1e-4, rtol=1e-4)


def test_choices_are_sampled_as_often_as_they_are_likely(backbones):
    backbone = backbones("llama")
    head = trained_head(backbone)

    class OneDecision(Choices):
        choices = ["a", "b", "c", "d", "e"]

        def step(self, action):
            return "over", 1.0, True, False, {}

    count = 800
    which = [EpisodeStart(0, generation) for generation in range(count)]
    batch = choose(backbone, head, OneDecision, which=which, num_parallel=80, temperature=8.0)
    choices = batch.choices
    logps = choice_logps(choices.tokens.logps, choices.tokens.rows, choices.decision_of_choice)
    probs = logps.view(count, -1)[0].exp()
    shares = torch.bincount(choices.chosen % 5, minlength=5) / count
    assert (shares > 0.02).sum() > 2
    assert ((shares - probs).abs() < 5 * (probs * (1 - probs) / count).sqrt() + 1e-3).all()


def test_greedy_takes_the_likeliest(backbones):
    backbone = backbones("llama")
    choices = choose(backbone, trained_head(backbone), greedy=True).choices
    logps = choice_logps(choices.tokens.logps, choices.tokens.rows, choices.decision_of_choice)
    table = logps.view(len(choices), -1)
    assert torch.equal(choices.chosen % len(TEXTS), table.argmax(1))


def test_free_text_where_nothing_is_listed(backbones):
    """Turns of both kinds in one batch, and the switch off."""

    class Mixed(Choices):
        def _info(self):
            info = super()._info()
            if (self.turn + self.index) % 2:
                info["admissible"] = []
            return info

    backbone = backbones("llama")
    head = trained_head(backbone)
    batch = choose(backbone, head, Mixed)
    free = set(batch.tokens.rows.tolist())
    decided = set(batch.choices.turns.tolist())
    assert free
    assert decided
    assert free | decided == set(range(len(batch.turns)))
    assert not free & decided
    for number, turn in enumerate(batch.turns):
        index = batch.episodes[turn.episode].start.index
        assert (number in free) == bool((turn.turn + index) % 2)
    for number, episode in enumerate(batch.episodes):
        places = torch.tensor(episode.model_mask).nonzero().squeeze(1)
        states, _, _ = scratch(backbone, head, episode.token_ids)
        own = [n for n, turn in enumerate(batch.turns) if turn.episode == number]
        mine = torch.isin(batch.tokens.rows, torch.tensor(own))
        ids = torch.tensor(episode.token_ids)
        assert torch.isin(batch.tokens.actions[mine], ids[places]).all()
        for state in batch.tokens.states[mine]:
            assert (states - state).abs().amax(1).min() < 1e-4
    assert play(backbone, head, Choices).choices is None


def test_failed_episodes_leave_no_decision(backbones):
    class Breaking(Choices):
        def step(self, action):
            if self.index == 1 and self.turn == 1:
                raise ValueError("broken")
            return super().step(action)

    backbone = backbones("llama")
    batch = choose(backbone, trained_head(backbone), Breaking, which=starts(3, 1))
    assert batch.num_failed == 1
    assert 1 not in {batch.turns[turn].episode for turn in batch.choices.turns.tolist()}
    assert {batch.turns[turn].episode for turn in batch.choices.turns.tolist()} == {0, 2}


def test_choices_that_are_no_text_cost_the_episode_or_are_left_out(backbones):
    class Odd(Choices):
        def _info(self):
            return {
                "admissible": ["a", "\ud800"] if self.index == 1 and self.turn else ["a", "b", None, 7, ""]
            }

    backbone = backbones("llama")
    batch = choose(backbone, trained_head(backbone), Odd, which=starts(3, 1))
    failed = [episode.failed for episode in batch.episodes]
    assert failed[0] is failed[2] is None
    assert failed[1].startswith("what it says cannot be tokenised")
    assert set(batch.choices.texts) == {"a", "b"}


def test_a_choice_that_does_not_fit_cuts_the_episode(backbones):
    class Long(Ragged):
        choices = ["short", "long " * 40]

    backbone = backbones("llama")
    batch = choose(backbone, trained_head(backbone), Long, which=starts(2, 1))
    assert [episode.reason for episode in batch.episodes] == ["context", "context"]


def test_choice_logps_of_uneven_decisions():
    tokens = torch.tensor([-1.0, -2.0, -0.5, -700.0, -0.1], requires_grad=True)
    logps = choice_logps(tokens, torch.tensor([0, 0, 1, 2, 3]), torch.tensor([0, 0, 1, 1]))
    expected = [-3.0, -0.5]
    total = math.log(math.exp(-3) + math.exp(-0.5))
    torch.testing.assert_close(
        logps.detach(), torch.tensor([expected[0] - total, expected[1] - total, -699.9, 0.0])
    )
    logps[0].backward()
    share = math.exp(-3 - total)
    torch.testing.assert_close(tokens.grad, torch.tensor([1 - share, 1 - share, share - 1, 0.0, 0.0]))


def test_select_takes_decisions_with_all_their_choices(backbones):
    """Against the parts put together by hand; decisions list different numbers of choices, of different lengths."""

    class Uneven(Choices):
        def _info(self):
            info = super()._info()
            return {**info, "admissible": info["admissible"][: 2 + (self.turn + self.index) % 4]}

    backbone = backbones("llama")
    whole = choose(backbone, trained_head(backbone), Uneven, which=starts(4, 1), max_turns=3).choices
    sizes = torch.bincount(whole.decision_of_choice)
    assert len(sizes.unique()) > 1
    count = len(whole)
    for index in ([count - 1, 0, 3, 2], [1], list(range(count)), list(range(count))[::-1]):
        part = whole.select(torch.tensor(index))
        assert len(part) == len(index)
        texts, rows, actions, states, owners, chosen = [], [], [], [], [], []
        for place, decision in enumerate(index):
            for choice in (whole.decision_of_choice == decision).nonzero().flatten().tolist():
                own = whole.tokens.rows == choice
                if choice == whole.chosen[decision]:
                    chosen.append(len(texts))
                rows += [len(texts)] * int(own.sum())
                actions.append(whole.tokens.actions[own])
                states.append(whole.tokens.states[own])
                owners.append(place)
                texts.append(whole.texts[choice])
        assert part.texts == texts and part.chosen.tolist() == chosen
        assert part.decision_of_choice.tolist() == owners
        # Tokens may come in any order: they say which choice they belong to.
        order = torch.argsort(part.tokens.rows, stable=True)
        assert part.tokens.rows[order].tolist() == rows
        assert torch.equal(part.tokens.actions[order], torch.cat(actions))
        assert torch.equal(part.tokens.states[order], torch.cat(states))
        for name in ("turns", "logps", "base_logps", "kl", "entropy"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[index])
        logps = choice_logps(part.tokens.logps, part.tokens.rows, part.decision_of_choice)
        torch.testing.assert_close(logps[part.chosen], part.logps)
