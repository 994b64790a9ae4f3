"""The one exception a user's mistake raises, and the suggestion that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TeaError(Exception):
    """A mistake the user can mend.

    Its text is one line: what was expected, what came, what to do next. The command line prints it and exits with
    code 2; library users catch it like any exception.
    """


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return ``' Did you mean "x"?'`` for the closest candidate, or ``''``.

    >>> did_you_mean("quikstart", ["quickstart", "arithmetic"])
    ' Did you mean "quickstart"?'
    >>> did_you_mean("zzz", ["quickstart"])
    ''
    """
    close = difflib.get_close_matches(str(word), list(candidates), n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""
