"""Values from YAML, brought to the types of the fields that they are for."""

import math
import types
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from ccf_llm_hf.errors import InputError


def read_value(place: str, kind: Any, value: Any) -> Any:
    """`value` as `kind`: YAML reads 1e-3 as a string, and knows no tuples.

    Args:
        place: names the field in the message.
        kind: a type hint; what it says beyond plain types and containers of them is not looked at.

    Raises:
        InputError: it cannot be read so.
    """
    try:
        return _read(kind, value)
    except (TypeError, ValueError):
        wanted = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind)
        raise InputError(f"{place} must be {wanted}; got {value!r}") from None


def _read(kind: Any, value: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _read_union(parts, value)
    if origin is Literal:
        if value not in parts:
            raise ValueError
        return value
    if origin in (list, tuple):
        return _read_sequence(origin, parts, value)
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError
        return {_read(parts[0], k): _read(parts[1], v) for k, v in value.items()}
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if kind is str:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise TypeError
        return str(value)
    if kind in (int, float):
        return _read_number(kind, value)
    if kind is types.NoneType and value is not None:
        raise TypeError
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value).value
    return value


def _read_union(parts: tuple[Any, ...], value: Any) -> Any:
    if value is None and types.NoneType in parts:
        return None
    # A number in quotes is a number, wherever one may stand: strings are tried last.
    for part in sorted((p for p in parts if p is not types.NoneType), key=lambda p: p is str):
        try:
            return _read(part, value)
        except (TypeError, ValueError):
            continue
    raise TypeError


def _read_sequence(origin: type, parts: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise TypeError
    if origin is list or parts[1:] == (...,):
        return origin(_read(parts[0], entry) for entry in value)
    if len(parts) != len(value):
        raise ValueError
    return tuple(_read(part, entry) for part, entry in zip(parts, value, strict=True))


def _read_number(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    number = float(value)
    if not math.isfinite(number) or (kind is int and number % 1):
        raise ValueError
    return int(number) if kind is int else number
