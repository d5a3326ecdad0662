"""The calibration plot, drawn without a display."""

from pathlib import Path

import pandas as pd

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation.metrics import ece, reliability_table
from ccf_llm_hf.io import save_figure


def plot_calibration(scores: pd.DataFrame, path: str | Path, *, name: str = "model") -> None:
    """Draw observed against predicted rates, and how many rows each bin holds.

    Args:
        scores: `label` (0 or 1) and `prob`, one row per sample.
        path: image to write; the suffix decides the format (.png, .svg, .pdf).
        name: of the method, for the title.

    Raises:
        InputError: a column is missing, or the path cannot be written.
    """
    from matplotlib.figure import Figure

    for column in ("label", "prob"):
        if column not in scores:
            raise InputError(f"the calibration plot needs the column {column!r} in the scores")
    table = reliability_table(scores["label"], scores["prob"]).query("rows > 0")
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", label="perfect")
    axes.plot(table["predicted"], table["observed"], marker="o", label=name)
    axes.set(ylabel="observed positive rate", ylim=(0, 1), xlim=(0, 1))
    error = ece(scores["label"], scores["prob"])
    axes.set_title(f"{name}: expected calibration error {error:.3f}")
    axes.legend(loc="upper left")
    counts.bar(table["low"], table["rows"], width=table["high"] - table["low"], align="edge")
    counts.set(xlabel="predicted probability", ylabel="rows")
    try:
        save_figure(figure, path, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written ({error}); name a .png file") from error
