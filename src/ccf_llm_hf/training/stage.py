"""One stage: build its model, train or resume it, leave a slim checkpoint behind."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import HTTPError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data.assets import (
    PROVENANCE_FILE,
    asset_source,
    cache_folder,
    hub_id,
    load_backbone_path,
)
from ccf_llm_hf.data.prepared import (
    ITEMS_FILE,
    PROTOCOL_FILE,
    PreparedData,
    load_prepared,
    split_file,
)
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.io import sha256_of, write_folder, write_json
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CF_FILE, one_line
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
from ccf_llm_hf.training.arguments import CTRTrainingArguments
from ccf_llm_hf.training.plots import write_history
from ccf_llm_hf.training.recipe import Recipe, Stage
from ccf_llm_hf.training.resume import (
    delete_trainer_checkpoints,
    train_or_resume,
    trainer_checkpoints,
)
from ccf_llm_hf.training.trainer import CTRTrainer
from ccf_llm_hf.training.warm_start import hash_start, hash_start_settings, warm_start

CHECKPOINT = "checkpoint"
RECORD_FILE = "stage.json"
TEXT_CACHE = "text_states"  # folder in the cache, of what a language model made of catalogs' words
SHARED_SETTINGS = ("backbone", "backbone_revision", "seed", "precision")
UNTOLD = ("items", "CF catalog", "backbone files", "starting settings")  # by older records
STAGE_SETTINGS = ("name", "preset", "init_from", "model", "prompt", "lora", "training")


@dataclass
class RunInputs:
    """What all stages share: data, CF vectors (None for text-only runs), where the backbone is, and
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
                f"the CF vectors in {recipe.cf_dir} lack {len(missing)} items of "
                f"{recipe.data_dir}, such as {min(missing)!r}; fit it on this data"
            )
        by_time = cf is not None and cf.num_fits > 1 and cf.cross_fit == "snapshots"
        if by_time and not data.protocol.get("has_times", True):
            raise InputError(
                f"the CF vectors in {recipe.cf_dir} have snapshots in time, and {recipe.data_dir} "
                "was split at random, without times: fit it with cross_fit=folds"
            )
        backbone, revision = load_backbone_path(recipe.backbone, offline=recipe.offline)
        asset_source(backbone)  # which the end of the run tells
        files = {
            "train data": [data.path / split_file("train")],
            "validation data": [data.path / split_file("validation")],
            "items": [data.path / ITEMS_FILE, data.path / PROTOCOL_FILE],
            "CF table": [Path(recipe.cf_dir) / CF_FILE] if cf else [],
            "CF catalog": sorted(Path(recipe.cf_dir).glob("*.jsonl")) if cf else [],
            "backbone files": backbone_files(backbone),
        }
        digest = {name: sha256_of(there) if there else "" for name, there in files.items()}
        return cls(data, cf, backbone, recipe.backbone_revision or revision, digest)

    def catalog(self) -> tuple[list[str], list[str], list[str]]:
        """Item ids, item titles and user ids in table order."""
        if self.cf is not None:
            return self.cf.item_ids, self.cf.item_titles, self.cf.user_ids
        return list(self.data.items["item_id"]), list(self.data.items["title"]), []

    def item_fields(self) -> list[dict[str, Any]]:
        """What the data knows of each item of the catalog besides its title, in table order."""
        names = self.data.protocol.get("item_fields", [])
        columns = [self.data.items["item_id"], *(self.data.items[name] for name in names)]
        fields = {
            item: {name: value for name, value in zip(names, values, strict=True) if value}
            for item, *values in zip(*columns, strict=True)
        }
        return [fields.get(item, {}) for item in self.catalog()[0]]


def backbone_files(backbone: str) -> list[Path]:
    """Weights and tokenizer in a backbone's folder; none of one on the Hub."""
    kinds = (".safetensors", ".json", ".model", ".txt")
    found = sorted(file for file in Path(backbone).glob("*.*") if file.suffix in kinds)
    return [file for file in found if file.name != PROVENANCE_FILE]


