import contextlib
import io
import os
import pickle
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from raw_data import pickled_table

from ccf_llm_hf.data import unpickle
from ccf_llm_hf.data.unpickle import read_pickled_table
from ccf_llm_hf.errors import InputError

COLUMNS: dict[str, list] = {
    "uid": [3, 1, 2],
    "title": ["Heat", None, float("nan")],
    "time": [1.5, 2.5, float("nan")],
    "his": [np.array([0]), np.array([0, 5]), np.array([], dtype=np.int64)],
    "iid": [7, 8, 9],
    "his_title": [[""], ["", "Big"], []],
}


class Calls:
    """Pickled as a call of `function(*arguments)`."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def read(content: bytes) -> pd.DataFrame:
    return read_pickled_table(io.BytesIO(content), "x.pkl")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_table_comes_back_as_it_was(protocol: int) -> None:
    table = read(pickled_table(COLUMNS, protocol))
    assert list(table) == list(COLUMNS)
    assert table["uid"].tolist() == [3, 1, 2] and table["uid"].dtype == np.int64
    assert table["iid"].tolist() == [7, 8, 9]
    np.testing.assert_equal(table["time"].to_numpy(), np.array(COLUMNS["time"]))
    assert table["title"][0] == "Heat" and table["title"][1] is None and np.isnan(table["title"][2])
    assert [cell.tolist() for cell in table["his"]] == [[0], [0, 5], []]
    assert table["his_title"].tolist() == COLUMNS["his_title"]


def test_rows_chosen_from_a_table_and_arrays_in_other_orders() -> None:
    whole = pickle.loads(pickled_table({"a": [1, 2, 3], "b": [4, 5, 6], "c": ["x", "y", "z"]}))
    table = read(pickle.dumps(whole[whole["a"] > 1]))  # its index is an array
    assert table.values.tolist() == [[2, 5, "y"], [3, 6, "z"]]
    for dtype, order in ((">i4", "C"), ("<f8", "F"), (">f8", "F"), ("?", "C")):
        numbers = np.array([[1, 0], [1, 1], [0, 1]], dtype=dtype, order=order)
        frame = pd.DataFrame(numbers)
        frame.columns = pd.Index(["a", "b"], dtype=object)
        assert read(pickle.dumps(frame)).values.tolist() == numbers.tolist()


def test_names_of_older_versions_are_known() -> None:
    """pandas 1.5 with NumPy 1, whose integer index is a class that is gone."""
    whole = pickle.loads(pickled_table({"a": [1, 2, 3], "b": ["x", "y", "z"]}))
    content = pickle.dumps(whole[whole["a"] > 1], protocol=3)
    for new, old in (
        (b"cpandas\nDataFrame\n", b"cpandas.core.frame\nDataFrame\n"),
        (b"cpandas\nIndex\n", b"cpandas.core.indexes.numeric\nInt64Index\n"),
        (b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"),
    ):
        assert new in content or old in content
        content = content.replace(new, old)
    assert read(content).values.tolist() == [[2, "y"], [3, "z"]]


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch ran",), f"{os.name}.system"),
        (subprocess.Popen, (["touch", "ran"],), "subprocess.Popen"),
        (eval, ("open('ran', 'w')",), "builtins.eval"),
        (getattr, (os, "system"), "builtins.getattr"),
        (open, ("ran", "w"), "io.open"),
        (pd.read_pickle, ("ran",), "pandas.read_pickle"),
        (pd.eval, ("1",), "pandas.eval"),
        (np.load, ("ran",), "numpy.load"),
        (np.save, ("ran", [1]), "numpy.save"),
    ],
)
def test_a_malicious_pickle_is_refused_by_name_before_anything_runs(
    function: Callable,
    arguments: tuple,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = tuple("posix" if value is os else value for value in arguments)
    call = Calls(function, *arguments)
    for content in (pickle.dumps(call), pickled_table({"a": [1], "b": [[call]]})):
        with pytest.raises(InputError, match=f"x.pkl: the pickle asks for .*{name.split('.')[-1]}"):
            read(content)
        assert list(tmp_path.iterdir()) == []


def test_a_dotted_name_does_not_reach_through_an_admitted_one() -> None:
    content = b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93."
    with pytest.raises(InputError, match=r"asks for numpy\.ndarray\.__class__"):
        read(content)


def test_bytes_are_not_taken_for_objects() -> None:
    """NumPy itself would read pointers out of such a file."""
    table = pickle.loads(pickled_table({"a": ["x"]}))
    for dtype in (np.dtype("O"), np.dtype([("a", "O")]), np.dtype("M8[s]"), np.dtype("V8")):
        numbers = np.zeros((1, 1), dtype=np.int64)
        content = pickle.dumps(pd.DataFrame(numbers, columns=table.columns))
        assert b"i8" in content
        hostile = content.replace(b"\x8c\x02i8", b"\x8c\x02" + dtype.str[-2:].encode(), 1)
        with pytest.raises(InputError, match=r"x\.pkl is no readable pickle.*values of type"):
            read(hostile)


@pytest.mark.parametrize("names", [("numpy", "dtype"), ("builtins", "slice")])
def test_an_admitted_name_cannot_be_changed(names: tuple[str, str]) -> None:
    before = unpickle._DType.__setstate__
    module, name = (text.encode() for text in names)
    content = b"\x80\x02c" + module + b"\n" + name + b"\nN}X\x0c\x00\x00\x00__setstate__Ns\x86b."
    with pytest.raises(InputError, match="no readable pickle"):
        read(content)
    assert unpickle._DType.__setstate__ is before


def test_damaged_and_other_files_are_input_errors() -> None:
    whole = pickled_table(COLUMNS)
    series = pickle.dumps({"a": 1})
    for content in (whole[:-20], whole[: len(whole) // 2], b"", b"no pickle", series):
        with pytest.raises(InputError, match=r"x\.pkl is no readable pickle of a pandas table"):
            read(content)
    for place in range(0, len(whole), 7):
        try:
            read(whole[:place] + b"\xff" + whole[place + 1 :])
        except InputError as error:
            assert "\n" not in str(error)


def test_a_small_file_claims_little_memory() -> None:
    """Sizes that a pickle states are no reason to make room for them."""
    whole = pickled_table(COLUMNS, 4)
    huge = (2**32).to_bytes(8, "little")
    claims = [
        whole[:2] + b"r" + (2**28).to_bytes(4, "little") + whole[2:],  # a place to remember at
        whole[:2] + b"\x96" + huge + whole[2:],  # bytearray
        whole[:2] + b"\x8e" + huge + whole[2:],  # bytes
        whole[:2] + b"\x8d" + huge + whole[2:],  # text
    ]
    columns = pickle.dumps(pd.DataFrame(np.empty((2, 3))))  # named by a RangeIndex of three
    stop = columns.index(b"stop") + 5
    claims.append(columns[:stop] + b"J" + (2**30).to_bytes(4, "little") + columns[stop + 2 :])
    for content in claims:
        tracemalloc.start()
        with contextlib.suppress(InputError):
            read(content)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
        tracemalloc.stop()
