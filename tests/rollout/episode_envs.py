"""Small text environments, tiny models' heads and naive computations that the tests of multi-turn rollouts share."""

import gymnasium
import torch
from torch import nn

from tea_rl.head.config import HeadConfig
from tea_rl.head.layer import TeaHead
from tea_rl.rollout import ConversationFormat, EpisodeSettings, EpisodeStart, run_episodes

PLAIN = ConversationFormat(format="plain", user="{observation}\n", assistant_end="\n")


class Ragged(gymnasium.Env):
    """Observations whose length depends on start, turn and the answer; episodes of 2 to 5 turns."""

    choices: list[str] | None = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.index, self.turn = options["index"], 0
        return "Q" * (1 + 3 * (self.index % 3)) + str(self.index), self._info()

    def step(self, action):
        self.turn += 1
        self.said = action
        text = chr(97 + self.turn) * (1 + (sum(action.encode()) + self.turn * (self.index + 3)) % 9)
        return text, len(action) + 0.5, self.turn >= 2 + self.index % 4, False, self._info()

    def _info(self):
        info = {"turn": self.turn, "invalid": self.turn == 1, "parsed": None}
        return info if self.choices is None else {**info, "admissible": list(self.choices)}


class Choices(Ragged):
    choices = ["go", "go on", "go off", "stay", "go", "x"]


def trained_head(backbone, std=0.05, **config) -> TeaHead:
    """A head that changes the model's choices, as after training."""
    config = {"hidden_sizes": [16, 8], "shortlist_size": 24, **config}
    head = TeaHead.for_backbone(backbone, HeadConfig(**config))
    torch.manual_seed(3)
    nn.init.normal_(head.members.readout, std=std)
    return head.eval()


def starts(indices=6, generations=2):
    return [EpisodeStart(index, generation) for index in range(indices) for generation in range(generations)]


def play(backbone, head, make_env=Ragged, which=None, seed=(5,), **settings):
    settings = {"num_parallel": 5, "max_new_tokens": 6, "conversation": PLAIN, **settings}
    return run_episodes(backbone, head, make_env, which or starts(), EpisodeSettings(**settings), seed=seed)


def histories(episode):
    """The conversation before each token that the model wrote, and that token."""
    return [
        (episode.token_ids[:place], episode.token_ids[place])
        for place, own in enumerate(episode.model_mask)
        if own
    ]


def scratch(backbone, head, ids, temperature=1.0):
    """States, policy and reference log-probabilities at every position of one conversation, from one plain pass."""
    ids = torch.tensor([ids])
    states = backbone.forward(ids, attention_mask=torch.ones_like(ids))
    logps = (head(states) * backbone.logit_scale / temperature).log_softmax(-1)[0]
    base = (backbone.reference(states) * backbone.logit_scale / temperature).log_softmax(-1)[0]
    return states[0], logps, base
