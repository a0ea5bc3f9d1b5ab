"""Pages in a browser, for this machine alone. A server reads, and writes nothing.

It answers to the name localhost only, so that no page from elsewhere can reach it under a name of its own (DNS rebinding).
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from posttrain.console import printable

HOME = "127.0.0.1"
NAMES = {HOME, "localhost"}
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
SECONDS = 10  # that a request may take to be read


class Reply(NamedTuple):
    """kind: of the content, as HTTP has it."""

    status: int
    kind: str
    content: bytes
    headers: dict[str, str] = {}  # noqa: RUF012 (never changed)


def in_words(status: int, text: str) -> Reply:
    """A line of plain text."""
    return Reply(status, "text/plain", text.encode())


class LocalServer(ThreadingHTTPServer):
    """answer: a path, with what stands behind its question mark -> the reply; a ValueError means that it cannot be read. port 0:
    any that is free. Raises OSError where the port cannot be had."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, answer: Callable[[str], Reply], port: int) -> None:
        self.answer = answer
        super().__init__((HOME, port), _Handler)

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{HOME}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that has gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: LocalServer  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version = "posttrain", ""
    timeout = SECONDS

    def do_GET(self) -> None:
        self._send(self._reply(), with_body=True)

    def do_HEAD(self) -> None:
        self._send(self._reply(), with_body=False)

    def _reply(self) -> Reply:
        if not self._is_for_us():
            return in_words(HTTPStatus.FORBIDDEN, "only http://localhost and http://127.0.0.1 are answered")
        try:
            return self.server.answer(self.path)
        except ValueError:
            return in_words(HTTPStatus.BAD_REQUEST, "this address cannot be read")
        except Exception as error:
            return in_words(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {printable(str(error))[:300]}")

    def _is_for_us(self) -> bool:
        """By the name in the address that was asked for; a tunnel may have another port."""
        try:
            (host,) = self.headers.get_all("Host") or []
            return "@" not in host and urlsplit(f"//{host}").hostname in NAMES
        except ValueError:
            return False

    def _send(self, reply: Reply, with_body: bool) -> None:
        self.send_response(reply.status)
        own = {"Content-Type": f"{reply.kind}; charset=utf-8", "Content-Length": str(len(reply.content))}
        for name, value in (own | HEADERS | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(reply.content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads who looked."""
