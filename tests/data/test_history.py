import json

import pandas as pd
import pytest

from ccf_llm_hf.data.history import stored_histories, stored_history
from ccf_llm_hf.data.prepared import FORMAT
from ccf_llm_hf.errors import InputError


@pytest.fixture
def log(tmp_path):
    (tmp_path / "interactions").mkdir()
    (tmp_path / "protocol.json").write_text(json.dumps({"format": FORMAT}))
    pd.DataFrame(
        {
            "user_id": ["a", "a", "b", "a", "a"],
            "item_id": ["9", "1", "1", "2", "3"],
            "rating": [5.0, 4.0, 5.0, 1.0, 5.0],
            "label": [1, 1, 1, 0, 1],
            "timestamp": [1, 2, 3, 4, 5],
            "split": ["", "train", "train", "validation", "test"],
        }
    ).to_parquet(tmp_path / "interactions" / "interactions.parquet")
    return tmp_path


def test_liked_items_of_all_splits_oldest_first(log):
    assert stored_history(log, "a") == ["1", "3"]


def test_an_unknown_user_is_named(log):
    with pytest.raises(InputError, match="user 'zz' has no rows"):
        stored_history(log, "zz")


def test_frozen_histories_end_with_training(log):
    (log / "protocol.json").write_text(json.dumps({"format": FORMAT, "frozen_histories": True}))
    assert stored_history(log, "a") == ["1"]
    assert stored_histories(log) == {"a": ["1"], "b": ["1"]}
