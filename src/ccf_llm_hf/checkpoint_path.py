"""Whether a name can be a checkpoint at all, told without importing torch."""

import re
from pathlib import Path

from ccf_llm_hf.errors import InputError


def check_checkpoint(path: str) -> None:
    """Refuse what can be neither a checkpoint's folder nor a Hub repository.

    Raises:
        InputError: it is neither, or the folder of a training run, which holds its checkpoints.
    """
    folder = Path(path)
    if folder.is_dir():
        inner = folder / "checkpoint-slim"
        if inner.is_dir() and not (folder / "config.json").is_file():
            raise InputError(f"{path} is the folder of a training run: name its {inner}")
        return
    hub_like = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path)
    # `runs/typo` looks like a repository, but where runs/ is a folder it is a mistyped path.
    if not hub_like or folder.parent.is_dir():
        raise InputError(
            f"checkpoint {path} is not a folder, and no Hub repository (org/name) either: "
            "make one with ccf-llm train"
        )
