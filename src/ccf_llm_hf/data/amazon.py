"""Amazon Reviews, category Books: stream the authors' JSON lines, keep what the protocol needs.

Both editions are read: 2018 (reviewerID, asin, overall, unixReviewTime) and 2023 (user_id,
parent_asin, rating, timestamp in milliseconds). The files are tens of gigabytes, so they are read
line by line; what stays in memory grows with the ratings of 2017 only.
"""

import gzip
import json
import math
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ccf_llm_hf.data.protocol import TimeSplit
from ccf_llm_hf.data.sources import RawTables
from ccf_llm_hf.errors import InputError

START, DECEMBER, END = 1_483_228_800, 1_512_086_400, 1_514_764_800  # 2017-01-01, -12-01, 2018-01-01
MORE_THAN = 20
MAX_EXAMPLES = 5
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
LICENSE = (
    "none assigned by the authors of the data set, who publish it for research and ask to be cited "
    "(see https://amazon-reviews-2023.github.io/ and https://nijianmo.github.io/amazon/); the "
    "reviews are their writers' and Amazon's, and this package does not redistribute them"
)
CITATIONS = {
    2018: "Jianmo Ni, Jiacheng Li and Julian McAuley. 2019. Justifying Recommendations using "
    "Distantly-Labeled Reviews and Fine-Grained Aspects. EMNLP-IJCNLP 2019: 188-197. "
    "https://doi.org/10.18653/v1/D19-1018",
    2023: "Yupeng Hou, Jiacheng Li, Zhankui He, An Yan, Xiusi Chen and Julian McAuley. 2024. "
    "Bridging Language and Items for Retrieval and Recommendation. "
    "https://arxiv.org/abs/2403.03952",
}


@dataclass(frozen=True)
class _Fields:
    """Names of an edition's fields; `per_second` is how many of its time units make a second."""

    edition: int
    user: str
    items: tuple[str, ...]
    rating: str
    time: str
    per_second: int


EDITIONS = (
    _Fields(2018, "reviewerID", ("asin",), "overall", "unixReviewTime", 1),
    _Fields(2023, "user_id", ("parent_asin", "asin"), "rating", "timestamp", 1000),
)


@dataclass
class _Ratings:
    """Ratings of 2017 in the order of their file; `users` and `items` give ids their codes."""

    users: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    user: array = field(default_factory=lambda: array("l"))
    item: array = field(default_factory=lambda: array("l"))
    rating: array = field(default_factory=lambda: array("d"))
    time: array = field(default_factory=lambda: array("q"))
    line: array = field(default_factory=lambda: array("q"))
    read: int = 0
    outside: int = 0
    first_outside: list[int] = field(default_factory=list)


def read_amazon_books(folder: Path) -> tuple[RawTables, int]:
    """The ratings of 2017 (UTC) and the titles of their items; also the edition, 2018 or 2023.

    Args:
        folder: holds one file of reviews and one of metadata whose name begins with `meta_`, both
            .json or .jsonl, also .gz.

    Returns:
        Tables with timestamps in seconds. An item without a title in the metadata is not in `items`
        and once in `untitled_items`; so is one whose title is page script ("getTime"), as CoLLM has
        it. Of several titles for one item, the first is taken.

    Raises:
        InputError: a file is missing or ambiguous, a line is no review or no metadata (named by
            file and number), or nothing was rated in 2017.
    """
    reviews, metadata = _files(folder)
    ratings, edition = _read_reviews(reviews)
    if not ratings.line:
        raise InputError(
            f"{reviews.name} has no ratings of 2017: pass the reviews of the edition of 2018 "
            "(times in seconds) or of 2023 (times in milliseconds)"
        )
    titles, lines = _read_titles(metadata, ratings.items)
    item = np.array(ratings.item)
    first = np.full(len(ratings.items), -1)
    first[item[::-1]] = np.array(ratings.line)[::-1]
    untitled = [int(first[code]) for name, code in ratings.items.items() if name not in titles]
    user_names, item_names = pd.Index(list(ratings.users)), pd.Index(list(ratings.items))
    interactions = pd.DataFrame(
        {
            "user_id": user_names[np.array(ratings.user)],
            "item_id": item_names[item],
            "rating": np.array(ratings.rating),
            "timestamp": np.array(ratings.time),
            "_line": np.array(ratings.line),
        }
    )
    items = pd.DataFrame({"item_id": list(titles), "title": list(titles.values()), "_line": lines})
    return RawTables(
        interactions,
        items,
        reviews.name,
        metadata.name,
        untitled_items=untitled,
        outside=ratings.outside,
        first_outside=ratings.first_outside,
        interactions_read=ratings.read,
    ), edition


