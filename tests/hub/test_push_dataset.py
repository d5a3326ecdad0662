"""`ccf-llm push-dataset`: what is sent, what is refused, and that `load_dataset` reads it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pandas as pd
import pytest
from hub.loopback import Fault, LoopbackHub
from hub.loopback_store import File
from huggingface_hub import DatasetCard, HfApi
from raw_data import Raw, small_raw, write_raw

from ccf_llm_hf.cli import main as cli
from ccf_llm_hf.data import PrepareConfig, interactions, load_prepared, prepare
from ccf_llm_hf.data.asset_list import MOVIELENS_LICENSE
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.push_dataset import MOVIELENS_TITLES, push_dataset

REPO = "acme/shop-ctr"
SENT = {
    "README.md",
    "protocol.json",
    *(f"data/{split}.parquet" for split in ("train", "validation", "test")),
    "items/items.parquet",
    "interactions/interactions.parquet",
}


def prepared(tmp_path: Path, raw: Raw | None = None, kind: str = "csv", **options: object) -> Path:
    given = write_raw(raw or small_raw(), kind, tmp_path / "raw")
    config = {"out": str(tmp_path / "data"), **given, **options}
    return prepare(PrepareConfig(**config), summary=False)  # type: ignore[arg-type]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return prepared(tmp_path, name="shop", license="cc-by-4.0", language="en")


@pytest.fixture
def movielens(tmp_path: Path) -> Path:
    return prepared(tmp_path, kind="dat")


def stored(hub: LoopbackHub, repo: str = REPO) -> dict[str, bytes]:
    """Files at the head of the repository."""
    commit = hub.store.repo(repo, "dataset").commit_at("main")
    return {name: file.data for name, file in commit.files.items() if name != ".gitattributes"}


LOAD = """
import json, sys
sys.modules["ccf_llm_hf"] = None  # importing it fails
from datasets import load_dataset
repo, revision = sys.argv[1:]
found = {}
for config in (None, "items", "interactions"):
    loaded = load_dataset(repo, config, revision=revision)
    found[str(config)] = {
        split: [str(rows.features), rows.to_list()] for split, rows in loaded.items()
    }
