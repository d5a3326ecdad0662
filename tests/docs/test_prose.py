"""How long the pages and their sentences are."""

import re

import pytest
from docs.pages import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def sentences(text: str) -> list[str]:
    """The prose of a page, sentence by sentence; code, tables and headings are left out."""
    text = re.sub(r"^```.*?^```|<!--.*?-->", "\n\n", text, flags=re.MULTILINE | re.DOTALL)
    kept = (line for line in text.splitlines() if not re.match(r"\||#|!\[|:::| {4,}\S", line))
    prose = re.sub(r"^\s*(?:[-*]|\d+\.) ", "\n\n", "\n".join(kept), flags=re.MULTILINE)
    prose = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    prose = re.sub(r"`[^`]*`", "code", prose)
    parts = re.split(r"(?<=[.!?])[)\"*]*\s+|:\s+\n|\n\s*\n", prose)
    return [part for part in parts if len(part.split()) > 1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_an_average_sentence_has_at_most_22_words(page) -> None:
    found = sentences(page.read_text(encoding="utf-8"))
    words = sum(len(sentence.split()) for sentence in found)
    assert words <= 22 * max(len(found), 1), words / len(found)


def test_the_results_are_short() -> None:
    assert (ROOT / "docs" / "results.md").stat().st_size <= 10_000