def _files(folder: Path) -> tuple[Path, Path]:
    """The files of reviews and of metadata in a folder."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: pass the one with the reviews and meta_ files")
    found = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES))
    chosen = []
    for kind, example, wanted in (
        ("reviews", "Books.jsonl.gz", [p for p in found if not p.name.startswith("meta_")]),
        ("metadata", "meta_Books.jsonl.gz", [p for p in found if p.name.startswith("meta_")]),
    ):
        if len(wanted) != 1:
            names = ", ".join(path.name for path in wanted) or "none"
            raise InputError(
                f"{folder} must hold one file of {kind} such as {example}, and it holds {names}: "
                f"leave one .json or .jsonl file (also .gz) of each kind in it"
            )
        chosen.append(wanted[0])
    return chosen[0], chosen[1]


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of every line that is not blank; a bar shows the bytes read."""
    number = 0
    try:
        with (
            path.open("rb") as raw,
            tqdm(
                total=path.stat().st_size, desc=f"read {path.name}", unit="B", unit_scale=True
            ) as bar,
        ):
            lines = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
            for number, line in enumerate(lines, start=1):
                if number % 10_000 == 0:
                    bar.update(raw.tell() - bar.n)
                if line.isspace():
                    continue
                record = _parse(line, path.name, number)
                yield number, record
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path.name} cannot be read beyond line {number} ({error}): get the file again"
        ) from error


def _parse(line: bytes, file: str, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file}:{number} is not JSON ({error}): mend or delete the line"
        ) from error
    if not isinstance(record, dict):
        raise InputError(f"{file}:{number} is JSON but no object: mend or delete the line")
    return record


def _read_reviews(path: Path) -> tuple[_Ratings, int]:
    kept = _Ratings()
    fields = None
    for line, review in _records(path):
        kept.read += 1
        if fields is None:
            fields = next((names for names in EDITIONS if names.user in review), None)
            if fields is None:
                raise InputError(
                    f"{path.name}:{line} has neither 'reviewerID' (edition of 2018) nor 'user_id' "
                    "(2023): pass the file of reviews"
                )
        user, item, rating, time = _review(review, fields, path.name, line)
        if not START <= time < END:
            kept.outside += 1
            kept.first_outside += [line] * (len(kept.first_outside) < MAX_EXAMPLES)
            continue
        kept.user.append(kept.users.setdefault(user, len(kept.users)))
        kept.item.append(kept.items.setdefault(item, len(kept.items)))
        kept.rating.append(rating)
        kept.time.append(time)
        kept.line.append(line)
    if fields is None:
        raise InputError(f"{path.name} has no rows")
    return kept, fields.edition


def _review(
    review: dict[str, Any], fields: _Fields, file: str, line: int
) -> tuple[str, str, float, int]:
    """User, item, rating and Unix second of a review."""
    user = review.get(fields.user)
    item = next((review[name] for name in fields.items if review.get(name)), None)
    for name, value in ((fields.user, user), (fields.items[0], item)):
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{file}:{line} has no text in {name!r}: mend or delete the line")
    numbers = []
    for name in (fields.rating, fields.time):
        value = review.get(name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise InputError(f"{file}:{line} has no number in {name!r}: mend or delete the line")
        numbers.append(value)
    assert isinstance(user, str) and isinstance(item, str)
    return user.strip(), item.strip(), float(numbers[0]), int(numbers[1] // fields.per_second)


def _read_titles(path: Path, wanted: dict[str, int]) -> tuple[dict[str, str], list[int]]:
    """Titles of the wanted items, in the order of the file, and the lines they stand in."""
    titles: dict[str, str] = {}
    lines = []
    for line, entry in _records(path):
        item = entry.get("parent_asin") or entry.get("asin")
        if not isinstance(item, str):
            raise InputError(
                f"{path.name}:{line} has no text in 'parent_asin' or 'asin': mend or delete the "
                "line, or pass the file of metadata"
            )
        item, title = item.strip(), entry.get("title")
        if item not in wanted or item in titles or not isinstance(title, str):
            continue
        if title.strip() and "getTime" not in title:
            titles[item] = title
            lines.append(line)
    return titles, lines


def keep_active(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Rows of users and of items with more than 20 ratings; also the rule in words.

    Both are counted once, on the same rows before anything is taken away, as CoLLM's notebook does:
    afterwards a user or an item may have fewer. Unlike there, a duplicate has been dropped before
    and is not counted.

    Args:
        rows: accepted ratings of 2017, one each; columns user_id and item_id categorical.
    """
    counts = [
        rows[side].map(rows[side].value_counts()).astype(int) for side in ("user_id", "item_id")
    ]
    kept = rows[(counts[0] > MORE_THAN) & (counts[1] > MORE_THAN)].reset_index(drop=True)
    rule = (
        f"users and items with more than {MORE_THAN} ratings in 2017, counted once before any is "
        f"left out (CoLLM's way): {len(kept):,} of {len(rows):,} rows"
    )
    if kept.empty:
        raise InputError(
            f"no rating of 2017 is of a user and of an item with more than {MORE_THAN} ratings: "
            "pass the whole file of reviews"
        )
    return kept, rule


def split_2017(timestamps: np.ndarray) -> TimeSplit:
    """Train is January to November; December is cut at its middle row in time (CoLLM's protocol).

    Rows that are equal in time stay together, in test (our choice): the edition of 2018 gives days
    only, and CoLLM's cut through a day depends on the order of the sort.

    Raises:
        InputError: there is nothing in December.
    """
    december = np.sort(timestamps[timestamps >= DECEMBER])
    if not len(december):
        raise InputError("no usable rating is of December 2017: pass the whole file of reviews")
    return TimeSplit(DECEMBER, int(december[len(december) // 2]), START, END)
