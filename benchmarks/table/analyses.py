"""Cold start, gate and calibration of finished cells: figures, plots, and sentences about them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from analyses_text import analyses_markdown
from calibration import FITS, fit_calibration, measure_calibration
from cf_control import blanked_cf, new_user_cf
from cold_start import (
    LIKES,
    blanked,
    new_user_curve,
    plot_blanked,
    plot_new_user_curve,
)
from gate_analysis import gate_analysis, plot_gate_analysis
from plots import plot_reliability

from ccf_llm_hf.data.prepared import load_prepared
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation.scores import read_scores
from ccf_llm_hf.inference.ranker import CTRRanker
from ccf_llm_hf.training.stage import write_json, write_text

SPLIT = "test"
# A number of likes is asked for where at least this share of the rows has so many (our choice).
ENOUGH_ROWS = 0.1


@dataclass(frozen=True)
class Subject:
    """A finished cell to analyze.

    Attributes:
        name: of the method, in plots and sentences.
        folder: the cell's work folder, with `validation.parquet` and `test.parquet`.
        result: the cell's figures.
        checkpoint: folder of its slim checkpoint; None for a CF table.
        backbone: folder or Hub id of the checkpoint's backbone.
        cf: folder of a CF table, in place of a checkpoint.
    """

    name: str
    folder: Path
    result: Path
    checkpoint: Path | None = None
    backbone: str = ""
    cf: Path | None = None


def analyze(
    subjects: Sequence[Subject],
    data_dir: str | Path,
    results: Path,
    max_rows: int | None = None,
    *,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Analyze cells and write `analyses.json`, `analyses.md` and plots into `results`.

    What was found of a cell is kept in its folder as `analysis.json`, and is not computed again
    until the cell is.

    Args:
        subjects: at least one.
        data_dir: prepared folder with histories of likes.
        results: folder to write.
        max_rows: of the test split, score whole users until this many rows are reached; default
            all. Slices and calibration are of all rows.
        resamples: of the bootstraps.

    Returns:
        What `analyses.json` holds: `split`, `max_rows`, `blanked` and `new_user` (entries of
        `blanked` and `new_user_curve`), and by method `slices` (of the cell's result), `gate`
        (`gate_analysis` without what is there a dimension) and `calibration` (`fit_calibration`,
        and `measured` on test).

    Raises:
        InputError: there is nothing to analyze, `analyses.json` is there and knows a method that
            would be lost, or a bad checkpoint or folder.
    """
    if not subjects:
        raise InputError(
            "--analyses found no finished cell with its checkpoint in the work folder: compute "
            "rows of the protocol track here first"
        )
    _lose_nothing(results / "analyses.json", subjects)
    found = {s.name: _analysis(s, data_dir, max_rows, resamples) for s in subjects}
    gates = {name: part["gate"] for name, part in found.items() if part["gate"]}
    content = {
        "split": SPLIT,
        "max_rows": max_rows,
        "slices": {s.name: json.loads(s.result.read_text())["slices"] for s in subjects},
        "blanked": [entry for part in found.values() for entry in part["blanked"]],
        "new_user": [entry for part in found.values() for entry in part["new_user"]],
        "gate": {name: _compact(gate) for name, gate in gates.items()},
        "calibration": {name: part["calibration"] for name, part in found.items()},
    }
    results.mkdir(parents=True, exist_ok=True)
    _plot(content, gates, results)
    write_json(results / "analyses.json", content)
    write_text(results / "analyses.md", analyses_markdown(content))
    return content


def _lose_nothing(file: Path, subjects: Sequence[Subject]) -> None:
    """A clone has the analyses of checkpoints that it does not have."""
    known = json.loads(file.read_text(encoding="utf-8"))["slices"] if file.is_file() else {}
    if lost := [name for name in known if name not in {subject.name for subject in subjects}]:
        raise InputError(
            f"{file} holds analyses of {', '.join(lost)}, not finished in the work folder or not "
            "asked for, which would be lost: compute what is missing here first, or give --out"
        )


def _analysis(
    subject: Subject, data_dir: str | Path, max_rows: int | None, resamples: int
) -> dict[str, Any]:
    """The subject's `analysis.json`, computed unless it is there and of its present scores, and its
    calibration, which takes seconds and is not kept."""
    file, scores = subject.folder / "analysis.json", subject.folder / "test.parquet"
    options = {"max_rows": max_rows, "resamples": resamples}
    found: dict[str, Any] = {}
    if file.is_file() and file.stat().st_mtime >= scores.stat().st_mtime:
        found = json.loads(file.read_text())
    if not found or any(found.get(key) != value for key, value in options.items()):
        found = options | _cold_start(subject, data_dir, options)
        write_json(file, found)
    return found | {"calibration": _calibration(subject.folder)}


def _cold_start(
    subject: Subject, data_dir: str | Path, options: Mapping[str, Any]
) -> dict[str, Any]:
    likes = _likes(data_dir)
    if subject.cf:
        return {
            "blanked": blanked_cf(subject.name, subject.cf, data_dir, SPLIT, **options),
            "new_user": new_user_cf(subject.name, subject.cf, data_dir, SPLIT, likes, **options),
            "gate": None,
        }
    ranker = CTRRanker.from_pretrained(str(subject.checkpoint), backbone=subject.backbone)
    named = {subject.name: ranker}
    return {
        "blanked": blanked(named, data_dir, SPLIT, **options),
        "new_user": new_user_curve(named, data_dir, SPLIT, likes, **options),
        "gate": gate_analysis(ranker, data_dir, resamples=options["resamples"]),
    }


def _likes(data_dir: str | Path) -> list[int]:
    """The numbers of likes that enough rows of the split have; 0 at least."""
    lengths = [len(past) for past in load_prepared(data_dir).splits[SPLIT]["history"]]
    longest = np.quantile(lengths, 1 - ENOUGH_ROWS, method="lower")
    return [number for number in LIKES if number <= longest]


def _calibration(folder: Path) -> dict[str, Any]:
    """Fits on the cell's validation scores, measured on its test scores."""
    validation, test = (read_scores(folder / f"{split}.parquet") for split in ("validation", SPLIT))
    result = fit_calibration(validation["score"], validation["label"], validation["user_id"])
    fits = {name: result[name] for name in ("none", *FITS)}
    measured = measure_calibration(fits, test["score"], test["label"])
    return result | {"measured": {"split": SPLIT, **measured}}


def _compact(gate: Mapping[str, Any]) -> dict[str, Any]:
    """Without the figures of every dimension, which the plot shows."""
    return {key: value for key, value in gate.items() if key not in ("dimensions", "heat_map")}


def _plot(content: Mapping[str, Any], gates: Mapping[str, Any], results: Path) -> None:
    plot_blanked(content["blanked"], results / "cold_start.png")
    plot_new_user_curve(content["new_user"], results / "new_user.png")
    measured = {name: part["measured"] for name, part in content["calibration"].items()}
    plot_reliability(measured, results / "reliability.png")
    if gates:
        plot_gate_analysis(next(iter(gates.values())), results / "gate.png")
    else:
        (results / "gate.png").unlink(missing_ok=True)
