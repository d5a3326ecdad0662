"""Does the gate move to text where the CF model knows little? Its share of text by popularity."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import rankdata

from ccf_llm_hf.data.prepared import read_rows
from ccf_llm_hf.evaluation.bootstrap import interval
from ccf_llm_hf.reproduce.cold_start import Checkpoint, as_ranker, save_figure

Profiles = dict[str, np.ndarray]

CHUNK = 1024
# Lower edges of the popularity bins, in training rows of an item.
EDGES = (0, 1, 2, 4, 8, 16, 32)
HEAT_BINS = 40
FEWEST = 10  # items of a group that a verdict is based on, at least (our choice)


def gate_analysis(
    checkpoint: Checkpoint, data_dir: str | Path, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any] | None:
    """The gate's share of text over the whole catalog (1: text alone, 0: CF alone).

    Args:
        checkpoint: a ranker, or a checkpoint folder.
        data_dir: prepared folder; an item's popularity is the number of its training rows.
        resamples: of the bootstrap over items.
        seed: of the bootstrap.

    Returns:
        None for arms without a gate, else
        `catalog`, `mean` (over items and dimensions) and the entries of `item_statistics`;
        `dimensions`: {mean, correlation}, each `(hidden_size,)`: the mean gate over items and its
        Pearson correlation with log(1 + training rows), None for a dimension that is constant;
        `heat_map`: {items, train_rows, gates}: items sorted by popularity in up to 40 bins of
        equal size, their number and mean popularity, and their mean gate `(bins, hidden_size)`,
        dimensions sorted by mean; `verdict`: in words (see `verdict`).

    Raises:
        InputError: a bad checkpoint or prepared folder.
    """
    ranker = as_ranker(checkpoint)
    model, ids = ranker.model, ranker.processor.item_ids
    if model.model.gate is None or not ids:
        return None
    seen = read_rows(data_dir, "train")["item_id"].value_counts()
    popularity = seen.reindex(ids, fill_value=0).to_numpy()
    known = model.model.cf.item_known[-1].cpu().numpy()
    means, dimensions, heat_map, profiles = _pass_over_catalog(model, popularity, known)
    result: dict[str, Any] = {"catalog": len(ids), "mean": float(means.mean())}
    result |= item_statistics(
        means, popularity, known, profiles=profiles, resamples=resamples, seed=seed
    )
    result |= {"dimensions": dimensions, "heat_map": heat_map}
    return result | {"verdict": verdict(result)}


@torch.inference_mode()
def _pass_over_catalog(
    model: Any, popularity: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, dict[str, Any], dict[str, Any], Profiles]:
    """Mean gate of every item, what `gate_analysis` tells of dimensions, and profiles of groups.

    Sums are kept instead of gates, so that a large catalog takes no more memory than a small one.
    """
    items, width = len(popularity), model.config.text_config.hidden_size
    logs = np.log1p(popularity)
    centered = logs - logs.mean()
    means = np.empty(items)
    bins = np.array_split(np.argsort(popularity, kind="stable"), min(HEAT_BINS, items))
    heat = np.zeros((len(bins), width))
    squares, products = np.zeros(width), np.zeros(width)
    groups, _ = _groups(popularity, known)
    profiles = {name: np.zeros(width) for name in groups}
    for place, rows in enumerate(bins):
        for part in np.array_split(rows, -(-len(rows) // CHUNK)):
            gates = model.item_gates(torch.as_tensor(part, device=model.device))
            values = gates.double().cpu().numpy()
            means[part] = values.mean(axis=1)
            heat[place] += values.sum(axis=0)
            squares += (values**2).sum(axis=0)
            products += centered[part] @ values
            for name, inside in groups.items():
                profiles[name] += values[inside[part]].sum(axis=0) / max(1, inside.sum())
    dimension_means = heat.sum(axis=0) / items
    variances = squares / items - dimension_means**2
    order = np.argsort(dimension_means, kind="stable")
    sizes = np.array([len(rows) for rows in bins])
    dimensions = {
        "mean": [round(float(value), 5) for value in dimension_means],
        "correlation": _correlations(products / items, variances, float(logs.var())),
    }
    heat_map = {
        "items": sizes.tolist(),
        "train_rows": [round(float(popularity[rows].mean()), 2) for rows in bins],
        "gates": np.round(heat[:, order] / sizes[:, None], 4).tolist(),
    }
    return means, dimensions, heat_map, profiles


def _groups(popularity: np.ndarray, known: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """Items `(items,)` bool of the groups that are compared, and the bin of the popular ones."""
    bins = _bins(popularity)
    enough = [place for place in range(len(EDGES)) if (known & (bins == place)).sum() >= FEWEST]
    top = enough[-1] if enough else int(bins.max())
    return {"cold": ~known, "warm": known, "popular": known & (bins == top)}, top


def _bins(popularity: np.ndarray) -> np.ndarray:
    return np.searchsorted(EDGES, popularity, side="right") - 1


def _correlations(
    covariances: np.ndarray, variances: np.ndarray, variance: float
) -> list[float | None]:
    # A gate's variance is the difference of two means near 1, exact to about 1e-16.
    usable = (variances > 1e-14) & (variance > 0)
    scale = np.sqrt(np.where(usable, variances * variance, 1.0))
    pairs = zip(covariances / scale, usable, strict=True)
    return [round(float(value), 5) if defined else None for value, defined in pairs]


def item_statistics(
    means: np.ndarray,
    popularity: np.ndarray,
    known: np.ndarray,
    *,
    profiles: Profiles | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Share of text by popularity and by whether the CF model knows the item.

    Args:
        means: `(items,)` float, the mean gate of each item over dimensions.
        popularity: `(items,)` int, training rows.
        known: `(items,)` bool, whether the item has a CF vector.
        profiles: of the groups cold, warm and popular, the mean gate of each dimension
            `(hidden_size,)`. With them, intervals of differences are over dimensions too: a gate
            that was never trained moves each dimension somewhere, and their mean by the luck of it.
        resamples: of the bootstrap over items.
        seed: of the bootstrap.

    Returns:
        `by_popularity`: [{train_rows, items, mean, quartiles}], every item in one of the bins;
        `spearman`: {all, known}, each {value, ci, items}, of mean gate and popularity;
        `cold` (no CF vector) and `warm`: {items, mean, quartiles}; `popular`: the same of the known
        items in the most popular bin with enough of them, and its `train_rows`;
        `cold_minus_warm`, `cold_minus_popular`: {value, ci}. What is undefined is None.
    """
    generator = np.random.default_rng(seed)
    bins = _bins(popularity)
    groups, top = _groups(popularity, known)

    def cold_minus(name: str) -> dict[str, Any]:
        moved = None if profiles is None else profiles["cold"] - profiles[name]
        return _difference(means[~known], means[groups[name]], moved, resamples, generator)

    return {
        "by_popularity": [
            {"train_rows": _bin_name(place), **_describe(means[bins == place])}
            for place in range(len(EDGES))
        ],
        "spearman": {
            "all": _spearman(means, popularity, resamples, generator),
            "known": _spearman(means[known], popularity[known], resamples, generator),
        },
        "cold": _describe(means[~known]),
        "warm": _describe(means[known]),
        "popular": {"train_rows": _bin_name(top), **_describe(means[groups["popular"]])},
        "cold_minus_warm": cold_minus("warm"),
        "cold_minus_popular": cold_minus("popular"),
    }


