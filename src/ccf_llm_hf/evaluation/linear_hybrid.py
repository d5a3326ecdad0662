"""The linear control: what a feature engineer knows about a row, in one logistic regression."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from ccf_llm_hf.data.prepared import load_protocol, read_item_fields, read_items, read_rows
from ccf_llm_hf.data.protocol import SPLITS
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation.metrics import auc
from ccf_llm_hf.io import write_file

logger = logging.getLogger(__name__)

DEFINITION = (
    "logistic regression with L2 on the user, the item, its fields' values, TF-IDF of its title "
    "and the user's affinity to each value: the shrunken mean residual, beyond user and item "
    "biases, of the user's other training rows that share it, and their number; fields and "
    "strengths chosen on validation by AUC"
)
# Inside the prepared folder, which `prepare` replaces as a whole. The number is the method's.
FILE = "controls/linear_hybrid-1.parquet"

# What a block's features are multiplied with, which makes its L2 the weaker. These and what
# validation chooses from are our choice, made on Book-Crossing's validation split.
USER, ITEM, VALUE, AFFINITY, COUNT = 1.0, 0.5, 0.5, 3.0, 1.0
TITLES = (0.1, 0.2)
STRENGTHS = (1.0, 4.0)
SHRINKAGES = (2.0, 8.0)
ITERATIONS = 200

Blocks = dict[str, Any]  # a sparse matrix a split


@dataclass(frozen=True)
class Settings:
    """What validation chooses.

    Attributes:
        fields: those that take part, by their values and the user's affinity to them.
        title: what TF-IDF is multiplied with; 0 leaves titles out.
        strength: of L2.
        shrinkage: rows without a residual that an affinity is averaged with.
    """

    fields: tuple[str, ...] = ()
    title: float = 0.0
    strength: float = 2.0
    shrinkage: float = 4.0


def linear_hybrid(data_dir: str | Path, split: str) -> pd.DataFrame | None:
    """A split's scores by the linear hybrid, fitted on train.

    It is fitted once (a minute or two on Book-Crossing, with a progress bar on stderr) and kept in
    the prepared folder; where that cannot be written to, it is fitted by every call.

    Args:
        data_dir: folder written by `ccf-llm prepare`.
        split: train, validation or test.

    Returns:
        `score` (logit) and `prob`, in the order of the split; None where the items have no fields,
        or train has one class only.

    Raises:
        InputError: no such folder, or one of its files is damaged.
    """
    fields = load_protocol(Path(data_dir)).get("item_fields", [])
    rows = {name: read_rows(data_dir, name) for name in SPLITS}
    if not fields or rows["train"]["label"].nunique() < 2:
        return None
    file = Path(data_dir) / FILE
    if not file.is_file():
        found = read_items(data_dir).join(pd.DataFrame(read_item_fields(data_dir, fields)))
        scores = fit_linear_hybrid(rows, found, fields)
        table = pd.concat([part.assign(split=name) for name, part in scores.items()])
        try:
            write_file(file, lambda partial: table.to_parquet(partial, index=False))
        except OSError as error:
            logger.warning("the linear hybrid's scores are not kept: %s", error)
            return scores[split]
    try:
        kept = pd.read_parquet(file, columns=["split", "score", "prob"])
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file} is damaged: delete it, to have it made again") from error
    return kept.loc[kept["split"] == split, ["score", "prob"]].reset_index(drop=True)


def fit_linear_hybrid(
    rows: Mapping[str, pd.DataFrame],
    items: pd.DataFrame,
    fields: Sequence[str],
    *,
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """Fit on train, choose by validation, score every split.

    Args:
        rows: by split, among them train and validation: user_id, item_id, label. No other split's
            labels are read.
        items: the catalog: item_id, title and the fields, each text, a list of text, or missing.
        fields: columns of `items`.
        progress: show a bar on stderr.

    Returns:
        `score` (logit) and `prob` by split, in the order of its rows.
    """
    features = _Features(rows, items, fields)
    wanted = rows["validation"]["label"]
    best = Settings()
    scores = features.fit(best)
    reached = auc(wanted, scores["validation"])
    changes = list(_changes(fields))
    with tqdm(changes, desc="linear hybrid", unit="fit", disable=not progress) as bar:
        for name, value in bar:
            change: dict[str, Any] = {name: value}
            if name == "fields":
                change = {name: (*best.fields, value)}
            tried = replace(best, **change)
            found = features.fit(tried)
            if (figure := auc(wanted, found["validation"])) > reached:
                best, scores, reached = tried, found, figure
            bar.set_postfix_str(f"validation AUC {reached:.4f}")
    logger.info("linear hybrid: %s", best)
    return {
        split: pd.DataFrame({"score": logits, "prob": _sigmoid(logits)})
        for split, logits in scores.items()
    }


def _changes(fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Changes of the settings to try in turn, each kept if validation gains by it."""
    yield from (("fields", field) for field in fields)
    yield from (("title", scale) for scale in TITLES)
    yield from (("strength", strength) for strength in STRENGTHS)
    yield from (("shrinkage", rows) for rows in SHRINKAGES)


