"""docs/api/*.md from the docstrings of what one calls or extends from outside: a page a room.

    python scripts/api_pages.py            # writes docs/api/

The source is read as text; nothing is imported. A page has the public classes (with fields and methods) and functions of a room's
modules: signatures as they stand in the source, docstrings with their Args, Returns and Raises as lists.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from house import Function, modules

HERE = Path(__file__).resolve().parent
SOURCE, PAGES = HERE.parent / "src" / "posttrain", HERE.parent / "docs" / "api"
# page -> modules that it has, with all below them; in the order of a reader's interest
ROOMS = {
    "posttrain": ("__init__",),
    "stages": ("stages.spec",),
    "losses": ("losses",),
    "training": ("training",),
    "data": ("data.formats", "data.stage_examples"),
    "models": ("models.peft", "models.kernels", "models.quantization"),
    "rewards": ("rewards",),
    "runs": ("runs",),
}
SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Attributes|Shapes?):\s*(.*)$")
ITEM = re.compile(r"^([\w*, ]+):\s+(.*)$")


def page(room: str) -> str | None:
    """The page of one room, or None where none of its modules is there."""
    found = {name: path for name, path in modules(SOURCE).items() if _belongs(name, ROOMS[room])}
    blocks = [block for name, path in found.items() for block in module(name, path)]
    return "\n\n".join([f"# {room}", *blocks]) + "\n" if blocks else None


def _belongs(name: str, prefixes: tuple[str, ...]) -> bool:
    private = any(part.startswith("_") and part != "__init__" for part in name.split("."))
    return not private and any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def module(name: str, path: Path) -> Iterator[str]:
    """The Markdown blocks of a module; none for one that says nothing."""
    text = path.read_text()
    tree = ast.parse(text)
    lines = text.splitlines()
    members = [node for node in tree.body if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_")]
    if not members and ast.get_docstring(tree) is None:
        return
    dotted = "posttrain" if name == "__init__" else f"posttrain.{name}"
    yield f"## `{dotted}`"
    yield from docstring(tree)
    for node in members:
        yield f"### {node.name}"
        if isinstance(node, ast.ClassDef):
            yield from class_blocks(node, lines)
        else:
            yield code(signature(node, lines))
            yield from docstring(node)


def class_blocks(node: ast.ClassDef, lines: list[str]) -> Iterator[str]:
    """A class's fields with the comments behind them, its docstring, and its public methods."""
    fields = [
        line
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and not each.target.id.startswith("_")
        for line in lines[each.lineno - 1 : each.end_lineno]
    ]
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    head = [*decorators(node), f"class {node.name}({bases}):" if bases else f"class {node.name}:"]
    yield code("\n".join([*head, *fields]) if fields else "\n".join(head).removesuffix(":"))
    yield from docstring(node)
    for method in node.body:
        if isinstance(method, Function) and not method.name.startswith("_"):
            yield f"#### {node.name}.{method.name}"
            yield code(signature(method, lines))
            yield from docstring(method)


def signature(node: Function, lines: list[str]) -> str:
    """A function's head as it stands in the source, without what only the formatter reads."""
    head = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1] or [lines[node.lineno - 1]]))
    if node.body[0].lineno == node.lineno:  # all in one line
        head = head[: node.body[0].col_offset - node.col_offset]
    head = re.sub(r"\s*# fmt: skip\s*$", "", head).rstrip()
    return "\n".join([*decorators(node), re.sub(r":(\s*#.*)?$", "", head)])


def decorators(node: ast.ClassDef | Function) -> list[str]:
    return [f"@{ast.unparse(each)}" for each in node.decorator_list]


def code(text: str) -> str:
    return f"```python\n{text}\n```"


def docstring(node: ast.Module | ast.ClassDef | Function) -> Iterator[str]:
    """A docstring's paragraphs; what stands under Args, Returns and Raises as a list."""
    text = ast.get_docstring(node)
    for paragraph in re.split(r"\n\s*\n", text) if text else ():
        yield prose(paragraph)


def prose(paragraph: str) -> str:
    """One paragraph as Markdown. Indented ones, which are examples or tables, stay as they are."""
    if all(line.startswith("    ") for line in paragraph.splitlines()):
        return code(textwrap.dedent(paragraph)).replace("```python", "```text")
    lines: list[str] = []
    in_section = False
    for line in paragraph.splitlines():
        if match := SECTION.match(line):
            in_section = True
            lines += ["", f"**{match[1]}** {escaped(match[2])}".rstrip(), ""]
        elif in_section and (item := ITEM.match(line.strip())) and _indent(line) == 4:
            lines.append(f"- `{item[1]}`: {escaped(item[2])}")
        elif in_section and line.startswith(" "):
            lines.append(f"  {escaped(line.strip())}")
        else:
            in_section = False
            lines.append(escaped(line))
    return "\n".join(lines).strip()


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def escaped(text: str) -> str:
    """Text in which Markdown finds no marks of its own, but for code in backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*<])", r"\\\1", part) for part in parts)


def index(rooms: list[str]) -> str:
    """The page that names the others."""
    lines = [f"- [{room}]({room}.md): {', '.join(f'`{_dotted(name)}`' for name in ROOMS[room])}" for room in rooms]
    head = "What one calls or extends from outside, from the docstrings. `make docs` makes these pages."
    return "\n".join(["# API", "", head, "", *lines]) + "\n"


def _dotted(name: str) -> str:
    return "posttrain" if name == "__init__" else f"posttrain.{name}"


def pages() -> dict[str, str]:
    """File name -> text, of all pages."""
    found = {room: text for room in ROOMS if (text := page(room))}
    return {"README.md": index(list(found))} | {f"{room}.md": text for room, text in found.items()}


def main() -> None:
    PAGES.mkdir(exist_ok=True)
    made = pages()
    for stale in {path.name for path in PAGES.glob("*.md")} - set(made):
        (PAGES / stale).unlink()
    for name, text in made.items():
        (PAGES / name).write_text(text)
    print(f"wrote {len(made)} pages to {PAGES}")


if __name__ == "__main__":
    main()
