import datetime
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from raw_data import FORMATS, START, small_raw, write_raw

from ccf_llm_hf.data import PrepareConfig, interactions, load_prepared, prepare
from ccf_llm_hf.data.sources import RawTables
from ccf_llm_hf.data.validation import (
    POLICIES,
    RejectionReport,
    as_ids,
    clean_interactions,
    clean_items,
    parse_times,
)
from ccf_llm_hf.errors import InputError

Make = Callable[..., PrepareConfig]
# Kind of bad row -> the row put at the end of the file.
BAD_ROWS = {
    "missing_id": ("", "1", "5", str(START)),
    "invalid_time": ("1", "1", "5", "yesterday"),
    "invalid_rating": ("1", "1", "many", str(START)),
    "unknown_item": ("1", "nowhere", "5", str(START)),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_row_is_dropped_and_reported(reason: str, kind: str, prepared_config: Make) -> None:
    raw = small_raw()
    raw.rows.append(BAD_ROWS[reason])
    out = prepare(prepared_config(raw, kind), summary=False)
    rejected = load_prepared(out).protocol["rejected"]
    assert list(rejected) == [reason]
    assert rejected[reason]["count"] == 1
    assert rejected[reason]["policy"] == POLICIES[reason]
    header = 0 if kind in ("dat", "u-files", "parquet") else 1
    file, line = rejected[reason]["examples"][0].split(":")
    assert file.startswith(("ratings.", "u.data", "ml-1"))
    assert int(line) == len(raw.rows) + header
    assert len(interactions(out)) == len(raw.rows) - 1


@pytest.mark.parametrize("kind", FORMATS)
def test_duplicates_keep_the_first(kind: str, prepared_config: Make) -> None:
    raw = small_raw()
    user, item, rating, time = raw.rows[3]
    other = "1" if rating != "1" else "2"
    raw.rows += [(user, item, rating, time), (user, item, other, time)]
    out = prepare(prepared_config(raw, kind), summary=False)
    rejected = load_prepared(out).protocol["rejected"]
    assert {reason: entry["count"] for reason, entry in rejected.items()} == {
        "duplicate": 1,
        "conflicting_duplicate": 1,
    }
    log = interactions(out)
    row = log[(log["user_id"] == user) & (log["item_id"] == item)]
    assert row["rating"].tolist() == [float(rating)]


@pytest.mark.parametrize("kind", ["dat", "recbole-1m", "u-files", "recbole-100k", "csv"])
def test_malformed_lines_are_dropped_and_reported(kind: str, prepared_config: Make) -> None:
    config = prepared_config(None, kind)
    folder = Path(config.input or str(Path(config.interactions or "").parent))
    names = ("ratings.dat", "u.data", "ratings.csv", "ml-1m.inter", "ml-100k.inter")
    file = next(folder / name for name in names if (folder / name).exists())
    names = ("movies.dat", "u.item", "items.csv", "ml-1m.item", "ml-100k.item")
    item_file = next(folder / name for name in names if (folder / name).exists())
    for path in (file, item_file):
        path.write_text(path.read_text() + "garbage\n")
    rejected = load_prepared(prepare(config, summary=False)).protocol["rejected"]
    assert set(rejected) == {"malformed_line", "malformed_item_line"}
    line = len(file.read_text().splitlines())
    assert rejected["malformed_line"]["examples"] == [f"{file.name}:{line}"]


@pytest.mark.parametrize("kind", FORMATS)
def test_bad_items(kind: str, prepared_config: Make) -> None:
    raw = small_raw()
    raw.items += [("0", "Second title", "1999", "War"), ("", "No id", "1999", "War")]
    raw.items.append(("77", "", "", "War"))
    data = load_prepared(prepare(prepared_config(raw, kind), summary=False))
    assert {reason: entry["count"] for reason, entry in data.protocol["rejected"].items()} == {
        "duplicate_item": 1,
        "missing_item_id": 1,
        "missing_title": 1,
    }
    titles = dict(zip(data.items["item_id"], data.items["title"], strict=True))
    assert titles["0"].startswith("Movie 0")
    assert titles["77"] == "77"
    assert "" not in titles


def test_movielens_ratings_outside_the_scale_are_dropped(prepared_config: Make) -> None:
    raw = small_raw()
    raw.rows += [("1", "1", value, str(START)) for value in ("0", "6", "nan", "inf")]
    for kind in ("dat", "latest"):
        out = prepare(prepared_config(raw, kind), summary=False)
        assert load_prepared(out).protocol["rejected"]["invalid_rating"]["count"] == 4


def test_mostly_bad_file_is_an_input_error(prepared_config: Make) -> None:
    raw = small_raw()
    raw.rows += [("1", "1", "5", "soon")] * (len(raw.rows) + 1)
    config = prepared_config(raw, "csv")
    with pytest.raises(
        InputError, match=r"ratings\.csv: \d+ of \d+ rows are unusable.*invalid_time"
    ):
        prepare(config)
    assert not Path(config.out).exists()


def test_empty_tables_are_input_errors(prepared_config: Make, tmp_path: Path) -> None:
    raw = small_raw()
    raw.rows = []
    for kind in FORMATS:
        with pytest.raises(InputError, match="has no rows"):
            prepare(prepared_config(raw, kind))
    raw = small_raw()
    raw.items = []
    write_raw(raw, "dat", tmp_path / "raw")
    (tmp_path / "raw" / "movies.dat").write_text("")
    with pytest.raises(InputError, match=r"movies\.dat has no rows"):
        prepare(PrepareConfig(source="ml-1m", input=str(tmp_path / "raw"), out=str(tmp_path / "o")))


def test_no_more_than_five_examples() -> None:
    report = RejectionReport()
    report.add("missing_id", "f", list(range(20, 0, -1)))
    assert report.reasons["missing_id"]["examples"] == ["f:1", "f:2", "f:3", "f:4", "f:5"]
    assert report.reasons["missing_id"]["count"] == 20


def table(values: list, column: str) -> RawTables:
    n = len(values)
    rows = pd.DataFrame({"user_id": "u", "item_id": "i", "_line": range(n)})
    rows["timestamp"] = range(START, START + n)
    rows[column] = values
    items = pd.DataFrame({"item_id": ["i"], "title": ["T"], "_line": [1]})
    return RawTables(rows, items, "f", "g")


def test_labels() -> None:
    report = RejectionReport()
    raw = table(["0", "1", "0.0", "1.0", "True", "false", "yes", ""], "label")
    rows = clean_interactions(raw, clean_items(raw, report), report)
    assert rows["label"].tolist() == [0, 1, 0, 1, 1, 0]
    assert rows["label"].dtype == np.int64
    assert report.reasons["invalid_label"]["examples"] == ["f:6", "f:7"]
    raw = table([True, False, None, 1, 0.0], "label")
    rows = clean_interactions(raw, clean_items(raw, report), RejectionReport())
    assert rows["label"].tolist() == [1, 0, 1, 0]


def test_a_row_bad_in_two_ways_is_counted_once() -> None:
    report = RejectionReport()
    raw = table([5.0, 5.0, 5.0], "rating")
    raw.interactions.loc[1, ["item_id", "timestamp"]] = ["", None]
    rows = clean_interactions(raw, clean_items(raw, report), report)
    assert len(rows) == 2
    assert set(report.reasons) == {"missing_id"}


def test_parse_times() -> None:
    text = pd.Series(["10", "10.7", "2020-01-02", "2020-01-02T03:00:00+02:00", "x", "", "1e400"])
    times = parse_times(text).tolist()
    assert times[:4] == [10, 10.7, 1_577_923_200, 1_577_926_800]
    assert all(math.isnan(time) for time in times[4:])
    assert parse_times(pd.Series([1_600_000_000_123])).isna().all()
    assert parse_times(pd.Series([1_600_000_000_123]), "ms").tolist() == [1_600_000_000.123]
    day = datetime.date(2020, 1, 2)
    for values in ([day, None], pd.to_datetime([day, None]), pd.to_datetime([day, None], utc=True)):
        times = parse_times(pd.Series(values)).tolist()
        assert times[0] == 1_577_923_200
        assert math.isnan(times[1])


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        ([1, 2], ["1", "2"]),
        ([1.0, None], ["1", ""]),
        ([1.5, 2.0], ["1.5", "2"]),
        (["1.0", "2"], ["1", "2"]),
        ([b"a", None], ["a", ""]),
        ([2**70, 2**53 + 1], [str(2**70), "9007199254740993"]),
        ([" a ", None], ["a", ""]),
        (["007", "NA"], ["007", "NA"]),
        ([None, None], ["", ""]),
    ],
)
def test_as_ids(values: list, ids: list[str]) -> None:
    assert as_ids(pd.Series(values)).tolist() == ids


