"""Recipes: what a training run does, as one YAML file.

A recipe is a list of stages on one backbone, one prepared data folder and one CF table. The two
stages of the paper, a single joint stage and every staged-training ablation are recipes, not code.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

import yaml
from transformers.trainer_utils import SchedulerType
from trl import TrlParser

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.configuration_ccf_llm import FUSION_ARMS, SCORE_HEADS
from ccf_llm_hf.modeling.processing_ccf_llm import HISTORIES
from ccf_llm_hf.modeling.prompt_ccf_llm import ITEM_FORMATS, WORDINGS

TRAINABLE_PARTS = ("fusion", "lora")
PRECISIONS = ("fp32", "bf16", "auto")


@dataclass
class StageConfig:
    """One stage: which parameters learn, on which prompt, for how long. An empty prompt setting
    means the processor's own default."""

    name: str = field(default="", metadata={"help": "Folder name of the stage."})
    fusion: str = field(default="gate", metadata={"help": f"Fusion arm, one of {FUSION_ARMS}."})
    cf_logit: bool = field(
        default=False, metadata={"help": "Add a learned scale times the CF model's own logit."}
    )
    cf_fold_in: bool = field(
        default=False,
        metadata={
            "help": "In that logit, solve for the user's vector from the signed history shown "
            "instead of looking it up; needs histories: signed and a CF table by fit-cf mf."
        },
    )
    fold_in_decay: float = field(
        default=1.0,
        metadata={"help": "Weight of a history item in cf_fold_in over the next later one's."},
    )
    slot_dropout: float = field(
        default=0.0,
        metadata={"help": "Share of CF vectors that training replaces by the cold vectors."},
    )
    pairwise_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the loss that ranks each liked candidate of a user above each "
            "disliked one packed with it, for UAUC; the rest is cross-entropy."
        },
    )
    cf_target_share: float = field(
        default=0.0,
        metadata={
            "help": "How much of a label's place in the cross-entropy the CF model's own "
            "probability takes, so that slots are read as the CF model means them; 0: none."
        },
    )
    train: list[str] = field(
        default_factory=lambda: ["fusion"],
        metadata={"help": "Parts that learn: fusion (alignment, gate, cold vectors), lora."},
    )
    init_from: str = field(
        default="",
        metadata={
            "help": "Where trained weights come from: an earlier stage's name, a slim checkpoint "
            "(folder, or Hub repository org/name or org/name@revision) or a PEFT adapter folder, "
            "whose LoRA rank and modules then hold. Its catalog may be another one than this "
            "run's. Empty: a fresh start. From another fusion arm only the LoRA adapter is taken."
        },
    )
    wording: str = field(default="", metadata={"help": f"Prompt wording, one of {WORDINGS}."})
    history_format: str = field(
        default="", metadata={"help": f"Rendering of a history item, one of {ITEM_FORMATS}."}
    )
    candidate_format: str = field(
        default="", metadata={"help": f"Rendering of a candidate item, one of {ITEM_FORMATS}."}
    )
    title_years: bool = field(
        default=True, metadata={"help": 'Write the year of titles such as "Heat (1995)".'}
    )
    history_window: list[int] = field(
        default_factory=list,
        metadata={"help": "[H, S]: at most H + S - 1 history items, in windows S apart."},
    )
    histories: str = field(
        default="",
        metadata={"help": f"What histories hold, one of {HISTORIES}; empty: as in the data."},
    )
    fold_in_items: int = field(
        default=0,
        metadata={"help": "Signed items before the window that cf_fold_in uses too; not shown."},
    )
    max_candidates: int = field(
        default=64,
        metadata={
            "help": "Labels of one user packed behind one prefix, at most; with 1 a label is a row "
            "by itself, as the papers train: the same scores, at many times the cost."
        },
    )
    max_train_labels: int = field(
        default=0, metadata={"help": "Train on a seeded sample of about this many labels; 0: all."}
    )
    epochs: float = field(default=1.0, metadata={"help": "Passes over the training labels."})
    labels_per_step: int = field(
        default=192, metadata={"help": "Labels per optimizer step, over all ranks."}
    )
    fusion_learning_rate: float = field(
        default=2e-3, metadata={"help": "Peak learning rate of the fusion parameters."}
    )
    answer_learning_rate: float = field(
        default=0.0,
        metadata={
            "help": "Peak learning rate of the answer's scale; 0: the fusion's. The scale starts "
            "at 0.1: a rate of 0.01 can take it to 0 and below within tens of steps, and at 0 the "
            "language model learns nothing."
        },
    )
    gate_learning_rate: float = field(
        default=2e-4,
        metadata={
            "help": "Peak learning rate of the gate. It sums over twice the hidden size, so the "
            "fusion's rate would drive it to 0 or 1 within a few steps."
        },
    )
    lora_learning_rate: float = field(
        default=5e-4, metadata={"help": "Peak learning rate of the LoRA parameters."}
    )
    warmup: float = field(
        default=0.05, metadata={"help": "Warmup: a share of all steps below 1, else a step count."}
    )
    scheduler: str = field(
        default="cosine", metadata={"help": "Learning rate schedule, a transformers name."}
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "AdamW weight decay; biases and norms are spared."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping; 0: off."})
    eval_every_labels: int = field(
        default=0,
        metadata={"help": "Validate and save after this many labels; 0: once per epoch."},
    )
    eval_max_labels: int = field(
        default=0,
        metadata={"help": "Validate during training on a seeded sample of users; 0: all labels."},
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={"help": "Stop after this many validations without a better AUC; 0: off."},
    )
    lora_r: int = field(default=8, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA alpha (scale alpha / r)."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"],
        metadata={"help": "Names of the linear layers that get LoRA."},
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout before LoRA; costs a quarter of the speed on CPU."}
    )

    def __post_init__(self) -> None:
        """Check types and values; raises `InputError`."""
        place = f"stage {self.name!r}"
        _coerce_fields(self, place)
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise InputError(
                f"every stage needs a `name` of letters, digits, dots and dashes; got {self.name!r}"
            )
        _one_of(place, "fusion", self.fusion, FUSION_ARMS)
        _one_of(place, "wording", self.wording, ("", *WORDINGS))
        for key in ("history_format", "candidate_format"):
            _one_of(place, key, getattr(self, key), ("", *ITEM_FORMATS))
        _one_of(place, "histories", self.histories, ("", *HISTORIES))
        if self.cf_fold_in and not self.cf_logit:
            raise InputError(f"{place}: `cf_fold_in` needs cf_logit: true")
        if not 0 < self.fold_in_decay <= 1:
            raise InputError(f"{place}: `fold_in_decay` must be above 0 and at most 1")
        if not 0 <= self.slot_dropout < 1:
            raise InputError(f"{place}: `slot_dropout` must be at least 0 and below 1")
        if not 0 <= self.pairwise_share <= 1:
            raise InputError(f"{place}: `pairwise_share` must be from 0 to 1")
        if not 0 <= self.cf_target_share <= 1:
            raise InputError(f"{place}: `cf_target_share` must be from 0 to 1")
        _one_of(place, "scheduler", self.scheduler, [s.value for s in SchedulerType])
        if not self.train:
            raise InputError(f"{place}: `train` must name at least one of {TRAINABLE_PARTS}")
        for part in self.train:
            _one_of(place, "train", part, TRAINABLE_PARTS)
        window = self.history_window
        if window and not (len(window) == 2 and window[0] >= 0 and window[1] >= 1):
            raise InputError(
                f"{place}: `history_window` must be [H, S], H >= 0 and S >= 1; got {window}"
            )
        for key in ("epochs", "labels_per_step", "max_candidates", "lora_r"):
            if getattr(self, key) <= 0:
                raise InputError(f"{place}: `{key}` must be above 0; got {getattr(self, key)}")
        for key, value in vars(self).items():
            if isinstance(value, (int, float)) and value < 0:
                raise InputError(f"{place}: `{key}` must not be below 0; got {value}")

    def reads_cf(self) -> bool:
        """Whether the stage reads the CF table."""
        return self.cf_logit or self.cf_target_share > 0 or self.fusion != "text_only"

    def prompt_settings(self) -> dict[str, Any]:
        """Settings for `CCFLLMProcessor.from_catalog`; what is left empty stays out, except that a
        text-only prompt has titles and concat has titles followed by slots."""
        item_format = {"text_only": "title", "concat": "title_slot"}.get(self.fusion, "")
        chosen = {
            "wording": self.wording,
            "history_format": self.history_format or item_format,
            "candidate_format": self.candidate_format or item_format,
        }
        settings: dict[str, Any] = {key: value for key, value in chosen.items() if value}
        if self.history_window:
            settings["history_window"] = tuple(self.history_window)
        if not self.title_years:
            settings["title_years"] = False
        if self.cf_fold_in:
            settings["fold_in_items"] = self.fold_in_items
        return settings


