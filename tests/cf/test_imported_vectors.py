"""Vectors as `implicit` and RecBole leave them, through files: docs/cf-vectors.md."""

import re
from pathlib import Path

import numpy as np
import pytest

from ccf_llm_hf.cf import CFVectors, read_vector_table
from ccf_llm_hf.errors import InputError

DOC = (Path(__file__).parents[2] / "docs" / "cf-vectors.md").read_text(encoding="utf-8")
USERS, ITEMS = [f"reader-{n}" for n in range(6)], [f"book-{n}" for n in range(9)]


def vectors(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)


def write_implicit(folder: Path) -> np.ndarray:
    """Its factors: float32, a row per id in the order of the codes. Returns the model's scores."""
    users, items = vectors(len(USERS), 0), vectors(len(ITEMS), 1)
    np.savez(folder / "users.npz", ids=np.array(USERS, dtype=str), vectors=users)
    np.savez(folder / "items.npz", ids=np.array(ITEMS, dtype=str), vectors=items)
    return users @ items.T


def write_recbole(folder: Path) -> np.ndarray:
    """Its embeddings: float32, row 0 is [PAD]; its token arrays hold fixed-width text."""
    users, items = vectors(len(USERS) + 1, 2), vectors(len(ITEMS) + 1, 3)
    field2id_token = {
        "user_id": np.array(["[PAD]", *USERS]),
        "item_id": np.array(["[PAD]", *ITEMS]),
    }
    for side, table in (("user", users), ("item", items)):
        ids = field2id_token[f"{side}_id"][1:]
        np.savez(folder / f"{side}s.npz", ids=np.asarray(ids, dtype=str), vectors=table[1:])
    return users[1:] @ items[1:].T


@pytest.mark.parametrize("write", [write_implicit, write_recbole])
def test_logits_rank_as_the_library_does(tmp_path: Path, write) -> None:
    scores = write(tmp_path)
    imported = CFVectors.from_tables(
        read_vector_table(tmp_path / "users.npz"), read_vector_table(tmp_path / "items.npz")
    )
    assert (imported.user_ids, imported.item_ids) == (USERS, ITEMS)
    for user, wanted in zip(USERS, scores, strict=True):
        logits = imported.logits([user] * len(ITEMS), ITEMS).numpy()
        np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-6)
        assert (logits.argsort() == wanted.argsort()).all()


def test_the_documented_import_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scores = write_recbole(tmp_path)
    snippet = re.search(r"<!-- import -->\n```python\n(.*?)^```", DOC, re.MULTILINE | re.DOTALL)
    assert snippet is not None
    exec(snippet[1], {})
    saved = CFVectors.load(tmp_path / "runs" / "imported")
    assert float(saved.logits(["reader-1"], ["book-1"])[0]) == pytest.approx(scores[1, 1], abs=1e-5)
    assert "tensor([" in capsys.readouterr().out
    assert "book-99" in saved.item_ids and not saved.item_known[-1, -1]
    before_and_after = [0, 1_700_000_000]
    seen = saved.training_fits(["reader-1"] * 2, ["book-1"] * 2, before_and_after)
    assert seen.tolist() == [0, 1]


def test_the_documented_exports_leave_the_padding_row_out() -> None:
    snippet = re.search(r"<!-- library: recbole -->\n```python\n(.*?)^```", DOC, re.M | re.S)
    assert snippet is not None
    compile(snippet[1], "docs/cf-vectors.md", "exec")
    assert '_id"][1:]' in snippet[1] and ".numpy()[1:]" in snippet[1]


@pytest.mark.parametrize("ids", [np.arange(1, 7), np.arange(1.0, 7), np.arange(1, 7).astype("S")])
def test_ids_of_any_type_are_the_same_ids(tmp_path: Path, ids: np.ndarray) -> None:
    np.savez(tmp_path / "users.npz", ids=ids, vectors=vectors(6, 0))
    table = read_vector_table(tmp_path / "users.npz")
    imported = CFVectors.from_tables(table, {2**70: [0.0] * 4, 7.0: [1.0] * 4, b"b": [2.0] * 4})
    assert imported.user_ids == ["1", "2", "3", "4", "5", "6"]
    assert imported.item_ids == [str(2**70), "7", "b"]
    wanted = imported.logits(["3", "6"], ["7", "b"])
    assert imported.logits(np.array([3, 6]), [7, "b"]).equal(wanted)


@pytest.mark.parametrize("ids", [[1.0, float("nan")], ["a", " "], [1e18, 2.0], ["a", "a"]])
def test_missing_repeated_and_inexact_ids_are_refused(tmp_path: Path, ids: list) -> None:
    np.savez(tmp_path / "users.npz", ids=np.array(ids), vectors=vectors(2, 0))
    with pytest.raises(InputError, match=r"users\.npz"):
        read_vector_table(tmp_path / "users.npz")
