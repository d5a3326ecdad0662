"""A Hub on 127.0.0.1 that huggingface_hub, transformers, datasets and peft talk to unmodified.

    with LoopbackHub() as hub:
        hub.store.add_user("ada", acme="write")
        hub.store.add_token("hf_write", "ada")
        subprocess.run(..., env=os.environ | hub.environment(tmp_path, token="hf_write"))

It answers what huggingface_hub 2.4 calls without Xet (HF_HUB_DISABLE_XET=1), keeps everything in
memory, writes down every request in `hub.requests`, and misbehaves on demand (`hub.inject`).
"""

from __future__ import annotations

import base64
import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub.loopback_store import KINDS, Commit, File, HubError, Repo, Store, Token

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".npy", ".png", ".zip", ".model")
LFS_SIZE = 10 << 20


@dataclass
class Fault:
    """What goes wrong, and when.

    Args:
        kind: `error` (500), `busy` (429 with Retry-After), `drop` (the connection closes before the
            request is acted on), `lose` (it closes after that: the answer is lost), `slow` (the
            body stops halfway for `pause` seconds), `cut` (the connection closes halfway).
        at: the first request it strikes, counted from 1 from `inject` on.
        times: how many requests it strikes in a row; None for all that follow.
        path: strike only requests whose path contains this.
        pause: seconds.
        retry_after: seconds.
    """

    kind: Literal["error", "busy", "drop", "lose", "slow", "cut"]
    at: int = 1
    times: int | None = 1
    path: str = ""
    pause: float = 1.0
    retry_after: int = 1


@dataclass
class Request:
    method: str
    path: str
    token: str | None
    headers: dict[str, str]
    status: int | None = None
    body: bytes = b""

    def header(self, name: str) -> str | None:
        return {key.lower(): value for key, value in self.headers.items()}.get(name.lower())

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] | None = None


def json_answer(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(
        json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers}
    )


class QuietServer(ThreadingHTTPServer):
    """One thread a connection; a client that hangs up is no news."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), (ConnectionError, ValueError)):
            super().handle_error(request, client_address)


class LoopbackHub:
    """The server, its state and its faults. Use it as a context manager."""

    def __init__(self) -> None:
        self.store = Store()
        self.requests: list[Request] = []
        self._fault: Fault | None = None
        self._seen = 0
        self._lock = threading.Lock()
        handler = type("Handler", (HubHandler,), {"hub": self})
        self._server = QuietServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Large files come from another host, as from the Hub's CDN: no token may go there.
        self.cdn = f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def inject(self, fault: Fault | None) -> None:
        """Arm a fault, or with None none; counting starts anew, and so does `requests`."""
        with self._lock:
            self._fault, self._seen = fault, 0
            self.requests.clear()

    def strikes(self, request: Request) -> Fault | None:
        """Write a request down; the fault that strikes it, if any."""
        with self._lock:
            self.requests.append(request)
            fault = self._fault
            if fault is None or fault.path not in request.path:
                return None
            self._seen += 1
            last = float("inf") if fault.times is None else fault.at + fault.times - 1
            return fault if fault.at <= self._seen <= last else None

    def environment(
        self, home: Path, token: str | None = None, offline: bool = False, **more: str
    ) -> dict[str, str]:
        """Variables under which a subprocess uses this Hub, with a cache of its own in `home`."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return variables | more


