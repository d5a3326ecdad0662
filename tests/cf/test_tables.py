import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from ccf_llm_hf.cf import CFVectors, read_vector_table
from ccf_llm_hf.errors import InputError

VECTORS = np.arange(6, dtype=np.float32).reshape(3, 2)


def write_npz(path: Path) -> None:
    np.savez(path, ids=np.array([10, 20, 30]), vectors=VECTORS.astype(np.float64))


def write_safetensors(path: Path) -> None:
    save_file({"vectors": VECTORS}, path, metadata={"ids": json.dumps([10, "20", 30])})


def write_parquet(path: Path) -> None:
    pd.DataFrame({"id": [10, 20, 30], "vector": list(VECTORS)}).to_parquet(path)


WRITERS = {".npz": write_npz, ".safetensors": write_safetensors, ".parquet": write_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_table(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"users{suffix}"
    WRITERS[suffix](path)
    table = read_vector_table(path)
    assert list(table) == ["10", "20", "30"]
    np.testing.assert_array_equal(np.stack(list(table.values())), VECTORS)
    imported = CFVectors.from_tables(table, table)
    assert imported.logits(["10"], ["30"]).tolist() == [5.0]


@pytest.mark.parametrize("suffix", WRITERS)
def test_damaged_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"users{suffix}"
    WRITERS[suffix](path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=f"users{suffix}"):
        read_vector_table(path)


def test_pickled_ids_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "users.npz", ids=np.array(["a", 1], dtype=object), vectors=VECTORS[:2])
    with pytest.raises(InputError, match=r"users\.npz cannot be read"):
        read_vector_table(tmp_path / "users.npz")


def test_missing_parts_and_unequal_lengths_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", vectors=VECTORS)
    with pytest.raises(InputError, match="ids"):
        read_vector_table(tmp_path / "a.npz")
    save_file({"vectors": VECTORS}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="lacks 'ids'"):
        read_vector_table(tmp_path / "b.safetensors")
    np.savez(tmp_path / "c.npz", ids=np.array([1, 2]), vectors=VECTORS)
    with pytest.raises(InputError, match="2 ids for 3 vectors"):
        read_vector_table(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", ids=np.array([1, 2, 1]), vectors=VECTORS)
    with pytest.raises(InputError, match="more than once"):
        read_vector_table(tmp_path / "d.npz")
    with pytest.raises(InputError, match=r"\.npz, \.safetensors, \.parquet"):
        read_vector_table(tmp_path / "e.pkl")
