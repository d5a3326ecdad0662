from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_data import FORMATS, Raw, small_raw, write_raw

from ccf_llm_hf.data.prepare import MOVIELENS
from ccf_llm_hf.data.sources import (
    ColumnNames,
    RawTables,
    read_fields,
    read_movielens_1m,
    read_movielens_latest_small,
    read_tables,
)
from ccf_llm_hf.data.validation import as_ids
from ccf_llm_hf.errors import InputError


def read(kind: str, folder: Path, raw: Raw) -> RawTables:
    options = write_raw(raw, kind, folder)
    if options["source"] == "table":
        interactions, items = Path(options["interactions"]), Path(options["items"])
        return read_tables(interactions, items, ColumnNames(rating="rating"))
    return MOVIELENS[options["source"]](folder)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_tables(kind: str, tmp_path: Path) -> None:
    raw = small_raw()
    tables = read(kind, tmp_path, raw)
    columns = ["user_id", "item_id", "rating", "timestamp"]
    assert list(tables.interactions[columns].itertuples(index=False, name=None)) == raw.rows
    assert tables.malformed_interactions == tables.malformed_items == []
    assert tables.items["item_id"].tolist() == [item[0] for item in raw.items]
    if kind in ("csv", "tsv.gz", "parquet"):
        assert tables.items["title"].tolist() == [item[1] for item in raw.items]
    else:
        assert tables.items["title"].tolist() == [f"{t} ({y})" for _, t, y, _ in raw.items]
        assert tables.items["year"].tolist() == [int(item[2]) for item in raw.items]
        assert tables.rating_range == ((0.5, 5) if kind == "latest" else (1, 5))
    assert tables.items["genres"].tolist() == [item[3] for item in raw.items]


@pytest.mark.parametrize("kind", FORMATS)
def test_line_numbers_point_into_the_file(kind: str, tmp_path: Path) -> None:
    tables = read(kind, tmp_path, small_raw())
    header = 0 if kind in ("dat", "u-files", "parquet") else 1
    assert tables.interactions["_line"].tolist()[:3] == [1 + header, 2 + header, 3 + header]


