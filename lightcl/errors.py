"""The one error a wrong request raises: the command line prints it on one screen and exits with 2."""

import difflib
from collections.abc import Iterable


class RequestError(Exception):
    """What was asked for cannot be done. The text names what was given, what is allowed and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