class HubHandler(BaseHTTPRequestHandler):
    """One connection: reads requests whole, lets faults strike, finds the route."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer with a body takes 40 ms
    hub: LoopbackHub

    def log_message(self, *_: Any) -> None:
        """The hub's `requests` are the log."""

    def serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.read_chunks() if self.headers.get("Transfer-Encoding") else b""
        body = body or self.rfile.read(length)
        request = Request(
            self.command,
            self.path,
            self.headers.get("Authorization"),
            dict(self.headers.items()),
            body=body,
        )
        fault = self.hub.strikes(request)
        kind = fault.kind if fault else None
        if kind == "drop":
            return self.hang_up()
        if kind == "error":
            page = b"<html>Internal Error - We're working hard to fix this as soon as possible!"
            answer = Answer(page, 500, {"Content-Type": "text/html"})
        elif kind == "busy":
            assert fault is not None
            wait = {"Retry-After": str(fault.retry_after)}
            answer = json_answer({"error": "Too many requests"}, 429, **wait)
        else:
            answer = self.answer(request)
        request.status = answer.status
        if kind == "lose":
            return self.hang_up()
        self.send(answer, fault)
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def read_chunks(self) -> bytes:
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, request: Request) -> Answer:
        try:
            with self.hub.store.lock:
                token = self.hub.store.token(request.token)
                return route(self.hub, request, token)
        except HubError as error:
            return json_answer({"error": error.message}, error.status, **error.headers)

    def send(self, answer: Answer, fault: Fault | None) -> None:
        self.send_response(answer.status)
        for name, value in (answer.headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (answer.headers or {}):
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(answer.body) // 2
        self.wfile.write(answer.body[:half])
        if fault and fault.kind in ("slow", "cut"):
            self.wfile.flush()
            if fault.kind == "cut":
                return self.hang_up()
            threading.Event().wait(fault.pause)  # a test may have replaced time.sleep
        self.wfile.write(answer.body[half:])


def route(hub: LoopbackHub, request: Request, token: Token | None) -> Answer:
    """Find who answers a request."""
    path = urlsplit(request.path).path
    for method, pattern, respond in ROUTES:
        match = re.fullmatch(pattern, path)
        if match and request.method in method.split("|"):
            parts = {name: unquote(value or "") for name, value in match.groupdict().items()}
            return respond(hub, request, token, **parts)
    raise HubError(404, f"Sorry, we can't find the page you are looking for: {path}")


def whoami(hub: LoopbackHub, request: Request, token: Token | None) -> Answer:
    if token is None:
        raise HubError(401, "Invalid username or password.")
    return json_answer(
        {
            "type": "user",
            "name": token.user,
            "orgs": [
                {"type": "org", "name": org, "roleInOrg": role}
                for org, role in hub.store.users[token.user].items()
            ],
            "auth": {"type": "access_token", "accessToken": {"role": token.role}},
        }
    )


def repo_name(request: Request, token: Token | None) -> tuple[str, str]:
    """Kind and id that a create or delete request names; the default owner is the user."""
    body = request.json
    if token is None:
        raise HubError(401, "Invalid username or password.")
    return body.get("type") or "model", f"{body.get('organization') or token.user}/{body['name']}"


def create_repo(hub: LoopbackHub, request: Request, token: Token | None) -> Answer:
    kind, repo_id = repo_name(request, token)
    private = request.json.get("visibility") == "private" or bool(request.json.get("private"))
    try:
        repo = hub.store.create(kind, repo_id, private, token)
    except HubError as error:
        if error.status != 409:
            raise
        url = f"{hub.url}/{hub.store.repo(repo_id, kind).prefix}{repo_id}"
        return json_answer({"error": error.message, "url": url}, 409)
    return json_answer({"url": f"{hub.url}/{repo.prefix}{repo_id}", "name": repo_id})


def delete_repo(hub: LoopbackHub, request: Request, token: Token | None) -> Answer:
    kind, repo_id = repo_name(request, token)
    hub.store.writable(kind, repo_id, token)
    del hub.store.repos[kind, repo_id]
    return json_answer({})


def validate_yaml(hub: LoopbackHub, request: Request, token: Token | None) -> Answer:
    """Errors where the header is no YAML mapping, a warning where there is none."""
    header = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", request.json["content"], re.DOTALL)
    if header is None:
        warning = {"message": "empty or missing yaml metadata in repo card"}
        return json_answer({"errors": [], "warnings": [warning]})
    try:
        valid = isinstance(yaml.safe_load(header[1]), dict)
        message = "metadata must be a mapping"
    except yaml.YAMLError as error:
        valid, message = False, str(error)
    errors = [] if valid else [{"message": message}]
    return json_answer({"errors": errors, "warnings": []}, 200 if valid else 400)


def repo_info(
    hub: LoopbackHub, request: Request, token: Token | None, kind: str, repo: str, revision: str
) -> Answer:
    found = hub.store.readable(kind, repo, token)
    commit = found.commit_at(revision or "main")
    info = {
        "_id": repo,
        "id": repo,
        "modelId": repo,
        "author": found.namespace,
        "sha": commit.oid,
        "lastModified": commit.date,
        "private": found.private,
        "gated": "auto" if found.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [
            {"rfilename": path}
            | ({"size": len(file.data), "blobId": file.blob_id} if "blobs" in request.query else {})
            for path, file in sorted(commit.files.items())
        ],
    }
    return json_answer(info)


def file_entry(path: str, file: File) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(file.data), "oid": file.blob_id}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}
    return entry


def folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}


def folders(commit: Commit) -> set[str]:
    return {
        str(parent)
        for path in commit.files
        for parent in PurePosixPath(path).parents
        if str(parent) != "."
    }


