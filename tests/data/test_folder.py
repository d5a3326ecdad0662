import os
from collections.abc import Callable
from pathlib import Path

import pytest
from raw_data import small_raw

from ccf_llm_hf.data import PrepareConfig, folder, load_prepared, prepare
from ccf_llm_hf.errors import InputError

Make = Callable[..., PrepareConfig]


def break_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(protocol: dict) -> str:
        raise RuntimeError("disk full")

    monkeypatch.setattr(folder, "render_dataset_card", fail)


def entries(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_a_failure_leaves_nothing_behind(
    prepared_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared_config()
    break_card(monkeypatch)
    with pytest.raises(RuntimeError, match="disk full"):
        prepare(config)
    assert entries(tmp_path) == {"raw"}


@pytest.mark.parametrize("moment", ["while writing", "while renaming"])
def test_a_failure_leaves_the_earlier_folder(
    moment: str, prepared_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = prepare(prepared_config(), summary=False)
    before = (out / "protocol.json").read_text()
    raw = small_raw()
    raw.rows.pop()
    config = prepared_config(raw)
    if moment == "while writing":
        break_card(monkeypatch)
    else:
        rename = Path.rename

        def fail(self: Path, target: Path) -> Path:
            if self.name == ".partial-out":
                raise OSError("no space")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises((RuntimeError, InputError), match=r"disk full|no space"):
        prepare(config)
    assert (out / "protocol.json").read_text() == before
    assert entries(tmp_path) == {"raw", "out"}


def test_an_earlier_prepared_folder_is_replaced(prepared_config: Make, tmp_path: Path) -> None:
    prepare(prepared_config(), summary=False)
    raw = small_raw()
    raw.rows.pop()
    out = prepare(prepared_config(raw), summary=False)
    assert load_prepared(out).protocol["accepted_rows"] == len(raw.rows)
    assert entries(tmp_path) == {"raw", "out"}


def test_an_empty_folder_and_a_missing_parent_are_fine(
    prepared_config: Make, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    prepare(prepared_config(), summary=False)
    out = prepare(prepared_config(out=str(tmp_path / "a" / "b")), summary=False)
    assert entries(out) == folder.WRITTEN


def test_a_link_stays_a_link(prepared_config: Make, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    prepare(prepared_config(), summary=False)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "protocol.json").is_file()


@pytest.mark.parametrize("name", ["thesis.tex", "data/x", "protocol.json", "README.md"])
def test_a_foreign_folder_is_refused(name: str, prepared_config: Make, tmp_path: Path) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(InputError, match="--out"):
        prepare(prepared_config())
    assert file.read_text() == "{}"


def test_a_prepared_folder_with_something_added_is_refused(prepared_config: Make) -> None:
    out = prepare(prepared_config(), summary=False)
    (out / "cf").mkdir()
    with pytest.raises(InputError, match="holds 'cf', which `prepare` did not write"):
        prepare(prepared_config())
    assert (out / "cf").is_dir()


def test_a_file_is_refused(prepared_config: Make, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        prepare(prepared_config())


def test_an_unwritable_place_is_an_input_error(prepared_config: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        prepare(prepared_config(out=str(tmp_path / "file" / "out")))


def test_files_are_readable_by_others(prepared_config: Make) -> None:
    mask = os.umask(0o022)
    try:
        out = prepare(prepared_config(), summary=False)
    finally:
        os.umask(mask)
    assert out.stat().st_mode & 0o777 == 0o755
