"""Command-line arguments from a dataclass, so that a config's fields and help are written once."""

import argparse
import dataclasses
import types
from collections.abc import Collection
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from ccf_llm_hf.errors import InputError

Config = TypeVar("Config")


class CommandParser(argparse.ArgumentParser):
    """An argument parser that reports a bad flag as `InputError`, and keeps an epilog's lines."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _inner_type(hint: Any) -> tuple[Any, bool]:
    """The type of one value, and whether a field takes several of them."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) in (list, tuple):
        return get_args(hint)[0], True
    return hint, False


def _option(field: "dataclasses.Field[Any]", hint: Any) -> dict[str, Any]:
    """Keyword arguments of `add_argument` for one field."""
    text = str(field.metadata.get("help", "")).replace("%", "%%")
    if field.default not in (dataclasses.MISSING, None, ""):
        text += f" (default: {field.default})"
    kind, several = _inner_type(hint)
    # Absent flags stay out of the namespace, so that the dataclass itself supplies its defaults.
    option: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
    if kind is bool:
        return option | {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        option["choices"] = get_args(kind)
        kind = type(get_args(kind)[0])
    if several:
        option["nargs"] = "+"
    return option | {"type": kind if kind in (int, float) else str}


def add_config_arguments(
    parser: argparse.ArgumentParser, config_class: type, *, skip: Collection[str] = ()
) -> None:
    """Add one `--flag` per dataclass field: `--some-field`, or `--some_field` as trl spells it.

    Supports str, int, float, bool (`--flag` / `--no-flag`), Literal, paths, optional and lists
    of these. The fields in `skip` are left to the command's own arguments.
    """
    hints = get_type_hints(config_class)
    group = parser.add_argument_group("settings")
    for field in dataclasses.fields(config_class):
        if field.name in skip:
            continue
        flags = dict.fromkeys(["--" + field.name.replace("_", "-"), "--" + field.name])
        group.add_argument(*flags, dest=field.name, **_option(field, hints[field.name]))


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--json`, which takes any place: a model's parser must not take back what stood before.

    The command's parser holds the default, False.
    """
    parser.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print one JSON document on stdout",
    )


def config_from_arguments(
    config_class: type[Config], arguments: argparse.Namespace, **values: Any
) -> Config:
    """The dataclass filled from parsed arguments; `values` are set on top."""
    names = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return config_class(**(given | values))
