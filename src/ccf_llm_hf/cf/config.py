"""What `ccf-llm fit-cf` can be told, per CF model."""

import math
from dataclasses import dataclass, field
from typing import Literal

from ccf_llm_hf.errors import InputError

CROSS_FIT = (
    "which vectors a training row sees: folds, those fitted on all folds of the (user, item) pairs "
    "but its own; snapshots, for data with time, those fitted on the slices of time before its own"
)
USERS = "; users, for answered histories, those fitted on all folds of the users but its own"


@dataclass
class MFConfig:
    """How to fit MF. The L2 strengths left at None are chosen by AUC on all of validation."""

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
    item_fields: list[str] = field(
        default_factory=list,
        metadata={
            "help": "fields of the items, such as author, whose values have vectors and biases "
            "too: an item's are its own plus the mean of each field's values'"
        },
    )
    l2_value_factors: float | None = field(
        default=None,
        metadata={"help": "L2 of the values' factors; default: chosen on validation"},
    )
    l2_value_bias: float | None = field(
        default=None,
        metadata={"help": "L2 of the values' biases; default: chosen on validation"},
    )
    field_scales: list[float] | None = field(
        default=None,
        metadata={
            "help": "standard deviations of each field's values beside those of the first, which "
            "has 1; default: chosen on validation"
        },
    )
    tastes: list[float] | None = field(
        default=None,
        metadata={
            "help": "variances of a user's own taste for each field's values, which a user who is "
            "folded in has beyond the vector; 0: none; default: chosen on validation"
        },
    )
    snapshots: int = field(
        default=20,
        metadata={
            "help": "cross_fit=snapshots: slices of the training rows by time, equal in rows "
            "(fewer where the tables would pass 1 GB)"
        },
    )
    cross_fit: Literal["folds", "users", "snapshots"] = field(
        default="folds", metadata={"help": CROSS_FIT + USERS}
    )
    folds: int = field(default=5, metadata={"help": "cross_fit=folds, users: folds, at least 2"})
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
        strengths = ("l2_factors", "l2_user_bias", "l2_item_bias")
        of_values = ("l2_value_factors", "l2_value_bias")
        _check_positive(self, *strengths, *of_values)
        for name in (*of_values, "field_scales", "tastes"):
            if getattr(self, name) is not None and not self.item_fields:
                raise InputError(f"{name} has no meaning without item_fields: leave it out")
        for name in ("field_scales", "tastes"):
            given = getattr(self, name)
            if given is None:
                continue
            if len(given) != len(self.item_fields) or not all(0 <= x < math.inf for x in given):
                raise InputError(
                    f"{name}={given} must be {len(self.item_fields)} numbers from 0, one for each "
                    "of item_fields"
                )
        _check_cross_fit(self, "folds", "users", "snapshots")


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
            "help": "cross_fit=snapshots: slices of the training rows by time, equal in rows "
            "(fewer where the tables would pass 1 GB)"
        },
    )
    cross_fit: Literal["folds", "snapshots"] = field(default="folds", metadata={"help": CROSS_FIT})
    folds: int = field(default=5, metadata={"help": "cross_fit=folds: folds, at least 2"})
    seed: int = field(default=0, metadata={"help": "of the initial vectors"})

    def __post_init__(self) -> None:
        _check_counts(self, "dim", "layers", "max_steps", "snapshots")
        _check_positive(self, "l2", "learning_rate")
        _check_cross_fit(self, "folds", "snapshots")


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


def _check_cross_fit(config: MFConfig | LightGCNConfig, *allowed: str) -> None:
    if config.cross_fit not in allowed:
        raise InputError(f"cross_fit={config.cross_fit!r} must be {' or '.join(allowed)}")
    if config.folds < 2:
        raise InputError(f"folds={config.folds} must be at least 2")
    idle = "folds" if config.cross_fit == "snapshots" else "snapshots"
    if getattr(config, idle) != getattr(type(config), idle):
        raise InputError(
            f"{idle}={getattr(config, idle)} has no meaning with cross_fit={config.cross_fit}: "
            f"add cross_fit={idle}, or leave it out"
        )


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
