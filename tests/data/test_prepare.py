import datetime
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from raw_data import END, FORMATS, START, Raw, small_raw, write_raw

from ccf_llm_hf.data import (
    PrepareConfig,
    PreparedData,
    earlier_interactions,
    format_summary,
    interactions,
    load_prepared,
    prepare,
    stored_histories,
)
from ccf_llm_hf.data.grouping import group_rows
from ccf_llm_hf.data.prepared import rating_midpoint
from ccf_llm_hf.data.sources import read_movielens_1m
from ccf_llm_hf.errors import InputError

Make = Callable[..., PrepareConfig]
ORACLE = {"train": "1dc65cb16772b87e", "validation": "dae6b4cc5eb18af6", "test": "82eecfa2a0f42370"}


def row_hashes(data: PreparedData) -> dict[str, str]:
    """Per split: sha256 (16 digits) of the sorted rows title|timestamp|label|history titles."""
    titles = dict(zip(data.items["item_id"], data.items["title"], strict=True))
    hashes = {}
    for name, split in data.splits.items():
        lines = [
            "|".join(
                [titles[row["item_id"]], str(row["timestamp"]), str(row["label"])]
                + [titles[item] for item in row["history"]]
            )
            for row in split
        ]
        hashes[name] = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]
    return hashes


@pytest.mark.parametrize("kinds", [("dat", "recbole-1m"), ("u-files", "recbole-100k")])
def test_both_forms_of_movielens_give_the_same_rows(
    kinds: tuple[str, str], prepared_config: Make, tmp_path: Path
) -> None:
    hashes = []
    for kind in kinds:
        config = prepared_config(None, kind, out=str(tmp_path / kind))
        for file in (tmp_path / "raw").iterdir():
            if file.name.startswith("ml-") != kind.startswith("recbole"):
                file.unlink()
        hashes.append(row_hashes(load_prepared(prepare(config, summary=False))))
    assert hashes[0] == hashes[1]


def test_ml_1m_splits_are_months(prepared_config: Make) -> None:
    raw = small_raw()
    months = pd.date_range("2000-04-01", "2003-06-01", freq="MS", tz="UTC")
    edges = [*months, *(months - pd.Timedelta(seconds=1))[1:]]
    raw.rows = [("1", "1", "5", str(int(edge.timestamp()))) for edge in edges]
    out = prepare(prepared_config(raw, "dat"), summary=False)
    log = interactions(out)
    date = pd.to_datetime(log["timestamp"], unit="s")
    month = (date.dt.year - 2000) * 12 + date.dt.month - 4
    for name, (first, last) in {
        "train": (14, 23),
        "validation": (24, 28),
        "test": (29, 33),
    }.items():
        assert ((log["split"] == name) == month.between(first, last)).all()
    assert (log["split"] == "").sum() == 2 * (14 + 38 - 33) - 1


@pytest.mark.parametrize("kind", FORMATS)
def test_prepared_folder_has_the_promised_columns(kind: str, prepared_config: Make) -> None:
    out = prepare(prepared_config(None, kind), summary=False)
    data = load_prepared(out)
    for split in data.splits.values():
        types = {name: str(feature) for name, feature in split.features.items()}
        assert types == {
            "user_id": "Value('string')",
            "item_id": "Value('string')",
            "label": "Value('int64')",
            "timestamp": "Value('int64')",
            "history": "List(Value('string'))",
            "split_position": "Value('int64')",
            "not_cold": "Value('bool')",
        }
    assert data.items.column_names[:2] == ["item_id", "title"]
    assert len(data.items) == len(small_raw().items)
    log = interactions(out)
    assert list(log) == ["user_id", "item_id", "rating", "label", "timestamp", "split"]
    assert log["timestamp"].is_monotonic_increasing
    assert ((log["rating"] >= 4) == (log["label"] == 1)).all()
    for name, split in data.splits.items():
        assert len(split) == (log["split"] == name).sum() == data.protocol["splits"][name]["rows"]


