import datetime
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ccf_llm_hf.data import PrepareConfig, interactions, load_prepared, prepare
from ccf_llm_hf.data.amazon import read_amazon_books
from ccf_llm_hf.errors import InputError

NAMES = {
    2018: ("reviewerID", "asin", "overall", "unixReviewTime", "asin"),
    2023: ("user_id", "parent_asin", "rating", "timestamp", "parent_asin"),
}
Row = tuple[str, str, float, int]  # user, item, rating, Unix second


def second(*date: int) -> int:
    return int(datetime.datetime(*date, tzinfo=datetime.UTC).timestamp())  # type: ignore[arg-type, misc]


def many() -> list[Row]:
    """21 users rate 21 items each: from January to November 18 of them, 3 in December."""
    rows = []
    for n in range(21):
        for u in range(21):
            month, day = (1 + n // 2, 1 + u) if n < 18 else (12, 1 + 10 * (n - 18))
            rows.append((f"U{u}", f"B{n}", float(1 + (u + n) % 5), second(2017, month, day, 12)))
    return rows


def write(
    folder: Path, rows: list[Row], edition: int = 2018, suffix: str = ".json", untitled: str = ""
) -> Path:
    """Reviews and metadata as the authors publish them."""
    user, item, rating, time, meta = NAMES[edition]
    unit = 1000 if edition == 2023 else 1
    reviews = []
    for u, i, r, t in rows:
        review = {user: u, item: i, rating: r, time: t * unit, "text": "a\u2028b", "vote": "2"}
        if edition == 2023:
            review["asin"] = f"edition of {i}"
        reviews.append(review)
    items = dict.fromkeys(row[1] for row in rows)
    metadata = [{meta: i, "title": f"Book {i}"} for i in items if i != untitled]
    folder.mkdir(exist_ok=True)
    for name, records in (("Books", reviews), ("meta_Books", metadata)):
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        path = folder / (name + suffix)
        path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    return folder


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., Path]:
    def make(rows: list[Row], **options: object) -> Path:
        folder = write(tmp_path / "raw", rows, **options)  # type: ignore[arg-type]
        config = PrepareConfig("amazon-books", str(tmp_path / "out"), str(folder))
        return prepare(config, summary=False)

    return make


@pytest.mark.parametrize("edition", [2018, 2023])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz", ".jsonl.gz"])
def test_every_form_gives_the_same_tables(edition: int, suffix: str, tmp_path: Path) -> None:
    rows = many()
    tables, found = read_amazon_books(write(tmp_path / "raw", rows, edition, suffix))
    log = tables.interactions
    columns = ["user_id", "item_id", "rating", "timestamp"]
    assert found == edition
    assert list(log[columns].itertuples(index=False, name=None)) == rows
    assert log["_line"].tolist() == list(range(1, len(rows) + 1))
    assert tables.items["title"].tolist() == [f"Book B{n}" for n in range(21)]


def test_the_protocol(prepared: Callable) -> None:
    rows = many()
    data = load_prepared(prepared(rows))
    splits = {name: part.to_pandas() for name, part in data.splits.items()}
    assert [len(part) for part in splits.values()] == [18 * 21, 21, 42]
    assert splits["validation"]["timestamp"].unique().tolist() == [second(2017, 12, 1, 12)]
    liked = {(u, i): int(r == 5) for u, i, r, _ in rows}
    for part in splits.values():
        pairs = zip(part["user_id"], part["item_id"], strict=True)
        assert part["label"].tolist() == [liked[pair] for pair in pairs]
    row = splits["test"].iloc[-1]
    earlier = [i for u, i, r, t in rows if u == row["user_id"] and r == 5 and t < row["timestamp"]]
    assert list(row["history"]) == earlier and len(earlier) >= 3
    protocol = data.protocol
    assert protocol["label_rule"] == "1 if rating >= 5, else 0"
    assert "more than 20 ratings in 2017" in protocol["split_rule"]
    assert "441 of 441 rows" in protocol["split_rule"]
    assert protocol["redistributable"] is False and protocol["rejected"] == {}
    card = (data.path / "README.md").read_text()
    assert (
        "Do not upload this folder" in card and "license_link: https://amazon-reviews-2023" in card
    )
    assert "Justifying Recommendations" in card


