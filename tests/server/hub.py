"""A hub of one repository on this machine, as huggingface_hub talks to it, and its cache laid out by hand."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = hashlib.sha1(b"a commit").hexdigest()
REPOSITORY = "some-org/tiny.model"


class Hub:
    """What is in the repository, and which of its files were fetched."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.fetched: set[str] = set()
        self.refusal: tuple[int, str] | None = None  # a status and X-Error-Code instead of any answer
        self.url = ""

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


@contextmanager
def hub_of(files: dict[str, bytes]) -> Iterator[Hub]:
    """Run one for the length of a block."""
    hub = Hub(files)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            file = re.fullmatch(f"/{re.escape(REPOSITORY)}/resolve/{COMMIT}/(.+)", path)
            if hub.refusal is not None:
                self.say(hub.refusal[0], b"", {"X-Error-Code": hub.refusal[1], "X-Error-Message": "as was asked"})
            elif path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
                entries = [{"type": "file", "path": n, "size": len(b), "oid": _oid(b)} for n, b in hub.files.items()]
                self.say(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
            elif path in (f"/api/models/{REPOSITORY}/revision/{name}" for name in ("main", "v2", COMMIT)):
                info = {"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]}
                self.say(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            elif f"/api/models/{REPOSITORY}/revision/" in path:
                self.say(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif file is None or file[1] not in hub.files:
                self.say(404, b"", {"X-Error-Code": "RepoNotFound" if file is None else "EntryNotFound"})
            else:
                if with_body:
                    hub.fetched.add(file[1])
                body = hub.files[file[1]]
                self.say(200, body, {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(body)}"'}, with_body=with_body)

        def say(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool = True) -> None:
            self.send_response(status)
            for name, text in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, text)
            self.end_headers()
            if with_body and self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def lay_out_cache(home: Path, model: Path) -> Path:
    """Put a model into a cache as huggingface_hub keeps it, and return its snapshot."""
    folder = home / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for path in (folder / "refs", folder / "blobs", snapshot):
        path.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for path in model.iterdir():
        blob = folder / "blobs" / _oid(path.read_bytes())
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