def test_interactions_equal_in_time_are_ordered_by_user_then_item(prepared_config: Make) -> None:
    raw = small_raw()
    time = str(START)
    raw.rows = [("9", "5", "5", time), ("2", "3", "5", time), ("9", "3", "5", time), *raw.rows[20:]]
    log = interactions(prepare(prepared_config(raw), summary=False))
    assert log[["user_id", "item_id"]].values.tolist()[:3] == [["9", "5"], ["9", "3"], ["2", "3"]]


def test_label_column(tmp_path: Path) -> None:
    options = write_raw(small_raw(), "parquet", tmp_path)
    table = pd.read_parquet(options["interactions"])
    table["clicked"] = (table["rating"] == "5").astype(int)
    table.drop(columns="rating").to_parquet(options["interactions"])
    options["rating_column"] = None
    config = PrepareConfig(**options, label_column="clicked", out=str(tmp_path / "out"))
    out = prepare(config, summary=False)
    log = interactions(out)
    assert log["rating"].isna().all()
    assert log["label"].sum() == table["clicked"].sum() > 0
    assert load_prepared(out).protocol["label_rule"] == "column 'clicked'"


def test_columns_named_otherwise_and_dates(tmp_path: Path) -> None:
    table = pd.DataFrame(small_raw().rows, columns=["who", "what", "stars", "when"])
    table["when"] = pd.to_datetime(table["when"].astype(int), unit="s").dt.strftime(
        "%Y-%m-%dT%H:%M:%S"
    )
    table["label"] = "name of " + table["what"]
    table.to_csv(tmp_path / "log.csv", index=False)
    config = PrepareConfig(
        source="table",
        out=str(tmp_path / "out"),
        interactions=str(tmp_path / "log.csv"),
        user_column="who",
        item_column="what",
        rating_column="stars",
        time_column="when",
        title_column="label",
        positive_threshold=3,
        split="time",
        valid_start="2002-01-01",
        test_start="2002-07-01T00:00:00+02:00",
    )
    data = load_prepared(prepare(config, summary=False))
    assert data.items["title"][0] == f"name of {data.items['item_id'][0]}"
    assert data.protocol["splits"]["validation"]["first_timestamp"] >= 1_009_843_200
    assert data.protocol["splits"]["test"]["first_timestamp"] >= 1_025_474_400
    assert "validation from 2002-01-01 00:00:00 UTC" in data.protocol["split_rule"]
    assert data.protocol["label_rule"] == "1 if rating >= 3, else 0"


def test_milliseconds(prepared_config: Make) -> None:
    raw = small_raw()
    raw.rows = [(u, i, r, t + "000") for u, i, r, t in raw.rows]
    with pytest.raises(InputError, match="invalid_time"):
        prepare(prepared_config(raw))
    log = interactions(prepare(prepared_config(raw, time_unit="ms"), summary=False))
    assert log["timestamp"].between(START, END).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "netflix"}, "unknown source 'netflix': choose one of ml-1m, ml-100k, ml-la"),
        ({"out": ""}, "--out"),
        ({"interactions": None}, "--interactions FILE"),
        ({"interactions": "nowhere.csv"}, "nowhere.csv does not exist"),
        ({"rating_column": None}, "either --rating-column or --label-column"),
        ({"label_column": "rating"}, "either --rating-column or --label-column"),
        ({"rating_column": "stars"}, "ratings.csv has no column 'stars'"),
        ({"title_column": "name"}, "items.csv has no column 'name'"),
        ({"time_unit": "h"}, "--time-unit"),
        ({"split": "tomorrow"}, "--split must be ratio, time or random, not 'tomorrow'"),
        ({"seed": 1}, "--seed has no meaning without --split random"),
        ({"split": "random", "time_column": "t"}, "--time-column has no meaning with --split rand"),
        ({"split": "random", "valid_start": "9"}, "--valid-start has no meaning with --split rand"),
        ({"split": "random", "ratios": [0.5, 0.5]}, "--ratios must be three positive numbers"),
        ({"item_fields": ["author"]}, "items.csv has no column 'author'"),
        ({"item_fields": ["title"]}, "--item-fields names 'title', which is the id"),
        ({"item_fields": ["year", "year"]}, "--item-fields names 'year', which is the id"),
        ({"field_separator": "|"}, "--field-separator has no meaning without --item-fields"),
        ({"split": "time"}, "--valid-start and --test-start"),
        ({"split": "time", "valid_start": "soon", "test_start": "9"}, "--valid-start 'soon'"),
        ({"split": "time", "valid_start": "9", "test_start": "8"}, "must lie before"),
        ({"split": "time", "valid_start": "8", "test_start": "9"}, "the train split has no rows"),
        ({"ratios": [0.5, 0.5]}, "--ratios"),
        ({"max_history": 0}, "--max-history"),
        ({"input": "x"}, "--input has no meaning for the source table"),
        ({"source": "ml-1m"}, "--interactions has no meaning for the source ml-1m"),
        ({"source": "collm"}, "--interactions has no meaning for the source collm"),
    ],
)
def test_bad_options_are_input_errors(options: dict, message: str, prepared_config: Make) -> None:
    config = prepared_config(None, "csv", **options)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        prepare(config)
    assert "\n" not in str(error.value)
    if config.out:
        assert not Path(config.out).exists()


