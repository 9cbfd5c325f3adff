"""A hub on the loopback interface: what huggingface_hub asks of https://huggingface.co, from local folders.

    with Hub({"models/tiny/gpt2": {commit: folder}, "datasets/tiny/wikitext": {commit: folder}}) as hub:
        ...  # HF_ENDPOINT=hub.url

The last commit of a repository is its `main`. To misbehave, append to `hub.faults`:

    Fault("status", "/tree/", status=500, times=2)                       an error instead of the answer, twice
    Fault("status", "/api/", status=429, headers={"Retry-After": "1"})
    Fault("stall", "/api/")                                              no answer at all
    Fault("hang", "/resolve/.*safetensors")                              half of the body, then silence
    Fault("truncate", "/resolve/.*safetensors")                          half of the body, then the connection closes
    Fault("corrupt", "/resolve/.*safetensors")                           the right size, one wrong byte
    Fault("loop", "/resolve/")                                           a redirect to itself
    Fault("size", "/tree/")                                              files listed with a byte more than they have
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

LARGE = ".safetensors", ".bin", ".parquet"  # what a hub keeps in LFS: named by sha256, not by git's sha1

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
        self.requests: list[str] = []  # "GET /path", in order of arrival
        self.sent: list[tuple[str, str, int]] = []  # of each good answer: path, the Range asked for or "", bytes
        self.closing = threading.Event()

    def __enter__(self) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub, self.server.daemon_threads = self, True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()  # ends what stalls
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
                self.silence()
                return
            if self.fault.kind == "status":
                self.answer(self.fault.status, {"error": "as told"}, self.fault.headers)
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

    def folder(self, repo: str, revision: str | None) -> tuple[str, Path] | None:
        commits = self.hub.repos.get(repo)
        if commits is None:
            # As the real hub does: who is not logged in cannot tell a private repository from none.
            self.answer(401, {"error": "Invalid username or password."}, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = list(commits)[-1] if revision in (None, "main") else revision
        if commit not in commits:
            self.answer(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, commits[commit]

    def api(self, repo: str, what: str | None, revision: str | None, inside: str | None) -> None:
        if not (found := self.folder(repo, revision)):
            return
        commit, folder = found
        if what == "tree":
            pattern = "**/*" if "recursive=true" in self.path.lower() else "*"
            listed = [entry(folder, path) for path in sorted((folder / inside).glob(pattern))]
            if self.fault and self.fault.kind == "size":
                listed = [about | {"size": about["size"] + 1} for about in listed if "size" in about]
            self.answer(200, listed)
        elif what == "commits":
            about = {"authors": [], "date": "2024-01-01T00:00:00.000Z", "title": "A commit", "message": ""}
            self.answer(200, [{"id": name} | about for name in reversed(self.hub.repos[repo])])
        else:
            files = [{"rfilename": str(path.relative_to(folder))} for path in folder.rglob("*") if path.is_file()]
            self.answer(200, {"id": repo.split("/", 1)[1], "sha": commit, "private": False, "siblings": files})

    def file(self, kind: str | None, repo: str, revision: str, path: str) -> None:
        if not (found := self.folder((kind or "models/") + repo, revision)):
            return
        commit, folder = found
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not (folder / path).is_file():
            self.answer(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        body = (folder / path).read_bytes()
        about = entry(folder, folder / path)
        digest = about.get("lfs", about)["oid"]
        if "lfs" in about and self.headers["Host"].startswith("127.0.0.1"):
            # As the real hub does, which keeps large files on another host ...
            elsewhere = f"http://localhost:{self.server.server_port}{self.path}"
            headers |= {"Location": elsewhere, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body))}
            # ... and offers its Xet protocol for them; here no one speaks it.
            headers |= {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": f"{self.hub.url}/api/xet-read-token"}
            self.answer(302, {}, headers)
            return
        headers["ETag"] = f'"{digest}"'
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), int(asked[2] or len(body) - 1)
            if first >= len(body):
                self.answer(416, {"error": "Range not satisfiable"})
                return
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            body = body[first : last + 1]
        self.answer(206 if asked else 200, body, headers)

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
            self.silence()

    def silence(self) -> None:
        self.wfile.flush()
        self.hub.closing.wait()
        self.close_connection = True


def entry(folder: Path, path: Path) -> dict:
    """What the hub's listing says of one file or folder."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40}
    body = path.read_bytes()
    about = {"type": "file", "path": name, "size": len(body)}
    if path.suffix in LARGE:
        sha = hashlib.sha256(body).hexdigest()
        about |= {"lfs": {"oid": sha, "size": len(body), "pointerSize": 134}, "xetHash": sha}
        body = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(body)}\n".encode()
    about["oid"] = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    return about


def closed_port() -> int:
    """A port that refuses connections."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
