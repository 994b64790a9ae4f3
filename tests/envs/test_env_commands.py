"""``tea-rl envs`` and ``tea-rl play`` as a user meets them."""

import io
import json
import subprocess
import sys

import pytest

from tea_rl.cli import main
from tea_rl.envs import list_envs


@pytest.fixture
def tea(capsys, monkeypatch):
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*args, typed=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in args])
        out = capsys.readouterr()
        return int(exit_.value.code or 0), out.out, out.err

    return run


def assert_one_line_error(result, words):
    code, _, err = result
    assert code == 2 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last


@pytest.mark.parametrize("command", ["envs", "play"])
def test_help_has_an_example(tea, command):
    code, out, _ = tea(command, "--help")
    assert code == 0 and "Example" in out


def test_the_commands_help_loads_nothing_heavy():
    code = (
        "import sys, tea_rl.cli; "
        "print([name for name in ('gymnasium', 'numpy', 'torch', 'textworld') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_envs_lists_every_environment(tea):
    code, out, _ = tea("envs")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [entry.id for entry in list_envs()]
    listed = json.loads(tea("envs", "--json")[1])
    assert {"id", "summary", "kwargs", "available"} <= listed[0].keys()


def test_envs_reports_on_one(tea):
    code, out, _ = tea("envs", "tea_rl/GuessNumber-v0", "--kwargs", "high=8", "--episodes", 5)
    assert code == 0
    assert "from 1 to 8" in out and "accepted answers: 1, 2" in out
    assert "expert                1.000" in out and "checks: all passed" in out


def test_envs_reports_as_json(tea):
    code, out, _ = tea(
        "envs", "tea_rl/FrozenLake-v0", "--kwargs", "is_slippery=true", "--episodes", 4, "--json"
    )
    report = json.loads(out)
    assert code == 0 and report["ok"] and report["kwargs"] == {"is_slippery": True}
    assert report["episodes"] == 4 and report["prompt"].startswith("Walk")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["envs", "tea_rl/GuesNumber-v0"], 'Did you mean "tea_rl/GuessNumber-v0"'),
        (["envs", "tea_rl/GuessNumber-v0", "--kwargs", "high"], "KEY=VALUE"),
        (["envs", "tea_rl/GuessNumber-v0", "--kwargs", "hgh=3"], 'Did you mean "high"'),
        (["envs", "tea_rl/GuessNumber-v0", "--kwargs", "high=3", "--kwargs", "high=4"], "twice"),
        (["envs", "tea_rl/GuessNumber-v0", "--kwargs", "high=[1"], "--kwargs high=[1"),
        (["envs", "--kwargs", "high=3"], "name one"),
        (["envs", "tea_rl/GuessNumber-v0", "--episodes", "0"], "--episodes"),
        (["play", "CartPole-v1"], "not a text environment"),
        (["play", "tea_rl/GuessNumber-v0", "--index", "-1"], "--index"),
    ],
)
def test_mistakes_are_one_line(tea, args, words):
    assert_one_line_error(tea(*args), words)


def test_a_broken_environment_exits_with_2(tea, monkeypatch):
    from tea_rl.envs import Turn
    from tea_rl.envs.guess_number import GuessNumber

    monkeypatch.setattr(
        GuessNumber, "_act", lambda self, text: Turn("Fine.", 5.0, True, parsed=self._answer())
    )
    result = tea("envs", "tea_rl/GuessNumber-v0", "--episodes", 2)
    assert_one_line_error(result, "rule(s)")
    assert "junk is paid" in result[1] and "outside of the declared" in result[1]


def test_play_by_script_to_the_end(tea):
    code, out, err = tea("play", "tea_rl/GuessNumber-v0", "--index", 1, typed="16\n24\n20\nnot read\n")
    assert code == 0
    assert out.splitlines()[2:] == [
        "Higher. Guess:",
        "Lower. Guess:",
        "Correct.",
        "over after 3 turns, return 1",
    ]
    assert "(reward 1)" in err


def test_play_leaves_at_the_end_of_the_input(tea):
    code, out, _ = tea("play", "tea_rl/GuessNumber-v0", "--index", 1, "--seed", 1, typed="16\n")
    assert code == 0 and out.splitlines()[-1] == "left after 1 turn, return 0"


def test_play_says_when_the_turns_are_used_up(tea):
    code, out, err = tea(
        "play", "tea_rl/FrozenLake-v0", "--kwargs", "max_turns=2", "--choices", typed="left\n\n"
    )
    assert code == 0 and out.splitlines()[-1] == "out of turns after 2 turns, return 0"
    assert "accepted: left, down, right, up" in err


def test_play_leaves_at_ctrl_c(tea, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("tea_rl.cli.play._read_line", interrupted)
    code, out, err = tea("play", "tea_rl/GuessNumber-v0")
    assert code == 0 and "left after 0 turns" in out and "Traceback" not in err