def test_protocol_options_cannot_change_movielens(prepared_config: Make) -> None:
    with pytest.raises(InputError, match="--positive-threshold has no meaning"):
        prepare(prepared_config(None, "dat", positive_threshold=3.0))


def without_times(tmp_path: Path, **options: object) -> PreparedData:
    """The small data set as tables without a column of times, split at random."""
    given = write_raw(small_raw(12, 24), "csv", tmp_path)
    pd.read_csv(given["interactions"]).drop(columns="timestamp").to_csv(
        given["interactions"], index=False
    )
    chosen = {**given, "split": "random", "out": str(tmp_path / "out"), **options}
    return load_prepared(prepare(PrepareConfig(**chosen), summary=False))


@pytest.mark.parametrize("histories", ["likes", "signed"])
def test_a_table_without_times_is_split_at_random(tmp_path: Path, histories: str) -> None:
    data = without_times(tmp_path, histories=histories)
    assert data.protocol["has_times"] is False
    assert "seed 0" in data.protocol["split_rule"]
    log = interactions(data.path)
    train = log[log["split"] == "train"]
    shown = train if histories == "signed" else train[train["label"] == 1]
    for row in data.splits["test"]:
        assert row["history"] == shown[shown["user_id"] == row["user_id"]]["item_id"].tolist()
    for row in data.splits["train"]:
        assert row["item_id"] not in row["history"]
        assert set(row["history"]) <= set(shown[shown["user_id"] == row["user_id"]]["item_id"])
    # Nothing of validation or test is in what a stored user is served with either.
    assert stored_histories(data.path).keys() <= set(train["user_id"])
    served = stored_histories(data.path)[log["user_id"][0]]
    assert len(served) == (shown["user_id"] == log["user_id"][0]).sum()
    assert earlier_interactions(data.path).equals(train.reset_index(drop=True))


@pytest.mark.parametrize("histories", ["likes", "signed"])
def test_rows_of_a_random_split_are_grouped(tmp_path: Path, histories: str) -> None:
    data = without_times(tmp_path, histories=histories, max_history=8)
    for split in data.splits.values():
        groups = group_rows(split, (6, 2))
        assert sorted(row for group in groups for row in group.rows) == list(range(len(split)))
        for group in groups:
            for row, length in zip(group.rows, group.history_lengths, strict=True):
                shown = [
                    item["id"] if isinstance(item, dict) else item
                    for item in group.history[:length]
                ]
                assert shown == split[row]["history"][len(split[row]["history"]) - length :]


