"""Turn a source of interactions into a prepared folder (`ccf-llm prepare`)."""

import re
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ccf_llm_hf.data import amazon, assets, book_crossing, collm
from ccf_llm_hf.data.asset_list import ASSETS, MOVIELENS_LICENSE
from ccf_llm_hf.data.config import SOURCES, PrepareConfig
from ccf_llm_hf.data.folder import check_output, write_prepared
from ccf_llm_hf.data.prepared import FORMAT, HISTORIES
from ccf_llm_hf.data.protocol import (
    Samples,
    TimeSplit,
    build_samples,
    describe_splits,
    split_at_random,
    split_by_ratio,
)
from ccf_llm_hf.data.sources import (
    ColumnNames,
    RawTables,
    read_movielens_1m,
    read_movielens_100k,
    read_movielens_latest_small,
    read_tables,
)
from ccf_llm_hf.data.validation import (
    COMPACT_DATE,
    RejectionReport,
    clean_fields,
    clean_interactions,
    clean_items,
    parse_times,
)
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.io import lock_output

MOVIELENS = {
    "ml-1m": read_movielens_1m,
    "ml-100k": read_movielens_100k,
    "ml-latest-small": read_movielens_latest_small,
}
UNKNOWN_LICENSE = "that of the source"
LIKES_RULE = (
    "the items of the user's earlier rows with label 1, oldest first, carried across splits; rows "
    "outside all splits do not count"
)
SIGNED_RULE = (
    "all items of the user's rows at earlier times, oldest first, rows outside all splits too, "
    "with their labels in `history_labels`"
)
TIES_RULES = {
    "item": "ties in time are ordered by first appearance of the item in the ratings file",
    "file": "ties in time are in the order of the file",
}
FROZEN_RULE = "rows of validation and test are in no history (frozen histories)"
NO_TIMES = (
    "position, from 0, in a random order of the user's rows, those of train first, then "
    "validation, then test; the data has no times"
)


def prepare(config: PrepareConfig, *, summary: bool = True) -> Path:
    """Write a prepared folder and return its path; print a summary table if `summary`.

    The folder appears complete or not at all. An earlier prepared folder at the same place is
    replaced; any other non-empty folder is refused.

    Raises:
        InputError: bad options or unusable data, or the output folder holds something else.
    """
    _check_options(config)
    out = Path(config.out).expanduser()
    check_output(out)
    with lock_output(out):
        protocol = _prepare(config, out)
    if summary:
        print(format_summary(protocol, out))
    return out


def _prepare(config: PrepareConfig, out: Path) -> dict:
    """Read, check, split and write; the folder's protocol."""
    with tqdm(total=4, desc=f"prepare {config.source}: read", unit="step") as bar:
        report = RejectionReport()
        if config.source == "collm":
            samples, rows, items, counts = collm.read_collm(_input_folder(config))
            for place, (file, count) in enumerate(counts.items()):
                report.account(file, count, int((rows["split"] == place).sum()), ())
            protocol = _protocol(config) | _published_protocol(collm.is_movielens(items))
            fields: list[str] = []
            bar.update(2)
        else:
            raw, protocol = _read_source(config)
            _advance(bar, config, "check rows")
            items = clean_items(raw, report)
            fields = _keep_fields(config, items)
            rows = clean_interactions(raw, items, report, config.time_unit, _user_part(config))
            del raw
            _advance(bar, config, "split")
            if config.source == "ml-latest-small":
                # GroupLens renews it: which edition it is shows in what it holds only.
                last = _date(int(rows["timestamp"].max()))
                protocol["source"] += f", {len(rows):,} ratings, the last of {last}"
            if config.source == "amazon-books":
                rows, protocol["split_rule"] = amazon.keep_active(rows)
            if config.source in ("amazon-books", "book-crossing"):
                items = items[items["item_id"].isin(rows["item_id"])].reset_index(drop=True)
            if config.users:
                rule = f"part {config.users} of the users, by a hash of their ids"
                protocol["row_rule"] = "; ".join(filter(None, [protocol.get("row_rule"), rule]))
            samples = _label_and_split(config, rows, protocol)
        protocol["splits"] = describe_splits(samples, protocol["has_times"])
        protocol["accepted_rows"], protocol["catalog_items"] = len(rows), len(items)
        protocol["item_columns"] = [c for c in items.columns if c not in ("item_id", "title")]
        protocol["item_fields"] = fields
        protocol["rejected"], protocol["tables"] = report.reasons, report.tables
        _advance(bar, config, "write")
        write_prepared(out, samples, rows, items, protocol)
        bar.update()
    return protocol


