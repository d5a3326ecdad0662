"""The trainer: transformers' own, with packed batches, two learning rates and AUC validation."""

import json
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from ccf_llm_hf.data.grouping import Group, cut_by_budget
from ccf_llm_hf.evaluation.metrics import auc, fit_temperature, uauc
from ccf_llm_hf.training.collator import (
    IGNORED_LABEL,
    GroupDataLoader,
    GroupDataset,
    PackingCollator,
    TokenBudgetBatchSampler,
)
from ccf_llm_hf.training.recipe import Recipe, StageConfig

GATES_SHOWN = 2048


@dataclass
class Scores:
    """Scored samples in row order: numpy arrays `rows` (int64), `users` (str), `labels` (int64) and
    `logits` (float64), all of shape (samples,)."""

    rows: np.ndarray
    users: np.ndarray
    labels: np.ndarray
    logits: np.ndarray

    def metrics(self) -> dict[str, float]:
        """AUC, UAUC and mean BCE (nats) of the logits."""
        # log(1 + e^x) - y x, written so that it does not overflow.
        loss = np.logaddexp(0.0, self.logits) - self.labels * self.logits
        return {
            "auc": float(auc(self.labels, self.logits)),
            "uauc": float(uauc(self.labels, self.logits, self.users)),
            "loss": float(loss.mean()),
        }


def warmup_steps(warmup: float, steps: int) -> int:
    """Steps of warmup, rounded down: the first warmup step has a learning rate of 0, so a run of a
    few steps would learn nothing."""
    return int(warmup if warmup >= 1 else warmup * steps)


def training_arguments(
    recipe: Recipe, stage: StageConfig, output_dir: Path, accumulation: int, steps_per_epoch: int
) -> TrainingArguments:
    """The stage's settings as transformers `TrainingArguments`."""
    every = round(stage.eval_every_labels / stage.labels_per_step) or steps_per_epoch
    every = max(1, min(every, math.ceil(steps_per_epoch * stage.epochs)))
    return TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=stage.epochs,
        # Counts nothing here: the batch sampler decides what a batch is.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        average_tokens_across_devices=True,
        learning_rate=stage.fusion_learning_rate,
        warmup_steps=warmup_steps(stage.warmup, math.ceil(steps_per_epoch * stage.epochs)),
        lr_scheduler_type=stage.scheduler,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        logging_steps=max(1, min(10, every)),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_auc",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=recipe.seed,
        # Without this, torchrun on a machine with no accelerator ends up as unrelated processes.
        use_cpu=not torch.accelerator.is_available(),
        # Cold vectors take part only in batches that have a cold user or item.
        ddp_find_unused_parameters=True,
        ddp_broadcast_buffers=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
    )


