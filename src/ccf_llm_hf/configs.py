"""What `prepare` and `fit-cf` can be told.

Apart from the code that they configure, and light to import: the command line shows their fields as
flags, and help must not wait for pandas and torch.
"""

from dataclasses import dataclass, field
from typing import Literal

from ccf_llm_hf.errors import InputError

SOURCES = ("ml-1m", "ml-100k", "ml-latest-small", "amazon-books", "collm", "table")


@dataclass
class PrepareConfig:
    """What to prepare, from where, and by which protocol.

    `ml-1m` follows CoLLM's protocol (months since the first rating's: train 14-23, validation
    24-28, test 29-33); `ml-100k` and `ml-latest-small` are cut 80/10/10 by time (our choice); all
    three take label = rating >= 4. `amazon-books` follows CoLLM's protocol (2017 only: train
    January-November, December halved by time, label = rating 5). `collm` keeps the rows that CoLLM
    published. Of the options below, the `ml-*` sources use `out`, `input`, `offline`, `cache_dir`,
    `histories` and `max_history` only, `amazon-books` the same without `offline` and
    `cache_dir`, `collm` `out` and `input` only, and `table` uses the others.
    """

    source: str = field(default="ml-1m", metadata={"help": ", ".join(SOURCES)})
    out: str = field(default="", metadata={"help": "folder to write"})
    input: str | None = field(
        default=None,
        metadata={
            "help": "folder of the raw files (ml-*: default is to download them; amazon-books: "
            "reviews and meta_ files as .json or .jsonl, also .gz; collm: the three _ood2.pkl)"
        },
    )
    offline: bool = field(default=False, metadata={"help": "ml-*: do not use the network"})
    cache_dir: str | None = field(
        default=None, metadata={"help": "ml-*: cache of downloads (default: $CCF_LLM_CACHE)"}
    )
    name: str | None = field(default=None, metadata={"help": "table: name in the dataset card"})
    interactions: str | None = field(
        default=None, metadata={"help": "table: .csv, .tsv (also .gz) or .parquet of interactions"}
    )
    items: str | None = field(
        default=None,
        metadata={"help": "table: file of items (default: titles are in the interactions)"},
    )
    user_column: str = field(default="user_id", metadata={"help": "table: column of user ids"})
    item_column: str = field(
        default="item_id", metadata={"help": "table: column of item ids, in both files"}
    )
    time_column: str = field(
        default="timestamp", metadata={"help": "table: column of times, Unix time or ISO dates"}
    )
    title_column: str = field(default="title", metadata={"help": "table: column of item titles"})
    rating_column: str | None = field(
        default=None, metadata={"help": "table: column of ratings (this or --label-column)"}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "table: column of 0/1 labels (this or --rating-column)"}
    )
    positive_threshold: float = field(
        default=4.0, metadata={"help": "table: label 1 is a rating of at least this"}
    )
    time_unit: str = field(default="s", metadata={"help": "table: unit of numeric times, s or ms"})
    split: str = field(
        default="ratio", metadata={"help": "table: ratio (shares by time) or time (given dates)"}
    )
    ratios: list[float] = field(
        default_factory=lambda: [0.8, 0.1, 0.1],
        metadata={"help": "table: shares of train, validation and test, cut in order of time"},
    )
    valid_start: str | None = field(
        default=None, metadata={"help": "table, split=time: validation starts (time or ISO date)"}
    )
    test_start: str | None = field(
        default=None, metadata={"help": "table, split=time: test starts (time or ISO date)"}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "table: license of the data, for its card: an id such as cc-by-4.0"},
    )
    language: str | None = field(
        default=None, metadata={"help": "table: language of the titles, for cards: en, de, ..."}
    )
    histories: str = field(
        default="likes",
        metadata={
            "help": "likes (the papers' protocol: earlier likes within the splits) or signed "
            "(all earlier rows, dislikes too, with their labels)"
        },
    )
    max_history: int | None = field(
        default=None, metadata={"help": "store only this many latest items of a history"}
    )