def _advance(bar: tqdm, config: PrepareConfig, step: str) -> None:
    bar.update()
    bar.set_description(f"prepare {config.source}: {step}")


def _check_options(config: PrepareConfig) -> None:
    if config.source not in SOURCES:
        raise InputError(f"unknown source {config.source!r}: choose one of {', '.join(SOURCES)}")
    if not config.out:
        raise InputError("name the folder to write with --out")
    _refuse_idle_options(config)
    if config.histories not in HISTORIES:
        raise InputError(
            f"--histories must be one of {', '.join(HISTORIES)}, not {config.histories!r}"
        )
    if config.max_history is not None and config.max_history < 1:
        raise InputError(f"--max-history must be at least 1, not {config.max_history}")
    _user_part(config)
    if config.source in ("amazon-books", "collm") and not config.input:
        raise InputError(f"the source `{config.source}` needs --input FOLDER with its files")
    if config.source == "table":
        _check_table_options(config)
    elif config.source == "book-crossing" and config.split not in (None, "random"):
        raise InputError(f"book-crossing has no times: --split must be random, not {config.split}")


def _check_table_options(config: PrepareConfig) -> None:
    if not config.interactions:
        raise InputError("the source `table` needs --interactions FILE")
    if bool(config.rating_column) == bool(config.label_column):
        raise InputError("pass either --rating-column or --label-column")
    if config.time_unit not in ("s", "ms"):
        raise InputError(f"--time-unit must be s or ms, not {config.time_unit!r}")
    if config.language and not re.fullmatch(r"[a-z]{2,3}", config.language):
        raise InputError(f"--language must be an ISO 639 code such as en, not {config.language!r}")
    if config.split not in (None, "ratio", "time", "random"):
        raise InputError(f"--split must be ratio, time or random, not {config.split!r}")
    if config.split == "time" and not (config.valid_start and config.test_start):
        raise InputError("--split time needs --valid-start and --test-start")
    random = ("time_column", "time_unit", "valid_start", "test_start")
    for name in random if config.split == "random" else ("seed",):
        if getattr(config, name) != getattr(PrepareConfig, name):
            where = "with --split random" if name in random else "without --split random"
            raise InputError(f"{_flag(name)} has no meaning {where}: leave it out")
    taken = {"item_id", "title", config.item_column, config.title_column}
    for place, name in enumerate(config.item_fields):
        if name in taken or name in config.item_fields[:place]:
            raise InputError(
                f"--item-fields names {name!r}, which is the id, the title or named twice: leave "
                "it out"
            )
    if config.field_separator is not None and not config.item_fields:
        raise InputError("--field-separator has no meaning without --item-fields: leave it out")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse_idle_options(config: PrepareConfig) -> None:
    """Refuse an option that the source would not look at: silence would change the protocol."""
    fetched = {"input", "offline", "cache_dir"}
    histories = {"histories", "max_history", "frozen_histories"}
    options = {option.name for option in fields(config)}
    if config.source == "table":
        used = options - fetched
    elif config.source in MOVIELENS:
        used = fetched | histories
    elif config.source == "book-crossing":
        used = fetched | histories | {"split", "ratios", "seed", "users"}
    else:
        used = {"input"} if config.source == "collm" else {"input"} | histories
    default = PrepareConfig()
    for name in sorted(options - used - {"source", "out"}):
        if getattr(config, name) != getattr(default, name):
            raise InputError(
                f"{_flag(name)} has no meaning for the source {config.source}: leave it out"
            )


def _user_part(config: PrepareConfig) -> tuple[int, int] | None:
    """Which part of the users, of how many; None for all of them."""
    if config.users is None:
        return None
    numbers = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", config.users)
    if not numbers or int(numbers[1]) > int(numbers[2]):
        raise InputError(f"--users must be K/N with K from 1 to N, such as 1/2, not {config.users}")
    return int(numbers[1]), int(numbers[2])


def _ties(config: PrepareConfig) -> str:
    """How a user's rows of one time are ordered: of published data as CoLLM does."""
    return "file" if config.source == "table" else "item"


def _is_random(config: PrepareConfig) -> bool:
    return config.source == "book-crossing" or config.split == "random"


def _protocol(config: PrepareConfig) -> dict:
    """The part of protocol.json that every source begins with."""
    protocol: dict = {
        "format": FORMAT,
        "name": config.name or config.source,
        "label_rule": f"1 if rating >= {_threshold(config):g}, else 0",
        "split_rule": "",
        "history_rule": _history_rule(config),
        "histories": config.histories,
        "ties": _ties(config),
        "frozen_histories": config.frozen_histories or _is_random(config),
        "has_times": not _is_random(config),
    }
    if _is_random(config):
        protocol["timestamp_rule"] = NO_TIMES
    return protocol


