"""What scores are worth without CF vectors: items and users blanked artificially, and new users."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ccf_llm_hf.data.prepared import load_prepared
from ccf_llm_hf.data.protocol import SPLITS
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation.bootstrap import UserBootstrap, interval
from ccf_llm_hf.evaluation.metrics import auc, uauc
from ccf_llm_hf.inference.ranker import CTRRanker
from ccf_llm_hf.inference.score_table import sample_users
from ccf_llm_hf.inference.scoring import score_split

Checkpoint = CTRRanker | str | Path
Metrics = dict[str, tuple[float, np.ndarray]]
SIDES: dict[str, tuple[str, ...]] = {"item": ("item",), "user": ("user",), "both": ("item", "user")}
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
LIKES = (0, 1, 2, 5, 10, 20)


def as_ranker(checkpoint: Checkpoint) -> CTRRanker:
    """A ranker as it is, or that of a checkpoint folder or Hub repository."""
    if isinstance(checkpoint, CTRRanker):
        return checkpoint
    return CTRRanker.from_pretrained(str(checkpoint))


def blanked(
    checkpoints: Checkpoint | Mapping[str, Checkpoint],
    data_dir: str | Path,
    split: str = "test",
    sides: Sequence[str] = ("item", "user", "both"),
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    max_rows: int | None = None,
    *,
    resamples: int = 1000,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """How scores degrade as ever more items or users lose their CF vector (our choice of test).

    A blanked item or user is marked unknown in the model's CF table, in histories as in candidates;
    titles stay. Of those that the table knows, a share is drawn by id, so that a larger share holds
    the smaller one, and every method loses the same ones.

    Args:
        checkpoints: a ranker, a checkpoint folder, or several by the name of their method.
        data_dir: prepared folder.
        split: train, validation or test.
        sides: any of item, user and both.
        shares: in [0, 1], of the known items or users.
        seed: of the draw, of the sample of rows and of the bootstrap.
        max_rows: score whole users until this many rows are reached; default all rows.
        resamples: of the user-level bootstrap. The intervals are over users, not over draws.
        progress: show a bar for each pass over the split.

    Returns:
        One entry a method, side and share: {method, side, share, auc, auc_ci, uauc, uauc_ci,
        auc_change, auc_change_ci, uauc_change, uauc_change_ci, rows, users, blanked_items,
        blanked_users, blanked_rows}. A change is paired, against nothing blanked; `blanked_rows`
        have a blanked candidate or user themselves. What is undefined is None.

    Raises:
        InputError: an unknown side, a share outside [0, 1], or a bad folder, split or checkpoint.
    """
    for side in sides:
        if side not in SIDES:
            raise InputError(f"sides: {side!r} is unknown, give any of {', '.join(SIDES)}")
    for share in shares:
        if not 0 <= share <= 1:
            raise InputError(f"shares: {share} is no share, give numbers from 0 to 1")
    rows = _sampled(_load_split(data_dir, split), max_rows, seed)
    measure = Measure(rows, resamples, seed)
    entries = []
    for method, ranker in _rankers(checkpoints):
        # By how many items and users are blanked: equally many are the same ones.
        scored = {(0, 0): blanked_scores(ranker, rows, {}, progress=progress)}
        whole = measure.metrics(scored[0, 0])
        for side, share in itertools.product(sides, shares):
            draw = draw_blanks(ranker, side, share, seed)
            counts = len(draw["item"]), len(draw["user"])
            # An arm that reads no vector has nothing to lose: one pass over titles is dear enough.
            key = counts if _reads_cf(ranker) else (0, 0)
            if key not in scored:
                scored[key] = blanked_scores(ranker, rows, draw, progress=progress)
            entries.append(
                {"method": method, "side": side, "share": float(share)}
                | measure.entry(measure.metrics(scored[key]), against=whole)
                | {"blanked_items": counts[0], "blanked_users": counts[1]}
                | {"blanked_rows": _count_blanked(ranker, rows, draw)}
            )
    return entries


def _reads_cf(ranker: CTRRanker) -> bool:
    return ranker.model.config.fusion != "text_only" or ranker.model.config.cf_logit


def draw_blanks(ranker: CTRRanker, side: str, share: float, seed: int) -> dict[str, np.ndarray]:
    """Rows of the CF table to blank, {"item": (n,), "user": (n,)} int64.

    Known ids are ordered by a hash of seed and id, and the first ones taken: the draw does not
    depend on the order of a catalog, and grows with the share.
    """
    ids = {"item": ranker.processor.item_ids, "user": ranker.processor.user_ids}
    draw = {}
    for kind, names in ids.items():
        known = getattr(ranker.model.model.cf, f"{kind}_known")[-1].cpu().numpy()
        draw[kind] = draw_rows(kind, names, known, share if kind in SIDES[side] else 0.0, seed)
    return draw


def draw_rows(
    kind: str, names: Sequence[str], known: np.ndarray, share: float, seed: int
) -> np.ndarray:
    """Rows `(n,)` int64 of a share of the `known` ids: users or items, as `kind` says."""
    rows = np.flatnonzero(known).tolist()
    keys = {row: hashlib.sha256(f"{seed} {kind} {names[row]}".encode()).digest() for row in rows}
    chosen = sorted(rows, key=keys.__getitem__)[: round(share * len(rows))]
    return np.array(chosen, dtype=np.int64)


def blanked_scores(
    ranker: CTRRanker,
    rows: datasets.Dataset,
    draw: Mapping[str, np.ndarray],
    *,
    progress: bool = True,
) -> np.ndarray:
    """Logits `(rows,)` float32 of a prepared split with table rows blanked (see `draw_blanks`)."""
    with _blanked_table(ranker.model.model.cf, draw):
        return score_split(
            ranker.model,
            ranker.processor,
            rows,
            history_window=ranker.processor.history_window,
            max_tokens_per_batch=ranker.max_tokens_per_batch,
            progress=progress,
        )


@contextmanager
def _blanked_table(table: Any, draw: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Copies of the table's flags stand in for the call, with these rows unknown."""
    before = {f"{kind}_known": getattr(table, f"{kind}_known") for kind in draw}
    try:
        for kind, rows in draw.items():
            flags = before[f"{kind}_known"].clone()
            flags[:, torch.as_tensor(rows, device=flags.device)] = False
            setattr(table, f"{kind}_known", flags)
        yield
    finally:
        for name, flags in before.items():
            setattr(table, name, flags)