print("FOUND", json.dumps(found))
"""


def test_what_is_published_loads_in_a_process_without_the_package(
    shop: Path, tmp_path: Path, hub: LoopbackHub
) -> None:
    before = load_prepared(shop)
    pushed = push_dataset(shop, REPO, private=True)
    assert hub.store.repo(REPO, "dataset").private and pushed.private
    assert stored(hub).keys() == pushed.files.keys() == SENT
    environment = hub.environment(tmp_path / "home", token="hf_bob")
    run = subprocess.run(
        [sys.executable, "-c", LOAD, REPO, str(pushed.commit)],
        env=os.environ | environment | {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.split("FOUND ")[1])
    for split, (features, rows) in found["None"].items():
        assert rows == before.splits[split].to_list()
        assert features == str(before.splits[split].features)
    assert found["items"]["train"] == [str(before.items.features), before.items.to_list()]
    log = interactions(shop)
    assert [row["timestamp"] for row in found["interactions"]["train"][1]] == list(log["timestamp"])


def test_the_card_states_configs_features_splits_license_and_protocol(
    shop: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    push_dataset(shop, REPO)
    (tmp_path / "README.md").write_bytes(stored(hub)["README.md"])
    card = DatasetCard.load(tmp_path / "README.md")
    data, protocol = card.data.to_dict(), load_prepared(shop).protocol
    assert (data["license"], data["language"]) == ("cc-by-4.0", "en")
    assert data["size_categories"] == ["n<1K"]
    assert [config["config_name"] for config in data["configs"]] == [
        "default",
        "items",
        "interactions",
    ]
    infos = {info["config_name"]: info for info in data["dataset_info"]}
    sizes = {split["name"]: split["num_examples"] for split in infos["default"]["splits"]}
    assert sizes == {name: split["rows"] for name, split in protocol["splits"].items()}
    features = {feature["name"]: feature for feature in infos["default"]["features"]}
    assert features["label"]["dtype"] == "int64"
    assert features["history"] == {"name": "history", "list": "string"}
    assert [feature["name"] for feature in infos["items"]["features"]][:2] == ["item_id", "title"]
    for rule in ("label_rule", "split_rule", "history_rule"):
        assert protocol[rule] in card.text
    assert f'path = "{REPO}"\nrows = load_dataset(path)' in card.text
    assert "Do not" not in card.text


def test_a_public_data_set_is_noted_for_the_cards_of_models(shop: Path, hub: LoopbackHub) -> None:
    push_dataset(shop, REPO)
    assert load_prepared(shop).protocol["hub_id"] == REPO
    assert json.loads(stored(hub)["protocol.json"])["hub_id"] == REPO
    again = push_dataset(shop, REPO)
    assert again.unchanged
    assert len(hub.store.repo(REPO, "dataset").commits) == 2  # the Hub's own, and the upload


def test_a_private_data_set_leaves_no_trace_in_the_folder(shop: Path, hub: LoopbackHub) -> None:
    before = {path: path.read_bytes() for path in shop.rglob("*") if path.is_file()}
    push_dataset(shop, REPO, private=True)
    assert {path: path.read_bytes() for path in shop.rglob("*") if path.is_file()} == before


def test_only_what_prepare_wrote_is_sent(shop: Path, hub: LoopbackHub) -> None:
    for name in (".env", "notes.txt", "data/extra.parquet", "items/passwords.csv"):
        (shop / name).write_text("hf_" + "x" * 34)
    push_dataset(shop, REPO)
    assert stored(hub).keys() == SENT


def test_a_dry_run_lists_the_files_and_sends_nothing(
    shop: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.inject(None)
    assert cli.main(["push-dataset", str(shop), "--repo", REPO, "--dry-run"]) == 0
    out = capsys.readouterr().out
    size = (shop / "items/items.parquet").stat().st_size
    assert f"{size:>13,}  items/items.parquet" in out
    assert "nothing was sent" in out
    assert {request.method for request in hub.requests} == {"GET"}
    assert cli.main(["push-dataset", str(shop), "--repo", REPO, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"].keys() == SENT


def test_the_command_publishes_and_says_how_to_load(
    shop: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["push-dataset", str(shop), "--repo", REPO, "--private"]) == 0
    out = capsys.readouterr().out
    commit = hub.store.repo(REPO, "dataset").branches["main"]
    assert f'load_dataset("{REPO}", "items", revision="{commit}")' in out
    assert "(private)" in out


def test_ratings_of_movielens_need_permission(
    movielens: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.inject(None)
    for more in ([], ["--private"], ["--dry-run"]):
        assert cli.main(["push-dataset", str(movielens), "--repo", REPO, *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert MOVIELENS_LICENSE in error
        assert "--i-have-permission" in error
    assert hub.requests == []
    argv = ["push-dataset", str(movielens), "--repo", REPO, "--i-have-permission"]
    assert cli.main(argv) == 0
    card = stored(hub)["README.md"].decode()
    assert "license: other" in card
    assert "Do not pass this on" in card
    assert "Do not upload" not in card


def test_movielens_is_recognized_in_a_table_by_its_titles(tmp_path: Path, hub: LoopbackHub) -> None:
    raw = small_raw()
    titles = sorted(MOVIELENS_TITLES)
    raw.items[:4] = [(raw.items[n][0], titles[n], "1995", "Drama") for n in range(4)]
    folder = prepared(tmp_path, raw, license="cc-by-4.0")
    with pytest.raises(InputError, match="titles are those of MovieLens"):
        push_dataset(folder, REPO)
    push_dataset(folder, REPO, permission=True)
    assert "license: other" in stored(hub)["README.md"].decode()


def test_few_of_those_titles_are_no_reason_to_refuse(tmp_path: Path, hub: LoopbackHub) -> None:
    raw = small_raw()
    titles = sorted(MOVIELENS_TITLES)
    raw.items[:3] = [(raw.items[n][0], titles[n], "1995", "Drama") for n in range(3)]
    pushed = push_dataset(prepared(tmp_path, raw), REPO, dry_run=True)
    assert "its license is not recorded" in pushed.as_text()


def test_damaged_and_altered_folders_are_refused(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a prepared folder"):
        push_dataset(tmp_path, REPO, dry_run=True)
    with pytest.raises(InputError, match="not of the form org/name"):
        push_dataset(shop, "shop", dry_run=True)
    items = shop / "items/items.parquet"
    pd.read_parquet(items).assign(email="a@b.c").to_parquet(items, index=False)
    with pytest.raises(InputError, match=r"items\.parquet has other columns .* 'email' first"):
        push_dataset(shop, REPO, dry_run=True)
    items.write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"items\.parquet is missing or damaged"):
        push_dataset(shop, REPO, dry_run=True)


def test_a_protocol_that_does_not_tell_the_license_is_refused(shop: Path) -> None:
    file = shop / "protocol.json"
    protocol = json.loads(file.read_text())
    del protocol["redistributable"]
    file.write_text(json.dumps(protocol))
    with pytest.raises(InputError, match=r"protocol\.json lacks 'redistributable'"):
        push_dataset(shop, REPO, dry_run=True)


def test_a_secret_in_the_protocol_is_refused(shop: Path) -> None:
    file = shop / "protocol.json"
    protocol = json.loads(file.read_text())
    protocol["source"] = "/home/me/ratings.csv"
    file.write_text(json.dumps(protocol))
    with pytest.raises(InputError, match=r"an absolute path .*must not be published"):
        push_dataset(shop, REPO, dry_run=True)


@pytest.mark.parametrize("kind", ["error", "busy", "drop", "lose"])
def test_a_fault_at_any_request_publishes_all_or_nothing_and_again_completes_it(
    shop: Path, hub: LoopbackHub, naps: list[float], kind: Literal["error", "busy", "drop", "lose"]
) -> None:
    hub.inject(None)
    push_dataset(shop, "acme/count", private=True)
    count = len(hub.requests)
    assert count >= 5
    broke_off = 0
    for at in range(1, count + 1):
        repo = f"acme/shop-{at}"
        hub.store.objects.clear()  # else large files of earlier rounds are not sent again
        hub.inject(Fault(kind, at=at, times=None))
        try:
            push_dataset(shop, repo, private=True)
        except InputError as error:
            assert "run the same again" in str(error)
            broke_off += 1
        hub.inject(None)
        if ("dataset", repo) in hub.store.repos:
            assert stored(hub, repo).keys() in (set(), SENT)
        push_dataset(shop, repo, private=True)
        assert stored(hub, repo).keys() == SENT
        assert len(hub.store.repo(repo, "dataset").commits) == 2
    assert broke_off >= count - 1


@pytest.mark.parametrize(
    ("token", "reason"), [("hf_eve", "no such repository|may not write"), ("hf_bob", "write")]
)
def test_a_token_that_may_not_write_is_refused(
    shop: Path, hub: LoopbackHub, token: str, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        push_dataset(shop, REPO, token=token)
    assert ("dataset", REPO) not in hub.store.repos


def test_a_public_repository_is_not_taken_for_private_data(shop: Path, hub: LoopbackHub) -> None:
    push_dataset(shop, REPO)
    with pytest.raises(InputError, match="is public"):
        push_dataset(shop, REPO, private=True)


def test_another_data_set_is_not_pushed_over(
    shop: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    HfApi().create_repo(REPO, repo_type="dataset")
    found = hub.store.repo(REPO, "dataset")
    files = found.commit_at("main").files | {"train.csv": File(b"a,b")}
    found.add_commit("main", "by hand", "ada", files)
    for flags in (["--dry-run"], []):
        assert cli.main(["push-dataset", str(shop), "--repo", REPO, *flags]) == 2
        assert "something else than a prepared folder (train.csv)" in capsys.readouterr().err
    assert stored(hub).keys() == {"train.csv"}
    assert cli.main(["push-dataset", str(shop), "--repo", REPO, "--replace"]) == 0
    assert stored(hub).keys() == {"train.csv", *SENT}