def _history_rule(config: PrepareConfig) -> str:
    if _is_random(config):
        rule = "the items of the user's training rows"
        rule += ", with their labels in `history_labels`" * (config.histories == "signed")
        rule += ", with label 1" * (config.histories == "likes")
        rule += (
            ": of a training row those before it in a random order of the user's rows, of a row of "
            "validation or test all of them, in that order"
        )
    else:
        rule = (
            SIGNED_RULE
            if config.histories == "signed"
            else f"{LIKES_RULE}; {TIES_RULES[_ties(config)]}"
        )
        rule += f"; {FROZEN_RULE}" if config.frozen_histories else ""
    if config.max_history:
        rule += (
            f"; only the latest {config.max_history} are stored, `history_dropped` counts the "
            "others"
        )
    return rule


def _threshold(config: PrepareConfig) -> float:
    fixed = {"amazon-books": 5.0, "book-crossing": book_crossing.LIKED}
    return fixed.get(config.source, config.positive_threshold)


def _input_folder(config: PrepareConfig) -> Path:
    assert config.input is not None
    return Path(config.input).expanduser()


def _published_protocol(movielens: bool) -> dict:
    made_of = "MovieLens-1M" if movielens else "Amazon Reviews, Books"
    return {
        **collm.RULES,
        "source": f"CoLLM's published files of {made_of} (https://github.com/zyang1580/CoLLM)",
        "license": MOVIELENS_LICENSE if movielens else amazon.LICENSE,
        "redistributable": False,
        "citation": collm.CITATION,
        "language": "en",
    }


def _read_source(config: PrepareConfig) -> tuple[RawTables, dict]:
    """Raw tables, and the part of protocol.json that depends on the source only."""
    protocol = _protocol(config)
    if config.source == "table":
        assert config.interactions is not None
        interactions = Path(config.interactions).expanduser()
        items = Path(config.items).expanduser() if config.items else None
        columns = ColumnNames(
            config.user_column,
            config.item_column,
            None if _is_random(config) else config.time_column,
            config.title_column,
            config.rating_column,
            config.label_column,
            tuple(config.item_fields),
        )
        protocol["name"] = config.name or interactions.name.split(".")[0]
        protocol["source"] = " and ".join(file.name for file in (interactions, items) if file)
        protocol |= {"license": config.license or UNKNOWN_LICENSE, "redistributable": True}
        protocol |= {"language": config.language} if config.language else {}
        protocol["citation"] = ""
        if config.label_column:
            protocol["label_rule"] = f"column {config.label_column!r}"
        return read_tables(interactions, items, columns), protocol
    if config.source == "amazon-books":
        raw, edition = amazon.read_amazon_books(_input_folder(config))
        protocol["source"] = (
            f"Amazon Reviews {edition}, Books: {raw.interactions_file} and {raw.items_file}"
        )
        protocol |= {"license": amazon.LICENSE, "redistributable": False, "language": "en"}
        protocol["citation"] = amazon.CITATIONS[edition]
        return raw, protocol

    folder = assets.get_asset(
        config.source, path=config.input, offline=config.offline, cache_dir=config.cache_dir
    )
    asset = ASSETS[config.source]
    if config.source == "book-crossing":
        raw, protocol["item_rule"] = book_crossing.read_book_crossing(folder)
        protocol["row_rule"] = book_crossing.ROW_RULE
    else:
        raw = MOVIELENS[config.source](folder)
        protocol["language"] = "en"
    protocol["source"] = f"{asset.description}; read from {raw.interactions_file}"
    protocol |= {"license": asset.license, "redistributable": False, "citation": asset.citation}
    return raw, protocol


def _keep_fields(config: PrepareConfig, items: pd.DataFrame) -> list[str]:
    """Names of the columns that describe items, which are made text or lists of text in place."""
    if config.source in MOVIELENS:
        items["genres"] = items["genres"].str.split("|")
        names: Sequence[str] = ("genres",)
    else:
        is_books = config.source == "book-crossing"
        names = book_crossing.FIELDS if is_books else config.item_fields
    clean_fields(items, names, config.field_separator)
    return list(names)


