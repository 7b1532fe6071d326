"""A hub on this machine: serves the folders of datasets as huggingface_hub's client asks for them.

`serving(folder)` gives its address while it runs. The folder `owner/name` is the dataset of that
name. It answers only what loading a dataset takes, of huggingface_hub 1 and datasets 4.8.
"""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40
NAME = r"(?P<name>[\w.-]+/[\w.-]+)"


class _Handler(BaseHTTPRequestHandler):
    root: Path
    requests: list[str]

    def do_GET(self):
        self._answer(with_body=True)

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.posted = self.rfile.read(length).decode()
        self._answer(with_body=True)

    def log_message(self, *_):
        pass

    def _answer(self, with_body: bool):
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(rf"/datasets/{NAME}/resolve/[^/]+/(?P<file>.+)", path):
            file = self.root / match["name"] / match["file"]
            if file.is_file():
                content = file.read_bytes()
                tag = hashlib.sha1(content).hexdigest()
                headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
                return self._send(200, content, with_body, **headers)
            return self._missing("EntryNotFound", with_body)
        if match := re.fullmatch(rf"/api/datasets/{NAME}(?P<rest>/.*)?", path):
            folder = self.root / match["name"]
            if not folder.is_dir():
                return self._missing("RepoNotFound", with_body)
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            rest = match["rest"] or ""
            if "/paths-info/" in rest:
                named = [file for file in files if file.name in unquote(self.posted)]
                return self._json([self._entry(folder, file) for file in named], with_body)
            if "/tree/" in rest:
                inner = re.sub(r"^/tree/[^/]+/?", "", rest)
                place = folder / inner
                if not place.is_dir():
                    return self._missing("EntryNotFound", with_body)
                everything = "recursive=true" in self.path.lower()
                entries = sorted(place.rglob("*") if everything else place.iterdir())
                return self._json([self._entry(folder, entry) for entry in entries], with_body)
            siblings = [{"rfilename": file.relative_to(folder).as_posix()} for file in files]
            value = {"_id": "1", "id": match["name"], "sha": COMMIT, "siblings": siblings}
            return self._json({**value, "private": False, "gated": False, "tags": []}, with_body)
        return self._missing("EntryNotFound", with_body)

    @staticmethod
    def _entry(folder: Path, entry: Path) -> dict:
        name = entry.relative_to(folder).as_posix()
        if entry.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
        tag = hashlib.sha1(entry.read_bytes()).hexdigest()
        return {"type": "file", "oid": tag, "size": entry.stat().st_size, "path": name}

    def _json(self, value, with_body: bool):
        headers = {"Content-Type": "application/json"}
        self._send(200, json.dumps(value).encode(), with_body, **headers)

    def _missing(self, code: str, with_body: bool):
        self._send(404, b"{}", with_body, **{"X-Error-Code": code})

    def _send(self, status: int, content: bytes, with_body: bool, **headers: str):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


@contextlib.contextmanager
def serving(folder: Path):
    """The address of a hub with the datasets in `folder`, and the requests that it gets."""
    requests: list[str] = []
    handler = type("Handler", (_Handler,), {"root": folder, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
