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
    page.pick("Heat (1995)")
    page.pick("Alien (1979)")
    page.find("#rank-0").click()
    page.wait_for_status("The best 10 for 2 liked titles, with the CF table.")
    return page.ranking()


def test_by_clicks_every_control_changes_the_list(page: Visitor) -> None:
    assert "press Rank" in page.status()
    assert page.ranking() == []
    first = rank_two(page)
    assert len(first) == 10
    assert not {"Heat (1995)", "Alien (1979)"} & {title for title, _ in first}

    page.find("#blank-0").click()
    page.wait_for_status("with a blank CF table")
    blank = page.ranking()
    assert [title for title, _ in blank] != [title for title, _ in first]
    assert page.js("return document.querySelectorAll('#results-0 .ccf-behavior').length") == 0
    page.find("#blank-0").click()
    page.wait_for_status("with the CF table")
    assert page.ranking() == first

    page.find("#results-0 [data-say=dislike]").click()
    page.wait_for_status("1 disliked left out")
    assert [title for title, _ in page.ranking()][:5] == [title for title, _ in first][1:6]
    liked = page.ranking()[2][0]
    page.js("return document.querySelectorAll('#results-0 [data-say=like]')[2]").click()
    page.wait_for_status("for 3 liked titles")
    assert liked not in {title for title, _ in page.ranking()}
    assert liked in page.find("#liked-0").text

    for _ in range(2):
        page.find("#liked-0 button").click()
    page.wait_for_status("for 1 liked title,")


def test_titles_are_found_and_new_ones_taken(page: Visitor) -> None:
    field = page.find("#search-0")
    for typed, found in (
        ("the godfather", ["The Godfather (1972)"]),
        ("godfahter", ["The Godfather (1972)", "Take “godfahter” as a new title"]),
        ("toy story 1995", ["Toy Story (1995)"]),
        ("zzzz", ["Take “zzzz” as a new title"]),
    ):
        field.clear()
        field.send_keys(typed)
        options = "return [...document.querySelectorAll('[role=option]')].map(o => o.textContent)"
        page.wait(f"{options}.join('|') === arguments[0]", "|".join(found))
    assert page.find("#hint-0").text.startswith("No title is like this")
    page.find("[role=option]").click()
    assert page.find("#liked-0").text.startswith("zzzz")


def test_an_example_is_one_click(page: Visitor) -> None:
    page.find("#examples-0 button").click()
    page.wait_for_status("for 5 liked titles")
    first = page.ranking()
    page.js("return document.querySelectorAll('#examples-0 button')[1]").click()
    page.wait("return document.querySelector('#results-0').getAttribute('aria-busy') === null")
    assert page.ranking() != first


def test_two_people_are_compared(page: Visitor) -> None:
    one = rank_two(page)
    page.find("#compare").click()
    page.pick("Mary Poppins (1964)", person=1)
    page.find("#rank-1").click()
    page.wait_for_status("for 1 liked title,", person=1)
    two = page.ranking(1)
    shared = {title for title, _ in one} & {title for title, _ in two}
    assert page.find("#shared").text == f"{len(shared)} of 10 titles stand in both lists."
    marked = "return [...document.querySelectorAll('#results-1 .ccf-shared .ccf-title')]"
    assert {*page.js(f"{marked}.map(t => t.dataset.title)")} == shared
    assert page.axe() == []
    page.find("#compare").click()
    assert page.ranking() == one
    assert not page.js("return document.querySelector('#rank-1')")


def test_the_gate_and_the_prompt_are_there_to_open(page: Visitor) -> None:
    ranking = rank_two(page)
    for summary in page.driver.find_elements("css selector", "#results-0 summary"):
        summary.click()
    assert page.js("return document.querySelectorAll('.ccf-gate svg[role=img]').length") == 10
    slots = page.js(
        "return [...document.querySelectorAll('.ccf-slot')].map(s => s.childNodes[1].textContent)"
    )
    assert slots == ["new user", "Heat (1995)", "Alien (1979)", ranking[0][0]]
    assert "trained on likes alone" in page.find("#dislikes-0").text
    page.find("#results-0 [data-say=dislike]").click()
    page.wait_for_status("1 disliked left out")
    assert page.js("return document.querySelectorAll('#results-0 details[open]').length") == 2


