"""The house: who may import whom. A floor imports from floors below it, never up, and no files import each other in a circle."""

import ast
from pathlib import Path

import posttrain

ROOT = Path(posttrain.__file__).parent
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
    ("batch", "console", "tensors"),
    ("registry",),
    ("errors", "secrets"),
)
HEIGHT = {room: -i for i, floor in enumerate(FLOORS) for room in floor}
PACKAGE = "__init__"  # the public face: `posttrain.run`


def modules() -> dict[str, Path]:
    """Dotted name without the package's own -> file, for every module there is."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "posttrain":
            base = node.module.removeprefix("posttrain").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if inner in known else base or PACKAGE)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("posttrain.") for alias in node.names if alias.name.startswith("posttrain.")}
    return found


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def test_every_module_has_a_floor() -> None:
    rooms = {name.split(".")[0] for name in modules()} - {PACKAGE}
    assert rooms == set(HEIGHT)


def test_imports_go_down_only() -> None:
    found = graph()
    assert sum(map(len, found.values())) > 300
    wrong = []
    for name, targets in found.items():
        room = name.split(".")[0]
        for target in targets - {PACKAGE}:
            other = target.split(".")[0]
            if room != PACKAGE and other != room and HEIGHT[other] >= HEIGHT[room]:
                wrong.append(f"{name} imports {target}")
    assert not sorted(wrong)


def test_no_circle_of_files() -> None:
    assert circles(graph()) == []


def circles(found: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that import each other, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for target in sorted(found.get(name, ())):
            if target not in order:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], order[target])
        if low[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for name in sorted(found):
        if name not in order:
            visit(name)
    return groups


def test_stages_do_not_import_each_other() -> None:
    """What two stages share lies in stages/ or stages/language/."""
    wrong = []
    for name, targets in graph().items():
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
