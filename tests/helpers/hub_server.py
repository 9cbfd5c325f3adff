"""A Hugging Face hub on the loopback interface, which serves local folders to the client huggingface_hub.

    with Hub({"models/tiny/gpt2": {commit: folder}, "datasets/tiny/wikitext": {commit: folder}}) as hub:
        ...  # HF_ENDPOINT=hub.url

The last commit of a repository is its `main`. `hub.faults` holds the faults of the hub, for instance:

    Fault("status", "/tree/", status=500, times=2)                       an error instead of the answer, two times
    Fault("status", "/api/", status=429, headers={"Retry-After": "1"})
    Fault("stall", "/api/")                                              no answer at all
    Fault("hang", "/resolve/.*safetensors")                              half of the body, then nothing
    Fault("truncate", "/resolve/.*safetensors")                          half of the body, then the connection closes
    Fault("corrupt", "/resolve/.*safetensors")                           the right size, one wrong byte
    Fault("loop", "/resolve/")                                           a redirect to the same address
    Fault("size", "/tree/")                                              listed sizes one byte too large
"""

import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = ".safetensors", ".bin", ".parquet"  # kept in LFS: identified by SHA-256, not by git's SHA-1

API = re.compile(
    r"/api/(?P<repo>(?:models|datasets)/[^/]+/[^/]+)(?:/(?P<what>revision|tree|commits)/(?P<revision>[^/]+)/?(?P<inside>.*))?"
)
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Fault:
    kind: str  # status, stall, hang, truncate, corrupt, loop or size
    path: str  # a regular expression, searched in the request's path
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    times: float = float("inf")


class Hub:
    def __init__(self, repos: dict[str, dict[str, Path]]):
        self.repos = repos
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # "GET /path", in their order
        self.sent: list[tuple[str, str, int]] = []  # of each successful answer: path, Range or "", bytes
        self.closing = threading.Event()

    def __enter__(self) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub, self.server.daemon_threads = self, True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()  # ends the requests that hang
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.hub: Hub = self.server.hub
        self.hub.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        self.fault = next((f for f in self.hub.faults if f.times > 0 and re.search(f.path, path)), None)
        if self.fault:
            self.fault.times -= 1
            if self.fault.kind == "stall":
                self.hang()
                return
            if self.fault.kind == "status":
                self.answer(self.fault.status, {"error": "a fault of the test"}, self.fault.headers)
                return
            if self.fault.kind == "loop":
                self.answer(302, {}, {"Location": self.path})
                return
        if match := API.fullmatch(path):
            self.api(**match.groupdict())
        elif match := FILE.fullmatch(path):
            self.file(**match.groupdict())
        else:
            self.answer(404, {"error": "Not found"})

    do_HEAD = do_GET

    def find_folder(self, repo: str, revision: str | None) -> tuple[str, Path] | None:
        """Return a commit and its folder, or answer with an error and return None."""
        commits = self.hub.repos.get(repo)
        if commits is None:
            # As the real hub: without a login, a private repository looks like a missing one.
            self.answer(401, {"error": "Invalid username or password."}, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = list(commits)[-1] if revision in (None, "main") else revision
        if commit not in commits:
            self.answer(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, commits[commit]

    def api(self, repo: str, what: str | None, revision: str | None, inside: str | None) -> None:
        if not (resolved := self.find_folder(repo, revision)):
            return
        commit, folder = resolved
        if what == "tree":
            pattern = "**/*" if "recursive=true" in self.path.lower() else "*"
            entries = [describe(folder, path) for path in sorted((folder / inside).glob(pattern))]
            if self.fault and self.fault.kind == "size":
                entries = [entry | {"size": entry["size"] + 1} for entry in entries if "size" in entry]
            self.answer(200, entries)
        elif what == "commits":
            details = {"authors": [], "date": "2024-01-01T00:00:00.000Z", "title": "A commit", "message": ""}
            self.answer(200, [{"id": name} | details for name in reversed(self.hub.repos[repo])])
        else:
            files = [{"rfilename": str(path.relative_to(folder))} for path in folder.rglob("*") if path.is_file()]
            self.answer(200, {"id": repo.split("/", 1)[1], "sha": commit, "private": False, "siblings": files})

    def file(self, kind: str | None, repo: str, revision: str, path: str) -> None:
        if not (resolved := self.find_folder((kind or "models/") + repo, revision)):
            return
        commit, folder = resolved
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not (folder / path).is_file():
            self.answer(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        body = (folder / path).read_bytes()
        entry = describe(folder, folder / path)
        digest = entry.get("lfs", entry)["oid"]
        if "lfs" in entry and self.headers["Host"].startswith("127.0.0.1"):
            # As the real hub: large files are on another host, ...
            location = f"http://localhost:{self.server.server_port}{self.path}"
            headers |= {"Location": location, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body))}
            # ... and its Xet protocol is offered for them, which this server does not speak.
            headers |= {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": f"{self.hub.url}/api/xet-read-token"}
            self.answer(302, {}, headers)
            return
        headers["ETag"] = f'"{digest}"'
        if byte_range := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(byte_range[1]), int(byte_range[2] or len(body) - 1)
            if first >= len(body):
                self.answer(416, {"error": "Range not satisfiable"})
                return
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            body = body[first : last + 1]
        self.answer(206 if byte_range else 200, body, headers)

    def answer(self, status: int, body: bytes | dict | list, headers: dict[str, str] | None = None) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        kind = self.fault.kind if self.fault and status < 300 else ""
        if self.command == "HEAD":
            return
        if kind == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        if kind in ("truncate", "hang"):
            body = body[: len(body) // 2]
            self.close_connection = True
        if status < 300:
            self.hub.sent.append((self.path, self.headers.get("Range", ""), len(body)))
        self.wfile.write(body)
        if kind == "hang":
            self.hang()

    def hang(self) -> None:
        """Send nothing until the hub closes."""
        self.wfile.flush()
        self.hub.closing.wait()
        self.close_connection = True


def describe(folder: Path, path: Path) -> dict:
    """Return the entry of a file or folder in the hub's listing."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40}
    body = path.read_bytes()
    entry = {"type": "file", "path": name, "size": len(body)}
    if path.suffix in LFS_SUFFIXES:
        sha = hashlib.sha256(body).hexdigest()
        entry |= {"lfs": {"oid": sha, "size": len(body), "pointerSize": 134}, "xetHash": sha}
        body = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(body)}\n".encode()
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    return entry


def closed_port() -> int:
    """Return a port that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
