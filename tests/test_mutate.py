"""The table of faults is not stale: every snippet stands once in the package, and every test that is named is there and fast."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "mutate.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="runs from a checkout only")


@pytest.fixture(scope="module")
def mutate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutate", SCRIPT)
    assert spec and spec.loader
    module = sys.modules["mutate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_snippet_stands_once_and_what_takes_its_place_is_code(mutate: ModuleType) -> None:
    faults = mutate.read_faults()
    assert len(faults) >= 60 and len({fault.name for fault in faults}) == len(faults)
    for fault in faults:
        text = mutate.place_of(fault).read_text()
        changed = text.replace(fault.old, fault.new)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text)), f"{fault.name} changes nothing"


def functions(path: Path) -> dict[str, bool]:
    """Tests of a file -> whether they are slow."""
    tree = ast.parse(path.read_text())
    slow = any(
        isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node) and "mark.slow" in ast.unparse(node)
        for node in tree.body
    )
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {node.name: slow or any("mark.slow" in ast.unparse(each) for each in node.decorator_list) for node in defined}


def test_every_test_that_is_named_is_there_and_fast(mutate: ModuleType) -> None:
    for fault in mutate.read_faults():
        assert fault.tests, fault.name
        for test in fault.tests:
            file, _, node = test.partition("::")
            place = ROOT / file
            files = sorted(place.rglob("test_*.py")) if place.is_dir() else [place]
            found = {name: slow for each in files for name, slow in functions(each).items()}
            assert found, f"{fault.name}: {test} holds no test"
            if node:
                assert found.get(node.partition("[")[0]) is False, f"{fault.name}: {test} is not there, or slow"


def test_a_snippet_that_is_gone_or_stands_twice_is_named(mutate: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "src" / "posttrain" / "losses"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("x = 1\n")
    fault = mutate.Fault("one is two", "losses/*.py", "x = 1", "x = 2", ("tests/test_mutate.py",))
    assert mutate.place_of(fault, tmp_path) == folder / "a.py"
    (folder / "b.py").write_text("y = 2\nx = 1\n")
    with pytest.raises(ValueError, match=r"one is two: 'x = 1' stands 2 times in losses/\*\.py; mend faults\.toml"):
        mutate.place_of(fault, tmp_path)


def test_the_table_is_of_the_faults_and_goes_between_its_marks(
    mutate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = [mutate.Fault(name, "a.py", "x", "y", ("t",)) for name in ("first", "second", "third")]
    verdicts = [
        mutate.Verdict("tests/a/test_a.py::test_b[c|d]", 2.4),
        mutate.Verdict("", 1.0),
        mutate.Verdict("(they hang)", 300.0),
    ]
    text = mutate.table(faults, ["a.py", "a.py", "b.py"], verdicts)
    assert text.splitlines()[0] == "2 of 3 are caught."
    assert text.count("| **a.py** | | |") == text.count("| **b.py** | | |") == 1
    assert "| first | `a/test_a.py::test_b[c\\|d]` | 2 |" in text and "| second | **nothing** | 1 |" in text
    page = tmp_path / "testing.md"
    page.write_text(f"before\n{mutate.BEGIN}\nold\n{mutate.END}\nafter\n")
    monkeypatch.setattr(mutate, "PAGE", page)
    mutate.write(text)
    mutate.write(text)
    assert page.read_text() == f"before\n{mutate.BEGIN}\n{text}\n{mutate.END}\nafter\n"


def test_docs_name_every_fault(mutate: ModuleType) -> None:
    page = mutate.PAGE.read_text()
    shown = page[page.index(mutate.BEGIN) : page.index(mutate.END)]
    missing = [fault.name for fault in mutate.read_faults() if f"| {fault.name} |" not in shown]
    assert not missing, "run scripts/mutate.py --write"