class _Features:
    """Of every split, as sparse blocks of one row a row."""

    def __init__(
        self, rows: Mapping[str, pd.DataFrame], items: pd.DataFrame, fields: Sequence[str]
    ) -> None:
        self.labels = rows["train"]["label"].to_numpy(dtype=np.float64)
        names = pd.Index(rows["train"]["user_id"].unique())
        catalog = pd.Index(items["item_id"])
        self.users = {split: names.get_indexer(table["user_id"]) for split, table in rows.items()}
        shown = {
            split: _one_hot(catalog.get_indexer(table["item_id"]), len(catalog))
            for split, table in rows.items()
        }
        self.biases: Blocks = {
            split: sp.hstack([USER * _one_hot(users, len(names)), ITEM * shown[split]])
            for split, users in self.users.items()
        }
        words = _tf_idf(items["title"])
        self.titles: Blocks = {split: chosen @ words for split, chosen in shown.items()}
        self.values: dict[str, Blocks] = {}
        for field in fields:
            values = _multi_hot(items[field])
            self.values[field] = {split: (chosen @ values) for split, chosen in shown.items()}

    def fit(self, settings: Settings) -> dict[str, np.ndarray]:
        """Logits by split."""
        parts = {split: [matrix] for split, matrix in self.biases.items()}
        if settings.fields:
            expected = _sigmoid(self._logits(self.biases, settings)["train"])
        for field in settings.fields:
            affinity = self._affinity(field, expected, settings)
            for split, matrix in self.values[field].items():
                parts[split] += [VALUE * matrix, affinity[split]]
        if settings.title:
            for split, matrix in self.titles.items():
                parts[split].append(settings.title * matrix)
        return self._logits({split: sp.hstack(part) for split, part in parts.items()}, settings)

    def _logits(self, blocks: Blocks, settings: Settings) -> dict[str, np.ndarray]:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=1 / settings.strength, max_iter=ITERATIONS)
        # Products of sparse matrices run on one thread; others would only spin beside it.
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # validation judges what is there
            model.fit(blocks["train"].tocsr(), self.labels)
        return {split: model.decision_function(part.tocsr()) for split, part in blocks.items()}

    def _affinity(self, field: str, expected: np.ndarray, settings: Settings) -> Blocks:
        """The user's affinity to the field's values that a row has, and the number of rows it is
        from, as `(rows, 2)`.

        A training row is left out of its own affinity, and, to first order, out of the user's bias
        beyond which the others' residuals are: they would tell its label.
        """
        users, count = self.users, self.values[field]["train"].shape[1]
        pairs = {}
        for split, matrix in self.values[field].items():
            found = matrix.tocoo()
            known = users[split][found.row] >= 0
            places = found.row[known]
            pairs[split] = places, users[split][places] * np.int64(count) + found.col[known]
        rows, codes = pairs["train"]
        residuals, weights = self.labels - expected, expected * (1 - expected)
        known_codes, places = np.unique(codes, return_inverse=True)
        sums = np.bincount(places, residuals[rows])
        curvatures = np.bincount(places, weights[rows])
        numbers = np.bincount(places).astype(np.float64)
        # The curvature of the loss in a user's bias, of which the row's own is taken away.
        bend = np.bincount(users["train"], weights) + settings.strength / USER**2
        shift = residuals / (bend[users["train"]] - weights)
        blocks = {}
        for split, (at, wanted) in pairs.items():
            place = np.searchsorted(known_codes, wanted).clip(max=len(known_codes) - 1)
            there = known_codes[place] == wanted
            total, number = sums[place] * there, numbers[place] * there
            if split == "train":
                total += (curvatures[place] - weights[at]) * shift[at] - residuals[at]
                number -= 1
            size = len(users[split])
            total, number = (np.bincount(at, part, minlength=size) for part in (total, number))
            mean = total / (number + settings.shrinkage)
            blocks[split] = sp.csr_matrix(np.stack([AFFINITY * mean, COUNT * np.log1p(number)], 1))
        return blocks


def _one_hot(codes: np.ndarray, width: int) -> Any:
    """`(rows, width)`, a row of zeros where the code is negative."""
    rows = np.flatnonzero(codes >= 0)
    return sp.csr_matrix((np.ones(len(rows)), (rows, codes[rows])), shape=(len(codes), width))


def _multi_hot(values: pd.Series) -> Any:
    """`(items, values)` of a field, text or lists of text, compared without case."""
    lists = values.map(lambda given: [given] if isinstance(given, str) else given)
    texts = lists.reset_index(drop=True).explode().dropna().str.strip().str.casefold()
    texts = texts[texts != ""]
    codes, names = pd.factorize(texts)
    shape = (len(values), len(names))
    return sp.csr_matrix((np.ones(len(codes)), (texts.index, codes)), shape=shape).sign()


def _tf_idf(titles: pd.Series) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True)
    if not titles.str.contains(r"\w").any():
        return sp.csr_matrix((len(titles), 0))
    return vectorizer.fit_transform(titles)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))
