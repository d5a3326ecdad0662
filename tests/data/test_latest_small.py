import lzma
from pathlib import Path

import pytest
from raw_data import pickled_table

from ccf_llm_hf.data.latest_small import convert_pickle
from ccf_llm_hf.data.sources import read_movielens_latest_small
from ccf_llm_hf.errors import InputError

NAN = float("nan")
TABLE: dict[str, list] = {
    "rownames": [1, 2, 3, 4, 5],
    "movieId": [31, 2, 31, 7, 9],
    "title": ["Hamlet", "Babylon 5", "Hamlet", "Hamlet", None],
    "year": [2000.0, NAN, 2000.0, 2000.0, NAN],
    "genres": ["Drama", "Sci-Fi", "Drama", "Crime|Drama", "(no genres listed)"],
    "userId": [1, 1, 2, 2, 2],
    "rating": [2.5, 3.0, 4.0, 5.0, 0.5],
    "timestamp": [1260759144, 1260759179, 1260759182, 1260759185, 1260759205],
}


def test_titles_get_their_year_back_and_items_stay_apart(tmp_path: Path) -> None:
    pickled = tmp_path / "movielens.pkl.compress"
    pickled.write_bytes(lzma.compress(pickled_table(TABLE)))
    convert_pickle(pickled, tmp_path)
    tables = read_movielens_latest_small(tmp_path)
    items = tables.items[["item_id", "title", "genres"]].values.tolist()
    assert items == [
        [2, "Babylon 5", "Sci-Fi"],
        [7, "Hamlet (2000)", "Crime|Drama"],
        [9, "", ""],
        [31, "Hamlet (2000)", "Drama"],
    ]
    log = tables.interactions
    assert log["user_id"].tolist() == TABLE["userId"]
    assert log["item_id"].tolist() == TABLE["movieId"]
    assert log["rating"].tolist() == TABLE["rating"]
    assert log["timestamp"].tolist() == TABLE["timestamp"]


def test_another_table_and_a_damaged_file_are_input_errors(tmp_path: Path) -> None:
    pickled = tmp_path / "movielens.pkl.compress"
    pickled.write_bytes(lzma.compress(pickled_table({"movieId": [1]})))
    with pytest.raises(InputError, match=r"movielens\.pkl\.compress has no column 'title'"):
        convert_pickle(pickled, tmp_path)
    pickled.write_bytes(pickled.read_bytes()[:-30])
    with pytest.raises(InputError, match="is damaged"):
        convert_pickle(pickled, tmp_path)
