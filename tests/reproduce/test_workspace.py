"""Data and CF tables are made once, as each track asks."""

import pytest
from prepared_folder import make_rows, write_prepared

from ccf_llm_hf.cf.config import CF_CONFIGS, MFConfig
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.reproduce import workspace
from ccf_llm_hf.reproduce.workspace import STORED_HISTORY, TABLES, Workspace

FAST = MFConfig(
    dim=2, cross_fit="snapshots", snapshots=1, l2_factors=2.0, l2_user_bias=1.0, l2_item_bias=1.0
)


def test_data_is_prepared_once_a_track(tmp_path, monkeypatch):
    asked = []

    def prepared(config):
        asked.append(config)
        return write_prepared(tmp_path / "work" / config.out.rsplit("/", 1)[1], make_rows(200))

    monkeypatch.setattr(workspace, "prepare", prepared)
    here = Workspace(tmp_path / "work", "synthetic", offline=True)
    for track in ("protocol", "open", "protocol", "open"):
        assert (here.data(track) / "protocol.json").is_file()
    protocol, opened = asked
    assert protocol.source == opened.source == "synthetic" and protocol.offline
    assert (protocol.histories, protocol.max_history) == ("likes", None)
    assert (opened.histories, opened.max_history) == ("signed", STORED_HISTORY)
    assert here.data("protocol") != here.data("open")


def test_a_table_is_fitted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "TABLES", {"protocol": {"mf": ("mf", FAST)}, "open": {}})
    write_prepared(tmp_path / "data-protocol", make_rows(600))
    here = Workspace(tmp_path, "synthetic")
    folder = here.cf("protocol", "mf")
    assert CFVectors.load(folder).model_name == "mf"
    file = folder / "cf_embeddings.safetensors"
    stamp = file.stat().st_mtime_ns
    assert here.cf("protocol", "mf") == folder
    assert file.stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="the open track has no CF table 'mf'"):
        here.cf("open", "mf")


def test_a_folder_of_another_data_set_is_refused(tmp_path):
    write_prepared(tmp_path / "data-open", make_rows(200))
    with pytest.raises(InputError, match=r"data-open holds synthetic, not ml-1m: .*--work"):
        Workspace(tmp_path, "ml-1m").check("open")
    Workspace(tmp_path, "ml-1m").check("protocol")  # which is not there
    Workspace(tmp_path, "synthetic").check("open")


def test_only_the_open_track_fits_ratings_outside_the_train_split():
    for name, (kind, config) in TABLES["protocol"].items():
        assert isinstance(config, CF_CONFIGS[kind]), name
        assert getattr(config, "rows", "train") == MFConfig().rows == "train"
    assert TABLES["open"]["mf"][1].rows == "earlier"


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("data-open/data/test.parquet is damaged", "data-open"),
        ("cf-protocol-mf: mend it", "cf-protocol-mf"),
        ("cells/open-a.b_c-seed0-quick/stages/main/stage.json.", "cells/open-a.b_c-seed0-quick"),
    ],
)
def test_the_folder_to_delete_is_found_in_what_a_reader_says(tmp_path, file, folder):
    here = Workspace(tmp_path, "synthetic")
    assert here.holding(f"look: {tmp_path}/{file}") == tmp_path / folder
    assert here.holding(f"{tmp_path} cannot be written to") is None
