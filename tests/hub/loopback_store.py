"""What the loopback Hub keeps: users, tokens and their scopes, repositories with their commits."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

WRITERS = ("write", "contributor", "admin")
KINDS = ("model", "dataset", "space")


class HubError(Exception):
    """An answer other than 2xx, with the codes that huggingface_hub reads."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if code:
            self.headers |= {"X-Error-Code": code, "X-Error-Message": message}


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class File:
    """One file of a commit; large ones are kept by their sha256."""

    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob_id(self) -> str:
        """Git's id: of a large file, that of its pointer."""
        if not self.lfs:
            return git_oid(self.data)
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
            f"size {len(self.data)}\n"
        )
        return git_oid(pointer.encode())

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    author: str
    date: str
    files: dict[str, File]


@dataclass
class Repo:
    """A repository: commits by id, and branches and tags that point at them."""

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def prefix(self) -> str:
        """Of the repository's web addresses."""
        return "" if self.kind == "model" else f"{self.kind}s/"

    def commit_at(self, revision: str) -> Commit:
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        oid = self.branches.get(name) or self.tags.get(name) or revision
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def add_commit(self, branch: str, title: str, author: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        content = "".join(f"{path} {file.etag}\n" for path, file in sorted(files.items()))
        seed = f"{len(self.commits)}{parent}{title}{content}"
        commit = Commit(
            oid=hashlib.sha1(seed.encode()).hexdigest(),
            parent=parent,
            title=title,
            author=author,
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            files=files,
        )
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def history(self, revision: str) -> list[Commit]:
        """Commits from `revision` back to the first."""
        commit: Commit | None = self.commit_at(revision)
        found = []
        while commit is not None:
            found.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return found


@dataclass(frozen=True)
class Token:
    """Whose it is, whether it may write, and the namespaces it is limited to (None: all)."""

    user: str
    role: str = "write"
    namespaces: frozenset[str] | None = None


class Store:
    """The Hub's state. Readers and writers hold `lock`."""

    def __init__(self) -> None:
        self.users: dict[str, dict[str, str]] = {}
        self.tokens: dict[str, Token] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.lock = threading.RLock()

    def add_user(self, name: str, **orgs: str) -> None:
        """Add a user with a role ("read", "contributor", "write", "admin") in some orgs."""
        self.users[name] = orgs

    def add_token(
        self, token: str, user: str, role: str = "write", namespaces: Iterable[str] | None = None
    ) -> str:
        limits = None if namespaces is None else frozenset(namespaces)
        self.tokens[token] = Token(user, role, limits)
        return token

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        """A repository as a test looks at it, whoever may read it."""
        return self.repos[kind, repo_id]

    def token(self, authorization: str | None) -> Token | None:
        if authorization is None:
            return None
        token = self.tokens.get(authorization.removeprefix("Bearer "))
        if token is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return token

    def is_member(self, token: Token | None, namespace: str) -> bool:
        if token is None or (token.namespaces is not None and namespace not in token.namespaces):
            return False
        return namespace == token.user or namespace in self.users[token.user]

    def may_write(self, token: Token | None, namespace: str) -> bool:
        if token is None or token.role != "write" or not self.is_member(token, namespace):
            return False
        return namespace == token.user or self.users[token.user][namespace] in WRITERS

    def readable(self, kind: str, repo_id: str, token: Token | None, content: bool = False) -> Repo:
        """The repository, for its metadata or (`content`) its files, if the token allows it."""
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.private and not self.is_member(token, repo.namespace)):
            if token is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if content and repo.gated and not self.is_member(token, repo.namespace):
            if token is None:
                message = f"Access to {kind} {repo_id} is restricted. You must be authenticated."
                raise HubError(401, message, "GatedRepo")
            if token.user not in repo.granted:
                message = f"Access to {kind} {repo_id} is restricted. Ask for access first."
                raise HubError(403, message, "GatedRepo")
        return repo

    def writable(self, kind: str, repo_id: str, token: Token | None) -> Repo:
        repo = self.readable(kind, repo_id, token)
        if not self.may_write(token, repo.namespace):
            status, message = (
                (401, "Invalid username or password.")
                if token is None
                else (403, "You don't have the rights to write to this repository")
            )
            raise HubError(status, message)
        return repo

    def create(self, kind: str, repo_id: str, private: bool, token: Token | None) -> Repo:
        """A new repository with its first commit, as the Hub makes it."""
        namespace = repo_id.split("/")[0]
        if token is None:
            raise HubError(401, "Invalid username or password.")
        if not self.may_write(token, namespace):
            raise HubError(
                403,
                f"You don't have the rights to create a {kind} under the namespace {namespace!r}",
            )
        if (kind, repo_id) in self.repos:
            raise HubError(409, f"You already created this {kind} repo: {repo_id}")
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        repo.add_commit("main", "initial commit", token.user, {".gitattributes": File(attributes)})
        return repo
