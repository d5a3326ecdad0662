"""Score a table of (user, item) pairs of any length: streamed, in shards, and resumable."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ccf_llm_hf.data.sources import find_delimiter
from ccf_llm_hf.data.validation import as_ids
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.inference.malformed_csv import malformed_line
from ccf_llm_hf.inference.ranker import CTRRanker, describe_unknown
from ccf_llm_hf.io import lock_folder, sha256_of, write_file, write_json
from ccf_llm_hf.modeling.checkpoint_ccf_llm import backbone_fingerprint

KEYS = ("user_id", "item_id")
UNREAD = (".md", ".py", ".pyc", ".png")  # of a checkpoint's files
MANIFEST = "_manifest.json"  # readers of a folder of parquet files pass over such names


@dataclass
class Shard:
    """Some pairs: the `number` of their file, and the `first`'s row among all pairs."""

    number: int
    first: int
    pairs: pa.Table


@dataclass
class PairScorer:
    """Scores pairs shard by shard; memory holds one shard.

    Args:
        ranker: the model.
        identity: what names the checkpoint's exact weights; a run goes on only with the same.
        histories: liked items per user, oldest first, for pairs whose `history` is null or that
            have no such column; users that are not in it are scored without a history.
        shard_rows: rows of a shard.
    """

    ranker: CTRRanker
    identity: str
    histories: Mapping[str, list[Any]] = field(default_factory=dict)
    shard_rows: int = 20_000

    def run(self, pairs: Path, out: Path) -> dict[str, Any]:
        """Write `part-00000.parquet` and so on, and `_manifest.json`, into `out`.

        A shard has the input's `user_id` and `item_id` in the input's order, `logit` and
        `probability`. A shard that is there already is not scored again; it was renamed into place
        when it was whole.

        Args:
            pairs: parquet, also a folder of it, or CSV with `user_id`, `item_id` and, in parquet,
                optionally `history` (a list of items, oldest first).
            out: folder, made if missing.

        Returns:
            The manifest: what was scored, with what, how many `rows`, and how many distinct users
            and items of them the model does not know, `unknown_users` and `unknown_items`; and
            `new_rows`, how many of them this call scored, and `unknown`, a sentence about them.

        Raises:
            InputError: the input cannot be read, lacks a column or holds a null; or `out` holds the
                scores of another input or checkpoint.
            FolderInUse: another process scores into `out`.
        """
        if self.shard_rows < 1:
            raise InputError(f"--shard-rows {self.shard_rows} must be at least 1")
        source = _Source(pairs)
        manifest = {
            "pairs": source.fingerprint(),
            "checkpoint": self.identity,
            "histories": _digest(self.histories),
            "shard_rows": self.shard_rows,
        }
        if any(place.is_file() for place in (out, *out.parents)):
            raise InputError(f"--out {out} is a file, or in one: name a folder")
        with lock_folder(out, "--out"):
            _claim(out, manifest)
            return self._write_shards(source, out, manifest)

    def _write_shards(
        self, source: "_Source", out: Path, manifest: dict[str, Any]
    ) -> dict[str, Any]:
        rows = new_rows = 0
        unknown: tuple[dict[Any, None], ...] = ({}, {})
        with tqdm(total=source.rows, desc="scoring", unit=" pairs") as bar:

            def missing() -> Iterator[Shard]:
                nonlocal rows
                for number, pairs in enumerate(source.shards(self.shard_rows)):
                    shard = Shard(number, rows, pairs)
                    ids = [_read_ids(shard, name) for name in KEYS]
                    for known, new in zip(unknown, self.ranker.unknown(*ids), strict=True):
                        known.update(dict.fromkeys(new))
                    rows += len(pairs)
                    if not _part(out, number).exists():
                        yield shard
                    else:
                        bar.update(len(pairs))

            for number, scores in self.score_shards(missing()):
                write_file(_part(out, number), partial(pq.write_table, scores))
                new_rows += len(scores)
                bar.update(len(scores))
        if not rows:
            raise InputError(f"{source.path} has no rows: nothing to score")
        counts = dict(zip(("unknown_users", "unknown_items"), map(len, unknown), strict=True))
        finished = manifest | {"rows": rows, "finished": True} | counts
        write_json(out / MANIFEST, finished)
        said = describe_unknown(self.ranker.processor, *map(list, unknown))
        return finished | {"new_rows": new_rows, "unknown": said}

    def score_shards(self, shards: Iterable[Shard]) -> Iterator[tuple[int, pa.Table]]:
        """Numbers of shards and their scores, in any order."""
        for shard in shards:
            yield shard.number, self.score(shard)

    def score(self, shard: Shard) -> pa.Table:
        """What a shard's file holds.

        Raises:
            InputError: naming the row.
        """
        users, items = (_read_ids(shard, name) for name in KEYS)
        has_history = "history" in shard.pairs.column_names
        given = shard.pairs["history"].to_pylist() if has_history else [None] * len(users)
        of_users = {user: self.histories.get(user, []) for user in dict.fromkeys(users)}
        histories = [
            of_users[user] if history is None else history
            for user, history in zip(users, given, strict=True)
        ]
        pairs = [
            {"user": user, "item": item, "history": history}
            for user, item, history in zip(users, items, histories, strict=True)
        ]
        try:
            logits = self.ranker.pair_logits(pairs)
        except InputError as problem:
            raise InputError(f"in the pairs from row {shard.first} on: {problem}") from problem
        scores = {"logit": logits, "probability": self.ranker.probabilities(logits)}
        table = shard.pairs.select(list(KEYS))
        for name, values in scores.items():
            table = table.append_column(name, pa.array(values.astype(np.float32)))
        return table