def verdict(result: Mapping[str, Any]) -> str:
    """Whether the gate turns to text for cold items, as the paper argues, in words.

    Yes or no is said only where the 95 % interval, over items and dimensions, leaves zero out, and
    both groups have at least `FEWEST` items. The trend's interval is over items alone. Both tell
    what this gate does, not what the gate of another training would: compare seeds.

    Args:
        result: of `item_statistics` or `gate_analysis`.
    """
    cold, popular = result["cold"], result["popular"]
    return f"{_cold_verdict(cold, popular, result['cold_minus_popular'])}; {_trend(result)}"


def _cold_verdict(
    cold: Mapping[str, Any], popular: Mapping[str, Any], difference: Mapping[str, Any]
) -> str:
    if min(cold["items"], popular["items"]) < FEWEST:
        return (
            f"cannot tell: {cold['items']:,} items without a CF vector and {popular['items']:,} "
            f"popular ones, where {FEWEST} of each are needed"
        )
    low, high = difference["ci"]
    answer = "yes" if low > 0 else "no, less text for them" if high < 0 else "no clear difference"
    return (
        f"{answer}: share of text {cold['mean']:.3f} for the {cold['items']:,} items without a CF "
        f"vector against {popular['mean']:.3f} for the {popular['items']:,} most popular "
        f"({popular['train_rows']} training rows), "
        f"difference {difference['value']:+.3f} [{low:+.3f}, {high:+.3f}]"
    )


def _trend(result: Mapping[str, Any]) -> str:
    known = result["spearman"]["known"]
    if known["value"] is None or None in known["ci"] or known["items"] < FEWEST:
        return "among items with a CF vector no trend is defined"
    low, high = known["ci"]
    trend = "no trend that the interval tells from none"
    if high < 0:
        trend = "the rarer, the more text"
    elif low > 0:
        trend = "the more popular, the more text"
    return (
        f"among the {known['items']:,} items with a CF vector {trend} "
        f"(Spearman {known['value']:+.3f} [{low:+.3f}, {high:+.3f}])"
    )


def _bin_name(place: int) -> str:
    if place == len(EDGES) - 1:
        return f"{EDGES[place]}+"
    low, high = EDGES[place], EDGES[place + 1] - 1
    return str(low) if low == high else f"{low}-{high}"


