"""The service: what it answers, refuses, sheds, counts and logs."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fastapi.testclient import TestClient
from service_checkpoint import build_service_checkpoint

from ccf_llm_hf import CTRRanker
from ccf_llm_hf.inference.api import build_api
from ccf_llm_hf.inference.guard import MAX_BODY

JSON = {"content-type": "application/json"}
DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
Start = Callable[..., TestClient]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_service_checkpoint(tmp_path_factory.mktemp("service"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> CTRRanker:
    """A model of likes alone, and of no fields."""
    folder = tmp_path_factory.mktemp("plain")
    return CTRRanker.from_pretrained(str(build_service_checkpoint(folder, plain=True)))


@pytest.fixture(scope="module")
def ranker(checkpoint: Path) -> CTRRanker:
    return CTRRanker.from_pretrained(str(checkpoint))


@pytest.fixture
def start() -> Iterator[Start]:
    """Begins a service; `lines` of the client are its log."""
    begun = []

    def begin(ranker: Any, **settings: Any) -> TestClient:
        lines: list[dict[str, Any]] = []
        client = TestClient(
            build_api(ranker, log=lines.append, **settings), raise_server_exceptions=False
        )
        client.lines = lines
        client.__enter__()
        begun.append(client)
        return client

    yield begin
    for client in begun:
        client.__exit__()  # a second time does nothing


class Slow:
    """A ranker that predicts once `gate` is open."""

    def __init__(self, ranker: CTRRanker) -> None:
        self.ranker, self.gate = ranker, threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ranker, name)

    def predict(self, pairs: Sequence[Any]) -> Any:
        self.gate.wait(20)
        return self.ranker.predict(pairs)


def pair(item: Any, **rest: Any) -> dict[str, Any]:
    return {"pairs": [{"item": item, **rest}]}


def measured(client: TestClient, name: str) -> float:
    """A sample of /metrics, by its name and labels."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to that")


def ask_together(client: TestClient, slow: Slow, asked: list[Any]) -> list[httpx.Response]:
    """Answers to predictions: the first, which is worked on meanwhile, and all as one batch."""
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(client.post, "/predict", json=asked[0])
        until(lambda: measured(client, "ccf_llm_batch_size_count") == 1)
        together = [pool.submit(client.post, "/predict", json=one) for one in asked]
        until(lambda: measured(client, "ccf_llm_waiting") == len(asked))
        slow.gate.set()
        return [future.result() for future in (first, *together)]


def test_answers_are_those_of_the_ranker(start: Start, ranker: CTRRanker) -> None:
    client = start(ranker)
    history = ["Carrie", {"title": "Emma", "liked": False}, {"id": "b5", "rating": 4}]
    asked = {"user": "42", "history": history, "top_k": 3, "max_per_topic": 1}
    items = client.post("/rank", json=asked).json()["items"]
    expected = ranker.rank(**asked)
    assert [item["item_id"] for item in items] == [item.item_id for item in expected]
    logits = [item.logit for item in expected]
    assert [item["logit"] for item in items] == pytest.approx(logits, abs=1e-5)

    pairs = [{"user": 42, "history": history, "item": "Ubik"}, {"user": "who", "item": "New"}]
    answer = client.post("/predict", json={"pairs": pairs}).json()
    assert answer["probabilities"] == pytest.approx(ranker.predict(pairs).tolist(), abs=1e-5)
    assert answer["unknown_users"] == ["who"] and answer["unknown_items"] == ["New"]

    told = client.post("/explain", json={"history": history, "item": "Misery"}).json()
    expected_reasons = ranker.explain(history=history, item="Misery")
    assert told["logit"] == pytest.approx(expected_reasons.logit, abs=1e-5)
    assert [line["title"] for line in told["lines"]] == [x.title for x in expected_reasons.lines]


def test_answers_in_a_batch_are_those_alone(start: Start, ranker: CTRRanker) -> None:
    slow = Slow(ranker)
    client = start(slow)
    items = ["Carrie", "Dune", {"title": "Brand new", "author": "Jane Austen"}, "b7", "Ubik"]
    asked = [
        pair(item, user="42", history=["Misery", "Emma"][: n % 3]) for n, item in enumerate(items)
    ]
    answers = ask_together(client, slow, asked)
    assert measured(client, "ccf_llm_batch_size_count") == 2
    assert measured(client, "ccf_llm_batch_size_sum") == 1 + len(asked)
    for one, answer in zip([asked[0], *asked], answers, strict=True):
        alone = ranker.predict(one["pairs"]).tolist()
        assert answer.json()["probabilities"] == pytest.approx(alone, abs=1e-5)


