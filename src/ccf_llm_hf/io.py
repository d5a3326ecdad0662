"""Files as this package writes them: whole or not at all, JSON alike everywhere.

Everything is written under a temporary name beside its place and renamed, so that a process that
dies, or a disk that fills, leaves the old file or none.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ccf_llm_hf.errors import FolderInUse, InputError

ROOM = 1 << 20  # bytes that must still fit where results are to be written

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_file(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Let `write` make a file under a temporary name, then put it in the place of `path`.

    The folder is made if it is missing. The temporary name keeps the suffix, by which libraries
    choose a format. The file follows the umask, also where a library writes for the owner alone.
    Returns `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process's own: caches are written by several at a time.
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_files(folder: str | Path, write: Callable[[Path], Any]) -> Path:
    """Let `write` fill a temporary folder, then put its files into `folder`, beside what is there.

    All are complete before the first is put in place. Returns `folder`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _fill(partial, write)
        for file in sorted(partial.iterdir()):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def write_folder(folder: str | Path, write: Callable[[Path], Any]) -> Path:
    """Let `write` fill a temporary folder, then put it in the place of `folder`.

    A link stays a link; what it points to is replaced. Returns the folder.
    """
    folder = Path(folder).resolve()
    partial, old = (folder.with_name(f".{kind}-{folder.name}") for kind in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        _fill(partial, write)
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _fill(folder: Path, write: Callable[[Path], Any]) -> None:
    """Make a folder and let `write` fill it; files follow the umask, as folders do."""
    folder.mkdir(parents=True)
    write(folder)
    for file in folder.rglob("*.safetensors"):
        file.chmod(folder.stat().st_mode & 0o666)


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8."""
    return write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write `format_json(value)` with a newline at its end."""
    return write_text(path, format_json(value) + "\n")


def format_json(value: Any) -> str:
    """Indented JSON as its standard has it: what is no finite number is null."""
    return json.dumps(as_json(value), indent=2, ensure_ascii=False, allow_nan=False)


def as_json(value: Any) -> Any:
    """A value as JSON has it: numbers of NumPy's as Python's, None for NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None
    return value


def save_figure(figure: "Figure", path: str | Path, **options: Any) -> Path:
    """Save a matplotlib figure; the suffix chooses the format, `options` are `savefig`'s."""
    return write_file(path, lambda partial: figure.savefig(partial, **options))


def check_writable(path: str | Path) -> None:
    """Refuse, before the work, a file or folder that its results could not be written to.

    Raises:
        InputError: it cannot be made or written to, or the disk is full.
    """
    place = Path(path).resolve()
    folder = next(one for one in (place, *place.parents) if one.exists())
    if folder == place and not place.is_dir():
        folder = place.parent
    trial = folder / f".partial-{os.getpid()}-trial"
    try:
        try:
            trial.write_bytes(bytes(ROOM))
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written to ({error.strerror}): name another place, or make room"
        ) from error


@contextmanager
def lock_folder(folder: str | Path, name: str = "folder") -> Iterator[None]:
    """Keep a folder to this process: two would write over each other's files.

    What a process left half-written that was killed in it is deleted.

    Raises:
        FolderInUse: another process holds it; a process that ended, however it did, does not.
        InputError: it cannot be made or written to.
    """
    folder = Path(folder)
    lock = FileLock(folder / ".lock")
    _acquire(lock, folder, name)
    try:
        check_writable(folder)
        for partial in list(folder.rglob(".partial-*")):
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


@contextmanager
def lock_output(folder: str | Path) -> Iterator[None]:
    """As `lock_folder`, for a folder that is put in its place whole: the lock lies beside it, and
    is taken away at the end."""
    folder = Path(folder).resolve()
    lock = FileLock(folder.with_name(f".lock-{folder.name}"))
    _acquire(lock, folder, "--out")
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _acquire(lock: FileLock, folder: Path, name: str) -> None:
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FolderInUse(
            f"another process works in {folder} now: wait until it ends, or name another folder"
        ) from error
    except OSError as error:
        raise InputError(
            f"{name} {folder} cannot be written to ({error.strerror}): name another folder"
        ) from error


def sha256_of(files: Iterable[str | Path]) -> str:
    """Sha256 (hex) of the contents of files, in this order."""
    digest = hashlib.sha256()
    for file in files:
        with Path(file).open("rb") as opened:
            while piece := opened.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