def test_frozen_histories_of_a_split_by_time(prepared_config: Make) -> None:
    data = load_prepared(prepare(prepared_config(frozen_histories=True), summary=False))
    train = set(zip(*(data.splits["train"][name] for name in ("user_id", "item_id")), strict=True))
    for row in data.splits["test"]:
        assert all((row["user_id"], item) in train for item in row["history"])
    assert "frozen" in data.protocol["history_rule"]
    assert data.protocol["frozen_histories"] is True
    growing = load_prepared(prepare(prepared_config(), summary=False))
    assert growing.protocol["frozen_histories"] is False
    assert growing.splits["test"]["history"] != data.splits["test"]["history"]
    assert growing.splits["train"]["history"][:] == data.splits["train"]["history"][:]


def test_movielens_histories_can_be_frozen_and_genres_are_a_field(prepared_config: Make) -> None:
    config = prepared_config(None, "dat", frozen_histories=True)
    data = load_prepared(prepare(config, summary=False))
    assert data.protocol["frozen_histories"] is True
    assert data.protocol["item_fields"] == ["genres"]
    assert data.items["genres"][0] == ["Drama", "War"]


def test_item_fields_are_text_or_lists_of_text(tmp_path: Path) -> None:
    raw = small_raw()
    raw.items[0] = ("0", "Movie 0", "", "Drama|War")
    raw.items[1] = ("1", "Movie 1", "1991", "")
    options = write_raw(raw, "csv", tmp_path)
    items = pd.read_csv(options["items"])  # years are floating-point numbers here
    items["tags"] = [["a", " b "], None, *([["c"]] * (len(items) - 2))]
    options["items"] = str(tmp_path / "items.parquet")
    items.to_parquet(options["items"])
    fields = ["genres", "year", "tags"]
    config = PrepareConfig(
        **options, out=str(tmp_path / "out"), item_fields=fields, field_separator="|"
    )
    data = load_prepared(prepare(config, summary=False))
    assert data.protocol["item_fields"] == fields
    assert data.items["year"][:3] == ["", "1991", "1992"]
    assert data.items["genres"][:3] == [["Drama", "War"], [], ["Drama", "War"]]
    assert data.items["tags"][:3] == [["a", "b"], [], ["c"]]


def test_fields_in_a_single_table(tmp_path: Path) -> None:
    options = write_raw(small_raw(), "csv", tmp_path)
    table = pd.read_csv(options["interactions"]).merge(pd.read_csv(options["items"]))
    table.to_csv(options["interactions"], index=False)
    options["items"] = None
    config = PrepareConfig(**options, out=str(tmp_path / "out"), item_fields=["genres"])
    data = load_prepared(prepare(config, summary=False))
    assert data.items.column_names == ["item_id", "title", "genres"]
    assert data.items["genres"][0] == "Drama|War"