def _choose_split(config: PrepareConfig, timestamps: np.ndarray, protocol: dict) -> TimeSplit:
    """Boundaries of the splits; the rule in words goes into `protocol`."""
    if config.source == "ml-1m":
        # Starts of months 14, 24, 29 and 34 after the first rating's, April 2000. As dates, they
        # hold for a part of the ratings too.
        dates = ("2001-06-01", "2002-04-01", "2002-09-01", "2003-02-01")
        train, valid, test, end = (_parse_option("split", date, "s") for date in dates)
        split = TimeSplit(valid, test, train, end)
        start = "by UTC month counted from the first rating's (April 2000), CoLLM's protocol: "
        months = "train 14-23, validation 24-28, test 29-33; earlier and later rows in none; "
        rule = start + months + "no filter on cold users or items"
    elif config.source == "amazon-books":
        split = amazon.split_2017(timestamps)
        months = (
            "2017 by UTC: train January to November, validation and test the halves of December"
        )
        rule = f"{months}, test from {_date(split.test_start)}; {protocol['split_rule']}"
    elif config.source == "table" and config.split == "time":
        unit = config.time_unit
        valid = _parse_option("--valid-start", config.valid_start, unit)
        test = _parse_option("--test-start", config.test_start, unit)
        if valid >= test:
            raise InputError("--valid-start must lie before --test-start")
        split = TimeSplit(valid, test)
        rule = f"by time: validation from {_date(valid)}, test from {_date(test)}"
    else:
        ratios = config.ratios if config.source == "table" else [0.8, 0.1, 0.1]
        split = split_by_ratio(timestamps, ratios)
        shares = "/".join(f"{ratio:g}" for ratio in ratios)
        cut = f"validation from {_date(split.valid_start)}, test from {_date(split.test_start)}"
        rule = f"all rows in order of time, cut {shares} (equal times stay together): {cut}"
    protocol["split_rule"] = rule
    return split


def _parse_option(option: str, text: str | None, unit: str) -> int:
    seconds = parse_times(pd.Series([text]), unit).iloc[0]
    if np.isnan(seconds) or re.fullmatch(COMPACT_DATE, text or ""):
        raise InputError(f"{option} {text!r} is neither a Unix time nor an ISO date (2020-11-08)")
    return int(seconds)


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _label_and_split(config: PrepareConfig, rows: pd.DataFrame, protocol: dict) -> Samples:
    """Add the columns label, rating and split to `rows` in place, where there are no times also
    timestamp, and build the samples; the rule of the splits goes into `protocol`."""
    if "label" in rows:
        rows["rating"] = np.nan
    else:
        rows["label"] = (rows["rating"] >= _threshold(config)).astype("int64")
        if config.source == "table" and rows["label"].nunique() == 1:
            raise InputError(
                f"every row has label {rows['label'].iloc[0]}: ratings go from "
                f"{rows['rating'].min():g} to {rows['rating'].max():g}, so set "
                f"--positive-threshold, which is {_threshold(config):g}, between them"
            )
    if _is_random(config):
        rows["split"], rows["timestamp"] = split_at_random(
            rows["user_id"], rows["item_id"], config.ratios, config.seed
        )
        shares = "/".join(f"{ratio:g}" for ratio in config.ratios)
        protocol["split_rule"] = (
            f"at random, {shares}, by a hash of user, item and seed {config.seed}"
        )
    else:
        times = rows["timestamp"].to_numpy()
        rows["split"] = _choose_split(config, times, protocol).assign(times)
    return build_samples(
        rows,
        config.max_history,
        signed=config.histories == "signed",
        frozen=protocol["frozen_histories"],
        ties=protocol["ties"],
    )


def format_summary(protocol: dict, out: Path) -> str:
    """The table that `prepare` prints: sizes per split and rejected rows."""
    lines = [f"{'split':<12}{'rows':>10}{'users':>9}{'items':>9}{'positive':>10}{'cold users':>12}"]
    for name, s in protocol["splits"].items():
        lines.append(
            f"{name:<12}{s['rows']:>10,}{s['users']:>9,}{s['items']:>9,}"
            f"{s['positive_rate']:>10.4f}{s['unseen_user_rate']:>12.1%}"
        )
    lines.append(
        f"accepted rows {protocol['accepted_rows']:,}, items {protocol['catalog_items']:,}"
    )
    for file, n in protocol["tables"].items():
        lines.append(
            f"{file}: {n['read']:,} rows read = {n['accepted']:,} accepted + {n['rejected']:,} "
            "rejected"
        )
    for reason, entry in protocol["rejected"].items():
        places = ", ".join(entry["examples"])
        lines.append(f"{entry['count']:,} {reason} ({entry['policy']}), at {places}")
    lines.append(f"wrote {out}")
    return "\n".join(lines)
