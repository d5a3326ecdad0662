"""Pictures of the Space's page for the docs, of a real checkpoint or the toy one.

    python tests/hub/space_screenshots.py CHECKPOINT docs/images [--backbone FOLDER] [--like ...]

Writes space-wide.png, space-dark.png, space-cold.png and space-narrow.png. Without --like, the
first and the last listed title are picked.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hub.space_browser import Visitor, missing, served, visitor

PATIENCE = 300  # seconds for one ranking, on a machine that has other work


def ask(page: Visitor, url: str, likes: list[str], **window: Any) -> None:
    """Open the page, pick the titles and rank."""
    page.open(url, **window)
    for title in likes:
        page.pick("#liked", title)
    page.find("#rank").click()
    page.wait_for_status(f"for {len(likes)} liked title", limit=PATIENCE)
    settle(page)


def settle(page: Visitor) -> None:
    """No focus ring, no pointer on a control, no transition under way."""
    page.js("document.activeElement.blur()")
    page.cdp("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
    page.wait("return document.getAnimations().length === 0")


def take(page: Visitor, url: str, likes: list[str], folder: Path) -> None:
    """All four pictures."""
    ask(page, url, likes)
    page.screenshot(folder / "space-wide.png")
    page.find("#blank input").click()
    page.wait_for_status("with a blank CF table", limit=PATIENCE)
    settle(page)
    page.screenshot(folder / "space-cold.png")
    ask(page, url, likes, dark=True)
    page.screenshot(folder / "space-dark.png")
    ask(page, url, likes, width=360)
    page.screenshot(folder / "space-narrow.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone")
    parser.add_argument("--like", nargs="+", default=[])
    arguments = parser.parse_args()
    if reason := missing():
        sys.exit(f"error: {reason}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    options = ["--backbone", arguments.backbone] if arguments.backbone else []
    with (
        tempfile.TemporaryDirectory() as folder,
        served(arguments.checkpoint, Path(folder) / "log", *options) as url,
        visitor() as page,
    ):
        page.open(url)
        take(page, url, arguments.like or listed(page), arguments.out)
    for path in sorted(arguments.out.glob("space-*.png")):
        shrink(path)
        print(path)


def shrink(path: Path) -> None:
    """Keep 256 colors, which is a quarter of the size and looks the same."""
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    few.save(path, optimize=True)


def listed(page: Visitor) -> list[str]:
    """The first and the last title that the page offers at once."""
    page.find("#liked input").click()
    script = "return [...document.querySelectorAll('[role=option]')].map(o => o.ariaLabel)"
    titles = page.wait(script + ".slice()")
    return [titles[0], titles[-1]]


if __name__ == "__main__":
    main()
