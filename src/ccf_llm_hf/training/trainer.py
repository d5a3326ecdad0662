"""The trainer: transformers' own, on packed batches, with rates by name and AUC validation."""

import dataclasses
import math
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, PredictionOutput
from transformers.utils import logging

from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data.grouping import (
    Groups,
    check_histories,
    frozen_lines,
    group_split,
    group_streams,
    sample_group,
)
from ccf_llm_hf.data.rows import Rows
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation.metrics import TEMPERATURES, auc, fit_temperature, uauc
from ccf_llm_hf.modeling.checkpoint_ccf_llm import FUSION_FILE, one_line
from ccf_llm_hf.modeling.configuration_ccf_llm import IGNORED_LABEL, CCFLLMConfig
from ccf_llm_hf.modeling.modeling_ccf_llm import CF_INPUTS, CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
from ccf_llm_hf.modeling.ranking_ccf_llm import check_positions, cut_by_budget, score
from ccf_llm_hf.training.arguments import DEFAULT_RATES, MOST_EPOCHS, CTRTrainingArguments
from ccf_llm_hf.training.collator import (
    GroupDataLoader,
    GroupDataset,
    PackingCollator,
    TokenBudgetBatchSampler,
)
from ccf_llm_hf.training.cross_fit import (
    check_folded,
    check_known,
    choose_fits,
    install_cross_fit,
)
from ccf_llm_hf.training.lora import inject_lora, record_of
from ccf_llm_hf.training.memory import HeapTrimmer
from ccf_llm_hf.training.sharding import by_ddp, shard_backbone, sharding_asked
from ccf_llm_hf.training.warm_start import load_trained_weights

logger = logging.get_logger(__name__)

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


