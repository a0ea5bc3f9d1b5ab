"""mkdocs' hooks (mkdocs.yml): pages that lie beside docs/ are in the site, and links to what is not in it are its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.commands.docs.pages import moved, without_empty_heads

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Any, config: Any) -> Any:
    """Add README.md and the others."""
    from mkdocs.structure.files import File

    for page, file in config["extra"]["beside"].items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with its links as the site has them."""
    return moved(markdown, page.file.src_uri, config["extra"]["beside"], {each.src_uri for each in files})


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """The page with tables that a screen reader can name the columns of."""
    return without_empty_heads(html)
