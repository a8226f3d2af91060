"""YAML with the numbers of version 1.2, no key twice in a section, and errors of one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from lightcl.errors import RequestError

NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-f]+)$", re.IGNORECASE),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?(([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(e[-+]?[0-9]+)?|[0-9]+e[-+]?[0-9]+|\.inf)$|\.nan$", re.IGNORECASE
    ),
}


class Loader(yaml.SafeLoader):
    """YAML with the numbers of version 1.2: 1e-2 is one; 1:30 (ninety to version 1.1) and 010 (eight) are none."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as the library declares it)
        first: [(tag, pattern) for tag, pattern in known if tag not in NUMBERS]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class Dumper(yaml.SafeDumper):
    """Puts texts in quotes that either version would take for numbers."""


for _kind in (Loader, Dumper):
    for _tag, _pattern in NUMBERS.items():
        _kind.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


def parse(text: str, origin: str) -> tuple[yaml.Node | None, Any]:
    """The nodes and the values of a YAML text.

    Raises ValueError with one line where it is not valid, RequestError for a key that stands twice in one section.
    """
    try:
        loader = Loader(text)
        tree = loader.get_single_node()
        _refuse_twins(tree, origin)
        return tree, None if tree is None else loader.construct_document(tree)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(line + ", ".join(filter(None, (error.context, error.problem)))) from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).replace('in "<unicode string>", ', "at ").split())) from error
    except (AttributeError, TypeError, LookupError, OverflowError) as error:  # of a tag's constructor: !!timestamp x
        raise ValueError("a value does not fit the tag or the type that it is written with") from error
    except RecursionError as error:
        raise ValueError("nested too deeply, or an anchor that holds itself") from error


def _refuse_twins(node: yaml.Node | None, origin: str) -> None:
    """Raises RequestError for a key that stands twice in one section; YAML would take the last one silently."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused by the constructor
            if key.value in seen:
                raise RequestError(f"{origin}, line {line}: key {key.value!r} stands in line {seen[key.value]} already")
            seen[key.value] = line
            _refuse_twins(value, origin)


def line_of(tree: yaml.Node | None, location: Sequence[Any]) -> tuple[int | None, bool]:
    """1-based line of the deepest part of `location` that the file has, and whether that is all of it."""
    line = None
    for part in location:
        if isinstance(tree, yaml.MappingNode):
            found = next(((k, v) for k, v in tree.value if k.value == part), None)
            if found is None:
                return line, False
            line, tree = found[0].start_mark.line + 1, found[1]
        elif isinstance(tree, yaml.SequenceNode) and isinstance(part, int) and part < len(tree.value):
            tree = tree.value[part]
            line = tree.start_mark.line + 1
        else:
            return line, False
    return line, bool(location)
