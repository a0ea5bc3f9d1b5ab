"""`posttrain docs`: the pages that come with the package, in the order of mkdocs.yml, printed or found by their words."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any, cast

import yaml
from rich.markdown import Markdown
from rich.table import Table

from posttrain.config.paths import root
from posttrain.console import console
from posttrain.errors import UserError, did_you_mean

LINK = re.compile(r"(!?)\[([^\]\[]*)\]\(([^()\s]+)\)")
CODE = re.compile(r"^(```[\s\S]*?^```|(?: {4}.*\n)+)", re.MULTILINE)
EMPTY_HEAD = re.compile(r"<th((?:\s[^>]*)?)>\s*</th>")
HITS = 20  # places that a search names at most


@dataclass(frozen=True)
class Page:
    """section, title: as mkdocs.yml has them. name: below docs/, without .md. file: where it lies."""

    section: str
    title: str
    name: str
    file: Path

    @property
    def text(self) -> str:
        """Its Markdown, with links as pages of the site."""
        return moved(self.file.read_text(encoding="utf-8"), f"{self.name}.md", beside(), {f"{each}.md" for each in pages()})


@cache
def _site() -> dict[str, Any]:
    """mkdocs.yml: inside the package, or beside docs/ in a checkout."""
    docs = root("docs")
    file = next(each for each in (docs / "mkdocs.yml", docs.parent / "mkdocs.yml") if each.is_file())
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def beside() -> dict[str, str]:
    """Pages that do not lie in docs/ -> their files."""
    return _site()["extra"]["beside"]


@cache
def pages() -> dict[str, Page]:
    """All of them by name, in the order of the site. Raises UserError where the package came without."""
    try:
        nav = _site()["nav"]
    except StopIteration:
        raise UserError("docs: this package was built without its pages; install it from its wheel or checkout") from None
    docs, outside = root("docs"), beside()
    found: dict[str, Page] = {}
    for section, title, file in _entries(nav, ""):
        place = docs / file
        if file in outside:
            place = next(each for each in (docs / outside[file], docs.parent / outside[file]) if each.is_file())
        name = file.removesuffix(".md")
        found[name] = Page(section, title or _heading(place), name, place)
    return found


def _entries(tree: Any, section: str) -> Iterator[tuple[str, str, str]]:
    """Section, title and file of each entry below; of nested sections the outermost."""
    for entry in cast("list[Any]", tree):
        if isinstance(entry, str):
            yield section, "", entry
            continue
        for title, below in cast("dict[str, Any]", entry).items():
            if isinstance(below, str):
                yield section, title, below
            else:
                yield from _entries(below, section or title)


def _heading(file: Path) -> str:
    return file.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")


def moved(text: str, page: str, outside: Mapping[str, str], known: Collection[str]) -> str:
    """A page's Markdown, in which a link to another page is one of the site, and to any other file its name.

    page: as the site calls it. outside: the site's pages that do not lie in docs/ -> their files. known: all pages and pictures.
    """
    homes = {file: name for name, file in outside.items()}
    here = PurePosixPath(outside.get(page, f"docs/{page}")).parent

    def link(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        path, mark, anchor = target.partition("#")
        if not path or "://" in target or target.startswith("mailto:"):
            return found[0]
        place = normpath(str(here / path))
        there = homes.get(place) or place.removeprefix("docs/")
        if there in known or (picture and place.startswith("docs/")):
            return f"{picture}[{words}]({relpath(there, str(PurePosixPath(page).parent))}{mark}{anchor})"
        return words if f"`{words.strip('`')}`" == f"`{place}`" else f"{words} (`{place}`)"

    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(CODE.split(text)))


def without_empty_heads(page: str) -> str:
    """A page's HTML, in which the corner of a table is no heading: a screen reader would say nothing for it."""
    return EMPTY_HEAD.sub(r"<td\1></td>", page)


def page_of(name: str) -> Page:
    """By its name, such as first-hour or api/losses. Raises UserError, with a near name."""
    known = {page.lower(): page for page in pages()}
    known |= {file.removesuffix(".md").lower(): page.removesuffix(".md") for page, file in beside().items()}
    wanted = name.lower().removesuffix(".md").removeprefix("docs/")
    if wanted not in known:
        raise UserError(f"docs: there is no page '{name}'{did_you_mean(wanted, list(known))}; posttrain docs lists them")
    return pages()[known[wanted]]


def show_list() -> None:
    """Names and titles, by section."""
    table = Table(box=None, show_header=False, pad_edge=False)
    section = ""
    for page in pages().values():
        table.add_row(page.section if page.section != section else "", page.name, page.title)
        section = page.section
    console.print(table)
    console.print("posttrain docs NAME prints one, --find WORDS looks for words in all, --serve shows them in a browser")


def show_page(name: str) -> None:
    """On a terminal laid out, and page by page; elsewhere as it is written."""
    page = page_of(name)
    if not console.is_terminal:
        print(page.text, end="")
        return
    with console.pager(styles=True):
        console.print(Markdown(page.text), soft_wrap=False)


def found_in(words: str) -> list[tuple[Page, str, str]]:
    """Page, heading and line of the first places that have all the words, titles and headings before other lines."""
    wanted = words.lower().split()
    hits: list[tuple[int, Page, str, str]] = []
    for page in pages().values():
        heading, taken = page.title, set[str]()
        for line in page.text.splitlines():
            if line.startswith("#"):
                heading = line.lstrip("# ")
            where = line.lower() if line.startswith("#") else f"{heading} {line}".lower()
            if heading not in taken and all(word in where for word in wanted) and any(word in line.lower() for word in wanted):
                taken.add(heading)
                hits.append((0 if all(word in f"{page.title} {heading}".lower() for word in wanted) else 1, page, heading, line))
    return [hit[1:] for hit in sorted(hits, key=lambda hit: hit[0])[:HITS]]


def show_found(words: str) -> None:
    """One line a place. Raises UserError where there is none."""
    hits = found_in(words)
    if not hits:
        raise UserError(f"docs: '{words}' stands on no page; try fewer words")
    for page, heading, line in hits:
        console.print(f"{page.name}: {heading}: {' '.join(line.strip('#| ').split())[:100]}")
