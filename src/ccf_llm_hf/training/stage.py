"""One stage: build its model and groups, train or resume it, leave a slim checkpoint behind."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer, set_seed

from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data.assets import hub_id, load_backbone_path
from ccf_llm_hf.data.grouping import Group, group_rows, sample_group
from ccf_llm_hf.data.prepared import PreparedData, interactions, load_prepared, rating_midpoint
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
from ccf_llm_hf.training.plots import write_history
from ccf_llm_hf.training.recipe import Recipe, StageConfig
from ccf_llm_hf.training.starting_weights import (
    adapter_folder,
    digest_folder,
    fusion_of,
    inject_lora,
    lora_of,
    sha256_of,
    warn_of_another_backbone,
)
from ccf_llm_hf.training.trainer import CCFLLMTrainer, delete_trainer_checkpoints

CHECKPOINT = "checkpoint"
RECORD_FILE = "stage.json"
# Settings of a stage that the model's config holds too, under the same names.
OF_THE_MODEL = (
    *("fusion", "cf_logit", "cf_fold_in", "fold_in_decay"),
    *("slot_dropout", "pairwise_share", "cf_target_share"),
)
STEEP = 1e3  # turns ratings into plain likes and dislikes
SHARED_SETTINGS = (
    "backbone",
    "backbone_revision",
    "seed",
    "score_head",
    "use_cf_snapshots",
    "precision",
)


@dataclass
class RunInputs:
    """What all stages share: data, CF table (None for text-only runs), where the backbone is, and
    `digest`, which names the exact input files."""

    data: PreparedData
    cf: CFVectors | None
    backbone: str
    revision: str | None
    digest: dict[str, str]

    @classmethod
    def load(cls, recipe: Recipe) -> "RunInputs":
        """Read the inputs of a recipe. Raises `InputError` when data and CF table do not fit."""
        data = load_prepared(recipe.data_dir)
        cf = CFVectors.load(recipe.cf_dir) if recipe.cf_dir else None
        if cf is not None and (missing := set(data.items["item_id"]) - set(cf.item_ids)):
            raise InputError(
                f"the CF table in {recipe.cf_dir} lacks {len(missing)} items of {recipe.data_dir}, "
                f"such as {min(missing)!r}; fit it on this data"
            )
        backbone, revision = load_backbone_path(recipe.backbone, offline=recipe.offline)
        files = {
            "train data": data.path / "data" / "train.parquet",
            "validation data": data.path / "data" / "validation.parquet",
        }
        if cf is not None:
            files["CF table"] = Path(recipe.cf_dir) / "cf_embeddings.safetensors"
        digest = {name: sha256_of([file]) for name, file in files.items()}
        return cls(data, cf, backbone, recipe.backbone_revision or revision, digest)

    def catalog(self) -> tuple[list[str], list[str], list[str]]:
        """Item ids, item titles and user ids in table order."""
        if self.cf is not None:
            return self.cf.item_ids, self.cf.item_titles, self.cf.user_ids
        return list(self.data.items["item_id"]), list(self.data.items["title"]), []


@dataclass
class StageRun:
    """A stage in its folder `<output_dir>/stages/<name>`."""

    recipe: Recipe
    stage: StageConfig
    inputs: RunInputs
    folder: Path
    init_folder: Path | None

    def settings(self) -> dict[str, Any]:
        """Everything that decides what the stage learns."""
        shared = {key: getattr(self.recipe, key) for key in SHARED_SETTINGS}
        source = self.init_folder and digest_folder(self.init_folder)
        return {
            **shared,
            **dataclasses.asdict(self.stage),
            **self.inputs.digest,
            "starting weights": source or "",
        }

    def record(self) -> dict[str, Any] | None:
        """What `stage.json` says, None when the stage was never started.

        Raises:
            InputError: the file is damaged.
        """
        file = self.folder / RECORD_FILE
        if not file.is_file():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            record["settings"].keys(), record["finished"]
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            raise InputError(
                f"{file} is damaged: delete {self.folder} to have the stage trained again"
            ) from problem
        return record

    def check_unchanged(self) -> None:
        """Refuse to mix this recipe with a stage trained by another one, or delete that one when
        `rerun_changed` says so. Raises `InputError` naming the settings that differ."""
        record, settings = self.record(), self.settings()
        if record is None or record["settings"] == settings:
            return
        if self.recipe.rerun_changed:
            shutil.rmtree(self.folder)
            return
        old = record["settings"]
        changed = sorted(
            key for key in settings.keys() | old.keys() if settings.get(key) != old.get(key)
        )
        raise InputError(
            f"stage {self.stage.name!r} in {self.folder} was trained with another "
            f"{' and '.join(changed)}; name another output_dir, or retrain it with --rerun_changed"
        )

    def run(self, state: PartialState) -> dict[str, Any]:
        """Train the stage, or what is left of it; every rank calls this. Returns its record."""
        if state.is_main_process:
            self.check_unchanged()
        state.wait_for_everyone()
        record = self.record()
        if record and record["finished"]:
            return record
        if state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / RECORD_FILE, {"settings": self.settings(), "finished": False})
        trainer = self.trainer(state)
        history = trainer.train_or_resume()
        record = {"settings": self.settings(), "finished": True, **summary(trainer, history)}
        if state.is_main_process:
            write_history(history, self.folder, self.stage.name)
            write_folder(self.folder / CHECKPOINT, lambda folder: trainer._save(str(folder)))
            write_json(self.folder / RECORD_FILE, record)
            delete_trainer_checkpoints(self.folder)
        state.wait_for_everyone()
        return record

    def trainer(self, state: PartialState) -> CCFLLMTrainer:
        """Model, groups and trainer of the stage."""
        set_seed(self.recipe.seed)
        processor = self.processor()
        return CCFLLMTrainer(
            self.model(processor),
            self.recipe,
            self.stage,
            self.folder.resolve(),
            processor,
            self.train_groups(processor),
            self.eval_groups(processor),
            rank=state.process_index,
            world_size=state.num_processes,
        )

    def processor(self) -> CCFLLMProcessor:
        """The stage's prompt over the run's catalog."""
        tokenizer = AutoTokenizer.from_pretrained(
            self.inputs.backbone, revision=self.inputs.revision
        )
        return CCFLLMProcessor.from_catalog(
            tokenizer,
            *self.inputs.catalog(),
            **self.stage.prompt_settings(),
            histories=self.histories(),
            rating_scale=self.rating_scale(),
        )

    def rating_scale(self) -> tuple[float, float] | None:
        """How ratings of the histories are read: as the CF model was fitted to them, else by the
        side of the label's threshold that they lie on."""
        data = self.inputs.data
        if "history_ratings" not in data.splits["train"].column_names:
            return None
        if self.inputs.cf is not None and self.inputs.cf.rating_scale:
            return self.inputs.cf.rating_scale
        return rating_midpoint(interactions(data.path)), STEEP

    def histories(self) -> str:
        """What histories hold, likes only or dislikes too: as the data was prepared."""
        prepared = self.inputs.data.protocol.get("histories", "likes")
        wanted = self.stage.histories or prepared
        if wanted != prepared:
            raise InputError(
                f"stage {self.stage.name!r}: `histories` is {wanted}, but the data in "
                f"{self.inputs.data.path} has {prepared}; prepare it with --histories {wanted}"
            )
        if self.stage.cf_fold_in and wanted != "signed":
            raise InputError(
                f"stage {self.stage.name!r}: `cf_fold_in` needs signed histories; prepare the data "
                "with --histories signed"
            )
        return wanted

    def model(self, processor: CCFLLMProcessor) -> CCFLLMForCTR:
        """The stage's model with its starting weights; only trained parts need gradients."""
        yes, no = processor.answer_token_ids()
        model = CCFLLMForCTR.from_backbone(
            self.inputs.backbone,
            backbone_name=hub_id(self.recipe.backbone),
            revision=self.inputs.revision,
            cf=self.inputs.cf,
            item_title_ids=processor.item_title_ids(),
            **{name: getattr(self.stage, name) for name in OF_THE_MODEL},
            score_head=self.recipe.score_head,
            yes_token_id=yes,
            no_token_id=no,
            item_slot_token_id=processor.item_slot_token_id,
            user_slot_token_id=processor.user_slot_token_id,
        )
        try:
            self._start(model)
        except (OSError, ValueError) as problem:
            raise InputError(f"stage {self.stage.name!r}: {problem}") from problem
        if uses_bf16(self.recipe.precision):
            freeze_in_bf16(model)
        model.requires_grad_(False)
        for part, parameters in (
            ("fusion", model.fusion_parameters()),
            ("lora", model.lora_parameters()),
        ):
            for _, parameter in parameters:
                parameter.requires_grad_(part in self.stage.train)
        for _, parameter in model.head_parameters():
            parameter.requires_grad_(True)
        return model

    def _start(self, model: CCFLLMForCTR) -> None:
        """Inject LoRA and load the starting weights."""
        source = self.init_folder
        adapter = source and adapter_folder(source)
        same_fusion = source is not None and fusion_of(source) == self.stage.fusion
        if source:
            warn_of_another_backbone(source, model.config.backbone_fingerprint)
        if source and same_fusion and not adapter:
            model.load_trained_weights(source)
        if adapter:
            inject_lora(model, lora_of(adapter) | {"lora_dropout": self.stage.lora_dropout})
            if same_fusion:
                model.load_trained_weights(source)
            else:
                model.load_adapter_folder(adapter)
        elif "lora" in self.stage.train:
            inject_lora(
                model,
                {
                    "r": self.stage.lora_r,
                    "lora_alpha": self.stage.lora_alpha,
                    "target_modules": self.stage.lora_target_modules,
                    "use_rslora": False,
                    "lora_dropout": self.stage.lora_dropout,
                },
            )

    def train_groups(self, processor: CCFLLMProcessor) -> list[Group]:
        """Training groups; rows see a CF snapshot that was not fitted on them."""
        split = self.inputs.data.splits["train"]
        snapshots = None
        if self.inputs.cf is not None and self.recipe.use_cf_snapshots and self.stage.reads_cf():
            columns = (np.asarray(split[name]) for name in ("user_id", "item_id", "timestamp"))
            snapshots = self.inputs.cf.training_snapshots(*columns).tolist()
        groups = self._groups(split, processor, snapshots)
        order = torch.randperm(
            len(groups), generator=torch.Generator().manual_seed(self.recipe.seed)
        )
        return sample_group(groups, self.stage.max_train_labels, order.tolist())

    def eval_groups(self, processor: CCFLLMProcessor) -> list[Group]:
        """Validation groups, all or those of a seeded sample of users, on the last CF snapshot."""
        groups = self._groups(self.inputs.data.splits["validation"], processor, None)
        return sample_users(groups, self.stage.eval_max_labels, self.recipe.seed)

    def _groups(
        self, split: Dataset, processor: CCFLLMProcessor, snapshots: list[int] | None
    ) -> list[Group]:
        return group_rows(
            split,
            history_window=processor.history_window,
            cf_snapshots=snapshots,
            max_candidates=self.stage.max_candidates,
            fold_in_items=processor.fold_in_items,
        )


