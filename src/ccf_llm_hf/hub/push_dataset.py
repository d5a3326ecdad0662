"""Publish a prepared folder as a data set of the Hub: one commit, whole or not at all."""

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetInfo, Features, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import CommitOperationAdd, DatasetCardData, HfApi

from ccf_llm_hf.data.dataset_card import render_dataset_card
from ccf_llm_hf.data.prepare import UNKNOWN_LICENSE
from ccf_llm_hf.data.prepared import (
    INTERACTIONS_FILE,
    ITEMS_FILE,
    PROTOCOL_FILE,
    load_protocol,
    split_file,
)
from ccf_llm_hf.data.protocol import SPLITS
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.checkpoint_files import CARD_FILE
from ccf_llm_hf.hub.repository import ask_hub, explain, open_repo, tell_overwritten
from ccf_llm_hf.hub.scan import scan_folder
from ccf_llm_hf.hub.staging import check_repo_id
from ccf_llm_hf.io import write_json, write_text

# Files of each config by split, as the card's YAML names them.
CONFIGS = {
    "default": {split: split_file(split) for split in SPLITS},
    "items": {"train": ITEMS_FILE},
    "interactions": {"train": INTERACTIONS_FILE},
}
COLUMNS = {
    "default": [
        "user_id",
        "item_id",
        "label",
        "timestamp",
        "history",
        "split_position",
        "not_cold",
    ],
    "items": ["item_id", "title"],
    "interactions": ["user_id", "item_id", "rating", "label", "timestamp", "split"],
}
# What the card states, and what decides whether it may be sent.
PROTOCOL_KEYS = (
    "name",
    "source",
    "license",
    "redistributable",
    "label_rule",
    "split_rule",
    "history_rule",
    "splits",
    "accepted_rows",
    "catalog_items",
    "rejected",
)
# Titles spelled as MovieLens alone spells them, popular enough to be in every one of its releases.
MOVIELENS_TITLES = {
    "American President, The (1995)",
    "English Patient, The (1996)",
    "Fugitive, The (1993)",
    "Full Monty, The (1997)",
    "Godfather, The (1972)",
    "Lion King, The (1994)",
    "Princess Bride, The (1987)",
    "Shawshank Redemption, The (1994)",
    "Silence of the Lambs, The (1991)",
    "Usual Suspects, The (1995)",
}
MOVIELENS_ENOUGH = 4


@dataclass
class PushedDataset:
    """What was, or in a dry run would be, published: sizes in bytes by file name.

    `commit` and `url` are None in a dry run; `unchanged`: it was there already.
    """

    repo: str
    files: dict[str, int]
    notes: list[str]
    private: bool | None = None
    commit: str | None = None
    url: str | None = None
    unchanged: bool = False

    def as_text(self) -> str:
        """For a terminal: files, notes, and how to load it."""
        lines = [f"{size:>13,}  {name}" for name, size in self.files.items()]
        lines += [f"{sum(self.files.values()):>13,}  bytes in {len(self.files)} files", *self.notes]
        if self.commit is None:
            return "\n".join([*lines, f"would be published as {self.repo}; nothing was sent"])
        what = "holds it already" if self.unchanged else "published"
        lines.append(f"{what}: {self.url} ({'private' if self.private else 'public'})")
        lines.append("load this revision:")
        for config in ("", ', "items"'):
            lines.append(f'  load_dataset("{self.repo}"{config}, revision="{self.commit}")')
        return "\n".join(lines)


