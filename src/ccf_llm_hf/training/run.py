"""Run a recipe: its stages in order, then the checkpoints that are shared."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download

from ccf_llm_hf.data.assets import asset_source, hub_id
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.io import lock_folder, write_folder, write_json
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
from ccf_llm_hf.training.memory import peak_memory
from ccf_llm_hf.training.recipe import Recipe, parse_recipe
from ccf_llm_hf.training.stage import CHECKPOINT, RunInputs, StageRun, uses_bf16
from ccf_llm_hf.training.warm_start import STARTING_FILES

PACKAGES = ("ccf-llm-hf", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


def run_recipe(argv: Sequence[str]) -> dict[str, Any]:
    """Train by a recipe; run again, it skips finished stages and resumes an interrupted one.

    Writes checkpoints and `training.json`; `ccf-llm train` describes them by cards afterwards.

    Args:
        argv: `--config recipe.yaml` and `--field value` overrides of top-level fields.

    Returns:
        Paths of the two checkpoint forms, the best validation metrics of the last stage, minutes.
        `<output_dir>/training.json` holds all of it and how it was made.

    Raises:
        InputError: for an impossible recipe, inputs that do not fit, or stages trained otherwise.
        FolderInUse: another process trains in the same folder.
    """
    recipe = parse_recipe(argv)
    # As in `CTRTrainingArguments`: on a machine without an accelerator ranks need this to meet.
    state = PartialState(cpu=not torch.accelerator.is_available())
    lock = lock_folder(recipe.output_dir, "output_dir") if state.is_main_process else nullcontext()
    with lock:
        return train_stages(recipe, state)


def train_stages(recipe: Recipe, state: PartialState) -> dict[str, Any]:
    """Train the stages that are not finished and export the last one; returns
    what `summarize_run` says."""
    with state.main_process_first():
        inputs = RunInputs.load(recipe)
    output = Path(recipe.output_dir)
    records: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(recipe.stages, 1):
        if state.is_main_process:
            print(f"stage {number}/{len(recipe.stages)}: {stage.name}", file=sys.stderr)
        stage_run = StageRun(
            recipe,
            stage,
            inputs,
            output / "stages" / stage.name,
            find_start(stage.init_from, output, list(records), recipe.offline),
        )
        records[stage.name] = stage_run.run(state)
    if state.is_main_process:
        export_checkpoints(
            recipe, inputs, output / "stages" / recipe.stages[-1].name / CHECKPOINT, records
        )
    state.wait_for_everyone()
    return summarize_run(recipe, records)


def find_start(init_from: str, output: Path, earlier: list[str], offline: bool) -> Path | None:
    """Folder of a stage's starting weights: an earlier stage's checkpoint, a folder as given, or
    the local copy of a Hub repository `org/name[@revision]`.

    Raises:
        InputError: the repository cannot be fetched.
    """
    if not init_from:
        return None
    if init_from in earlier:
        return output / "stages" / init_from / CHECKPOINT
    if Path(init_from).is_dir():
        return Path(init_from)
    repo, _, revision = init_from.partition("@")
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=STARTING_FILES,
                local_files_only=offline,
            )
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"`init_from` {init_from} cannot be fetched: {reason}") from error


def summarize_run(recipe: Recipe, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a caller wants to know of a finished run."""
    output = Path(recipe.output_dir)
    full = {"checkpoint": str(output / "checkpoint")} if recipe.full_checkpoint else {}
    return {
        **full,
        "checkpoint_slim": str(output / "checkpoint-slim"),
        "validation": records[recipe.stages[-1].name]["validation"],
        "minutes": round(sum(record["minutes"] for record in records.values()), 2),
    }


def export_checkpoints(
    recipe: Recipe, inputs: RunInputs, source: Path, records: dict[str, dict[str, Any]]
) -> None:
    """Write `training.json`, and the last stage's checkpoint in both forms."""
    output = Path(recipe.output_dir)
    model = CCFLLMForCTR.from_pretrained(source, backbone=inputs.backbone)
    processor = CCFLLMProcessor.from_pretrained(source)

    def write_full(folder: Path) -> None:
        model.save_pretrained(folder, form="full")
        processor.save_pretrained(folder)

    report = {
        **summarize_run(recipe, records),
        "recipe": dataclasses.asdict(recipe),
        "inputs": inputs.digest,
        "backbone": {"name": hub_id(recipe.backbone), "source": asset_source(inputs.backbone)},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "hardware": describe_hardware(recipe.precision),
        "stages": records,
    }
    if recipe.full_checkpoint:
        write_folder(output / "checkpoint", write_full)
    else:  # an earlier recipe's would stand beside this one's slim form
        shutil.rmtree(output / "checkpoint", ignore_errors=True)
    write_folder(
        output / "checkpoint-slim",
        lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True),
    )
    write_json(output / "training.json", report)


def describe_hardware(precision: str) -> dict[str, Any]:
    """The machine that trained, whether it did so in bfloat16, and the memory that it took."""
    accelerator = torch.accelerator.current_accelerator()
    return {
        "processes": PartialState().num_processes,
        "accelerator": accelerator.type if accelerator else None,
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "bf16_backbone": uses_bf16(precision),
        "peak_memory_gb": peak_memory(),
        "processor": name_processor(),
        "python": platform.python_version(),
    }


def name_processor(listing: Path = Path("/proc/cpuinfo")) -> str:
    """Which processor this is, because rounding, and so a training, differs between models.

    Where the system does not list it, what Python knows: at least the architecture.
    """
    if not listing.is_file():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in listing.read_text().split("\n\n")[0].splitlines())
    found = {key.strip(): value.strip() for key, _, value in lines}
    if "model name" not in found:
        return platform.machine()
    # Virtual machines often hide the name; family and model tell the generation all the same.
    numbers = [f"{key} {found[key]}" for key in ("cpu family", "model") if key in found]
    return ", ".join([platform.machine(), found["model name"], *numbers])
