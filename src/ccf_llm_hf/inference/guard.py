"""Around every request to the service: token, size, measurements, and a line in the log."""

import hmac
import json
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Any

from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 1 << 20  # bytes: thousands of titles
OPEN = "/health"  # asked without a token
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Measurements:
    """What Prometheus reads. The counts of a service are its own, not the process's."""

    def __init__(self, waiting: Callable[[], float], max_batch: int) -> None:
        self.registry = CollectorRegistry()
        own: Any = {"namespace": "ccf_llm", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered.", ["route", "status"], **own)
        self.seconds = Histogram(
            "request_seconds", "Seconds to the answer.", ["route"], buckets=SECONDS, **own
        )
        self.rejected = Counter("rejected", "Requests shed since the queue was full.", **own)
        self.batch_size = Histogram(
            "batch_size",
            "Requests of one call of the model.",
            buckets=range(1, max_batch + 1),
            **own,
        )
        Gauge("waiting", "Requests that wait for the model.", **own).set_function(waiting)
        ProcessCollector(registry=self.registry)


def print_line(line: dict[str, Any]) -> None:
    """One line of JSON on stderr."""
    print(json.dumps(line), file=sys.stderr, flush=True)


class Guard:
    """ASGI middleware around the routes.

    A line of the log says what became of a request, and nothing of what it said: no header, query
    or body, and of an exception its type and place without its words, which may quote these.

    Args:
        app: what to guard.
        routes: paths that are counted by name.
        measurements: to count in.
        token: what an `Authorization: Bearer` header must hold, but for `/health`; None: nothing.
        log: takes each line.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: tuple[str, ...],
        measurements: Measurements,
        token: str | None,
        log: Callable[[dict[str, Any]], None],
    ) -> None:
        self.app, self.routes, self.measurements = app, routes, measurements
        self.expected = token and f"Bearer {token}".encode()
        self.log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        route = scope["path"] if scope["path"] in self.routes else "other"
        line: dict[str, Any] = {"request": uuid.uuid4().hex, "route": route, "status": None}

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                line["status"] = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = line["request"]
            await send(message)

        try:
            refusal, read = await self.admit(scope, receive)
            await (refusal or self.app)(scope, read, answer)
        except Exception as error:
            where = [
                f"{at.filename}:{at.lineno}" for at in traceback.extract_tb(error.__traceback__)
            ]
            line |= {"error": type(error).__name__, "where": where}
            if line["status"] is None:
                failure = refuse(500, "the service failed: its log tells where, by X-Request-ID")
                await failure(scope, receive, answer)
        seconds = time.perf_counter() - started
        self.measurements.requests.labels(route, line["status"]).inc()
        self.measurements.seconds.labels(route).observe(seconds)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.log({"time": stamp, **line, "milliseconds": round(1000 * seconds, 1)})

    async def admit(self, scope: Scope, receive: Receive) -> tuple[JSONResponse | None, Receive]:
        """The answer to a request that is not let in, else None; and its body, read."""
        headers = Headers(scope=scope)
        if self.expected and scope["path"] != OPEN:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self.expected):
                why = "give the token of this service: Authorization: Bearer TOKEN"
                return refuse(401, why, {"WWW-Authenticate": "Bearer"}), receive
        too_long = refuse(413, f"a body has at most {MAX_BODY} bytes", {"Connection": "close"})
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > MAX_BODY:
            return too_long, receive
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY:
                return too_long, receive
        messages = iter([{"type": "http.request", "body": bytes(body)}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        return None, replay


def refuse(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An answer that says why there is none."""
    return JSONResponse({"detail": detail}, status, headers)
