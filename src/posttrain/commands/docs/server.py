"""`posttrain docs --serve`: the pages in a browser, from this machine alone and without a network."""

from __future__ import annotations

import html
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from jinja2 import Environment, FileSystemLoader
from markdown_it import MarkdownIt

from posttrain.commands.docs.pages import found_in, pages, without_empty_heads
from posttrain.commands.local_server import LocalServer, Reply
from posttrain.config.paths import root
from posttrain.console import say
from posttrain.errors import UserError

PICTURES = {".png": "image/png", ".svg": "image/svg+xml"}
TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
# nothing runs, and nothing comes from elsewhere
HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; form-action 'self'"}


def answer(path: str) -> tuple[int, str, bytes]:
    """Status, kind and content of what is asked for."""
    asked = urlsplit(path)
    name = unquote(asked.path).lstrip("/")
    if name == "search":
        words = parse_qs(asked.query).get("q", [""])[0]
        return 200, "text/html", _laid_out("Search", _hits(words), "", words)
    name = (name or "index.html").removesuffix(".html")
    if name in pages():
        return 200, "text/html", _laid_out(pages()[name].title, rendered(name), name)
    kind, docs = PICTURES.get(Path(name).suffix), root("docs").resolve()
    file = (docs / name).resolve()
    if kind and file.is_file() and file.is_relative_to(docs):
        return 200, kind, file.read_bytes()
    return 404, "text/html", _laid_out("Not found", f"<h1>There is no page {html.escape(name)}</h1>", "")


@cache
def rendered(name: str) -> str:
    """A page as HTML, its headings with names that links can point at."""
    body = without_empty_heads(MarkdownIt("commonmark", {"html": False}).enable("table").render(pages()[name].text))
    body = re.sub("<(pre|table)>", r'<\1 tabindex="0">', body)  # for who scrolls it by keyboard
    body = re.sub(r'href="([\w./-]+)\.md(#[^"]*)?"', r'href="\1.html\2"', body)
    return re.sub(r"<(h[1-6])>(.*?)</\1>", lambda m: f'<{m[1]} id="{_slug(m[2])}">{m[2]}</{m[1]}>', body)


def _slug(heading: str) -> str:
    """As mkdocs and GitHub name a heading."""
    words = html.unescape(re.sub(r"<[^>]*>", "", heading)).lower()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", words)).strip("-")


def _hits(words: str) -> str:
    rows = [
        f'<li><a href="/{page.name}.html#{_slug(heading)}">{html.escape(page.title)}: {html.escape(heading)}</a>'
        f"<br>{html.escape(line.strip('#| ')[:200])}</li>"
        for page, heading, line in (found_in(words) if words.strip() else [])
    ]
    return f"<h1>{html.escape(words)}</h1><ul>{''.join(rows)}</ul>" if rows else "<h1>Nothing found</h1><p>Try fewer words.</p>"


def _laid_out(title: str, body: str, name: str, words: str = "") -> bytes:
    sections: dict[str, list[Any]] = {}
    for page in pages().values():
        sections.setdefault(page.section, []).append(page)
    told = {"title": title, "body": body, "here": name, "words": words, "sections": sections}
    return TEMPLATES.get_template("page.html").render(told).encode()


def listening_on(port: int) -> LocalServer:
    """A server of this machine alone. port 0: any that is free. Raises UserError where the port is taken."""
    try:
        return LocalServer(lambda path: Reply(*answer(path), HEADERS), port)
    except OSError as error:
        raise UserError(f"--port: {port} cannot be had ({error.strerror}); give another") from None


def serve(port: int) -> None:
    """Until Ctrl-C."""
    with listening_on(port) as server:
        say(f"docs: {server.address} (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("docs: ended")
