"""How the loopback Hub gives files out, whole or in ranges."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hub.loopback_messages import REVISION, WEB, Answer, Request, Route
from hub.loopback_store import HubError, Token

if TYPE_CHECKING:
    from hub.loopback import LoopbackHub


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


ROUTES: list[Route] = [
    ("GET|HEAD", rf"{WEB}/resolve/{REVISION}/(?P<path>.+)", resolve),
]
