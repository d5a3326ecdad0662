"""`ccf-llm serve`: a loaded checkpoint on this machine, as the Space's page or as an API."""

import importlib.util
import os
import re
import signal
import socket
import sys
from typing import TYPE_CHECKING

from ccf_llm_hf.errors import InputError

if TYPE_CHECKING:
    from ccf_llm_hf.inference.ranker import CTRRanker
    from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
    from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor

PORTS = range(1, 65536)
NEEDED = {  # by extra
    "app": ("starlette", "uvicorn", "rapidfuzz"),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
}
TOKEN = "CCF_LLM_TOKEN"  # the environment variable


def check_can_serve(host: str, port: int, extra: str) -> None:
    """Refuse, before a model is loaded, what would fail after.

    Args:
        host, port: where to listen.
        extra: that of the package by which is served: `app` for the page, `serve` for the API.

    Raises:
        InputError: a package of the extra is not installed, or the port or host cannot be listened
            on.
    """
    for name in NEEDED[extra]:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f'serve needs {name}, which is missing: pip install "ccf-llm-hf[{extra}]"'
            )
    if port not in PORTS:
        raise InputError(f"--port {port} is not a port: give a number from 1 to {PORTS[-1]}")
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(f"--host {host} is no address of this machine: try 127.0.0.1") from error
    with socket.socket(address[0], socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address[4])
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(
                f"port {port} of {host} cannot be used ({reason}): choose another with --port"
            ) from error


def serve(model: "CCFLLMForCTR", processor: "CCFLLMProcessor", *, host: str, port: int) -> None:
    """Serve the page until interrupted (Ctrl-C).

    Args:
        model: a model in evaluation mode.
        processor: its processor.
        host: address to listen on; `0.0.0.0` lets other machines in.
        port: port to listen on.
    """
    from ccf_llm_hf.hub_cards.space.ccf_llm_space.recommender import Recommender
    from ccf_llm_hf.hub_cards.space.ccf_llm_space.server import serve_page
    from ccf_llm_hf.modeling.pipeline_ccf_llm import CTRRankingPipeline

    recommender = Recommender(CTRRankingPipeline(model=model, processor=processor))
    print(f"the page is at http://{host}:{port} (Ctrl-C stops it)", file=sys.stderr)
    serve_page(recommender, host, port)


def read_token() -> str | None:
    """The bearer token that the API asks for, from the environment; None where none is set.

    Raises:
        InputError: one that no header can carry.
    """
    token = os.environ.get(TOKEN)
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise InputError(
            f"{TOKEN} is empty or has other characters than letters, digits and signs: set it to "
            "a token, or unset it to ask for none"
        )
    return token


def serve_api(
    ranker: "CTRRanker",
    *,
    host: str,
    port: int,
    token: str | None = None,
    max_waiting: int,
    timeout: float,
) -> None:
    """Serve the API until SIGINT (Ctrl-C) or SIGTERM; what was accepted is answered first.

    Args:
        ranker: the model.
        host: address to listen on; `0.0.0.0` lets other machines in.
        port: port to listen on.
        token, max_waiting, timeout: see `build_api`.
    """
    import uvicorn

    from ccf_llm_hf.inference.api import build_api

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                print(f"the API is at http://{host}:{port} (Ctrl-C stops it)", file=sys.stderr)

    config = uvicorn.Config(
        build_api(ranker, token=token, max_waiting=max_waiting, timeout=timeout),
        host=host,
        port=port,
        log_config=None,
        log_level="warning",
        access_log=False,  # the API writes lines of its own
        server_header=False,
        # Each request ends by itself; a client that stops in the middle of its body does not.
        timeout_graceful_shutdown=int(timeout) + 5,
    )
    # uvicorn raises the signal that stopped it again, for what was there before: nothing.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    Server(config).run()
