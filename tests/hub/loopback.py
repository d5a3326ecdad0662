"""A Hub on 127.0.0.1 that huggingface_hub, transformers, datasets and peft talk to unmodified.

    with LoopbackHub() as hub:
        hub.store.add_user("ada", acme="write")
        hub.store.add_token("hf_write", "ada")
        subprocess.run(..., env=os.environ | hub.environment(tmp_path, token="hf_write"))

It answers what huggingface_hub 2.4 calls without Xet (HF_HUB_DISABLE_XET=1), keeps everything in
memory, writes down every request in `hub.requests`, and misbehaves on demand (`hub.inject`).
"""

from __future__ import annotations

import re
import socket
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from hub import loopback_commits, loopback_repos, loopback_resolve
from hub.loopback_messages import Answer, Request, json_answer
from hub.loopback_store import HubError, Repo, Store, Token

ROUTES = [*loopback_repos.ROUTES, *loopback_commits.ROUTES, *loopback_resolve.ROUTES]


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


__all__ = ["Fault", "LoopbackHub", "Repo"]
