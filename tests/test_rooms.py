"""The house: who may import whom. A floor imports from floors below it, never up, and no files import each other in a circle."""

import re
from pathlib import Path

import pytest

import posttrain
from house import FACE, circles, graph, modules

ROOT = Path(posttrain.__file__).parent
PAGE = ROOT.parents[1] / "docs" / "architecture.md"
# from the roof down; modules of one line stand side by side and do not know each other
FLOORS = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("launch",),
    ("stages",),
    ("reports",),
    ("evaluation",),
    ("models",),
    ("data", "training", "rewards"),
    ("losses",),
    ("config",),
    ("runs",),
    ("devices",),
    ("batch", "console", "tensors"),
    ("registry",),
    ("errors", "secrets"),
)
HEIGHT = {room: -i for i, floor in enumerate(FLOORS) for room in floor}


def test_every_module_has_a_floor() -> None:
    rooms = {name.split(".")[0] for name in modules(ROOT)} - {FACE}
    assert rooms == set(HEIGHT)


def test_imports_go_down_only() -> None:
    found = graph(ROOT)
    assert sum(map(len, found.values())) > 300
    wrong = []
    for name, targets in found.items():
        room = name.split(".")[0]
        for target in targets - {FACE}:
            other = target.split(".")[0]
            if room != FACE and other != room and HEIGHT[other] >= HEIGHT[room]:
                wrong.append(f"{name} imports {target}")
    assert not sorted(wrong)


def test_no_circle_of_files() -> None:
    assert circles(graph(ROOT)) == []


def test_stages_do_not_import_each_other() -> None:
    """What two stages share lies in stages/ or stages/language/."""
    wrong = []
    for name, targets in graph(ROOT).items():
        mine = name.split(".")
        if mine[0] != "stages" or len(mine) < 3 or mine[1] == "language":
            continue
        wrong += [
            f"{name} imports {t}"
            for t in targets
            if t.split(".")[0] == "stages" and len(t.split(".")) > 2 and t.split(".")[1] not in (mine[1], "language")
        ]
    assert not wrong


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


@pytest.mark.skipif(not PAGE.exists(), reason="runs from a checkout only")
def test_the_architecture_page_has_the_floors_and_names_what_is_there() -> None:
    text = PAGE.read_text()
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.M)
    assert [tuple(re.findall(r"`(\w+)`", rooms)) for _, rooms in rows] == list(FLOORS[1:])  # __main__ is one line
    rooms = {name.split(".")[0] for name in modules(ROOT)}
    named = {path for path in re.findall(r"`([a-z_]+/[\w/]*)(?:\.py)?/?`", text) if path.split("/")[0] in rooms}
    assert len(named) > 25
    assert [path for path in sorted(named) if not ((ROOT / path).is_dir() or (ROOT / f"{path}.py").exists())] == []
