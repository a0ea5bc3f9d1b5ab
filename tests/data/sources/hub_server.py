"""A hub of one data set on this machine, as much of its interface as huggingface_hub and datasets ask for.

python hub_server.py DIRECTORY LOG: the data set org/name with the files of the directory, `main` being the commit that stands in
DIRECTORY/.commit; prints its address, and adds a line to LOG for each request.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT, LOG = map(Path, sys.argv[1:])


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        commit = (ROOT / ".commit").read_text()
        files = sorted(p.name for p in ROOT.iterdir() if p.name != ".commit")
        if re.fullmatch(r"/api/datasets/org/name(/revision/[^/]+)?", path):
            self.json({"id": "org/name", "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        elif re.fullmatch(rf"/api/datasets/org/name/tree/({commit}|main)", path):
            self.json([self.entry(name) for name in files])
        elif re.fullmatch(rf"/api/datasets/org/name/paths-info/({commit}|main)", path):
            self.json([self.entry(name) for name in files if name in self.body()])
        elif (found := re.fullmatch(rf"/datasets/org/name/resolve/({commit}|main)/(.+)", path)) and found[2] in files:
            self.file(found[2], commit)
        else:
            known = re.search(rf"/({commit}|main)(/|$)", path)
            self.send(404, b"", {"X-Error-Code": "EntryNotFound" if known else "RevisionNotFound"})

    do_HEAD = do_POST = do_GET

    def body(self) -> str:
        return self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()

    def entry(self, name: str) -> dict[str, Any]:
        content = (ROOT / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def file(self, name: str, commit: str) -> None:
        content = (ROOT / name).read_bytes()
        headers = {"ETag": f'"{self.entry(name)["oid"]}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self.send(200, content, headers)
            return
        stop = min(int(asked[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {asked[1]}-{stop}/{len(content)}"
        self.send(206, content[int(asked[1]) : stop + 1], headers)

    def json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        with LOG.open("a") as log:
            log.write(f"{self.command} {status} {self.path}\n")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `send` prints what matters."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
