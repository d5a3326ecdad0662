"""What the page's server lets in: requests of bounded size, by the server's own name."""

import ipaddress
import os
import socket
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

MAX_BODY = 1 << 18  # bytes: thousands of titles


class Guard:
    """ASGI middleware: by which names the server may be asked, and how long a body may be.

    Args:
        app: what to guard.
        host: name or address that is served besides `localhost` and this machine's name.
            Addresses are let in, since a page elsewhere that turns its own name to this machine
            (DNS rebinding) asks by that name. A Space's names are the Hub's to check.
    """

    def __init__(self, app: Any, host: str | None = None) -> None:
        self.app = app
        self.names = {"localhost", socket.gethostname().lower(), (host or "localhost").lower()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refusal = self.refuse(scope) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def refuse(self, scope: Any) -> PlainTextResponse | None:
        """The answer to a request that is not let in; None for any other."""
        headers = Headers(scope=scope)
        if not os.environ.get("SPACE_ID") and not self.is_own(headers.get("host", "")):
            return PlainTextResponse("This server is not of that name.", 421)
        if "transfer-encoding" in headers:
            return PlainTextResponse("Say the length of the body.", 411)
        if int(headers.get("content-length", 0)) > MAX_BODY:
            return PlainTextResponse(f"A body has at most {MAX_BODY} bytes.", 413)
        return None

    def is_own(self, host: str) -> bool:
        """Whether a Host header names this server."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
            return name in self.names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False
