"""Tiny generated text adventures of the library textworld."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from tea_rl.envs.base import TextEnv, Turn, finite, pick, require, whole_number
from tea_rl.errors import TeaError
from tea_rl.packaged import cache_folder

#: Commands that only describe what the observation says anyway.
_IDLE = ("examine ", "inventory", "look")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
#: The library keeps one parser for all games, and rollouts step environments in threads.
_ONE_AT_A_TIME = threading.Lock()
#: Part of every file's name: raise it when games are made differently.
_VERSION = 1


class TextWorld(TextEnv):
    """A text adventure: reward 1 in all, paid as the game's score rises.

    Games are generated once and kept in the cache folder. They run on textworld's own model of the game, in a
    millisecond a step; the library's compiled games tell the same in long prose at some 7 ms a step and half a second a
    start, which a small model reads less well and a batch of episodes waits for. So the observation is put together here
    from the facts a player can see.

    Only a command in ``info["admissible"]`` is accepted. The expert follows the quest. The reward term ``progress`` is
    the share of the quest an action completes (negative when it leads away).

    Args:
        rooms: rooms of a game.
        objects: things in a game.
        quest_length: commands the shortest solution needs.
        num_games: how many games there are; ``options={"index": i}`` is game ``i`` modulo this.
        seed: another seed gives other games.
        max_turns: commands before the episode is truncated.
        repeat_goal: end every observation with the quest, instead of telling it once at the beginning: a small model acts on
            what it has just read.

    Raises:
        TeaError: the package is missing, or no game has these properties.
    """

    limit_terminates = False
    reward_term_names = ("progress",)

    def __init__(
        self,
        rooms: int = 2,
        objects: int = 4,
        quest_length: int = 3,
        num_games: int = 16,
        seed: int = 0,
        max_turns: int = 10,
        repeat_goal: bool = False,
        render_mode: str | None = None,
    ) -> None:
        require("textworld", "tea_rl/TextWorld-v0")
        self._shape = {
            "nb_rooms": whole_number("rooms", rooms, 1),
            "nb_objects": whole_number("objects", objects, 1),
            "quest_length": whole_number("quest_length", quest_length, 1),
        }
        self.num_games = whole_number("num_games", num_games, 1)
        self._seed = whole_number("seed", seed, 0)
        self._repeat_goal = bool(repeat_goal)
        super().__init__(
            max_turns=whole_number("max_turns", max_turns, 1),
            reward_range=(-1.0, 1.0),
            render_mode=render_mode,
        )

    def _start(self, rng: np.random.Generator, index: int | None) -> str:
        import textworld

        wanted = textworld.EnvInfos(
            admissible_commands=True,
            policy_commands=True,
            max_score=True,
            score=True,
            facts=True,
            objective=True,
        )
        with _ONE_AT_A_TIME:
            path = _game_file(self._shape, [self._seed, pick(rng, index, self.num_games)])
            self._inner = textworld.start(str(path), wanted)
            self._state = self._inner.reset()
        self._score = 0.0
        self._quest = max(1, len(self._state["policy_commands"] or []))
        goal = _goal(self._state["objective"])
        self._reminder = f"\nTask: {goal}" if self._repeat_goal else ""
        return self._describe() if self._repeat_goal else f"{goal}\n{self._describe()}"

    def _act(self, text: str) -> Turn:
        command = text.strip().removesuffix(".").lower()
        command = {choice.lower(): choice for choice in self._admissible()}.get(command, "")
        if not command:
            return Turn(f"That cannot be done.\n{self._describe()}", invalid=True)
        before = len(self._state["policy_commands"] or [])
        with _ONE_AT_A_TIME:
            self._state, score, done = self._inner.step(command)
        reward = (finite(score) - self._score) / (finite(self._state["max_score"]) or 1.0)
        self._score = finite(score)
        progress = (before - len(self._state["policy_commands"] or [])) / self._quest
        ending = "You won." if self._state["won"] else "You lost."
        text = ending if done else self._describe()
        return Turn(text, reward, bool(done), parsed=command, terms={"progress": progress})

    def _describe(self) -> str:
        commands = "; ".join(self._admissible())
        return f"{describe_facts(self._state['facts'])}\nYou can: {commands}.{self._reminder}\nDo:"

    def _admissible(self) -> list[str]:
        return [name for name in self._state["admissible_commands"] if not name.startswith(_IDLE)]

    def _expert(self) -> str | None:
        policy = self._state["policy_commands"]
        return str(policy[0]) if policy else None


def describe_facts(facts: list[Any]) -> str:
    """What a player sees and carries, in a few short sentences.

    Args:
        facts: textworld propositions whose arguments carry readable names.
    """
    states, holds = defaultdict(list), defaultdict(list)
    room, exits = "", []
    for fact in facts:
        names = [str(argument.name) for argument in fact.arguments]
        if fact.name == "at" and names[0] == "P":
            room = names[1]
        elif fact.name in ("at", "in", "on"):
            holds[names[1]].append(names[0])
        elif fact.name in ("open", "closed", "locked"):
            states[names[0]].append(fact.name)
    for fact in facts:
        names = [str(argument.name) for argument in fact.arguments]
        if fact.name.endswith("_of") and names[-1] == room and len(names) == 2:
            exits.append(fact.name.removesuffix("_of"))

    def shown(thing: str) -> str:
        inside = "" if {"closed", "locked"} & set(states[thing]) else ", ".join(sorted(holds[thing]))
        notes = [*states[thing], *([f"with {inside}"] if inside else [])]
        return f"{thing} ({', '.join(notes)})" if notes else thing

    here = ", ".join(shown(thing) for thing in sorted(holds[room]) if thing != "P") or "nothing"
    carried = ", ".join(sorted(holds["I"])) or "nothing"
    ways = f" Exits: {', '.join(sorted(set(exits)))}." if exits else ""
    return f"You are in the {room}. Here: {here}. You carry: {carried}.{ways}"


def _goal(objective: str) -> str:
    """The quest without the greeting in front of it."""
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(objective.split()))
    greeting = [n for n, text in enumerate(sentences) if "TextWorld" in text or text.startswith("Here is")]
    return " ".join(sentences[max(greeting, default=-1) + 1 :]) or objective


def _game_file(shape: dict[str, int], seeds: list[int]) -> Path:
    """The JSON file of one game, generated when it is not in the cache yet."""
    from textworld import GameOptions
    from textworld.generator import make_game

    name = "-".join(map(str, [*shape.values(), *seeds, f"v{_VERSION}"]))
    path = cache_folder() / "textworld" / f"{name}.json"
    if path.is_file():
        return path
    options = GameOptions()
    for key, value in shape.items():
        setattr(options, key, value)
    options.seeds = int(np.random.SeedSequence(seeds).generate_state(1)[0] % 2**31)
    try:
        game = make_game(options)
    except Exception as error:  # the generator gives up in several ways
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TeaError(
            f"textworld found no game with {shape}: {reason}; try a shorter quest_length or more rooms and objects"
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as folder:
            game.save(os.path.join(folder, path.name))
            os.replace(os.path.join(folder, path.name), path)
    except OSError as error:
        raise TeaError(
            f"could not write {path}: {error.strerror}; free some space or set TEA_RL_CACHE"
        ) from error
    return path
