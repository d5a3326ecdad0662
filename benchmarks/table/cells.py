"""The rows of the results table: which arm, on which track, over which CF model, trained how.

A cell is one row and one seed. What a stage does not say here is the recipe's default.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ccf_llm_hf.errors import InputError

TRACKS = {
    "protocol": "CF fitted on the train split only, histories of earlier likes (CoLLM's protocol)",
    "open": "CF fitted on every rating before the validation split, signed histories (ours)",
}
BUDGETS = ("quick", "full")
SMOLLM = "smollm2-135m-instruct"
GEMMA = "gemma-3-270m"
CF_NAMES = {"mf": "MF", "mf_nobias": "MF without biases", "mf_folds": "MF, five folds"}
CF_NAMES |= {"lightgcn": "LightGCN", "sasrec": "SASRec"}
# CF models with a row of their own, and those that a language model is fused with.
PROTOCOL_CF = ("mf", "mf_nobias", "lightgcn", "sasrec")
FUSED_CF = ("mf", "lightgcn", "sasrec")
# Labels that a stage of the quick budget trains on: what carries titles costs ten times as much.
QUICK_LABELS, QUICK_TITLE_LABELS = 12_000, 2_500
# Rows validated on at the end of training, by whether they do. With one epoch nothing is chosen by
# them; the full budget scores all of validation afterwards, the quick one takes these for it.
VALIDATION_SAMPLE = {False: 3_000, True: 1_500}

TITLES: dict[str, Any] = {
    "fusion": "text_only",
    "train": ["lora"],
    "history_window": [5, 16],
    "labels_per_step": 128,
    "lora_learning_rate": 1e-3,
}
SLOTS: dict[str, Any] = {
    "history_format": "slot",
    "candidate_format": "slot",
    "history_window": [20, 16],
    "labels_per_step": 64,
    "fusion_learning_rate": 1e-2,
    "gate_learning_rate": 2e-4,
    "lora_learning_rate": 1e-3,
    "answer_learning_rate": 1e-3,
}
# The answer's scale at the fusion's rate, at which it can fall to 0 and below: the rows of the open
# track were trained before that was seen, and the slow rate gains them nothing (docs/results.md).
FAST = {key: value for key, value in SLOTS.items() if key != "answer_learning_rate"}
# Without " (1995)" a title is half as many tokens.
TITLED = SLOTS | {"candidate_format": "title_slot", "title_years": False}
CONCAT = TITLED | {"fusion": "concat"}
FOLDED = {"cf_logit": True, "cf_fold_in": True, "fold_in_items": 220}
RANKING = {"pairwise_share": 0.5}
TAUGHT = {"cf_target_share": 0.9}


@dataclass(frozen=True)
class Cell:
    """One row of the table and one seed.

    `cf` names a CF table of the track, or is empty. `stage` holds the settings of its only stage;
    None marks a row that is not trained. `starts_from` names the row whose LoRA a two-stage
    cell takes and freezes; `average_of` the rows whose scores are averaged, a trained one last;
    `recent_likes_of` the row whose logits get the term of recent likes; `beside` another row that
    it is compared with besides the usual ones. `titles` says that labels cost the tokens of titles,
    `quick` that the row belongs to the quick budget too, `analyzed` that `--analyses` takes it
    unless told otherwise.
    """

    track: str
    arm: str
    cf: str = ""
    training: str = ""
    backbone: str = ""
    seed: int = 0
    stage: dict[str, Any] | None = None
    starts_from: str = ""
    average_of: tuple[str, ...] = ()
    recent_likes_of: str = ""
    beside: str = ""
    use_cf_snapshots: bool = True
    titles: bool = False
    quick: bool = False
    analyzed: bool = False

    @property
    def row(self) -> str:
        """Name of the row that the seeds share, for `--only`."""
        parts = (self.track, self.arm, self.cf, self.training, self.backbone)
        name = "-".join(part for part in parts if part)
        return re.sub(r"[^\w.-]+", "_", name.replace("+", "and"))

    @property
    def seeded(self) -> bool:
        """Whether the row depends on a seed."""
        return self.stage is not None or bool(self.backbone)

    @property
    def name(self) -> str:
        """Name of the cell: of its result file and its folder."""
        return f"{self.row}-seed{self.seed}" if self.seeded else self.row

    def is_the_method_for(self, other: "Cell") -> bool:
        """Whether it is the gate over MF, trained jointly, which the other seeded cells of the
        track are compared with (the paper trains it in two stages)."""
        mine = (self.arm, self.cf, self.training, self.backbone, self.track, self.seed)
        wanted = ("gate", "mf", "joint", SMOLLM, other.track, other.seed)
        return mine == wanted and other.seeded and self != other and other.track == "protocol"


def plan(tracks: Sequence[str], budget: str, seeds: int, dataset: str) -> list[Cell]:
    """All cells in the order in which they are computed: controls, then seed after seed.

    Args:
        tracks: which, of `TRACKS`.
        budget: `quick` has the rows that are marked quick only.
        seeds: 0 to `seeds` - 1.
        dataset: `ml-1m` has all rows, any other data set the quick ones.

    Raises:
        InputError: an unknown track or budget, or no seeds.
    """
    if budget not in BUDGETS:
        raise InputError(f"--budget must be one of {', '.join(BUDGETS)}, not {budget!r}")
    if seeds < 1:
        raise InputError(f"--seeds must be at least 1, not {seeds}")
    if not tracks:
        raise InputError(f"--tracks is empty: give any of {', '.join(TRACKS)}")
    if unknown := [track for track in tracks if track not in TRACKS]:
        raise InputError(f"--tracks must be of {', '.join(TRACKS)}, not {unknown[0]!r}")
    rows = [
        row for track in tracks for row in (protocol_rows if track == "protocol" else open_rows)()
    ]
    if budget == "quick" or dataset != "ml-1m":
        rows = [row for row in rows if row.quick]
    fixed = [row for row in rows if not row.seeded]
    return fixed + [replace(row, seed=seed) for seed in range(seeds) for row in rows if row.seeded]


def protocol_rows() -> list[Cell]:
    """Rows comparable with the literature."""
    mf = "protocol-CF-mf"
    blend = Cell("protocol", "average of MF and LightGCN", average_of=(mf, "protocol-CF-lightgcn"))
    recent = Cell("protocol", "CF, recent likes", cf="mf", recent_likes_of=mf)
    recent_blend = Cell(
        "protocol",
        "average of MF with recent likes and LightGCN",
        average_of=(recent.row, blend.average_of[1]),
    )
    text_only = Cell("protocol", "text_only", "", "LoRA", SMOLLM, stage=TITLES, titles=True)
    fusions = ("gate", "scalar_gate", "sum", "cf_only")
    arms = {fusion: SLOTS | {"fusion": fusion} for fusion in fusions}
    gate = arms["gate"]
    titled = _joint("gate, title candidates", TITLED | {"fusion": "gate"}, titles=True)
    joint = _joint("gate", gate, quick=True, analyzed=True)
    folds = _joint("gate, k-fold CF", gate, cf="mf_folds")
    taught_folds = _joint("gate, CF target, k-fold CF", gate | TAUGHT, cf="mf_folds")
    recent_gate = replace(
        taught_folds,
        arm=f"{taught_folds.arm}, recent likes",
        stage=None,
        recent_likes_of=taught_folds.row,
        beside=recent.row,
    )
    staged = _staged(text_only, "gate", gate)
    return [
        *(Cell("protocol", arm, quick=True) for arm in ("item mean", "item + user mean")),
        *(
            Cell("protocol", "CF", cf, quick=cf.startswith("mf"), analyzed=cf == "mf")
            for cf in PROTOCOL_CF
        ),
        blend,
        recent,
        recent_blend,
        joint,
        replace(text_only, quick=True, analyzed=True),
        *(_joint(arm, arms[arm], quick=True, analyzed=arm == "cf_only") for arm in fusions[1:]),
        _joint("gate and CF logit", gate | {"cf_logit": True}, quick=True, analyzed=True),
        _average("average of CF and text_only", (mf,), text_only, quick=True),
        _average("average of CF and gate", (mf,), joint, quick=True),
        replace(
            _average("average of CF, LightGCN and gate", blend.average_of, joint), beside=blend.row
        ),
        _joint("gate, ranking loss", gate | RANKING),
        *(_joint(f"{arm}, CF target", arms[arm] | TAUGHT) for arm in ("gate", "cf_only")),
        _joint("gate, in-sample CF", gate, use_cf_snapshots=False),
        _joint(
            "gate, in-sample CF, slot dropout", gate | {"slot_dropout": 0.3}, use_cf_snapshots=False
        ),
        folds,
        replace(
            _average("average of CF, LightGCN and gate, k-fold CF", blend.average_of, folds),
            beside=blend.row,
        ),
        _joint("gate and CF logit, k-fold CF", gate | {"cf_logit": True}, cf="mf_folds"),
        taught_folds,
        recent_gate,
        replace(
            _average(
                "average of CF and gate, both with recent likes, and LightGCN",
                recent_blend.average_of,
                recent_gate,
            ),
            beside=recent_blend.row,
        ),
        staged,
        *(_staged(text_only, arm, arms[arm]) for arm in fusions[1:]),
        _staged(text_only, "gate and CF logit", gate | {"cf_logit": True}),
        _staged(text_only, "gate, CF target", gate | TAUGHT),
        _average("average of CF and gate", (mf,), staged),
        *(_joint("gate", gate, cf=cf) for cf in FUSED_CF[1:]),
        _joint("gate", gate, backbone=GEMMA),
        titled,
        _joint("concat", CONCAT, titles=True, beside=titled.row),
        *(_joint("concat", CONCAT, cf=cf, titles=True) for cf in FUSED_CF[1:]),
        *(_staged(text_only, "concat", CONCAT, cf=cf, titles=True) for cf in FUSED_CF),
        _joint("gate, question last", gate | {"wording": "question_last"}),
    ]


def open_rows() -> list[Cell]:
    """Rows of what a practitioner would do with the same data."""
    gate = FAST | {"fusion": "gate"}
    folded = _joint("gate and folded CF logit", gate | FOLDED, track="open", quick=True)
    return [
        *(Cell("open", arm, quick=True) for arm in ("item mean", "item + user mean")),
        Cell("open", "CF", cf="mf", quick=True),
        Cell("open", "CF, folded in", cf="mf", quick=True),
        folded,
        _average("average of folded CF and gate", ("open-CF_folded_in-mf",), folded, quick=True),
        _joint("gate and folded CF logit, ranking loss", gate | FOLDED | RANKING, track="open"),
        _joint("cf_only and folded CF logit", FAST | FOLDED | {"fusion": "cf_only"}, track="open"),
        _joint("gate", gate, track="open"),
    ]


def name_of(row: Mapping[str, Any]) -> str:
    """A row in words: `gate (MF, joint)`; the usual backbone goes without saying."""
    details = [CF_NAMES.get(row["cf"], row["cf"]), row["training"]]
    details += [row["backbone"]] * (row["backbone"] != SMOLLM)
    details = [detail for detail in details if detail]
    return f"{row['arm']} ({', '.join(details)})" if details else row["arm"]


def _joint(
    arm: str, stage: dict[str, Any], *, track: str = "protocol", cf: str = "mf", **more: Any
) -> Cell:
    """One stage that trains fusion and LoRA together."""
    settings = {"backbone": SMOLLM, "training": "joint"} | more
    return Cell(track, arm, cf=cf, stage=stage | {"train": ["fusion", "lora"]}, **settings)


def _average(arm: str, cf_rows: tuple[str, ...], row: Cell, *, quick: bool = False) -> Cell:
    """The average of the standardized scores of CF rows and a trained one."""
    averaged: dict[str, Any] = {
        "average_of": (*cf_rows, row.row),
        "stage": None,
        "starts_from": "",
        "recent_likes_of": "",
    }
    return replace(row, arm=arm, cf="mf", **averaged, quick=quick, analyzed=False)


def _staged(
    first: Cell, arm: str, stage: dict[str, Any], *, cf: str = "mf", titles: bool = False
) -> Cell:
    """The paper's second stage: the LoRA of the `first` row, frozen, and a fresh fusion."""
    return Cell(
        "protocol",
        arm,
        cf,
        "two-stage",
        first.backbone,
        stage=stage | {"train": ["fusion"]},
        starts_from=first.row,
        titles=titles,
    )
