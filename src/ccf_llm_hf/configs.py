"""What `ccf-llm reproduce` can be told."""

from dataclasses import dataclass, field

REPRODUCIBLE = ("ml-1m", "ml-100k", "ml-latest-small")


@dataclass
class ReproduceConfig:
    """Which results to reproduce, and where they go."""

    dataset: str = field(default="ml-1m", metadata={"help": f"one of {', '.join(REPRODUCIBLE)}"})
    budget: str = field(
        default="quick",
        metadata={
            "help": "quick (one sitting: the main rows on a sample of the labels) or full (all "
            "rows, all labels)"
        },
    )
    seeds: int = field(default=1, metadata={"help": "seeds 0 to N - 1 of every trained row"})
    tracks: list[str] = field(
        default_factory=lambda: ["protocol", "open"],
        metadata={"help": "one or both of protocol and open, separated by a space"},
    )
    only: list[str] = field(
        default_factory=list,
        metadata={"help": "only cells of these names, or whose names contain one of these texts"},
    )
    workers: int = field(
        default=1,
        metadata={"help": "cells at a time, each in a process with its share of the cores"},
    )
    analyses: bool = field(
        default=False,
        metadata={
            "help": "after the cells: cold start, gate and calibration of the protocol track's "
            "main checkpoints, or of those that --only names"
        },
    )
    out: str = field(
        default="", metadata={"help": "folder of the results (default: results/DATASET)"}
    )
    work: str = field(
        default="",
        metadata={
            "help": "folder of data, tables, checkpoints and scores (default: "
            "runs/reproduce/DATASET)"
        },
    )
    offline: bool = field(default=False, metadata={"help": "do not use the network"})
