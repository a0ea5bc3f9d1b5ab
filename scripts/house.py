"""The structure of the code in figures: how large its pieces are, what is undocumented, and which rooms know each other.

    python scripts/house.py                 # this checkout
    python scripts/house.py OTHER_TREE      # any other, such as a git worktree of an earlier commit: the figures side by side
    python scripts/house.py --places        # where the long functions, long files and undocumented names are

A room is a folder or a module directly under src/posttrain. Only text is read; nothing is imported, so that any commit will do.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "posttrain"
FACE = "__init__"  # the package's own module, `posttrain.run`: everyone may know it
LONG_FILE, LONG_FUNCTION, TOO_LONG_FUNCTION = 300, 40, 80
IGNORES = re.compile(r"#\s*(type: ignore|pyright: ignore|noqa)")
MANIFEST_READING = re.compile(r"manifest(?:\(\w*\))?\[")  # manifest["x"], read_manifest(run)["x"]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class House:
    """What one tree's package is like. Places are written file:line name."""

    modules: int
    lines: int
    long_files: list[str]
    long_functions: list[str]  # more than LONG_FUNCTION lines
    too_long_functions: list[str]  # more than TOO_LONG_FUNCTION lines
    public: int
    undocumented: list[str]
    ignores: list[str]
    manifest_readings: list[str]
    rooms: int
    arrows: list[str]  # room -> another room that it imports


def modules(root: Path) -> dict[str, Path]:
    """Dotted name without the package's own -> file, for every module of the package in `root`."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == FACE and len(parts) > 1 else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of `known` that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            base = node.module.removeprefix(PACKAGE).lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if inner in known else base or FACE)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix(f"{PACKAGE}.") for alias in node.names if alias.name.startswith(f"{PACKAGE}.")}
    return found


def graph(root: Path) -> dict[str, set[str]]:
    """Module -> the modules that it imports, for the package in `root`."""
    known = modules(root)
    return {name: imports(path, known) - {name} for name, path in known.items()}


def circles(found: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that import each other, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

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


def public_names(tree: ast.Module) -> Iterator[tuple[str, ast.Module | ast.ClassDef | Function]]:
    """The module itself, its classes and functions, and its classes' methods, that have no leading underscore."""
    yield "", tree
    pending: list[tuple[str, ast.stmt]] = [("", node) for node in tree.body]
    while pending:
        prefix, node = pending.pop(0)
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            pending += [(f"{prefix}{node.name}.", each) for each in node.body]


