"""Small generated data sets, written in every raw format."""

import gzip
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from ccf_llm_hf.data.sources import ML_100K_GENRES

START, END = 991_353_600, 1_044_057_600  # 2001-06-01 and 2003-02-01: ML-1M's splits
FORMATS = ("dat", "recbole-1m", "u-files", "recbole-100k", "latest", "csv", "tsv.gz", "parquet")


@dataclass
class Raw:
    """A raw data set as strings, in the order of its file."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    items: list[tuple[str, str, str, str]] = field(default_factory=list)  # id, title, year, genres


def small_raw(users: int = 6, items: int = 12) -> Raw:
    """Every user rates 3/4 of the items once, at times spread evenly over ML-1M's splits."""
    raw = Raw(items=[(str(i), f"Movie {i}, The", str(1990 + i), "Drama|War") for i in range(items)])
    pairs = [(u, i) for i in range(items) for u in range(users) if (u + i) % 4]
    step = (END - START) // len(pairs)
    for n, (u, i) in enumerate(pairs):
        raw.rows.append((str(u + 1), str(i), str(1 + (3 * u + 5 * i) % 5), str(START + n * step)))
    return raw


def write_raw(raw: Raw, kind: str, folder: Path) -> dict:
    """Write `raw` in one of FORMATS; returns the options of PrepareConfig that read it."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("csv", "tsv.gz", "parquet"):
        return _write_tables(raw, kind, folder)
    if kind == "latest":
        return _write_latest(raw, folder)
    source = "ml-1m" if kind in ("dat", "recbole-1m") else "ml-100k"
    if kind == "dat":
        _write(folder / "ratings.dat", ["::".join(row) for row in raw.rows])
        _write(folder / "movies.dat", [f"{i}::{_dated(t, y)}::{g}" for i, t, y, g in raw.items])
    elif kind == "u-files":
        _write(folder / "u.data", ["\t".join(row) for row in raw.rows])
        lines = []
        for i, title, year, genres in raw.items:
            flags = ["1" if genre in genres.split("|") else "0" for genre in ML_100K_GENRES]
            lines.append("|".join([i, _dated(title, year), "01-Jan-1995", "", "http://x", *flags]))
        _write(folder / "u.item", lines)
    else:
        genre, prefix = ("genre", "1m_") if source == "ml-1m" else ("class", "")
        head = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
        rows = ["\t".join([prefix * bool(u) + u, *rest]) for u, *rest in raw.rows]
        _write(folder / f"{source}.inter", [head, *rows], "utf-8")
        head = f"item_id:token\tmovie_title:token_seq\trelease_year:float\t{genre}:token_seq"
        items = [f"{i}\t{t}\t{y}\t{g.replace('|', ' ')}" for i, t, y, g in raw.items]
        _write(folder / f"{source}.item", [head, *items], "utf-8")
    return {"source": source, "input": str(folder)}


def _write_latest(raw: Raw, folder: Path) -> dict:
    ratings = pd.DataFrame(raw.rows, columns=["userId", "movieId", "rating", "timestamp"])
    movies = pd.DataFrame(
        [(i, _dated(t, y), g) for i, t, y, g in raw.items], columns=["movieId", "title", "genres"]
    )
    ratings.to_csv(folder / "ratings.csv", index=False)
    movies.to_csv(folder / "movies.csv", index=False)
    return {"source": "ml-latest-small", "input": str(folder)}


def pickled_table(columns: dict[str, list], protocol: int = 5) -> bytes:
    """A pickled pandas table as CoLLM's and dslabs's are: text as objects, in blocks by type."""
    table = pd.DataFrame({name: pd.Series(cells) for name, cells in columns.items()})
    for name, cells in columns.items():
        if not all(isinstance(cell, int | float) for cell in cells):
            table[name] = pd.Series(cells, dtype=object)
    table.columns = pd.Index(list(columns), dtype=object)
    return pickle.dumps(table._consolidate(), protocol=protocol)


def _dated(title: str, year: str) -> str:
    return f"{title} ({year})" if title else ""


def _write(path: Path, lines: list[str], encoding: str = "latin-1") -> None:
    path.write_text("\n".join(lines) + "\n", encoding=encoding)


def _write_tables(raw: Raw, kind: str, folder: Path) -> dict:
    tables = {
        "ratings": pd.DataFrame(raw.rows, columns=["user_id", "item_id", "rating", "timestamp"]),
        "items": pd.DataFrame(raw.items, columns=["item_id", "title", "year", "genres"]),
    }
    for name, table in tables.items():
        path = folder / f"{name}.{kind}"
        if kind == "parquet":
            table.replace("", None).to_parquet(path)
        elif kind == "csv":
            table.to_csv(path, index=False)
        else:
            path.write_bytes(gzip.compress(table.to_csv(sep="\t", index=False).encode()))
    paths = {
        f: str(folder / f"{n}.{kind}") for f, n in (("interactions", "ratings"), ("items",) * 2)
    }
    return {"source": "table", "rating_column": "rating", **paths}
