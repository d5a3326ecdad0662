"""Curves of a stage: loss, validation AUC and UAUC, gate."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ccf_llm_hf.io import save_figure, write_json

LogHistory = Sequence[dict[str, float]]


def write_history(history: LogHistory, folder: Path, title: str) -> None:
    """Write a trainer's log history as `log.json` and its curves as `curves.png`."""
    write_json(folder / "log.json", list(history))
    save_figure(plot_curves(history, title), folder / "curves.png")


def plot_curves(history: LogHistory, title: str) -> Figure:
    """Three panels over optimizer steps: training and validation loss; AUC and UAUC; gate mean with
    a band of one standard deviation over items and dimensions."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    loss, ranking, gate = figure.subplots(1, 3)
    _line(loss, history, "loss", "train")
    _line(loss, history, "eval_loss", "validation")
    _line(ranking, history, "eval_auc", "AUC")
    _line(ranking, history, "eval_uauc", "UAUC")
    _line(gate, history, "eval_gate_mean", "mean")
    steps, means = _series(history, "eval_gate_mean")
    _, spreads = _series(history, "eval_gate_std")
    low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
    high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    gate.fill_between(steps, low, high, alpha=0.2, label="one standard deviation")
    gate.set_ylim(0, 1)
    panels = ((loss, "BCE (nats)"), (ranking, "validation"), (gate, "gate (share of text)"))
    for axes, label in panels:
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _line(axes: Axes, history: LogHistory, key: str, label: str) -> None:
    steps, values = _series(history, key)
    axes.plot(steps, values, marker="o" if key.startswith("eval") else None, ms=3, label=label)


def _series(history: LogHistory, key: str) -> tuple[list[float], list[float]]:
    entries = [entry for entry in history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]
