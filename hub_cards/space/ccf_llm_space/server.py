"""The page's server: the page itself, the search for titles, and the lists."""

import asyncio
import json
from pathlib import Path
from typing import Any, get_args

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from .guard import Guard
from .markup import results_html, status_line
from .recommender import MAX_PER_TOPIC, Recommender, Stage, clean_titles

HERE = Path(__file__).parent
FILES = {"/": "page.html", "/page.js": "page.js", "/style.css": "style.css"}
# Nothing from elsewhere, even if a title got past the escapes.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
)
MOST_TITLES = 1000  # of one visitor
STAGES: tuple[Stage, ...] = get_args(Stage)


def build_app(recommender: Recommender, host: str | None = None) -> Starlette:
    """The whole page of one model; nothing is scored before the first list is asked for.

    Args:
        recommender: the model.
        host: name or address that is served, besides this machine's own names.
    """
    page = Page(recommender)
    routes = [Route(path, _file(name)) for path, name in FILES.items()]
    routes += [
        Route("/start", page.start),
        Route("/search", page.search),
        Route("/rank", page.rank, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, host=host)])


def serve_page(recommender: Recommender, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page until interrupted."""
    import uvicorn

    uvicorn.run(build_app(recommender, host), host=host, port=port, log_level="warning")


def _file(name: str) -> Any:
    async def send(request: Request) -> Response:
        return FileResponse(HERE / name, headers={"Content-Security-Policy": POLICY})

    return send


class Page:
    """What the page asks for, as JSON."""

    def __init__(self, recommender: Recommender) -> None:
        self.recommender = recommender
        self.turn = asyncio.Lock()  # scoring takes all cores: one list at a time

    async def start(self, request: Request) -> Response:
        """What the controls say of this model, and examples to begin with."""
        recommender = self.recommender
        topics = " or ".join(recommender.topics)
        return JSONResponse(
            {
                "titles": len(recommender.titles),
                "has_cf": recommender.has_cf,
                "reads_dislikes": recommender.reads_dislikes,
                "vary": f"At most {MAX_PER_TOPIC} titles of one {topics}" if topics else "",
                "varied": recommender.has_choice,
                "examples": recommender.examples,
            }
        )

    async def search(self, request: Request) -> Response:
        """Titles that a text may mean, and whether one of them is the text itself."""
        text = " ".join(request.query_params.get("q", "").split())[:200]
        search = self.recommender.search
        found = await run_in_threadpool(search.find, text)
        return JSONResponse({"titles": found, "same": search.same(text)})

    async def rank(self, request: Request) -> Response:
        """A list: `first` of what the CF model says, `read` by the language model, and `why`."""
        try:
            asked = Asked.read(await request.body())
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)
        async with self.turn:
            if await request.is_disconnected():  # a later change has been asked for
                return Response(status_code=204)
            return JSONResponse(await run_in_threadpool(self.show, asked))

    def show(self, asked: "Asked") -> dict[str, Any]:
        """Status, titles and markup of a list; `last` where no further stage is to come."""
        recommender = self.recommender
        stage = asked.stage
        if stage == "first" and not recommender.ranks_at_once(asked.liked):
            stage = "read"
        reads = recommender.reads_dislikes
        options: dict[str, Any] = {"blank": asked.blank}
        if reads:
            options["disliked"] = asked.disliked
        left_out = [] if reads else asked.disliked
        places = recommender.rank(
            asked.liked, left_out, varied=asked.varied, stage=stage, **options
        )
        status = status_line(
            len(places), len(asked.liked), len(asked.disliked), asked.blank, reads, stage
        )
        if not places:
            return {"status": status, "html": "", "titles": [], "stage": "why"}
        pieces = []
        if stage == "why":
            pieces = recommender.prompt(asked.liked, places[0].title, **options)
        html = results_html(
            places, pieces, recommender.model.config, recommender.processor.uses_slots
        )
        titles = [place.title for place in places]
        return {"status": status, "html": html, "titles": titles, "stage": stage}


class Asked:
    """A visitor's request for a list, checked."""

    def __init__(
        self, liked: list[str], disliked: list[str], blank: bool, varied: bool, stage: Stage
    ) -> None:
        self.liked, self.disliked = liked, disliked
        self.blank, self.varied, self.stage = blank, varied, stage

    @classmethod
    def read(cls, body: bytes) -> "Asked":
        """Of JSON.

        Raises:
            ValueError: it is not what the page sends.
        """
        try:
            values = json.loads(body)
            liked, disliked = (clean_titles(values.get(key)) for key in ("liked", "disliked"))
            stage = values.get("stage", "why")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError("The body is not what the page sends.") from error
        if stage not in STAGES or len(liked) + len(disliked) > MOST_TITLES:
            raise ValueError(f"There are {len(STAGES)} stages and at most {MOST_TITLES} titles.")
        return cls(liked, disliked, bool(values.get("blank")), bool(values.get("varied")), stage)
