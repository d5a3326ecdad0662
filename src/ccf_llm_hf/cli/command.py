"""What a command of `ccf-llm` is, and what several of them take and check."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ccf_llm_hf.errors import InputError


class Output(NamedTuple):
    """What a command prints, `text` for people, `data` with --json, and its exit code."""

    text: str
    data: Any
    code: int = 0


class Command(NamedTuple):
    """One subcommand: its line in the overview, its example, its flags and its work."""

    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, list[str]], Output]


def checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint folder, or a Hub repository")
    parser.add_argument("--backbone", help="folder or name to attach instead of the recorded one")


def existing_folder(path: str, flag: str, maker: str) -> Path:
    if not Path(path).is_dir():
        raise InputError(f"{flag} {path} is not a folder: make it with {maker}")
    return Path(path)