@dataclass
class StageRun:
    """A stage in its folder `<output_dir>/stages/<name>`; `start` is the folder of the weights that
    it starts from, if any."""

    recipe: Recipe
    stage: Stage
    inputs: RunInputs
    folder: Path
    start: Path | None

    def settings(self) -> dict[str, Any]:
        """Everything that decides what the stage learns, as JSON has it."""
        settings = {key: getattr(self.recipe, key) for key in SHARED_SETTINGS}
        settings |= {key: getattr(self.stage, key) for key in STAGE_SETTINGS}
        settings |= self.inputs.digest
        settings["starting weights"] = hash_start(self.start) if self.start else ""
        settings["starting settings"] = hash_start_settings(self.start) if self.start else ""
        return json.loads(json.dumps(settings))

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
        """Refuse to mix this recipe with a stage trained by another one, or by one that is not
        known, or delete that one when `rerun_changed` says so.

        Raises:
            InputError: naming the settings that differ.
        """
        # What a kill in the midst of a deletion left.
        outgoing = self.folder.with_name(f".deleted-{self.folder.name}")
        shutil.rmtree(outgoing, ignore_errors=True)
        record, settings = self.record(), self.settings()
        old = {key: settings[key] for key in UNTOLD} | record["settings"] if record else {}
        weights = [*trainer_checkpoints(self.folder), *self.folder.glob(CHECKPOINT)]
        if old == settings or not (record or weights):
            return
        if self.recipe.rerun_changed:
            # Moved first: a kill must not leave weights without the record of what they are.
            self.folder.rename(outgoing)
            shutil.rmtree(outgoing)
            return
        if not record:
            raise InputError(
                f"{self.folder} has weights and no {RECORD_FILE} that says of what: restore it, or "
                "retrain the stage with --rerun_changed"
            )
        changed = " and ".join(name_changes(old, settings))
        raise InputError(
            f"stage {self.stage.name!r} in {self.folder} was trained with another {changed}; name "
            "another output_dir, or retrain it with --rerun_changed"
        )

    def run(self, state: PartialState) -> dict[str, Any]:
        """Train the stage, or what is left of it; every rank calls this. Returns its record."""
        if state.is_main_process:
            self.check_unchanged()
        state.wait_for_everyone()
        record = self.record()
        if record and record["finished"]:
            if state.is_main_process:
                delete_trainer_checkpoints(self.folder)  # a kill may have come before
            return record
        if state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / RECORD_FILE, {"settings": self.settings(), "finished": False})
        trainer = self.build_trainer()
        self.check_validated(trainer)
        history = train_or_resume(trainer)
        record = {
            "settings": self.settings(),
            "finished": True,
            "trains": self.stage.trains(),
            **summarize_training(trainer, history),
        }
        if state.is_main_process:
            write_history(history, self.folder, self.stage.name)
            write_folder(self.folder / CHECKPOINT, lambda folder: trainer._save(str(folder)))
            write_json(self.folder / RECORD_FILE, record)
            delete_trainer_checkpoints(self.folder)
        state.wait_for_everyone()
        return record

    def build_trainer(self) -> CTRTrainer:
        """Model, data and trainer of the stage."""
        set_seed(self.recipe.seed)
        processor = self.build_processor()
        model = self.build_model(processor)
        lora = self.stage.lora_config()
        if lora and model.lora_parameters():  # of init_from, whose rank and modules hold
            lora = type(lora)(**model.config.lora)
        try:
            return CTRTrainer(
                model,
                self.training_arguments(),
                self.inputs.data.rows("train"),
                self.inputs.data.rows("validation"),
                processor,
                peft_config=lora,
                cf=self.inputs.cf,
            )
        except InputError:
            raise
        # Of trackers that are unknown or not installed, and of the Hub that push_to_hub asks.
        except (ValueError, RuntimeError, ImportError, OSError, HTTPError) as problem:
            reason = " ".join(str(problem).split())
            raise InputError(f"stage {self.stage.name!r} cannot begin: {reason}") from problem

    def check_validated(self, trainer: CTRTrainer) -> None:
        """Raise `InputError` where training would end before its first validation."""
        args = trainer.args
        steps = args.max_steps
        if steps <= 0:
            steps = math.ceil(trainer.batch_sampler.steps_per_epoch * args.num_train_epochs)
        if args.eval_strategy == "steps" and args.eval_steps and args.eval_steps > steps:
            raise InputError(
                f"stage {self.stage.name!r}: eval_steps={args.eval_steps} is more than the {steps} "
                "steps of the training, which would never be validated: lower it"
            )

    def training_arguments(self) -> CTRTrainingArguments:
        """The stage's `training` section, in its folder."""
        return CTRTrainingArguments(
            output_dir=str(self.folder.resolve()),
            seed=self.recipe.seed,
            has_times=self.inputs.data.protocol.get("has_times", True),
            **self.stage.training,
        )

    def build_processor(self) -> CCFLLMProcessor:
        """The stage's prompt over the run's catalog. Raises `InputError` on settings that do not go
        together."""
        tokenizer = self.load_tokenizer(self.inputs.backbone, self.inputs.revision)
        settings = {**self.stage.prompt, "histories": self.choose_histories()}
        settings["rating_scale"] = self.choose_rating_scale()
        settings["item_fields"] = self.inputs.item_fields()
        if encoder := self.stage.model.get("sentence_encoder"):
            settings["text_tokenizer"] = self.load_tokenizer(*self.find_encoder(encoder))
        settings["field_values"] = [] if self.inputs.cf is None else self.inputs.cf.field_values
        try:
            return CCFLLMProcessor(tokenizer, *self.inputs.catalog(), **settings)
        except ValueError as problem:
            raise InputError(f"stage {self.stage.name!r}: {problem}") from problem

    def load_tokenizer(self, name: str, revision: str | None) -> PreTrainedTokenizerBase:
        """The tokenizer of a backbone or sentence encoder; raises `InputError` where it is damaged
        or there is none."""
        try:
            return AutoTokenizer.from_pretrained(name, revision=revision)
        except Exception as problem:  # whatever transformers makes of damaged files
            raise InputError(
                f"stage {self.stage.name!r}: {name} cannot be read as a language model "
                f"({one_line(problem)}): name a folder or Hub repository that holds one, whole"
            ) from problem

    def choose_rating_scale(self) -> tuple[float, float] | None:
        """How ratings of the histories are read: as the CF model was fitted to them, else by the
        side of the label's threshold that they lie on."""
        cf = self.inputs.cf
        return self.inputs.data.rating_scale(None if cf is None else cf.rating_scale)

    def choose_histories(self) -> str:
        """What histories hold, likes only or dislikes too: as the data was prepared."""
        prepared = self.inputs.data.protocol.get("histories", "likes")
        wanted = self.stage.prompt.get("histories", prepared)
        if wanted != prepared:
            raise InputError(
                f"stage {self.stage.name!r}: `histories` is {wanted}, but the data in "
                f"{self.inputs.data.path} has {prepared}; prepare it with --histories {wanted}"
            )
        if self.stage.model.get("cf_fold_in") and wanted != "signed":
            raise InputError(
                f"stage {self.stage.name!r}: `cf_fold_in` needs signed histories; prepare the data "
                "with --histories signed"
            )
        return wanted

    def find_encoder(self, name: str) -> tuple[str, str | None]:
        """What to give `from_pretrained` for a `sentence_encoder`: (folder or Hub id, revision)."""
        return load_backbone_path(name, offline=self.recipe.offline)

    def build_model(self, processor: CCFLLMProcessor) -> CCFLLMForCTR:
        """The stage's model with its starting weights, the frozen backbone in its precision."""
        settings = dict(self.stage.model)
        if encoder := settings.get("sentence_encoder"):
            found, settings["sentence_encoder_revision"] = self.find_encoder(encoder)
            settings["sentence_encoder"] = found if hub_id(encoder) == encoder else hub_id(encoder)
        try:
            model = CCFLLMForCTR.from_backbone(
                self.inputs.backbone,
                processor,
                backbone_name=hub_id(self.recipe.backbone),
                revision=self.inputs.revision,
                cf=self.inputs.cf,
                text_cache=cache_folder() / TEXT_CACHE,
                text_space_of=self.start,
                text_dtype=torch.bfloat16 if uses_bf16(self.recipe.precision) else torch.float32,
                **settings,
            )
            if self.start:
                dropout = (self.stage.lora or {}).get("lora_dropout", 0.0)
                warm_start(model, self.start, dropout)
        except (OSError, ValueError, RuntimeError) as problem:  # the last where memory is short
            reason = " ".join(str(problem).split())
            raise InputError(f"stage {self.stage.name!r}: {reason}") from problem
        if uses_bf16(self.recipe.precision):
            freeze_in_bf16(model)
        return model


def name_changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the settings that differ, those of sections as `section.key`."""
    changed = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            changed += name_changes(before, after, f"{prefix}{key}.")
        else:
            changed.append(prefix + key)
    return changed


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


def summarize_training(trainer: CTRTrainer, history: list[dict[str, float]]) -> dict[str, Any]:
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
        "validation_labels": int(trainer._groups_of(None).sizes.sum()),
        "trainable_parameters": sum(
            p.numel() for p in trainer.model.parameters() if p.requires_grad
        ),
        "minutes": round((seconds + sum(e["eval_runtime"] for e in evaluations)) / 60, 2),
        "labels_per_second": round(labels / seconds, 2) if seconds else 0.0,
    }
