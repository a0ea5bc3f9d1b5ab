"""The figures of the structure, on a package that is small enough to count by hand."""

from pathlib import Path

import pytest

from house import figures, graph, measure, table

LONG = 'def long():\n    """Says nothing."""\n' + "    pass\n" * 39  # 41 lines
FILES = {
    "__init__.py": '"""The package."""\n',
    "cli.py": '"""The command line."""\nfrom posttrain.models.base import load\nfrom posttrain import losses\n',
    "losses.py": '"""Losses."""\n' + LONG,
    "models/__init__.py": "",
    "models/base.py": (
        "import posttrain.losses\n"
        "class Base:\n"
        "    def run(self): return self.manifest['a'] + read_manifest(self)['b']\n"
        "    def _hidden(self): ...\n"
        "    def told(self): 'What it does.'\n"
        "def load():  # type: ignore\n"
        "    def inner(): ...\n"
        "class Child(Base):\n"
        "    '''Has a base.'''\n"
        "    def told(self): ...\n"
        "class _Private:\n"
        "    def method(self): ...\n"
    ),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "src" / "posttrain" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_figures_counted_by_hand(tree: Path) -> None:
    assert figures(measure(tree)) == {
        "modules": "5",
        "lines": "58",  # 1 + 3 + 42 + 0 + 12
        "files over 300 lines": "0",
        "functions over 40 lines": "1",
        "functions over 80 lines": "0",
        "public names without a docstring": "4 of 11",  # models.base, Base, Base.run, load; Child.told is documented in Base
        "type: ignore, pyright: ignore, noqa": "1",
        "readings of a manifest by subscript": "2",
        "rooms": "3",
        "arrows between rooms": "3 (3 pairs)",  # cli -> models, cli -> losses, models -> losses
    }


def test_places_name_what_is_counted(tree: Path) -> None:
    house = measure(tree)
    assert house.long_functions == ["losses.py:2 long 41 lines"]
    assert house.undocumented == [
        "models/base.py (the module)",
        "models/base.py Base",
        "models/base.py load",
        "models/base.py Base.run",
    ]
    assert house.arrows == ["cli -> losses", "cli -> models", "models -> losses"]


def test_an_import_of_a_module_from_its_package_is_of_the_module(tree: Path) -> None:
    assert graph(tree / "src" / "posttrain")["cli"] == {"models.base", "losses"}


def test_a_column_for_each_tree(tree: Path) -> None:
    house = measure(tree)
    assert table({"before": house, "after": house}).splitlines()[:3] == [
        "| | before | after |",
        "|---|---|---|",
        "| modules | 5 | 5 |",
    ]
