"""The service: a checkpoint behind HTTP, by `ccf-llm serve --api`."""

import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Body as BodyOf
from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic_core import from_json
from starlette.exceptions import HTTPException as StarletteHTTPException

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.inference.batching import Batcher, Overloaded
from ccf_llm_hf.inference.bodies import (
    Body,
    Health,
    Prediction,
    Problem,
    Ranking,
    make_bodies,
    make_examples,
    write_sentence,
)
from ccf_llm_hf.inference.explanation import Explanation
from ccf_llm_hf.inference.guard import MAX_BODY, Guard, Measurements, print_line, refuse
from ccf_llm_hf.inference.ranker import CTRRanker
from ccf_llm_hf.version import __version__

MAX_WAITING = 64
TIMEOUT = 30.0  # seconds
MAX_BATCH = 8  # our choice: more share a pass rarely, and let the first wait
ROUTES = ("/rank", "/predict", "/explain", "/health", "/metrics", "/openapi.json")
ANSWERS: tuple[Any, ...] = (Ranking, Prediction, Explanation)  # of the first three

PROBLEMS: dict[int | str, dict[str, Any]] = {
    413: {"model": Problem, "description": f"The body has more than {MAX_BODY} bytes."},
    422: {"model": Problem, "description": "The body is not what this model reads."},
    429: {
        "model": Problem,
        "description": "Too many requests wait.",
        "headers": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
    },
    504: {"model": Problem, "description": "There was no answer in time."},
}
NO_TOKEN: dict[int | str, dict[str, Any]] = {
    401: {
        "description": "The token is missing or wrong.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
}


class StrictRequest(Request):
    """A request whose JSON is JSON: UTF-8, without NaN, halves of letters or bottomless lists."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


class StrictRoute(APIRoute):
    """A route of such requests."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strictly


def build_api(
    ranker: CTRRanker,
    *,
    token: str | None = None,
    max_waiting: int = MAX_WAITING,
    timeout: float = TIMEOUT,
    log: Callable[[dict[str, Any]], None] = print_line,
) -> FastAPI:
    """The service as an ASGI application: `/rank`, `/predict`, `/explain`, `/health`, `/metrics`.

    Requests that wait together share forward passes; the model runs in one thread. While it serves
    the package warns of nothing, since its warnings quote users and items: answers name those that
    the model does not know.

    Args:
        ranker: the model. Nothing else may use it meanwhile.
        token: a bearer token that every route but `/health` asks for; None: none.
        max_waiting: requests that wait at most; more are answered 429.
        timeout: seconds after which a request is answered 504.
        log: takes a line per request, as a dict.
    """

    def answer(bodies: Sequence[Body]) -> list[Any]:
        return type(bodies[0]).answer(ranker, bodies)

    measurements = Measurements(lambda: batcher.waiting, MAX_BATCH)
    batcher = Batcher(
        answer,
        max_waiting=max_waiting,
        max_batch=MAX_BATCH,
        timeout=timeout,
        on_batch=measurements.batch_size.observe,
    )

    @asynccontextmanager
    async def run_batcher(_: FastAPI) -> AsyncIterator[None]:
        package = logging.getLogger("ccf_llm_hf")
        before = package.level
        package.setLevel(logging.ERROR)
        with batcher:
            yield
        package.setLevel(before)

    async def shed(_: Request, error: Any) -> Response:
        measurements.rejected.inc()
        return refuse(429, str(error), {"Retry-After": str(error.retry_after)})

    async def be_late(_: Request, error: Any) -> Response:
        return refuse(504, f"there was no answer in {timeout:g} seconds: ask for less, or later")

    app = FastAPI(
        title="CCF-LLM",
        version=__version__,
        lifespan=run_batcher,
        docs_url=None,  # its page takes scripts from elsewhere
        redoc_url=None,
        exception_handlers={
            RequestValidationError: _refuse_body,
            InputError: _refuse_input,
            StarletteHTTPException: _refuse_http,
            Overloaded: shed,
            TimeoutError: be_late,
        },
    )
    app.router.route_class = StrictRoute
    app.add_middleware(Guard, routes=ROUTES, measurements=measurements, token=token, log=log)
    # The guard looks at the token; this only has the schema tell of it.
    secured: dict[str, Any] = {}
    if token:
        secured = {"dependencies": [Security(HTTPBearer(auto_error=False))], "responses": NO_TOKEN}
    asked: dict[str, Any] = secured | {"responses": PROBLEMS | secured.get("responses", {})}
    bodies, examples = make_bodies(ranker.processor), make_examples(ranker.processor)
    for route, body, example, result in zip(ROUTES, bodies, examples, ANSWERS, strict=False):
        named: Any = {name: {"value": value} for name, value in example.items()}
        app.add_api_route(
            route,
            _ask(batcher, Annotated[body, BodyOf(openapi_examples=named)]),
            methods=["POST"],
            response_model=result,
            name=route[1:],
            description=body.__doc__,
            **asked,
        )

    @app.get("/health")
    async def health() -> Health:
        """Whether the service takes requests; asked without a token."""
        return Health(status="ok", version=__version__)

    @app.get("/metrics", response_class=PlainTextResponse, **secured)
    async def metrics() -> Response:
        """Measurements for Prometheus."""
        return Response(generate_latest(measurements.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _ask(batcher: Batcher, body_type: Any) -> Callable[[Any], Any]:
    async def ask(body: Any) -> Any:
        return await batcher.ask(body.key, body)

    ask.__annotations__["body"] = body_type  # the model of this checkpoint's bodies
    return ask


async def _refuse_body(_: Request, error: Any) -> Response:
    return refuse(422, write_sentence(error.errors()))


async def _refuse_input(_: Request, error: Any) -> Response:
    return refuse(422, " ".join(str(error).split()))


async def _refuse_http(_: Request, error: Any) -> Response:
    return refuse(error.status_code, f"{error.detail}: see /openapi.json", error.headers)