def test_a_bad_request_does_not_fail_its_neighbors(
    start: Start, ranker: CTRRanker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt of one is longer than the backbone has positions."""
    slow = Slow(ranker)
    client = start(slow)
    monkeypatch.setattr(ranker.model.config.text_config, "max_position_embeddings", 600)
    answers = ask_together(client, slow, [pair("Dune"), pair("é" * 500), pair("Emma")])
    assert [answer.status_code for answer in answers] == [200, 200, 422, 200]
    assert re.match(r"a prompt has \d+ tokens, and the backbone 600 ", answers[2].json()["detail"])


def test_a_full_queue_sheds_and_loses_nothing(start: Start, ranker: CTRRanker) -> None:
    slow = Slow(ranker)
    client = start(slow, max_waiting=4)
    with ThreadPoolExecutor(30) as pool:
        asked = [pool.submit(client.post, "/predict", json=pair("Dune"))]
        until(lambda: measured(client, "ccf_llm_batch_size_count") == 1)
        asked += [pool.submit(client.post, "/predict", json=pair("Dune")) for _ in range(19)]
        until(lambda: measured(client, "ccf_llm_rejected_total") == 15)
        assert client.get("/health").status_code == 200
        slow.gate.set()
        answers = [future.result() for future in asked]
    shed = [answer for answer in answers if answer.status_code == 429]
    assert len(shed) == 15
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in shed)
    assert shed[0].json() == {"detail": "4 requests are waiting: try again in 1 seconds"}
    assert sum(answer.status_code == 200 for answer in answers) == 5
    assert client.post("/predict", json=pair("Dune")).status_code == 200
    name = 'ccf_llm_requests_total{route="/predict",status="%d"}'
    assert measured(client, name % 429) == 15 and measured(client, name % 200) == 6


def test_what_takes_too_long_is_answered_504(start: Start, ranker: CTRRanker) -> None:
    slow = Slow(ranker)
    client = start(slow, timeout=0.1)
    answer = client.post("/predict", json=pair("Dune"))
    assert answer.status_code == 504
    assert answer.json() == {"detail": "there was no answer in 0.1 seconds: ask for less, or later"}
    slow.gate.set()
    until(lambda: client.post("/predict", json=pair("Dune")).status_code == 200)


@pytest.mark.parametrize(
    "route", ["/rank", "/predict", "/explain", "/metrics", "/openapi.json", "/x"]
)
def test_a_token_is_asked_for_everywhere_but_at_health(
    start: Start, ranker: CTRRanker, route: str
) -> None:
    client = start(ranker, token="sesame")
    assert client.get("/health").status_code == 200
    wrong = ["Bearer", "Bearer ", "Bearer sesam", "bearer sesame", "Basic sesame", "Bearer s\xe9"]
    for header in (None, *wrong):
        headers = {} if header is None else {"authorization": header.encode("latin-1")}
        answer = client.post(route, headers=headers)
        assert answer.status_code == 401, header
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json() == {
            "detail": "give the token of this service: Authorization: Bearer TOKEN"
        }
    answer = client.post(route, headers={"authorization": "Bearer sesame"})
    assert answer.status_code in (404, 405, 422)


def test_a_body_is_bounded_however_it_is_sent(start: Start, ranker: CTRRanker) -> None:
    client = start(ranker)
    filler = b" " * (MAX_BODY - 2)
    assert client.post("/rank", content=b"{" + filler + b"}", headers=JSON).status_code == 200
    for content in (b"{ " + filler + b"}", iter([b"{", filler, b" ", b"}"])):
        answer = client.post("/rank", content=content, headers=JSON)
        assert answer.status_code == 413
        assert answer.json() == {"detail": "a body has at most 1048576 bytes"}
        assert answer.headers["connection"] == "close"


def test_bad_bodies_get_one_sentence(start: Start, ranker: CTRRanker) -> None:
    client = start(ranker)
    cases = yaml.safe_load(Path(__file__).with_name("bodies.yaml").read_text(encoding="utf-8"))
    for case in cases:
        answer = client.post("/rank", content=case["body"].encode(), headers=JSON)
        assert answer.status_code == 422, case
        assert answer.json() == {"detail": case["sentence"]}


@pytest.mark.parametrize(
    ("body", "end"),
    [
        (b"\xff", "the body is no JSON: expected value at line 1 column 1"),
        (b'{"user": "\xff"}', "invalid unicode code point at line 1 column 11"),
        (b"[" * 9999, "the body is no JSON: recursion limit exceeded at line 1 column 202"),
        (b"9" * 9999, "the body is no JSON: number out of range at line 1 column 4302"),
        (b'{"history": ["%s"]}' % (b"x" * 501), "xxx...: give at most 500 characters"),
        (b'{"candidates": [%s 1]}' % (b"1, " * 1000), "...: give at most 1000"),
        (
            b'{"candidates": [{"id": 1, "year": [%s 1]}]}' % (b"1, " * 50),
            ": give at most 50 values",
        ),
        (b'{"%s": 1}' % (b"x" * 10_000), "x... is nothing that this model reads: leave it out"),
    ],
)
def test_a_long_or_broken_body_gets_a_short_sentence(
    start: Start, ranker: CTRRanker, body: bytes, end: str
) -> None:
    answer = start(ranker).post("/rank", content=body, headers=JSON)
    assert answer.status_code == 422
    assert answer.json()["detail"].endswith(end)
    assert len(answer.content) < 200


def test_another_content_type_is_no_json(start: Start, ranker: CTRRanker) -> None:
    answer = start(ranker).post("/rank", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.json() == {"detail": "the body is no object: send one as application/json"}


def test_what_a_model_cannot_take_is_no_part_of_its_schema(start: Start, plain: CTRRanker) -> None:
    client = start(plain)
    for body in (
        {"max_per_topic": 1},
        {"history": [{"id": "b1", "rating": 3}]},
        {"history": [{"id": "b1", "author": "x"}]},
    ):
        answer = client.post("/rank", json=body)
        assert answer.json()["detail"].endswith(" is nothing that this model reads: leave it out")
    disliked = {"history": [{"id": "b1", "liked": False}]}
    assert client.post("/rank", json=disliked).json() == {
        "detail": "history[0].liked is false: this model reads likes only, leave the item out"
    }
    liked = {"history": [{"id": "b1", "liked": True}], "user": 42.0, "top_k": 2.0}
    assert client.post("/rank", json=liked).status_code == 200
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert "max_per_topic" not in schemas["RankBody"]["properties"]
    assert set(schemas["HistoryItem"]["properties"]) == {"id", "title", "liked"}
    assert schemas["Item"]["anyOf"] == [{"required": ["id"]}, {"required": ["title"]}]


def test_other_methods_and_routes_are_refused_in_json(start: Start, ranker: CTRRanker) -> None:
    client = start(ranker)
    for method, route, status in (
        ("GET", "/rank", 405),
        ("PUT", "/predict", 405),
        ("HEAD", "/health", 405),
        ("OPTIONS", "/explain", 405),
        ("GET", "/docs", 404),
        ("POST", "/rank/", 307),
    ):
        answer = client.request(method, route, follow_redirects=False)
        assert answer.status_code == status, (method, route)
        assert status != 405 or answer.headers["allow"] in ("GET", "POST")
    assert client.get("/nowhere").json() == {"detail": "Not Found: see /openapi.json"}


@pytest.mark.parametrize("kind", ["ranker", "plain"])
def test_the_examples_of_the_schema_pass(
    start: Start, kind: str, request: pytest.FixtureRequest
) -> None:
    client = start(request.getfixturevalue(kind))
    paths = client.get("/openapi.json").json()["paths"]
    sent = []
    for route, operations in paths.items():
        for method, operation in operations.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            for example in body.get("examples", {"": {"value": None}}).values():
                answer = client.request(method, route, json=example["value"])
                assert answer.status_code == 200, answer.text
                sent.append(route)
    assert sent == ["/rank", "/rank", "/predict", "/explain", "/health", "/metrics"]


def test_what_the_document_says_is_so(start: Start, ranker: CTRRanker) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    client = start(ranker, token="sesame")
    client.headers["authorization"] = "Bearer sesame"
    asked = re.findall(r"curl http://127.0.0.1:7860(/\w+) .*\n +-d '(.+)'\n", text)
    for route, body in asked:
        answer = client.post(route, content=body, headers=JSON)
        assert answer.status_code == 200, answer.text
        named = re.search(rf"`{route}`\s+answers\s+`(\{{.*?\}})`", text)
        if named is not None:
            assert set(answer.json()) <= set(re.findall(r'"(\w+)"', named[1]))
    assert {route for route, _ in asked} == {"/rank", "/predict", "/explain"}
    assert len(re.findall("curl", text)) == len(asked)

    schema = client.get("/openapi.json").json()
    answers = set(schema["paths"]["/rank"]["post"]["responses"]) - {"200"}
    assert set(re.findall(r"^\| (\d+) \|", text, re.MULTILINE)) == answers
    metrics = client.get("/metrics").text
    named = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert len(named) == 6
    assert all(re.search(rf"^# TYPE {name} ", metrics, re.MULTILINE) for name in named)
    line = re.search(r"stderr, `(\{.*?\})`", text)
    assert line is not None and re.findall(r'"(\w+)"', line[1]) == list(client.lines[0])


def test_the_package_is_silent_while_it_serves(
    start: Start, ranker: CTRRanker, caplog: pytest.LogCaptureFixture
) -> None:
    client = start(ranker)
    answer = client.post("/predict", json=pair("Unheard of", user="nobody")).json()
    assert answer["unknown_users"] == ["nobody"] and answer["unknown_items"] == ["Unheard of"]
    assert caplog.records == []
    client.__exit__()
    ranker.predict([("nobody", "Unheard of")])
    assert "nobody" in caplog.text


def test_a_failure_is_logged_without_its_words(start: Start, ranker: CTRRanker) -> None:
    class Broken(Slow):
        def predict(self, pairs: Sequence[Any]) -> Any:
            raise RuntimeError(f"cannot read {pairs}")

    client = start(Broken(ranker))
    answer = client.post("/predict", json=pair("My secret book"))
    assert answer.status_code == 500
    assert answer.json() == {"detail": "the service failed: its log tells where, by X-Request-ID"}
    (line,) = client.lines
    assert line["error"] == "RuntimeError" and "test_api.py" in line["where"][-1]
    assert line["request"] == answer.headers["x-request-id"]
    assert "secret" not in json.dumps(line)
    assert client.get("/health").status_code == 200


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def process(checkpoint: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`ccf-llm serve --api` with a token, and its address."""
    port = free_port()
    command = [sys.executable, "-m", "ccf_llm_hf.cli", "serve", str(checkpoint), "--api"]
    served = subprocess.Popen(
        [*command, "--port", str(port)],
        env=os.environ | {"CCF_LLM_TOKEN": "open-sesame", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert served.stderr is not None
    try:
        line = ""
        for line in served.stderr:
            if line.startswith("the API is at"):
                break
        assert line == f"the API is at http://127.0.0.1:{port} (Ctrl-C stops it)\n"
        yield served, f"http://127.0.0.1:{port}"
    finally:
        served.kill()
        served.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_process_answers_what_it_accepted_and_told_no_secret(
    process: tuple[subprocess.Popen[str], str], number: signal.Signals
) -> None:
    served, address = process
    body = {
        "user": "private user",
        "history": ["Private history"],
        "candidates": [{"title": f"Private title {n}"} for n in range(100)],
    }

    async def ask_and_stop() -> list[httpx.Response]:
        headers = {"authorization": "Bearer open-sesame"}
        async with httpx.AsyncClient(base_url=address, headers=headers, timeout=60) as client:
            assert (await client.get("/nowhere/private")).status_code == 404
            asked = [asyncio.create_task(client.post("/rank", json=body)) for _ in range(8)]
            while "ccf_llm_waiting 0.0" in (await client.get("/metrics")).text:
                await asyncio.sleep(0)
            served.send_signal(number)
            return await asyncio.gather(*asked)

    answers = asyncio.run(ask_and_stop())
    assert [answer.status_code for answer in answers] == [200] * 8
    output, log = served.communicate(timeout=30)
    assert served.returncode == 0
    assert output == "stopped\n"
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["status"] for line in lines if line["route"] == "/rank"] == [200] * 8
    assert {answer.headers["x-request-id"] for answer in answers} < {x["request"] for x in lines}
    for secret in ("sesame", "private", "Private"):
        assert secret not in log