def with_last_commit(
    request: Request, commit: Commit, entries: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    wanted = request.query.get("expand") or parse_qs(request.body.decode()).get("expand") or [""]
    if wanted[0].lower() == "true":
        last = {"id": commit.oid, "title": commit.title, "date": commit.date}
        entries = [{**entry, "lastCommit": last} for entry in entries]
    return entries


def tree(
    hub: LoopbackHub,
    request: Request,
    token: Token | None,
    kind: str,
    repo: str,
    revision: str,
    path: str,
) -> Answer:
    commit = hub.store.readable(kind, repo, token, content=True).commit_at(revision)
    all_folders = folders(commit)
    if path and path not in all_folders:
        raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
    deep = request.query.get("recursive", [""])[0].lower() == "true"
    entries = [file_entry(name, file) for name, file in commit.files.items()]
    entries += [folder_entry(name) for name in all_folders]
    base = PurePosixPath(path or ".")

    def inside(name: str) -> bool:
        parents = PurePosixPath(name).parents
        return base in parents if deep else base == parents[0]

    found = sorted((e for e in entries if inside(e["path"])), key=lambda entry: entry["path"])
    return json_answer(with_last_commit(request, commit, found))


def paths_info(
    hub: LoopbackHub, request: Request, token: Token | None, kind: str, repo: str, revision: str
) -> Answer:
    commit = hub.store.readable(kind, repo, token, content=True).commit_at(revision)
    wanted = parse_qs(request.body.decode()).get("paths", [])
    found = [file_entry(path, commit.files[path]) for path in wanted if path in commit.files]
    found += [folder_entry(path) for path in wanted if path in folders(commit)]
    return json_answer(with_last_commit(request, commit, found))


def refs(hub: LoopbackHub, request: Request, token: Token | None, kind: str, repo: str) -> Answer:
    found = hub.store.readable(kind, repo, token)
    listing = {
        name: [
            {"name": key, "ref": f"refs/{ref}/{key}", "targetCommit": oid}
            for key, oid in points.items()
        ]
        for name, ref, points in (
            ("branches", "heads", found.branches),
            ("tags", "tags", found.tags),
        )
    }
    return json_answer({**listing, "converts": []})


def commits(
    hub: LoopbackHub, request: Request, token: Token | None, kind: str, repo: str, revision: str
) -> Answer:
    found = hub.store.readable(kind, repo, token).history(revision)
    return json_answer(
        [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": "",
                "date": commit.date,
                "authors": [{"user": commit.author}],
            }
            for commit in found
        ]
    )


def branch(
    hub: LoopbackHub, request: Request, token: Token | None, kind: str, repo: str, name: str
) -> Answer:
    found = hub.store.writable(kind, repo, token)
    if request.method == "DELETE":
        found.branches.pop(name, None)
        return json_answer({})
    if name in found.branches:
        raise HubError(409, "Reference already exists")
    found.branches[name] = found.commit_at(request.json.get("startingPoint") or "main").oid
    return json_answer({})


def tag(
    hub: LoopbackHub, request: Request, token: Token | None, kind: str, repo: str, revision: str
) -> Answer:
    found = hub.store.writable(kind, repo, token)
    name = request.json["tag"]
    if name in found.tags:
        raise HubError(409, "Reference already exists")
    found.tags[name] = found.commit_at(revision).oid
    return json_answer({})


def preupload(
    hub: LoopbackHub, request: Request, token: Token | None, kind: str, repo: str, revision: str
) -> Answer:
    commit = hub.store.writable(kind, repo, token).commit_at(revision)

    def mode(entry: dict[str, Any]) -> dict[str, Any]:
        path, old = entry["path"], commit.files.get(entry["path"])
        large = path.endswith(LFS_SUFFIXES) or entry["size"] > LFS_SIZE
        return {
            "path": path,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
            "oid": old.etag if old and old.lfs == large else None,
        }

    return json_answer({"files": [mode(entry) for entry in request.json["files"]]})


def lfs_batch(
    hub: LoopbackHub, request: Request, token: Token | None, kind: str, repo: str
) -> Answer:
    kind = kind.rstrip("s/") or "model"
    hub.store.writable(kind, repo, token)

    def instruct(entry: dict[str, Any]) -> dict[str, Any]:
        oid = entry["oid"]
        if oid in hub.store.objects:
            return {"oid": oid, "size": entry["size"]}
        actions = {
            "upload": {"href": f"{hub.url}/_lfs/{oid}"},
            "verify": {"href": f"{hub.url}/_lfs/{oid}/verify"},
        }
        return {"oid": oid, "size": entry["size"], "actions": actions}

    objects = [instruct(entry) for entry in request.json["objects"]]
    return json_answer({"transfer": "basic", "objects": objects})


def lfs_object(hub: LoopbackHub, request: Request, token: Token | None, oid: str) -> Answer:
    """The address is signed on the real Hub, so no token is asked for."""
    if request.method == "PUT":
        file = File(request.body)
        if file.sha256 != oid:
            raise HubError(400, "the content does not match its sha256")
        hub.store.objects[oid] = request.body
        return Answer()
    if oid not in hub.store.objects:
        raise HubError(404, "no such object")
    return content(request, hub.store.objects[oid], {"ETag": f'"{oid}"'})