def documented_methods(trees: list[ast.Module]) -> dict[str, tuple[set[str], set[str]]]:
    """Class name -> the methods that it documents, and the names of its bases; in all modules of the package."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for node in (each for tree in trees for each in ast.walk(tree)):
        if isinstance(node, ast.ClassDef):
            methods, bases = found.setdefault(node.name, (set(), set()))
            methods |= {each.name for each in node.body if isinstance(each, Function) and ast.get_docstring(each)}
            bases |= {re.sub(r"\[.*", "", ast.unparse(base)).split(".")[-1] for base in node.bases}
    return found


def inherits(known: dict[str, tuple[set[str], set[str]]], owner: str, method: str, seen: frozenset[str] = frozenset()) -> bool:
    """Does a base of the class `owner` document the method? Then a method that replaces it needs no docstring of its own."""
    bases = known.get(owner, (set(), set()))[1] - seen
    return any(
        method in known[base][0] or inherits(known, base, method, seen | {owner})
        for base in bases
        if base in known and base != owner
    )


def measure(tree: Path) -> House:
    """The figures of the package under `tree`/src."""
    root = tree / "src" / PACKAGE
    found = modules(root)
    documented = documented_methods([ast.parse(path.read_text()) for path in found.values()])
    long_files, functions, undocumented, ignores, readings = [], [], [], [], []
    lines = public = 0
    for path in found.values():
        text = path.read_text()
        place = path.relative_to(root)
        parsed = ast.parse(text)
        rows = text.splitlines()
        lines += len(rows)
        long_files += [f"{place} {len(rows)} lines"] if len(rows) > LONG_FILE else []
        functions += [
            ((node.end_lineno or node.lineno) - node.lineno + 1, f"{place}:{node.lineno} {node.name}")
            for node in ast.walk(parsed)
            if isinstance(node, Function)
        ]
        names = list(public_names(parsed)) if rows else []  # an empty __init__.py has nothing to say
        public += len(names)
        undocumented += [
            f"{place} {name or '(the module)'}"
            for name, node in names
            if ast.get_docstring(node) is None and not inherits(documented, name.rpartition(".")[0], name.rpartition(".")[2])
        ]
        ignores += [f"{place}:{i} {row.strip()}" for i, row in enumerate(rows, 1) if IGNORES.search(row)]
        readings += [f"{place}:{i}" for i, row in enumerate(rows, 1) for _ in MANIFEST_READING.finditer(row)]
    rooms, arrows = _rooms(graph(root))
    return House(
        modules=len(found),
        lines=lines,
        long_files=long_files,
        long_functions=[f"{where} {length} lines" for length, where in functions if length > LONG_FUNCTION],
        too_long_functions=[f"{where} {length} lines" for length, where in functions if length > TOO_LONG_FUNCTION],
        public=public,
        undocumented=undocumented,
        ignores=ignores,
        manifest_readings=readings,
        rooms=rooms,
        arrows=arrows,
    )


def _rooms(found: dict[str, set[str]]) -> tuple[int, list[str]]:
    """How many rooms there are, and the arrows between them."""
    arrows = {(name.split(".")[0], target.split(".")[0]) for name, targets in found.items() for target in targets}
    rooms = {name.split(".")[0] for name in found} - {FACE}
    return len(rooms), sorted(f"{a} -> {b}" for a, b in arrows if a != b and FACE not in (a, b))


def figures(house: House) -> dict[str, str]:
    """A line of the table for each figure."""
    pairs = house.rooms * (house.rooms - 1) // 2
    return {
        "modules": str(house.modules),
        "lines": f"{house.lines:,}",
        f"files over {LONG_FILE} lines": str(len(house.long_files)),
        f"functions over {LONG_FUNCTION} lines": str(len(house.long_functions)),
        f"functions over {TOO_LONG_FUNCTION} lines": str(len(house.too_long_functions)),
        "public names without a docstring": f"{len(house.undocumented)} of {house.public}",
        "type: ignore, pyright: ignore, noqa": str(len(house.ignores)),
        "readings of a manifest by subscript": str(len(house.manifest_readings)),
        "rooms": str(house.rooms),
        "arrows between rooms": f"{len(house.arrows)} ({pairs} pairs)",
    }


def table(found: dict[str, House]) -> str:
    """Markdown: a row a figure, a column a tree."""
    columns = {name: figures(house) for name, house in found.items()}
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in next(iter(columns.values())):
        lines.append(f"| {row} | {' | '.join(column[row] for column in columns.values())} |")
    return "\n".join(lines)


def places(house: House) -> str:
    """What the figures count, one a line."""
    parts = {
        f"files over {LONG_FILE} lines": house.long_files,
        f"functions over {LONG_FUNCTION} lines": house.long_functions,
        "public names without a docstring": house.undocumented,
        "ignores": house.ignores,
        "readings of a manifest by subscript": house.manifest_readings,
        "arrows between rooms": house.arrows,
    }
    return "\n".join(line for title, found in parts.items() for line in ("", f"{title}:", *(f"  {each}" for each in found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, help="checkouts to measure beside this one")
    parser.add_argument("--places", action="store_true", help="also what the figures of this checkout count")
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    found = {tree.resolve().name: measure(tree) for tree in options.trees} | {"this tree": measure(here)}
    print(table(found))
    if options.places:
        print(places(found["this tree"]))


if __name__ == "__main__":
    main()
