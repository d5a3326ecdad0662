"""Run a recipe: its stages in order, then the checkpoints that are shared."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ccf_llm_hf.hub.model_card import write_model_card
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
from ccf_llm_hf.training.recipe import Recipe, parse_recipe
from ccf_llm_hf.training.stage import (
    CHECKPOINT,
    RunInputs,
    StageRun,
    uses_bf16,
    write_folder,
    write_json,
)

PACKAGES = ("ccf-llm-hf", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


def run_recipe(argv: Sequence[str]) -> dict[str, Any]:
    """Train by a recipe; run again, it skips finished stages and resumes an interrupted one.

    Args:
        argv: `--config recipe.yaml` and `--field value` overrides of top-level fields.

    Returns:
        Paths of the two checkpoint forms, the best validation metrics of the last stage, minutes.
        `<output_dir>/training.json` holds all of it and how it was made.

    Raises:
        InputError: for an impossible recipe, inputs that do not fit, or stages trained otherwise.
    """
    recipe = parse_recipe(argv)
    # As in `training_arguments`: on a machine without an accelerator ranks need this to meet.
    state = PartialState(cpu=not torch.accelerator.is_available())
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
            init_folder(stage.init_from, output, list(records)),
        )
        records[stage.name] = stage_run.run(state)
    if state.is_main_process:
        export(recipe, inputs, output / "stages" / recipe.stages[-1].name / CHECKPOINT, records)
    state.wait_for_everyone()
    return outcome(recipe, records)


def init_folder(init_from: str, output: Path, earlier: list[str]) -> Path | None:
    """Folder of a stage's starting weights: an earlier stage's checkpoint, or a folder as given."""
    if not init_from:
        return None
    return output / "stages" / init_from / CHECKPOINT if init_from in earlier else Path(init_from)


def outcome(recipe: Recipe, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a caller wants to know of a finished run."""
    output = Path(recipe.output_dir)
    return {
        "checkpoint": str(output / "checkpoint"),
        "checkpoint_slim": str(output / "checkpoint-slim"),
        "validation": records[recipe.stages[-1].name]["validation"],
        "minutes": round(sum(record["minutes"] for record in records.values()), 2),
    }


def export(
    recipe: Recipe, inputs: RunInputs, source: Path, records: dict[str, dict[str, Any]]
) -> None:
    """Write the last stage's checkpoint in both forms, and `training.json`."""
    output = Path(recipe.output_dir)
    model = CCFLLMForCTR.from_pretrained(source, backbone=inputs.backbone)
    processor = CCFLLMProcessor.from_pretrained(source)

    def write_full(folder: Path) -> None:
        model.save_pretrained(folder, form="full")
        processor.save_pretrained(folder)

    report = {
        **outcome(recipe, records),
        "recipe": dataclasses.asdict(recipe),
        "inputs": inputs.digest,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "hardware": hardware(recipe.precision),
        "stages": records,
    }
    write_folder(output / "checkpoint", write_full)
    write_folder(output / "checkpoint-slim", lambda folder: _copy(source, folder))
    for name in ("checkpoint", "checkpoint-slim"):
        write_model_card(
            output / name,
            config=model.config,
            recipe=dataclasses.asdict(recipe),
            data_protocol=inputs.data.protocol,
        )
    write_json(output / "training.json", report)


def hardware(precision: str) -> dict[str, Any]:
    """The machine that trained, and whether it did so in bfloat16."""
    accelerator = torch.accelerator.current_accelerator()
    return {
        "processes": PartialState().num_processes,
        "accelerator": accelerator.type if accelerator else None,
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "bf16_backbone": uses_bf16(precision),
        "processor": platform.machine(),
        "python": platform.python_version(),
    }


def _copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder)
