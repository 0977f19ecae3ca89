"""Find the classes that the files of a package define, one file for each method, space, PEFT type or file format.

A new file is found by itself: nothing else names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SHARED = ("base", "aliases")  # files of such a package that define none


def file_names(folder: Path) -> list[str]:
    """Return the names of the files of a package that define a class, sorted."""
    return sorted(entry.name for entry in pkgutil.iter_modules([str(folder)]) if entry.name not in SHARED)


def classes_in(package: str, name: str, base: type) -> list[Any]:
    """Return the subclasses of `base` that one file of a package defines; the file is imported."""
    module = importlib.import_module(f"{package}.{name}")
    own = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]
    return [one for one in own if issubclass(one, base)]


def all_classes(package: str, base: type) -> list[Any]:
    """Return the subclasses of `base` that the files of a package define; all of them are imported."""
    return [one for name in file_names(_folder(package)) for one in classes_in(package, name, base)]


class ClassesByName(Mapping[str, Any]):
    """Map names to classes whose attribute `name` is the name of their file; a file is imported when its class is asked for.

    Args:
        package: that contains the files.
        base: of the classes.
        added: further classes by name, which come before those of the files.
    """

    def __init__(self, package: str, base: type, added: Mapping[str, type] | None = None) -> None:
        self._package, self._base, self._added = package, base, added or {}
        self._files = file_names(_folder(package))
        self._names = sorted({*self._files, *self._added})

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Any:
        if name in self._added:
            return self._added[name]
        if name not in self._files:
            raise KeyError(name)
        for one in classes_in(self._package, name, self._base):
            if vars(one).get("name") == name:
                return one
        raise TypeError(f"{self._package}.{name} defines no {self._base.__name__} of the name {name!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _folder(package: str) -> Path:
    (folder,) = importlib.import_module(package).__path__
    return Path(folder)
