"""What the page's server lets in."""

import asyncio
import json
from typing import Any

import pytest
from hub.space_checkpoint import TITLES, build_space_checkpoint

pytest.importorskip("starlette", reason="the page's server is not installed: pip install '.[app]'")

from starlette.testclient import TestClient

from ccf_llm_hf.hub_cards.space.ccf_llm_space.guard import MAX_BODY, Guard
from ccf_llm_hf.hub_cards.space.ccf_llm_space.recommender import Recommender
from ccf_llm_hf.hub_cards.space.ccf_llm_space.server import FILES, STAGES, build_app
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.modeling.pipeline_ccf_llm import CTRRankingPipeline


def ask(method: str = "GET", path: str = "/", **headers: str) -> int:
    """Status of the guard's answer; 200 where the request goes through."""
    sent = {"host": "127.0.0.1:7860"} | {key.replace("_", "-"): v for key, v in headers.items()}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
    }
    found: list[int] = []

    async def send(message: Any) -> None:
        found.extend([message["status"]] if "status" in message else [])

    async def app(*_: Any) -> None:
        found.append(200)

    asyncio.run(Guard(app, host="demo.local")(scope, None, send))
    return found[0]


@pytest.mark.parametrize(
    "host",
    ["localhost:7860", "127.0.0.1", "[::1]:7860", "10.1.2.3:80", "demo.local", "DEMO.local.:1"],
)
def test_it_is_asked_by_its_own_names(host: str) -> None:
    assert ask(host=host) == 200


@pytest.mark.parametrize("host", ["", "evil.example", "localhost.evil.example", "[::1", "demo"])
def test_other_names_are_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(host=host) == 421
    monkeypatch.setenv("SPACE_ID", "acme/demo")  # there the Hub finds a Space by its name
    assert ask(host=host) == 200


def test_bodies_are_bounded() -> None:
    assert ask("POST", content_length=str(MAX_BODY)) == 200
    assert ask("POST", content_length=str(MAX_BODY + 1)) == 413
    assert ask("POST", transfer_encoding="chunked") == 411


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    model, processor = load_checkpoint(
        str(build_space_checkpoint(tmp_path_factory.mktemp("space")))
    )
    recommender = Recommender(CTRRankingPipeline(model=model, processor=processor))
    return TestClient(build_app(recommender), base_url="http://127.0.0.1")


def test_the_page_and_its_files_ask_for_nothing_from_elsewhere(client: TestClient) -> None:
    for path in FILES:
        answer = client.get(path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "http://" not in answer.text and "https://" not in answer.text
    assert client.get("/other").status_code == 404
    assert client.post("/").status_code == 405
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421


def test_titles_are_searched_for(client: TestClient) -> None:
    assert client.get("/search", params={"q": " the  godfather"}).json() == {
        "titles": ["The Godfather (1972)"],
        "same": "The Godfather (1972)",
    }
    assert client.get("/search").json() == {"titles": [], "same": None}
    assert client.get("/search", params={"q": "x" * 9999}).json()["titles"] == []


def test_a_list_comes_in_stages(client: TestClient) -> None:
    asked = {"liked": ["Heat (1995)"], "disliked": ["Alien (1979)"], "varied": True}
    lists = [client.post("/rank", json=asked | {"stage": stage}).json() for stage in STAGES]
    assert [one["stage"] for one in lists] == [*STAGES]
    assert lists[1]["titles"] == lists[2]["titles"]
    assert {*lists[0]["titles"]}.isdisjoint(["Heat (1995)", "Alien (1979)"])
    assert ["Raised by" in one["html"] for one in lists] == [False, False, True]
    unknown = client.post("/rank", json={"liked": [], "disliked": [], "stage": "first"}).json()
    assert unknown["stage"] == "read" and len(unknown["titles"]) == 10
    every = client.post("/rank", json={"liked": [*TITLES], "disliked": []}).json()
    assert (every["titles"], every["stage"]) == ([], "why")
    assert every["status"].startswith("Nothing is left")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"liked": 7}',
        b'{"liked": [], "stage": "soon"}',
        json.dumps({"liked": [str(n) for n in range(1001)]}).encode(),
    ],
)
def test_other_bodies_are_refused(client: TestClient, body: bytes) -> None:
    answer = client.post("/rank", content=body)
    assert answer.status_code == 400 and answer.json()["error"].endswith(".")
