"""`CTRTrainingArguments`: transformers' `TrainingArguments`, and what packed CTR training adds."""

import math
import re
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ccf_llm_hf.errors import InputError

DEFAULT_RATES = {"lora_": 5e-4, r"\.gate\.": 2e-4}
MOST_EPOCHS = 1000
MOST_SEEDS = 2**32  # NumPy's limit
CHOOSING = ("eval_auc", "eval_uauc", "eval_loss")  # what validation measures


@dataclass
class CTRTrainingArguments(TrainingArguments):
    """All of `TrainingArguments`, with defaults of their own and the fields below.

    What a batch is, is decided by `labels_per_step` and `tokens_per_batch`: the trainer packs as
    many users into a forward pass as the tokens allow, and accumulates forward passes until a step
    has its labels. `per_device_train_batch_size` and `gradient_accumulation_steps` therefore keep
    their 1, and the trainer refuses others.

    Raises:
        InputError: a value that cannot be.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]
        *TrainingArguments._VALID_DICT_FIELDS,
        "learning_rate_mapping",
    ]

    labels_per_step: int = field(
        default=192, metadata={"help": "Labels per optimizer step, over all ranks."}
    )
    tokens_per_batch: int = field(
        default=1024,
        metadata={"help": "Tokens of one forward pass: memory and speed, not results."},
    )
    learning_rate_mapping: dict[str, float] | str | None = field(
        default_factory=lambda: dict(DEFAULT_RATES),
        metadata={
            "help": "Peak learning rates by regular expressions on parameters' names; the first "
            "that is found in a name holds, learning_rate where none is. The gate sums over twice "
            "the hidden size: the rate of the rest would drive it to 0 or 1 within a few steps."
        },
    )
    cf_distillation: float = field(
        default=0.0,
        metadata={
            "help": "How much of a label's place in the cross-entropy the CF model's own "
            "probability takes, in [0, 1]; slots are then read as the CF model means them."
        },
    )
    max_candidates: int = field(
        default=64,
        metadata={
            "help": "Labels of one user packed behind one prefix, at most; with 1 a label is a row "
            "by itself, as the papers train: the same scores, at many times the cost. Training on "
            "answered histories, whose streams are as long as the window, knows no such bound."
        },
    )
    likes_only_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the streams of answered lines whose dislikes are hidden from later "
            "lines, so that histories of likes alone, all that strangers give, are read well."
        },
    )
    has_times: bool = field(
        default=True,
        metadata={
            "help": "Whether the order of a user's rows means something. If not, lines that share "
            "a value of the processor's evidence_fields stand together in a stream, and validation "
            "finds evidence in all training rows of the user."
        },
    )
    max_train_labels: int = field(
        default=0, metadata={"help": "Train on a seeded sample of about this many labels; 0: all."}
    )
    max_eval_labels: int = field(
        default=0,
        metadata={"help": "Validate on a seeded sample of users with this many labels; 0: all."},
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={"help": "Stop after this many validations without a better AUC; 0: off."},
    )

    # Defaults of TrainingArguments that are others here.
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Stays 1: tokens_per_batch decides."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the labels."})
    learning_rate: float = field(
        default=2e-3, metadata={"help": "Peak rate of what learning_rate_mapping does not name."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the rates."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Warmup: a share of all steps below 1, else a step count."}
    )
    weight_decay: float = field(
        default=0.01, metadata={"help": "AdamW's; vectors and scalars are spared."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs of the loss."})
    eval_strategy: IntervalStrategy | str = field(
        default="epoch", metadata={"help": "When to validate: epoch, or steps with eval_steps."}
    )
    save_strategy: SaveStrategy | str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "When to save; default: whenever it validates."}
    )
    save_steps: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Steps between saves; default: eval_steps."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Trainer checkpoints to keep beside the best."}
    )
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "End with the weights of the best validation."}
    )
    metric_for_best_model: str | None = field(
        default="eval_auc", metadata={"help": "What chooses the best weights."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Let early stopping count on when a run resumes."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "The trainer makes its batches itself, from groups."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Inputs that are labels."}
    )
    seed: int = field(default=0, metadata={"help": "Of initialization, samples and order."})
    use_cpu: bool = field(
        # Without this, torchrun on a machine with no accelerator ends up as unrelated processes.
        default_factory=lambda: not torch.accelerator.is_available(),
        metadata={"help": "Train on the CPU; default: where there is no accelerator."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=True,
        metadata={"help": "Cold vectors take part only in batches with a cold user or item."},
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "The buffers are the CF tables, alike everywhere."}
    )

    def __post_init__(self) -> None:
        if not (self.use_cpu or torch.accelerator.is_available()):
            self.use_cpu = True
        if self.eval_strategy == "epoch" and self.eval_steps is not None:
            raise InputError(
                f"eval_steps={self.eval_steps} counts with eval_strategy: steps only; add it"
            )
        if self.save_strategy is None:
            self.save_strategy = IntervalStrategy(self.eval_strategy).value
        if self.save_steps is None:
            self.save_steps = self.eval_steps or self.logging_steps
        super().__post_init__()
        if self.learning_rate_mapping is None:
            self.learning_rate_mapping = {}
        if not isinstance(self.learning_rate_mapping, dict):
            raise InputError(
                f"learning_rate_mapping={self.learning_rate_mapping!r} must map patterns to rates"
            )
        self._check_values()

    def _check_values(self) -> None:
        for pattern in self.rates():
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(
                    f"learning_rate_mapping: {pattern!r} is no regular expression ({error})"
                ) from error
        if self.metric_for_best_model not in CHOOSING:
            raise InputError(
                f"metric_for_best_model={self.metric_for_best_model!r} is none of "
                f"{', '.join(CHOOSING)}"
            )
        if self.neftune_noise_alpha is not None:
            raise InputError("neftune_noise_alpha is for rows of words alone: leave it out")
        for name in ("labels_per_step", "tokens_per_batch", "max_candidates"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("max_train_labels", "max_eval_labels", "early_stopping_patience"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} must not be below 0")
        for name in ("cf_distillation", "likes_only_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)} must be from 0 to 1")
        rates = {f"learning_rate_mapping of {k}": v for k, v in self.rates().items()}
        for name in ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm"):
            rates[name] = getattr(self, name)
        for name, value in rates.items():
            most = 1 if "rate" in name else math.inf
            if not 0 <= value <= most or value == math.inf:
                bound = "from 0 to 1" if most == 1 else "a number that is not below 0"
                raise InputError(f"{name}={value} must be {bound}")
        if self.max_steps <= 0 and not 0 < self.num_train_epochs <= MOST_EPOCHS:
            raise InputError(
                f"num_train_epochs={self.num_train_epochs} must be above 0, at most {MOST_EPOCHS}"
            )
        for name in ("seed", "data_seed"):
            if not 0 <= (getattr(self, name) or 0) < MOST_SEEDS:
                raise InputError(f"{name}={getattr(self, name)} must be from 0 to {MOST_SEEDS - 1}")
        in_steps = self.load_best_model_at_end and self.eval_strategy == IntervalStrategy.STEPS
        if in_steps and self.save_steps != self.eval_steps and self.save_strategy == "steps":
            raise InputError(
                f"save_steps={self.save_steps} must be eval_steps={self.eval_steps}, or the best "
                "weights may not be there at the end: leave save_steps out"
            )

    def rates(self) -> dict[str, float]:
        """`learning_rate_mapping` with numbers for values."""
        assert isinstance(self.learning_rate_mapping, dict)
        return {pattern: float(rate) for pattern, rate in self.learning_rate_mapping.items()}

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of warmup, rounded down: the first has a learning rate of 0, so a run of a few
        steps would learn nothing."""
        share = 1 if self.warmup_steps >= 1 else num_training_steps
        return int(self.warmup_steps * share)
