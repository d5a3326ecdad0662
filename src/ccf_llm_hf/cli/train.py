"""The command `train`."""

import argparse
from pathlib import Path

from ccf_llm_hf.cli.command import Command, Output
from ccf_llm_hf.errors import InputError


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
    from ccf_llm_hf.training.run import run_recipe

    # `--config recipe.yaml`, as examples/train.py takes it, is read as that recipe.
    if overrides[:1] == ["--config"] and (len(overrides) == 1 or overrides[1].startswith("--")):
        overrides = overrides[1:]
    result = run_recipe(["--config", arguments.recipe, *overrides])
    return Output("\n".join(f"{key}: {value}" for key, value in result.items()), result)


COMMANDS = {
    "train": Command(
        "train by a recipe",
        "ccf-llm train examples/configs/demo.yaml --output_dir runs/mine",
        _train_arguments,
        _train,
    ),
}
