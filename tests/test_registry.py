"""What a registry finds: modules of a package, and what an installed package adds by an entry point."""

import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from posttrain.commands.export.target import TARGETS
from posttrain.config.choices import OPTIMIZERS, POLICY_LOSSES, PREFERENCE_LOSSES, REWARDS, TOKEN_LOSSES
from posttrain.config.interfaces import METHODS, QUANTIZERS
from posttrain.config.schema.data import DATA_FORMATS
from posttrain.config.stages import REGISTRY
from posttrain.errors import UserError
from posttrain.registry import Registry


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on sys.path with a package of two entries, and an installed one that adds a third."""
    kinds = tmp_path / "house_of_kinds"
    (kinds / "folder").mkdir(parents=True)
    (kinds / "__init__.py").write_text("")
    (kinds / "_shared.py").write_text("raise AssertionError('no entry')")
    (kinds / "plain.py").write_text("THING = 'a module'")
    (kinds / "folder" / "__init__.py").write_text("THING = 'a folder'")
    (tmp_path / "guest_of_kinds.py").write_text("THING = 'a guest'\nOTHER = 'another guest'")
    install(tmp_path, "guest", "visitor = guest_of_kinds\nsecond = guest_of_kinds:OTHER")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if "of_kinds" in name]:
        del sys.modules[name]


def install(directory: Path, name: str, entries: str) -> None:
    """What pip leaves of a package with entry points."""
    info = directory / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[posttrain.test_kinds]\n{entries}\n")


def kinds() -> Registry[str]:
    return Registry("house_of_kinds", "posttrain.test_kinds", "THING", "test kind")


def test_modules_folders_and_entry_points_are_found(place: Path) -> None:
    assert kinds().names() == ["folder", "plain", "second", "visitor"]
    assert kinds().all() == {"folder": "a folder", "plain": "a module", "second": "another guest", "visitor": "a guest"}


def test_names_import_nothing(place: Path) -> None:
    found = kinds()
    found.names()
    assert not {"house_of_kinds", "house_of_kinds.plain", "guest_of_kinds"} & set(sys.modules)
    found.get("plain")
    assert "house_of_kinds.plain" in sys.modules and "house_of_kinds.folder" not in sys.modules


def test_what_is_installed_is_looked_for_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look reads the metadata of every package, and a command asks dozens of times. Another sys.path is another look."""
    looked: list[str] = []
    monkeypatch.setattr("posttrain.registry.entry_points", lambda group: looked.append(group) or [])
    found = kinds()
    for _ in range(3):
        assert found.names() == ["folder", "plain"] and found.get("plain") == "a module" and found.config_dirs() == []
    assert looked == ["posttrain.test_kinds"]
    (place / "more").mkdir()
    monkeypatch.syspath_prepend(str(place / "more"))
    found.names()
    found.forget()
    found.names()
    assert len(looked) == 3


def test_an_unknown_name_is_refused_with_a_near_one(place: Path) -> None:
    with pytest.raises(
        UserError, match=r"no test kind 'plian' - did you mean 'plain'\? \(there are: folder, plain, second, visitor\)"
    ):
        kinds().get("plian")


def test_two_entries_of_one_name_are_refused(place: Path) -> None:
    install(place, "rival", "plain = guest_of_kinds")
    with pytest.raises(UserError, match="test kind 'plain': guest_of_kinds adds one that is there already"):
        kinds().names()


@pytest.mark.parametrize("value", ["nowhere_of_kinds", "guest_of_kinds:MISSING", "house_of_kinds"])
def test_a_broken_package_is_named(place: Path, value: str) -> None:
    install(place, "broken", f"broken = {value}")
    with pytest.raises(UserError, match=rf"test kind 'broken': {value} cannot be used \(.*\); mend or uninstall it"):
        kinds().get("broken")


def test_configs_beside_an_installed_module_are_found_without_importing_it(place: Path) -> None:
    assert kinds().config_dirs() == []
    (place / "configs").mkdir()
    assert kinds().config_dirs() == [place / "configs"] * 2  # of both of the guest's entries
    assert "guest_of_kinds" not in sys.modules
    install(place, "broken", "broken = nowhere_of_kinds.inner")
    with pytest.raises(UserError, match=r"test kind 'broken': nowhere_of_kinds\.inner cannot be used"):
        kinds().config_dirs()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise RuntimeError('boom\\nand more')", "RuntimeError: boom"),
        ("def (", "SyntaxError: invalid syntax"),
        ("import posttrain.gone", "No module named 'posttrain.gone'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("THINGS = 1", "has no attribute 'THING'"),
        ("THING = 3", "its THING is 3, and no Fraction"),
        ("THING = int", "its THING is <class 'int'>, and no Fraction"),
        ("THING = None", "its THING is None, and no Fraction"),
    ],
)
def test_an_installed_package_that_is_broken_is_told_in_a_line(place: Path, text: str, said: str) -> None:
    (place / "guest_of_kinds.py").write_text(text)
    found = Registry[Fraction]("house_of_kinds", "posttrain.test_kinds", "THING", "test kind", of="fractions:Fraction")
    with pytest.raises(UserError) as caught:
        found.get("visitor")
    line = str(caught.value)
    assert line.startswith("test kind 'visitor': guest_of_kinds cannot be used (") and said in line and "\n" not in line
    assert line.endswith("); mend or uninstall it")


def test_an_instance_or_a_class_of_the_kind_is_taken(place: Path) -> None:
    for text in ("from fractions import Fraction\nTHING = Fraction(1, 2)", "from fractions import Fraction as THING"):
        (place / "guest_of_kinds.py").write_text(text)
        sys.modules.pop("guest_of_kinds", None)
        found = Registry[Fraction]("house_of_kinds", "posttrain.test_kinds", "THING", "test kind", of="fractions:Fraction")
        assert found.get("visitor") is sys.modules["guest_of_kinds"].THING


OURS = [OPTIMIZERS, TOKEN_LOSSES, PREFERENCE_LOSSES, POLICY_LOSSES, REWARDS, DATA_FORMATS, METHODS, QUANTIZERS, REGISTRY, TARGETS]


@pytest.mark.parametrize("registry", OURS, ids=lambda each: each.kind)
def test_what_ours_are_is_asked_of_others(registry: Registry[Any]) -> None:
    for name, entry in registry.all().items():
        assert registry.is_one(entry), name
    assert not registry.is_one(3) and not registry.is_one(None)
