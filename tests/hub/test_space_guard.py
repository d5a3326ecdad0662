"""What the page's server lets in."""

import asyncio
import http.client
from typing import Any

import pytest
from hub.space_browser import free_port

pytest.importorskip("starlette")

from ccf_llm_hf.hub_cards.space.ccf_llm_space.guard import MAX_BODY, Guard

JOIN = "/gradio_api/queue/join"


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


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/upload",
        "/gradio_api/upload/",
        "/gradio_api/process_recording",
        "/gradio_api/component_server",
        "/gradio_api/vibe-edit/",
        "/gradio_api/run/predict",
        "/",
    ],
)
def test_only_what_the_page_sends_may_be_sent(path: str) -> None:
    assert ask("POST", path, content_length="2") == 403
    assert ask("GET", path) == 200
    assert ask("PUT", path, content_length="2") == 405


def test_bodies_are_bounded() -> None:
    assert ask("POST", JOIN, content_length=str(MAX_BODY)) == 200
    assert ask("POST", JOIN, content_length=str(MAX_BODY + 1)) == 413
    assert ask("POST", JOIN, transfer_encoding="chunked") == 411


def test_the_served_page_is_guarded() -> None:
    gr = pytest.importorskip("gradio")
    from ccf_llm_hf.hub_cards.space.ccf_llm_space.page import launch_page

    with gr.Blocks(analytics_enabled=False) as page:
        box = gr.Textbox()
        box.submit(lambda text: text, box, box)
    port = free_port()
    where = {"server_name": "127.0.0.1", "server_port": port}
    launch_page(page, prevent_thread_lock=True, quiet=True, **where)

    def status(method: str, path: str, body: str | None = None, **headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request(method, path, body, headers)
        return connection.getresponse().status

    try:
        assert status("GET", "/") == 200
        assert status("GET", "/", Host="evil.example") == 421
        assert status("POST", "/gradio_api/upload", "x") == 403
        assert status("GET", "/monitoring") >= 400
        assert status("GET", "/monitoring/summary") >= 400
        assert status("POST", JOIN, **{"Content-Length": str(MAX_BODY + 1)}) == 413
        event = '{"data": ["a"], "fn_index": 0, "session_hash": "s"}'
        assert status("POST", JOIN, event, **{"Content-Type": "application/json"}) == 200
    finally:
        page.close()
