"""Files as this package writes them: whole or not at all, JSON alike everywhere.

Everything is written under a temporary name beside its place and renamed, so that a process that
dies, or a disk that fills, leaves the old file or none.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_file(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Let `write` make a file under a temporary name, then put it in the place of `path`.

    The folder is made if it is missing. The temporary name keeps the suffix, by which libraries
    choose a format. Returns `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_folder(folder: str | Path, write: Callable[[Path], Any]) -> Path:
    """Let `write` fill a temporary folder, then put it in the place of `folder`."""
    folder = Path(folder)
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        shutil.rmtree(folder, ignore_errors=True)
        return partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8."""
    return write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write indented JSON with a newline at its end."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_figure(figure: "Figure", path: str | Path, **options: Any) -> Path:
    """Save a matplotlib figure; the suffix chooses the format, `options` are `savefig`'s."""
    return write_file(path, lambda partial: figure.savefig(partial, **options))


def sha256_of(files: Iterable[str | Path]) -> str:
    """Sha256 (hex) of the contents of files, in this order."""
    digest = hashlib.sha256()
    for file in files:
        with Path(file).open("rb") as opened:
            while piece := opened.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
