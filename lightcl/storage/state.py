"""Crash-safe state on disk: safetensors for tensors, a JSON manifest that names them, and the manifest is the commit.

A save writes the tensors under a new name, syncs them, then replaces the manifest atomically. A process killed at any
point leaves either the old state or the new one. A folder holds:

    state.json                  the manifest: plain values, and names and checksums of the files of tensors
    tensors-7.safetensors       the tensors of the seventh save
    state.previous.json         the manifest before those tensors, and
    tensors-6.safetensors       its tensors: the older generation, where one is kept

Manifests and tensors have checksums. A generation that does not match its checksum, is missing, or has another form is
not used: the older generation is used instead, with a warning; without one a StateError says what to do.
A damaged state never becomes a new start: a manifest without tensors is written before the first tensors, so tensors
without a manifest are damage.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatch
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightcl.errors import Failure
from lightcl.storage.difference import difference, restored
from lightcl.storage.files import (
    checksum,
    checksum_once,
    identity,
    sync,
    sync_names_above,
    text_checksum,
    write_atomically,
)
from lightcl.storage.tensor_file import TensorFile, read_bytes, tensors_in, write_tensors

MANIFEST = "state.json"
PREVIOUS = "state.previous.json"
GENERATIONS = 2
"""States that are kept where a save must survive a power cut: on boards and by `lightcl train`."""
CHECKSUM = "checksum"
"""Key of the manifest's own checksum: the CRC-32 of all its other keys, as `json.dumps` writes them."""
FILES = "files"
"""Key of the files of tensors: `own`, and `shared` and `start` where there are such; each has `name` and `checksum`."""
DIFFERENCE = "difference/"
"""Before the name of a tensor of which the file has the difference to `start` only."""
TENSORS = "tensors-*.safetensors"
UNNAMED = ".tmp*"
"""What safetensors writes into before it gives the file its name."""
Value = TypeVar("Value")


class StateError(Failure):
    """A state folder that cannot be read or written; the text names the file."""


class Damaged(StateError):
    """One generation of a state cannot be used; the text says why."""


class Stored(NamedTuple):
    """One generation of a state. `lost` is the file of the shared tensors where it is gone or damaged; they are then
    missing from `tensors`."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    lost: Path | None = None


class _File(NamedTuple):
    """A file of tensors as a manifest names it, by its path from the state's folder."""

    name: str
    checksum: int


class Start(NamedTuple):
    """A file of tensors that were equal in many states at first, and these tensors."""

    file: Path
    checksum: int
    tensors: Mapping[str, Tensor]


class _Files(NamedTuple):
    """The files that a manifest names; `own` is None where nothing was saved yet."""

    own: _File | None = None
    shared: _File | None = None
    start: _File | None = None


class _Generation(NamedTuple):
    """A manifest's text, the files that it names and its values."""

    text: str
    files: _Files
    values: dict[str, Any]


