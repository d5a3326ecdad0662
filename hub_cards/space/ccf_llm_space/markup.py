"""Scores as HTML. Titles are visitors' input: every text is escaped here, and only here."""

from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from .recommender import Piece, Place

# Blue and vermilion stay apart under every color-vision deficiency, on light and dark pages.
WORDS = (0, 114, 178)
NEUTRAL = (224, 224, 224)
BEHAVIOR = (213, 94, 0)
STAND_IN = (96, 96, 96)
# Parts of a score: of `Place.parts`, with their class, in the key and in a row.
PARTS = {
    "words": ("ccf-words", "the words of the title", "words"),
    "behavior": ("ccf-behavior", "the behavior of its users, in its slot", "behavior"),
    "cf": ("ccf-cf", "the CF model's own estimate", "CF estimate"),
}
DIMENSIONS = 64  # columns of the heat map: more would be too narrow to tell apart


def percent(share: float, digits: int = 0) -> str:
    """`0.634` as `63 %`, with a no-break space."""
    return f"{100 * share:.{digits}f}\u00a0%"


def signed(effect: float) -> str:
    """`-0.123` as `−0.12`."""
    return f"{effect:+.2f}".replace("-", "\u2212")


NOTE = (
    "Numbers are logits. Words, behavior and CF estimate are what the title has beyond any title "
    "that nobody has rated (pale: below it); what raised it is what its score would lack without "
    "that title of yours."
)


def status_line(
    ranked: int, history: int, disliked: int, blank: bool, read: bool = False, stage: str = "why"
) -> str:
    """What the list below is, in one sentence (plain text)."""
    if not ranked:
        return "Nothing is left to rank: every title of the catalog is marked."
    likes = f"{history} liked title{'' if history == 1 else 's'}" if history else "no liked title"
    table = "a blank CF table (cold start)" if blank else "the CF table"
    rest = f"; {disliked} disliked {'read' if read else 'left out'}" if disliked else ""
    if stage == "first":
        return f"{ranked} candidates for {likes}{rest}; the language model is reading."
    return f"The best {ranked} for {likes}, with {table}{rest}."


def results_html(
    places: Sequence[Place], prompt: Sequence[Piece], config: Any, uses_slots: bool = True
) -> str:
    """The list and, once there are reasons, the key to them, the gate and the prompt to open;
    `config` is the model's."""
    ranking = ranking_html(places)
    if not prompt:
        return ranking
    gate = ""
    if config.fusion == "gate" and uses_slots:  # others have one weight, or none, for all of them
        gate = (
            '<details class="ccf-more"><summary>The gate, dimension by dimension</summary>'
            f"{gate_html(places)}</details>"
        )
    return (
        f'{_key(places)}{ranking}<p class="ccf-caption">{escape(NOTE)}</p>{gate}'
        '<details class="ccf-more"><summary>The prompt of the first title, as the model reads it'
        f"</summary>{prompt_html(prompt)}</details>"
    )


def _key(places: Sequence[Place]) -> str:
    entries = [
        f'<span><i class="{name}" aria-hidden="true"></i>{meaning}</span>'
        for part, (name, meaning, _) in PARTS.items()
        if any(place.parts.get(part) for place in places)
    ]
    return f'<p class="ccf-key">{"".join(entries)}</p>'


def ranking_html(places: Sequence[Place]) -> str:
    """The ranked list: title, probability, what moved the score, and the lines that raised it."""
    widest = max((sum(map(abs, place.parts.values())) for place in places), default=0.0)
    rows = "".join(_place_html(place, widest) for place in places)
    return f'<ol class="ccf-ranking" role="list">{rows}</ol>'


def _place_html(place: Place, widest: float) -> str:
    found = {part: value for part, value in place.parts.items() if value}
    bar = "".join(
        f'<span class="{PARTS[part][0]}{" ccf-down" * (value < 0)}" '
        f'style="width:{abs(value) / widest:.1%}"></span>'
        for part, value in found.items()
    )
    shares = ", ".join(f"{PARTS[part][2]} {signed(value)}" for part, value in found.items())
    raised = ", ".join(f"{escape(name)} ({signed(effect)})" for name, effect in place.raised)
    why = f'<span class="ccf-why">Raised by {raised}</span>' if raised else ""
    probability = "\u2026"
    if place.probability is not None:
        probability = (
            f'{percent(place.probability, 1)}<span class="ccf-hidden"> probability of a like</span>'
        )
    title = escape(place.title)
    return (
        f'<li><span class="ccf-title" data-title="{title}">{title}</span>'
        f'<span class="ccf-probability">{probability}</span>'
        f'<span class="ccf-bar" aria-hidden="true">{bar}</span>'
        f'<span class="ccf-shares">{shares}</span>'
        f'<span class="ccf-say">{_say("like", place.title)}{_say("dislike", place.title)}</span>'
        f"{why}</li>"
    )


