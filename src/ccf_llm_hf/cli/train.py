"""The command `train`: train by a recipe, then say of each checkpoint what it is."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ccf_llm_hf.cli.command import Command, Output
from ccf_llm_hf.errors import InputError


def train_and_describe(argv: Sequence[str]) -> dict[str, Any]:
    """Train by a recipe, and write card and example calls into each checkpoint folder.

    A run of several processes trains in all of them; its main process writes the rest.

    Args:
        argv: as `run_recipe` takes them: `--config recipe.yaml` and `--field value` overrides.

    Returns:
        What `run_recipe` does.

    Raises:
        InputError, FolderInUse: as `run_recipe`.
    """
    from accelerate import PartialState

    from ccf_llm_hf.data.assets import load_backbone_path
    from ccf_llm_hf.hub.example import record_example
    from ccf_llm_hf.hub.model_card import describe_run
    from ccf_llm_hf.inference.checkpoint import load_checkpoint
    from ccf_llm_hf.training.recipe import parse_recipe
    from ccf_llm_hf.training.run import run_recipe

    outcome = run_recipe(argv)
    if not PartialState().is_main_process:
        return outcome
    recipe = parse_recipe(argv)
    backbone, _ = load_backbone_path(recipe.backbone, offline=recipe.offline)
    model, processor = load_checkpoint(outcome["checkpoint_slim"], backbone=backbone)
    for form in ("checkpoint", "checkpoint_slim"):
        if form in outcome:
            # The record first: the card shows what it says of one of the calls.
            record_example(outcome[form], model, processor)
            describe_run(outcome[form], recipe.data_dir)
    return outcome


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", help="YAML file; --key value behind it overrides a top-level entry"
    )


def _train(arguments: argparse.Namespace, overrides: list[str]) -> Output:
    if not Path(arguments.recipe).is_file():
        wrong = "is a folder" if Path(arguments.recipe).is_dir() else "does not exist"
        raise InputError(
            f"recipe {arguments.recipe} {wrong}: name a YAML file like examples/configs/demo.yaml"
        )
    # `--config recipe.yaml`, as examples/train.py takes it, is read as that recipe.
    if overrides[:1] == ["--config"] and (len(overrides) == 1 or overrides[1].startswith("--")):
        overrides = overrides[1:]
    outcome = train_and_describe(["--config", arguments.recipe, *overrides])
    return Output("\n".join(f"{key}: {value}" for key, value in outcome.items()), outcome)


COMMANDS = {
    "train": Command(
        "train by a recipe",
        "ccf-llm train examples/configs/demo.yaml --output_dir runs/mine",
        _train_arguments,
        _train,
    ),
}