class CTRTrainer(Trainer):
    """Trains a `CCFLLMForCTR` on splits of a prepared folder.

    Alignment networks, gate and cold vectors learn if the processor's prompt shows slots, LoRA if
    `peft_config` is given, the scales of the score always; the backbone is frozen. Trainer
    checkpoints hold the slim form of the model, so they take megabytes. When training ends, the
    model carries the weights of the best validation AUC.

    Args:
        model: by `CCFLLMForCTR.from_backbone` or `from_pretrained`.
        args: default `CTRTrainingArguments()`.
        train_dataset: rows as `load_prepared(folder).splits["train"]` has them, or, in a tenth of
            the memory, as its `rows("train")` gives them.
        eval_dataset: rows of the validation split; their AUC chooses the checkpoint.
        processing_class: the model's processor; its window groups the rows. Where its histories are
            answered, a user's training rows are streams of at most the longest window's lines.
        peft_config: LoRA to inject into the backbone, or the settings of the LoRA that is in it
            already, which then learns on.
        cf: the CF vectors with all their fits; a training row sees one that was not fitted on it.
            Without, only a model that reads no CF vectors can be trained.
        callbacks, optimizers: as in `Trainer`.

    Raises:
        InputError: arguments that do not go together; the message names the mend.
    """

    model: CCFLLMForCTR
    args: CTRTrainingArguments
    processing_class: CCFLLMProcessor
    data_collator: PackingCollator

    def __init__(
        self,
        model: CCFLLMForCTR,
        args: CTRTrainingArguments | None = None,
        train_dataset: Dataset | Rows | None = None,
        eval_dataset: Dataset | Rows | None = None,
        processing_class: CCFLLMProcessor | None = None,
        peft_config: peft.LoraConfig | None = None,
        cf: CFVectors | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if processing_class is None:
            raise InputError("CTRTrainer needs processing_class, the processor of the model")
        args = args or CTRTrainingArguments()
        check_left_to_sampler(args)
        check_engine(args)
        taught = args.cf_distillation > 0
        reads_cf = processing_class.uses_slots or model.config.cf_logit or taught
        fitted = model.config.num_users > 0 or taught
        if reads_cf and fitted and cf is None and train_dataset is not None:
            raise InputError(
                "the model reads CF vectors that were fitted on the training rows: give cf=, with "
                "which each row sees vectors that were not"
            )
        self.cf = cf if reads_cf else None
        train_rows = None if train_dataset is None else Rows.of(train_dataset)
        try:
            model.check_slim()
        except ValueError as problem:
            raise InputError(f"its checkpoints could not hold the model: {problem}") from problem
        # Before anything else draws random numbers: a run's seed decides how LoRA starts.
        _prepare_lora(model, peft_config)
        choose_trained(model, fusion=processing_class.uses_slots, lora=peft_config is not None)
        if self.cf is not None:
            check_folded(model, self.cf, model.config.cf_logit or taught)
            if train_rows is not None:
                check_known(model, self.cf, train_rows)
            install_cross_fit(model, self.cf)
        self.train_groups: Groups | None = None
        self.eval_groups: Groups | None = None
        self.lines = None
        if train_rows is not None:
            self.lines = None if args.has_times else frozen_lines(train_rows)
            groups = group_training(train_rows, processing_class, args, self.cf)
            self.train_groups = sample_groups(groups, args.max_train_labels, args.seed)
            self.batch_sampler = plan_batches(self.train_groups, processing_class, args)
            check_lengths(model, processing_class, self.train_groups, self.batch_sampler.lengths)
            args = _with_plan(args, self.batch_sampler)
        if eval_dataset is not None:
            groups = group_split(
                eval_dataset, processing_class, args.max_candidates, lines=self.lines
            )
            self.eval_groups = sample_users(groups, args.max_eval_labels, args.seed)
            check_classes(self.eval_groups, str(args.metric_for_best_model))
            lengths = [processing_class.count_tokens(group) for group in self.eval_groups]
            check_lengths(model, processing_class, self.eval_groups, lengths)
        callbacks = [*(callbacks or []), HeapTrimmer()]
        if args.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
        self.sharded = sharding_asked() and args.world_size > 1
        with by_ddp():
            super().__init__(
                model=model,
                args=args,
                data_collator=PackingCollator(processing_class),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        self.label_smoother = None  # theirs is for tokens; see compute_loss
        self._labels_seen = 0
        self._train_seconds = 0.0

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.sharded:
            shard_backbone(self.model, device, self.args.world_size)
        else:
            super()._move_model_to_device(model, device)

    def get_train_dataloader(self) -> GroupDataLoader:
        """This rank's batches; not prepared by accelerate, see `GroupDataLoader`."""
        workers = self.args.dataloader_num_workers
        return GroupDataLoader(
            GroupDataset(self.train_groups or []),
            batch_sampler=self.batch_sampler,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            num_workers=workers,
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            # Drawing worker seeds from a generator of its own leaves dropout's random state alone.
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices; biases, norms, cold vectors and scales do not decay."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """transformers' optimizer, with the learning rates of `learning_rate_mapping`."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        named = list((self.model if model is None else model).named_parameters())
        for pattern in self.args.rates():
            if pattern not in DEFAULT_RATES and not any(re.search(pattern, n) for n, _ in named):
                warnings.warn(
                    f"learning_rate_mapping: {pattern!r} is found in no parameter's name",
                    stacklevel=2,
                )
        rates = {id(parameter): self._rate_of(name) for name, parameter in named}
        groups = []
        for group in optimizer.param_groups:
            for rate in sorted({rates[id(p)] for p in group["params"]}):
                chosen = [p for p in group["params"] if rates[id(p)] == rate]
                groups.append({**group, "params": chosen, "lr": rate})
        optimizer.param_groups[:] = groups
        return optimizer

    def _rate_of(self, name: str) -> float:
        for pattern, rate in self.args.rates().items():
            if re.search(pattern, name):
                return rate
        return self.args.learning_rate

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's loss, on labels that `cf_distillation` draws to the CF model's own
        probabilities and `label_smoothing_factor` to one half."""
        labels = inputs["labels"].float()
        targets = labels
        if share := self.args.cf_distillation:
            given = {name: inputs[name] for name in CF_INPUTS if name in inputs}
            with torch.no_grad():
                taught = torch.sigmoid(self.model.cf_logits(**given).float())
            targets = torch.lerp(targets, taught, share)
        if share := self.args.label_smoothing_factor:
            targets = torch.lerp(targets, torch.full_like(targets, 0.5), share)
        targets = torch.where(labels == IGNORED_LABEL, labels, targets)
        inputs = {**inputs, "labels": targets}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

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
        # A gradient that is no number, say: the state of a trainer is JSON, which has none such.
        finite = {k: v for k, v in logs.items() if not isinstance(v, float) or math.isfinite(v)}
        super().log(finite, start_time)

    def score(self, groups: Groups) -> Scores:
        """Score labeled groups, each rank its share; every rank returns all scores."""
        lengths = np.array([self.processing_class.count_tokens(group) for group in groups])
        # Neighbors are alike in length, so that the ranks have about the same to do.
        order = np.argsort(-lengths, kind="stable")
        mine = groups.take(order[self.args.process_index :: self.args.world_size])
        tokens = self.args.tokens_per_batch
        if self.sharded:  # no row in parts, which would not begin at the model itself
            longest = int(lengths.max(initial=0))
            tokens = max(tokens, len(self.processing_class.prompt.instruction()) + longest)
        progress = self.args.process_index == 0 and not self.args.disable_tqdm
        options = {"tokens_per_batch": tokens, "progress": progress}
        scored = [
            (row, group.user, label, logit)
            for part in mine.parts()
            for group, values in zip(
                part, score(self.model, self.processing_class, part, **options), strict=True
            )
            for row, label, logit in zip(group.rows, group.labels, values.tolist(), strict=True)
        ]
        if self.sharded:
            passes = sum(
                len(cut_by_budget([self.processing_class.count_tokens(g) for g in part], tokens))
                for part in mine.parts()
            )
            for _ in range(max(gather_object([passes])) - passes):
                score(self.model, self.processing_class, [groups[int(order[-1])]])  # for the others
        if self.args.world_size > 1:
            scored = gather_object(scored)
        rows, users, labels, values = zip(*sorted(scored), strict=True)
        return Scores(np.array(rows), np.array(users), np.array(labels), np.array(values))

    def evaluate(
        self,
        eval_dataset: Dataset | Rows | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Validation metrics: `eval_auc`, `eval_uauc`, `eval_loss`, gate statistics, seconds.

        Without `eval_dataset` fits the temperature on the same logits, so that every checkpoint
        carries its own.
        """
        started = time.monotonic()
        scores = self.score(self._groups_of(eval_dataset))
        metrics = scores.metrics()
        if self.processing_class.uses_slots:
            metrics |= gate_statistics(self.model)
        if eval_dataset is None:
            metrics["temperature"] = choose_temperature(scores)
            self.model.config.logit_temperature = metrics["temperature"]
        metrics["runtime"] = round(time.monotonic() - started, 2)
        metrics = {
            f"{metric_key_prefix}_{key}": value
            for key, value in metrics.items()
            if math.isfinite(value)  # UAUC is not where no user has both classes
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def predict(
        self,
        test_dataset: Dataset | Rows,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Logits (float64) and labels of a split's rows, in row order, and their metrics."""
        scores = self.score(self._groups_of(test_dataset))
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in scores.metrics().items()}
        return PredictionOutput(scores.logits, scores.labels, metrics)

    def _groups_of(self, dataset: Dataset | Rows | None) -> Groups:
        if dataset is None:
            if self.eval_groups is None:
                raise InputError("the trainer was given no eval_dataset: give the rows to score")
            return self.eval_groups
        return group_split(
            dataset, self.processing_class, self.args.max_candidates, lines=self.lines
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            self.model.save_pretrained(folder, form="slim")
            self.processing_class.save_pretrained(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # transformers copies the weight files that it knows; the slim form has others.
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self._save()
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._load_weights(Path(resume_from_checkpoint))
        with _resuming(resume_from_checkpoint, TRAINER_STATE_NAME):
            TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # into files of their own
        with _resuming(checkpoint, *([] if sharded else [OPTIMIZER_NAME, SCHEDULER_NAME])):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        several = self.args.world_size > 1
        name = f"rng_state_{self.args.process_index}.pth" if several else "rng_state.pth"
        found = {file.name for file in Path(checkpoint or "").glob("rng_state*.pth")}
        of_another_number = found and name not in found  # of processes: this one draws anew
        with _resuming(checkpoint, *([] if of_another_number else [name])):
            super()._load_rng_state(checkpoint)

    def _load_weights(self, folder: Path) -> None:
        if not (folder / FUSION_FILE).is_file():
            raise InputError(
                f"resume_from_checkpoint {folder} is no trainer checkpoint: name a folder "
                f"{PREFIX_CHECKPOINT_DIR}-N of the run"
            )
        saved = CCFLLMConfig.from_pretrained(folder)
        if saved.backbone_fingerprint != self.model.config.backbone_fingerprint:
            raise InputError(
                f"{folder} was trained on other weights of {saved.backbone_name!r} than those "
                "loaded now: restore them, or name another output_dir"
            )
        load_trained_weights(self.model, folder)
        self.model.config.logit_temperature = saved.logit_temperature

    def load_best(self) -> None:
        """Load the weights of the best validation, found by step: the path that the state records
        is stale once the run's folder has been moved."""
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        self._load_weights(Path(str(self.args.output_dir)) / best)

    def _load_best_model(self) -> None:
        self.load_best()


@contextmanager
def _resuming(checkpoint: str | None, *names: str) -> Iterator[None]:
    """Have whatever transformers makes of a damaged or missing file of a trainer checkpoint end in
    an InputError that names the first one that cannot be read."""
    for name in names if checkpoint else ():
        if not (Path(str(checkpoint)) / name).is_file():
            raise InputError(_cannot_resume(checkpoint, name, "it is missing"))
    try:
        yield
    except Exception as error:
        for name in names:
            try:
                if not name.endswith(".json"):
                    torch.load(Path(str(checkpoint)) / name, map_location="cpu", weights_only=True)
            except Exception:  # whatever PyTorch makes of a damaged file
                names = (name,)
        raise InputError(_cannot_resume(checkpoint, " or ".join(names), one_line(error))) from error


def _cannot_resume(checkpoint: str | None, name: str, why: str) -> str:
    return (
        f"{checkpoint}/{name} cannot be read ({why}): restore it, or delete the folder "
        f"{checkpoint} to go on from the checkpoint before it"
    )


def check_left_to_sampler(args: CTRTrainingArguments) -> None:
    """Refuse sizes of batches in rows, which `labels_per_step` and `tokens_per_batch` decide."""
    for name, kept in (
        ("per_device_train_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("auto_find_batch_size", False),
    ):
        if getattr(args, name) != kept:
            raise InputError(
                f"{name}={getattr(args, name)}: the batch sampler decides that; set "
                "labels_per_step and tokens_per_batch"
            )


def check_engine(args: CTRTrainingArguments) -> None:
    """Refuse engines that would share out what learns, which checkpoints here hold whole."""
    for name in ("deepspeed", "deepspeed_plugin", "fsdp"):
        if getattr(args, name, None):
            raise InputError(
                f"{name} is not for this trainer: accelerate launch with "
                "examples/accelerate_configs/fsdp2.yaml shares the frozen backbone out"
            )


def _prepare_lora(model: CCFLLMForCTR, lora: peft.LoraConfig | None) -> None:
    if lora is None:
        return
    if not model.lora_parameters():
        if model.model.merged_adapter:
            raise InputError(
                "the model has LoRA merged into its weights, and would get a second one on top: "
                "train by a recipe with init_from, which goes on with the first"
            )
        inject_lora(model, lora)
    elif record_of(lora) != model.config.lora:
        raise InputError(
            f"peft_config asks for {record_of(lora)}, but the model has LoRA of "
            f"{model.config.lora}: give the same"
        )


def check_classes(groups: Groups, metric: str) -> None:
    """Refuse validation rows that leave undefined what chooses the weights."""
    users = np.repeat(groups.users, groups.sizes)
    labels = groups.labels
    found = np.unique(labels)
    if len(found) < 2:
        what = f"no label but {found[0]}" if len(found) else "no rows"
        raise InputError(
            f"the validation rows hold {what}, so that no AUC can choose the weights: raise "
            "max_eval_labels, or prepare the data with a larger share for validation"
        )
    if metric == "eval_uauc" and not np.isin(users[labels == 0], users[labels == 1]).any():
        raise InputError(
            "metric_for_best_model=eval_uauc: no user of the validation rows has both classes; "
            "raise max_eval_labels, or choose by eval_auc"
        )


def check_lengths(
    model: CCFLLMForCTR, processor: CCFLLMProcessor, groups: Groups, lengths: Sequence[int]
) -> None:
    """Raise a `ValueError` for a prompt that is longer than the backbone has positions; `lengths`
    are the groups' tokens, all their candidates together."""
    most = getattr(model.config.text_config, "max_position_embeddings", None)
    shared = len(processor.prompt.instruction())
    for place, length in enumerate(lengths):
        if most is not None and shared + length > most:
            check_positions(model, processor.pack([groups[place]]))


def choose_temperature(scores: Scores) -> float:
    """The temperature that fits validation; 1 where the fit ends at a bound, which says that the
    scores are unrelated to the labels, or tell them apart without a fault."""
    found, (low, high) = fit_temperature(scores.logits, scores.labels), TEMPERATURES
    if low * 1.01 < found < high / 1.01:
        return found
    logger.warning(
        "The temperature that fits validation ends at the bound %.3g of its range: it is not used, "
        "and probabilities are those of temperature 1.",
        found,
    )
    return 1.0


def choose_trained(model: CCFLLMForCTR, *, fusion: bool, lora: bool) -> None:
    """Let only these parts, and the scales of the score, learn."""
    model.requires_grad_(False)
    trained = list(model.head_parameters())
    if fusion:
        trained += model.fusion_parameters()
    if lora:
        trained += model.lora_parameters()
    for _, parameter in trained:
        parameter.requires_grad_(True)


def group_training(
    split: Rows,
    processor: CCFLLMProcessor,
    args: CTRTrainingArguments,
    cf: CFVectors | None,
) -> Groups:
    """Training rows as groups, or as streams where histories are answered; with `cf`, each of the
    fit that was not fitted on it.

    Raises:
        InputError: the split holds other histories than the processor reads.
    """
    fits = None if cf is None else choose_fits(split, cf)
    if not processor.answered:
        return group_split(split, processor, args.max_candidates, fits)
    check_histories(split, processor.histories)
    lines = max(1, sum(processor.history_window) - 1)
    topics = None
    if processor.evidence_fields and not args.has_times:
        of_item = {item: min(processor.topics(item), default=item) for item in processor.item_ids}
        of_code = [str(of_item.get(item, item)) for item in split.item_names]
        topics = np.array(of_code, dtype=object)[split.items]
    streams = group_streams(split, lines, fits, processor.fold_in_items, topics)
    streams.hidden = np.random.default_rng(args.seed).random(len(streams)) < args.likes_only_share
    return streams


def sample_groups(groups: Groups, max_labels: int, seed: int) -> Groups:
    """Groups in seeded order until `max_labels` labels are reached; 0 keeps all."""
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    return sample_group(groups, max_labels, order.numpy())


def sample_users(groups: Groups, max_labels: int, seed: int) -> Groups:
    """All groups of users in seeded order until `max_labels` labels are reached; 0 keeps all.

    Whole users, because UAUC needs all labels of a user.
    """
    if not max_labels:
        return groups
    names = groups.split.user_names.astype(str)
    users = np.unique(groups.users)
    users = users[np.argsort(names[users])]
    users = users[np.random.default_rng(seed).permutation(len(users))]
    counts = np.bincount(np.repeat(groups.users, groups.sizes), minlength=len(names))
    chosen = users[: int(np.searchsorted(np.cumsum(counts[users]), max_labels)) + 1]
    return groups.take(np.flatnonzero(np.isin(groups.users, chosen)))


def plan_batches(
    groups: Groups, processor: CCFLLMProcessor, args: CTRTrainingArguments
) -> TokenBudgetBatchSampler:
    """This rank's batches of every epoch."""
    labels = groups.sizes.tolist()
    if not labels:
        raise InputError("the training split has no rows: prepare the data with some")
    epochs = math.ceil(args.num_train_epochs)
    if args.max_steps > 0:
        epochs = math.ceil(args.max_steps * args.labels_per_step / max(1, sum(labels))) + 1
    if epochs > MOST_EPOCHS + 1:
        raise InputError(
            f"max_steps={args.max_steps} is more than {MOST_EPOCHS} passes over the "
            f"{sum(labels):,} training labels: lower it"
        )
    return TokenBudgetBatchSampler(
        [processor.count_tokens(group) for group in groups],
        labels,
        labels_per_step=args.labels_per_step,
        tokens_per_batch=args.tokens_per_batch,
        epochs=epochs,
        seed=args.seed if args.data_seed is None else args.data_seed,
        rank=args.process_index,
        world_size=args.world_size,
    )


def _with_plan(
    args: CTRTrainingArguments, sampler: TokenBudgetBatchSampler
) -> CTRTrainingArguments:
    """A copy of the arguments that accumulates what the sampler planned, and logs at least once."""
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(sampler.steps_per_epoch * args.num_train_epochs)
    planned = dataclasses.replace(
        args,
        gradient_accumulation_steps=sampler.accumulation,
        logging_steps=min(args.logging_steps, steps),
    )
    # Several GPUs without a launcher would mean DataParallel, which cannot split packed rows.
    planned._n_gpu = min(1, planned.n_gpu)
    return planned


@torch.no_grad()
def gate_statistics(model: CCFLLMForCTR) -> dict[str, float]:
    """Mean and standard deviation of the gate (share of text) over items and dimensions; empty for
    models without a gate. At most 2048 items, evenly spread over the catalog."""
    if model.model.gate is None or not model.config.num_items:
        return {}
    count = model.config.num_items
    items = torch.linspace(0, count - 1, min(count, GATES_SHOWN)).round().long()
    gates = model.item_gates(items.to(model.device)).float()
    return {"gate_mean": gates.mean().item(), "gate_std": gates.std().item()}