@dataclass
class Recipe:
    """A whole run. Every field but `stages` can be overridden by a flag of the same name."""

    data_dir: str = field(
        default="", metadata={"help": "Prepared data folder (`ccf-llm prepare ... --out`)."}
    )
    cf_dir: str = field(
        default="",
        metadata={"help": "CF table (`ccf-llm fit-cf ... --out`); empty only for text-only runs."},
    )
    output_dir: str = field(default="", metadata={"help": "Folder of the run, made if missing."})
    backbone: str = field(
        default="smollm2-135m-instruct",
        metadata={"help": "Language model: asset name, local folder or Hub id."},
    )
    backbone_revision: str = field(
        default="", metadata={"help": "Pinned revision of a Hub backbone."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of initialization, sampling and order."})
    score_head: str = field(
        default="yes_minus_no", metadata={"help": f"Score read-out, one of {SCORE_HEADS}."}
    )
    use_cf_snapshots: bool = field(
        default=True,
        metadata={
            "help": "Give a training row CF vectors that were not fitted on it: on earlier rows "
            "only, or on other folds (fit-cf --scheme fold). False repeats the in-sample leak of "
            "the literature, for comparison."
        },
    )
    tokens_per_batch: int = field(
        default=1024,
        metadata={"help": "Tokens of one forward pass; sets the gradient accumulation."},
    )
    precision: str = field(
        default="fp32",
        metadata={
            "help": "Of the frozen backbone while training: fp32; bf16 (far slower on CPUs that do "
            "not multiply it natively); or auto: bf16 where the hardware does. What learns, and "
            "all scores outside training, are fp32."
        },
    )
    offline: bool = field(default=False, metadata={"help": "Never look for a backbone online."})
    full_checkpoint: bool = field(
        default=True,
        metadata={"help": "Also write the full form: self-contained, as large as the backbone."},
    )
    rerun_changed: bool = field(
        default=False,
        metadata={"help": "Delete and retrain stages whose settings changed since they last ran."},
    )
    stages: list[StageConfig] = field(
        default_factory=list, metadata={"help": "The stages, in order (YAML only)."}
    )

    def __post_init__(self) -> None:
        """Turn stage mappings into `StageConfig` and check everything; raises `InputError`."""
        _coerce_fields(self, "recipe")
        if not isinstance(self.stages, list) or not self.stages:
            raise InputError("recipe: `stages` must be a list of at least one stage")
        self.stages = [_as_stage(stage, number) for number, stage in enumerate(self.stages, 1)]
        _one_of("recipe", "score_head", self.score_head, SCORE_HEADS)
        _one_of("recipe", "precision", self.precision, PRECISIONS)
        if self.tokens_per_batch < 1:
            raise InputError(
                f"recipe: `tokens_per_batch` must be above 0; got {self.tokens_per_batch}"
            )
        for key, file in (("data_dir", "protocol.json"), ("cf_dir", "cf_embeddings.safetensors")):
            self._check_folder(key, file)
        if not self.output_dir:
            raise InputError("recipe: `output_dir` is missing; name the folder of the run")
        self._check_stages()

    def needs_cf(self) -> bool:
        """Whether any stage reads the CF table."""
        return any(stage.reads_cf() for stage in self.stages)

    def _check_folder(self, key: str, file: str) -> None:
        folder = getattr(self, key)
        if not folder and key == "cf_dir" and not self.needs_cf():
            return
        if not folder:
            raise InputError(f"recipe: `{key}` is missing; name a folder that holds {file}")
        if not (Path(folder) / file).is_file():
            raise InputError(f"recipe: `{key}` {folder} has no {file}; make it or mend the path")

    def _check_stages(self) -> None:
        seen: set[str] = set()
        for stage in self.stages:
            if stage.name in seen:
                raise InputError(f"recipe: two stages are named {stage.name!r}; rename one")
            source = stage.init_from
            known = source in seen or Path(source).is_dir() or is_hub_repo(source)
            if source and not known:
                raise InputError(
                    f"stage {stage.name!r}: `init_from` {source!r} is neither an earlier stage, "
                    "nor a folder, nor a Hub repository (org/name or org/name@revision)"
                )
            if stage.fusion == "text_only" and "fusion" in stage.train:
                raise InputError(
                    f"stage {stage.name!r}: text_only has no fusion parameters; set train: [lora]"
                )
            seen.add(stage.name)


def is_hub_repo(source: str) -> bool:
    """Whether `source` reads `org/name` or `org/name@revision`, and is no mistyped path."""
    named = re.fullmatch(r"([\w-][\w.-]*)/[\w-][\w.-]*(@[\w./-]+)?", source)
    return bool(named and not Path(named[1]).is_dir())


def parse_recipe(argv: Sequence[str]) -> Recipe:
    """Recipe from `--config recipe.yaml` and flag overrides.

    Raises `InputError` for an unreadable file, unknown keys and flags, and impossible values;
    `--help` ends the program.
    """
    parser = _RecipeParser([Recipe], prog="ccf-llm train", description=__doc__)  # type: ignore[list-item]
    _check_flags(parser, argv)
    try:
        recipe, *unknown = parser.parse_args_and_config(list(argv), return_remaining_strings=True)
    except InputError:
        raise
    except (OSError, ValueError, yaml.YAMLError) as problem:
        reason = " ".join(str(problem).split())
        raise InputError(f"the recipe cannot be read: {reason}") from problem
    if unknown[0]:
        known = ", ".join(sorted(f.name for f in dataclasses.fields(Recipe)))
        key = unknown[0][0].lstrip("-")
        raise InputError(f"recipe: the unknown key {key!r}; known keys are {known}")
    return recipe


def _check_flags(parser: TrlParser, argv: Sequence[str]) -> None:
    """Refuse what no flag of the command takes, before any folder that the recipe names."""
    words = list(argv)
    if "--config" in words:
        place = words.index("--config")
        del words[place : place + 2]
    _, unknown = parser.parse_known_args(words)
    if not unknown:
        return
    flag = unknown[0].split("=")[0]
    if flag == "--config":
        raise InputError(f"two recipes are named, one of them {' '.join(unknown[1:2])}: give one")
    if not flag.startswith("--"):
        raise InputError(
            f"{flag} stands where a flag belongs: one recipe is taken, then --key value"
        )
    if flag.lstrip("-") in {f.name for f in dataclasses.fields(StageConfig)}:
        raise InputError(
            f"{flag} is a setting of a stage, which no flag overrides: change it under `stages` in "
            "the recipe"
        )
    known = ", ".join(f"--{f.name}" for f in dataclasses.fields(Recipe) if f.name != "stages")
    raise InputError(f"{flag} is no setting of a recipe that a flag overrides: these are {known}")


class _RecipeParser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"recipe: {message}")


def _as_stage(stage: Any, number: int) -> StageConfig:
    if isinstance(stage, StageConfig):
        return stage
    if not isinstance(stage, Mapping):
        raise InputError(f"recipe: stage {number} must be a mapping of settings; got {stage!r}")
    known = {f.name for f in dataclasses.fields(StageConfig)}
    unknown = sorted(str(key) for key in set(stage) - known)
    if unknown:
        raise InputError(
            f"recipe: stage {stage.get('name', number)!r} has the unknown key {unknown[0]!r}; "
            f"known keys are {', '.join(sorted(known))}"
        )
    return StageConfig(**stage)


def _one_of(place: str, key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        choices = ", ".join(choice for choice in allowed if choice)
        raise InputError(f"{place}: unknown `{key}` {value!r}; choose one of {choices}")


def _coerce_fields(config: Any, place: str) -> None:
    """Bring YAML values to their declared type (YAML reads 1e-3 as a string)."""
    for spec in dataclasses.fields(config):
        if spec.name == "stages":
            continue
        value = getattr(config, spec.name)
        try:
            setattr(config, spec.name, _coerce(spec.type, value))
        except (TypeError, ValueError):
            wanted = getattr(spec.type, "__name__", str(spec.type))
            raise InputError(f"{place}: `{spec.name}` must be {wanted}; got {value!r}") from None


def _coerce(kind: Any, value: Any) -> Any:
    if get_origin(kind) is list:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        return [_coerce(get_args(kind)[0], entry) for entry in value]
    if kind is str:
        if isinstance(value, (list, dict, bool)):
            raise TypeError
        return "" if value is None else str(value)
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if isinstance(value, bool) or (kind is int and isinstance(value, float) and value % 1):
        raise TypeError
    value = kind(value)
    if not math.isfinite(value):
        raise ValueError
    return value
