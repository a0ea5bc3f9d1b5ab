"""Imports go down only; see docs/architecture.md."""

import ast
from pathlib import Path

import posttrain

ROOT = Path(posttrain.__file__).parent
BOTTOM = {"batch", "rundir", "errors", "cache", "console", "signals", "secrets", "child", "exits", "config", "tensors"}
ALLOWED = {part: BOTTOM | {part} for part in ("models", "data", "losses", "train")}
ALLOWED["stages"] = BOTTOM | {"stages", "models", "data", "losses", "train", "after"}
ALLOWED |= {part: BOTTOM | {part, "models", "data", "losses", "train"} for part in ("after", "before")}
ALLOWED["before"] |= {"after", "stages"}  # its pages, and what a run itself will read
ALLOWED |= dict.fromkeys(BOTTOM, BOTTOM)
STAGE_MODULES = {"cpt", "sft", "rm", "ppo", "dpo", "dreambooth"}


def imports() -> list[tuple[str, str]]:
    """(file, imported module of ours without the package's name)"""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            ours = [name.removeprefix("posttrain.") for name in names if name.startswith("posttrain.")]
            found += [(str(path.relative_to(ROOT)), name) for name in ours]
    return found


def test_imports_go_down_only() -> None:
    seen = imports()
    assert len(seen) > 50
    wrong = []
    for file, name in seen:
        part = file.split("/")[0].removesuffix(".py")
        if part in ALLOWED and name.split(".")[0] not in ALLOWED[part]:
            wrong.append(f"{file} imports {name}")
    assert not wrong


def test_stages_do_not_import_stages() -> None:
    wrong = [(file, name) for file, name in imports() if name.removeprefix("stages.") in STAGE_MODULES]
    assert not wrong
