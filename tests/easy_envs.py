"""Small registered text environments in which a tiny model learns within seconds; importing this module registers them."""

import gymnasium

from tea_rl.envs import TextEnv, Turn


class Even(TextEnv):
    """Three turns, each paid with the share of characters whose code point is even; no answers are listed, no expert."""

    def __init__(self, **options):
        super().__init__(max_turns=3, **options)

    def _start(self, rng, index):
        return f"Write {chr(97 + int(rng.integers(26)))}."

    def _act(self, text):
        share = sum(ord(letter) % 2 == 0 for letter in text) / max(1, len(text))
        return Turn("Go on.", share, parsed=text)


class Flaky(Even):
    """`Even` that breaks after its first turn at every start below ``broken``, by raising or with a reward of NaN."""

    def __init__(self, how="raise", broken=2, **options):
        super().__init__(**options)
        self.how, self.broken = how, broken

    def reset(self, *, seed=None, options=None):
        self.index = (options or {}).get("index", 0)
        return super().reset(seed=seed, options=options)

    def step(self, action):
        answer = super().step(action)
        if self.index >= self.broken:
            return answer
        if self.how == "raise":
            raise ValueError("the line broke")
        return answer[0], float("nan"), *answer[2:]


class Pick(TextEnv):
    """Two turns; the first observation shows which of three letters is paid in both. With answers and an expert."""

    def __init__(self, silent=False, **options):
        super().__init__(max_turns=2, **options)
        self.silent = silent

    def _start(self, rng, index):
        self.wanted = "abc"[int(rng.integers(3))]
        return f"{self.wanted * 3}?"

    def _act(self, text):
        said = text.strip()
        good = said == self.wanted
        return Turn(f"{self.wanted * 3}?", 0.5 * good, invalid=said not in ("a", "b", "c"), parsed=said)

    def _admissible(self):
        return ["a", "b", "c"]

    def _expert(self):
        return None if self.silent else self.wanted


for _kind in (Even, Flaky, Pick):
    if f"Easy{_kind.__name__}-v0" not in gymnasium.registry:
        gymnasium.register(f"Easy{_kind.__name__}-v0", entry_point=_kind, disable_env_checker=True)
