"""`posttrain docs`: every page of the site is printed, found and served from what the package carries."""

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.commands.docs.pages import found_in, moved, page_of, pages, without_empty_heads
from posttrain.commands.docs.server import answer, listening_on, rendered
from posttrain.config.paths import root
from posttrain.errors import UserError

BESIDE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
KNOWN = {"index.md", "contributing.md", "data.md", "api/README.md", "api/losses.md"}


@pytest.mark.parametrize(
    ("page", "text", "wanted"),
    [
        ("index.md", "[d](docs/data.md#look-first)", "[d](data.md#look-first)"),
        ("data.md", "[c](../CONTRIBUTING.md#add)", "[c](contributing.md#add)"),
        ("data.md", "[a](api/README.md) [w](https://x.org/a.md)", "[a](api/README.md) [w](https://x.org/a.md)"),
        ("api/losses.md", "[d](../data.md)", "[d](../data.md)"),
        ("index.md", "[recipes/a.yaml](recipes/a.yaml) [it](recipes/a.yaml)", "recipes/a.yaml it (`recipes/a.yaml`)"),
        ("data.md", "![curve](gpu.svg)", "![curve](gpu.svg)"),
        ("data.md", "    [c](../CONTRIBUTING.md)\n", "    [c](../CONTRIBUTING.md)\n"),
        ("data.md", "```\n[c](../CONTRIBUTING.md)\n```\n", "```\n[c](../CONTRIBUTING.md)\n```\n"),
    ],
)
def test_links_as_the_site_has_them(page: str, text: str, wanted: str) -> None:
    assert moved(text, page, BESIDE, KNOWN) == wanted


def test_every_page_of_docs_has_its_place_and_no_link_leads_nowhere() -> None:
    found = pages()
    here = {str(path.relative_to(root("docs")).with_suffix("")) for path in root("docs").rglob("*.md")}
    assert set(found) == here | {"index", "contributing", "changelog", "security-policy"}
    for page in found.values():
        for target in re.findall(r"\]\(([^)\s#:]+\.md)", re.sub(r"(?m)^(```[\s\S]*?^```|    .*)", "", page.text)):
            assert str((Path("/") / page.name).parent / target) and (
                str(Path("/", page.name).parent.joinpath(target).resolve())[1:].removesuffix(".md") in found
            ), (page.name, target)


def test_a_page_by_its_name_and_a_near_one() -> None:
    assert page_of("README").name == "index" and page_of("docs/first-hour.md").title == "The first hour"
    assert page_of("api/readme").name == "api/README"
    with pytest.raises(UserError, match=r"docs: there is no page 'first-huor' - did you mean 'first-hour'\?"):
        page_of("first-huor")


def test_words_are_found_by_headings_first() -> None:
    hits = found_in("gated models")
    assert (hits[0][0].name, hits[0][1]) == ("hub", "Gated models")
    assert found_in("nowhere-to-be-found") == []


def test_the_command() -> None:
    def said(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["docs", *words])
        return done.exit_code, done.output

    code, text = said()
    assert code == 0 and all(name in text for name in ("first-hour", "configuration", "posttrain docs NAME"))
    code, text = said("why")
    assert code == 0 and text.startswith("# Packs, sums, references\n") and "chaining.md" in text
    code, text = said("--find", "early stopping")
    assert code == 0 and "tuning" in text
    assert said("hubb")[0] == 2


def test_pages_in_a_browser() -> None:
    status, kind, content = answer("/")
    assert (status, kind) == (200, "text/html") and b"<h1" in content and b'aria-current="page"' in content
    status, kind, content = answer("/benchmarks.svg")
    assert (status, kind) == (200, "image/svg+xml") and content.startswith(b"<")
    assert answer("/../pyproject.toml")[0] == answer("/..%2fREADME.md")[0] == answer("/mkdocs.yml")[0] == 404
    found = answer("/search?q=gated+models")[2].decode()
    assert "/hub.html#gated-models" in found and 'id="gated-models"' in rendered("hub")
    assert "<script>" not in answer("/search?q=%3Cscript%3E")[2].decode()
    assert not re.search(r"(?:src|<link[^>]*href)=.https?://", "".join(rendered(name) for name in ("index", "hub", "why")))


def test_it_listens_on_this_machine_alone() -> None:
    with listening_on(0) as server:
        host, port = server.server_address[:2]
        assert host == "127.0.0.1"
        with pytest.raises(UserError, match=f"--port: {port} cannot be had"):
            listening_on(int(port))


def test_the_order_of_the_site_can_be_read_without_mkdocs() -> None:
    file = root("docs").parent / "mkdocs.yml"
    if not file.is_file():
        pytest.skip("runs from a checkout only")
    assert yaml.safe_load(file.read_text())["theme"]["font"] is False


def test_the_corner_of_a_table_is_no_heading() -> None:
    text = '<th></th><th style="text-align: right;"> </th><th>a</th><thead></thead>'
    assert without_empty_heads(text) == '<td></td><td style="text-align: right;"></td><th>a</th><thead></thead>'
    served = rendered("rlhf")
    assert "<th></th>" not in served and '<table tabindex="0">' in served
