"""The Space's page in headless Chromium: used by clicks and by keys, wide and narrow."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.space_browser import (
    DOWN,
    ENTER,
    ESCAPE,
    LEFT,
    SPACE,
    TAB,
    Visitor,
    free_port,
    missing,
    served,
    visitor,
    wait_for_port,
)
from hub.space_checkpoint import build_space_checkpoint

from ccf_llm_hf.hub.space import SPACE as SPACE_FOLDER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing() or "all there"),
]
EVIL = "<img src=x onerror=\"document.title='hacked'\"> ${document.title='hacked'}"
# The app, with this package out of reach, as it is on the Hub.
PLAIN_APP = """
import runpy, sys
sys.modules["ccf_llm_hf"] = None
sys.path.insert(0, sys.argv[1])
sys.argv = ["app.py", sys.argv[2]]
runpy.run_path(sys.path[0] + "/app.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_space_checkpoint(tmp_path_factory.mktemp("space"))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "serve.log"


@pytest.fixture(scope="module")
def url(checkpoint: Path, log: Path) -> Iterator[str]:
    with served(checkpoint, log) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Visitor]:
    with visitor() as window:
        yield window


@pytest.fixture
def page(browser: Visitor, url: str) -> Visitor:
    browser.open(url)
    return browser


def rank_two(page: Visitor) -> list[tuple[str, str]]:
    """The list after picking two titles and pressing Rank."""
    page.pick("#liked", "Heat (1995)")
    page.pick("#liked", "Alien (1979)")
    page.find("#rank").click()
    page.wait_for_status("for 2 liked titles, with the CF table.")
    return page.ranking()


def test_by_clicks_every_control_changes_the_list(page: Visitor) -> None:
    assert "press Rank" in page.status()
    assert page.ranking() == []
    first = rank_two(page)
    assert len(first) == 10
    assert not {"Heat (1995)", "Alien (1979)"} & {title for title, _ in first}

    page.find("#length input[type=range]").send_keys(LEFT)
    page.wait_for_status("for 1 liked title,")
    shorter = page.ranking()
    assert shorter != first

    page.find("#blank input").click()
    page.wait_for_status("with a blank CF table")
    blank = page.ranking()
    assert [title for title, _ in blank] != [title for title, _ in shorter]
    assert page.js("return document.querySelectorAll('#ranking .ccf-behavior').length") == 0

    page.find("#blank input").click()
    page.wait_for_status("with the CF table")
    assert page.ranking() == shorter

    page.pick("#disliked", shorter[0][0])
    page.wait_for_status("1 disliked left out")
    assert shorter[0][0] not in {title for title, _ in page.ranking()}
    assert [title for title, _ in page.ranking()][:5] == [title for title, _ in shorter][1:6]

    page.find("#liked .token-remove").click()
    page.wait_for_status("for 1 liked title,")
    assert page.ranking() != shorter


def test_the_gate_and_the_prompt_are_shown(page: Visitor) -> None:
    ranking = rank_two(page)
    assert page.js("return document.querySelectorAll('#gate svg[role=img]').length") == 10
    assert page.js("return document.querySelectorAll('#gate svg:first-of-type rect').length") == 640
    slots = page.js(
        "return [...document.querySelectorAll('.ccf-slot')].map(s => s.childNodes[1].textContent)"
    )
    assert slots == ["new user", "Heat (1995)", "Alien (1979)", ranking[0][0]]
    assert "does not read dislikes" in page.find("#disliked").text


def test_by_keys_alone(page: Visitor) -> None:
    page.js("document.querySelector('#liked input').focus()")
    page.type("memen")
    page.wait("return document.querySelectorAll('[role=option]').length === 1")
    page.type(ENTER)
    page.type(DOWN + ENTER)
    page.wait("return document.querySelectorAll('#liked .token').length === 2")
    page.type(ESCAPE)
    page.wait("return document.querySelectorAll('[role=option]').length === 0")
    page.tab_to("rank")
    page.type(ENTER)
    page.wait_for_status("for 2 liked titles, with the CF table.")
    two = page.ranking()

    page.js("document.querySelector('#others textarea').focus()")
    page.type("Memento")
    page.tab_to("length", "range")
    page.wait_for_status("for 3 liked titles")
    assert page.ranking() != two
    page.type(LEFT)
    page.wait_for_status("for 2 liked titles")
    page.tab_to("blank")
    page.type(SPACE)
    page.wait_for_status("with a blank CF table")


def test_a_new_ranking_is_announced(page: Visitor) -> None:
    """A live region speaks only if it was there before its text changed."""
    page.js("window.region = document.querySelector('#status [role=status]')")
    rank_two(page)
    assert page.js("return window.region.isConnected && window.region.innerText") == page.status()


def test_titles_typed_by_visitors_stay_text(page: Visitor) -> None:
    page.find("#others textarea").send_keys(EVIL)
    page.type(TAB)
    page.find("#rank").click()
    page.wait_for_status("for 1 liked title")
    assert EVIL in page.js("return document.querySelector('#prompt').innerText")
    assert page.js("return document.querySelectorAll('#results img').length") == 0
    assert page.js("return document.title") != "hacked"


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_runs_out_of_the_window(browser: Visitor, url: str, width: int) -> None:
    browser.open(url, width=width)
    assert browser.overflow() <= 0
    rank_two(browser)
    assert browser.js("return window.innerWidth") == width
    assert browser.overflow() <= 0
    cut = browser.js(
        "return [...document.querySelectorAll('#results *')].filter(e => {"
        "  const box = e.getBoundingClientRect();"
        "  return box.width && !e.closest('.ccf-hidden') && box.right > window.innerWidth;"
        "}).length"
    )
    assert cut == 0


@pytest.mark.parametrize("dark", [False, True])
def test_every_control_and_image_has_a_name_and_text_can_be_read(
    browser: Visitor, url: str, dark: bool
) -> None:
    browser.open(url, dark=dark)
    assert browser.nameless() == []
    rank_two(browser)
    assert browser.nameless() == []
    names = browser.names()
    for role, name in (
        ("combobox", "Titles you liked"),
        ("textbox", "Others that you liked"),
        ("combobox", "Titles you disliked"),
        ("slider", "range slider for History length"),
        ("checkbox", "Cold start: blank the CF table"),
        ("button", "Rank"),
        ("button", "Remove Heat (1995)"),
        ("heading", "Ranking"),
    ):
        assert any(found == role and text.startswith(name) for found, text in names), name
    browser.find("#liked input").click()
    browser.wait("return document.querySelectorAll('[role=option]').length > 9")
    assert browser.nameless() == []
    assert browser.js("return document.documentElement.lang") == "en"
    assert browser.faint() == []


def test_nothing_beyond_this_machine_is_asked_for(browser: Visitor, url: str, log: Path) -> None:
    browser.open(url)
    rank_two(browser)
    assert browser.hosts() == {"127.0.0.1"}
    assert browser.complaints() == []
    assert "REACHED OUT" not in log.read_text()


def test_the_app_runs_without_this_package(checkpoint: Path, tmp_path: Path) -> None:
    """As on the Hub: `python app.py`, plain Auto classes, the checkpoint's own code."""
    port = free_port()
    own = {"GRADIO_SERVER_PORT": str(port), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", PLAIN_APP, str(SPACE_FOLDER), str(checkpoint)],
            env=os.environ | own,
            stdout=output,
            stderr=output,
        )
        try:
            wait_for_port(port, process, log)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
                assert "CCF-LLM: words and behavior" in answer.read().decode()
        finally:
            process.terminate()
            process.wait(timeout=30)
