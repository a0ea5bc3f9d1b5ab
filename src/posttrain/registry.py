"""What can be chosen by name: the modules of a package of ours, and what an installed package adds by an entry point."""

from __future__ import annotations

import importlib
import pkgutil
import reprlib
import sys
import threading
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

from posttrain.errors import UserError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """The entries of one kind, by name. Looking for names imports nothing; an entry is imported when it is first asked for.

    Every module of `package` (modules and folders whose names begin with _ left out) is an entry: its name is the module's, its
    object the module's attribute `attribute`. A package of others adds an entry by an entry point of `group`, whose value is a
    module with that attribute, or `module:object`. Two entries of one name are a mistake of the installation, and refused.

    Args:
        package: dotted name, such as "posttrain.models.peft.methods". It is a string, so that a low floor can ask a higher one.
        group: of entry points, such as "posttrain.peft_methods".
        attribute: what a module calls its entry.
        kind: what an entry is, in errors ("peft method").
        shared: modules of the package that are no entries, but shared by them.
        of: "module:Class", of which an entry is an instance or a subclass; '': anything.
    """

    def __init__(
        self, package: str, group: str, attribute: str, kind: str, shared: tuple[str, ...] = (), of: str = ""
    ) -> None:  # fmt: skip
        self.package, self.group, self.attribute, self.kind, self.shared, self.of = package, group, attribute, kind, shared, of
        self._loaded: dict[str, T] = {}
        self._found: dict[tuple[str, ...], dict[str, str | EntryPoint]] = {}  # by sys.path, which decides it
        self._lock = threading.RLock()

    def names(self) -> list[str]:
        """Every name there is, sorted."""
        return sorted(self._places())

    def get(self, name: str) -> T:
        """The entry of this name. Raises UserError, with a near name, where there is none, and where its package is broken."""
        with self._lock:
            if name not in self._loaded:
                places = self._places()
                if name not in places:
                    near = did_you_mean(name, sorted(places))
                    raise UserError(f"there is no {self.kind} '{name}'{near} (there are: {', '.join(sorted(places))})")
                self._loaded[name] = self._load(name, places[name])
            return self._loaded[name]

    def all(self) -> dict[str, T]:
        """Every entry, by name, in the order of names."""
        return {name: self.get(name) for name in self.names()}

    def config_dirs(self) -> list[Path]:
        """The folders called `configs` that lie beside the modules of other packages' entries: YAML files as ours in configs/."""
        found: list[Path] = []
        for name, place in self._places().items():
            if isinstance(place, EntryPoint):
                folder = self._file_of(name, place).parent / "configs"
                found += [folder] if folder.is_dir() else []
        return found

    def _file_of(self, name: str, place: EntryPoint) -> Path:
        try:
            spec = find_spec(place.module)
        except ImportError:
            spec = None
        if spec is None or spec.origin is None:
            raise self._broken(name, place, f"there is no module {place.module}")
        return Path(spec.origin)

    def _broken(self, name: str, place: EntryPoint, why: object) -> UserError:
        return UserError(f"{self.kind} '{name}': {place.value} cannot be used ({why}); mend or uninstall it")

    def forget(self) -> None:
        """Look again for what is installed: for tests, which add packages on the way."""
        with self._lock:
            self._loaded.clear()
            self._found.clear()

    def _places(self) -> dict[str, str | EntryPoint]:
        """Name -> where the entry is. What is installed is looked for once: that reads every package's metadata."""
        path = tuple(sys.path)
        with self._lock:
            if path not in self._found:
                self._found[path] = self._look()
            return self._found[path]

    def _look(self) -> dict[str, str | EntryPoint]:
        found: dict[str, str | EntryPoint] = {}
        spec = find_spec(self.package)
        for module in pkgutil.iter_modules(spec.submodule_search_locations if spec else None):
            if not module.name.startswith("_") and module.name not in self.shared:
                found[module.name] = f"{self.package}.{module.name}"
        for entry in entry_points(group=self.group):
            if entry.name in found:
                raise UserError(
                    f"{self.kind} '{entry.name}': {entry.value} adds one that is there already; uninstall or rename it"
                )
            found[entry.name] = entry
        return found

    def _load(self, name: str, place: str | EntryPoint) -> T:
        if isinstance(place, str):
            return getattr(importlib.import_module(place), self.attribute)
        try:
            found: Any = place.load()
            found = found if place.attr else getattr(found, self.attribute)
        except (Exception, SystemExit) as error:  # it is others' code, and may end in anything
            raise self._broken(name, place, _in_a_line(error)) from error
        if not self.is_one(found):
            what = f"its {place.attr or self.attribute} is {reprlib.repr(found)}, and no {self.of.partition(':')[2]}"
            raise self._broken(name, place, what)
        return found

    def is_one(self, entry: Any) -> bool:
        """Is it what an entry has to be?"""
        if not self.of:
            return True
        module, _, name = self.of.partition(":")
        kind = getattr(importlib.import_module(module), name)
        return isinstance(entry, kind) or (isinstance(entry, type) and issubclass(entry, kind))


def _in_a_line(error: BaseException) -> str:
    said = (str(error).strip().splitlines() or ["no message"])[0]
    return said if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {said}"
