"""Draw the README's picture, docs/images/prompt.svg: a hybrid prompt, and how a slot is filled.

python benchmarks/draw_prompt.py
"""

from math import sin
from pathlib import Path

from ccf_llm_hf.modeling.prompt_ccf_llm import TEMPLATES

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "prompt.svg"
LIKED, CANDIDATES = ("Toy Story", "Heat"), ("Se7en", "Alien")
WORDS, BEHAVIOR, INK = "#0072b2", "#d55e00", "#24292f"
WIDTH, HEIGHT, LETTER, CELLS = 860, 292, 8.0, 24
HEAD = (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
    f'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="13" fill="{INK}">'
)


def draw() -> str:
    """The picture as SVG."""
    before, _, after = TEMPLATES["shared_prefix"]["prefix"].partition("{user}")
    instruction, opening = before.split("\n")
    parts = [HEAD, f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>']
    parts.append(write(24, 36, instruction))
    place = 30 + LETTER * len(opening)
    parts.append(write(24, 76, opening))
    place = slot(parts, place, "user 42", BEHAVIOR)
    parts.append(write(place, 76, after))
    place += LETTER * len(after) + 6
    for title in LIKED:
        place = slot(parts, place, title, "url(#mixed)")
    for title in CANDIDATES:
        parts.append(f'<path d="M{place + 14:.0f} 54 V118" stroke="{INK}" stroke-dasharray="3 3"/>')
        start = place + 30
        place = slot(parts, start, title, "url(#mixed)")
        parts.append(write(start, 112, "Yes / No"))
        if title == CANDIDATES[0]:
            parts.append(f'<path d="M{start + 6:.0f} 86 L260 152" stroke="#8c959f"/>')
    gate = [0.5 + 0.45 * sin(1.7 * cell + 0.4 * sin(3.1 * cell)) for cell in range(CELLS)]
    rows = (
        ("s  the item's words", [(WORDS, 0.35 + 0.6 * abs(sin(2.3 * n))) for n in range(CELLS)]),
        ("c' its behavior, aligned", [(BEHAVIOR, 0.35 + 0.6 * abs(sin(n))) for n in range(CELLS)]),
        ("g  gate, by dimension", [(INK, share) for share in gate]),
        ("e = g s + (1 - g) c'", [(mix(share), 1.0) for share in gate]),
    )
    for number, (name, cells) in enumerate(rows):
        top = 158 + 32 * number
        parts.append(write(24, top + 15, name))
        for cell, (color, opacity) in enumerate(cells):
            parts.append(
                f'<rect x="{260 + 23 * cell}" y="{top}" width="21" height="20" fill="{color}" '
                f'fill-opacity="{opacity:.2f}"/>'
            )
    shades = (
        f'<stop offset="0.5" stop-color="{WORDS}"/><stop offset="0.5" stop-color="{BEHAVIOR}"/>'
    )
    parts.insert(1, f'<defs><linearGradient id="mixed">{shades}</linearGradient></defs>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def write(left: float, base: float, text: str) -> str:
    """Words at a place."""
    return f'<text x="{left:.0f}" y="{base}" xml:space="preserve">{text}</text>'


def slot(parts: list[str], left: float, text: str, fill: str) -> float:
    """Add a slot; returns where what follows it begins."""
    width = LETTER * len(text) + 14
    parts.append(
        f'<rect x="{left:.0f}" y="58" width="{width:.0f}" height="26" rx="5" fill="{fill}"/>'
        f'<text x="{left + 7:.0f}" y="76" fill="#ffffff">{text}</text>'
    )
    return left + width + 6


def mix(share: float) -> str:
    """The color between behavior (0) and words (1)."""
    ends = ([int(color[at : at + 2], 16) for at in (1, 3, 5)] for color in (BEHAVIOR, WORDS))
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(*ends, strict=True))


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