def _count_blanked(
    ranker: CTRRanker, rows: datasets.Dataset, draw: Mapping[str, np.ndarray]
) -> int:
    items = {ranker.processor.item_ids[row] for row in draw["item"].tolist()}
    users = {ranker.processor.user_ids[row] for row in draw["user"].tolist()}
    pairs = zip(rows["item_id"], rows["user_id"], strict=True)
    return sum(item in items or user in users for item, user in pairs)


def new_user_curve(
    checkpoints: Checkpoint | Mapping[str, Checkpoint],
    data_dir: str | Path,
    split: str = "test",
    likes: Sequence[int] = LIKES,
    seed: int = 0,
    max_rows: int | None = None,
    *,
    resamples: int = 1000,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """How well a new user is served, by the number of likes that the prompt is given.

    Rows whose history holds at least `max(likes)` items are scored for a user whom the model does
    not know, with the latest so many likes as the history; the same rows for every number, so that
    numbers compare (our choice of test). The model's history window applies as ever.

    Args:
        checkpoints: a ranker, a checkpoint folder, or several by the name of their method.
        data_dir: prepared folder.
        split: train, validation or test.
        likes: lengths of history.
        seed: of the sample of rows and of the bootstrap.
        max_rows: score whole users until this many rows are reached; default all such rows.
        resamples: of the user-level bootstrap.
        progress: show a bar for each pass.

    Returns:
        One entry a method and number: {method, likes, auc, auc_ci, uauc, uauc_ci, auc_change,
        auc_change_ci, uauc_change, uauc_change_ci, rows, users}. A change is paired, against the
        fewest likes. What is undefined is None.

    Raises:
        InputError: no numbers or a negative one, no row with a history that long, or a bad folder,
            split or checkpoint.
    """
    if not likes or min(likes) < 0:
        raise InputError(f"likes={list(likes)}: give numbers of likes from 0 on")
    rows = _load_split(data_dir, split)
    long = [row for row, past in enumerate(rows["history"]) if len(past) >= max(likes)]
    if not long:
        raise InputError(
            f"{data_dir}: no row of the {split} split stores a history of {max(likes)} likes, "
            "give smaller numbers"
        )
    rows = _sampled(rows.select(long), max_rows, seed)
    measure = Measure(rows, resamples, seed)
    entries = []
    for method, ranker in _rankers(checkpoints):
        metrics = {
            number: measure.metrics(scores_with_likes(ranker, rows, number, progress=progress))
            for number in sorted(set(likes))
        }
        for number in likes:
            entry = measure.entry(metrics[number], against=metrics[min(likes)])
            entries.append({"method": method, "likes": int(number)} | entry)
    return entries


def scores_with_likes(
    ranker: CTRRanker, rows: datasets.Dataset, likes: int, *, progress: bool = True
) -> np.ndarray:
    """Logits `(rows,)` float32 for an unknown user with the `likes` latest items of each history.

    A shorter history is taken whole.
    """
    # Not through `score_split`: it takes the histories of one user as beginnings of each other,
    # which the latest few are not.
    user = "new user"
    while user in ranker.processor.user_index:
        user += "'"
    places: dict[tuple[tuple[str, ...], str], int] = {}
    place = np.empty(len(rows), dtype=np.int64)
    for row, (past, item) in enumerate(zip(rows["history"], rows["item_id"], strict=True)):
        latest = tuple(past[max(0, len(past) - likes) :])
        place[row] = places.setdefault((latest, item), len(places))
    pairs = [{"user": user, "history": list(past), "item": item} for past, item in places]
    return ranker.pair_logits(pairs, progress=progress)[place]


class Measure:
    """AUC and UAUC of scores of the same rows, over the same resamples of users."""

    def __init__(self, rows: datasets.Dataset, resamples: int, seed: int) -> None:
        self.labels, self.users = np.asarray(rows["label"]), np.asarray(rows["user_id"])
        self.bootstrap = UserBootstrap(self.users, resamples, seed)

    def metrics(self, scores: np.ndarray) -> Metrics:
        """Value and resampled values `(resamples,)` by metric."""
        return {
            "auc": (auc(self.labels, scores), self.bootstrap.auc(self.labels, scores)),
            "uauc": (
                uauc(self.labels, scores, self.users),
                self.bootstrap.uauc(self.labels, scores),
            ),
        }

    def entry(self, metrics: Metrics, against: Metrics) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, (value, draws) in metrics.items():
            other, other_draws = against[name]
            result |= {name: _number(value), f"{name}_ci": _bounds(draws)}
            result |= {f"{name}_change": _number(value - other)}
            result |= {f"{name}_change_ci": _bounds(draws - other_draws)}
        return result | {"rows": len(self.labels), "users": len(np.unique(self.users))}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _bounds(draws: np.ndarray) -> list[float | None]:
    return [_number(bound) for bound in interval(draws)]


def _rankers(
    checkpoints: Checkpoint | Mapping[str, Checkpoint],
) -> Iterator[tuple[str, CTRRanker]]:
    """Methods by name, loaded one at a time."""
    if not isinstance(checkpoints, Mapping):
        checkpoints = {"model": checkpoints}
    for method, checkpoint in checkpoints.items():
        yield method, as_ranker(checkpoint)


def _load_split(data_dir: str | Path, split: str) -> datasets.Dataset:
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown: give one of {', '.join(SPLITS)}")
    rows = load_prepared(data_dir).splits[split]
    if not len(rows):
        raise InputError(f"{data_dir}: the {split} split has no rows to score")
    return rows


def _sampled(rows: datasets.Dataset, max_rows: int | None, seed: int) -> datasets.Dataset:
    return rows if max_rows is None else sample_users(rows, max_rows, seed)


def plot_blanked(result: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """AUC and UAUC against the share blanked, one column a side, one line a method.

    Args:
        result: of `blanked`.
        path: image to write; the suffix decides the format.

    Raises:
        InputError: the path cannot be written.
    """
    sides = list(dict.fromkeys(entry["side"] for entry in result))
    figure, panels = _panels(len(sides))
    for column, side in enumerate(sides):
        name = {"both": "items and users"}.get(side, f"{side}s")
        for metric, axes in zip(("auc", "uauc"), panels[:, column], strict=True):
            _curves(axes, [entry for entry in result if entry["side"] == side], "share", metric)
        panels[-1, column].set_xlabel(f"share of known {name} blanked")
    _legend(panels)
    save_figure(figure, path)


def plot_new_user_curve(result: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """AUC and UAUC of a new user against the number of likes, one line a method.

    Args:
        result: of `new_user_curve`.
        path: image to write; the suffix decides the format.

    Raises:
        InputError: the path cannot be written.
    """
    figure, panels = _panels(1)
    likes = sorted({entry["likes"] for entry in result})
    for metric, axes in zip(("auc", "uauc"), panels[:, 0], strict=True):
        _curves(axes, result, "likes", metric)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks(likes, labels=[str(number) for number in likes])
        axes.minorticks_off()
    panels[-1, 0].set_xlabel("likes that the prompt is given")
    _legend(panels)
    save_figure(figure, path)


def _panels(columns: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(0.8 + 4.2 * columns, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(2, columns, sharex="col", sharey="row", squeeze=False)


def _curves(axes: Axes, entries: Sequence[Mapping[str, Any]], x: str, metric: str) -> None:
    for method in dict.fromkeys(entry["method"] for entry in entries):
        mine = [entry for entry in entries if entry["method"] == method]
        mine = sorted((entry for entry in mine if entry[metric] is not None), key=lambda e: e[x])
        places = [entry[x] for entry in mine]
        (line,) = axes.plot(places, [e[metric] for e in mine], marker="o", ms=3, label=method)
        sure = [e for e in mine if None not in e[f"{metric}_ci"]]
        low, high = ([e[f"{metric}_ci"][end] for e in sure] for end in (0, 1))
        axes.fill_between([e[x] for e in sure], low, high, alpha=0.15, color=line.get_color())
    axes.set_ylabel(metric.upper())
    axes.label_outer()
    axes.grid(alpha=0.3)


def _legend(panels: Any) -> None:
    panels[0, 0].legend(fontsize=8, title="band: 95 % over users", title_fontsize=7)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure under a temporary name, then rename.

    Raises:
        InputError: the path cannot be written, or its suffix names no image format.
    """
    path = Path(path)
    # The partial file keeps the suffix, from which matplotlib knows the format.
    partial = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, dpi=150)
        partial.replace(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written ({error}); name a .png file") from error
    finally:
        partial.unlink(missing_ok=True)
