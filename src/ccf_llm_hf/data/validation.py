"""Decide which raw rows are usable, and say what was done with the others.

Policies (our choice) are in `POLICIES`: one sentence per kind of bad row, written to
`protocol.json` with the count and the first places. Nothing is repaired silently.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ccf_llm_hf.data.hashing import hash_ids
from ccf_llm_hf.data.sources import RawTables
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.configuration_ccf_llm import read_id

POLICIES = {
    "malformed_line": "wrong number of fields: dropped",
    "missing_id": "empty user or item id: dropped",
    "invalid_time": "neither Unix time nor ISO date such as 2020-11-08, or outside 1970-2100 (in "
    "milliseconds? --time-unit ms): dropped",
    "invalid_rating": "not a number, or outside the rating scale: dropped",
    "invalid_label": "not 0 or 1: dropped",
    "unknown_item": "item is not in the items table: dropped",
    "duplicate": "same user, item, time and value as an earlier row: first kept",
    "conflicting_duplicate": "same user, item and time as an earlier row, other value: first kept",
    "repeated_pair": "same user and item as an earlier row, in data without times: first kept",
    "not_rated": "rating 0, which means not rated: dropped",
    "other_time": "rated outside the source's time: dropped",
    "inactive_user": "user with fewer usable rows than the source's rule asks for: dropped",
    "other_user": "user of another part than the one asked for: dropped",
    "malformed_item_line": "items table, wrong number of fields: dropped",
    "missing_item_id": "items table, empty id: dropped",
    "duplicate_item": "items table, id occurs again: first kept",
    "untitled_item": "rated item without a title in the metadata: dropped with its rows",
    "missing_title": "items table, empty title: kept, the id stands for the title",
}
OF_ITEMS = ("malformed_item_line", "missing_item_id", "duplicate_item")
KEPT = ("missing_title", "untitled_item")  # of no row, or of one that stays
MAX_BAD_SHARE = 0.5
MAX_EXAMPLES = 5
LATEST_TIME = 4_102_444_800  # 2100-01-01; milliseconds taken for seconds lie beyond it
EARLIEST_LOG = 31_536_000  # 1971-01-01; what ends before is no Unix time
COMPACT_DATE = r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:\.0)?"
OTHER_RATING = r"\s*-?\d+,\d+\s*|\s*-?[\d.,]+\s*/\s*\d+\s*"  # 4,5 and 4.5/5
LABELS = {"false": 0, "true": 1}


@dataclass
class RejectionReport:
    """Bad rows by reason: how many, what was done, and the first places as `file:line`; and by
    table how many rows were read, accepted and rejected."""

    reasons: dict[str, dict] = field(default_factory=dict)
    tables: dict[str, dict] = field(default_factory=dict)

    def add(self, reason: str, file: str, lines: list[int], count: int | None = None) -> None:
        """Record rows that were rejected for one of the reasons in `POLICIES`; `count` of them
        where `lines` are the first alone."""
        if lines:
            examples = [f"{file}:{line}" for line in sorted(lines)[:MAX_EXAMPLES]]
            self.reasons[reason] = {
                "count": len(lines) if count is None else count,
                "policy": POLICIES[reason],
                "examples": examples,
            }

    def check_share(self, file: str, kept: int, total: int) -> None:
        """Raise InputError if a table is empty, or more than half of it was dropped."""
        if total == 0:
            raise InputError(f"{file} has no rows")
        if kept == 0 or (total - kept) / total > MAX_BAD_SHARE:
            found = ", ".join(
                f"{entry['count']} {reason} ({entry['policy'].removesuffix(': dropped')}; e.g. "
                f"{entry['examples'][0]})"
                for reason, entry in self.reasons.items()
            )
            raise InputError(
                f"{file}: {total - kept} of {total} rows are unusable, {found}: "
                f"check the file, its separator and the columns named"
            )

    def account(self, file: str, read: int | None, accepted: int, reasons: Collection[str]) -> None:
        """Record what became of the `read` rows that a table was counted to hold, if it was.

        Raises:
            InputError: some were neither accepted nor rejected for one of `reasons`.
        """
        rejected = sum(self.reasons[name]["count"] for name in reasons if name in self.reasons)
        if read is None:
            return
        if read != accepted + rejected:
            raise InputError(
                f"{file} holds {read} rows, but {accepted} were accepted and {rejected} rejected: "
                "look for stray quotes or line ends in it, or write it as parquet"
            )
        self.tables[file] = {"read": read, "accepted": accepted, "rejected": rejected}


def clean_items(raw: RawTables, report: RejectionReport) -> pd.DataFrame:
    """Usable items: `item_id` str (unique), `title` str (never empty), other columns as read."""
    items, file = raw.items.copy(deep=False), raw.items_file
    report.add("malformed_item_line", file, raw.malformed_items)
    report.add("untitled_item", raw.interactions_file, raw.untitled_items)
    total = len(items) + len(raw.malformed_items)
    items["item_id"] = as_ids(items["item_id"])
    items["title"] = fold_lines(_as_text(items["title"]))
    items = _drop(items, items["item_id"] == "", "missing_item_id", file, report)
    items = _drop(items, items["item_id"].duplicated(), "duplicate_item", file, report)
    report.check_share(file, len(items), total)
    report.account(file, raw.items_read, len(items), OF_ITEMS)
    untitled = items["title"] == ""
    report.add("missing_title", file, items.loc[untitled, "_line"].tolist())
    items["title"] = items["title"].where(~untitled, items["item_id"])
    return items.drop(columns="_line").reset_index(drop=True)


def clean_interactions(
    raw: RawTables,
    items: pd.DataFrame,
    report: RejectionReport,
    time_unit: str = "s",
    part: tuple[int, int] | None = None,
) -> pd.DataFrame:
    """Usable interactions, in the order of the file; with `part` `(k, n)` those of the k-th of n
    parts of the users.

    Columns: `user_id` and `item_id` categorical (of str), `timestamp` float64 (Unix seconds with
    their fraction, by which rows are ordered) unless the data has no times, when each pair of user
    and item has one row; and `rating` float64 or `label` int64. A row that is bad in several ways
    is counted once, under the first reason.

    Raises:
        InputError: no rows, or more than half of them are unusable; or ratings, labels or times in
            another notation than is read.
    """
    rows, file = raw.interactions.copy(deep=False), raw.interactions_file
    report.add("malformed_line", file, raw.malformed_interactions)
    report.add("not_rated", file, raw.not_rated)
    total = len(rows) + len(raw.malformed_interactions)
    value = "label" if "label" in rows else "rating"
    _check_notation(rows[value], value, file, rows["_line"])
    for side in ("user_id", "item_id"):
        rows[side] = _categorical(as_ids(rows[side]))
    has_times = "timestamp" in rows
    if has_times:
        times = parse_times(rows["timestamp"], time_unit)
        _check_times(times, rows["timestamp"], file)
        rows["timestamp"] = times
    if value == "label":
        rows["label"] = _parse_labels(rows["label"])
    else:
        rows["rating"] = _parse_ratings(rows["rating"], raw.rating_range)

    missing = (rows["user_id"] == "") | (rows["item_id"] == "")
    rows = _drop(rows, missing, "missing_id", file, report)
    if has_times:
        rows = _drop(rows, rows["timestamp"].isna(), "invalid_time", file, report)
    rows = _drop(rows, rows[value].isna(), f"invalid_{value}", file, report)
    known = rows["item_id"].isin(items["item_id"])
    rows = _drop(rows, ~known, "unknown_item", file, report)
    key = ["user_id", "item_id", *(["timestamp"] if has_times else [])]
    if not has_times:
        rows = _drop(rows, rows.duplicated(key), "repeated_pair", file, report)
    elif rows.duplicated(key).any():
        rows = _drop(rows, rows.duplicated([*key, value]), "duplicate", file, report)
        rows = _drop(rows, rows.duplicated(key), "conflicting_duplicate", file, report)
    report.check_share(file, len(rows), total)
    if raw.min_user_rows:
        few = rows["user_id"].map(rows["user_id"].value_counts()).astype(int) < raw.min_user_rows
        rows = _drop(rows, few, "inactive_user", file, report)
        if rows.empty:
            raise InputError(f"{file}: no user has {raw.min_user_rows} usable rows: check the file")
    if part is not None:
        number, parts = part
        others = hash_ids(rows["user_id"], "part") % np.uint64(parts) != number - 1
        rows = _drop(rows, pd.Series(others, index=rows.index), "other_user", file, report)
        if rows.empty:
            raise InputError(f"{file}: no user is in part {number} of {parts}: ask for fewer parts")
    report.add("other_time", file, raw.first_outside, raw.outside)
    of_rows = [reason for reason in POLICIES if reason not in (*OF_ITEMS, *KEPT)]
    report.account(file, raw.interactions_read, len(rows), of_rows)
    rows[value] = rows[value].astype("int64" if value == "label" else "float64")
    return rows[[*key, value]].reset_index(drop=True)


def clean_fields(items: pd.DataFrame, names: Sequence[str], separator: str | None = None) -> None:
    """Make text, or lists of text, of the columns that describe items, in place.

    A missing value is "", of lists []. Where `separator` occurs in any text of a column, the column
    becomes lists.
    """
    for name in names:
        column = items[name]
        if column.map(_is_list).any():
            cells = [list(value) if _is_list(value) else [] for value in column]
        else:
            is_float = pd.api.types.is_float_dtype(column)
            text = fold_lines(as_ids(column) if is_float else _as_text(column))
            if not separator or not text.str.contains(separator, regex=False).any():
                items[name] = text
                continue
            cells = text.str.split(separator, regex=False).tolist()
        lists = [[str(part).strip() for part in cell if part is not None] for cell in cells]
        items[name] = pd.Series(
            [[part for part in parts if part] for parts in lists], index=items.index, dtype=object
        )


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def fold_lines(text: pd.Series) -> pd.Series:
    """Line ends and tabs as single spaces."""
    return text.str.replace(r"\s*[\r\n\t]\s*", " ", regex=True)


def _drop(
    rows: pd.DataFrame, bad: pd.Series, reason: str, file: str, report: RejectionReport
) -> pd.DataFrame:
    if not bad.any():
        return rows
    report.add(reason, file, rows.loc[bad, "_line"].tolist())
    return rows[~bad]


def as_ids(values: pd.Series) -> pd.Series:
    """Ids as `read_id` has them, "" where missing.

    Raises:
        InputError: a cell that is no id.
    """
    try:
        codes, names = pd.factorize(values)
        texts = [read_id(name) or "" for name in names]
    except (ValueError, TypeError) as error:  # TypeError: of lists
        raise InputError(f"column {values.name!r} holds no ids: {error}") from error
    found = np.array([*texts, ""], dtype=object)[codes]  # of a missing value the code is -1
    return pd.Series(found, index=values.index, dtype="str")


def require_ids(values: Iterable[Any], name: str) -> list[str]:
    """As `as_ids`, of values none of which may be missing, called `name` in the error."""
    ids = as_ids(pd.Series(list(values), dtype=object, name=name)).tolist()
    if "" in ids:
        raise InputError(f"{name}: number {ids.index('')} is empty; fill it or leave it out")
    return ids


def _categorical(ids: pd.Series) -> pd.Series:
    """Strings as codes: everything after this would hash the same strings again and again."""
    codes, names = pd.factorize(ids)
    return pd.Series(pd.Categorical.from_codes(codes, categories=names), index=ids.index)


def _as_text(values: pd.Series) -> pd.Series:
    if values.dtype == object:
        values = values.map(lambda v: v.decode(errors="replace") if isinstance(v, bytes) else v)
    if not isinstance(values.dtype, pd.StringDtype):
        values = values.astype("string")
    return values.fillna("").str.strip().astype("str")


def parse_times(values: pd.Series, unit: str = "s") -> pd.Series:
    """Unix seconds (float64, with their fraction; NaN where invalid) from numbers in `unit`, "s" or
    "ms", or from ISO dates, which are UTC without a zone."""
    if pd.api.types.is_datetime64_any_dtype(values):
        seconds = _date_seconds(values)
    else:
        seconds = pd.to_numeric(values, errors="coerce").astype("float64")
        seconds = seconds / (1000 if unit == "ms" else 1)
        if seconds.isna().any():
            rest = values[seconds.isna()]
            seconds.loc[rest.index] = _date_seconds(rest)
    valid = (seconds >= 0) & (seconds < LATEST_TIME)
    return seconds.where(valid)


def _check_times(times: pd.Series, values: pd.Series, file: str) -> None:
    """Raise InputError where all times lie in 1970, or all are one: they are something else."""
    first, last = times.min(), times.max()
    if len(times) > 1 and first == last:
        raise InputError(
            f"{file}: all rows have one time, {values[times.notna()].iloc[0]}: name the right "
            "column with --time-column, or pass --split random if there is none"
        )
    if not last < EARLIEST_LOG:
        return
    example = values[times.notna()].iloc[0]
    if _as_text(values[times.notna()]).str.fullmatch(COMPACT_DATE).all():
        mend = "dates without hyphens? write them as 2020-11-08"
    else:
        mend = "check --time-unit, or pass --split random if they are no times"
    raise InputError(f"{file}: all times, such as {example}, would lie in 1970: {mend}")


def _check_notation(values: pd.Series, kind: str, file: str, lines: pd.Series) -> None:
    """Raise InputError where ratings or labels are written in another way than is read: whoever
    drops those rows drops one side of them."""
    text = _as_text(values)
    if kind == "label":
        numbers = pd.to_numeric(text, errors="coerce")
        other = numbers.notna() & ~numbers.isin([0, 1])
        mend = "labels are 0 and 1; other numbers need --rating-column and --positive-threshold"
    else:
        other = text.str.fullmatch(OTHER_RATING)
        mend = "ratings are numbers such as 4.5, with a point and without what they are out of"
    if other.any():
        place = int(other.to_numpy().argmax())
        raise InputError(
            f"{file}:{lines.iloc[place]}: {kind} {text.iloc[place]!r} is not read: {mend}"
        )


def _date_seconds(values: pd.Series) -> pd.Series:
    dates = pd.to_datetime(values, utc=True, errors="coerce", format="ISO8601")
    return (dates - pd.Timestamp(0, tz="UTC")).dt.total_seconds()


def _parse_ratings(values: pd.Series, scale: tuple[float, float] | None) -> pd.Series:
    ratings = pd.to_numeric(values, errors="coerce").astype("float64")
    low, high = scale or (-np.inf, np.inf)
    return ratings.where(np.isfinite(ratings) & (ratings >= low) & (ratings <= high))


def _parse_labels(values: pd.Series) -> pd.Series:
    text = _as_text(values).str.lower()
    numbers = pd.to_numeric(text, errors="coerce")
    return numbers.where(numbers.isin([0, 1]), text.map(LABELS).astype("float64"))
