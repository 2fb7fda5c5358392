"""A Hub on loopback: what `huggingface_hub` needs to create, upload (LFS), commit, list and download, over real HTTP.

It keeps everything in memory, checks what it is given (hashes, sizes, the token) and can be told to fail:
`hub.fail(kind, how, times)` with kind one of the first words below and how "500", "401" or "drop".

    create     POST /api/repos/create
    yaml       POST /api/validate-yaml
    preupload  POST /api/models/{repo}/preupload/{revision}
    batch      POST /{repo}.git/info/lfs/objects/batch
    put        PUT  /lfs/{oid}
    verify     POST /lfs-verify
    commit     POST /api/models/{repo}/commit/{revision}
    info       GET  /api/models/{repo}[/revision/{revision}]
    tree       GET  /api/models/{repo}/tree/{revision}[/{path}]
    resolve    HEAD, GET /{repo}/resolve/{revision}/{path}
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("create", "POST", r"/api/repos/create"),
    ("yaml", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)"),
    ("batch", "POST", rf"/{_REPO}\.git/info/lfs/objects/batch"),
    ("put", "PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"),
    ("verify", "POST", r"/lfs-verify"),
    ("commit", "POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)"),
    ("tree", "GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?"),
    ("info", "GET", rf"/api/models/{_REPO}(?:/revision/(?P<revision>[^/]+))?"),
    ("resolve", "HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    ("resolve", "GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
]
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".arrow")


class Hub:
    """The server and everything it was given; use it as a context manager."""

    def __init__(self, token: str):
        self.token = token
        self.objects: dict[str, bytes] = {}  # LFS objects that were PUT, by sha256
        self.verified: set[str] = set()
        self.commits: dict[str, list[dict[str, Any]]] = {}  # repository -> [{message, oid, files: path -> bytes}]
        self.requests: Counter = Counter()  # how often each kind was asked for
        self.problems: list[str] = []  # what a client did wrong
        self._failures: dict[str, list[str]] = {}
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, kind: str, how: str, times: int = 1) -> None:
        """Let the next `times` requests of a kind fail: "500", "401", or "drop" (the connection is cut)."""
        with self._lock:
            self._failures[kind] = [how] * times

    def work_again(self) -> None:
        with self._lock:
            self._failures.clear()

    def next_failure(self, kind: str) -> str | None:
        with self._lock:
            self.requests[kind] += 1
            waiting = self._failures.get(kind)
            return waiting.pop() if waiting else None

    def files(self, repo: str, commit: int = -1) -> dict[str, bytes]:
        """The files of a repository after a commit (by default the last)."""
        return self.commits[repo][commit]["files"] if self.commits.get(repo) else {}

    def messages(self, repo: str) -> list[str]:
        return [commit["message"] for commit in self.commits.get(repo, [])]

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> str:
        with self._lock:
            files = dict(self.files(repo))
            message = ""
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    message = value["summary"]
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.verified:
                        self.problems.append(f"{value['path']} was committed before it was verified")
                    files[value["path"]] = self.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    files.pop(value["path"], None)
                elif line["key"] == "deletedFolder":
                    files = {path: data for path, data in files.items() if not path.startswith(value["path"])}
                else:
                    self.problems.append(f"unknown operation {line['key']}")
            # Another one in each run: clients cache what they download under it.
            oid = hashlib.sha1(f"{self.url}{time.time_ns()}{repo}{len(self.commits[repo])}".encode()).hexdigest()
            self.commits[repo].append({"message": message, "oid": oid, "files": files})
            return oid

    def oid(self, repo: str) -> str:
        return self.commits[repo][-1]["oid"] if self.commits.get(repo) else "0" * 40


def entry_oid(path: str, data: bytes) -> str:
    """The identifier that git (or LFS) gives to a file."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        for kind, method, pattern in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                failure = self.hub.next_failure(kind)
                if failure == "drop":
                    self.close_connection = True
                    self.connection.close()
                elif failure:
                    self._send(
                        {"error": {"500": "Internal Error", "401": "Invalid credentials"}[failure]}, int(failure)
                    )
                elif self._is_allowed(kind):
                    getattr(self, f"_{kind}")(body, **match.groupdict())
                return
        if path.startswith("/api/telemetry"):
            self._send({})
        else:
            self.hub.requests[f"{self.command} {path}"] += 1
            self._send({"error": "Not Found"}, 404, {"X-Error-Code": "EntryNotFound"})

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _is_allowed(self, kind: str) -> bool:
        writes = kind in {"create", "preupload", "batch", "verify", "commit"}
        if writes and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._send({"error": "Invalid username or password."}, 401)
            return False
        return True

    def _send(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send_bytes(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _exists(self, repo: str) -> bool:
        if repo in self.hub.commits:
            return True
        self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return False

    # One method per kind of request

    def _create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        exists = repo in self.hub.commits
        self.hub.commits.setdefault(repo, [])
        self._send({"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}, 409 if exists else 200)

    def _yaml(self, body: bytes) -> None:
        self._send({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        if not self._exists(repo):
            return
        files = self.hub.files(repo)
        self._send(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                        "shouldIgnore": False,
                        "oid": entry_oid(file["path"], files[file["path"]]) if file["path"] in files else None,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def _batch(self, body: bytes, repo: str) -> None:
        answer = []
        for wanted in json.loads(body)["objects"]:
            answer.append(dict(wanted))
            if wanted["oid"] not in self.hub.verified:
                answer[-1]["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs-verify"},
                }
        self._send({"transfer": "basic", "objects": answer})

    def _put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.hub.problems.append(f"the content of {oid} does not hash to it")
            self._send({"error": "wrong hash"}, 400)
            return
        self.hub.objects[oid] = body
        self._send({})

    def _verify(self, body: bytes) -> None:
        claim = json.loads(body)
        if len(self.hub.objects.get(claim["oid"], b"")) != claim["size"]:
            self.hub.problems.append(f"{claim['oid']} was verified with a wrong size")
            self._send({"error": "wrong size"}, 400)
            return
        self.hub.verified.add(claim["oid"])
        self._send({})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        if not self._exists(repo):
            return
        oid = self.hub.commit(repo, [json.loads(line) for line in body.splitlines() if line.strip()])
        self._send(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "hookOutput": ""}
        )

    def _info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        if not self._exists(repo):
            return
        siblings = [{"rfilename": path} for path in self.hub.files(repo)]
        self._send(
            {"id": repo, "modelId": repo, "sha": self.hub.oid(repo), "tags": [], "siblings": siblings, "private": False}
        )

    def _tree(self, body: bytes, repo: str, revision: str, path: str | None = None) -> None:
        if not self._exists(repo):
            return
        files = {name: data for name, data in self.hub.files(repo).items() if name.startswith(path or "")}
        if path and not files:
            self._send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        self._send(
            [
                {"type": "file", "path": name, "size": len(data), "oid": entry_oid(name, data)}
                for name, data in sorted(files.items())
            ]
        )

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        if not self._exists(repo):
            return
        data = self.hub.files(repo).get(path)
        if data is None:
            commit = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.hub.oid(repo)}
            self._send({"error": "Entry not found"}, 404, commit)
            return
        headers = {"ETag": f'"{entry_oid(path, data)}"', "X-Repo-Commit": self.hub.oid(repo), "Accept-Ranges": "none"}
        self._send_bytes(data, 200, headers)
