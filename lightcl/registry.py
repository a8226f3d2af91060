"""Registries: names to the objects that carry them, filled by a package's own modules and by plugins.

A registry finds built-in objects by importing the modules of its package, so adding a file there is all that a new
method or backbone needs. The modules of a user are plugins (lightcl/plugins.py).
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, GetJsonSchemaHandler, ValidationInfo
from pydantic_core import PydanticCustomError, core_schema

from lightcl import plugins
from lightcl.errors import RequestError, nearest, shown

T = TypeVar("T")
Own = TypeVar("Own")


class Registry(Mapping[str, T], Generic[T]):
    """Objects of one kind by name; `kind` names them in errors ("method"), `key` is the scenario key ("method.name").

    `package` is the package whose modules register the built-in objects; it is imported on the first lookup, and so
    are the plugins. `order` sorts the names; by default the order is that of registration. `origin` gives the class or
    function that a plugin's author wrote, where the registered object only carries it.
    """

    def __init__(
        self,
        kind: str,
        key: str,
        package: str | None = None,
        order: Callable[[T], Any] | None = None,
        origin: Callable[[T], object] = lambda value: value,
    ) -> None:
        self.kind, self.key, self.package, self.order, self.origin = kind, key, package, order, origin
        self._objects: dict[str, T] = {}
        self._discovered = package is None

    def register(self, name: str, value: T) -> None:
        """Adds an object. Raises RequestError where another object has this name."""
        before = self._objects.get(name)
        if before is not None:
            first, second = _origin(self.origin(before)), _origin(self.origin(value))
            if first != second:
                raise RequestError(
                    f"{self.kind} {name!r} is registered twice: by {' '.join(first)} and by {' '.join(second)}; rename "
                    "one of them"
                )
        self._objects[name] = value

    def registering(self, name: str) -> Callable[[Own], Own]:
        """A decorator that registers what it decorates."""

        def decorate(value: Own) -> Own:
            self.register(name, value)  # type: ignore[arg-type]
            return value

        return decorate

    def find(self, name: str) -> T:
        """The object of this name. Raises RequestError with the nearest and all allowed names."""
        known = self._load()
        if name not in known:
            raise RequestError(f"{self.key}: {self.unknown(name)}")
        return known[name]

    def unknown(self, name: object) -> str:
        """The text of an error about a name that is not registered."""
        return f"unknown {self.kind} {shown(name)}{nearest(str(name), self)} (allowed: {', '.join(self)})"

    def __getitem__(self, name: str) -> T:
        return self._load()[name]

    def __iter__(self) -> Iterator[str]:
        known = self._load()
        order = self.order
        return iter(known if order is None else sorted(known, key=lambda name: order(known[name])))

    def __len__(self) -> int:
        return len(self._load())

    def _load(self) -> dict[str, T]:
        if not self._discovered and self.package is not None:
            self._discovered = True
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
        plugins.load_requested()
        return self._objects


def _origin(value: object) -> tuple[str, str]:
    """Module and name; the same file may be loaded again."""
    return str(getattr(value, "__module__", "?")), str(getattr(value, "__qualname__", value))


class OneOf:
    """Marks a string field as the name of a registered object: `Annotated[str, OneOf(BACKBONES)]`."""

    def __init__(self, registry: Registry[Any]) -> None:
        self.registry = registry

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, core_schema.str_schema(strict=True))

    def _check(self, name: str) -> str:
        if name not in self.registry:
            raise PydanticCustomError("unknown_name", "{text}", {"text": self.registry.unknown(name)})
        return name

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.registry)}


class SectionByName:
    """Marks a field as a section whose class is registered under its key `name`:
    `Annotated[MethodParameters, SectionByName(METHODS)]`.

    Works like a union of all registered classes with `name` as the discriminator, but is looked up at validation, so
    classes that are registered later are valid as well.
    """

    def __init__(self, registry: Registry[type[Any]]) -> None:
        self.registry = registry

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> core_schema.CoreSchema:
        return core_schema.with_info_plain_validator_function(self._validate)

    def _validate(self, given: object, info: ValidationInfo) -> BaseModel:
        if isinstance(given, BaseModel) and type(given) in self.registry.values():
            return given
        if not isinstance(given, dict):
            raise PydanticCustomError("section", "Input should be a valid dictionary with the key name")
        name = given.get("name")
        section: type[BaseModel] | None = self.registry.get(name) if isinstance(name, str) else None
        if section is None:
            raise PydanticCustomError("unknown_section", "{text}", {"text": self.registry.unknown(name)})
        # A ValidationError keeps its keys here: pydantic puts them below this field.
        if info.mode == "json":
            return section.model_validate_json(json.dumps(given))
        return section.model_validate(given)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"oneOf": [handler(section.__pydantic_core_schema__) for section in self.registry.values()]}