def push_dataset(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    permission: bool = False,
    replace: bool = False,
    dry_run: bool = False,
    token: str | bool | None = None,
) -> PushedDataset:
    """Publish a prepared folder; make the repository if it is not there.

    Only what `ccf-llm prepare` wrote is sent: the parquet files, protocol.json and a card with
    configs, features, splits and protocol. When a request fails, the repository holds the whole
    commit or nothing of it; the same call again completes it. A public repository is noted in the
    folder's protocol.json, so that cards of models trained on it link to it.

    Args:
        folder: written by `ccf-llm prepare`.
        repo_id: `org/name`.
        private: a new repository is private; one that is public is refused.
        permission: you are allowed to share ratings whose license forbids it, such as MovieLens's.
        replace: the repository may hold another data set, whose files are kept or overwritten.
        dry_run: check everything, the token's rights too, and send nothing.
        token: default the one of `hf auth login` or HF_TOKEN.

    Raises:
        InputError: this is no prepared folder, its license forbids it, the repository holds another
            data set, or the Hub refuses.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    protocol = _read_protocol(folder)
    tables = _read_schemas(folder, protocol)
    if reason := find_restriction(folder, protocol):
        if not permission:
            raise InputError(
                f"{folder} was not published: {reason}; with the rights holder's permission "
                "say --i-have-permission"
            )
        protocol["redistributable"] = False
    shared = {key: value for key, value in protocol.items() if key != "hub_id"}
    if not private:
        shared["hub_id"] = repo_id
    with tempfile.TemporaryDirectory() as temporary:
        texts = Path(temporary)
        card = render_dataset_card(
            shared,
            repo_id=repo_id,
            dataset_info=_describe_dataset(folder, tables),
            permission=bool(reason),
        )
        write_text(texts / CARD_FILE, card)
        write_json(texts / PROTOCOL_FILE, shared)
        if findings := scan_folder(texts, [folder.resolve().parent, Path.home()]):
            raise InputError(f"{findings[0]} must not be published: prepare the data without it")
        api = HfApi(token=token, library_name="ccf-llm-hf")
        where: dict[str, Any] = {"kind": "dataset", "private": private, "replace": replace}
        head, unasked = ask_hub(api, repo_id, dry_run=dry_run, **where)
        files = {name: texts / name for name in (CARD_FILE, PROTOCOL_FILE)}
        files |= {name: folder / name for name in tables}
        result = PushedDataset(
            repo_id,
            {name: path.stat().st_size for name, path in files.items()},
            _write_notes(protocol, bool(reason)) + unasked,
            private,
        )
        over = tell_overwritten(head, repo_id, files) if replace else []
        result.notes += over
        if not dry_run:
            for line in over:
                print(line, file=sys.stderr)
            _send(result, files, api, where)
    if result.commit and not result.private and protocol.get("hub_id") != repo_id:
        write_json(folder / PROTOCOL_FILE, {**load_protocol(folder), "hub_id": repo_id})
    return result


def find_restriction(folder: Path, protocol: Mapping[str, Any]) -> str:
    """Why the license of the ratings forbids sharing them; empty when nothing says so.

    Ratings of MovieLens are recognized by their titles too: a copy of them that was prepared as a
    table carries no license.
    """
    if not protocol["redistributable"]:
        return f"the license of {protocol['name']} forbids it ({protocol['license']})"
    titles = set(pq.read_table(folder / ITEMS_FILE, columns=["title"])["title"].to_pylist())
    if len(titles & MOVIELENS_TITLES) >= MOVIELENS_ENOUGH:
        return (
            "its titles are those of MovieLens, whose license forbids to redistribute the ratings; "
            "anyone can prepare them with `ccf-llm prepare`"
        )
    return ""


def _read_protocol(folder: Path) -> dict[str, Any]:
    protocol = load_protocol(folder)
    missing = [key for key in PROTOCOL_KEYS if key not in protocol]
    if missing:
        raise InputError(
            f"{folder / PROTOCOL_FILE} lacks {missing[0]!r}: run `ccf-llm prepare` again"
        )
    return protocol


def _read_schemas(folder: Path, protocol: Mapping[str, Any]) -> dict[str, pa.Schema]:
    """Schemas of the parquet files by name, each with the columns that `prepare` writes."""
    found = {}
    for config, files in CONFIGS.items():
        extra = protocol.get("item_columns", []) if config == "items" else []
        expected = [*COLUMNS[config], *extra]
        for name in files.values():
            try:
                found[name] = pq.read_schema(folder / name)
            except (OSError, pa.ArrowException) as error:
                raise InputError(
                    f"{folder / name} is missing or damaged: run `ccf-llm prepare` again"
                ) from error
            if sorted(found[name].names) != sorted(expected):
                wrong = min(set(found[name].names) ^ set(expected))
                raise InputError(
                    f"{folder / name} has other columns than `ccf-llm prepare` writes, {wrong!r} "
                    "first: prepare it again"
                )
    return found


def _describe_dataset(folder: Path, schemas: Mapping[str, pa.Schema]) -> Any:
    """Features and split sizes of every config, in the form of a card's metadata."""
    infos = DatasetInfosDict()
    for config, files in CONFIGS.items():
        splits = SplitDict()
        for split, name in files.items():
            table = pq.read_table(folder / name)
            splits.add(SplitInfo(split, num_bytes=table.nbytes, num_examples=len(table)))
        first = next(iter(files.values()))
        infos[config] = DatasetInfo(
            features=Features.from_arrow_schema(schemas[first]),
            splits=splits,
            download_size=sum((folder / name).stat().st_size for name in files.values()),
            dataset_size=sum(split.num_bytes for split in splits.values()),
        )
    data = DatasetCardData()
    infos.to_dataset_card_data(data)
    return data["dataset_info"]


def _write_notes(protocol: Mapping[str, Any], permission: bool) -> list[str]:
    notes = []
    if permission:
        notes.append("note: its license forbids sharing it; your permission is stated in the card")
    elif protocol["license"] == UNKNOWN_LICENSE:
        notes.append(
            "note: its license is not recorded: name it with ccf-llm prepare table --license"
        )
    return notes


def _send(
    result: PushedDataset, files: Mapping[str, Path], api: HfApi, where: dict[str, Any]
) -> None:
    try:
        head = open_repo(api, result.repo, **where)
        commit = api.create_commit(
            result.repo,
            [CommitOperationAdd(name, path) for name, path in files.items()],
            commit_message="Upload prepared data",
            repo_type="dataset",
            parent_commit=head.sha,
        )
    except InputError:
        raise
    except Exception as error:  # of httpx, of upload threads and of the Hub: they share no class
        raise InputError(explain(error, result.repo)) from error
    result.private = bool(head.private)
    result.commit, result.unchanged = commit.oid, commit.oid == head.sha
    result.url = f"{api.endpoint}/datasets/{result.repo}/tree/{commit.oid}"
