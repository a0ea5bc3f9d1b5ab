"""The server of `posttrain watch`: pages of a folder's runs, for this machine alone. It reads, and writes nothing.

What is asked for is looked up among the runs that were found, never opened as a path. It answers to the name localhost only, so
that no page from elsewhere can reach it under a name of its own (DNS rebinding).
"""

from __future__ import annotations

from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from posttrain.commands.watch.folder import Folder
from posttrain.commands.watch.pages import Asked, answer
from posttrain.console import printable

HOME = "127.0.0.1"
NAMES = {HOME, "localhost"}
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
FIELDS = 200  # words behind an address's question mark
SECONDS = 10  # that a request may take to be read


class Server(ThreadingHTTPServer):
    """Serves one folder on this machine. port 0: any that is free."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, folder: Folder, port: int) -> None:
        self.folder = folder
        super().__init__((HOME, port), _Handler)

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{HOME}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that has gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version = "posttrain", ""
    timeout = SECONDS

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        if not self._is_for_us():
            self._send(HTTPStatus.FORBIDDEN, "only http://localhost and http://127.0.0.1 are answered", with_body)
            return
        try:
            parts = urlsplit(self.path)
            asked = Asked(unquote(parts.path).removeprefix("/"), parse_qs(parts.query, max_num_fields=FIELDS))
            status, page = answer(self.server.folder, asked)
        except ValueError:
            status, page = HTTPStatus.BAD_REQUEST, "this address cannot be read"
        except Exception as error:
            status, page = HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {printable(str(error))[:300]}"
        self._send(status, page, with_body)

    def _is_for_us(self) -> bool:
        """By the name in the address that was asked for; a tunnel may have another port."""
        try:
            (host,) = self.headers.get_all("Host") or []
            return "@" not in host and urlsplit(f"//{host}").hostname in NAMES
        except ValueError:
            return False

    def _send(self, status: HTTPStatus, page: str, with_body: bool) -> None:
        is_page = page.startswith("<!doctype")
        body = page.encode()
        self.send_response(status)
        for name, value in (HEADERS if is_page else HEADERS | {"Content-Type": "text/plain; charset=utf-8"}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads who looked."""
