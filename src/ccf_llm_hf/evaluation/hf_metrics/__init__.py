"""Metric modules for the `evaluate` library, one folder each."""

from pathlib import Path

from ccf_llm_hf.errors import InputError


def metric_path(name: str) -> str:
    """Folder to give to `evaluate.load` or `evaluate.combine`.

    Args:
        name: `auc` (predictions, references) or `uauc` (also users).

    Raises:
        InputError: unknown name.
    """
    if name not in ("auc", "uauc"):
        raise InputError(f"metric {name!r} is unknown: choose auc or uauc")
    return str(Path(__file__).parent / name)