def test_by_keys_alone(page: Visitor) -> None:
    page.type(TAB)
    assert page.focused() == page.find("#examples-0 button").text
    page.tab_to("search-0")
    page.type("memen")
    page.wait("return document.querySelectorAll('[role=option]').length === 2")
    active = page.find("#search-0").get_attribute("aria-activedescendant")
    assert page.find(f"#{active}").text == "Memento (2000)"
    page.type(ENTER)
    page.type("the")
    page.wait("return document.querySelectorAll('[role=option]').length === 9")
    page.type(DOWN + ENTER)
    page.wait("return document.querySelectorAll('#liked-0 button').length === 2")
    page.type("a")
    page.wait("return !document.querySelector('#found-0').hidden")
    page.type(ESCAPE)
    page.wait("return document.querySelector('#found-0').hidden")
    page.tab_to("rank-0")
    page.type(ENTER)
    page.wait_for_status("for 2 liked titles, with the CF table.")
    two = page.ranking()
    page.type(TAB)
    assert page.focused() == f"Like {two[0][0]}"
    page.type(TAB + TAB)
    page.type(ENTER)  # likes the second
    page.wait_for_status("for 3 liked titles")
    assert page.focused() == f"Like {page.ranking()[1][0]}"

    page.js("document.querySelector('#search-0').focus()")
    page.tab_to("blank-0")
    page.type(SPACE)
    page.wait_for_status("with a blank CF table")
    stops = set()
    for _ in range(60):
        page.type(TAB)
        stops.add(page.focused())
        if "" in stops:  # past the last control, the window's own
            break
    assert "compare" in stops
    assert page.js("return document.body.tabIndex") == -1


def test_the_focus_is_seen_and_an_open_list_covers_nothing(page: Visitor) -> None:
    page.find("#search-0").send_keys("the")
    page.wait("return document.querySelectorAll('[role=option]').length > 5")
    boxes = page.js(
        "return ['found-0', 'rank-0'].map(id => {"
        "  const box = document.getElementById(id).getBoundingClientRect();"
        "  return [box.top, box.bottom]})"
    )
    assert boxes[0][1] <= boxes[1][0]
    page.type(ESCAPE)
    for part in ("blank-0", "rank-0", "compare"):
        page.tab_to(part)
        outline = "return getComputedStyle(document.activeElement).outline"
        assert "3px" in page.js(outline) and "solid" in page.js(outline)


def test_a_new_ranking_is_announced(page: Visitor) -> None:
    """A live region speaks only if it was there before its text changed."""
    page.js("window.region = document.querySelector('#status-0')")
    rank_two(page)
    assert page.js("return window.region.role") == "status"
    assert page.js("return window.region.isConnected && window.region.innerText") == page.status()


def test_titles_typed_by_visitors_stay_text(page: Visitor) -> None:
    page.find("#search-0").send_keys(EVIL)
    page.wait("return document.querySelectorAll('[role=option]').length > 0")
    page.driver.find_elements("css selector", "[role=option]")[-1].click()
    page.find("#rank-0").click()
    page.wait_for_status("for 1 liked title")
    assert EVIL in page.js("return document.querySelector('.ccf-prompt').textContent")
    assert page.js("return document.querySelectorAll('img').length") == 0
    assert page.js("return document.title") != "hacked"


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_runs_out_of_the_window(browser: Visitor, url: str, width: int) -> None:
    browser.open(url, width=width)
    assert browser.overflow() <= 0
    rank_two(browser)
    assert browser.js("return window.innerWidth") == width
    assert browser.overflow() <= 0
    cut = browser.js(
        "return [...document.querySelectorAll('main *')].filter(e => {"
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
    assert browser.nameless() == [] and browser.axe() == []
    rank_two(browser)
    for summary in browser.driver.find_elements("css selector", "#results-0 summary"):
        summary.click()
    assert browser.nameless() == [] and browser.axe() == []
    names = browser.names()
    for role, name in (
        ("combobox", "A title you liked"),
        ("checkbox", "Cold start: blank the CF table"),
        ("button", "Rank"),
        ("button", "Remove Heat (1995)"),
        ("heading", "You"),
    ):
        assert any(found == role and text.startswith(name) for found, text in names), name
    browser.find("#search-0").send_keys("the")
    browser.wait("return document.querySelectorAll('[role=option]').length > 5")
    assert browser.nameless() == [] and browser.axe() == []
    assert browser.faint() == []
    assert browser.dim_edges() == []


def test_nothing_beyond_this_machine_is_asked_for(browser: Visitor, url: str, log: Path) -> None:
    browser.open(url)
    rank_two(browser)
    assert browser.hosts() == {"127.0.0.1"}
    assert browser.complaints() == []
    assert "REACHED OUT" not in log.read_text()


def test_the_app_runs_without_this_package(checkpoint: Path, tmp_path: Path) -> None:
    """As on the Hub: `python app.py`, plain Auto classes, the checkpoint's own code."""
    port = free_port()
    own = {"PORT": str(port), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
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