@pytest.mark.parametrize("source", ["amazon-books", "collm"])
def test_sources_that_cannot_be_fetched_need_their_folder(source: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(InputError, match=f"`{source}` needs --input FOLDER"):
        prepare(PrepareConfig(source=source, out=out))
    with pytest.raises(InputError, match="--offline has no meaning for the source"):
        prepare(PrepareConfig(source=source, out=out, input=str(tmp_path), offline=True))


def test_latest_small_names_its_edition(prepared_config: Make) -> None:
    data = load_prepared(prepare(prepared_config(None, "latest"), summary=False))
    raw = small_raw()
    last = max(datetime.datetime.fromtimestamp(int(row[3]), datetime.UTC) for row in raw.rows)
    assert f"{len(raw.rows)} ratings, the last of {last:%Y-%m-%d}" in data.protocol["source"]
    assert data.protocol["redistributable"] is False
    assert [split["rows"] for split in data.protocol["splits"].values()] == [43, 6, 5]


def test_summary_and_protocol(prepared_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    raw = small_raw()
    raw.rows.append(("1", "nowhere", "5", str(START)))
    out = prepare(prepared_config(raw, name="Shop"))
    printed = capsys.readouterr().out
    protocol = json.loads((out / "protocol.json").read_text())
    assert printed == format_summary(protocol, out) + "\n"
    assert re.search(r"train +\d+ +6 ", printed)
    assert "1 unknown_item (item is not in the items table: dropped), at ratings.csv:56" in printed
    assert protocol["name"] == "Shop"
    assert protocol["source"] == "ratings.csv and items.csv"
    assert protocol["accepted_rows"] == len(small_raw().rows)
    prepare(prepared_config(raw), summary=False)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_ml_1m_equals_the_published_rows(ml_1m_folder: Path, tmp_path: Path) -> None:
    config = PrepareConfig(source="ml-1m", input=str(ml_1m_folder), out=str(tmp_path / "out"))
    data = load_prepared(prepare(config, summary=False))
    splits = data.protocol["splits"]
    assert [splits[name]["rows"] for name in splits] == [33_891, 10_401, 7_331]
    assert [splits[name]["users"] for name in splits] == [740, 356, 320]
    assert [round(splits[name]["positive_rate"], 4) for name in splits] == [0.5368, 0.5283, 0.5454]
    assert round(splits["test"]["unseen_user_rate"], 3) == 0.424
    assert data.protocol["accepted_rows"] == 1_000_209
    assert len(data.items) == 3_883
    assert row_hashes(data) == ORACLE


@pytest.mark.slow
def test_ml_1m_from_dat_files_gives_the_same_rows(ml_1m_folder: Path, tmp_path: Path) -> None:
    tables = read_movielens_1m(ml_1m_folder)
    numbers = {item: str(n + 1) for n, item in enumerate(tables.items["item_id"])}
    log = tables.interactions
    raw = Raw(
        list(zip(log.user_id, log.item_id.map(numbers), log.rating, log.timestamp, strict=True))
    )
    title = tables.items["title"].str.replace(r" \(\d{4}\)$", "", regex=True)
    year, genres = tables.items["year"].astype(str), tables.items["genres"]
    raw.items = list(zip(numbers.values(), title, year, genres, strict=True))
    options = write_raw(raw, "dat", tmp_path / "raw")
    data = load_prepared(prepare(PrepareConfig(**options, out=str(tmp_path / "o")), summary=False))
    assert row_hashes(data) == ORACLE
    assert data.items["year"][0] == 1995
    assert data.items["item_id"][0] == "1"


@pytest.mark.slow
def test_ml_100k(tmp_path: Path) -> None:
    data = load_prepared(
        prepare(PrepareConfig(source="ml-100k", out=str(tmp_path / "out")), summary=False)
    )
    splits = data.protocol["splits"]
    assert sum(split["rows"] for split in splits.values()) == 100_000
    assert splits["train"]["rows"] in range(79_900, 80_001)
    assert splits["train"]["last_timestamp"] < splits["validation"]["first_timestamp"]
    assert splits["validation"]["last_timestamp"] < splits["test"]["first_timestamp"]
    assert "Toy Story (1995)" in set(data.items["title"])
    first = datetime.datetime.fromtimestamp(splits["test"]["first_timestamp"], datetime.UTC)
    assert first.year == 1998


@pytest.mark.parametrize("histories", ["likes", "signed"])
@pytest.mark.parametrize("written", ["ms", "s", "date"])
def test_rows_within_a_second_keep_their_order(
    prepared_config: Make, histories: str, written: str
) -> None:
    raw = small_raw()
    order = [str(n) for n in range(len(raw.items))]
    # Within one second and against the order in which the file first names the items.
    late = [("9", item, "5", n) for n, item in enumerate(reversed(order), start=1)]
    form = {
        "ms": lambda n: f"{START + n // 10}{n % 10}00",
        "s": lambda n: f"{START + n // 10}.{n % 10}",
        "date": lambda n: f"{datetime.datetime.fromtimestamp(START + n / 10, datetime.UTC)}",
    }[written]
    raw.rows = [("0", item, "5", n) for n, item in enumerate(order, start=1)] + late
    raw.rows += [("1", item, "1", 1000 + 50 * n) for n, item in enumerate(order)]
    raw.rows = [(user, item, rating, form(n)) for user, item, rating, n in raw.rows]
    unit = "ms" if written == "ms" else "s"
    config = prepared_config(raw, time_unit=unit, histories=histories, ratios=[0.7, 0.15, 0.15])
    out = prepare(config, summary=False)
    train = load_prepared(out).splits["train"].to_pandas()
    rows = train[train["user_id"] == "9"]
    assert rows["item_id"].tolist() == list(reversed(order))
    assert [list(history) for history in rows["history"]] == [
        rows["item_id"].tolist()[:place] for place in range(len(rows))
    ]
    shown = stored_histories(out)["9"]
    assert [item["id"] if isinstance(item, dict) else item for item in shown] == order[::-1]
    assert set(rows["timestamp"]) == {START, START + 1}


def test_ties_in_time_follow_the_file_of_a_table(prepared_config: Make) -> None:
    raw = small_raw()
    raw.rows += [("9", item, "5", str(START)) for item in ("7", "2", "5")]
    data = load_prepared(prepare(prepared_config(raw), summary=False))
    train = data.splits["train"].to_pandas()
    assert train[train["user_id"] == "9"]["item_id"].tolist() == ["7", "2", "5"]
    assert stored_histories(data.path)["9"] == ["7", "2", "5"]
    assert "in the order of the file" in data.protocol["history_rule"]


@pytest.mark.parametrize(("scale", "threshold"), [(1, 0.6), (10, 5), (100, 50), (-4, -10)], ids=str)
def test_signed_histories_of_any_scale(
    prepared_config: Make, scale: float, threshold: float
) -> None:
    raw = small_raw()
    raw.rows = [(u, i, str(int(r) * scale / 5), t) for u, i, r, t in raw.rows]
    options: dict = {"histories": "signed", "positive_threshold": threshold * 1.0}
    if scale == -4:
        options["positive_threshold"] = -2.5
    data = load_prepared(prepare(prepared_config(raw, **options), summary=False))
    midpoint = rating_midpoint(interactions(data.path))
    for row in data.splits["train"]:
        liked = [rating > midpoint for rating in row["history_ratings"]]
        assert liked == [label == 1 for label in row["history_labels"]]
    with pytest.raises(InputError, match=r"every row has label 0: ratings go from .* to "):
        prepare(prepared_config(raw, positive_threshold=1000.0))


def test_files_of_many_kinds_give_one_folder(tmp_path: Path) -> None:
    table = pd.DataFrame(small_raw().rows, columns=["user_id", "item_id", "rating", "timestamp"])
    table["title"] = "Film " + table["item_id"]
    whole = {name: table[name].astype(int) for name in ("user_id", "item_id")}
    forms = {
        "plain.csv": table,
        "padded.csv": table.assign(user_id=" " + table["user_id"] + " "),
        "floats.csv": table.assign(**{name: ids.astype(float) for name, ids in whole.items()}),
        "integers.parquet": table.assign(**whole),
        "floats.parquet": table.assign(**{name: ids.astype(float) for name, ids in whole.items()}),
        "bytes.parquet": table.assign(user_id=table["user_id"].str.encode("utf-8")),
        "categories.parquet": table.assign(user_id=table["user_id"].astype("category")),
    }
    found = []
    for name, frame in forms.items():
        file = tmp_path / name
        frame.to_csv(file, index=False) if file.suffix == ".csv" else frame.to_parquet(file)
        config = PrepareConfig(
            "table", str(tmp_path / "out"), interactions=str(file), rating_column="rating"
        )
        out = prepare(config, summary=False)
        tables = load_prepared(out).protocol["tables"]
        assert tables == {name: {"read": len(table), "accepted": len(table), "rejected": 0}}
        found.append((interactions(out), row_hashes(load_prepared(out))))
    for log, hashes in found[1:]:
        pd.testing.assert_frame_equal(log, found[0][0])
        assert hashes == found[0][1]