def _say(what: str, title: str) -> str:
    name = escape(f"{what.capitalize()} {title}")
    return (
        f'<button type="button" data-say="{what}" data-title="{escape(title)}" '
        f'aria-label="{name}">{what.capitalize()}</button>'
    )


def gate_html(places: Sequence[Place]) -> str:
    """Heat map of the gate: a row per title, dimensions sorted by their spread over the titles."""
    gates = torch.stack([place.gate for place in places])
    spread = gates.std(dim=0, correction=0)
    order = spread.argsort(descending=True, stable=True)[:DIMENSIONS]
    shown = gates[:, order]
    # The scale is cut to what is there, else a gate that hardly moves would look like one color.
    reach = max(float((shown - 0.5).abs().max()), 0.01)
    rows = "".join(
        f'<div class="ccf-gate-row"><span class="ccf-gate-title">{escape(place.title)}</span>'
        f"{_strip(place, values, reach)}</div>"
        for place, values in zip(places, shown, strict=True)
    )
    return f'<div class="ccf-gate">{_gate_legend(places, spread[order], reach)}{rows}</div>'


def _strip(place: Place, values: Tensor, reach: float) -> str:
    cells = "".join(
        f'<rect x="{column}" width="1" height="1" fill="{_color(value, reach, place.known)}"/>'
        for column, value in enumerate(values.tolist())
    )
    low, high = float(values.min()), float(values.max())
    alt = f"Gate of {place.title}: from {low:.2f} to {high:.2f} over the dimensions shown"
    return (
        f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {len(values)} 1" '
        f'preserveAspectRatio="none" shape-rendering="crispEdges">{cells}</svg>'
    )


def _color(gate: float, reach: float, known: bool) -> str:
    """From words (0.5 + reach) over neutral (0.5) to behavior or its stand-in (0.5 - reach)."""
    position = (gate - 0.5) / reach
    end = WORDS if position > 0 else BEHAVIOR if known else STAND_IN
    weight = min(abs(position), 1.0)
    mixed = (round(near + weight * (far - near)) for near, far in zip(NEUTRAL, end, strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _gate_legend(places: Sequence[Place], spread: Tensor, reach: float) -> str:
    known = [place.known for place in places]
    rest = "behavior (gray: stand-in)" if any(known) else "stand-in"
    end = STAND_IN if not any(known) else BEHAVIOR
    scale = ", ".join(f"rgb{color}" for color in (end, NEUTRAL, WORDS))
    return (
        f'<p class="ccf-legend"><span>{max(0.5 - reach, 0.0):.2f} '
        f'{"behavior" if all(known) else rest}</span><span class="ccf-scale" aria-hidden="true" '
        f'style="background:linear-gradient(90deg, {scale})"></span>'
        f"<span>{min(0.5 + reach, 1.0):.2f} words</span></p>"
        f'<p class="ccf-caption">The {len(spread)} of {len(places[0].gate)} dimensions in which '
        "these titles differ most, widest spread first (standard deviation from "
        f"{float(spread[0]):.3f} down to {float(spread[-1]):.3f}).</p>"
    )


def prompt_html(pieces: Sequence[Piece]) -> str:
    """The hybrid prompt: text as it is, every slot as a box."""
    return f'<div class="ccf-prompt">{"".join(_piece_html(piece) for piece in pieces)}</div>'


def _piece_html(piece: Piece) -> str:
    if piece.kind == "text":
        return escape(piece.text)
    holds = "behavior known" if piece.known else "a learned stand-in for behavior"
    return (
        f'<span class="ccf-slot ccf-{piece.kind}" title="{holds}">'
        f'<span class="ccf-hidden">slot of the {piece.kind}: </span>{escape(piece.text)}'
        f'<span class="ccf-hidden"> ({holds}) </span></span>'
    )
