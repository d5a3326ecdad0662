"""Vectors per raw id from the files of other CF models: NumPy, safetensors, parquet."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from ccf_llm_hf.data.validation import require_ids
from ccf_llm_hf.errors import InputError

DAMAGED = (SafetensorError, BadZipFile, pa.ArrowException)


def read_vector_table(path: str | Path) -> dict[str, np.ndarray]:
    """Read one side's vectors, users or items, for `CFVectors.from_tables`.

    The suffix decides the format; nothing is unpickled:

    - `.npz`: arrays `ids` `(n,)`, see `read_id`, and `vectors` `(n, dim)`;
    - `.safetensors`: tensor `vectors` `(n, dim)`, metadata `ids`, a JSON list of n ids;
    - `.parquet`: columns `id` and `vector`, a list of numbers.

    Args:
        path: the file.

    Returns:
        Raw id (str) to vector `(dim,)` float32.

    Raises:
        InputError: unreadable, unknown suffix, a missing part, an id without vector or twice.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], tuple[list, Sequence]]] = {
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise InputError(f"{path}: vectors are read from {', '.join(readers)} files; convert it")
    try:
        ids, vectors = readers[path.suffix](path)
        rows = [np.asarray(row, dtype=np.float32) for row in vectors]
    except KeyError as error:
        raise InputError(f"{path} lacks {error.args[0]!r}; give ids and their vectors") from error
    except (OSError, ValueError, TypeError, *DAMAGED) as error:
        raise InputError(f"{path} cannot be read ({error}); write it again") from error
    if len(ids) != len(rows):
        raise InputError(f"{path} holds {len(ids)} ids for {len(rows)} vectors; give one each")
    table = dict(zip(require_ids(ids, f"{path}: ids"), rows, strict=True))
    if len(table) != len(ids):
        raise InputError(f"{path} names an id more than once; keep one vector per id")
    return table


def _read_npz(path: Path) -> tuple[list, Sequence]:
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["ids"].tolist(), list(arrays["vectors"])


def _read_safetensors(path: Path) -> tuple[list, Sequence]:
    with safe_open(path, framework="np") as file:
        if "vectors" not in file.keys():  # noqa: SIM118
            raise KeyError("vectors")
        return json.loads((file.metadata() or {})["ids"]), list(file.get_tensor("vectors"))


def _read_parquet(path: Path) -> tuple[list, Sequence]:
    table = pq.read_table(path)
    return table["id"].to_pylist(), table["vector"].to_pylist()