def test_every_review_is_accounted_for(prepared: Callable) -> None:
    rows = [*many(), ("U1", "B1", 5.0, second(2016, 5, 2)), ("U2", "B2", 1.0, second(2018, 5, 2))]
    protocol = load_prepared(prepared(rows)).protocol
    found = {"read": len(rows), "accepted": len(rows) - 2, "rejected": 2}
    assert protocol["tables"] == {"Books.json": found}
    assert protocol["rejected"]["other_time"]["count"] == 2
    assert protocol["rejected"]["other_time"]["examples"] == ["Books.json:442", "Books.json:443"]


@pytest.mark.parametrize("edition", [2018, 2023])
def test_boundary_seconds(edition: int, tmp_path: Path) -> None:
    edges = [second(2017, 1, 1), second(2017, 12, 1), second(2018, 1, 1)]
    rows = [(f"U{t}", "B", 5.0, t) for edge in edges for t in (edge - 1, edge)]
    tables, _ = read_amazon_books(write(tmp_path / "raw", rows, edition))
    assert tables.interactions["timestamp"].tolist() == [
        *(edges[0], edges[1] - 1, edges[1], edges[2] - 1)
    ]
    assert tables.interactions["_line"].tolist() == [2, 3, 4, 5]


def test_the_last_millisecond_of_the_year_and_of_november(tmp_path: Path) -> None:
    folder = write(tmp_path / "raw", [("U", "B", 5.0, 0)], 2023)
    review = {"user_id": "U", "parent_asin": "B", "rating": 5}
    times = [second(2018, 1, 1) * 1000 - 1, second(2017, 12, 1) * 1000 - 1]
    lines = [json.dumps(review | {"timestamp": time}) for time in [*times, times[0] + 1]]
    (folder / "Books.json").write_text("\n".join(lines))
    tables, _ = read_amazon_books(folder)
    assert tables.interactions["timestamp"].tolist() == [time // 1000 for time in times]


def test_december_boundary_is_kept_by_the_splits(prepared: Callable) -> None:
    rows = many()
    rows[0] = ("U0", "B0", 5.0, second(2017, 12, 1) - 1)
    rows[-1] = ("U20", "B20", 5.0, second(2017, 12, 1))
    log = interactions(prepared(rows)).set_index(["user_id", "item_id"])
    assert log.loc[("U0", "B0"), "split"] == "train"
    assert log.loc[("U20", "B20"), "split"] == "validation"


def test_the_filter_is_one_pass_over_2017(prepared: Callable) -> None:
    rows = many()
    # A user with 21 ratings, one of them of a rare item: both are counted before either is dropped.
    rows += [("new", f"B{n}", 5.0, second(2017, 2, 1 + n)) for n in range(20)]
    rows += [("new", "rare", 5.0, second(2017, 3, 1))]
    # 20 ratings in 2017 are too few, whatever there was in 2016.
    rows += [("few", f"B{n}", 5.0, second(2017, 2, 1 + n)) for n in range(20)]
    rows += [("few", "B20", 5.0, second(2016, 2, 1))]
    out = prepared(rows)
    log = interactions(out)
    assert (log["user_id"] == "new").sum() == 20
    assert not (log["user_id"] == "few").any() and not (log["item_id"] == "rare").any()
    data = load_prepared(out)
    assert "rare" not in data.items["item_id"]
    assert "461 of 482 rows" in data.protocol["split_rule"]


def test_duplicates_are_dropped_told_and_not_counted(prepared: Callable) -> None:
    rows = many()
    row = rows[0]
    rows += [row, (row[0], row[1], 6 - row[2], row[3])]
    rows += [("few", f"B{n}", 5.0, second(2017, 2, 1 + n)) for n in range(20)]
    rows += [rows[-1]]
    out = prepared(rows)
    rejected = load_prepared(out).protocol["rejected"]
    assert {reason: entry["count"] for reason, entry in rejected.items()} == {
        "duplicate": 2,
        "conflicting_duplicate": 1,
    }
    assert rejected["conflicting_duplicate"]["examples"] == ["Books.json:443"]
    log = interactions(out)
    assert not (log["user_id"] == "few").any()
    kept = log[(log["user_id"] == row[0]) & (log["item_id"] == row[1])]
    assert kept["rating"].tolist() == [row[2]]


def test_items_without_a_title_are_dropped_and_told(prepared: Callable, tmp_path: Path) -> None:
    rows = many()
    rows += [(f"U{u}", "B21", 4.0, second(2017, 5, 2)) for u in range(3)]
    rows += [("U1", "B22", 4.0, second(2017, 5, 2)), ("U1", "B23", 4.0, second(2017, 5, 2))]
    folder = write(tmp_path / "raw", rows, untitled="B21")
    metadata = folder / "meta_Books.json"
    text = metadata.read_text().replace('"Book B22"', '" "')
    text = text.replace('"Book B23"', '"var t = new Date().getTime()"')
    metadata.write_text(text + '{"asin": "B0", "title": "Other"}\n{"asin": "B1"}\n')
    config = PrepareConfig("amazon-books", str(tmp_path / "out"), str(folder))
    data = load_prepared(prepare(config, summary=False))
    rejected = data.protocol["rejected"]
    assert {reason: entry["count"] for reason, entry in rejected.items()} == {
        "untitled_item": 3,
        "unknown_item": 5,
    }
    assert rejected["untitled_item"]["examples"] == [f"Books.json:{n}" for n in (442, 445, 446)]
    assert len(data.items) == 21
    assert dict(zip(data.items["item_id"], data.items["title"], strict=True))["B0"] == "Book B0"


REVIEW = {"reviewerID": "U", "asin": "B", "overall": 5.0, "unixReviewTime": second(2017, 5, 1)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"reviewerID": "U", "as', "Books.json:3 is not JSON"),
        ("[1]", "Books.json:3 is JSON but no object"),
        (b"\xff\xfe", "Books.json:3 is not JSON"),
        (json.dumps({**REVIEW, "asin": None}), "Books.json:3 has no text in 'asin'"),
        (json.dumps({**REVIEW, "reviewerID": ""}), "Books.json:3 has no text in 'reviewerID'"),
        (json.dumps({**REVIEW, "overall": "5"}), "Books.json:3 has no number in 'overall'"),
        (json.dumps({**REVIEW, "unixReviewTime": None}), "Books.json:3 has no number in 'unixR"),
        (json.dumps({**REVIEW, "overall": float("nan")}), "Books.json:3 has no number in 'overa"),
    ],
)
def test_malformed_lines_are_named(line: str | bytes, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "raw", [("U", "B", 5.0, second(2017, 5, 1))])
    line = line.encode() if isinstance(line, str) else line
    reviews = folder / "Books.json"
    reviews.write_bytes(reviews.read_bytes() + b"\n" + line + b"\n")
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_amazon_books(folder)
    assert "\n" not in str(error.value)
    metadata = folder / "meta_Books.json"
    reviews.write_text(json.dumps(REVIEW))
    metadata.write_text('{"asin": "B", "title": "T"}\n{"title": "T"}')
    with pytest.raises(
        InputError, match=r"meta_Books\.json:2 has no text in 'parent_asin' or 'asin'"
    ):
        read_amazon_books(folder)


