"""A stand-in for the Hugging Face hub on the loopback: tiny data sets under their real names, and models.

With it, lmms-eval's built-in tasks run as they are, through the real command, on a machine without a network.
"""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Repositories = Mapping[str, Mapping[str, bytes]]


def commit_of(files: Mapping[str, bytes]) -> str:
    """A commit id that changes with the content, as the hub's does."""
    total = hashlib.sha1(usedforsecurity=False)
    for name in sorted(files):
        total.update(name.encode() + hashlib.sha256(files[name]).digest())
    return total.hexdigest()


def etag_of(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextmanager
def serving(repositories: Repositories, faults: Mapping[str, str] | None = None) -> Iterator[str]:
    """Serve data sets, name to path to content, for the length of a ``with`` block; gives the HF_ENDPOINT.

    `faults` names what is wrong with a data set, or by "" with the hub itself: `gated` asks for a token of
    somebody with access, `cut` ends in the middle of a file, `slow` waits for a second before every reply.
    """

    class Handler(_HubHandler):
        repos = repositories
        faulty = faults or {}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _HubHandler(BaseHTTPRequestHandler):
    repos: Repositories
    faulty: Mapping[str, str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self._fault() == "gated" and "/resolve/" in path:
            self._missing("GatedRepo", status=403)
        elif path.startswith("/api/datasets/"):
            self._api(path.removeprefix("/api/datasets/"))
        elif path.startswith("/datasets/"):
            self._file(path.removeprefix("/datasets/"))
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        else:  # models have no prefix
            self._file(path.removeprefix("/"))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        chunked = self.headers.get("Transfer-Encoding", "") == "chunked"
        size = int(self.headers.get("Content-Length", 0))
        body = (b"".join(self._chunks()) if chunked else self.rfile.read(size)).decode()
        if path in ("/api/repos/create", "/api/validate-yaml") or path.startswith("/api/models/"):
            return self._write(path, body)
        name, _, rest = self._split(path.removeprefix("/api/datasets/"))
        if name not in self.repos or not rest.startswith("paths-info/"):
            return self._missing("RepoNotFound")
        is_json = self.headers.get("Content-Type", "").startswith("application/json")
        asked = json.loads(body)["paths"] if is_json else parse_qs(body)["paths"]
        return self._json([self._entry(name, item) for item in asked if item in self.repos[name]])

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _write(self, path: str, body: str) -> None:
        """What a client asks to write a model: create it, upload files with a commit."""
        repos: Any = self.repos
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if not self.headers.get("Authorization"):
            return self._missing("GatedRepo", status=401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name in repos:
                return self._reply(409, b"{}", {})
            repos[name] = {}
            CREATED[name] = asked
            return self._json({"url": f"/{name}"})
        name, _, rest = self._split(path.removeprefix("/api/models/"))
        if rest.startswith("preupload/"):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self._json({"files": modes})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = commit_of(repos[name])
        return self._json({"commitUrl": f"/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def _at(self, name: str, revision: str) -> Mapping[str, bytes] | None:
        """The files of a repository at a commit of now or of `OLDER`; any other name is a branch."""
        if len(revision) != 40 or revision == commit_of(self.repos[name]):
            return self.repos[name]
        return OLDER.get((name, revision))

    def _api(self, rest: str) -> None:
        name, _, rest = self._split(rest)
        if name not in self.repos:
            return self._missing("RepoNotFound")
        revision = rest.split("/")[1] if rest.startswith(("revision/", "tree/")) else "main"
        files = self._at(name, revision)
        if files is None:
            return self._missing("RevisionNotFound")
        if rest.startswith("tree/"):
            folder = rest.split("/", 2)[2] + "/" if rest.count("/") > 1 else ""
            return self._json(self._tree(name, folder))
        if rest and not rest.startswith("revision/"):
            return self._missing("EntryNotFound")
        return self._json(
            {
                "id": name,
                "sha": commit_of(files),
                "private": False,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "lastModified": "2025-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": file} for file in sorted(files)],
            }
        )

    def _tree(self, name: str, folder: str) -> list[dict[str, object]]:
        inside = [path for path in sorted(self.repos[name]) if path.startswith(folder)]
        recursive = "recursive=true" in urlsplit(self.path).query.lower()
        flat = [path for path in inside if recursive or "/" not in path.removeprefix(folder)]
        deeper = {folder + path.removeprefix(folder).split("/")[0] for path in inside if path not in flat}
        folders = [
            {"type": "directory", "path": item, "size": 0, "oid": etag_of(b"")} for item in sorted(deeper)
        ]
        return [*folders, *(self._entry(name, path) for path in flat)]

    def _file(self, rest: str) -> None:
        name, _, rest = self._split(rest)
        if name not in self.repos:
            return self._missing("RepoNotFound")
        _, revision, path = rest.split("/", 2) if rest.startswith("resolve/") else ("", "main", "")
        files = self._at(name, revision)
        if files is None:
            return self._missing("RevisionNotFound")
        content = files.get(path)
        if content is None:
            return self._missing("EntryNotFound")
        headers = {
            "ETag": f'"{etag_of(content)}"',
            "X-Repo-Commit": commit_of(files),
            "Accept-Ranges": "bytes",
        }
        start, end = self._range(len(content))
        if (start, end) != (0, len(content)):
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        return self._reply(206 if "Content-Range" in headers else 200, content[start:end], headers)

    def _range(self, size: int) -> tuple[int, int]:
        asked = self.headers.get("Range", "")
        if not asked.startswith("bytes="):
            return 0, size
        first, last = asked.removeprefix("bytes=").split("-")
        if not first:
            return max(0, size - int(last)), size
        return int(first), min(size, int(last) + 1) if last else size

    def _split(self, rest: str) -> tuple[str, str, str]:
        parts = rest.split("/", 2)
        return "/".join(parts[:2]), "/", parts[2] if len(parts) > 2 else ""

    def _entry(self, name: str, path: str) -> dict[str, object]:
        content = self.repos[name][path]
        return {"type": "file", "path": path, "size": len(content), "oid": etag_of(content)}

    def _json(self, content: object) -> None:
        self._reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _fault(self) -> str:
        path = unquote(urlsplit(self.path).path)
        return next((fault for name, fault in self.faulty.items() if f"/{name}/" in f"{path}/"), "")

    def _missing(self, code: str, status: int = 404) -> None:
        self._reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": f"{code}: {self.path}"})

    def _reply(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        if self._fault() == "slow":
            time.sleep(1.0)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._fault() == "cut" and "/resolve/" in self.path:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        if LOG is not None:
            LOG.append(format % args)


LOG: list[str] | None = None
OLDER: dict[tuple[str, str], Mapping[str, bytes]] = {}
"""The files of a repository at an earlier commit."""
CREATED: dict[str, Any] = {}
"""By repository that a client created, what it asked for."""
