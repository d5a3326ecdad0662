import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ccf_llm_hf.data import PrepareConfig, load_prepared, prepare
from ccf_llm_hf.data.grouping import group_rows, group_streams
from ccf_llm_hf.data.prepared import PreparedData
from ccf_llm_hf.data.rows import Rows


def large(folder: Path, rows: int, **options: object) -> PreparedData:
    random = np.random.default_rng(0)
    table = {
        "user_id": random.integers(0, rows // 50, rows),
        "item_id": (300 * random.random(rows) ** 2).astype(int),
        "rating": random.integers(1, 6, rows),
        "timestamp": np.arange(rows) + 1_500_000_000,
    }
    table["title"] = table["item_id"]
    pd.DataFrame(table).to_csv(folder / "rows.csv", index=False)
    config = {"interactions": str(folder / "rows.csv"), "rating_column": "rating"}
    chosen = {"source": "table", "out": str(folder / "out"), **config, **options}
    return load_prepared(prepare(PrepareConfig(**chosen), summary=False))  # type: ignore[arg-type]


@pytest.mark.parametrize("histories", ["likes", "signed"])
def test_rows_of_a_file_are_those_of_its_dataset(tmp_path: Path, histories: str) -> None:
    data = large(tmp_path, 1000, histories=histories, max_history=12)
    for name, split in data.splits.items():
        of_file, shuffled = data.rows(name), split.shuffle(seed=1)
        for rows, dataset in ((of_file, split), (Rows.of(shuffled), shuffled)):
            assert len(rows) == len(dataset)
            assert rows.user_names[rows.users].tolist() == list(dataset["user_id"])
            assert rows.timestamps().tolist() == list(dataset["timestamp"])
            chosen = np.random.default_rng(2).permutation(len(rows))[:20]
            skip = rows.stored[chosen] // 2
            found = rows.histories(chosen, skip)
            for place, (row, before) in enumerate(zip(chosen.tolist(), skip, strict=True)):
                stored, items = dataset[row], found[place]
                if histories == "signed":
                    assert [i["rating"] for i in items] == stored["history_ratings"][before:]
                    items = [i["id"] for i in items]
                assert items == stored["history"][before:]
        assert list(group_rows(of_file, (3, 4))) == list(group_rows(split, (3, 4)))


def test_groups_take_no_more_memory_than_their_numbers(tmp_path: Path) -> None:
    data = large(tmp_path, 40_000, histories="signed", max_history=20)
    rows = data.rows("train")
    tracemalloc.start()
    kept = [group_streams(rows, 16, fold_in_items=4), group_rows(rows, (8, 8))]
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Rows, window lengths and ratings take 20 bytes a row; a group has a history of its own.
    histories = sum(16 * group.offsets.size for group in kept)
    histories += 8 * (kept[0].earlier.items.size + kept[1].histories.items.size)
    assert size < 2 * 20 * len(rows) + histories + 300_000