@pytest.mark.parametrize("values", [[["a"], ["b"]], [1e18, 2.0], [{"id": 1}]])
def test_columns_of_no_ids_are_refused(values: list) -> None:
    with pytest.raises(InputError, match="column 'who' holds no ids"):
        as_ids(pd.Series(values, name="who"))


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("label", ["1", "-1", "0"], "labels are 0 and 1"),
        ("label", [1, 2, 1], "labels are 0 and 1"),
        ("rating", ["4,5", "3", "5"], "ratings are numbers such as 4.5"),
        ("rating", ["5", "4.5/5", "5"], "ratings are numbers such as 4.5"),
        ("rating", ["5", "4 / 5", "5"], "ratings are numbers such as 4.5"),
    ],
)
def test_another_notation_is_refused_and_not_dropped(
    column: str, values: list, expected: str
) -> None:
    raw = table(values, column)
    with pytest.raises(InputError, match=rf"f:\d: {column} '.*' is not read: {expected}"):
        clean_interactions(raw, clean_items(raw, RejectionReport()), RejectionReport())


@pytest.mark.parametrize(
    ("times", "unit", "mend"),
    [
        ([20201108, 20201109, 20211231], "s", "dates without hyphens"),
        (["20201108", "20201109", "20211231"], "s", "dates without hyphens"),
        ([1_600_000_000, 1_600_000_001, 1_600_000_002], "ms", "check --time-unit"),
        ([1, 2, 3], "s", "--split random if they are no times"),
        ([1_600_000_000] * 3, "s", "all rows have one time, 1600000000"),
        ([1_600_000_000_000, 1_600_000_000_001, 1_600_000_000_002], "s", "--time-unit ms"),
        (["11/08/2020"] * 3, "s", "ISO date such as 2020-11-08"),
    ],
)
def test_times_that_cannot_be_are_refused(times: list, unit: str, mend: str) -> None:
    raw = table([5, 4, 3], "rating")
    raw.interactions["timestamp"] = times
    with pytest.raises(InputError, match=mend):
        clean_interactions(raw, clean_items(raw, RejectionReport()), RejectionReport(), unit)


def test_every_row_that_was_read_is_accounted_for() -> None:
    raw = table([5, None, 4], "rating")
    raw.interactions_read, raw.malformed_interactions = 4, [9]
    report = RejectionReport()
    clean_interactions(raw, clean_items(raw, report), report)
    assert report.tables == {"f": {"read": 4, "accepted": 2, "rejected": 2}}
    raw.interactions_read = 5
    with pytest.raises(InputError, match="f holds 5 rows, but 2 were accepted and 2 rejected"):
        clean_interactions(raw, clean_items(raw, report), report)