def lfs_verify(hub: LoopbackHub, request: Request, token: Token | None, oid: str) -> Answer:
    size = len(hub.store.objects.get(oid, b""))
    if oid not in hub.store.objects or size != request.json["size"]:
        raise HubError(404, "the object was not uploaded")
    return json_answer({})


def commit_files(
    hub: LoopbackHub, request: Request, token: Token | None, kind: str, repo: str, revision: str
) -> Answer:
    """Apply a commit's lines to a copy of the branch's files: all of them, or none."""
    found = hub.store.writable(kind, repo, token)
    if revision not in found.branches:
        raise HubError(404, f"Invalid branch: {revision}", "RevisionNotFound")
    lines = [json.loads(line) for line in request.body.splitlines()]
    header = lines[0]["value"]
    if header.get("parentCommit") not in (None, found.branches[revision]):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(found.commit_at(revision).files)
    for line in lines[1:]:
        change_file(hub.store, files, line["key"], line["value"])
    assert token is not None
    commit = found.add_commit(revision, header["summary"], token.user, files)
    url = f"{hub.url}/{found.prefix}{repo}/commit/{commit.oid}"
    return json_answer({"success": True, "commitOid": commit.oid, "commitUrl": url})


def change_file(store: Store, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        files[path] = File(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if value["oid"] not in store.objects:
            raise HubError(400, f"{path} refers to an object that was never uploaded")
        files[path] = File(store.objects[value["oid"]], lfs=True)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
    elif key == "deletedFolder":
        for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
            del files[name]
    else:
        raise HubError(400, f"unknown operation {key}")


def resolve(
    hub: LoopbackHub,
    request: Request,
    token: Token | None,
    kind: str,
    repo: str,
    revision: str,
    path: str,
) -> Answer:
    kind = kind.rstrip("s/") or "model"
    found = hub.store.readable(kind, repo, token, content=True)
    commit = found.commit_at(revision)
    file = commit.files.get(path)
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"'}
    if not file.lfs:
        return content(request, file.data, headers)
    hub.store.objects.setdefault(file.sha256, file.data)
    linked = {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
    location = {"Location": f"{hub.cdn}/_lfs/{file.sha256}"}
    return Answer(b"", 302, headers | linked | location)


def content(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    """A file's bytes, or the part that the Range header asks for."""
    headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    wanted = request.header("Range")
    if wanted is None:
        length = {"Content-Length": str(len(data))}
        return Answer(b"" if request.method == "HEAD" else data, 200, headers | length)
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
    if match is None or not (match[1] or match[2]):
        raise HubError(400, f"bad range {wanted}")
    if match[1]:
        start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
    else:
        start, end = max(0, len(data) - int(match[2])), len(data) - 1
    if start >= len(data):
        raise HubError(416, "Range not satisfiable", Content_Range=f"bytes */{len(data)}")
    part = {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
    return Answer(data[start : end + 1], 206, headers | part)


API = rf"/api/(?P<kind>{'|'.join(KINDS)})s/(?P<repo>[^/]+/[^/]+)"
WEB = r"/(?P<kind>datasets/|spaces/)?(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+|refs/[^/]+/[^/]+)"
Route = tuple[str, str, Callable[..., Answer]]
ROUTES: list[Route] = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create_repo),
    ("DELETE", r"/api/repos/delete", delete_repo),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("GET", rf"{API}(?P<revision>)", repo_info),
    ("GET", rf"{API}/revision/{REVISION}", repo_info),
    ("GET", rf"{API}/tree/{REVISION}(?:/(?P<path>.+))?", tree),
    ("POST", rf"{API}/paths-info/{REVISION}", paths_info),
    ("GET", rf"{API}/refs", refs),
    ("GET", rf"{API}/commits/{REVISION}", commits),
    ("POST|DELETE", rf"{API}/branch/(?P<name>[^/]+)", branch),
    ("POST", rf"{API}/tag/{REVISION}", tag),
    ("POST", rf"{API}/preupload/{REVISION}", preupload),
    ("POST", rf"{API}/commit/{REVISION}", commit_files),
    ("POST", rf"{WEB}\.git/info/lfs/objects/batch", lfs_batch),
    ("GET|HEAD|PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", lfs_object),
    ("POST", r"/_lfs/(?P<oid>[0-9a-f]{64})/verify", lfs_verify),
    ("GET|HEAD", rf"{WEB}/resolve/{REVISION}/(?P<path>.+)", resolve),
]

__all__ = ["Fault", "LoopbackHub", "Repo"]