def _part(out: Path, number: int) -> Path:
    return out / f"part-{number:05d}.parquet"


def _read_ids(shard: Shard, name: str) -> list[str]:
    """A column of ids, none of them missing."""
    try:
        column = shard.pairs[name].to_pandas(integer_object_nulls=True)
        ids = as_ids(column.rename(name)).tolist()
    except InputError as error:
        raise InputError(f"in the pairs from row {shard.first} on: {error}") from error
    if "" in ids:
        row = shard.first + ids.index("")
        raise InputError(f"row {row} of the pairs has no {name}: fill it or drop the row")
    return ids


class _Source:
    """A parquet or CSV file of pairs, read in pieces."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_csv = path.suffix.lower() in (".csv", ".tsv") and path.is_file()
        self.files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        self.rows: int | None = None
        try:
            if self.is_csv:
                with path.open("rb") as file:
                    usual = "\t" if path.suffix.lower() == ".tsv" else ","
                    self.delimiter = find_delimiter(file.readline(), usual)
                names = self._csv().schema.names
            elif self.files:
                readers = [pq.read_metadata(file) for file in self.files]
                self.rows = sum(reader.num_rows for reader in readers)
                names = readers[0].schema.to_arrow_schema().names
            else:
                raise OSError("no parquet file in it")
        except (OSError, pa.ArrowException) as error:
            if self.is_csv and path.is_file():
                raise self._malformed(error) from error
            raise InputError(
                f"{path} cannot be read as pairs: give parquet, also a folder of it, or a CSV file"
            ) from error
        if missing := [name for name in KEYS if name not in names]:
            raise InputError(
                f"{path} has no column {missing[0]!r}: it needs {' and '.join(KEYS)}, and may have "
                f"history; found {', '.join(names)}"
            )
        if self.is_csv and "history" in names:
            raise InputError(
                f"{path} has a history column, which only parquet can hold as lists: write "
                "parquet, or drop the column and give --data"
            )
        self.columns = [*KEYS, *(["history"] * ("history" in names and not self.is_csv))]

    def _csv(self, columns: list[str] | None = None) -> pa_csv.CSVStreamingReader:
        # Ids stay as written: 007 is not 7.
        options = pa_csv.ConvertOptions(
            column_types=dict.fromkeys(KEYS, pa.string()), include_columns=columns
        )
        parse = pa_csv.ParseOptions(delimiter=self.delimiter)
        return pa_csv.open_csv(self.path, convert_options=options, parse_options=parse)

    def _malformed(self, error: Exception | None = None) -> InputError:
        where = malformed_line(self.path, self.delimiter) or " ".join(str(error).split())
        mend = "mend it (a value that holds the delimiter or a quote is written in quotes)"
        if where.endswith("not UTF-8"):
            mend = "save it as UTF-8, if it is UTF-16 or Latin-1 (as Windows and Excel write it)"
        return InputError(
            f"{self.path} is not a well-formed CSV file: {where}: {mend}, or give parquet"
        )

    def fingerprint(self) -> str:
        """Digest of the whole content: a table with one cell changed is another one."""
        return sha256_of(self.files)

    def shards(self, rows: int) -> Iterator[pa.Table]:
        """Tables of `rows` rows, the last one shorter."""
        waiting: list[pa.RecordBatch] = []
        count = 0
        for batch in self._batches(rows):
            while count + len(batch) >= rows:
                taken = batch.slice(0, rows - count)
                yield pa.Table.from_batches([*waiting, taken])
                batch, waiting, count = batch.slice(len(taken)), [], 0
            if len(batch):
                waiting.append(batch)
                count += len(batch)
        if waiting:
            yield pa.Table.from_batches(waiting)

    def _batches(self, rows: int) -> Iterator[pa.RecordBatch]:
        try:
            if self.is_csv:
                for batch in self._csv(self.columns):
                    # Arrow takes all that follows an open quote for one value.
                    if any(pc.any(pc.match_substring(batch[key], "\n")).as_py() for key in KEYS):
                        raise self._malformed()
                    yield batch
            else:
                for path in self.files:
                    with pq.ParquetFile(path) as file:
                        yield from file.iter_batches(min(rows, 65_536), columns=self.columns)
        except (OSError, pa.ArrowException) as error:
            if self.is_csv:
                raise self._malformed(error) from error
            raise InputError(f"{self.path} is damaged: write it again ({error})") from error


def checkpoint_identity(checkpoint: str, model: Any) -> str:
    """Names all that decides a score: a digest of a folder's files, but for cards and code, which
    nothing here reads, or a repository's commit; and the backbone that is attached."""
    backbone = backbone_fingerprint(model.language_model)
    folder = Path(checkpoint)
    if not folder.is_dir():
        return f"{checkpoint}@{getattr(model.config, '_commit_hash', None)} {backbone}"
    digest = hashlib.sha256(backbone.encode())
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = file.relative_to(folder).as_posix()
        if name.startswith(".") or file.suffix in UNREAD or name in ("card.json", "example.json"):
            continue
        with file.open("rb") as opened:
            digest.update(name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _claim(out: Path, manifest: dict[str, Any]) -> None:
    """Note what this folder's scores are of; refuse a folder that holds others."""
    file = out / MANIFEST
    if not any(out.glob("part-*.parquet")):
        write_json(file, manifest | {"finished": False})
        return
    if not file.is_file():
        raise InputError(f"{out} holds shards but no {MANIFEST}: name another --out, or delete it")
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as problem:
        raise InputError(f"{file} is damaged: name another --out, or delete {out}") from problem
    if changed := [key for key, value in manifest.items() if found.get(key) != value]:
        raise InputError(
            f"{out} holds scores made with other {' and '.join(changed)}: name another --out, "
            "or delete it"
        )


def _digest(histories: Mapping[str, list[Any]]) -> str:
    """Of the sorted (user, history) pairs as JSON."""
    digest = hashlib.sha256(b"[")
    for place, user in enumerate(sorted(histories)):
        digest.update((", " * (place > 0) + json.dumps([user, histories[user]])).encode())
    digest.update(b"]")
    return digest.hexdigest()
