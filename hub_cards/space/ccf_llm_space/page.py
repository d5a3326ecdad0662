"""The page: controls on the left, what the model makes of them on the right."""

from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from .guard import Guard
from .markup import results_html, status_line
from .recommender import MAX_PER_TOPIC, Recommender, clean_titles

TITLE = "CCF-LLM: words and behavior"
HERE = Path(__file__).parent
# Fonts of the system: the default theme's would be one more download.
FONT = ("system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")
# Grays and blues darker, or on dark pages lighter, than the theme's, which are too faint to read.
CONTRASTS = {
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_300",
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_hover": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_800",
}
LISTED = 5000  # titles that the browser is sent, the best known ones

INTRODUCTION = (
    f"# {TITLE}\n"
    "Name some titles that you liked. A language model reads them as a *hybrid prompt*: words, and "
    "slots in which a gate mixes the words of each title with the behavior of the users who rated "
    "it (a collaborative-filtering, or CF, vector). It then ranks what else you may like, and "
    "tells which of your titles raised each place."
)
DISLIKED_INFO = (
    "This model was trained on likes only and does not read dislikes: "
    "titles named here are merely left out of the ranking."
)
DISLIKED_READ_INFO = (
    "The model reads them as disliked, before the liked ones, and they are left out of the ranking."
)
BLANK_INFO = (
    "As if nobody had rated anything yet: every slot is left with its words and a learned stand-in."
)
START = "Name some titles and press Rank. Without any, you are ranked as an unknown user."


def build_page(recommender: Recommender) -> gr.Blocks:
    """The whole page of one model; nothing is scored before the first click."""
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                *settings, button = _controls(recommender)
            with gr.Column(scale=5, min_width=280):
                outputs = _results()
        _connect(recommender, settings, button, outputs)
    return page


def _connect(
    recommender: Recommender, settings: list[Any], button: gr.Button, outputs: list[Any]
) -> None:
    """Rank at the click, and from then on at every change."""
    liked, others, disliked, length, blank, varied = settings
    ranked = gr.State(False)

    def rank(*values: Any) -> tuple[Any, ...]:
        return (True, *show(recommender, *values))

    def rank_again(ranked_before: bool, *values: Any) -> tuple[Any, ...]:
        if not ranked_before:
            return tuple(gr.skip() for _ in outputs)
        return show(recommender, *values)

    def follow(*values: Any) -> gr.Slider:
        return length_slider(min(len(named_titles(*values)), recommender.longest_history))

    # One at a time, because scoring takes all cores, and of a burst of changes only the last.
    options: Any = {"concurrency_id": "model", "api_visibility": "private"}
    button.click(rank, settings, [ranked, *outputs], **options)
    options |= {"fn": rank_again, "inputs": [ranked, *settings], "outputs": outputs}
    options |= {"trigger_mode": "always_last"}
    gr.on([disliked.change, length.input, blank.change, varied.change], **options)
    gr.on(
        [liked.change, others.blur, others.submit],
        follow,
        [liked, others],
        length,
        api_visibility="private",
        show_progress="hidden",
    ).then(**options)


def _controls(recommender: Recommender) -> list[Any]:
    """Liked, others, disliked, length, blank, varied, and the button."""
    titles = sorted(recommender.titles[:LISTED])
    hidden = len(recommender.titles) - len(titles)
    search: Any = {"choices": titles, "multiselect": True, "value": []}
    note = f" {hidden:,} less known ones are not listed: type them below." if hidden else ""
    liked = gr.Dropdown(
        label="Titles you liked",
        info=f"Search or pick, oldest first.{note}",
        elem_id="liked",
        **search,
    )
    others = gr.Textbox(
        label="Others that you liked",
        info="One a line. What the catalog lacks is read by its words.",
        lines=2,
        max_lines=6,
        elem_id="others",
    )
    length = length_slider(0)
    disliked = gr.Dropdown(
        label="Titles you disliked",
        info=DISLIKED_READ_INFO if recommender.reads_dislikes else DISLIKED_INFO,
        elem_id="disliked",
        **search,
    )
    blank = gr.Checkbox(
        label="Cold start: blank the CF table",
        info=BLANK_INFO if recommender.has_cf else "This model has no CF vectors to blank.",
        interactive=recommender.has_cf,
        elem_id="blank",
    )
    varied = gr.Checkbox(
        label="Vary the list",
        info=f"At most {MAX_PER_TOPIC} titles of one {' or '.join(recommender.topics)}.",
        value=recommender.has_choice,
        visible=bool(recommender.topics),
        elem_id="varied",
    )
    button = gr.Button("Rank", variant="primary", elem_id="rank")
    return [liked, others, disliked, length, blank, varied, button]


def length_slider(count: int) -> gr.Slider:
    """A slider from none to all of `count` liked titles, at all of them."""
    return gr.Slider(
        *(0, max(count, 1), count),
        step=1,
        label="History length",
        info="How many of the liked titles the model reads, counted from the latest.",
        elem_id="length",
        buttons=[],
    )


def _results() -> list[Any]:
    """Two areas: status and results."""
    # A role that is there before the text changes, so that screen readers announce the change.
    announce = "element.setAttribute('role', 'status')"
    return [
        gr.HTML(START, elem_id="status", js_on_load=announce),
        gr.HTML(elem_id="results", js_on_load=None),
    ]


def named_titles(liked: list[str], others: str | None) -> list[str]:
    """Liked titles, oldest first: those picked, then those typed."""
    return clean_titles([*liked, *(others or "").splitlines()])


def show(
    recommender: Recommender,
    liked: list[str],
    others: str | None,
    disliked: list[str],
    length: float,
    blank: bool,
    varied: bool,
) -> tuple[str, str]:
    """Status and results as HTML."""
    named, left_out = named_titles(liked, others), clean_titles(disliked)
    history = named[max(len(named) - int(length), 0) :]
    read: dict[str, Any] = {"disliked": left_out} if recommender.reads_dislikes else {}
    places = recommender.rank(history, [*named, *left_out], blank=blank, varied=varied, **read)
    status = status_line(len(places), len(history), len(left_out), blank)
    if not places:
        return status, ""
    prompt = recommender.prompt(history, places[0].title, blank=blank, **read)
    return status, results_html(
        places, prompt, recommender.model.config, recommender.processor.uses_slots
    )


def launch_page(page: gr.Blocks, **options: Any) -> None:
    """Serve the page until interrupted; `options` are those of `gr.Blocks.launch`."""
    theme = gr.themes.Base(primary_hue="blue", font=FONT, font_mono=MONO)
    theme.set(**CONTRASTS)
    # In the head, because Gradio rewrites what it is given as CSS and drops container queries.
    style, script = (
        (HERE / name).read_text(encoding="utf-8") for name in ("style.css", "names.js")
    )
    page.launch(
        theme=theme,
        head=f"<style>{style}</style><script>{script}</script>",
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        app_kwargs={"middleware": [Middleware(Guard, host=options.get("server_name"))]},
        **options,
    )