class CCFLLMTrainer(Trainer):
    """Trains a `CCFLLMForCTR` on groups.

    Args:
        model: the model; what has `requires_grad` is trained.
        recipe, stage: settings; see `ccf_llm_hf.training.recipe`.
        output_dir: folder of the trainer checkpoints.
        processor: the model's `CCFLLMProcessor`.
        train_groups: training groups.
        eval_groups: validation groups; their AUC chooses the checkpoint.
        rank, world_size: this process among all that train together.

    Trainer checkpoints hold the slim form of the model, so they take megabytes. When training ends,
    the model carries the weights of the best validation AUC.
    """

    model: Any
    processing_class: Any
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        stage: StageConfig,
        output_dir: Path,
        processor: Any,
        train_groups: Sequence[Group],
        eval_groups: Sequence[Group],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stage = stage
        self.tokens_per_batch = recipe.tokens_per_batch
        self.batch_sampler = TokenBudgetBatchSampler(
            [processor.count_tokens(group) for group in train_groups],
            [len(group.labels) for group in train_groups],
            labels_per_step=stage.labels_per_step,
            tokens_per_batch=recipe.tokens_per_batch,
            epochs=math.ceil(stage.epochs),
            seed=recipe.seed,
            rank=rank,
            world_size=world_size,
        )
        patience = stage.early_stopping_patience
        super().__init__(
            model=model,
            args=training_arguments(
                recipe,
                stage,
                output_dir,
                self.batch_sampler.accumulation,
                self.batch_sampler.steps_per_epoch,
            ),
            data_collator=PackingCollator(processor),
            train_dataset=GroupDataset(train_groups),
            eval_dataset=GroupDataset(eval_groups),
            processing_class=processor,
            callbacks=[EarlyStoppingCallback(patience)] if patience else None,
        )
        if self.args.world_size != world_size:
            raise RuntimeError(f"planned for {world_size} ranks, got {self.args.world_size}")
        # Several GPUs without a launcher would mean DataParallel, which cannot split packed rows.
        self.args._n_gpu = min(1, self.args.n_gpu)
        self._labels_seen = 0
        self._train_seconds = 0.0

    def get_train_dataloader(self) -> GroupDataLoader:
        """This rank's batches; not prepared by accelerate, see `GroupDataLoader`."""
        return GroupDataLoader(
            self.train_dataset,
            batch_sampler=self.batch_sampler,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            # Drawing worker seeds from a generator of its own leaves dropout's random state alone.
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate for each of fusion, answer scale, gate and LoRA; biases and
        norms do not decay."""
        if self.optimizer is None:
            groups = []
            gate = self.model.gate_parameters()
            apart = {"answer_scale", *(name for name, _ in gate)}
            every = self.model.fusion_parameters() + self.model.head_parameters()
            fusion = [part for part in every if part[0] not in apart]
            answer = [part for part in every if part[0] == "answer_scale"]
            fusion_rate = self.stage.fusion_learning_rate
            for named, rate in (
                (fusion, fusion_rate),
                (answer, self.stage.answer_learning_rate or fusion_rate),
                (gate, self.stage.gate_learning_rate),
                (self.model.lora_parameters(), self.stage.lora_learning_rate),
            ):
                trained = [(name, p) for name, p in named if p.requires_grad]
                for decays in (True, False):
                    chosen = [p for _, p in trained if (p.ndim > 1) == decays]
                    decay = self.stage.weight_decay if decays else 0.0
                    if chosen:
                        groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
            self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        """As transformers', keeping count of labels and of the time spent on them."""
        started = time.monotonic()
        loss = super().training_step(model, inputs, *args)
        self._labels_seen += int((inputs["labels"] != IGNORED_LABEL).sum())
        self._train_seconds += time.monotonic() - started
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the time of the forward and backward passes since the last log, and the labels per
        second of all ranks."""
        if "loss" in logs and self._train_seconds:
            rate = self._labels_seen * self.args.world_size / self._train_seconds
            logs["labels_per_second"] = round(rate, 2)
            logs["train_seconds"] = round(self._train_seconds, 3)
            self._labels_seen, self._train_seconds = 0, 0.0
        super().log(logs, start_time)

    @torch.no_grad()
    def score(self, groups: Sequence[Group], progress: str = "validating") -> Scores:
        """Score groups, each rank its share; every rank returns all scores.

        Args:
            groups: labeled groups of one split.
            progress: caption of the bar on rank 0.
        """
        processor = self.processing_class
        lengths = [processor.count_tokens(group) for group in groups]
        batches = cut_by_budget(range(len(groups)), lengths, self.tokens_per_batch)
        mine = batches[self.args.process_index :: self.args.world_size]
        was_training = self.model.training
        self.model.eval()
        scored: list[tuple[int, str, int, float]] = []
        for batch in tqdm(mine, desc=progress, disable=self.args.process_index > 0, leave=False):
            scored += self._score_batch([groups[index] for index in batch])
        self.model.train(was_training)
        if self.args.world_size > 1:
            scored = gather_object(scored)
        rows, users, labels, logits = zip(*sorted(scored), strict=True)
        return Scores(np.array(rows), np.array(users), np.array(labels), np.array(logits))

    def _score_batch(self, groups: Sequence[Group]) -> list[tuple[int, str, int, float]]:
        inputs = self._prepare_inputs(self.data_collator(groups))
        logits = self.model(**inputs).logits.cpu().tolist()
        return [
            (row, group.user_id, label, logit)
            for group, scores in zip(groups, logits, strict=True)
            # Scores are padded to the longest group; zip stops at the group's own rows.
            for row, label, logit in zip(group.rows, group.labels, scores, strict=False)
        ]

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Validation metrics: `eval_auc`, `eval_uauc`, `eval_loss`, gate statistics, seconds.

        Fits the temperature on the same logits, so that every checkpoint carries its own.
        """
        started = time.monotonic()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        scores = self.score(dataset.groups)
        metrics = scores.metrics() | gate_statistics(self.model)
        metrics["temperature"] = float(fit_temperature(scores.logits, scores.labels))
        self.model.config.logit_temperature = metrics["temperature"]
        metrics["runtime"] = round(time.monotonic() - started, 2)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            self.model.save_pretrained(folder, form="slim")
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        self.model.load_trained_weights(folder)
        saved = json.loads((folder / CONFIG_NAME).read_text())
        self.model.config.logit_temperature = saved["logit_temperature"]

    def _load_best_model(self) -> None:
        # By step: the path that the state records is stale once the run's folder has been moved.
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        self._load_from_checkpoint(str(Path(str(self.args.output_dir)) / best))

    def train_or_resume(self) -> list[dict[str, float]]:
        """Train, going on from the last whole trainer checkpoint if there is one.

        Returns:
            The log history of the whole run. The model carries the best weights.
        """
        checkpoint = last_checkpoint(Path(str(self.args.output_dir)))
        if checkpoint is None:
            self.train()
            return self.state.log_history
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        control = state.stateful_callbacks["TrainerControl"]["args"]
        if state.global_step < state.max_steps and not control["should_training_stop"]:
            self.train(resume_from_checkpoint=str(checkpoint))
        else:
            self.state = state
            self._load_best_model()
        return self.state.log_history


@torch.no_grad()
def gate_statistics(model: Any) -> dict[str, float]:
    """Mean and standard deviation of the gate (share of text) over items and dimensions; empty for
    arms without a gate. At most 2048 items, evenly spread over the catalog."""
    if model.config.fusion not in ("gate", "scalar_gate"):
        return {}
    count = model.config.num_items
    items = torch.linspace(0, count - 1, min(count, GATES_SHOWN)).round().long()
    gates = model.item_gates(items.to(model.device)).float()
    return {"gate_mean": gates.mean().item(), "gate_std": gates.std().item()}


def last_checkpoint(folder: Path) -> Path | None:
    """The latest trainer checkpoint that was written to its end; None when there is none."""
    for checkpoint in sorted(_checkpoints(folder), key=_step, reverse=True):
        try:
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
            return checkpoint
        except (OSError, ValueError):
            continue
    return None


def delete_trainer_checkpoints(folder: Path) -> None:
    """Delete the trainer's checkpoints: optimizer states, of no use once a stage is finished."""
    for checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint)


def _checkpoints(folder: Path) -> Iterable[Path]:
    return list(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*"))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])
