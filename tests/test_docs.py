"""README's map of the repository names every folder, and none that does not exist; links between pages lead somewhere."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def drawn() -> dict[str, list[str]]:
    """Folders that the map has a line for, by the folder that they lie in, and those that its lines mention."""
    block = (ROOT / "README.md").read_text().split("## Where things are")[1].split("```")[1]
    found: dict[str, list[str]] = {"top": [], "rooms": [], "mentioned": []}
    for line in block.strip("\n").splitlines():
        row = re.match(r"( *)([\w/.]+)/ +(.*)", line)
        assert row, line
        found["rooms" if row[1] else "top"].append(row[2])
        found["mentioned"] += [f"{row[2]}/{each}" for each in re.findall(r"(\w+)/", row[3])] if row[1] else []
    return found


def folders(inside: Path) -> set[str]:
    """Folders with a file that git knows."""
    listed = subprocess.run(["git", "ls-files"], cwd=inside, capture_output=True, text=True, check=True).stdout
    return {line.split("/")[0] for line in listed.splitlines() if "/" in line and not line.startswith(".")}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="runs from a checkout only")
def test_the_map_names_every_folder_and_no_other() -> None:
    found = drawn()
    assert {name.split("/")[0] for name in found["top"]} == folders(ROOT)
    assert set(found["rooms"]) == folders(ROOT / "src" / "posttrain")
    assert found["mentioned"] and all((ROOT / "src" / "posttrain" / name).is_dir() for name in found["mentioned"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_every_page_has_its_place_on_the_site() -> None:
    """mkdocs.yml is the order of the site and of `posttrain docs`: a new page is named there."""
    from posttrain.commands.docs.pages import pages

    here = {str(path.relative_to(ROOT / "docs").with_suffix("")) for path in (ROOT / "docs").rglob("*.md")}
    assert here - set(pages()) == set(), "name it in mkdocs.yml"
