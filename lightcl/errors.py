"""The one error a wrong request raises: the command line prints it on one screen and exits with 2."""

import difflib
import json
from collections.abc import Iterable
from itertools import islice


class RequestError(Exception):
    """What was asked for cannot be done. The text names what was given, what is allowed and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def shown(given: object) -> str:
    """A value as it would stand in the file, cut to some 80 characters; it may be endless."""
    pieces = json.JSONEncoder(default=str, skipkeys=True, check_circular=False).iterencode(given)
    text = "".join(islice(pieces, 80))
    return text if len(text) <= 80 else f"{text[:77]}..."
