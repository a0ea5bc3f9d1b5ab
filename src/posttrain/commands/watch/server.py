"""The server of `posttrain watch`: pages of a folder's runs.

What is asked for is looked up among the runs that were found, never opened as a path.
"""

from __future__ import annotations

from urllib.parse import parse_qs, unquote, urlsplit

from posttrain.commands.local_server import LocalServer, Reply, in_words
from posttrain.commands.watch.folder import Folder
from posttrain.commands.watch.pages import Asked, answer

FIELDS = 200  # words behind an address's question mark


class Server(LocalServer):
    """Serves one folder."""

    def __init__(self, folder: Folder, port: int) -> None:
        self.folder = folder
        super().__init__(self._page, port)

    def _page(self, path: str) -> Reply:
        address = urlsplit(path)
        words = parse_qs(address.query, max_num_fields=FIELDS, errors="surrogateescape")
        asked = Asked(unquote(address.path, errors="surrogateescape").removeprefix("/"), words)
        status, page = answer(self.folder, asked)
        return Reply(status, "text/html", page.encode()) if page.startswith("<!doctype") else in_words(status, page)