def _describe(means: np.ndarray) -> dict[str, Any]:
    if not len(means):
        return {"items": 0, "mean": None, "quartiles": [None, None]}
    quartiles = [float(value) for value in np.quantile(means, [0.25, 0.75])]
    return {"items": len(means), "mean": float(means.mean()), "quartiles": quartiles}


def _difference(
    first: np.ndarray,
    second: np.ndarray,
    moved: np.ndarray | None,
    resamples: int,
    generator: np.random.Generator,
) -> dict[str, Any]:
    """Difference of the means of two groups of items, each resampled by itself.

    `moved` is the difference in each dimension; what resampling these adds is added.
    """
    if not len(first) or not len(second):
        return {"value": None, "ci": [None, None]}
    draws = np.array(
        [
            generator.choice(first, len(first)).mean()
            - generator.choice(second, len(second)).mean()
            for _ in range(resamples)
        ]
    )
    if moved is not None:
        again = [generator.choice(moved, len(moved)).mean() for _ in range(resamples)]
        draws += np.array(again) - moved.mean()
    return {"value": float(first.mean() - second.mean()), "ci": interval(draws)}


def _spearman(
    means: np.ndarray, popularity: np.ndarray, resamples: int, generator: np.random.Generator
) -> dict[str, Any]:
    values = [_rank_correlation(means, popularity)]
    for _ in range(resamples):
        rows = generator.integers(0, max(1, len(means)), len(means))
        values.append(_rank_correlation(means[rows], popularity[rows]))
    bounds = interval(np.array(values[1:]))
    low, high = (None if np.isnan(bound) else bound for bound in bounds)
    value = None if np.isnan(values[0]) else values[0]
    return {"value": value, "ci": [low, high], "items": len(means)}


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's correlation; NaN where one side is constant (scipy's warns of it)."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def plot_gate_analysis(result: Mapping[str, Any], path: str | Path) -> None:
    """Share of text by popularity, histograms over dimensions, and the heat map, in one image.

    Args:
        result: of `gate_analysis`.
        path: image to write; the suffix decides the format.

    Raises:
        InputError: the path cannot be written.
    """
    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(result["verdict"], 120), fontsize=10)
    (bins, heat), (means, correlations) = figure.subplots(2, 2)
    _plot_bins(bins, result)
    dimensions = result["dimensions"]
    means.hist(dimensions["mean"], bins=40)
    means.set(xlabel="mean gate of a dimension (share of text)", ylabel="dimensions")
    correlations.hist([value for value in dimensions["correlation"] if value is not None], bins=40)
    correlations.axvline(0, color="0.5", linestyle="--")
    correlations.set(
        xlabel="correlation of a dimension's gate with log popularity", ylabel="dimensions"
    )
    for axes in (bins, means, correlations):
        axes.grid(alpha=0.3)
    _plot_heat(figure, heat, result["heat_map"])
    save_figure(figure, path)


def _plot_bins(axes: Axes, result: Mapping[str, Any]) -> None:
    groups = [part for part in result["by_popularity"] if part["items"]]
    # To the right of the bins, the two groups that the model itself tells apart.
    for key, name in (("cold", "no\nCF vector"), ("warm", "with\nCF vector")):
        if result[key]["items"]:
            groups.append({"train_rows": name, **result[key]})
    places = np.arange(len(groups)) + 0.5 * np.array(
        ["CF" in part["train_rows"] for part in groups]
    )
    centers = np.array([part["mean"] for part in groups])
    quartiles = np.array([part["quartiles"] for part in groups])
    axes.vlines(places, quartiles[:, 0], quartiles[:, 1], lw=6, alpha=0.3, label="middle half")
    axes.plot(places, centers, "o", label="mean over items")
    names = [f"{part['train_rows']}\n{part['items']:,}" for part in groups]
    axes.set_xticks(places, labels=names, fontsize=8)
    axes.set(xlabel="training rows of an item / number of items", ylabel="share of text")
    axes.margins(y=0.25)  # room for the legend
    axes.legend(fontsize=8, ncols=2, loc="upper center")


def _plot_heat(figure: Figure, axes: Axes, heat_map: Mapping[str, Any]) -> None:
    values = np.array(heat_map["gates"])
    image = axes.imshow(
        values, aspect="auto", cmap="coolwarm", vmin=0, vmax=1, interpolation="nearest"
    )
    ticks = np.unique(np.linspace(0, len(values) - 1, min(8, len(values))).round().astype(int))
    axes.set_yticks(ticks, labels=[f"{heat_map['train_rows'][tick]:.3g}" for tick in ticks])
    axes.set(xlabel="dimension, sorted by mean gate", ylabel="mean training rows of the items")
    figure.colorbar(image, ax=axes, label="gate (share of text)")