def test_latest_small_genres_titles_and_half_stars(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,7,0.5,964982703\n")
    (tmp_path / "movies.csv").write_text(
        "movieId,title,genres\n"
        '7,"American President, The (1995)",Comedy|Drama\n'
        "8,Hamlet (2000),Drama\n9,Hamlet (2000),(no genres listed)\n10,Babylon 5,Sci-Fi\n"
    )
    tables = read_movielens_latest_small(tmp_path)
    titles = ["American President, The (1995)", "Hamlet (2000)", "Hamlet (2000)", "Babylon 5"]
    assert tables.items["title"].tolist() == titles
    assert tables.items["genres"].tolist() == ["Comedy|Drama", "Drama", "", "Sci-Fi"]
    assert tables.items["year"].isna().tolist() == [False, False, False, True]
    assert tables.interactions["rating"].tolist() == ["0.5"]


def test_latin_1_and_utf_8_titles_survive(tmp_path: Path) -> None:
    # U+0085 is a line end to str.splitlines, but an ordinary byte in a Latin-1 title.
    title = "Misérables, Les \x85"
    raw = Raw(small_raw().rows, [("1", title, "1995", "Drama")])
    for encoding in ("latin-1", "utf-8"):
        write_raw(raw, "dat", tmp_path)
        movies = tmp_path / "movies.dat"
        movies.write_bytes(f"1::{title} (1995)::Drama\r\n".encode(encoding))
        assert read_movielens_1m(tmp_path).items["title"].tolist() == [f"{title} (1995)"]


def test_fields_reports_malformed_lines_and_passes_over_blank_ones(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"a::b\r\n\r\nc\nd::e::f\ng::h")
    table, bad = read_fields(file, "::", ["left", "right"])
    assert table.values.tolist() == [["a", "b", 1], ["g", "h", 5]]
    assert bad == [3, 4]


def test_csv_reports_malformed_rows_by_line(tmp_path: Path) -> None:
    lines = [f"{n},a,5,10,T" if n % 1000 else f"{n},short" for n in range(1, 60_001)]
    file = tmp_path / "x.csv"
    file.write_text("\n".join(["user_id,item_id,rating,timestamp,title", *lines]))
    tables = read_tables(file, None, ColumnNames(rating="rating"))
    assert tables.malformed_interactions == [1000 * n + 1 for n in range(1, 61)]
    last = tables.interactions.iloc[-1]
    assert (last["user_id"], last["_line"]) == ("59999", 60_000)


def test_csv_keeps_quoted_text_and_ids_that_look_like_numbers_or_nulls(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text('user_id,item_id,rating,timestamp,title\n007,NA,5,1,"A ""B"", c"\n8,x,4,2,\n')
    tables = read_tables(file, None, ColumnNames(rating="rating"))
    assert tables.interactions["user_id"].tolist() == ["007", "8"]
    assert tables.items[["item_id", "title"]].values.tolist() == [["NA", 'A "B", c'], ["x", ""]]


def test_the_title_can_be_the_item_id(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("u,movie,r,t\n1,Heat,5,1\n2,Heat,4,2\n2,Big,4,3\n")
    columns = ColumnNames("u", "movie", "t", "movie", rating="r")
    tables = read_tables(file, None, columns)
    assert tables.items[["item_id", "title"]].values.tolist() == [["Heat", "Heat"], ["Big", "Big"]]


def test_columns_of_other_items_columns_are_kept(tmp_path: Path) -> None:
    options = write_raw(small_raw(), "parquet", tmp_path)
    tables = read_tables(
        Path(options["interactions"]), Path(options["items"]), ColumnNames(rating="rating")
    )
    assert set(tables.items) == {"item_id", "title", "year", "genres", "_line"}
    assert pq.read_schema(options["items"]).names == ["item_id", "title", "year", "genres"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Empty"),
        (b"user_id,item_id,rating\n1,2,3\n", "no column 'timestamp'"),
        (b"user_id,item_id,rating,timestamp\n1,2,3,4\n", "no column 'title'"),
        (b"user_id,user_id,item_id,rating,timestamp\n1,1,2,3,4\n", "several columns"),
    ],
)
def test_unreadable_csv_is_an_input_error(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_tables(file, None, ColumnNames(rating="rating"))
    assert "x.csv" in str(error.value)


def test_unreadable_files_are_input_errors(tmp_path: Path) -> None:
    broken, other = tmp_path / "x.parquet", tmp_path / "x.xlsx"
    broken.write_bytes(b"no parquet")
    other.write_bytes(b"")
    columns = ColumnNames(rating="rating")
    with pytest.raises(InputError, match=r"x\.parquet cannot be read as parquet"):
        read_tables(broken, None, columns)
    with pytest.raises(InputError, match=r"expected a \.csv"):
        read_tables(other, None, columns)
    with pytest.raises(InputError, match="does not exist"):
        read_tables(tmp_path / "none.csv", None, columns)
    with pytest.raises(InputError, match="neither the official ml-1m files nor"):
        read_movielens_1m(tmp_path)


def test_four_roles_need_four_columns(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("user_id,item_id,rating,timestamp,title\n1,2,3,4,t\n")
    with pytest.raises(InputError, match="must be four columns"):
        read_tables(file, None, ColumnNames(user="item_id", rating="rating"))


def test_recbole_header_is_checked(tmp_path: Path) -> None:
    write_raw(small_raw(), "recbole-1m", tmp_path)
    file = tmp_path / "ml-1m.inter"
    file.write_text(file.read_text().replace("rating:float", "stars:float"))
    with pytest.raises(InputError, match=r"ml-1m\.inter has no column 'rating'"):
        read_movielens_1m(tmp_path)


def test_a_column_may_be_called_line(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("user_id,line,rating,timestamp,title\n1,Jubilee,5,1,Jubilee Line\n")
    tables = read_tables(file, None, ColumnNames(item="line", rating="rating"))
    assert tables.interactions["item_id"].tolist() == ["Jubilee"]
    assert tables.interactions["_line"].tolist() == [2]


HEADER = "user_id,item_id,rating,timestamp,title"
SOUND = [f"{n},b{n % 7},5,{1_600_000_000 + n},Book {n % 7}" for n in range(1, 41)]


def read_lines_of(tmp_path: Path, lines: list[str]) -> RawTables:
    file = tmp_path / "x.csv"
    file.write_text("\n".join([HEADER, *lines]) + "\n")
    return read_tables(file, None, ColumnNames(rating="rating"))


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ('"Book 3', None),  # nothing closes it
        ('"Book 3', 'The "Book'),  # a quote inside a later value does, and text follows it
        ('"Book 3', '"A, b"'),  # a quoted value does
        ('"Book 3', 'Live 12"'),  # at the end of a value, as if it were its own
    ],
)
@pytest.mark.parametrize("later", [1, 2, 20])
def test_a_quote_that_takes_in_rows_is_refused_by_line(
    tmp_path: Path, opening: str, closing: str | None, later: int
) -> None:
    lines = list(SOUND)
    lines[9] = lines[9].replace("Book 3", opening)
    if closing:
        lines[9 + later] = ",".join([*lines[9 + later].split(",")[:4], closing])
    with pytest.raises(InputError, match=r"x\.csv, line 11: a quote opens that takes in") as error:
        read_lines_of(tmp_path, lines)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "title",
    [
        '"One, two\nthree"',
        '"One\ntwo, three\nfour, five"',
        '"One ""quoted""\n""two"""',
        '"\n\nOne\n"',
        '"1,2,3,4,""5""\n1,2,3,4,""5"""',
    ],
)
def test_values_of_several_lines_stay_whole(tmp_path: Path, title: str) -> None:
    lines = [*SOUND, f"50,long,5,1600000050,{title}", "51,long,4,1600000051,Other"]
    tables = read_lines_of(tmp_path, lines)
    assert tables.interactions_read == len(tables.interactions) == len(SOUND) + 2
    whole = title[1:-1].replace('""', '"')
    assert tables.items["title"].tolist()[-1] == whole


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_delimiters_and_encodings_are_recognized(
    tmp_path: Path, delimiter: str, encoding: str, end: str
) -> None:
    text = end.join([HEADER, *SOUND, "99,é,4,1600000099,Größe – “so”"]).replace(",", delimiter)
    file = tmp_path / "x.csv"
    file.write_bytes(text.encode(encoding))
    tables = read_tables(file, None, ColumnNames(rating="rating"))
    assert tables.items.iloc[-1][["item_id", "title"]].tolist() == ["é", "Größe – “so”"]
    assert tables.interactions_read == len(tables.interactions) == len(SOUND) + 1


def test_damaged_utf_8_is_named_by_line_and_not_taken_for_latin_1(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes(f"{HEADER}\n1,é,5,1600000000,a\n2,".encode() + b"\xe9,5,1600000001,b\n")
    with pytest.raises(InputError, match=r"x\.csv, line 3 is not UTF-8 as other lines are"):
        read_tables(file, None, ColumnNames(rating="rating"))


def test_parquet_comes_in_parts_with_indexes_and_with_integers_beside_nulls(tmp_path: Path) -> None:
    table = pd.DataFrame([line.split(",") for line in SOUND], columns=HEADER.split(","))
    table["user_id"] = [2**60 + n * n for n in range(len(table))]
    wanted = [str(user) for user in table["user_id"]]
    (tmp_path / "log").mkdir()
    table[:20].set_index("user_id").to_parquet(tmp_path / "log" / "0.parquet")
    table[20:].set_index("user_id").to_parquet(tmp_path / "log" / "1.parquet")
    pq.write_table(
        pa.table(
            {
                "user_id": [2**60, None],
                **{name: ["1600000000"] * 2 for name in HEADER.split(",")[1:]},
            }
        ),
        tmp_path / "null.parquet",
    )
    tables = read_tables(tmp_path / "log", None, ColumnNames(rating="rating"))
    assert as_ids(tables.interactions["user_id"]).tolist() == wanted
    assert tables.interactions_read == len(table)
    tables = read_tables(tmp_path / "null.parquet", None, ColumnNames(rating="rating"))
    assert as_ids(tables.interactions["user_id"]).tolist() == [str(2**60), ""]