class StateFolder:
    """One owner's state: some tensors and a few plain values.

    `durable`: a save survives a power cut, and the last two generations are kept. Otherwise a save does not wait for
    the disk, and only the last generation is kept. It survives every kill of the process, because the system has the
    data by then. After a power cut the state may be an older one, or damaged and then refused.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self.folder, self.durable = folder, durable
        self._current: _Generation | None = None  # what the last load or save found or left; None: not known
        self._fell_back = False  # `_current` is the older generation, and the newest one is damaged
        self._written: frozenset[str] = frozenset()  # the tensors that the last save of this object wrote as they were

    # -- reading -----------------------------------------------------------------------------------------------

    def load(self, check: Callable[[Stored], object] | None = None) -> Stored | None:
        """The last saved `(tensors, values, lost)`; None where nothing was ever saved.

        Where the last generation is damaged, or `check` raises Damaged for it, the one before it with a warning.
        Raises StateError where neither can be used.
        """
        manifest, previous = self.folder / MANIFEST, self.folder / PREVIOUS
        try:
            if not manifest.exists() and not previous.exists() and not any(self.folder.glob(TENSORS)):
                return None
            return self._load(manifest, check)
        except (OSError, Damaged) as error:
            reason = _short(error)
        if _present(previous):
            try:
                stored = self._load(previous, check)
            except (OSError, Damaged) as error:
                reason = f"{reason}; and {PREVIOUS}: {_short(error)}"
            else:
                if stored is not None:
                    self._fell_back = True
                    warnings.warn(
                        f"{manifest}: the last saved state cannot be read ({reason}); the one before it is used, and "
                        "what was done since then is done again",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                    return stored
        raise StateError(
            f"{manifest}: the saved state cannot be read ({reason}); restore the files of this folder from a copy, or "
            "remove the folder: the device then begins its stream again"
        )

    def load_previous(self) -> Stored | None:
        """The older generation, for a reader; None where there is none or it cannot be read."""
        reader = StateFolder(self.folder, durable=self.durable)  # so that the next save here follows the newest
        try:
            return reader._load(self.folder / PREVIOUS, None)
        except (OSError, Damaged):
            return None

    def _load(self, manifest: Path, check: Callable[[Stored], object] | None) -> Stored | None:
        """The generation of this manifest. Raises Damaged or OSError."""
        generation = _read(manifest)
        own, shared, start = generation.files
        if own is None:
            if generation.values or (self.folder / PREVIOUS).exists():
                raise Damaged(f"{manifest.name} names no tensors")
            self._current, self._fell_back = generation, False
            return None
        tensors, lost = self._tensors_of(own), None
        if start is not None:
            tensors = _whole(tensors, self._tensors_of(start))
        if shared is not None:
            try:
                tensors = self._tensors_of(shared, of_many=True) | tensors
            except (OSError, Damaged):
                lost = self.folder / shared.name
        stored = Stored(tensors, generation.values, lost)
        if check is not None:
            check(stored)
        self._current, self._fell_back = generation, False
        return stored

    def _tensors_of(self, file: _File, *, of_many: bool = False) -> dict[str, Tensor]:
        """The tensors of a file; nobody may change those of one that many states share."""
        path = self.folder / file.name
        try:
            if of_many:
                found, read = checksum_once(path), partial(_loaded_once, path)
            elif self.durable:
                found, read = checksum(path), partial(load_file, path)
            else:  # in memory, which would be too much for a board
                content = read_bytes(path)
                found, read = zlib.crc32(content.data), partial(tensors_in, content)
            if found != file.checksum:
                raise Damaged(f"the checksum of {file.name} does not match: the file is damaged")
            return read()
        except (ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            raise Damaged(f"{file.name!r} cannot be read as safetensors ({error})") from error

    def is_current(self) -> bool:
        """Whether the state on disk is still the one that the last load or save of this object found or left.

        Only the manifest is looked at, not the tensors.
        """
        return self._current is not None and _text(self.folder / MANIFEST) == self._current.text

    def file_with(self, names: Collection[str]) -> TensorFile | None:
        """These tensors in the file of this object's last save, where all are in it. The next save removes the file."""
        own = self._current.files.own if self._current else None
        return TensorFile(self.folder / own.name, names) if own and names and self._written.issuperset(names) else None

    # -- writing -----------------------------------------------------------------------------------------------

    def save(
        self,
        tensors: Mapping[str, Tensor] | None,
        values: Mapping[str, Any],
        *,
        shared: Path | None = None,
        start: Start | None = None,
    ) -> None:
        """Replaces the state. `tensors=None` keeps those saved before and writes only the values.

        `shared` is a file of tensors that other states hold too (`SharedVersions`): those of `tensors` that are equal
        to them are not written, and the state refers to the file. Of those that are in `start`, what differs is
        written. Raises StateError where the disk refuses it, or tensors that no file can hold; the state is then the
        old one.
        """
        try:
            self._save(tensors, values, shared, start)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise StateError(
                f"{self.folder}: the state cannot be saved ({_short(error)}); the one before is still there"
            ) from error

    def _save(
        self, tensors: Mapping[str, Tensor] | None, values: Mapping[str, Any], shared: Path | None, start: Start | None
    ) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
        if self._current is None:
            self.load()  # never write over the tensors that the manifest names
        if self._current is None:
            if self.durable:
                sync_names_above(self.folder)
            self._write(MANIFEST, _Files(), {})
        current = self._current
        assert current is not None
        before = current.files.own
        if tensors is None and before is not None:
            self._write(MANIFEST, current.files, values)
            self._fell_back = False
            return
        name = f"tensors-{_number(before) + 1}.safetensors"
        given = {name: tensor.detach().cpu() for name, tensor in (tensors or {}).items()}
        link, common = self._in_common(shared, given) if shared else (None, set[str]())
        written, begun = self._differences({n: t.contiguous() for n, t in given.items() if n not in common}, start)
        path, self._written = self.folder / name, frozenset()
        try:
            if self.durable:
                save_file(written, path)
                sync(path)
                own = _File(name, checksum(path))  # of what can be read again
            else:
                own = _File(name, write_tensors(path, written))
            if self.durable and before is not None and not self._fell_back:
                write_atomically(self.folder / PREVIOUS, current.text)
            elif self.durable:
                sync(self.folder)  # the manifest must not be there before the name of the tensors
            self._write(MANIFEST, _Files(own, link, begun), values)
        except (OSError, ValueError, safetensors.SafetensorError):
            if self._current is current:  # no manifest names it
                path.unlink(missing_ok=True)
            raise
        self._fell_back = False
        self._written = frozenset(written)
        self._clean_up({name, before.name} if self.durable and before else {name})

    def _write(self, name: str, files: _Files, values: Mapping[str, Any]) -> None:
        """Replaces a manifest, and knows about it as soon as it may be in place."""
        named = {key: file and file._asdict() for key, file in files._asdict().items() if file or key == "own"}
        body = {**values, FILES: named}
        text = json.dumps(body)
        signed = f'{text[:-1]}, "{CHECKSUM}": {text_checksum(text)}}}'
        before = self._current
        self._current = _Generation(signed, files, dict(values))
        try:
            write_atomically(self.folder / name, signed, durable=self.durable)
        except OSError:
            if _text(self.folder / name) != signed:
                self._current = before
            raise

    def _clean_up(self, needed: set[str]) -> None:
        """Removes older tensors, and what a process left that was killed while it wrote."""
        patterns = [TENSORS, UNNAMED, f".{MANIFEST}.*.partial", f".{PREVIOUS}.*.partial"]
        if not self.durable:
            patterns.append(PREVIOUS)
        for file in self.folder.iterdir():  # one look for all patterns: it is done after every save
            if file.name not in needed and any(fnmatch(file.name, pattern) for pattern in patterns):
                file.unlink(missing_ok=True)

    def _in_common(self, shared: Path, tensors: Mapping[str, Tensor]) -> tuple[_File | None, set[str]]:
        """The shared file, and the names of the tensors that need not be written since it has them.

        None of its tensors may be missing here: a load takes all that the file holds and the state does not.
        """
        try:
            file = _File(os.path.relpath(shared, self.folder), checksum_once(shared))
            common = _loaded_once(shared)
        except (OSError, ValueError):  # another process removed it, or the disk fails
            return None, set()
        if not common.keys() <= tensors.keys():
            return None, set()
        equal = {name for name, tensor in common.items() if torch.equal(tensor, tensors[name])}
        return (file, equal) if equal else (None, set())

    def _differences(
        self, tensors: Mapping[str, Tensor], start: Start | None
    ) -> tuple[dict[str, Tensor], _File | None]:
        """What is written of `tensors`, and the file that it is the difference to."""
        found = dict(tensors)
        if start is None:
            return found, None
        try:
            if checksum_once(start.file) != start.checksum:
                return found, None
        except OSError:  # another process removed it, or the disk fails
            return found, None
        file = _File(os.path.relpath(start.file, self.folder), start.checksum)
        for name in start.tensors.keys() & tensors.keys():
            less = difference(tensors[name], start.tensors[name])
            if less is not None:
                del found[name]
                found[f"{DIFFERENCE}{name}"] = less
        return found, (file if found.keys() != tensors.keys() else None)


