"""Requests to the loopback Hub, its answers, and the form of a route between them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hub.loopback_store import KINDS

API = rf"/api/(?P<kind>{'|'.join(KINDS)})s/(?P<repo>[^/]+/[^/]+)"
WEB = r"/(?P<kind>datasets/|spaces/)?(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+|refs/[^/]+/[^/]+)"


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


# Methods, a pattern of the path, and who answers: (hub, request, token, **groups of the pattern).
Route = tuple[str, str, Callable[..., Answer]]
