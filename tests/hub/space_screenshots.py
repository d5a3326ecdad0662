"""Pictures of the Space's page for the docs, of a real checkpoint or the toy one.

    python tests/hub/space_screenshots.py CHECKPOINT docs/images [--like ...] [--other ...]

Writes space-wide.png, space-dark.png, space-two.png and space-narrow.png. Without --like and
--other, the page's first and second example are ranked.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hub.space_browser import Visitor, missing, served, visitor

PATIENCE = 300  # seconds for one ranking, on a machine that has other work


def ask(page: Visitor, likes: list[str], person: int = 0) -> None:
    """Rank for the titles, or for an example."""
    if likes:
        for title in likes:
            page.pick(title, person)
        page.find(f"#rank-{person}").click()
    else:
        examples = page.driver.find_elements("css selector", f"#examples-{person} button")
        examples[person].click()
    page.wait_for_status("The best", person, limit=PATIENCE)
    settle(page)


def settle(page: Visitor) -> None:
    """No focus ring, no pointer on a control, no transition under way."""
    page.js("document.activeElement.blur()")
    page.cdp("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
    page.wait("return document.getAnimations().length === 0")


def take(page: Visitor, url: str, likes: list[str], others: list[str], folder: Path) -> None:
    """All four pictures."""
    page.open(url)
    ask(page, likes)
    page.screenshot(folder / "space-wide.png")
    page.find("#compare").click()
    ask(page, others, person=1)
    page.screenshot(folder / "space-two.png")
    page.open(url, dark=True)
    ask(page, likes)
    page.screenshot(folder / "space-dark.png")
    page.open(url, width=360)
    ask(page, likes)
    page.screenshot(folder / "space-narrow.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone")
    parser.add_argument("--like", nargs="+", default=[])
    parser.add_argument("--other", nargs="+", default=[], help="likes of the second person")
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
        take(page, url, arguments.like, arguments.other, arguments.out)
    for path in sorted(arguments.out.glob("space-*.png")):
        shrink(path)
        print(path)


def shrink(path: Path) -> None:
    """Keep 256 colors, which is a quarter of the size and looks the same."""
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    few.save(path, optimize=True)


if __name__ == "__main__":
    main()