@dataclass
class MFConfig:
    """How to fit MF. The three L2 strengths left at None are chosen by AUC on all of validation."""

    dim: int = field(default=32, metadata={"help": "factor dimensions; biases add two more"})
    use_biases: bool = field(
        default=True,
        metadata={
            "help": "user, item and global biases; without them it is the peers' MF baseline"
        },
    )
    l2_factors: float | None = field(
        default=None, metadata={"help": "L2 of the factors; default: chosen on validation"}
    )
    l2_user_bias: float | None = field(
        default=None, metadata={"help": "L2 of the user biases; default: chosen on validation"}
    )
    l2_item_bias: float | None = field(
        default=None, metadata={"help": "L2 of the item biases; default: chosen on validation"}
    )
    snapshots: int = field(
        default=20,
        metadata={
            "help": "cross_fit=snapshots: slices of the training rows by time, equal in rows; each "
            "gets vectors fitted on the slices before it (fewer where the tables would pass 1 GB)"
        },
    )
    cross_fit: Literal["snapshots", "folds"] = field(
        default="snapshots",
        metadata={
            "help": "which vectors a training row sees: snapshots, those fitted on earlier slices; "
            "folds, those fitted on all folds of the (user, item) pairs but its own"
        },
    )
    folds: int = field(default=5, metadata={"help": "cross_fit=folds: folds, at least 2"})
    iterations: int | None = field(
        default=None,
        metadata={
            "help": "L-BFGS iterations of a fit, at most; default: 100, or 30 beyond 300,000 rows, "
            "where more of them no longer move AUC"
        },
    )
    rows: str = field(
        default="train",
        metadata={
            "help": "what to fit: train (the train split, the papers' protocol) or earlier (every "
            "interaction before the validation split)"
        },
    )
    targets: str = field(
        default="labels",
        metadata={
            "help": "what to fit: labels (0/1), or graded: sigmoid(1.5 (rating - midpoint)), where "
            "the midpoint lies between liked and disliked ratings"
        },
    )
    seed: int = field(
        default=0, metadata={"help": "of the initial factors, and of the users to tune on"}
    )

    def __post_init__(self) -> None:
        if self.rows not in ("train", "earlier"):
            raise InputError(f"rows={self.rows!r} is unknown: choose train or earlier")
        if self.targets not in ("labels", "graded"):
            raise InputError(f"targets={self.targets!r} is unknown: choose labels or graded")
        if self.targets == "graded" and self.rows != "earlier":
            raise InputError("targets=graded needs rows=earlier: the train split holds labels only")
        _check_counts(self, "dim", "snapshots", "iterations")
        _check_positive(self, "l2_factors", "l2_user_bias", "l2_item_bias")
        _check_cross_fit(self.cross_fit, self.folds)


@dataclass
class LightGCNConfig:
    """How to fit LightGCN. What is left at None is chosen by AUC on all of validation."""

    dim: int = field(default=64, metadata={"help": "dimensions of the vectors"})
    layers: int | None = field(
        default=None, metadata={"help": "propagation layers; default: chosen among 1, 2, 3"}
    )
    l2: float | None = field(
        default=None,
        metadata={"help": "L2 of the vectors before propagation; default: chosen on validation"},
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Adam's; default: chosen on validation"}
    )
    max_steps: int = field(
        default=200, metadata={"help": "full-batch steps of a fit; it stops early on validation"}
    )
    snapshots: int = field(
        default=10,
        metadata={
            "help": "cross_fit=snapshots: slices of the training rows by time, equal in rows; each "
            "gets vectors fitted on the slices before it (fewer where the tables would pass 1 GB)"
        },
    )
    cross_fit: Literal["snapshots", "folds"] = field(
        default="snapshots",
        metadata={
            "help": "which vectors a training row sees: snapshots, those fitted on earlier slices; "
            "folds, those fitted on all folds of the (user, item) pairs but its own"
        },
    )
    folds: int = field(default=5, metadata={"help": "cross_fit=folds: folds, at least 2"})
    seed: int = field(default=0, metadata={"help": "of the initial vectors"})

    def __post_init__(self) -> None:
        _check_counts(self, "dim", "layers", "max_steps", "snapshots")
        _check_positive(self, "l2", "learning_rate")
        _check_cross_fit(self.cross_fit, self.folds)


@dataclass
class SASRecConfig:
    """How to fit SASRec. What is left at None is chosen by AUC on all of validation."""

    dim: int = field(default=64, metadata={"help": "dimensions of the states and the items"})
    blocks: int = field(default=2, metadata={"help": "transformer blocks"})
    heads: int = field(default=1, metadata={"help": "attention heads of a block"})
    max_history: int = field(default=50, metadata={"help": "latest likes that the encoder reads"})
    dropout: float | None = field(
        default=None, metadata={"help": "dropout; default: chosen on validation"}
    )
    l2: float | None = field(
        default=None, metadata={"help": "Adam's L2; default: chosen on validation"}
    )
    item_bias: bool | None = field(
        default=None,
        metadata={"help": "item and global biases; default: chosen on validation"},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Adam's"})
    max_epochs: int = field(
        default=30, metadata={"help": "epochs of a fit; it stops early on validation"}
    )
    snapshots: int = field(
        default=10,
        metadata={
            "help": "slices of the training rows by time, equal in rows; each slice gets vectors "
            "fitted on the slices before it (fewer where the tables would pass 1 GB)"
        },
    )
    seed: int = field(default=0, metadata={"help": "of initial weights, order and dropout"})

    def __post_init__(self) -> None:
        _check_counts(self, "dim", "blocks", "heads", "max_history", "max_epochs", "snapshots")
        _check_positive(self, "learning_rate")
        if self.dim % self.heads:
            raise InputError(f"dim={self.dim} must be a multiple of heads={self.heads}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout} must be at least 0 and less than 1")
        if self.l2 is not None and not 0 <= self.l2 < float("inf"):
            raise InputError(f"l2={self.l2} must be zero or positive")


def _check_counts(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be at least 1")


def _check_cross_fit(cross_fit: str, folds: int) -> None:
    if cross_fit not in ("snapshots", "folds"):
        raise InputError(f"cross_fit={cross_fit!r} must be snapshots or folds")
    if folds < 2:
        raise InputError(f"folds={folds} must be at least 2")


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{name}={value} must be positive, or the optimum is at infinity")


CFConfig = MFConfig | LightGCNConfig | SASRecConfig
CF_CONFIGS: dict[str, type[CFConfig]] = {
    "mf": MFConfig,
    "lightgcn": LightGCNConfig,
    "sasrec": SASRecConfig,
}
