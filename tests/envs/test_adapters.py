"""The public libraries behind the adapters, and the traps they set."""

import random
import sys

import pytest
from helpers_envs import episode, expert, needs

from tea_rl.envs import make_env
from tea_rl.envs.checking import junk_problem, paid_junk
from tea_rl.errors import TeaError

ADAPTERS = {"ReasoningGym": "reasoning_gym", "TextArena": "textarena", "TextWorld": "textworld"}
needs_reasoning_gym, needs_textarena, needs_textworld = (needs(package) for package in ADAPTERS.values())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEA_RL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("name", "package"), ADAPTERS.items())
def test_a_missing_package_is_one_line_with_the_install_command(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TeaError, match=r"pip install 'tea-rl\[envs\]'") as caught:
        make_env(f"tea_rl/{name}-v0")
    assert package in str(caught.value) and "\n" not in str(caught.value)


def test_importing_the_environments_loads_none_of_the_libraries():
    import subprocess

    code = (
        f"import sys, tea_rl.envs; print([name for name in {list(ADAPTERS.values())} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@needs_reasoning_gym
class TestReasoningGym:
    def test_index_is_the_question_and_seed_another_set(self):
        env = make_env("tea_rl/ReasoningGym-v0", {"dataset": "needle_haystack", "size": 5})
        questions = [env.reset(options={"index": index})[0] for index in range(6)]
        assert len(set(questions)) == 5 and questions[5] == questions[0]
        other = make_env("tea_rl/ReasoningGym-v0", {"dataset": "needle_haystack", "size": 5, "seed": 9})
        assert other.reset(options={"index": 0})[0] != questions[0]

    def test_partial_credit_is_no_reward(self):
        env = make_env("tea_rl/ReasoningGym-v0", {"dataset": "needle_haystack", "size": 5})
        _, info = env.reset(options={"index": 0})
        _, reward, terminated, _, info = env.step(f"I think it is {info['answer']}")
        assert reward == 0 and terminated

    def test_other_right_answers_count(self):
        env = make_env("tea_rl/ReasoningGym-v0", {"dataset": "countdown", "size": 5})
        _, info = env.reset(options={"index": 0})
        assert env.step(f"({info['answer']})")[1] == 1

    @pytest.mark.parametrize(
        "dataset",
        [
            "game_of_life_halting",
            "gsm_symbolic",
            "prime_factorization",
            "boxnet",
            "polynomial_equations",
            "coin_flip",
        ],
    )
    def test_gullible_scorers_do_not_pay_for_junk(self, dataset):
        env = make_env("tea_rl/ReasoningGym-v0", {"dataset": dataset, "size": 3})
        assert [junk_problem(found) for found in paid_junk(env, 300)] == []
        _, info = env.reset(options={"index": 1})
        assert info.get("answer") is None or env.step(info["answer"])[1] == 1

    @pytest.mark.parametrize(
        ("kwargs", "words"),
        [
            ({"dataset": "chain_sm"}, 'Did you mean "chain_sum"'),
            ({"min_trms": 2}, 'Did you mean "min_terms"'),
            ({"min_terms": 9, "max_terms": 2}, "refuses"),
            ({"size": 0}, "size"),
        ],
    )
    def test_bad_settings_are_one_line(self, kwargs, words):
        with pytest.raises(TeaError, match=words):
            make_env("tea_rl/ReasoningGym-v0", kwargs)


@needs_textarena
class TestTextArena:
    def test_the_global_random_stream_is_left_alone(self):
        random.seed(5)
        expected = random.Random(5).random()
        episode(make_env("tea_rl/TextArena-v0"), expert, seed=0, options={"index": 0})
        assert random.random() == expected

    def test_the_outside_stream_does_not_change_the_game(self):
        env = make_env("tea_rl/TextArena-v0", {"game": "Blackjack-v0-raw"})
        told = []
        for outside in (1, 2):
            random.seed(outside)
            told.append(episode(env, lambda info: "[Stand]", seed=3, options={"index": 1})[0])
        assert told[0] == told[1]

    @pytest.mark.parametrize("action", ["[10]", "10", " [10]. "])
    def test_a_move_is_the_whole_answer(self, action):
        env = make_env("tea_rl/TextArena-v0")
        env.reset(options={"index": 0})
        assert env.step(action)[4]["parsed"] == "[10]"

    @pytest.mark.parametrize("action", ["I say [10]", "[10] [11]", "[]", "[10"])
    def test_a_move_in_chatter_is_invalid(self, action):
        env = make_env("tea_rl/TextArena-v0")
        env.reset(options={"index": 0})
        _, reward, terminated, _, info = env.step(action)
        assert info["invalid"] and reward == 0 and not terminated

    def test_an_invalid_move_is_not_paid_though_the_library_would(self):
        env = make_env("tea_rl/TextArena-v0")
        _, info = env.reset(options={"index": 0})
        env.step(next(move for move in ("[10]", "[11]") if move != info["expert"]))
        rewards = [env.step("[999]") for _ in range(2)]
        assert rewards[-1][1] == 0 and rewards[-1][2] and rewards[-1][4]["invalid"]

    @pytest.mark.parametrize("game", ["FrozenLake", "Bandit", "Secretary", "Blackjack", "Mastermind"])
    def test_other_games_play_to_the_end(self, game):
        env = make_env("tea_rl/TextArena-v0", {"game": f"{game}-v0-raw"})
        _, rewards, terminated, truncated, _ = episode(
            env, lambda info: (info.get("admissible") or ["[1 2 3 4]"])[-1], seed=0
        )
        assert terminated or truncated
        assert all(-1 <= reward <= 1 for reward in rewards)
        assert [junk_problem(found) for found in paid_junk(env, 200)] == []

    @pytest.mark.parametrize(
        ("kwargs", "words"),
        [({"game": "GuessTheNumbr-v0-raw"}, "Did you mean"), ({"max_numbr": 3}, "max_numbr")],
    )
    def test_bad_settings_are_one_line(self, kwargs, words):
        with pytest.raises(TeaError, match=words) as caught:
            make_env("tea_rl/TextArena-v0", kwargs)
        assert "\n" not in str(caught.value)


@needs_textworld
class TestTextWorld:
    def test_games_are_made_once_and_are_the_same_again(self, cache):
        env = make_env("tea_rl/TextWorld-v0", {"num_games": 2})
        first = env.reset(options={"index": 0})[0]
        files = sorted(cache.rglob("*"))
        assert len([file for file in files if file.suffix == ".json"]) == 1
        stamp = [file.stat().st_mtime_ns for file in files if file.is_file()]
        assert make_env("tea_rl/TextWorld-v0", {"num_games": 2}).reset(options={"index": 2})[0] == first
        assert [file.stat().st_mtime_ns for file in files if file.is_file()] == stamp

    def test_a_game_does_not_depend_on_where_it_was_made(self, cache, monkeypatch):
        env = make_env("tea_rl/TextWorld-v0", {"num_games": 1})
        first = env.reset(options={"index": 0})[0]
        monkeypatch.setenv("TEA_RL_CACHE", str(cache / "other"))
        random.seed(99)
        assert make_env("tea_rl/TextWorld-v0", {"num_games": 1}).reset(options={"index": 0})[0] == first

    def test_what_stands_in_a_closed_thing_is_not_told(self):
        from types import SimpleNamespace as Thing

        from tea_rl.envs.text_world import describe_facts

        def fact(name, *names):
            return Thing(name=name, arguments=[Thing(name=name) for name in names])

        facts = [
            fact("at", "P", "attic"),
            fact("at", "box", "attic"),
            fact("in", "coin", "box"),
            fact("in", "key", "I"),
            fact("at", "cat", "cellar"),
            fact("south_of", "cellar", "attic"),
        ]
        closed = describe_facts([*facts, fact("closed", "box")])
        assert closed == "You are in the attic. Here: box (closed). You carry: key. Exits: south."
        assert "box (open, with coin)" in describe_facts([*facts, fact("open", "box")])

    def test_the_told_exits_are_the_ones_that_can_be_walked(self):
        env = make_env("tea_rl/TextWorld-v0", {"rooms": 3, "objects": 3, "num_games": 2})
        for index in range(2):
            text, info = env.reset(options={"index": index})
            ways = {choice.removeprefix("go ") for choice in info["admissible"] if choice.startswith("go ")}
            told = text.rpartition("Exits: ")[2].partition(".")[0].split(", ")
            assert ways <= set(told)

    def test_the_quest_is_told_once_or_every_time(self):
        once = make_env("tea_rl/TextWorld-v0", {"num_games": 1})
        always = make_env("tea_rl/TextWorld-v0", {"num_games": 1, "repeat_goal": True})
        quest, _, rest = once.reset(options={"index": 0})[0].partition("\n")
        text, info = always.reset(options={"index": 0})
        assert text == rest.replace("\nDo:", f"\nTask: {quest}\nDo:") and quest not in rest
        told = [env.step(info["expert"])[0] for env in (once, always)]
        assert quest not in told[0] and told[1].count(f"Task: {quest}\nDo:") == 1

    def test_only_listed_commands_are_taken(self):
        env = make_env("tea_rl/TextWorld-v0", {"num_games": 1})
        _, info = env.reset(options={"index": 0})
        assert not any(choice.startswith(("look", "inventory", "examine")) for choice in info["admissible"])
        *_, info = env.step("look")
        assert info["invalid"]
        *_, info = env.step(info["expert"].upper())
        assert not info["invalid"] and info["reward_terms"]["progress"] > 0

    def test_a_folder_that_cannot_be_written_is_one_line(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TEA_RL_CACHE", str(tmp_path / "file"))
        with pytest.raises(TeaError, match="TEA_RL_CACHE"):
            make_env("tea_rl/TextWorld-v0").reset(options={"index": 0})
