"""What the loopback Hub tells about users and repositories: files, commits, branches and tags."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import yaml
from hub.loopback_messages import API, REVISION, Answer, Request, Route, json_answer
from hub.loopback_store import Commit, File, HubError, Token

if TYPE_CHECKING:
    from hub.loopback import LoopbackHub


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


def check_write(
    hub: LoopbackHub, request: Request, token: Token | None, kind: str, repo: str
) -> Answer:
    hub.store.writable(kind, repo, token)
    return json_answer({})


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


ROUTES: list[Route] = [
    ("GET", r"/api/whoami-v2", whoami),
    ("GET", rf"{API}/auth-check/write", check_write),
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
]
