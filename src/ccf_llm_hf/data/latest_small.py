"""MovieLens latest-small as the R package dslabs holds it, turned into MovieLens's own columns."""

import io
import lzma
from pathlib import Path

import pandas as pd

from ccf_llm_hf.data.unpickle import read_pickled_table
from ccf_llm_hf.errors import InputError

COLUMNS = ("movieId", "title", "year", "genres", "userId", "rating", "timestamp")


def convert_pickle(pickled: Path, folder: Path) -> None:
    """Write `ratings.parquet` and `movies.parquet` with the columns of the official CSV files.

    dslabs keeps one table with a row per rating, the year apart from the title. Its edition is that
    of October 2016 (100,004 ratings, only films that were rated); a title that dslabs could not
    take apart is missing there and stays empty.

    Args:
        pickled: the xz-compressed pickle of a pandas table, read without running it.
        folder: where to write; it exists.

    Raises:
        InputError: the file is no such table.
    """
    try:
        content = lzma.decompress(pickled.read_bytes())
    except lzma.LZMAError as error:
        raise InputError(f"{pickled.name} is damaged ({error}): get the official files") from error
    table = read_pickled_table(io.BytesIO(content), pickled.name)
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise InputError(f"{pickled.name} has no column {missing[0]!r}: get the official files")
    ratings = table[["userId", "movieId", "rating", "timestamp"]]
    ratings.to_parquet(folder / "ratings.parquet", index=False)
    movies = table.drop_duplicates("movieId").sort_values("movieId")
    titles = _dated(movies["title"], movies["year"])
    movies = pd.DataFrame(
        {"movieId": movies["movieId"], "title": titles, "genres": movies["genres"]}
    )
    movies.to_parquet(folder / "movies.parquet", index=False)


def _dated(titles: pd.Series, years: pd.Series) -> pd.Series:
    """ "Title (year)", the title alone where there is no year, and "" where there is no title."""
    titles = titles.astype("string").fillna("").str.strip()
    years = years.astype("Int64").astype("string")
    dated = titles + " (" + years + ")"
    return dated.where(years.notna() & (titles != ""), titles).astype(object)