def test_a_broken_gzip_names_the_line_it_reaches(tmp_path: Path) -> None:
    folder = write(tmp_path / "raw", many(), suffix=".json.gz")
    reviews = folder / "Books.json.gz"
    reviews.write_bytes(reviews.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"Books\.json\.gz cannot be read beyond line \d+"):
        read_amazon_books(folder)
    reviews.write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"cannot be read beyond line 0 \(Not a gzipped file"):
        read_amazon_books(folder)


def test_folders_that_cannot_be_used(tmp_path: Path, prepared: Callable) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        read_amazon_books(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"must hold one file of reviews .* it holds none"):
        read_amazon_books(tmp_path)
    folder = write(tmp_path / "raw", [("U", "B", 5.0, second(2016, 5, 1))])
    with pytest.raises(InputError, match=r"Books\.json has no ratings of 2017"):
        read_amazon_books(folder)
    (folder / "Books_5.json").write_text("")
    with pytest.raises(InputError, match=r"it holds Books\.json, Books_5\.json"):
        read_amazon_books(folder)
    (folder / "Books_5.json").unlink()
    (folder / "Books.json").write_text("{}")
    with pytest.raises(InputError, match=r"Books\.json:1 has neither 'reviewerID'"):
        read_amazon_books(folder)
    (folder / "Books.json").write_text("")
    with pytest.raises(InputError, match=r"Books\.json has no rows"):
        read_amazon_books(folder)
    with pytest.raises(InputError, match="of a user and of an item with more than 20"):
        prepared([("U", "B", 5.0, second(2017, 5, 1))])
    with pytest.raises(InputError, match="of December 2017"):
        prepared([row for row in [*many(), *many_more()] if row[3] < second(2017, 12, 1)])


def many_more() -> list[Row]:
    """Three more ratings a user, before December."""
    return [(f"U{u}", f"B{n}", 5.0, second(2017, 10, 1 + n)) for u in range(21) for n in range(9)]
