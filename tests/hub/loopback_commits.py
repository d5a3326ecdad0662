"""How the loopback Hub takes files in: large ones by LFS, all of them by commits."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from hub.loopback_messages import API, REVISION, WEB, Answer, Request, Route, json_answer
from hub.loopback_resolve import content
from hub.loopback_store import File, HubError, Store, Token

if TYPE_CHECKING:
    from hub.loopback import LoopbackHub

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".npy", ".png", ".zip", ".model")
LFS_SIZE = 10 << 20


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
    more = {}
    if "create_pr" in request.query:
        number = 1 + sum(name.startswith("refs/pr/") for name in found.branches)
        more["pullRequestUrl"] = f"{hub.url}/{found.prefix}{repo}/discussions/{number}"
        start, revision = found.branches[revision], f"refs/pr/{number}"
        found.branches[revision] = start
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
    return json_answer({"success": True, "commitOid": commit.oid, "commitUrl": url, **more})


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


ROUTES: list[Route] = [
    ("POST", rf"{API}/preupload/{REVISION}", preupload),
    ("POST", rf"{API}/commit/{REVISION}", commit_files),
    ("POST", rf"{WEB}\.git/info/lfs/objects/batch", lfs_batch),
    ("GET|HEAD|PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", lfs_object),
    ("POST", r"/_lfs/(?P<oid>[0-9a-f]{64})/verify", lfs_verify),
]
