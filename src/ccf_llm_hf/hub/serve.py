"""`ccf-llm serve`: the Space's page over a loaded checkpoint, on this machine."""

import importlib.util
import socket
import sys
from typing import TYPE_CHECKING

from ccf_llm_hf.errors import InputError

if TYPE_CHECKING:
    from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
    from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor

PORTS = range(1, 65536)
NEEDED = ("starlette", "uvicorn", "rapidfuzz")


def check_can_serve(host: str, port: int) -> None:
    """Refuse, before a model is loaded, what would fail after.

    Raises:
        InputError: a package is not installed, or the port or host cannot be listened on.
    """
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f'serve needs {package}, which is missing: pip install "ccf-llm-hf[app]"'
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
