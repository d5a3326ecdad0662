"""Book-Crossing: ratings of books by ISBN, and editions of one title and author made one item."""

import html
import re
from pathlib import Path

import numpy as np
import pandas as pd

from ccf_llm_hf.data.sources import RawTables, count_lines, read_csv_strings, require_columns

RATINGS_FILE, BOOKS_FILE = "BX-Book-Ratings.csv", "BX-Books.csv"
RATING_COLUMNS = {"User-ID": "user_id", "ISBN": "item_id", "Book-Rating": "rating"}
BOOK_COLUMNS = {
    "ISBN": "item_id",
    "Book-Title": "title",
    "Book-Author": "author",
    "Year-Of-Publication": "year",
    "Publisher": "publisher",
}
FIELDS = ("author", "year", "publisher")
LIKED = 8.0
MIN_USER_RATINGS = 5
ROW_RULE = (
    "a rating of 0 means not rated; a user who rated several editions of a book keeps the first of "
    f"the ratings; users with {MIN_USER_RATINGS} ratings or more, counted after all else"
)
# "ö" is Ã¶ after one wrong reading, and Ã?Â¶ after two that lost a byte to a question mark.
MISREAD = re.compile("\u00c3(?:\\?\u00c2)?([\u0080-\u00bf])")
IN_BRACKETS = re.compile(r"\s+(?:\([^()\[\]]*\)|\[[^()\[\]]*\])")


def read_book_crossing(folder: Path) -> tuple[RawTables, str]:
    """The ratings from 1 to 10 and the books they are of; also the rule that makes books of
    editions, in words.

    An item is named by the ISBN of its edition with the most ratings, the first of equal ones, and
    has that edition's title (without what stands in brackets), author, year and publisher; an
    unknown year is empty. A rating of an edition that is not in the file of books keeps its ISBN.

    Args:
        folder: holds both files as published: `;`, Latin-1, quotes escaped by a backslash.

    Raises:
        InputError: a file is missing or damaged, or lacks a column.
    """
    ratings, bad = _read(folder / RATINGS_FILE, RATING_COLUMNS)
    books, bad_books = _read(folder / BOOKS_FILE, BOOK_COLUMNS)
    unrated = ratings["rating"].str.strip() == "0"
    not_rated = ratings.loc[unrated, "_line"].tolist()
    ratings = ratings[~unrated].reset_index(drop=True)
    for name in ("title", "author", "publisher"):
        books[name] = mend_text(books[name])
    books["title"] = [strip_brackets(title) for title in books["title"]]
    books["year"] = books["year"].str.strip().replace("0", "")
    editions = len(books)
    book, books = _merge_editions(books, ratings["item_id"])
    ratings["item_id"] = ratings["item_id"].map(book).fillna(ratings["item_id"])
    rule = (
        "editions with one title (without what stands in brackets) and author, both lowered, are "
        f"one item: {editions:,} editions are {len(books):,} books, each called as its edition "
        "with the most ratings; HTML entities, and UTF-8 that was read as Latin-1, are resolved; "
        "the catalog holds the books of accepted ratings"
    )
    return RawTables(
        ratings,
        books,
        RATINGS_FILE,
        BOOKS_FILE,
        bad,
        bad_books,
        rating_range=(1, 10),
        not_rated=not_rated,
        min_user_rows=MIN_USER_RATINGS,
        interactions_read=count_lines(folder / RATINGS_FILE, header=True),
    ), rule


def _read(path: Path, columns: dict[str, str]) -> tuple[pd.DataFrame, list[int]]:
    table, bad = read_csv_strings(path, ";", encoding="latin-1", escape="\\")
    require_columns(table, list(columns), path.name, "get the files as they were published")
    return table[[*columns, "_line"]].rename(columns=columns), bad


def _merge_editions(books: pd.DataFrame, rated: pd.Series) -> tuple[dict[str, str], pd.DataFrame]:
    """The item of each ISBN, and one row for each item, in the order of the file.

    Args:
        books: one row per edition.
        rated: ISBN of each rating.
    """
    books["item_id"] = books["item_id"].str.strip()
    names = (fold(books["title"]) + "\n" + fold(books["author"])).to_numpy(dtype=object)
    # Where either is missing nothing says that two editions are of one book.
    known = (books["title"] != "") & (books["author"] != "")
    book = pd.factorize(np.where(known, names, books["item_id"]))[0]
    count = books["item_id"].map(rated.str.strip().value_counts()).fillna(0).to_numpy()
    order = np.lexsort((np.arange(len(books)), -count, book))
    chosen = order[np.flatnonzero(np.diff(book[order], prepend=-1))]  # of book 0, 1, ...
    isbn = books["item_id"].to_numpy()
    items = dict(zip(isbn, isbn[chosen][book], strict=True))
    return items, books.iloc[np.sort(chosen)].reset_index(drop=True)


def mend_text(text: pd.Series) -> pd.Series:
    """Text with its accented letters where UTF-8 was read as Latin-1, once or twice, and without
    HTML entities. A letter of which only question marks are left stays as it is."""
    mended = (MISREAD.sub(lambda found: chr(0xC0 | ord(found[1]) & 0x3F), value) for value in text)
    return pd.Series([html.unescape(value) for value in mended], dtype="str")


def strip_brackets(title: str) -> str:
    """A title without series, edition and binding, which stand in brackets after a space; nested
    ones too. A title of nothing else stays."""
    whole = title
    while (shorter := IN_BRACKETS.sub("", title)) != title:
        title = shorter
    return title.strip() or whole


def fold(text: pd.Series) -> pd.Series:
    """Lowered, each run of white space one space: what two editions are compared by."""
    return text.str.lower().str.split().str.join(" ")
