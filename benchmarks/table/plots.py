"""Pictures of the results table and of what calibration changes on test."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import name_of
from cold_start import save_figure
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = Mapping[str, Any]
COLORS = {"model": "C0", "control": "C1", "published": "0.55"}
KINDS = {
    "model": "with a language model",
    "control": "controls",
    "published": "published by others",
}
METRICS = {"auc": "AUC", "uauc": "UAUC"}


def plot_table(
    rows: Sequence[Row], file: str | Path, published: Sequence[tuple[str, str, str, str]] = ()
) -> None:
    """AUC and UAUC of every row of the table with their intervals, a panel pair a track.

    Args:
        rows: of `table.json`.
        file: image to write; the suffix decides the format.
        published: method, AUC, UAUC and source of results by others, as in `table.PUBLISHED`, drawn
            beside the protocol track. What is no number is left out.

    Raises:
        InputError: the file cannot be written.
    """
    tracks = list(dict.fromkeys(row["track"] for row in rows))
    panels = {
        track: _marks(
            [row for row in rows if row["track"] == track],
            published if track == "protocol" else (),
        )
        for track in tracks
    }
    heights = [len(marks) + 3 for marks in panels.values()]
    figure = Figure(figsize=(12, 0.23 * sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(
        len(tracks), 2, sharey="row", squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for (track, marks), axes in zip(panels.items(), grid, strict=True):
        for metric, panel in zip(METRICS, axes, strict=True):
            _dots(panel, marks, metric)
        axes[0].set_yticks(range(len(marks)), labels=[mark["name"] for mark in marks], fontsize=7)
        axes[0].set_ylim(-0.8, len(marks) - 0.2)
        axes[0].set_title(f"{track} track", loc="left")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8)
    save_figure(figure, file)


def _marks(
    rows: Sequence[Row], published: Sequence[tuple[str, str, str, str]]
) -> list[dict[str, Any]]:
    """A mark a row, from the lowest AUC to the highest: name, kind, values and bounds."""
    marks = [
        {
            "name": name_of(row) + ", quick budget" * (row["budget"] == "quick"),
            "kind": "model" if row["backbone"] else "control",
            **row,
        }
        for row in rows
    ]
    marks += [
        {"name": name, "kind": "published", "auc": float(auc), "uauc": float(uauc or "nan")}
        for name, auc, uauc, _ in published
    ]
    return sorted(marks, key=lambda mark: mark["auc"])


def _dots(axes: Axes, marks: Sequence[Mapping[str, Any]], metric: str) -> None:
    for kind, name in KINDS.items():
        mine = [(place, mark) for place, mark in enumerate(marks) if mark["kind"] == kind]
        if not mine:
            continue
        places, values = [place for place, _ in mine], [mark[metric] for _, mark in mine]
        shape = "D" if kind == "published" else "o"
        axes.plot(values, places, shape, ms=4, color=COLORS[kind], label=name)
        for place, mark in mine:
            if f"{metric}_ci" in mark:
                axes.hlines(place, *mark[f"{metric}_ci"], color=COLORS[kind], alpha=0.5)
    axes.set_xlabel(f"test {METRICS[metric]} (bars: 95 % over users)")
    axes.grid(alpha=0.3)


def plot_reliability(fits: Mapping[str, Mapping[str, Row]], file: str | Path) -> None:
    """Observed against predicted rates, before and after the temperature, a panel a method.

    Args:
        fits: by method, {none, temperature}: {ece, reliability}, of `measure_calibration`.
        file: image to write; the suffix decides the format.

    Raises:
        InputError: the file cannot be written.
    """
    figure = Figure(figsize=(0.6 + 3.4 * len(fits), 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(fits), sharey=True, squeeze=False)[0]
    names = {"none": "uncalibrated", "temperature": "temperature"}
    for axes, (method, measured) in zip(panels, fits.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
        for key, name in names.items():
            bins = measured[key]["reliability"]
            points = [part["predicted"] for part in bins], [part["observed"] for part in bins]
            axes.plot(*points, marker="o", ms=3, label=f"{name}: ECE {measured[key]['ece']:.3f}")
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted probability")
        axes.set_title(method, fontsize=9)
        axes.legend(loc="upper left", fontsize=7)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("observed positive rate, test")
    save_figure(figure, file)