def _loaded_once(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that many states refer to, read once per process unless its size or time changes.

    Nobody may change them. They are a copy in memory, since a map of the file would kill the process where another one
    cuts the file short.
    """
    return _loaded(*identity(file))


@lru_cache(maxsize=1)
def _loaded(file: Path, *_: int) -> dict[str, Tensor]:
    return tensors_in(read_bytes(file))


def _whole(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that refers to `start`. Raises Damaged."""
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith(DIFFERENCE)}
    for name, content in under(tensors, DIFFERENCE).items():
        if name not in start:
            raise Damaged(f"the start of the tensor {name} is missing")
        try:
            found[name] = restored(content, start[name])
        except ValueError as error:
            raise Damaged(f"{name}: {error}") from error
    return found


def _read(manifest: Path) -> _Generation:
    """Raises Damaged for anything but a manifest as `StateFolder` writes it, OSError where there is none."""
    try:
        text = manifest.read_text(encoding="utf-8")
        values = json.loads(text)
        if not isinstance(values, dict):
            raise Damaged(f"{manifest.name} holds no JSON object")
        if values.pop(CHECKSUM, None) != text_checksum(json.dumps(values)):
            raise Damaged(f"the checksum of {manifest.name} does not match: the file is damaged")
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{manifest.name} cannot be read as JSON ({error})") from error
    files = values.pop(FILES, None)
    if not isinstance(files, dict) or "own" not in files:
        raise Damaged(f"{manifest.name} names no files")
    return _Generation(text, _Files(*(_file(files.get(key), manifest) for key in _Files._fields)), values)


def _file(entry: object, manifest: Path) -> _File | None:
    if entry is None:
        return None
    if isinstance(entry, dict):
        name, expected = entry.get("name"), entry.get("checksum")
        if isinstance(name, str) and isinstance(expected, int):
            return _File(name, expected)
    raise Damaged(f"{manifest.name} names a file in a way that is not known")


def _number(file: _File | None) -> int:
    """The number in a file's name; -1 without a file."""
    digits = file.name.removeprefix("tensors-").removesuffix(".safetensors") if file else ""
    return int(digits) if digits.isdecimal() else -1


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _short(error: Exception) -> str:
    """What went wrong, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {Path(str(error.filename)).name}" if error.filename else error.strerror
    return str(error)


def under(tensors: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    """What stands under `prefix`, by the rest of its name; the inverse of `{f"{prefix}{name}": ...}`."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _present(file: Path) -> bool:
    """Whether a file is there, also where nobody may look at it."""
    try:
        return file.exists()
    except OSError:
        return True
