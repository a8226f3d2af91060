"""The errors that the command line turns into one screen of text: RequestError exits with 2, Failure with 1."""

import difflib
import importlib
import json
from collections.abc import Iterable
from itertools import islice
from types import ModuleType


class RequestError(Exception):
    """The request is wrong. The text names what was given, what is allowed and what to do."""


class MissingLibrary(RequestError):
    """An optional library is not installed. The text names the extra to install."""


class Failure(Exception):
    """The work stopped before its end, through no fault of the request. The text says why. Base of all such errors."""


class Stopped(Exception):
    """The user ended the work early; it can be resumed. Base of all such errors."""


def required(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports an optional library at the point of use, e.g. `required("pyarrow.parquet", "data", "to read parquet")`.

    Raises MissingLibrary where it is not installed. An import error inside the library is raised as it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        library = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != library:
            raise
        raise MissingLibrary(
            f"{library} is needed {purpose} and is not installed; run: pip install 'lightcl-fleet[{extra}]'"
        ) from error


def nearest(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def one_line(text: str, most: int = 500) -> str:
    """A text that another machine sent, fit for a log and a row: one line, printable, at most `most` characters."""
    words = " ".join(text[: 2 * most].split())
    line = "".join(letter if letter.isprintable() else "?" for letter in words)
    return line if len(line) <= most and len(text) <= 2 * most else f"{line[: most - 3]}..."


def shown(given: object) -> str:
    """A value as it would stand in the file, cut to some 80 characters; it may be endless."""
    pieces = json.JSONEncoder(default=str, skipkeys=True, check_circular=False).iterencode(given)
    text = "".join(islice(pieces, 80))
    return text if len(text) <= 80 else f"{text[:77]}..."
