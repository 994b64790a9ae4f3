"""The command line run in this process, shared by its tests."""

import pytest

from tea_rl.cli import main


def tea(capsys, *args) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in args])
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return int(exit_.value.code or 0), out.out, out.err


def last_error(result) -> str:
    """The one line of a command that was refused."""
    code, _, err = result
    assert code == 2, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last