def sample_users(groups: list[Group], max_labels: int, seed: int) -> list[Group]:
    """All groups of users in seeded order until `max_labels` labels are reached; 0 keeps all.

    Whole users, because UAUC needs all labels of a user.
    """
    if not max_labels:
        return groups
    users = sorted({group.user_id for group in groups})
    chosen: set[str] = set()
    labels = 0
    for position in np.random.default_rng(seed).permutation(len(users)):
        if labels >= max_labels:
            break
        chosen.add(users[position])
        labels += sum(len(g.labels) for g in groups if g.user_id == users[position])
    return [group for group in groups if group.user_id in chosen]


def uses_bf16(precision: str) -> bool:
    """Whether to train on a bfloat16 backbone; `auto` says so where the hardware multiplies it."""
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def freeze_in_bf16(model: CCFLLMForCTR) -> None:
    """Round the backbone's own weights, which no stage trains, to bfloat16; what learns stays fp32.

    Autocast would round them again in every forward pass.
    """
    learning = {id(parameter) for _, parameter in model.lora_parameters()}
    for parameter in model.language_model.parameters():
        if id(parameter) not in learning:
            parameter.data = parameter.data.to(torch.bfloat16)


def summary(trainer: CCFLLMTrainer, history: list[dict[str, float]]) -> dict[str, Any]:
    """Best validation metrics, size, time and speed of a trained stage."""
    evaluations = [entry for entry in history if "eval_auc" in entry]
    best = next(e for e in evaluations if e["step"] == trainer.state.best_global_step)
    logs = [entry for entry in history if "labels_per_second" in entry]
    seconds = sum(entry["train_seconds"] for entry in logs)
    labels = sum(entry["train_seconds"] * entry["labels_per_second"] for entry in logs)
    return {
        "validation": {
            k.removeprefix("eval_"): v for k, v in best.items() if k.startswith("eval_")
        },
        "best_step": int(best["step"]),
        "steps": trainer.state.global_step,
        "train_labels": sum(trainer.batch_sampler.labels),
        "validation_labels": sum(len(g.labels) for g in trainer.eval_dataset.groups),
        "trainable_parameters": sum(
            p.numel() for p in trainer.model.parameters() if p.requires_grad
        ),
        "minutes": round((seconds + sum(e["eval_runtime"] for e in evaluations)) / 60, 2),
        "labels_per_second": round(labels / seconds, 2) if seconds else 0.0,
    }


def write_json(file: Path, content: Any) -> None:
    """Write JSON under a temporary name, then move it into place."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write under a temporary name, then move it into place."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, then put it in the place of `folder`."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
