"""Paths and texts as a systemd unit spells them (systemd.syntax(7), systemd.service(5))."""

from __future__ import annotations

from pathlib import Path

_QUOTED = set(" \t\n'\"\\;")
"""A word with one of these is put in quotes."""


def escaped(text: str) -> str:
    """A text for a key that takes no quotes; `%` begins a specifier."""
    return text.replace("%", "%%")


def program_word(path: Path) -> str:
    """The program of an ExecStart line. systemd replaces no variables in its path, so a `$` is itself there; it refuses
    paths of programs with quotes, backslashes or control characters."""
    text = escaped(str(path))
    if not _QUOTED.intersection(text):
        return text
    for letter, spelled in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\t", "\\t")):
        text = text.replace(letter, spelled)
    return f'"{text}"'


def argument_word(path: Path) -> str:
    """A path as one argument of an ExecStart line; `$` begins a variable there."""
    return program_word(path).replace("$", "$$")
